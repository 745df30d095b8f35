use super::stock::Two;
use super::*;

fn addresses(frames: &Frames<impl Platform>, range: core::ops::Range<u64>) -> Vec<*mut u8> {
    range.map(|index| frames.pointer(nth(index))).collect()
}

#[test]
fn lent_frames_are_freed_one_by_one() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    let run = frames.allocate_run(21, Order::ZERO).unwrap();
    frames.make_single(run, 21);
    frames.verify().unwrap();
    (0..21).rev().for_each(|index| frames.free_metadata(run.offset(index), 1));
    assert_eq!(frames.stats(), before);
}

#[test]
fn free_frames_go_back_to_where_they_came_from() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    assert!(frames.allocate_at(nth(20), 3));
    let mut given = Vec::new();
    // While it is called, no lock is held.
    let mut give = |pointer: *mut u8| {
        assert!(frames.stats().free < 63);
        given.push(pointer);
    };
    assert_eq!(frames.return_free_to(&mut give, 70), 0);
    assert_eq!(frames.return_free_to(&mut give, 10), 50);
    assert_eq!((frames.stats().free, frames.stats().total), (10, 14));
    frames.verify().unwrap();
    assert_eq!(frames.return_free_to(&mut give, 0), 10);
    assert_eq!(given.len(), 60);
    given.sort();
    let kept = addresses(&frames, 20..23);
    let expected: Vec<_> = addresses(&frames, 0..63).into_iter().filter(|pointer| !kept.contains(pointer)).collect();
    assert_eq!(given, expected);
    // They can come again.
    assert_eq!(add(&frames, &[machine.usable(0, 20), machine.usable(23, 40)]), Ok(60));
    frames.verify().unwrap();
    free_run(&frames, nth(20), 3);
    assert_eq!(frames.stats().free, 63);
}

#[test]
fn dissolved_frames_have_given_everything_back_and_are_as_new() {
    // Frames first, and later in two places.
    let (large, small, later) = if cfg!(miri) { (20, 3, 20) } else { (700, 10, 500) };
    let machine = Machine::new(START, 2048);
    let frames: Frames<Two> = Frames::with_zones([0, 0]);
    for count in [large, small] {
        // SAFETY: the machine outlives the frames.
        unsafe { frames.init([machine.usable(0, count)], machine.base()) }.unwrap();
        let regions = [machine.usable(900, later), machine.usable(1500, 10)];
        assert_eq!(add(&frames, &regions), Ok(later + 10));
        let block = frames.allocate(order(3)).unwrap();
        let single = frames.allocate(Order::ZERO).unwrap();
        free(&frames, single, Order::ZERO);
        frames.make_slab(block, 8, 3, SlabPlace { header: frames.pointer(block), first_slot: 0 });
        frames.verify().unwrap();
        let mut expected = addresses(&frames, 0..count as u64);
        expected.extend(addresses(&frames, 900..900 + later as u64));
        expected.extend(addresses(&frames, 1500..1510));
        let mut given = Vec::new();
        let mut give = |pointer: *mut u8| {
            // SAFETY: it is nobody's now, and may be overwritten at once.
            unsafe { pointer.write_bytes(0xa5, 4096) };
            given.push(pointer);
        };
        // SAFETY: nobody uses the frames.
        unsafe { frames.dissolve(&mut give) };
        given.sort();
        assert_eq!(given, expected);
        assert_eq!(frames.stats(), Frames::<Two>::with_zones([0, 0]).stats());
        assert_eq!(frames.owner(nth(1)), Owner::Unmanaged);
        assert_eq!(add(&frames, &regions), Err(AddError::NotInitialised));
    }
}
