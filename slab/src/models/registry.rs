//! Caches that are made and ended while others use the registry.

use super::*;
use crate::Cache;
use crate::cache::Caches;

fn caches_named(caches: &Caches<Cpus>, name: &str) -> usize {
    let mut count = 0;
    caches.for_each(|cache| count += usize::from(cache.full_name().name == name));
    count
}

/// Two CPUs use a cache for the first time. There is room for it among the metadata.
fn two_register_one_cache(bench: &Bench) {
    let heap = bench.heap();
    Cache::new(heap.caches(), "before", LAYOUT).injector().unwrap();
    let cache = Cache::new(heap.caches(), "shared", LAYOUT);
    let made = [Cell::new(0), Cell::new(0)];
    let work = |cpu: usize| -> Work<'_> {
        let (cache, made) = (&cache, &made);
        Box::new(move || made[cpu].set(core::ptr::from_ref(cache.injector().unwrap()).addr()))
    };
    bench.run([(0, work(0)), (1, work(1))]);
    assert_eq!(made[0], made[1]);
    assert_eq!(caches_named(heap.caches(), "shared"), 1);
    heap.verify().unwrap();
    drop(cache);
    bench.finish(heap);
}

/// CPU 0 ends a cache while CPU 1 looks at all there are.
fn one_ends_a_cache_while_another_looks(bench: &Bench) {
    let heap = bench.heap();
    let cache = Cache::new(heap.caches(), "ending", LAYOUT);
    // SAFETY: allocated from it.
    unsafe { cache.free(cache.allocate().unwrap()) };
    let (looked_at, ended) = (Cell::new(false), Cell::new(false));
    bench.run([
        (
            0,
            Box::new(|| {
                cache.destroy().unwrap();
                ended.set(true);
                assert!(!looked_at.get(), "a cache is ended that somebody looks at");
            }) as Work<'_>,
        ),
        (
            1,
            Box::new(|| {
                heap.caches().for_each(|cache| {
                    looked_at.set(cache.full_name().name == "ending");
                    assert!(!(looked_at.get() && ended.get()), "somebody looks at a cache that is ended");
                    _ = heap.size();
                    looked_at.set(false);
                });
            }),
        ),
    ]);
    bench.finish(heap);
}

#[test]
fn two_cpus_that_use_a_static_cache_for_the_first_time_make_one() {
    holds(EveryOrder, two_register_one_cache);
}

#[test]
fn without_the_registrys_lock_they_make_two() {
    fails_with(EveryOrder, Bug::NoExclusion, two_register_one_cache);
}

#[test]
fn row_80_a_cache_ends_when_nobody_looks_at_it() {
    holds(EveryOrder, one_ends_a_cache_while_another_looks);
}

#[test]
fn row_80_it_takes_the_registrys_lock() {
    fails_with(EveryOrder, Bug::NoExclusion, one_ends_a_cache_while_another_looks);
}
