use super::*;

#[test]
fn a_run_is_found_where_no_single_block_holds_it() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    // The records have the last frame, so 32 to 62 are free and no block of 32 is.
    assert!(frames.allocate_at(nth(0), 32));
    assert_eq!(frames.allocate_run(32, Order::ZERO), None);
    for count in [17, 24, 30, 31] {
        let run = frames.allocate_run(count, Order::ZERO).unwrap();
        assert_eq!(run, nth(32));
        frames.verify().unwrap();
        free_run(&frames, run, count);
    }
    assert_eq!(frames.allocate_run(17, order(6)), None, "aligned to 64 frames there is none");
    let one = frames.allocate_run(1, order(5)).unwrap();
    assert_eq!(one, nth(32), "a smaller block may have the alignment");
}

#[test]
fn half_of_a_heap_with_a_scatter_of_small_things_is_had_again_and_again() {
    let machine = Machine::new(START, if cfg!(miri) { 256 } else { 4096 });
    let frames = all_of::<NoInterrupts>(&machine);
    let scatter: Vec<_> = (0..40).map(|_| frames.allocate(Order::ZERO).unwrap()).collect();
    scatter.iter().step_by(2).for_each(|frame| free(&frames, *frame, Order::ZERO));
    let half = frames.stats().free as u32 / 2 - 20;
    for _ in 0..20 {
        let run = frames.allocate_run(half, Order::ZERO).expect("half of what is free");
        free_run(&frames, run, half);
    }
    frames.verify().unwrap();
}

#[test]
fn just_the_frames_asked_for_are_allocated_or_none() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    for (first, count) in [(0, 1), (5, 3), (7, 50), (62, 1), (0, 63)] {
        assert!(frames.allocate_at(nth(first), count));
        assert_eq!(frames.stats().free, before.free - count as usize);
        frames.verify().unwrap();
        assert!(!frames.allocate_at(nth(first), count), "twice");
        free_run(&frames, nth(first), count);
        assert_eq!(frames.stats(), before);
    }
    assert!(frames.allocate_at(nth(20), 2));
    let busy = frames.stats();
    let refused = [(20, 1), (10, 11), (21, 5), (0, 0), (60, 10), (63, 1), (100, 1)];
    assert!(refused.iter().all(|(first, count)| !frames.allocate_at(nth(*first), *count)));
    assert!(!frames.allocate_at(nth(0), u32::MAX) && !frames.allocate_at(Frame::default(), 1));
    assert_eq!(frames.stats(), busy);
}

#[test]
fn a_run_grows_where_the_frames_behind_it_are_free() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    assert!(frames.allocate_at(nth(3), 2) && frames.allocate_at(nth(30), 1));
    assert_eq!(frames.try_grow_run(nth(3), 2, 27), Ok(true));
    frames.verify().unwrap();
    assert_eq!(frames.owner(nth(3)), Owner::Pages(27));
    assert_eq!(frames.try_grow_run(nth(3), 27, 28), Ok(false), "frame 30 is taken");
    assert_eq!(frames.try_grow_run(nth(3), 27, 27), Ok(true));
    assert_eq!(frames.try_grow_run(nth(3), 27, 20), Ok(false));
    assert_eq!(frames.try_grow_run(nth(3), 27, u32::MAX), Ok(false));
    assert_eq!(frames.try_grow_run(nth(30), 1, 34), Ok(false), "the records have frame 63");
    assert_eq!(frames.try_grow_run(nth(3), 26, 30), Err(Fault::BadFrameCount { freed: 26, allocated: 27 }));
    assert_eq!(frames.try_grow_run(nth(4), 1, 2), Err(Fault::BadBase));
    assert_eq!(frames.try_grow_run(nth(40), 1, 2), Err(Fault::DoubleFree));
    assert_eq!(frames.try_shrink_run(nth(3), 27, 27), Ok(()));
    assert_eq!(frames.try_shrink_run(nth(3), 27, 1), Ok(()));
    free_run(&frames, nth(3), 1);
    free_run(&frames, nth(30), 1);
    assert_eq!(frames.stats(), before);
}

#[test]
fn many_single_frames_are_had_and_given_in_one_call() {
    let machine = Machine::new(START, 256);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    let mut bulk = [Frame::default(); 200];
    assert_eq!(frames.allocate_bulk(&mut bulk), 200);
    assert_eq!(frames.stats().free, before.free - 200);
    assert!(bulk.iter().all(|frame| frames.owner(*frame) == Owner::Pages(1)));
    frames.verify().unwrap();
    let mut rest = [Frame::default(); 100];
    let few = frames.allocate_bulk(&mut rest);
    assert_eq!(few, before.free - 200);
    assert!(rest[few..].iter().all(|frame| *frame == Frame::default()));
    // SAFETY: nobody uses them.
    unsafe { frames.free_bulk(&bulk) };
    // SAFETY: as above.
    unsafe { frames.free_bulk(&rest[..few]) };
    assert_eq!(frames.stats(), before);
    assert_eq!(frames.allocate_bulk(&mut []), 0);
}

#[test]
fn row_1_and_60_a_bad_frame_among_many_is_reported_and_those_before_it_are_freed() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let mut bulk = [Frame::default(); 4];
    assert_eq!(frames.allocate_bulk(&mut bulk), 4);
    let block = frames.allocate(order(2)).unwrap();
    let before = frames.stats().free;
    for (bad, text) in [
        (bulk[0], "double free: it is free already, or was never allocated"),
        (block, "wrong size: freed as 1 page frames, allocated as 4"),
        (block.offset(1), "not the start of an allocation"),
        (Frame::default(), "not memory of this allocator"),
    ] {
        // SAFETY: nobody uses them; the bad one is refused.
        let report = report_of(|| unsafe { frames.free_bulk(&[bulk[0], bad, bulk[1]]) });
        assert!(report.ends_with(text), "{report}");
        assert_eq!(frames.stats().free, before + 1);
        assert!(frames.allocate_at(bulk[0], 1), "the one before it was freed");
        assert_eq!(frames.owner(bulk[1]), Owner::Pages(1), "the one behind it was not");
    }
    frames.verify().unwrap();
}

#[test]
fn row_5_two_threads_free_one_frame_and_one_is_refused() {
    let machine = Machine::new(START, 16);
    let frames = all_of::<NoInterrupts>(&machine);
    for count in (0..if cfg!(miri) { 4 } else { 200 }).map(|round| 1 + round % 2) {
        let run = frames.allocate_run(count, Order::ZERO).unwrap();
        let refused = std::thread::scope(|scope| {
            let threads = [(); 2].map(|()| scope.spawn(|| frames.try_shrink_run(run, count, 0).is_err()));
            threads.map(|thread| thread.join().unwrap())
        });
        assert!(refused[0] != refused[1]);
    }
    frames.verify().unwrap();
    assert_eq!(frames.stats().free, 16);
}

#[test]
fn an_owned_block_is_freed_when_it_is_dropped() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    let block = frames.block(order(3)).unwrap();
    assert_eq!((block.count(), block.pointer()), (8, frames.pointer(block.frame())));
    // SAFETY: the block's bytes are its owner's.
    unsafe { block.pointer().write_bytes(1, 8 * 4096) };
    let run = frames.block_run(5, order(4)).unwrap();
    assert_eq!((run.count(), run.frame().number() % 16), (5, 0));
    assert_eq!(frames.stats().free, before.free - 13);
    drop(block);
    let (frame, count) = run.into_raw();
    assert_eq!(frames.stats().free, before.free - 5, "a raw one is not freed");
    // SAFETY: just taken apart.
    drop(unsafe { FrameBlock::from_raw(&frames, frame, count) });
    assert_eq!(frames.stats(), before);
    assert!(frames.block(order(10)).is_none() && frames.block_run(0, Order::ZERO).is_none());
}

#[test]
fn every_frame_of_a_slab_leads_to_its_header() {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let before = frames.stats();
    for count in [1, 2, 3, 5, 8, 13] {
        let run = frames.allocate_run(count, Order::ZERO).unwrap();
        let place = SlabPlace { header: frames.pointer(nth(50)).wrapping_add(640), first_slot: 77 };
        frames.make_slab(run, count, 77, place);
        for frame in (0..count).map(|index| run.offset(index)) {
            let Owner::Slab { order, cache: 77 } = frames.owner(frame) else { panic!("{:?}", frames.owner(frame)) };
            assert_eq!(frame.block_start(order), run);
            assert_eq!(frames.fault_at(frame), Fault::BadBase);
        }
        assert_eq!(frames.slab_place(run), place);
        frames.verify().unwrap();
        assert!(report_of(|| free_run(&frames, run, count)).ends_with("not the start of an allocation"));
        frames.free_slab(run, count);
        assert_eq!(frames.stats(), before);
    }
}

#[test]
fn blocks_that_are_no_buddies_serve_together() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let frames = heap.frames();
    let all = take_all(frames, Order::ZERO);
    let first = all.iter().min().unwrap().number();
    let at = |index: u32| *all.iter().find(|frame| frame.number() == first + index).unwrap();
    // Free: 3 to 31 and 33 on; no aligned block of 32 frames is among them.
    for index in (3..32).chain(33..50) {
        free(frames, at(index), Order::ZERO);
    }
    assert_eq!(frames.allocate(order(5)), None);
    let run = frames.allocate_run(29, Order::ZERO).expect("29 frames in a row");
    assert_eq!(run, at(3));
    assert_eq!(frames.allocate_run(18, Order::ZERO), None);
    let aligned = frames.allocate_run(13, order(2)).expect("from a multiple of four on");
    assert_eq!(aligned, at(36));
    free_run(frames, aligned, 13);
    let rest = frames.allocate_run(17, Order::ZERO).expect("17 frames in a row");
    assert_eq!((rest, frames.stats().free), (at(33), 0));
    assert_eq!(frames.verify(), Ok(()));
}
