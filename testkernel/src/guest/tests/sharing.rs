//! What all CPUs do at once to the same cache, and to each other's objects.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::hint::spin_loop;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use core::time::Duration;

use kernel::heap::HEAP;
use kernel::threads::{self, JoinHandle};
use kernel::{cpus, timer};

use super::support::{
    Cache, another, counts, end_interval, fill, free_object, free_objects, is_filled, layout, new_cache, objects,
    on_each, unchanged,
};
use crate::guest::runner::test;

const STACK: usize = 32 * 1024;

/// Runs `body` in a thread on every CPU, on all at the same time, with the CPU's number.
fn in_parallel(body: impl Fn(usize) + Send + Sync + 'static) {
    let body = Arc::new(body);
    let start = |cpu| {
        let body = body.clone();
        threads::spawn_on(cpu, "parallel", STACK, move || body(cpu)).expect("memory for a thread")
    };
    let threads: Vec<_> = cpus::online().map(start).collect();
    threads.into_iter().for_each(JoinHandle::join);
}

/// As [`unchanged`], for a body that starts up to `extra` threads besides one on each CPU: page tables of stacks stay, so
/// they are there before the count.
fn unchanged_with_threads<T>(extra: usize, body: impl FnOnce() -> T) {
    let others: Vec<_> =
        (0..extra).map(|_| threads::spawn("before", STACK, || ()).expect("memory for a thread")).collect();
    in_parallel(|_| ());
    others.into_iter().for_each(JoinHandle::join);
    unchanged(body);
}

/// Puts an object where the next one looks, and takes that out which was there.
fn exchange(place: &AtomicPtr<u8>, object: Option<NonNull<u8>>) -> Option<NonNull<u8>> {
    NonNull::new(place.swap(object.map_or(ptr::null_mut(), NonNull::as_ptr), Ordering::AcqRel))
}

test!(row_78_a_cache_is_destroyed_with_objects_in_the_magazines_of_all_cpus);
fn row_78_a_cache_is_destroyed_with_objects_in_the_magazines_of_all_cpus() {
    unchanged_with_threads(0, || {
        for _ in 0..5 {
            let cache = Arc::new(new_cache("widespread", 64, 8));
            let (shared, ready) = (cache.clone(), AtomicUsize::new(0));
            in_parallel(move |_| {
                let held = objects(&shared, 100);
                // None gets what another has freed.
                ready.fetch_add(1, Ordering::Relaxed);
                while ready.load(Ordering::Relaxed) < cpus::online().count() {
                    threads::yield_now();
                }
                free_objects(&shared, held);
            });
            assert_eq!(counts(&cache).in_magazines, 100 * cpus::online().count());
            let cache = Arc::into_inner(cache).expect("the threads have ended");
            assert!(cache.destroy().is_ok(), "objects that are free in magazines keep no cache");
        }
    });
}

// A cache is ended by its owner, when nobody has a reference to it: so it never races an allocation of its own. What it
// can race is the rest of the allocator, which finds it in the table of caches.
test!(row_80_caches_are_made_and_ended_on_all_cpus_while_others_walk_their_table);
fn row_80_caches_are_made_and_ended_on_all_cpus_while_others_walk_their_table() {
    unchanged_with_threads(0, || {
        in_parallel(|cpu| {
            for round in 0..12 {
                let cache = new_cache("short-lived", 40 + 8 * (cpu % 8), 8);
                free_objects(&cache, objects(&cache, 50));
                match (round + cpu) % 3 {
                    0 => assert!(HEAP.cache_stats().count() > 1),
                    1 => _ = HEAP.shrink(),
                    _ => end_interval(),
                }
                assert!(cache.destroy().is_ok());
            }
        });
    });
}

test!(row_81_interrupts_on_all_cpus_allocate_while_locks_are_held);
fn row_81_interrupts_on_all_cpus_allocate_while_locks_are_held() {
    // Without magazines each allocation and each free takes the same lock.
    static LOCKED: Cache = Cache::new(HEAP.caches(), "locked", layout(64, 8)).without_magazines();
    static KEPT: [AtomicPtr<u8>; cpus::MAX] = [const { AtomicPtr::new(ptr::null_mut()) }; cpus::MAX];
    static TICKS: AtomicUsize = AtomicUsize::new(0);
    fn tick() {
        let new = LOCKED.allocate().expect("memory");
        if let Some(old) = exchange(&KEPT[cpus::current()], Some(new)) {
            free_object(&LOCKED, old);
        }
        TICKS.fetch_add(1, Ordering::Relaxed);
    }
    // The cache itself stays.
    free_objects(&LOCKED, objects(&LOCKED, 1));
    TICKS.store(0, Ordering::Relaxed);
    unchanged_with_threads(0, || {
        on_each(|_| timer::start(timer::counts(Duration::from_micros(100)), tick), 0);
        let wanted = 50 * cpus::online().count();
        in_parallel(move |_| {
            while TICKS.load(Ordering::Relaxed) < wanted {
                free_objects(&LOCKED, objects(&LOCKED, 10));
            }
        });
        on_each(|_| timer::stop(), 0);
        KEPT.iter().filter_map(|place| exchange(place, None)).for_each(|object| free_object(&LOCKED, object));
        assert_eq!(counts(&LOCKED).in_use, 0);
    });
}

test!(row_94_a_one_way_producer_and_its_consumer_use_bounded_memory);
fn row_94_a_one_way_producer_and_its_consumer_use_bounded_memory() {
    const PASSED: usize = 4000;
    const RING: usize = 64;
    static RINGS: [AtomicPtr<u8>; RING] = [const { AtomicPtr::new(ptr::null_mut()) }; RING];
    unchanged_with_threads(1, || {
        let cache = Arc::new(new_cache("one-way", 64, 8));
        let produced = cache.clone();
        let consumer = another().unwrap_or(cpus::current());
        let produce = move || {
            for turn in 0..PASSED {
                while !RINGS[turn % RING].load(Ordering::Acquire).is_null() {
                    threads::yield_now();
                }
                let object = produced.allocate().expect("memory");
                fill(object, 64, turn as u8);
                assert!(exchange(&RINGS[turn % RING], Some(object)).is_none());
            }
        };
        let producer = threads::spawn("producer", STACK, produce).expect("memory for a thread");
        let consumed = cache.clone();
        let consume = move || {
            let mut most = 0;
            for turn in 0..PASSED {
                let object = loop {
                    match exchange(&RINGS[turn % RING], None) {
                        Some(object) => break object,
                        None => threads::yield_now(),
                    }
                };
                assert!(is_filled(object, 64, turn as u8), "object {turn} was written to");
                free_object(&consumed, object);
                if turn.is_multiple_of(64) {
                    most = counts(&consumed).slabs.max(most);
                }
            }
            most
        };
        let most = threads::spawn_on(consumer, "consumer", STACK, consume).expect("memory for a thread").join();
        producer.join();
        // What is in the ring, in two magazines of each CPU, and in a few on their way through the depot.
        let stats = counts(&cache);
        let bound = (RING + 12 * stats.magazine_rounds).div_ceil(stats.objects_per_slab) + 1;
        assert!(most <= bound, "{most} slabs for objects that fit in {bound}");
    });
}

test!(row_95_all_cpus_free_into_one_slab);
fn row_95_all_cpus_free_into_one_slab() {
    unchanged_with_threads(0, || {
        for cache in [new_cache("one slab", 40, 8), new_cache("one slab", 40, 8).without_magazines()] {
            let cache = Arc::new(cache);
            free_object(&cache, cache.allocate().expect("memory"));
            cache.shrink();
            for _ in 0..5 {
                let slab = objects(&cache, counts(&cache).objects_per_slab);
                assert_eq!(counts(&cache).slabs, 1);
                let slab: Vec<_> = slab.into_iter().map(|object| AtomicPtr::new(object.as_ptr())).collect();
                let (shared, next) = (cache.clone(), AtomicUsize::new(0));
                in_parallel(move |_| {
                    while let Some(place) = slab.get(next.fetch_add(1, Ordering::Relaxed)) {
                        free_object(&shared, exchange(place, None).expect("an object"));
                        spin_loop();
                    }
                });
                assert_eq!((counts(&cache).in_use, counts(&cache).slabs), (0, 1));
                on_each(|_| _ = HEAP.shrink(), 0);
                assert_eq!(counts(&cache).slabs, 0, "the slab is empty");
            }
        }
    });
}

test!(row_110_nothing_is_lost_when_caches_are_reaped_during_heavy_allocation);
fn row_110_nothing_is_lost_when_caches_are_reaped_during_heavy_allocation() {
    static DONE: AtomicBool = AtomicBool::new(false);
    const SIZES: [usize; 3] = [32, 300, 2000];
    const TURNS: usize = 30;
    DONE.store(false, Ordering::Relaxed);
    unchanged_with_threads(1, || {
        let caches = Arc::new(SIZES.map(|size| new_cache("reaped", size, 8)));
        let reaped = caches.clone();
        let reap = move || {
            for turn in 0.. {
                match turn % 3 {
                    0 => _ = HEAP.shrink(),
                    1 => end_interval(),
                    _ => _ = reaped[turn % SIZES.len()].shrink(),
                }
                if DONE.load(Ordering::Relaxed) {
                    return turn;
                }
                threads::yield_now();
            }
            0
        };
        let reaper = threads::spawn("reaper", STACK, reap).expect("memory for a thread");
        let used = caches.clone();
        in_parallel(move |cpu| {
            for turn in 0..TURNS {
                let (cache, size) = (&used[turn % SIZES.len()], SIZES[turn % SIZES.len()]);
                let held = objects(cache, 40);
                held.iter().for_each(|object| fill(*object, size, (cpu + turn) as u8));
                threads::yield_now();
                assert!(held.iter().all(|object| is_filled(*object, size, (cpu + turn) as u8)), "somebody wrote to it");
                free_objects(cache, held);
            }
        });
        DONE.store(true, Ordering::Relaxed);
        assert!(reaper.join() > 0);
        assert!(caches.iter().all(|cache| counts(cache).in_use == 0));
    });
}
