//! CPUs exchange magazines at the depot of a cache.

use super::*;
use crate::Cache;

/// The magazines of CPU 0 are empty, and the depot has two full ones.
fn two_take_full_ones(bench: &Bench) {
    let heap = bench.heap();
    give(&heap, take(&heap, 4 * ROUNDS));
    let kept = take(&heap, 2 * ROUNDS);
    let work = || -> Work<'_> { Box::new(|| bench.pair(&heap)) };
    bench.run([(0, work()), (1, work())]);
    give(&heap, kept);
    bench.finish(heap);
}

/// CPU 0 has no room left and takes an empty magazine for a full one, while CPU 1 takes a full one.
fn one_gives_and_one_takes(bench: &Bench) {
    let heap = bench.heap();
    give(&heap, take(&heap, 4 * ROUNDS));
    // The depot has an empty magazine and a full one then, and CPU 0 two full ones.
    let kept = take(&heap, 3 * ROUNDS);
    let mut given = kept;
    let rest = given.split_off(2 * ROUNDS);
    give(&heap, given);
    let mut rest = rest.into_iter();
    let object = rest.next().unwrap();
    bench.given(object);
    bench.run([(0, Box::new(|| bench.free(&heap, object)) as Work<'_>), (1, Box::new(|| bench.pair(&heap)))]);
    give(&heap, rest);
    bench.finish(heap);
}

/// Two CPUs free into a cache for the first time: one makes the places for all.
fn two_set_up(bench: &Bench) {
    let heap = bench.heap();
    let cache = Cache::new(heap.caches(), "new", LAYOUT);
    let objects = [cache.allocate().unwrap(), cache.allocate().unwrap()];
    objects.iter().for_each(|object| bench.given(*object));
    let work = |object| -> Work<'_> {
        let cache = &cache;
        Box::new(move || {
            bench.given_up(object);
            // SAFETY: allocated from it.
            unsafe { cache.free(object) };
        })
    };
    bench.run([(0, work(objects[0])), (1, work(objects[1]))]);
    drop(cache);
    bench.finish(heap);
}

#[test]
fn full_magazines_are_taken_from_the_depot_by_one_cpu_each() {
    holds(EveryOrder, two_take_full_ones);
}

#[test]
fn full_magazines_are_taken_twice_without_the_depots_lock() {
    fails_with(EveryOrder, Bug::NoExclusion, two_take_full_ones);
}

#[test]
fn row_102_the_depots_lock_without_its_ordering_is_noticed() {
    fails_with(EveryOrder, Bug::WeakLocks, one_gives_and_one_takes);
}

#[test]
fn magazines_go_from_one_cpu_to_another_by_way_of_the_depot() {
    holds(EveryOrder, one_gives_and_one_takes);
}

#[test]
fn two_cpus_with_one_number_are_noticed() {
    fails_with(EveryOrder, Bug::OneNumber, two_take_full_ones);
}

#[test]
fn two_cpus_that_set_up_a_cache_at_once_agree() {
    holds(EveryOrder, two_set_up);
}

#[test]
fn two_cpus_that_set_up_a_cache_disagree_without_an_atomic_exchange() {
    fails_with(EveryOrder, Bug::TornExchange, two_set_up);
}
