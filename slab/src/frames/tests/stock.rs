use std::cell::Cell;

use super::*;

std::thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// Two CPUs with stocks; a thread is one, and says which.
#[derive(Debug)]
pub(super) struct Two;

// SAFETY: there are no interrupts. No two threads of these tests are the same CPU at once.
unsafe impl Platform for Two {
    const CPUS: usize = 2;

    fn current_cpu() -> usize {
        CPU.get()
    }

    fn disable_interrupts() -> bool {
        false
    }

    fn restore_interrupts(_: bool) {}
}

/// Runs `body` as another CPU.
pub(super) fn on_cpu<T>(cpu: usize, body: impl FnOnce() -> T) -> T {
    let before = CPU.replace(cpu);
    let result = body();
    CPU.set(before);
    result
}

/// So many that each stock may have all that it can.
const FRAMES: usize = 1024;
const CAPACITY: usize = 40;

fn machine() -> Machine {
    Machine::new(START, FRAMES)
}

#[test]
fn single_frames_come_in_batches_and_go_through_the_stock() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let before = frames.stats();
    assert_eq!((before.metadata, before.stocked), (4 + 1, 0));
    let one = frames.allocate(Order::ZERO).unwrap();
    let stats = frames.stats();
    assert_eq!((stats.stocked, stats.free), (CAPACITY / 2 - 1, before.free - 1));
    assert!(stats.to_string().contains("of the free ones 76 KiB are in stocks"));
    frames.verify().unwrap();
    free(&frames, one, Order::ZERO);
    assert_eq!(frames.stats().stocked, CAPACITY / 2);
    assert_eq!(frames.allocate(Order::ZERO), Some(one), "the last one freed is warm");
    free(&frames, one, Order::ZERO);
    assert_eq!(frames.drain_stock(), CAPACITY / 2);
    assert_eq!(frames.stats(), before);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn a_full_stock_is_drained_by_half() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let before = frames.stats();
    let mut bulk = [Frame::default(); 100];
    assert_eq!(frames.allocate_bulk(&mut bulk), 100);
    for (frame, freed) in bulk.iter().zip(1..) {
        free(&frames, *frame, Order::ZERO);
        let expected =
            if freed <= CAPACITY { freed } else { CAPACITY / 2 + (freed - CAPACITY - 1) % (CAPACITY / 2) + 1 };
        assert_eq!(frames.stats().stocked, expected);
    }
    frames.verify().unwrap();
    frames.drain_stock();
    assert_eq!(frames.stats(), before);
}

#[test]
fn row_1_a_stocked_frame_freed_again_is_refused() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let one = frames.allocate(Order::ZERO).unwrap();
    free(&frames, one, Order::ZERO);
    assert_eq!(frames.owner(one), Owner::Stock(Order::ZERO));
    for cpu in [0, 1, 2] {
        let report = report_of(|| on_cpu(cpu, || free(&frames, one, Order::ZERO)));
        assert!(report.contains("double free"), "{report}");
    }
    let report = report_of(|| free(&frames, one, order(1)));
    assert!(report.contains("double free"), "{report}");
    frames.verify().unwrap();
}

#[test]
fn row_1_the_frame_that_was_taken_out_last_is_known_and_refused_all_the_same() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let refused = |frame, text: &str| {
        let before = frames.stats();
        let report = report_of(|| free(&frames, frame, Order::ZERO));
        assert!(report.contains(text), "{report}");
        assert_eq!(frames.stats(), before);
    };
    refused(Frame::default(), "not memory of this allocator");
    let one = frames.allocate(Order::ZERO).unwrap();
    on_cpu(1, || free(&frames, one, Order::ZERO));
    refused(one, "double free");
    on_cpu(1, || frames.drain_stock());
    refused(one, "double free");
    assert!(frames.allocate_at(one, 2));
    refused(one, "freed as 1 page frames, allocated as 2");
    free_run(&frames, one, 2);
    assert!(frames.allocate_at(one, 1));
    free(&frames, one, Order::ZERO);
    assert_eq!(frames.stats().stocked, CAPACITY / 2);
    frames.verify().unwrap();
}

#[test]
fn a_refused_free_leaves_a_full_stock_as_it_is() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let mut bulk = [Frame::default(); CAPACITY + 1];
    assert_eq!(frames.allocate_bulk(&mut bulk), CAPACITY + 1);
    let (pair, rest) = (frames.allocate(order(1)).unwrap(), &bulk[1..]);
    rest.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    let full = frames.stats();
    assert_eq!(full.stocked, CAPACITY);
    for bad in [rest[0], pair, pair.offset(1), nth(FRAMES as u64)] {
        report_of(|| free(&frames, bad, Order::ZERO));
        assert_eq!(frames.stats(), full, "{bad:?}");
    }
    free(&frames, bulk[0], Order::ZERO);
    assert_eq!(frames.stats().stocked, CAPACITY / 2 + 1);
}

#[test]
fn row_93_and_94_frames_freed_on_another_cpu_come_back() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let before = frames.stats();
    for _ in 0..if cfg!(miri) { 80 } else { 2000 } {
        let frame = frames.allocate(Order::ZERO).unwrap();
        on_cpu(1, || free(&frames, frame, Order::ZERO));
    }
    assert!(frames.stats().stocked <= 2 * CAPACITY);
    assert_eq!(frames.stats().free, before.free);
    // SAFETY: no other thread uses the frames.
    (0..4).for_each(|cpu| _ = unsafe { frames.drain_stock_of(cpu) });
    assert_eq!(frames.stats(), before);
}

#[test]
fn row_98_a_cpu_above_the_maximum_uses_the_zones() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    for cpu in [2, usize::MAX] {
        on_cpu(cpu, || {
            let frame = frames.allocate(Order::ZERO).unwrap();
            assert_eq!(frames.stats().stocked, 0);
            free(&frames, frame, Order::ZERO);
            assert_eq!((frames.stats().stocked, frames.drain_stock()), (0, 0));
        });
    }
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn what_this_cpu_has_in_stock_is_not_missing_where_memory_is_short() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let before = frames.stats();
    let all = take_all(&frames, Order::ZERO);
    assert_eq!((all.len(), frames.stats().free), (before.free, 0));
    let block: Vec<_> = all.iter().filter(|frame| (nth(64)..nth(72)).contains(frame)).collect();
    let stock_it = || block.iter().for_each(|frame| free(&frames, **frame, Order::ZERO));
    stock_it();
    assert_eq!(frames.stats().stocked, 8);
    assert_eq!(frames.allocate(order(3)), Some(nth(64)));
    free(&frames, nth(64), order(3));
    assert!(frames.allocate_at(nth(64), 8));
    free(&frames, nth(64), order(3));
    let mut bulk = [Frame::default(); 9];
    assert_eq!(frames.allocate_bulk(&mut bulk), 8);
    stock_it();
    assert_eq!(frames.allocate_bulk(&mut bulk), 8);
    stock_it();
    assert_eq!(frames.remove(nth(64).address()..nth(72).address()), Ok(8));
    frames.verify().unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn frames_of_the_lowest_zone_are_not_stocked() {
    let machine = machine();
    let frames: Frames<Two> = frames_of(&machine, &[machine.region()], [512, 768]);
    let low = frames.allocate_below(1, Order::ZERO, nth(512).address()).unwrap();
    free(&frames, low, Order::ZERO);
    assert_eq!(frames.stats().stocked, 0);
    let all = take_all(&frames, Order::ZERO);
    assert_eq!(frames.stats().stocked, 0);
    assert_eq!(frames.stats().zones.map(|zone| zone.free), [4, 2, 0], "the reserves");
    assert!(all.iter().any(|frame| *frame < nth(512)), "low memory serves when there is no other");
    all.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    frames.drain_stock();
    frames.verify().unwrap();
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn small_memory_has_no_stocks_until_enough_is_added() {
    let machine = machine();
    let frames: Frames<Two> = frames_of(&machine, &[machine.usable(0, 255)], [0, 0]);
    assert_eq!(frames.stats().metadata, 1);
    let one = frames.allocate(Order::ZERO).unwrap();
    assert_eq!(frames.stats().stocked, 0);
    assert_eq!(add(&frames, &[machine.usable(255, 257)]), Ok(257));
    assert_eq!(frames.stats().metadata, 1 + 4 + 1, "two leaves, two nodes above, and the stocks");
    free(&frames, one, Order::ZERO);
    assert_eq!(frames.stats().stocked, 1);
    frames.verify().unwrap();
    // 512 frames in all, of which an eighth is for two stocks.
    let all = take_all(&frames, Order::ZERO);
    all.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    assert!(frames.stats().stocked <= 512 / 8 / 2);
    assert_eq!(frames.stats().free, 512 - 6);
}

#[test]
fn threads_share_frames() {
    let machine = machine();
    let frames = all_of::<Two>(&machine);
    let before = frames.stats();
    let rounds = if cfg!(miri) { 60 } else { 20_000 };
    let passed = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for cpu in 0..3 {
            let (frames, passed) = (&frames, &passed);
            scope.spawn(move || {
                CPU.set(cpu);
                for round in 0..rounds {
                    let size = order(if round % 7 == 0 { 2 } else { 0 });
                    let block = frames.allocate(size).unwrap();
                    let word = frames.pointer(block).cast::<usize>();
                    // SAFETY: the block is this thread's.
                    unsafe { word.write(cpu) };
                    // SAFETY: as above.
                    assert_eq!(unsafe { word.read() }, cpu);
                    let theirs = { passed.lock().unwrap().pop() };
                    if let Some((block, size)) = theirs {
                        free(frames, block, size);
                    }
                    passed.lock().unwrap().push((block, size));
                }
            });
        }
    });
    passed.into_inner().unwrap().iter().for_each(|(block, size)| free(&frames, *block, *size));
    frames.verify().unwrap();
    // SAFETY: the other threads have ended.
    (0..4).for_each(|cpu| _ = unsafe { frames.drain_stock_of(cpu) });
    assert_eq!(frames.stats(), before);
}
