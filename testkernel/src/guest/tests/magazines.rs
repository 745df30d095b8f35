//! The per-CPU layer: magazines and the depot, on the only CPU of the kernel.
//!
//! *Caches with constructors, objects kept constructed across free and allocate, per-CPU magazines, reclaim*: the third.

use alloc::vec::Vec;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::Relaxed};

use kernel::heap::HEAP;
use kernel::timer;
use kslab::stats::CacheStats;
use x86_64::instructions::interrupts;

use super::support::{
    Block, Cache, PAGE, counts, end_interval, fill, frames, free_object, free_objects, give_back, is_filled, layout,
    new_cache, objects, take_all, take_free, unchanged,
};
use crate::guest::runner::test;

/// Full and empty magazines in the depot: changes when one is exchanged.
fn depot(cache: &Cache) -> (usize, usize) {
    (counts(cache).full_magazines, counts(cache).empty_magazines)
}

/// Leaves so many objects free in magazines.
fn fill_magazines(cache: &Cache, count: usize) {
    free_objects(cache, objects(cache, count));
}

test!(what_was_freed_last_is_allocated_first);
fn what_was_freed_last_is_allocated_first() {
    unchanged(|| {
        let cache = new_cache("hot", 64, 8);
        let mut held = objects(&cache, 40);
        held.iter().for_each(|object| free_object(&cache, *object));
        held.reverse();
        assert_eq!(objects(&cache, 40), held);
        free_objects(&cache, held);
    });
}

test!(free_objects_in_magazines_are_not_in_use);
fn free_objects_in_magazines_are_not_in_use() {
    unchanged(|| {
        let cache = new_cache("cached", 64, 8);
        let held = objects(&cache, 100);
        assert_eq!((counts(&cache).in_use, counts(&cache).in_magazines), (100, 0));
        free_objects(&cache, held);
        assert_eq!((counts(&cache).in_use, counts(&cache).in_magazines), (0, 100));
        let mut seen = 0;
        cache.for_each_object(|_| seen += 1);
        assert_eq!(seen, 0);
    });
}

test!(a_hot_pair_touches_neither_slabs_nor_depot);
fn a_hot_pair_touches_neither_slabs_nor_depot() {
    unchanged(|| {
        let cache = new_cache("pair", 200, 8);
        fill_magazines(&cache, 50);
        let before = counts(&cache);
        for _ in 0..10_000 {
            let object = cache.allocate().expect("memory");
            free_object(&cache, object);
        }
        let after = counts(&cache);
        assert_eq!((after.allocations, after.frees), (before.allocations + 10_000, before.frees + 10_000));
        assert_eq!(CacheStats { allocations: before.allocations, frees: before.frees, ..after }, before);
    });
}

test!(row_109_going_back_and_forth_at_the_end_of_a_magazine_leaves_the_depot_alone);
fn row_109_going_back_and_forth_at_the_end_of_a_magazine_leaves_the_depot_alone() {
    unchanged(|| {
        let cache = new_cache("boundary", 64, 8);
        fill_magazines(&cache, 100);
        let rounds = counts(&cache).magazine_rounds;
        let mut held = Vec::with_capacity(100);
        // Wherever in its magazines the CPU is.
        for place in 0..2 * rounds {
            let mut exchanges = 0;
            let mut last = depot(&cache);
            for _ in 0..50 {
                held.extend(objects(&cache, 2));
                free_object(&cache, held.pop().expect("two objects"));
                free_object(&cache, held.pop().expect("an object"));
                exchanges += usize::from(depot(&cache) != last);
                last = depot(&cache);
            }
            assert!(exchanges <= 1, "{exchanges} exchanges at place {place}");
            held.extend(objects(&cache, 1));
        }
        free_objects(&cache, held);
    });
}

test!(full_magazines_wait_in_the_depot_for_the_next_allocations);
fn full_magazines_wait_in_the_depot_for_the_next_allocations() {
    unchanged(|| {
        let cache = new_cache("depot", 128, 8);
        let held = objects(&cache, 200);
        let slabs = counts(&cache).slabs_created;
        free_objects(&cache, held);
        let rounds = counts(&cache).magazine_rounds;
        assert!(depot(&cache).0 >= 200 / rounds - 2, "{:?}", depot(&cache));
        let held = objects(&cache, 200);
        assert_eq!(depot(&cache).0, 0);
        assert_eq!(counts(&cache).slabs_created, slabs);
        assert!(held.iter().zip(1..).all(|(object, next)| !held[next..].contains(object)));
        free_objects(&cache, held);
    });
}

test!(shrink_empties_the_magazines_and_frees_them);
fn shrink_empties_the_magazines_and_frees_them() {
    unchanged(|| {
        let cache = new_cache("emptied", 64, 8);
        fill_magazines(&cache, 1);
        cache.shrink();
        HEAP.shrink();
        let before = frames().stats();
        fill_magazines(&cache, 500);
        assert!(counts(&cache).in_magazines > 0 && frames().stats().free < before.free);
        cache.shrink();
        assert_eq!((counts(&cache).in_magazines, depot(&cache), counts(&cache).slabs), (0, (0, 0), 0));
        HEAP.shrink();
        assert_eq!(frames().stats(), before);
    });
}

test!(what_an_interval_did_not_need_is_reaped);
fn what_an_interval_did_not_need_is_reaped() {
    unchanged(|| {
        let cache = new_cache("idle", 64, 8);
        end_interval();
        fill_magazines(&cache, 300);
        let full = depot(&cache).0;
        assert!(full >= 10);
        end_interval();
        assert_eq!(depot(&cache).0, full, "they came in this interval");
        fill_magazines(&cache, 300);
        end_interval();
        assert_eq!(depot(&cache).0, full, "the interval needed all of them");
        let reaped = counts(&cache).magazines_reaped;
        end_interval();
        assert_eq!(depot(&cache), (0, 0), "the interval needed none");
        assert_eq!(counts(&cache).magazines_reaped, reaped + full as u64);
        assert!(counts(&cache).in_magazines <= 2 * counts(&cache).magazine_rounds);
    });
}

test!(half_of_what_is_needed_stays_half);
fn half_of_what_is_needed_stays_half() {
    unchanged(|| {
        let cache = new_cache("half", 64, 8);
        fill_magazines(&cache, 400);
        end_interval();
        let full = depot(&cache).0;
        fill_magazines(&cache, 200);
        end_interval();
        let kept = depot(&cache).0;
        assert!(kept > full / 3 && kept < full * 2 / 3, "of {full} magazines {kept} are kept");
    });
}

test!(slabs_that_a_working_set_needs_stay_and_go_an_interval_later);
fn slabs_that_a_working_set_needs_stay_and_go_an_interval_later() {
    unchanged(|| {
        let cache = new_cache("working", 500, 8).without_magazines();
        for _ in 0..3 {
            end_interval();
            free_objects(&cache, objects(&cache, 100));
        }
        end_interval();
        free_objects(&cache, objects(&cache, 100));
        assert!(counts(&cache).empty_slabs >= 10, "the last interval needed them: {:?}", counts(&cache));
        end_interval();
        end_interval();
        end_interval();
        assert_eq!(counts(&cache).slabs, 1, "one empty slab stays");
    });
}

test!(magazines_do_not_grow_without_contention);
fn magazines_do_not_grow_without_contention() {
    unchanged(|| {
        let cache = new_cache("lonely", 64, 8);
        fill_magazines(&cache, 1);
        let rounds = counts(&cache).magazine_rounds;
        for _ in 0..5 {
            fill_magazines(&cache, 500);
            end_interval();
            assert_eq!((counts(&cache).magazine_rounds, counts(&cache).depot_contention), (rounds, 0));
        }
    });
}

test!(a_depot_keeps_a_small_share_of_memory);
fn a_depot_keeps_a_small_share_of_memory() {
    const SIZE: usize = 32 << 10;
    unchanged(|| {
        let cache = new_cache("share", SIZE, 8);
        let mut held = objects(&cache, 300);
        for _ in 0..3 {
            free_objects(&cache, held.split_off(1));
            let magazine = counts(&cache).magazine_rounds * SIZE;
            let most = (frames().total_bytes() / 32).max(4 * magazine) + 3 * magazine;
            assert!(counts(&cache).in_magazines * SIZE <= most, "{:?}", counts(&cache));
            held.extend(objects(&cache, 299));
        }
        free_objects(&cache, held);
    });
}

test!(large_objects_and_caches_without_magazines_go_to_their_slabs_at_once);
fn large_objects_and_caches_without_magazines_go_to_their_slabs_at_once() {
    unchanged(|| {
        for cache in [new_cache("plain", 64, 8).without_magazines(), new_cache("large", 40_000, 8)] {
            free_objects(&cache, objects(&cache, 20));
            let stats = counts(&cache);
            assert_eq!((stats.magazine_rounds, stats.in_magazines, stats.slabs), (0, 0, 1), "{stats:?}");
        }
    });
}

test!(row_65_without_memory_for_a_magazine_the_slab_layer_serves);
fn row_65_without_memory_for_a_magazine_the_slab_layer_serves() {
    unchanged(|| {
        let cache = new_cache("short", 64, 8);
        let held = objects(&cache, 100);
        let all = take_all();
        free_objects(&cache, held);
        assert_eq!((counts(&cache).in_use, counts(&cache).in_magazines), (0, 0));
        give_back(all);
    });
}

test!(row_67_an_allocation_that_would_fail_has_what_magazines_keep);
fn row_67_an_allocation_that_would_fail_has_what_magazines_keep() {
    unchanged(|| {
        let cache = new_cache("kept", 1000, 8);
        fill_magazines(&cache, 60);
        assert!(counts(&cache).in_magazines >= 40);
        let all = take_free();
        let block = Block::new(layout(PAGE, PAGE), 1).expect("what the magazines keep");
        assert_eq!((counts(&cache).in_magazines, counts(&cache).slabs), (0, 0));
        drop(block);
        give_back(all);
    });
}

/// Objects that each side keeps at a time.
const KEPT: usize = 24;
const SIZE: usize = 300;

/// Replaces the object of `turn - KEPT` in `kept`, after a look whether it is still as it was.
fn replace(cache: &Cache, kept: &[AtomicPtr<u8>; KEPT], turn: usize, owner: u8) {
    let byte = |turn: usize| owner ^ (turn % 64) as u8;
    let place = &kept[turn % KEPT];
    if let Some(old) = NonNull::new(place.load(Relaxed)) {
        assert!(is_filled(old, SIZE, byte(turn - KEPT)), "the object of turn {} was written to", turn - KEPT);
        free_object(cache, old);
    }
    let new = cache.allocate().expect("memory");
    fill(new, SIZE, byte(turn));
    place.store(new.as_ptr(), Relaxed);
}

fn free_all(cache: &Cache, kept: &[AtomicPtr<u8>; KEPT]) {
    let kept = kept.iter().map(|place| place.swap(ptr::null_mut(), Relaxed));
    kept.filter_map(NonNull::new).for_each(|object| free_object(cache, object));
}

test!(an_interrupt_and_the_main_line_share_a_cache);
fn an_interrupt_and_the_main_line_share_a_cache() {
    const WANTED: usize = 200;
    static SHARED: Cache = Cache::new(HEAP.caches(), "shared", layout(SIZE, 8));
    static TURNS: AtomicUsize = AtomicUsize::new(0);
    static OF_INTERRUPT: [AtomicPtr<u8>; KEPT] = [const { AtomicPtr::new(ptr::null_mut()) }; KEPT];
    static OF_MAIN_LINE: [AtomicPtr<u8>; KEPT] = [const { AtomicPtr::new(ptr::null_mut()) }; KEPT];

    fill_magazines(&SHARED, 1);
    TURNS.store(0, Relaxed);
    unchanged(|| {
        timer::start(50_000, || {
            // As many at a time as make it exchange magazines.
            for _ in 0..2 {
                replace(&SHARED, &OF_INTERRUPT, TURNS.fetch_add(1, Relaxed), 0x80);
            }
            assert!(!interrupts::are_enabled(), "an allocation turned interrupts on");
        });
        for turn in 0.. {
            replace(&SHARED, &OF_MAIN_LINE, turn, 0x40);
            assert!(interrupts::are_enabled(), "an allocation turned interrupts off");
            if TURNS.load(Relaxed) >= WANTED {
                break;
            }
            if turn % 64 == 0 {
                free_all(&SHARED, &OF_MAIN_LINE);
            }
        }
        timer::stop();
        free_all(&SHARED, &OF_MAIN_LINE);
        free_all(&SHARED, &OF_INTERRUPT);
        assert_eq!(counts(&SHARED).in_use, 0);
    });
}
