//! NMI handlers that allocate and free, whatever they have interrupted.
//!
//! A test is the interrupted code and the handler in one thread: it holds locks, or stands in the middle of a step, and
//! becomes [`IN_NMI`]. In debug builds a lock that an NMI would wait for is a report, and so fails the test.

use crate::sync::Ordering::Relaxed;
use std::cell::Cell;
use std::vec::Vec;

use super::*;
use crate::platform::{IN_NMI, NO_CPU};
use crate::testing::{be_cpu, report_of};
use crate::{AllocError, Cache, InitFailed, Object, ObjectCache};

type Numbered = super::super::Heap<Threads>;

/// Runs a handler on this CPU.
fn nmi<T>(handler: impl FnOnce() -> T) -> T {
    be_cpu(IN_NMI);
    let result = handler();
    be_cpu(0);
    result
}

fn free(heap: &Numbered, block: NonNull<u8>, layout: Layout) {
    // SAFETY: the tests do not use what they have freed; where they free it wrongly, it is refused.
    unsafe { heap.free(block, layout) }
}

/// Runs a test on a heap that must get everything back.
fn on_heap(test: impl Fn(&Numbered)) {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let before = heap.settled();
    test(&heap);
    assert_eq!(heap.verify(), Ok(()));
    assert_eq!(heap.settled(), before, "memory is missing");
    assert_eq!(heap.verify(), Ok(()));
}

const SMALL: Layout = Layout::new::<[u64; 8]>();
const RUN: Layout = Layout::new::<[u8; 3 * 4096]>();

#[test]
fn row_83_an_nmi_allocates_what_is_there_and_frees() {
    on_heap(|heap| {
        let kept = heap.allocate(SMALL).unwrap();
        let ([object, run], frame) = nmi(|| {
            assert_eq!(heap.allocate(layout(4000, 8)), None, "its class would have to grow");
            ([SMALL, RUN].map(|layout| heap.allocate(layout).unwrap()), heap.take_frame().unwrap())
        });
        fill(object, 64, 1);
        fill(run, 3 * 4096, 2);
        assert!(holds(object, 64, 1) && is_aligned(run, 4096));
        nmi(|| {
            free(heap, object, SMALL);
            free(heap, run, RUN);
            heap.free_frame(frame);
            free(heap, kept, SMALL);
        });
        assert_eq!(heap.verify(), Ok(()));
    });
}

#[test]
fn row_83_what_an_nmi_frees_is_free_at_once_and_comes_back_by_the_next_slow_path() {
    on_heap(|heap| {
        let blocks: Vec<_> = (0..100).map(|_| heap.allocate(SMALL).unwrap()).collect();
        let runs: Vec<_> = (0..5).map(|_| heap.allocate(RUN).unwrap()).collect();
        let stats = || heap.cache_stats().find(|stats| stats.object_size == 64).unwrap();
        let (used, slabs) = (|| stats().in_use, || stats().slabs);
        let slabs_before = slabs();
        nmi(|| blocks.iter().for_each(|&block| free(heap, block, SMALL)));
        assert_eq!(used(), 0);
        for &block in &blocks {
            let report = report_of(|| nmi(|| free(heap, block, SMALL)));
            be_cpu(0);
            assert!(report.ends_with("double free: it is free already, or was never allocated"), "{report}");
        }
        // Each is handed out once.
        let mut again: Vec<_> = (0..100).map(|_| heap.allocate(SMALL).unwrap()).collect();
        again.sort();
        again.dedup();
        assert_eq!(again.len(), 100);
        assert_eq!(slabs(), slabs_before, "from the slabs that were there");
        assert_eq!(heap.verify(), Ok(()));
        again.into_iter().for_each(|block| free(heap, block, SMALL));

        let free_before = heap.frames().free_bytes();
        nmi(|| runs.iter().for_each(|&run| free(heap, run, RUN)));
        let report = report_of(|| free(heap, runs[0], RUN));
        assert!(report.ends_with("double free: it is free already, or was never allocated"), "{report}");
        assert_eq!(heap.verify(), Ok(()));
        assert_eq!(heap.frames().free_bytes(), free_before);
        let pair = heap.frames().allocate(Order::new(1).unwrap()).unwrap();
        // SAFETY: just allocated.
        unsafe { heap.frames().free(pair, Order::new(1).unwrap()) };
        assert_eq!(heap.frames().free_bytes(), free_before + 15 * 4096);
    });
}

#[test]
fn row_28_a_slabs_link_that_was_overwritten_is_reported() {
    let overwrite = |heap: &Numbered, block: NonNull<u8>| {
        let slabs = &heap.caches().class(classes::class_of(64)).slabs;
        let (slab, _) = slabs.find(heap.frames(), block.as_ptr()).unwrap();
        slab.deferred_link().store(0x4141_4141, Relaxed);
    };
    for listed in [false, true] {
        let machine = Machine::new(START, FRAMES);
        let heap = machine.heap_on::<Threads>();
        let blocks: Vec<_> = (0..100).map(|_| heap.allocate(SMALL).unwrap()).collect();
        let order = if listed { [0, 1] } else { [1, 0] };
        for step in order {
            match step {
                0 => nmi(|| free(&heap, blocks[0], SMALL)),
                _ => overwrite(&heap, blocks[0]),
            }
        }
        let report = report_of(|| (0..100).for_each(|_| _ = heap.allocate(SMALL)));
        assert!(report.ends_with(": the allocator's own data was overwritten"), "{report}");
    }
}

#[test]
fn row_83_an_nmi_never_waits_for_what_it_has_interrupted() {
    on_heap(|heap| {
        let class = |size| heap.caches().class(classes::class_of(size));
        let blocks: Vec<_> = (0..10).map(|_| heap.allocate(SMALL).unwrap()).collect();
        let larger = heap.allocate(layout(128, 8)).unwrap();
        let run = heap.allocate(RUN).unwrap();

        let lent = class(64).slabs.with_locked(|| {
            nmi(|| {
                free(heap, blocks[0], SMALL);
                let lent = heap.allocate(SMALL).expect("the class of 128 bytes lends");
                // SAFETY: just allocated, and given up for what comes back.
                unsafe { heap.reallocate(lent, SMALL, 60) }.expect("in place")
            })
        });
        class(128).slabs.with_locked(|| nmi(|| free(heap, lent, SMALL)));

        let before = heap.available();
        heap.frames().with_zones_locked(|| {
            nmi(|| {
                assert_eq!(heap.allocate(RUN), None);
                assert_eq!(heap.frames().allocate(Order::ZERO), None);
                assert_eq!(heap.frames().allocate_bulk(&mut [Frame::default(); 3]), 0);
                assert!(!heap.frames().allocate_at(Frame::containing(START).unwrap(), 1));
                // SAFETY: allocated above, and used only if it is another.
                assert_eq!(unsafe { heap.reallocate(run, RUN, 5 * 4096) }, None);
                // SAFETY: it stays where it is.
                assert_eq!(unsafe { heap.reallocate(run, RUN, 4096 * 2 + 1) }, Some(run));
                free(heap, run, RUN);
                assert_eq!(heap.frames().stats().zones[1].total, 0, "not to be seen");
                assert_eq!(heap.available(), before, "counted without the lock");
            });
        });

        class(64).magazines.with_depot_locked(|_| {
            nmi(|| free(heap, heap.allocate(SMALL).unwrap(), SMALL));
            assert!(heap.tables().to_string().contains("size-64"));
        });
        blocks[1..].iter().for_each(|&block| free(heap, block, SMALL));
        free(heap, larger, layout(128, 8));
    });
}

std::thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn call() {
    CALLS.set(CALLS.get() + 1);
}

#[test]
fn row_83_nothing_is_reclaimed_for_an_nmi_and_nobody_is_called() {
    on_heap(|heap| {
        heap.add_reclaim_callback(|_| {
            call();
            0
        })
        .unwrap();
        heap.set_out_of_memory_hook(Some(|_| {
            call();
            reclaim::Decision::Fail
        }));
        CALLS.set(0);
        nmi(|| {
            assert_eq!(heap.allocate(layout(4 << 20, 8)), None);
            assert_eq!(heap.allocate_frames(1 << 20, Order::ZERO, u64::MAX), None);
            assert_eq!(heap.shrink(), 0);
            heap.maintain(1 << 40);
            assert!(heap.create_heap("child", 1 << 20).is_err());
            assert!(heap.frames().remove(START..START + 4096).is_err());
        });
        assert_eq!(CALLS.get(), 0);
        heap.set_out_of_memory_hook(None);
    });
}

struct Constructed(u64);

impl Object for Constructed {
    fn init() -> Result<Self, InitFailed> {
        call();
        Ok(Self(7))
    }
}

#[test]
fn row_83_a_cache_gives_an_nmi_constructed_objects_only_and_they_stay_so() {
    on_heap(|heap| {
        let cache = ObjectCache::<Constructed, Threads>::new(heap.caches(), "constructed");
        nmi(|| assert!(matches!(cache.allocate(), Err(AllocError::NoMemory)), "its first use takes memory"));
        CALLS.set(0);
        let made: Vec<_> = (0..50).map(|_| cache.allocate().unwrap()).collect();
        nmi(|| assert!(matches!(cache.allocate(), Err(AllocError::WouldGrow)), "the rest of the slab is raw"));
        nmi(|| drop(made));
        assert_eq!((CALLS.get(), cache.stats().unwrap().in_use), (50, 0));
        assert_eq!(heap.verify(), Ok(()));
        // Taken in by the next one that comes to the slabs.
        let again: Vec<_> = (0..10).map(|_| cache.allocate().unwrap()).collect();
        let in_nmi: Vec<_> = nmi(|| (0..40).map(|_| cache.allocate().unwrap()).collect());
        assert!(again.iter().chain(&in_nmi).all(|object| object.0 == 7));
        nmi(|| assert!(cache.allocate().is_err()));
        assert_eq!(CALLS.get(), 50);
        nmi(|| drop(again));
        drop(in_nmi);
        let refused = nmi(|| cache.destroy()).expect_err("not in an NMI");
        refused.cache.destroy().unwrap();
    });
}

#[test]
fn row_83_bulk_reserves_limits_and_walks_in_an_nmi() {
    on_heap(|heap| {
        let cache = Cache::<Threads>::new(heap.caches(), "limited", layout(48, 8)).with_limit(40);
        let reserve = cache.reserve(5).unwrap();
        let objects: Vec<_> = (0..3).map(|_| cache.allocate().unwrap()).collect();
        nmi(|| {
            let mut bulk = [ptr::null_mut(); 50];
            let filled = cache.allocate_bulk(&mut bulk);
            assert_eq!(filled, 32);
            assert_eq!(cache.allocate(), Err(AllocError::AtLimit));
            let kept = reserve.allocate().unwrap();
            // SAFETY: allocated above.
            unsafe { reserve.free(kept) };
            let mut visited = 0;
            cache.for_each_object(|_| visited += 1);
            assert_eq!((visited, reserve.available(), cache.shrink()), (35, 5, 0));
            let bulk: Vec<_> = bulk.into_iter().filter_map(NonNull::new).collect();
            // SAFETY: allocated above.
            unsafe { cache.free_bulk(&bulk) };
        });
        // SAFETY: allocated above.
        objects.into_iter().for_each(|object| unsafe { cache.free(object) });
        drop(reserve);
        assert_eq!(heap.verify(), Ok(()));
        cache.destroy().unwrap();
    });
}

#[test]
fn row_83_a_report_in_an_nmi_waits_for_nothing() {
    on_heap(|heap| {
        let cache = Cache::<Threads>::new(heap.caches(), "inode", layout(64, 8));
        let object = cache.allocate().unwrap();
        let report = heap.caches().with_registry_locked(|| {
            let report = report_of(|| nmi(|| free(heap, object, SMALL)));
            be_cpu(0);
            report
        });
        assert!(report.ends_with("wrong cache: freed to the heap, allocated from another cache"), "{report}");
        // SAFETY: allocated above.
        unsafe { cache.free(object) };
        cache.destroy().unwrap();
    });
}

#[test]
fn row_83_nmis_on_several_cpus_while_others_take_in_what_they_free() {
    let machine = Machine::new(START, FRAMES);
    let heap = &machine.heap_on::<Threads>();
    let before = heap.settled();
    let rounds = if cfg!(miri) { 20 } else { 5000 };
    std::thread::scope(|scope| {
        for number in 0..3 {
            scope.spawn(move || {
                let mut held = Vec::new();
                for round in 0..rounds {
                    be_cpu(if round % 3 == 0 { IN_NMI } else { number });
                    let wanted = [SMALL, RUN, layout(2000, 8)][round % 7 % 3];
                    if let Some(block) = heap.allocate(wanted) {
                        fill(block, wanted.size(), round as u8);
                        held.push((block, wanted, round as u8));
                    }
                    be_cpu(if round % 5 < 2 { IN_NMI } else { number });
                    while held.len() > round * 7 % 13 {
                        let (block, layout, byte) = held.swap_remove(round % held.len());
                        assert!(holds(block, layout.size(), byte));
                        free(heap, block, layout);
                    }
                }
                be_cpu(IN_NMI);
                held.into_iter().for_each(|(block, layout, _)| free(heap, block, layout));
                be_cpu(number);
                heap.maintain(0);
            });
        }
    });
    for number in 0..3 {
        // SAFETY: its thread is gone.
        unsafe { heap.retire_cpu(number) };
    }
    assert_eq!(heap.settled(), before);
    assert_eq!(heap.verify(), Ok(()));
    be_cpu(NO_CPU);
    free(heap, heap.allocate(SMALL).unwrap(), SMALL);
    be_cpu(0);
}
