//! Objects freed by another CPU than the one that allocated them, and by two at once.

use super::*;
use crate::fault::{Fault, OnFault};
use crate::sync::AtomicBool;
use crate::sync::Ordering::{Acquire, Release};

fn free_class_object(heap: &Heap, object: NonNull<u8>) -> Result<(), Fault> {
    // SAFETY: allocated from that class; that it is freed once only is what the model is about.
    unsafe { heap.caches().class(class()).free(heap.caches(), object.as_ptr(), USED) }
}

/// CPU 1 frees an object of CPU 0's, while CPU 0 allocates and frees.
fn another_cpu_frees(bench: &Bench) {
    let heap = bench.heap();
    let object = bench.allocate(&heap);
    bench.run([
        (0, Box::new(|| bench.pair(&heap)) as Work<'_>),
        (
            1,
            Box::new(|| {
                bench.free(&heap, object);
                bench.pair(&heap);
            }),
        ),
    ]);
    bench.finish(heap);
}

/// Both CPUs free one object. Where both succeed, the one that gives it to its slab last is reported.
fn two_free_one_object(bench: &Bench) {
    let heap = bench.heap();
    heap.set_fault_handler(Some(|report| {
        assert_eq!(report.fault, Fault::BadRound);
        OnFault::KeepOut
    }));
    let object = take(&heap, 1)[0];
    let refused = [Cell::new(0), Cell::new(0)];
    let work = |cpu: usize| -> Work<'_> {
        let (heap, refused) = (&heap, &refused);
        Box::new(move || {
            if let Err(fault) = free_class_object(heap, object) {
                assert_eq!(fault, Fault::DoubleFree);
                refused[cpu].set(1);
            }
        })
    };
    bench.run([(0, work(0)), (1, work(1))]);
    for cpu in [1, 0] {
        explorer::be_cpu(cpu);
        heap.shrink();
    }
    let reports = refused[0].get() + refused[1].get() + heap.faults();
    assert_eq!(reports, 1, "one of two frees must be reported, and one not");
    bench.finish(heap);
}

/// CPU 1 frees what CPU 0 has freed before it goes on to free others.
fn another_cpu_frees_again(bench: &Bench) {
    let heap = bench.heap();
    let objects = take(&heap, 3);
    let freed = AtomicBool::new(false);
    bench.run([
        (
            0,
            Box::new(|| {
                give(&heap, [objects[0]]);
                freed.store(true, Release);
                give(&heap, [objects[1], objects[2]]);
            }) as Work<'_>,
        ),
        (
            1,
            Box::new(|| {
                if freed.load(Acquire) {
                    assert_eq!(free_class_object(&heap, objects[0]), Err(Fault::DoubleFree));
                }
            }),
        ),
    ]);
    bench.finish(heap);
}

/// CPUs without magazines free three objects into one slab.
fn all_free_into_one_slab(bench: &Bench) {
    let heap = bench.heap();
    explorer::be_cpu(9);
    let objects = take(&heap, 4);
    explorer::be_cpu(0);
    objects.iter().for_each(|object| bench.given(*object));
    let work = |object: NonNull<u8>| -> Work<'_> {
        let heap = &heap;
        Box::new(move || bench.free(heap, object))
    };
    bench.run([(10, work(objects[0])), (11, work(objects[1])), (12, work(objects[2]))]);
    bench.free(&heap, objects[3]);
    bench.finish(heap);
}

/// Two CPUs free one run of page frames.
fn two_free_one_run(bench: &Bench, count: u32) {
    let heap = bench.heap();
    let frame = heap.frames().allocate_run(count, crate::Order::ZERO).unwrap();
    let freed = [Cell::new(false), Cell::new(false)];
    let work = |cpu: usize| -> Work<'_> {
        let (heap, freed) = (&heap, &freed);
        Box::new(move || freed[cpu].set(heap.frames().try_shrink_run(frame, count, 0).is_ok()))
    };
    bench.run([(0, work(0)), (1, work(1))]);
    assert!(freed[0].get() != freed[1].get(), "one of two frees must be reported, and one not");
    bench.finish(heap);
}

/// CPU 0 gives back what the cache does not use, while CPU 1 allocates and frees.
fn reap_while_another_allocates(bench: &Bench) {
    let heap = bench.heap();
    give(&heap, take(&heap, 3 * ROUNDS));
    bench.run([
        (0, Box::new(|| _ = heap.caches().class(class()).reap(heap.caches())) as Work<'_>),
        (
            1,
            Box::new(|| {
                let objects = [bench.allocate(&heap), bench.allocate(&heap)];
                objects.into_iter().for_each(|object| bench.free(&heap, object));
            }),
        ),
    ]);
    bench.finish(heap);
}

#[test]
fn an_object_is_freed_by_another_cpu() {
    holds(EveryOrder, another_cpu_frees);
}

#[test]
fn two_cpus_with_one_number_lose_what_another_cpu_frees() {
    fails_with(EveryOrder, Bug::OneNumber, another_cpu_frees);
}

#[test]
fn row_5_of_two_cpus_that_free_one_object_one_is_reported() {
    holds(EveryOrder, two_free_one_object);
}

#[test]
fn row_5_so_it_is_in_random_orders() {
    holds(Random(1000), two_free_one_object);
}

#[test]
fn row_4_a_second_free_on_another_cpu_is_refused_in_random_orders() {
    holds(Random(1000), another_cpu_frees_again);
}

#[test]
fn row_5_two_cpus_with_one_number_lose_the_report() {
    fails_with(EveryOrder, Bug::OneNumber, two_free_one_object);
}

#[test]
fn row_5_of_two_cpus_that_free_one_run_of_frames_one_is_reported() {
    holds(EveryOrder, |bench| two_free_one_run(bench, 3));
}

#[test]
fn row_5_that_too_takes_an_atomic_exchange() {
    fails_with(EveryOrder, Bug::TornExchange, |bench| two_free_one_run(bench, 3));
}

#[test]
fn row_5_of_two_cpus_that_free_one_frame_one_is_reported() {
    holds(EveryOrder, |bench| two_free_one_run(bench, 1));
}

#[test]
fn row_5_that_as_well_takes_an_atomic_exchange() {
    fails_with(EveryOrder, Bug::TornExchange, |bench| two_free_one_run(bench, 1));
}

#[test]
fn row_95_all_cpus_free_into_one_slab() {
    holds(EveryOrderOfLocks, all_free_into_one_slab);
}

#[test]
fn row_95_it_takes_the_slab_lists_lock() {
    fails_with(EveryOrder, Bug::NoExclusion, all_free_into_one_slab);
}

#[test]
fn row_110_nothing_is_lost_by_a_reap_while_another_cpu_allocates() {
    // There are too many for all of them.
    holds(Random(2000), reap_while_another_allocates);
}

#[test]
fn row_110_it_takes_locks() {
    fails_with(EveryOrder, Bug::NoExclusion, reap_while_another_allocates);
}
