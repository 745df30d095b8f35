//! The allocator's numbers and its own check, and how memory keeps together under load.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::ptr::NonNull;

use kernel::heap::HEAP;
use kslab::stats::CacheStats;

use super::support::{
    Block, Cache, PAGE, cache, counts, fill, frames, free_object, free_objects, is_filled, layout, new_cache, objects,
    order, unchanged, verify,
};
use crate::guest::runner::test;

/// Counts what is written to it.
struct Lines {
    bytes: usize,
    lines: usize,
}

impl Write for Lines {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.bytes += text.len();
        self.lines += text.matches('\n').count();
        Ok(())
    }
}

test!(tables_are_printed_without_an_allocation);
fn tables_are_printed_without_an_allocation() {
    unchanged(|| {
        drop(Block::new(layout(100, 8), 1));
        let everything = || (frames().stats(), HEAP.cache_stats().map(|cache| cache.allocations).sum::<u64>());
        let before = everything();
        let mut lines = Lines { bytes: 0, lines: 0 };
        write!(lines, "{}", HEAP.tables()).expect("nothing fails there");
        assert_eq!(everything(), before);
        assert!(lines.lines >= 6 && lines.bytes >= 300, "{} lines, {} bytes", lines.lines, lines.bytes);
    });
}

test!(the_counts_of_a_cache_follow_what_is_done);
fn the_counts_of_a_cache_follow_what_is_done() {
    unchanged(|| {
        let cache = new_cache("script", 400, 8).without_magazines().with_limit(25);
        let of = |stats: CacheStats| {
            let CacheStats { slabs, empty_slabs, in_use, allocations, frees, failures, .. } = stats;
            (slabs, empty_slabs, in_use, allocations, frees, failures)
        };
        let mut held = objects(&cache, 25);
        let stats = counts(&cache);
        assert_eq!((stats.object_size, stats.slab_size, stats.objects_per_slab), (400, PAGE, 10));
        assert_eq!(of(stats), (3, 0, 25, 25, 0, 0));
        assert!(cache.allocate().is_err());
        let failures = counts(&cache).failures;
        assert!(failures >= 1);
        free_object(&cache, held.remove(0));
        assert_eq!(of(counts(&cache)), (3, 0, 24, 25, 1, failures));
        held.drain(..9).for_each(|object| free_object(&cache, object));
        assert_eq!(of(counts(&cache)), (3, 1, 15, 25, 10, failures));
        free_objects(&cache, held);
        let stats = counts(&cache);
        assert_eq!(of(stats), (1, 1, 0, 25, 25, failures));
        assert_eq!((stats.slabs_created, stats.slabs_released), (3, 2));
        cache.shrink();
        assert_eq!((counts(&cache).slabs, counts(&cache).slabs_released), (0, 3));
    });
}

test!(a_row_of_the_table_has_the_counts_under_their_names);
fn a_row_of_the_table_has_the_counts_under_their_names() {
    unchanged(|| {
        let cache = new_cache("row", 90, 8);
        let mut held = objects(&cache, 70);
        free_objects(&cache, held.split_off(30));
        let stats = counts(&cache);
        let row = format!("{stats}");
        assert_eq!(row.len(), CacheStats::HEADER.len());
        let words: Vec<&str> = row.split_whitespace().collect();
        let expected = [
            stats.object_size,
            stats.slab_size,
            stats.objects_per_slab,
            stats.colours as usize,
            stats.slabs,
            30,
            40,
            70,
            0,
            stats.magazine_rounds,
            0,
            0,
        ];
        assert_eq!(words[0], "row");
        assert!(words[1..].iter().copied().eq(expected.map(|count| count.to_string())), "{row}");
        free_objects(&cache, held);
    });
}

test!(the_frames_table_adds_up);
fn the_frames_table_adds_up() {
    unchanged(|| {
        let block = frames().allocate(order(3)).expect("memory");
        let stats = frames().stats();
        let in_blocks: usize = stats.free_blocks.iter().enumerate().map(|(order, blocks)| blocks << order).sum();
        assert_eq!(stats.free, in_blocks + stats.stocked);
        assert_eq!(stats.total, stats.zones.iter().map(|zone| zone.total).sum::<usize>());
        assert_eq!(stats.free, stats.zones.iter().map(|zone| zone.free).sum::<usize>() + stats.stocked);
        for zone in &stats.zones {
            let in_zone: usize = zone.free_blocks.iter().enumerate().map(|(order, blocks)| blocks << order).sum();
            assert_eq!(zone.free, in_zone);
            assert!(zone.free <= zone.total && zone.reserve <= zone.low && zone.low <= zone.high);
        }
        let populated = stats.zones.iter().filter(|zone| zone.total > 0).count();
        let lines = format!("{stats}").lines().count();
        assert!(lines >= 2 + populated && lines <= 3 + populated);
        super::support::free(block, order(3));
    });
}

test!(the_frame_records_take_at_most_0_4_percent_of_memory);
fn the_frame_records_take_at_most_0_4_percent_of_memory() {
    let stats = frames().stats();
    // Beside them are the stocks of 64 CPUs, eight frames, and, for the smaller ranges of the map, a few tables.
    assert!(stats.metadata * 1000 <= stats.total * 4 + 12 * 1000, "{} of {}", stats.metadata, stats.total);
}

/// A block of the heap, or an object of a cache, or page frames.
enum Piece {
    Block(Block),
    Object(usize, NonNull<u8>, u8),
}

test!(a_storm_over_heap_and_caches_leaves_every_invariant);
fn a_storm_over_heap_and_caches_leaves_every_invariant() {
    unchanged(|| {
        let caches = [40, 300, 1500, 9000].map(|size| (new_cache("storm", size, 8), size));
        let mut random = fastrand::Rng::with_seed(11);
        let mut live: Vec<Piece> = Vec::with_capacity(300);
        let release = |piece: Piece| match piece {
            Piece::Block(block) => assert!(block.is_intact()),
            Piece::Object(number, object, byte) => {
                let (cache, size): &(Cache, usize) = &caches[number];
                assert!(is_filled(object, (*size).min(64), byte));
                free_object(cache, object);
            }
        };
        for turn in 0..20_000_u32 {
            let byte = turn as u8;
            match random.u32(0..5) {
                0 if live.len() < 300 => {
                    let size = 1 << random.u32(0..14);
                    let align = 1 << random.u32(0..8);
                    let block = Block::new(layout(random.usize(size / 2..=size), align), byte);
                    live.push(Piece::Block(block.expect("memory")));
                }
                1 if live.len() < 300 => {
                    let number = random.usize(0..caches.len());
                    let (cache, size) = &caches[number];
                    let object = cache.allocate().expect("memory");
                    fill(object, (*size).min(64), byte);
                    live.push(Piece::Object(number, object, byte));
                }
                2..4 if !live.is_empty() => release(live.swap_remove(random.usize(0..live.len()))),
                _ if turn % 100 == 0 => {
                    HEAP.shrink();
                }
                _ => {}
            }
            if turn % 1000 == 0 {
                verify();
            }
        }
        live.into_iter().for_each(release);
    });
}

test!(every_size_up_to_2_pages_with_every_alignment_is_disjoint);
fn every_size_up_to_2_pages_with_every_alignment_is_disjoint() {
    unchanged(|| {
        for log in 0..=12 {
            // Other sizes for each alignment; all of them are in the test that takes long.
            for size in (1 + log..=2 * PAGE).step_by(149) {
                let wanted = layout(size, 1 << log);
                let [first, second] = [1, 2].map(|fill| Block::new(wanted, fill).expect("memory"));
                let ends = [first.bytes(), second.bytes()].map(<[u8]>::as_ptr_range);
                assert!(ends[0].end <= ends[1].start || ends[1].end <= ends[0].start, "{wanted:?}");
            }
        }
    });
}

test!(slabs_that_are_emptying_become_empty_because_fuller_ones_serve);
fn slabs_that_are_emptying_become_empty_because_fuller_ones_serve() {
    unchanged(|| {
        let cache = new_cache("fullest", 250, 8).without_magazines();
        let probe = objects(&cache, 1);
        let per_slab = counts(&cache).objects_per_slab;
        free_objects(&cache, probe);
        let mut slabs: Vec<Vec<NonNull<u8>>> = (0..20).map(|_| objects(&cache, per_slab)).collect();
        // Ten slabs lose half of their objects, ten all but one.
        for (number, slab) in slabs.iter_mut().enumerate() {
            free_objects(&cache, slab.split_off(if number % 2 == 0 { per_slab / 2 } else { 1 }));
        }
        assert_eq!(counts(&cache).slabs, 20);
        // What is allocated goes to the fuller ones, and what was alone is freed.
        let more = objects(&cache, 10 * (per_slab - per_slab / 2));
        for slab in slabs.iter_mut().skip(1).step_by(2) {
            free_objects(&cache, core::mem::take(slab));
        }
        assert_eq!(counts(&cache).slabs, 11, "ten full ones, and one that stays empty");
        free_objects(&cache, more);
        slabs.into_iter().for_each(|slab| free_objects(&cache, slab));
    });
}

test!(row_107_a_long_lived_scatter_leaves_large_blocks);
fn row_107_a_long_lived_scatter_leaves_large_blocks() {
    unchanged(|| {
        let largest = frames().stats().largest_block().expect("free memory");
        let mut random = fastrand::Rng::with_seed(12);
        let wanted = (4 << 20).min(frames().free_bytes() / 2);
        let mut kept = Vec::with_capacity(1000);
        let mut passing = Vec::with_capacity(wanted / 500);
        let mut bytes = 0;
        while bytes < wanted {
            let size = random.usize(16..2000);
            let block = HEAP.allocate(layout(size, 8)).expect("memory");
            bytes += size;
            if random.u32(0..50) == 0 { kept.push((block, size)) } else { passing.push((block, size)) }
        }
        let free = |(block, size): (NonNull<u8>, usize)| {
            // SAFETY: allocated above, and not used.
            unsafe { HEAP.free(block, layout(size, 8)) }
        };
        random.shuffle(&mut passing);
        passing.into_iter().for_each(free);
        HEAP.shrink();
        // The pages of each object that is kept are lost, and no more.
        let lost = kept.len() * 7;
        assert!(frames().free_bytes() / PAGE + lost + 1000 >= frames().stats().total - frames().stats().metadata);
        for _ in 0..20 {
            let half = HEAP.allocate(layout(largest.bytes() / 2, PAGE)).expect("half of the largest block before");
            // SAFETY: allocated above, and not used.
            unsafe { HEAP.free(half, layout(largest.bytes() / 2, PAGE)) };
        }
        kept.into_iter().for_each(free);
    });
}

test!(row_108_one_live_object_a_slab_is_seen_in_the_counts);
fn row_108_one_live_object_a_slab_is_seen_in_the_counts() {
    unchanged(|| {
        let before = cache(128).in_use;
        let mut all: Vec<Block> = (0..600).map(|_| Block::new(layout(128, 8), 1).expect("memory")).collect();
        // One from each page.
        all.sort_by_key(|block| block.start);
        all.dedup_by_key(|block| block.start.addr().get() / PAGE);
        HEAP.shrink();
        let stats = cache(128);
        assert_eq!(stats.in_use - before, all.len());
        assert!(stats.slabs >= all.len() && stats.slabs <= all.len() + 1, "{stats:?}");
        assert_eq!(stats.empty_slabs, 0);
    });
}

test!(row_112_the_same_seed_gives_the_same_numbers);
fn row_112_the_same_seed_gives_the_same_numbers() {
    let run = || {
        let cache = new_cache("seeded", 120, 8);
        let mut random = fastrand::Rng::with_seed(13);
        let mut live = Vec::with_capacity(200);
        for _ in 0..3000 {
            if live.len() < 200 && random.bool() {
                live.push(cache.allocate().expect("memory"));
            } else if !live.is_empty() {
                free_object(&cache, live.swap_remove(random.usize(0..live.len())));
            }
        }
        let stats = counts(&cache);
        free_objects(&cache, live);
        stats
    };
    unchanged(|| assert_eq!(run(), run()));
}
