use super::*;

const MIB: u64 = 256;

#[test]
fn a_first_region_of_one_frame_is_allocatable_and_larger_ones_follow() {
    let machine = Machine::new(START, 2048);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(100, 1)], [0, 0]);
    assert_eq!(frames.allocate(Order::ZERO), Some(nth(100)));
    assert_eq!(add(&frames, &[machine.usable(1000, 24)]), Ok(24));
    assert_eq!((frames.stats().total, frames.stats().free, frames.stats().metadata), (25, 21, 3));
    assert_eq!(add(&frames, &[machine.usable(1500, 300), machine.usable(200, 50)]), Ok(350));
    frames.verify().unwrap();
    free(&frames, nth(100), Order::ZERO);
    let all = take_all(&frames, Order::ZERO);
    assert_eq!(all.len(), frames.stats().total - frames.stats().metadata);
    all.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    frames.verify().unwrap();
}

#[test]
fn regions_that_touch_merge() {
    let machine = Machine::new(START, 64);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(0, 16)], [0, 0]);
    assert_eq!(add(&frames, &[machine.usable(32, 32)]), Ok(32));
    assert_eq!(add(&frames, &[machine.usable(16, 16)]), Ok(16));
    frames.verify().unwrap();
    assert_eq!(frames.stats().free, 64 - 3);
    let largest = frames.allocate(order(5));
    assert_eq!(largest, Some(nth(32)), "both halves were one block, but for the nodes in the first");
}

#[test]
fn what_cannot_be_added_is_an_error_and_changes_nothing() {
    let machine = Machine::new(START, 1024);
    let unused = Frames::<NoInterrupts>::new();
    assert_eq!(add(&unused, &[machine.region()]), Err(AddError::NotInitialised));
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(8, 4)], [0, 0]);
    assert!(frames.allocate_at(nth(8), 4));
    let before = frames.stats();
    assert_eq!(add(&frames, &[]), Err(AddError::NoUsableMemory));
    assert_eq!(add(&frames, &[Region::usable(START, 4095)]), Err(AddError::NoUsableMemory));
    let overlap = add(&frames, &[machine.usable(600, 100), machine.usable(0, 9)]);
    assert_eq!(overlap, Err(AddError::AlreadyManaged { frame: nth(8) }));
    let no_room = AddError::MetadataDoesNotFit { needed: 3 * 4096, largest: 3 * 4096 };
    assert_eq!(add(&frames, &[machine.usable(600, 3)]), Err(no_room));
    let change = frames.begin_change();
    assert_eq!(add(&frames, &[machine.usable(600, 100)]), Err(AddError::InProgress));
    assert_eq!(frames.remove(0..u64::MAX), Err(RemoveError::InProgress));
    drop(change);
    let range = |offset: usize, bytes| {
        // SAFETY: refused, or of the machine.
        unsafe { frames.add_range(machine.base().wrapping_add(offset), bytes) }
    };
    assert_eq!(range(16 << 40, 8192), Err(AddError::BeyondReach));
    assert_eq!(range((16_usize << 40).wrapping_neg(), 8192), Err(AddError::BeyondReach));
    assert_eq!(range(START as usize + 1, 8190), Err(AddError::NoUsableMemory));
    assert_eq!(frames.stats(), before);
    assert_eq!(add(&frames, &[machine.usable(600, 4)]), Ok(4));
    assert_eq!(range(START as usize + 1, 4 * 4096), Ok(3));
    for error in
        [AddError::NotInitialised, AddError::InProgress, AddError::NoUsableMemory, no_room, AddError::BeyondReach]
    {
        assert!(!error.to_string().is_empty());
    }
    assert_eq!(overlap.unwrap_err().to_string(), "the frame at 0x4008000 is managed already");
    frames.verify().unwrap();
}

#[test]
fn an_added_region_can_be_removed_whole_and_added_again() {
    let machine = Machine::new(START, 2048);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(0, 64)], [0, 0]);
    for round in 0..3 {
        let before = frames.stats();
        assert_eq!(add(&frames, &[machine.usable(600, 700)]), Ok(700));
        assert_eq!(frames.stats().metadata, 1 + 6, "four leaves, two nodes above, in round {round}");
        frames.verify().unwrap();
        let all = nth(600).address()..nth(1300).address();
        let one = frames.allocate_at(nth(700), 1);
        assert!(one);
        assert_eq!(frames.remove(all.clone()), Err(RemoveError::Busy { frame: nth(700) }));
        frames.verify().unwrap();
        free(&frames, nth(700), Order::ZERO);
        assert_eq!(frames.remove(all.clone()), Ok(700));
        assert_eq!(frames.remove(all), Ok(0));
        frames.verify().unwrap();
        assert_eq!((frames.stats().total, frames.owner(nth(650))), (before.total, Owner::Unmanaged));
        assert!(report_of(|| free(&frames, nth(700), Order::ZERO)).ends_with("not memory of this allocator"));
    }
}

#[test]
fn only_whole_frames_inside_are_removed_and_records_stay() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let at = |index: u64| nth(index).address();
    assert_eq!(frames.remove(at(3) + 1..at(6) - 1), Ok(1));
    assert_eq!(frames.owner(nth(4)), Owner::Unmanaged);
    assert!(frames.owner(nth(3)) != Owner::Unmanaged && frames.owner(nth(5)) != Owner::Unmanaged);
    assert_eq!(frames.remove(at(40)..u64::MAX), Err(RemoveError::Records { frame: nth(63) }));
    let (start, end) = (at(9), at(5));
    assert_eq!(frames.remove(start..end), Ok(0));
    assert_eq!(frames.remove(0..at(0)), Ok(0));
    assert_eq!(frames.remove(at(0)..at(63)), Ok(62));
    assert_eq!((frames.stats().total, frames.stats().free), (1, 0));
    assert_eq!(add(&frames, &[machine.usable(0, 63)]), Ok(63), "the records are there still");
    frames.verify().unwrap();
    let errors = [RemoveError::InProgress, RemoveError::Busy { frame: nth(1) }, RemoveError::Records { frame: nth(1) }];
    let texts = errors.map(|error| error.to_string());
    assert_eq!(
        texts[1..],
        ["the frame at 0x4001000 is in use", "the frame at 0x4001000 holds the allocator's records"]
    );
}

#[test]
fn a_reserved_range_is_never_handed_out() {
    let machine = Machine::new(START, 64);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(0, 20), machine.usable(30, 30)], [0, 0]);
    let at = |index: u64| nth(index).address();
    let total = frames.stats().total;
    assert_eq!(frames.reserve(at(4) + 1..at(4) + 2), Ok(()), "every frame with a byte of it");
    assert_eq!(frames.reserve(at(15)..at(33)), Ok(()), "a hole in it does not matter");
    assert_eq!(frames.reserve(at(7)..at(7)), Ok(()), "nothing");
    assert_eq!(frames.stats().total, total - 1 - 5 - 3);
    assert!(frames.allocate_at(nth(10), 1));
    let before = frames.stats();
    assert_eq!(frames.reserve(at(8)..at(12)), Err(RemoveError::Busy { frame: nth(10) }));
    assert_eq!(frames.stats(), before);
    let all = take_all(&frames, Order::ZERO);
    let reserved = |frame: &Frame| *frame == nth(4) || (nth(15)..nth(33)).contains(frame);
    assert!(!all.iter().any(reserved));
    all.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    frames.verify().unwrap();
}

#[test]
fn a_plain_virtual_range_is_cut_to_pages_and_numbered_as_its_addresses_are() {
    let machine = Machine::new(START, 256);
    let start = machine.base().wrapping_add(START as usize + 100);
    let frames = Frames::<NoInterrupts>::new();
    // SAFETY: the machine's memory, which outlives the frames.
    unsafe { frames.init_range(start, 100 << 10) }.unwrap();
    assert_eq!(frames.stats().total, 24, "less the part of a page at either end");
    frames.verify().unwrap();
    for size in 0..=3 {
        let block = frames.allocate(order(size)).unwrap();
        let pointer = frames.pointer(block);
        assert!(pointer.addr().is_multiple_of(4096 << size) && frames.frame_of(pointer) == Some(block));
        // SAFETY: the block is this test's.
        unsafe { pointer.write_bytes(1, 4096 << size) };
    }
    let further = machine.base().wrapping_add(START as usize + (1 << 20) - 40_000);
    // SAFETY: as above.
    assert_eq!(unsafe { frames.add_range(further, 40_000) }, Ok(9));
    frames.verify().unwrap();
    // SAFETY: refused.
    assert_eq!(unsafe { frames.init_range(start, 1 << 16) }, Err(InitError::AlreadyInitialised));
}

#[test]
fn a_virtual_range_that_cannot_be_is_refused() {
    let machine = Machine::new(START, 16);
    let frames = Frames::<NoInterrupts>::new();
    let start = machine.base().wrapping_add(START as usize);
    // SAFETY: refused, all of them.
    let init = |start: *mut u8, bytes| unsafe { frames.init_range(start, bytes) };
    assert_eq!(init(start.wrapping_add(1), 8000), Err(InitError::NoUsableMemory));
    assert_eq!(init(start, 0), Err(InitError::NoUsableMemory));
    assert_eq!(init(start, 9 << 40), Err(InitError::BeyondReach));
    assert_eq!(init(core::ptr::without_provenance_mut(usize::MAX - 10), 100), Err(InitError::BeyondReach));
    assert!(InitError::BeyondReach.to_string().contains("too long"));
    assert_eq!(init(start, 16 * 4096), Ok(()));
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn a_second_megabyte_may_come_in_pieces() {
    let machine = Machine::new(START, 4 * MIB as usize);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(0, MIB as usize)], [0, 0]);
    let pieces = (MIB as usize..4 * MIB as usize).step_by(8);
    pieces.for_each(|first| assert_eq!(add(&frames, &[machine.usable(first, 8)]), Ok(8)));
    frames.verify().unwrap();
    assert_eq!(frames.stats().largest_block(), Some(order(9)));
    assert_eq!(frames.stats().metadata, 1 + 5);
}
