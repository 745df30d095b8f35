//! Arenas, with their boundary tags in the kernel's page frames.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::timer;
use kslab::arena::{ArenaError, Constraints, Fit, SegmentKind};

use super::support::{give_back, take_all, unchanged};
use crate::guest::runner::test;

type Arena<'a> = kslab::arena::Arena<'a, Cpus>;

/// Kernel addresses, in pages.
const PAGE: u64 = 4096;
const ADDRESSES: u64 = 0xffff_c000_0000_0000;

fn addresses() -> Arena<'static> {
    let arena = Arena::new(HEAP.caches(), "addresses", PAGE);
    arena.add(ADDRESSES, 1 << 30).expect("memory for tags");
    arena
}

/// What the arena has, in its own words.
fn segments(arena: &Arena<'_>) -> Vec<(u64, u64, SegmentKind)> {
    let mut segments = Vec::with_capacity(100);
    arena.walk(|segment| segments.push((segment.start, segment.size, segment.kind)));
    segments
}

test!(addresses_are_disjoint_and_merge_when_they_are_freed);
fn addresses_are_disjoint_and_merge_when_they_are_freed() {
    unchanged(|| {
        let arena = addresses();
        let mut random = fastrand::Rng::with_seed(21);
        let mut live: Vec<(u64, u64)> =
            (0..500).map(|_| random.u64(1..=64) * PAGE).map(|size| (arena.alloc(size).expect("space"), size)).collect();
        assert_eq!(arena.size_in_use(), live.iter().map(|(_, size)| size).sum::<u64>());
        let mut sorted = live.clone();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        assert_eq!(arena.verify(), Ok(()));
        random.shuffle(&mut live);
        live.into_iter().for_each(|(start, size)| arena.free(start, size).expect("allocated"));
        let whole = [(ADDRESSES, 1 << 30, SegmentKind::Span), (ADDRESSES, 1 << 30, SegmentKind::Free)];
        assert_eq!(segments(&arena), whole);
        assert_eq!(arena.verify(), Ok(()));
    });
}

test!(stacks_with_a_guard_page_are_aligned);
fn stacks_with_a_guard_page_are_aligned() {
    unchanged(|| {
        let arena = addresses();
        let stack = 8 * PAGE;
        // The guard page lies below; it is the stack that is aligned.
        let wanted = Constraints { align: stack, phase: stack - PAGE, ..Constraints::NONE };
        let guards: Vec<u64> = (0..100).map(|_| arena.alloc_with(PAGE + stack, &wanted).expect("space")).collect();
        assert!(guards.iter().all(|guard| (guard + PAGE).is_multiple_of(stack)));
        guards.into_iter().for_each(|guard| arena.free(guard, PAGE + stack).expect("allocated"));
        assert_eq!(arena.size_in_use(), 0);
    });
}

test!(process_ids_are_used_again_as_late_as_possible);
fn process_ids_are_used_again_as_late_as_possible() {
    unchanged(|| {
        let ids = Arena::new(HEAP.caches(), "process ids", 1);
        ids.add(1, 300).expect("memory for tags");
        let next = Constraints { fit: Fit::Next, ..Constraints::NONE };
        for id in 1..=300 {
            assert_eq!(ids.alloc_with(1, &next), Ok(id));
            assert_eq!(ids.free(id, 1), Ok(()));
        }
        assert_eq!(ids.alloc_with(1, &next), Ok(1), "all others have been used since");
        assert_eq!(ids.free(1, 1), Ok(()));
    });
}

test!(ports_are_had_by_number_and_by_range);
fn ports_are_had_by_number_and_by_range() {
    unchanged(|| {
        let ports = Arena::new(HEAP.caches(), "ports", 1);
        ports.add(1, 65535).expect("memory for tags");
        let only = |port| Constraints { min: port, max: port, ..Constraints::NONE };
        assert_eq!(ports.alloc_with(1, &only(80)), Ok(80));
        assert_eq!(ports.alloc_with(1, &only(80)), Err(ArenaError::NoSpace));
        let above = Constraints { min: 49152, ..Constraints::NONE };
        for port in 49152..49352 {
            assert_eq!(ports.alloc_with(1, &above), Ok(port));
        }
        assert_eq!(ports.alloc_with(10, &Constraints { nocross: 16, ..above }), Ok(49360), "crosses no multiple of 16");
        assert_eq!(ports.stats().segments, 202);
        assert_eq!(ports.stats().failures, 1);
    });
}

test!(an_arena_borrows_from_another_and_gives_back_what_is_wholly_free);
fn an_arena_borrows_from_another_and_gives_back_what_is_wholly_free() {
    unchanged(|| {
        let parent = addresses();
        let child = Arena::with_source(HEAP.caches(), "buffers", PAGE, &parent, 1 << 20);
        let buffers: Vec<u64> = (0..1000).map(|_| child.alloc(PAGE).expect("space")).collect();
        assert_eq!((parent.size_in_use(), child.size_total()), (4 << 20, 4 << 20), "1000 pages, by the MiB");
        assert_eq!(child.stats().imports, 4);
        assert!(buffers.iter().all(|buffer| parent.contains(*buffer)));
        buffers.into_iter().for_each(|buffer| child.free(buffer, PAGE).expect("allocated"));
        assert_eq!((parent.size_in_use(), child.size_total(), child.stats().returns), (0, 0, 4));
        assert_eq!((parent.verify(), child.verify()), (Ok(()), Ok(())));
    });
}

test!(bad_requests_to_an_arena_are_errors_and_change_nothing);
fn bad_requests_to_an_arena_are_errors_and_change_nothing() {
    unchanged(|| {
        let mut arena = addresses();
        let start = arena.alloc(3 * PAGE).expect("space");
        let before = segments(&arena);
        let not_allocated = |start| Err(ArenaError::NotAllocated { start });
        assert_eq!(arena.free(start + PAGE, PAGE), not_allocated(start + PAGE), "inside the segment");
        assert_eq!(arena.free(0x1000, PAGE), not_allocated(0x1000), "not of this arena");
        let wrong = ArenaError::WrongSize { start, freed: PAGE, allocated: 3 * PAGE };
        assert_eq!(arena.free(start, PAGE), Err(wrong));
        assert_eq!(arena.alloc(0), Err(ArenaError::BadSize));
        assert_eq!(arena.alloc(2 << 30), Err(ArenaError::NoSpace));
        assert_eq!(arena.add(ADDRESSES + PAGE, PAGE), Err(ArenaError::Overlap { start: ADDRESSES }));
        assert_eq!(arena.add(1, PAGE), Err(ArenaError::BadSpan));
        assert_eq!(arena.destroy(), Err(ArenaError::Busy { segments: 1 }));
        assert_eq!(segments(&arena), before);
        assert_eq!(arena.free(start, 3 * PAGE), Ok(()));
        assert_eq!(arena.free(start, 3 * PAGE), not_allocated(start), "free already");
        assert_eq!(arena.stats().refused, 4);
        assert_eq!(arena.destroy(), Ok(()));
        assert_eq!((arena.size_total(), segments(&arena).len()), (0, 0));
    });
}

test!(without_memory_for_tags_an_arena_says_so_and_goes_on_later);
fn without_memory_for_tags_an_arena_says_so_and_goes_on_later() {
    unchanged(|| {
        let arena = addresses();
        let mut live = Vec::with_capacity(2000);
        let all = take_all();
        let error = loop {
            match arena.alloc(PAGE) {
                Ok(start) if live.len() < live.capacity() => live.push(start),
                other => break other,
            }
        };
        assert_eq!(error, Err(ArenaError::NoMemory));
        assert_eq!(arena.verify(), Ok(()));
        give_back(all);
        live.push(arena.alloc(PAGE).expect("memory for tags"));
        live.into_iter().for_each(|start| arena.free(start, PAGE).expect("allocated"));
    });
}

test!(a_storm_in_an_arena_leaves_every_invariant);
fn a_storm_in_an_arena_leaves_every_invariant() {
    unchanged(|| {
        let arena = addresses();
        let mut random = fastrand::Rng::with_seed(22);
        let mut live: Vec<(u64, u64)> = Vec::with_capacity(300);
        for turn in 0..5000 {
            if live.len() < 300 && random.bool() {
                let size = random.u64(1..=40) * PAGE;
                let align = PAGE << random.u32(0..5);
                let fit = [Fit::Instant, Fit::Best, Fit::Next][random.usize(0..3)];
                let start = arena.alloc_with(size, &Constraints { align, fit, ..Constraints::NONE }).expect("space");
                assert!(start.is_multiple_of(align));
                live.push((start, size));
            } else if !live.is_empty() {
                let (start, size) = live.swap_remove(random.usize(0..live.len()));
                arena.free(start, size).expect("allocated");
            }
            if turn % 250 == 0 {
                assert_eq!(arena.verify(), Ok(()), "turn {turn}");
            }
        }
        live.sort_unstable();
        assert!(live.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        live.into_iter().for_each(|(start, size)| arena.free(start, size).expect("allocated"));
    });
}

test!(small_segments_come_from_quantum_caches_until_they_are_reaped);
fn small_segments_come_from_quantum_caches_until_they_are_reaped() {
    unchanged(|| {
        let arena = Arena::new(HEAP.caches(), "cached", PAGE).with_quantum_caches(4);
        arena.add(ADDRESSES, 1 << 20).expect("memory for tags");
        let mut live: Vec<u64> = (0..50).map(|_| arena.alloc(2 * PAGE).expect("space")).collect();
        let last = live[49];
        live.drain(..).for_each(|start| arena.free(start, 2 * PAGE).expect("allocated"));
        assert_eq!(arena.alloc(2 * PAGE), Ok(last), "what was freed last");
        arena.free(last, 2 * PAGE).expect("allocated");
        // What the magazines keep is there for a request that would fail.
        let all = arena.alloc(1 << 20).expect("all of it");
        arena.free(all, 1 << 20).expect("allocated");
        arena.reap();
        assert_eq!((arena.size_in_use(), arena.stats().refused, arena.verify()), (0, 0, Ok(())));
    });
}

test!(an_interrupt_and_the_main_line_share_an_arena);
fn an_interrupt_and_the_main_line_share_an_arena() {
    const KEPT: usize = 16;
    static IDS: Arena<'static> = Arena::new(HEAP.caches(), "ids", 1);
    static TURNS: AtomicUsize = AtomicUsize::new(0);
    static OF_INTERRUPT: [AtomicU64; KEPT] = [const { AtomicU64::new(0) }; KEPT];

    /// Frees what was allocated `KEPT` turns ago, and allocates as much again.
    fn replace(kept: &[AtomicU64; KEPT], turn: usize) {
        let place = &kept[turn % KEPT];
        let size = |turn: usize| 1 + (turn % 7) as u64;
        if let Some(last) = turn.checked_sub(KEPT) {
            IDS.free(place.load(Relaxed), size(last)).expect("allocated");
        }
        place.store(IDS.alloc(size(turn)).expect("space"), Relaxed);
    }

    if IDS.size_total() == 0 {
        IDS.add(1, 1 << 20).expect("memory for tags");
    }
    let of_main_line = [const { AtomicU64::new(0) }; KEPT];
    TURNS.store(0, Relaxed);
    unchanged(|| {
        timer::start(50_000, || replace(&OF_INTERRUPT, TURNS.fetch_add(1, Relaxed)));
        let mut turn = 0;
        while TURNS.load(Relaxed) < 100 || turn < KEPT {
            replace(&of_main_line, turn);
            turn += 1;
        }
        timer::stop();
        let mut left = 0;
        IDS.walk(|segment| left += usize::from(segment.kind == SegmentKind::Allocated));
        assert_eq!(left, 2 * KEPT);
        let mut allocated = Vec::with_capacity(2 * KEPT);
        IDS.walk(|segment| {
            if segment.kind == SegmentKind::Allocated {
                allocated.push((segment.start, segment.size));
            }
        });
        allocated.into_iter().for_each(|(start, size)| IDS.free(start, size).expect("allocated"));
        assert_eq!((IDS.size_in_use(), IDS.verify()), (0, Ok(())));
    });
}
