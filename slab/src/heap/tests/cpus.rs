//! Several CPUs at once: threads, each with a number of its own.

use std::string::ToString;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::vec::Vec;

use super::*;
use crate::Cache;
use crate::fault::OnFault;
use crate::testing::{be_cpu, report_of};

type Numbered = super::super::Heap<Threads>;

const SMALL: Layout = Layout::new::<[u64; 8]>();
const RUN: Layout = Layout::new::<[u8; 3 * 4096]>();

fn free(heap: &Numbered, block: NonNull<u8>, layout: Layout) {
    // SAFETY: the tests do not use what they have freed; where they free it wrongly, it is refused.
    unsafe { heap.free(block, layout) }
}

/// A number of rounds that Miri can do.
const fn rounds(rounds: usize) -> usize {
    if cfg!(miri) { rounds / 100 } else { rounds }
}

/// Allocates and frees blocks of many sizes, and sees that nobody else writes to them.
fn work(heap: &Numbered, seed: usize, rounds: usize) {
    let mut held = Vec::new();
    for round in 0..rounds {
        let wanted = layout([8, 64, 200, 700, 3000, 9000][(round + seed) % 6], 8);
        let byte = (round * 31 + seed) as u8;
        let block = heap.allocate(wanted).expect("memory");
        fill(block, wanted.size(), byte);
        held.push((block, wanted, byte));
        while held.len() > (round * 7 + seed) % 23 {
            let (block, layout, byte) = held.swap_remove(round % held.len());
            assert!(holds(block, layout.size(), byte));
            free(heap, block, layout);
        }
    }
    held.into_iter().for_each(|(block, layout, _)| free(heap, block, layout));
}

#[test]
fn row_4_a_double_free_from_another_cpu_is_refused() {
    let machine = Machine::new(START, FRAMES);
    let heap = &machine.heap_on::<Threads>();
    for wanted in [SMALL, RUN, layout(4096 * 2 + 1, 8)] {
        let block = heap.allocate(wanted).unwrap();
        free(heap, block, wanted);
        be_cpu(1);
        let report = report_of(|| free(heap, block, wanted));
        be_cpu(0);
        assert!(report.ends_with("double free: it is free already, or was never allocated"), "{report}");
    }
    assert_eq!(heap.verify(), Ok(()));
}

/// Blocks that two threads know.
struct Blocks(Vec<(NonNull<u8>, Layout)>);

impl Blocks {
    fn each(&self) -> &[(NonNull<u8>, Layout)] {
        &self.0
    }
}

// SAFETY: only pointers; the threads do no more than free what they point to.
unsafe impl Sync for Blocks {}

#[test]
fn row_5_of_two_cpus_that_free_one_block_at_once_just_one_is_reported() {
    let machine = Machine::new(START, 4 * FRAMES);
    let heap = &machine.heap_on::<Threads>();
    let before = heap.settled();
    let wanted = (0..rounds(400)).map(|round| [SMALL, RUN, layout(4096, 8)][round % 3]);
    let blocks = Blocks(wanted.map(|layout| (heap.allocate(layout).unwrap(), layout)).collect());
    let (blocks, start) = (&blocks, &Barrier::new(2));
    heap.set_fault_handler(Some(|_| OnFault::KeepOut));
    std::thread::scope(|scope| {
        for number in 1..=2 {
            scope.spawn(move || {
                be_cpu(number);
                for &(block, layout) in blocks.each() {
                    start.wait();
                    free(heap, block, layout);
                }
            });
        }
    });
    for number in 1..=2 {
        // SAFETY: its thread is gone.
        unsafe { heap.retire_cpu(number) };
    }
    heap.shrink();
    // Where both were served, it is seen when the object goes back to its slab the second time.
    assert_eq!(heap.faults(), blocks.each().len() as u64);
    assert_eq!(heap.verify(), Ok(()));
    assert_eq!(heap.settled(), before);
}

#[test]
fn rows_93_and_94_what_one_cpu_allocates_and_another_frees_never_grows() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let page = || heap.take_frame().unwrap();
    let mut most = 0;
    for round in 0..rounds(4000) {
        be_cpu(1);
        let blocks: Vec<_> = (0..20).map(|index| [8, 100, 600, 9000][index % 4]).collect();
        let blocks: Vec<_> = blocks.into_iter().map(|size| (heap.allocate(layout(size, 8)).unwrap(), size)).collect();
        let frames = [page(), page(), page()];
        be_cpu(2);
        blocks.into_iter().for_each(|(block, size)| free(&heap, block, layout(size, 8)));
        frames.into_iter().for_each(|frame| heap.free_frame(frame));
        be_cpu(0);
        // Until magazines are as large as they become.
        if round < rounds(4000) * 3 / 4 {
            most = most.max(heap.used());
        }
        assert!(heap.used() <= most + 4096 * 4, "after {round} rounds {} bytes are used, before {most}", heap.used());
    }
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn rows_78_and_80_caches_end_while_others_look_at_all_of_them() {
    let machine = Machine::new(START, 2 * FRAMES);
    let heap = &machine.heap_on::<Threads>();
    let before = heap.settled();
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let walker = scope.spawn(move || {
            be_cpu(1);
            let mut tables = 0;
            while !done.load(Relaxed) {
                tables += heap.tables().to_string().len();
                heap.maintain(tables as u64);
                heap.shrink();
            }
        });
        let worker = scope.spawn(move || {
            be_cpu(2);
            while !done.load(Relaxed) {
                work(heap, 5, 20);
            }
            heap.maintain(0);
        });
        for round in 0..rounds(300) {
            let cache = &Cache::<Threads>::new(heap.caches(), "short-lived", layout(40 + round % 50, 8));
            let object = cache.allocate().unwrap().addr().get();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    be_cpu(3);
                    let objects: Vec<_> = (0..30).map(|_| cache.allocate().unwrap()).collect();
                    // SAFETY: allocated above.
                    objects.into_iter().for_each(|object| unsafe { cache.free(object) });
                });
            });
            let mut objects = Vec::new();
            cache.for_each_object(|object| objects.push(object));
            assert_eq!((objects.len(), objects[0].addr().get()), (1, object));
            // SAFETY: allocated above.
            unsafe { cache.free(objects[0]) };
            // It ends here, with objects in the magazines of CPU 3.
        }
        done.store(true, Relaxed);
        walker.join().unwrap();
        worker.join().unwrap();
    });
    for number in 1..=3 {
        // SAFETY: its thread is gone.
        unsafe { heap.retire_cpu(number) };
    }
    assert_eq!(heap.verify(), Ok(()));
    assert_eq!(heap.settled(), before);
}

#[test]
fn rows_97_and_110_cpus_leave_and_all_is_reaped_while_others_work() {
    let machine = Machine::new(START, 4 * FRAMES);
    let heap = &machine.heap_on::<Threads>();
    let before = heap.settled();
    std::thread::scope(|scope| {
        let workers = [1, 2].map(|number| {
            scope.spawn(move || {
                be_cpu(number);
                work(heap, number, rounds(20_000));
                heap.maintain(0);
            })
        });
        let mut seed = 0;
        while workers.iter().any(|worker| !worker.is_finished()) {
            // CPU 3 comes and goes.
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    be_cpu(3);
                    work(heap, seed, 50);
                });
            });
            // SAFETY: its thread is gone.
            unsafe { heap.retire_cpu(3) };
            heap.shrink();
            seed += 1;
        }
    });
    for number in 1..=3 {
        // SAFETY: its thread is gone.
        unsafe { heap.retire_cpu(number) };
    }
    assert_eq!(heap.verify(), Ok(()));
    assert_eq!(heap.settled(), before);
}

#[test]
fn row_86_tables_come_out_while_locks_are_held_for_good() {
    let machine = Machine::new(START, FRAMES);
    let heap = &machine.heap_on::<Threads>();
    work(heap, 1, 50);
    let slabs = &heap.caches().class(classes::class_of(64)).slabs;
    let text = slabs.with_locked(|| {
        heap.frames().with_zones_locked(|| {
            std::thread::scope(|scope| {
                let report = scope.spawn(|| {
                    be_cpu(1);
                    heap.tables().to_string()
                });
                report.join().unwrap()
            })
        })
    });
    assert!(text.contains("size-64") && text.contains("size-3072"), "{text}");
}
