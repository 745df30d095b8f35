//! Caches by layout, on real page frames.
//!
//! *Caches with constructors, objects kept constructed across free and allocate, per-CPU magazines, reclaim*: the first.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec::Vec;
use core::ptr::{self, NonNull};

use kernel::heap::HEAP;
use kslab::{AllocError, InUse};

use super::support::{
    Cache, PAGE, counts, fill, frames, free_object, free_objects, give_back, is_filled, layout, new_cache, objects,
    take_all, unchanged, verify,
};
use crate::guest::runner::test;

test!(a_cache_takes_no_memory_before_its_first_object);
fn a_cache_takes_no_memory_before_its_first_object() {
    unchanged(|| {
        let before = frames().stats();
        let cache = new_cache("late", 64, 8);
        assert!(cache.stats().is_none());
        assert_eq!(cache.shrink(), 0);
        assert_eq!(frames().stats(), before);
        let object = cache.allocate().expect("memory");
        assert_eq!((counts(&cache).name, counts(&cache).in_use), ("late", 1));
        assert!(frames().stats().free < before.free);
        free_object(&cache, object);
    });
}

test!(every_cache_that_was_used_is_in_the_tables_and_in_the_walk);
fn every_cache_that_was_used_is_in_the_tables_and_in_the_walk() {
    unchanged(|| {
        let caches = [new_cache("shown", 64, 8), new_cache("never used", 64, 8)];
        let object = caches[0].allocate().expect("memory");
        let tables = format!("{}", HEAP.tables());
        assert!(tables.lines().any(|line| line.starts_with("shown ")), "{tables}");
        assert!(!tables.contains("never used"));
        let (mut found, mut classes) = (None, 0);
        HEAP.for_each_cache(|stats| {
            classes += usize::from(stats.name.starts_with("size-"));
            found = found.or((stats.name == "shown").then_some(*stats));
        });
        assert_eq!((found, classes), (caches[0].stats(), kslab::SIZES.len() + 1), "one is of single pages");
        free_object(&caches[0], object);
    });
}

test!(a_static_cache_serves_again_and_again);
fn a_static_cache_serves_again_and_again() {
    static FILES: Cache = Cache::new(HEAP.caches(), "file", layout(120, 8));
    // What a cache needs for itself stays for as long as there is a cache.
    free_objects(&FILES, objects(&FILES, 1));
    for turn in 1..=3 {
        unchanged(|| {
            let files = objects(&FILES, 100 * turn);
            assert_eq!(counts(&FILES).in_use, 100 * turn);
            free_objects(&FILES, files);
        });
    }
}

test!(objects_of_8_bytes_to_128_kib_are_disjoint_and_lose_at_most_an_eighth_of_a_slab);
fn objects_of_8_bytes_to_128_kib_are_disjoint_and_lose_at_most_an_eighth_of_a_slab() {
    unchanged(|| {
        for size in [1, 8, 24, 100, 256, 500, 512, 513, 1000, 2000, 4096, 5000, 10_000, 32 << 10, 50_000, 128 << 10] {
            let cache = new_cache("sizes", size, 8);
            let objects = objects(&cache, 5);
            (1..).zip(&objects).for_each(|(byte, object)| fill(*object, size, byte));
            assert!((1..).zip(&objects).all(|(byte, object)| is_filled(*object, size, byte)), "{size} bytes");
            let stats = counts(&cache);
            let lost = stats.slab_size - stats.objects_per_slab * stats.object_size;
            assert!(lost * 8 <= stats.slab_size, "of a slab of {} bytes {lost} are lost", stats.slab_size);
            free_objects(&cache, objects);
        }
    });
}

test!(objects_are_aligned_up_to_2_mib);
fn objects_are_aligned_up_to_2_mib() {
    unchanged(|| {
        for align in (3..=21).map(|log| 1 << log) {
            let cache = new_cache("aligned", 24, align);
            let objects = objects(&cache, 2);
            assert!(objects.iter().all(|object| object.addr().get().is_multiple_of(align)), "{align}");
            assert_ne!(objects[0], objects[1]);
            free_objects(&cache, objects);
        }
    });
}

test!(cache_line_aligned_objects_share_no_line);
fn cache_line_aligned_objects_share_no_line() {
    unchanged(|| {
        let cache = new_cache("lines", 24, 8).cache_line_aligned();
        let objects = objects(&cache, 100);
        assert!(objects.iter().all(|object| object.addr().get().is_multiple_of(64)));
        assert_eq!(counts(&cache).object_size, 64);
        free_objects(&cache, objects);
    });
}

test!(slabs_made_one_after_the_other_have_different_colours);
fn slabs_made_one_after_the_other_have_different_colours() {
    unchanged(|| {
        let cache = new_cache("coloured", 240, 8);
        let probe = objects(&cache, 1);
        let stats = counts(&cache);
        assert!(stats.colours >= 5 && stats.slab_size == PAGE, "{stats:?}");
        let mut objects = objects(&cache, 5 * stats.objects_per_slab - 1);
        objects.extend(probe);
        let mut starts = BTreeMap::<_, BTreeSet<usize>>::new();
        for address in objects.iter().map(|object| object.addr().get()) {
            starts.entry(address / PAGE).or_default().insert(address % PAGE);
        }
        // The header and what is lost lie somewhere else in each.
        assert_eq!(starts.len(), 5);
        assert_eq!(starts.into_values().collect::<BTreeSet<_>>().len(), 5);
        free_objects(&cache, objects);
    });
}

test!(large_objects_fill_their_pages_and_small_ones_share_them_with_the_slabs_header);
fn large_objects_fill_their_pages_and_small_ones_share_them_with_the_slabs_header() {
    unchanged(|| {
        let large = new_cache("large", PAGE / 2, 8);
        let halves = objects(&large, 2);
        let [first, second] = [halves[0], halves[1]].map(|half| half.addr().get());
        assert!(counts(&large).off_slab);
        assert!(first.is_multiple_of(PAGE));
        assert_eq!(second, first + PAGE / 2);
        free_objects(&large, halves);

        let small = new_cache("small", PAGE / 8, 8);
        let eighths = objects(&small, 1);
        assert!(!counts(&small).off_slab);
        assert_eq!(counts(&small).objects_per_slab, 15);
        free_objects(&small, eighths);
    });
}

test!(a_limit_holds_and_a_free_object_is_room_below_it);
fn a_limit_holds_and_a_free_object_is_room_below_it() {
    unchanged(|| {
        let cache = new_cache("limited", 100, 8).with_limit(10);
        for _ in 0..2 {
            let mut held = objects(&cache, 10);
            assert_eq!(cache.allocate(), Err(AllocError::AtLimit));
            free_object(&cache, held.swap_remove(3));
            held.push(cache.allocate().expect("one below the limit"));
            // They go to magazines, which count until they are needed.
            free_objects(&cache, held);
        }
    });
}

test!(a_request_that_must_not_grow_has_what_is_free_and_no_more);
fn a_request_that_must_not_grow_has_what_is_free_and_no_more() {
    unchanged(|| {
        let cache = new_cache("no-wait", 100, 8);
        assert_eq!(cache.allocate_without_growing(), Err(AllocError::WouldGrow));
        let mut held = Vec::with_capacity(100);
        held.push(cache.allocate().expect("memory"));
        let stats = counts(&cache);
        let free = frames().stats().free;
        held.extend(core::iter::from_fn(|| cache.allocate_without_growing().ok()));
        assert_eq!(held.len(), stats.objects_per_slab);
        assert_eq!(counts(&cache).slabs, 1);
        assert_eq!(frames().stats().free, free);
        free_objects(&cache, held);
    });
}

test!(objects_come_and_go_in_bulk);
fn objects_come_and_go_in_bulk() {
    unchanged(|| {
        let cache = new_cache("bulk", 72, 8).with_limit(150);
        let mut places = [ptr::null_mut(); 100];
        assert_eq!(cache.allocate_bulk(&mut places), 100);
        let mut more = [ptr::null_mut(); 100];
        assert_eq!(cache.allocate_bulk(&mut more), 50, "up to the limit");
        let mut objects: Vec<NonNull<u8>> = places.iter().chain(&more).copied().filter_map(NonNull::new).collect();
        assert_eq!(objects.len(), 150);
        objects.iter().zip(0..).for_each(|(object, byte)| fill(*object, 72, byte));
        assert!(objects.iter().zip(0..).all(|(object, byte)| is_filled(*object, 72, byte)));
        fastrand::Rng::with_seed(6).shuffle(&mut objects);
        // SAFETY: they are no longer used.
        unsafe { cache.free_bulk(&objects) };
        assert_eq!((counts(&cache).in_use, counts(&cache).in_magazines), (0, 0), "past the magazines");
    });
}

test!(row_69_a_reserve_serves_when_memory_is_used_up_and_refills);
fn row_69_a_reserve_serves_when_memory_is_used_up_and_refills() {
    unchanged(|| {
        let cache = new_cache("reserved", 500, 8);
        let reserve = cache.reserve(5).expect("memory");
        let mut others = Vec::with_capacity(500);
        let mut mine = Vec::with_capacity(5);
        let all = take_all();
        while let Ok(object) = cache.allocate() {
            assert!(others.len() < others.capacity(), "memory is not used up");
            others.push(object);
        }
        for _ in 0..3 {
            mine.extend(core::iter::from_fn(|| reserve.allocate().ok()));
            assert_eq!((mine.len(), reserve.available()), (5, 0));
            assert_eq!(reserve.allocate(), Err(AllocError::NoMemory));
            // SAFETY: it is no longer used.
            mine.drain(..).for_each(|object| unsafe { reserve.free(object) });
            assert_eq!(reserve.available(), 5);
        }
        give_back(all);
        free_objects(&cache, others);
    });
}

test!(row_77_a_cache_with_live_objects_is_not_destroyed_and_lists_them);
fn row_77_a_cache_with_live_objects_is_not_destroyed_and_lists_them() {
    unchanged(|| {
        let cache = new_cache("busy", 80, 8);
        let mut live = objects(&cache, 40);
        free_objects(&cache, live.split_off(3));
        live.sort_unstable();
        let InUse { cache, objects } = cache.destroy().expect_err("three objects are alive");
        assert_eq!(objects, 3);
        let mut listed = Vec::with_capacity(40);
        cache.for_each_object(|object| listed.push(object));
        listed.sort_unstable();
        assert_eq!(listed, live);
        free_objects(&cache, live);
        cache.destroy().expect("no object is alive");
    });
}

test!(row_75_a_second_cache_of_a_name_is_numbered);
fn row_75_a_second_cache_of_a_name_is_numbered() {
    unchanged(|| {
        let (first, second) = (new_cache("twin", 64, 8), new_cache("twin", 128, 8));
        let held = [objects(&first, 1), objects(&second, 1)];
        assert_eq!((counts(&first).namesake, counts(&second).namesake), (0, 1));
        assert!(format!("{}", counts(&first)).starts_with("twin "));
        assert!(format!("{}", counts(&second)).starts_with("twin#1 "));
        held.into_iter().zip([&first, &second]).for_each(|(held, cache)| free_objects(cache, held));
    });
}

test!(a_hundred_caches_stand_side_by_side);
fn a_hundred_caches_stand_side_by_side() {
    unchanged(|| {
        let caches: Vec<_> = (0..100).map(|number| new_cache("many", 8 + 24 * number, 8)).collect();
        let held: Vec<_> = caches.iter().map(|cache| objects(cache, 3)).collect();
        let fill_all = |(number, held): (usize, &Vec<NonNull<u8>>)| {
            held.iter().for_each(|object| fill(*object, 8 + 24 * number, number as u8));
        };
        held.iter().enumerate().for_each(fill_all);
        let right = |number: usize| move |object: &NonNull<u8>| is_filled(*object, 8 + 24 * number, number as u8);
        assert!(held.iter().enumerate().all(|(number, held)| held.iter().all(right(number))));
        verify();
        held.into_iter().zip(&caches).for_each(|(held, cache)| free_objects(cache, held));
    });
}

test!(caches_come_and_go);
fn caches_come_and_go() {
    unchanged(|| {
        for turn in 0..300 {
            let cache = new_cache("short-lived", 32 + turn, 8);
            free_objects(&cache, objects(&cache, 5));
            cache.destroy().expect("no object is alive");
        }
    });
}

test!(row_76_what_no_slab_can_hold_is_an_error);
fn row_76_what_no_slab_can_hold_is_an_error() {
    unchanged(|| {
        for (size, align) in [(0, 8), ((4 << 20) + 1, 8), (8, 4 << 20)] {
            assert_eq!(new_cache("impossible", size, align).allocate(), Err(AllocError::BadLayout), "{size}, {align}");
        }
        let largest = new_cache("largest", 4 << 20, 8);
        let object = largest.allocate().expect("4 MiB in a row");
        free_object(&largest, object);
    });
}

test!(row_66_a_cache_is_not_created_without_memory_and_is_with_it);
fn row_66_a_cache_is_not_created_without_memory_and_is_with_it() {
    unchanged(|| {
        let cache = new_cache("unlucky", 3000, 8);
        let all = take_all();
        assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
        give_back(all);
        let object = cache.allocate().expect("memory");
        free_object(&cache, object);
    });
}

test!(shrink_gives_back_every_slab_without_an_object);
fn shrink_gives_back_every_slab_without_an_object() {
    unchanged(|| {
        let cache = new_cache("shrunk", 200, 8);
        let mut held = objects(&cache, 1000);
        let kept = held.swap_remove(500);
        free_objects(&cache, held);
        cache.shrink();
        assert_eq!((counts(&cache).slabs, counts(&cache).in_use, counts(&cache).in_magazines), (1, 1, 0));
        free_object(&cache, kept);
        cache.shrink();
        assert_eq!(counts(&cache).slabs, 0);
    });
}

test!(shrink_says_how_many_page_frames_went_back);
fn shrink_says_how_many_page_frames_went_back() {
    unchanged(|| {
        let cache = new_cache("counted", 200, 8);
        free_objects(&cache, objects(&cache, 1000));
        let slabs = counts(&cache).slabs;
        assert!(slabs > 1, "magazines hold objects of more than one");
        assert_eq!(cache.shrink(), slabs, "each has one page frame");
        let block = cache.allocate().expect("memory");
        free_object(&cache, block);
        assert_eq!(cache.shrink(), 1, "the one slab that stays empty");
    });
}
