mod broken;
mod fitting;
mod importing;
mod memory;
mod model;
mod quantum;

use std::format;
use std::string::ToString;
use std::vec::Vec;

use super::*;
use crate::platform::NoInterrupts;
use crate::testing::{Heap, Machine};

type TestArena<'a> = Arena<'a, NoInterrupts>;

const START: u64 = 64 << 20;

/// Runs `test` with the caches of a small machine, which must all have come back afterwards.
fn with_caches(test: impl FnOnce(&Caches<NoInterrupts>)) {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = heap.frames().stats();
    test(heap.caches());
    assert_eq!(heap.frames().stats(), before, "pages of tags have not come back");
}

/// Runs `test` with an arena without spans, and checks it afterwards.
fn with_arena(quantum: u64, test: impl FnOnce(&TestArena<'_>)) {
    with_caches(|caches| {
        let arena = TestArena::new(caches, "test", quantum);
        test(&arena);
        assert_eq!(arena.verify(), Ok(()));
    });
}

fn segments(arena: &TestArena<'_>) -> Vec<Segment> {
    let mut segments = Vec::new();
    arena.walk(|segment| segments.push(segment));
    segments
}

fn segment(start: u64, size: u64, kind: SegmentKind) -> Segment {
    Segment { start, size, kind }
}

#[test]
fn what_is_freed_merges_with_both_neighbours_in_whatever_order() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        with_arena(16, |arena| {
            arena.add(0x100, 0x30).unwrap();
            let starts = [(); 3].map(|()| arena.alloc(16).unwrap());
            assert_eq!(starts, [0x100, 0x110, 0x120]);
            assert_eq!((arena.size_in_use(), arena.size_free()), (0x30, 0));
            for index in order {
                arena.free(starts[index], 16).unwrap();
                assert_eq!(arena.verify(), Ok(()));
            }
            let whole = [segment(0x100, 0x30, SegmentKind::Span), segment(0x100, 0x30, SegmentKind::Free)];
            assert_eq!(segments(arena), whole);
        });
    }
}

#[test]
fn segments_of_adjacent_spans_stay_apart() {
    with_arena(1, |arena| {
        arena.add(10, 10).unwrap();
        arena.add(20, 10).unwrap();
        assert_eq!(arena.alloc(11), Err(ArenaError::NoSpace));
        let starts = [arena.alloc(10).unwrap(), arena.alloc(10).unwrap()];
        for start in starts {
            arena.free(start, 10).unwrap();
        }
        assert_eq!(arena.stats().free_segments, 2);
    });
}

#[test]
fn sizes_are_rounded_up_to_the_quantum_both_times() {
    with_arena(4096, |arena| {
        arena.add(0, 1 << 20).unwrap();
        let start = arena.alloc(4097).unwrap();
        assert_eq!(arena.size_in_use(), 8192);
        assert_eq!(arena.free(start, 4096), Err(ArenaError::WrongSize { start, freed: 4096, allocated: 8192 }));
        assert_eq!(arena.free(start, 8191), Ok(()));
        assert_eq!(arena.size_in_use(), 0);
    });
}

#[test]
fn spans_are_in_order_whatever_the_order_in_which_they_came() {
    with_arena(1, |arena| {
        for start in [50, 10, 90, 30, 70] {
            arena.add(start, 5).unwrap();
            assert_eq!(arena.verify(), Ok(()));
        }
        let spans = segments(arena).into_iter().filter(|segment| segment.kind == SegmentKind::Span);
        assert_eq!(spans.map(|span| span.start).collect::<Vec<_>>(), [10, 30, 50, 70, 90]);
        assert_eq!(arena.size_total(), 25);
        assert!([10, 14, 50, 94].iter().all(|x| arena.contains(*x)));
        assert!(![0, 9, 15, 49, 95, u64::MAX].iter().any(|x| arena.contains(*x)));
    });
}

#[test]
fn a_span_that_overlaps_wraps_or_is_not_of_whole_quanta_is_refused() {
    with_arena(16, |arena| {
        arena.add(0x100, 0x100).unwrap();
        let before = segments(arena);
        for (start, size) in [(0x100, 0x100), (0xf0, 0x20), (0x1f0, 0x20), (0x110, 0x10), (0, 0x1000)] {
            assert_eq!(arena.add(start, size), Err(ArenaError::Overlap { start: 0x100 }), "{start:#x} {size:#x}");
        }
        for (start, size) in [(0x300, 0), (0x308, 0x10), (0x300, 0x18), (u64::MAX - 15, 0x20), (0x10, u64::MAX - 15)] {
            assert_eq!(arena.add(start, size), Err(ArenaError::BadSpan), "{start:#x} {size:#x}");
        }
        assert_eq!(segments(arena), before);
        arena.add(0x200, 0x10).unwrap();
        arena.add(0xf0, 0x10).unwrap();
    });
}

#[test]
fn a_span_may_end_at_the_last_integer() {
    with_arena(4096, |arena| {
        let start = 0u64.wrapping_sub(3 * 4096);
        arena.add(start, 3 * 4096).unwrap();
        assert!(arena.contains(u64::MAX));
        assert_eq!(arena.add(start - 4096, 8192), Err(ArenaError::Overlap { start }));
        let starts = [(); 3].map(|()| arena.alloc(4096).unwrap());
        assert_eq!(starts[2], u64::MAX - 4095);
        assert_eq!(arena.alloc(4096), Err(ArenaError::NoSpace));
        assert_eq!(arena.verify(), Ok(()));
        assert_eq!(segments(arena).last().map(Segment::last), Some(u64::MAX));
        arena.free(starts[2], 4096).unwrap();
        let last = Constraints { min: u64::MAX - 4095, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(4096, &last), Ok(starts[2]));
        let next = Constraints { fit: Fit::Next, ..Constraints::NONE };
        arena.free(starts[2], 4096).unwrap();
        assert_eq!(arena.alloc_with(4096, &next), Ok(starts[2]), "next fit goes round at the end of all integers");
        arena.free(starts[1], 4096).unwrap();
        assert_eq!(arena.alloc_with(4096, &next), Ok(starts[1]));
    });
}

#[test]
fn all_integers_but_one_are_the_most_that_an_arena_can_have() {
    with_arena(1, |arena| {
        arena.add(0, 1 << 63).unwrap();
        assert_eq!(arena.add(1 << 63, 1 << 63), Err(ArenaError::BadSpan), "2^64 is not a number of integers here");
        arena.add(1 << 63, (1 << 63) - 1).unwrap();
        assert_eq!(arena.size_total(), u64::MAX);
        assert_eq!(arena.alloc(u64::MAX), Err(ArenaError::NoSpace));
        assert_eq!(arena.alloc(1 << 63), Ok(0));
        assert_eq!(arena.verify(), Ok(()));
    });
}

#[test]
fn what_cannot_be_allocated_is_refused() {
    with_arena(4096, |arena| {
        assert_eq!(arena.alloc(1), Err(ArenaError::NoSpace), "no span yet");
        arena.add(0, 1 << 20).unwrap();
        assert_eq!(arena.alloc(0), Err(ArenaError::BadSize));
        assert_eq!(arena.alloc(u64::MAX), Err(ArenaError::BadSize), "rounded up it is 2^64");
        assert_eq!(arena.alloc(u64::MAX - 4095), Err(ArenaError::NoSpace));
        assert_eq!(arena.alloc((1 << 20) + 1), Err(ArenaError::NoSpace));
        assert_eq!(arena.stats().failures, 3);
        assert_eq!(arena.alloc(1 << 20), Ok(0));
    });
}

#[test]
fn row_39_an_alignment_that_is_no_power_of_two_is_an_error() {
    with_arena(1, |arena| {
        for align in [3, 24, 48, u64::MAX] {
            let constraints = Constraints { align, ..Constraints::NONE };
            assert!(matches!(arena.alloc_with(16, &constraints), Err(ArenaError::BadConstraints)), "{align}");
        }
    });
    // Everything else takes its alignment in a type that has no such value.
    assert!(core::alloc::Layout::from_size_align(64, 48).is_err());
}

#[test]
fn a_quantum_that_is_no_power_of_two_refuses_everything() {
    with_caches(|caches| {
        for quantum in [0, 3, 4097, u64::MAX] {
            let arena = TestArena::new(caches, "bad", quantum);
            assert_eq!(arena.add(0, quantum), Err(ArenaError::BadQuantum));
            assert_eq!(arena.alloc(1), Err(ArenaError::BadQuantum));
            assert_eq!(arena.free(0, 1), Err(ArenaError::BadQuantum));
            assert_eq!(arena.verify(), Ok(()));
            let parent = TestArena::new(caches, "parent", 1);
            let child = TestArena::with_source(caches, "bad", quantum, &parent, 5);
            assert_eq!(child.alloc(1), Err(ArenaError::BadQuantum));
        }
    });
}

#[test]
fn a_bad_free_is_refused_and_changes_nothing() {
    with_arena(16, |arena| {
        arena.add(0x100, 0x100).unwrap();
        let start = arena.alloc(0x40).unwrap();
        let before = segments(arena);
        for other in [start + 16, start + 1, start - 16, 0x1f0, 0, u64::MAX] {
            assert_eq!(arena.free(other, 0x40), Err(ArenaError::NotAllocated { start: other }));
        }
        for freed in [0x10, 0x30, 0x50, 0x1000] {
            assert_eq!(arena.free(start, freed), Err(ArenaError::WrongSize { start, freed, allocated: 0x40 }));
        }
        assert_eq!(arena.free(start, 0), Err(ArenaError::BadSize));
        assert_eq!(segments(arena), before);
        assert_eq!(arena.stats().refused, 10);
        arena.free(start, 0x40).unwrap();
        assert_eq!(arena.free(start, 0x40), Err(ArenaError::NotAllocated { start }), "a double free");
    });
}

#[test]
fn a_walk_visits_everything_once_and_in_order() {
    with_arena(1, |arena| {
        arena.add(0, 200).unwrap();
        let starts: Vec<_> = (0..100).map(|_| arena.alloc(2).unwrap()).collect();
        arena.add(1000, 10).unwrap();
        starts.iter().step_by(2).for_each(|start| arena.free(*start, 2).unwrap());
        let visited = segments(arena);
        assert_eq!(visited.len(), 2 + 100 + 1);
        assert!(visited.is_sorted_by_key(|segment| segment.start));
        assert_eq!(visited[0], segment(0, 200, SegmentKind::Span));
        assert_eq!(visited[101..], [segment(1000, 10, SegmentKind::Span), segment(1000, 10, SegmentKind::Free)]);
    });
}

#[test]
fn a_visitor_may_free_what_it_visits_and_allocate() {
    with_arena(1, |arena| {
        arena.add(0, 200).unwrap();
        for _ in 0..100 {
            arena.alloc(2).unwrap();
        }
        let mut freed = 0;
        arena.walk(|segment| {
            if segment.kind == SegmentKind::Allocated {
                arena.free(segment.start, segment.size).unwrap();
                freed += 1;
            }
        });
        assert_eq!((freed, arena.size_in_use()), (100, 0));
        let mut visits = 0;
        arena.walk(|_| {
            visits += 1;
            arena.alloc(1).unwrap();
        });
        assert_eq!(visits, 2, "the span and its one free segment, as they were at first");
    });
}

#[test]
fn a_walk_goes_on_behind_what_it_has_visited_when_tags_go_and_come() {
    with_arena(1, |arena| {
        arena.add(0, 64).unwrap();
        for _ in 0..64 {
            arena.alloc(1).unwrap();
        }
        let mut visited = Vec::new();
        arena.walk(|here| {
            // In the middle of the first batch, which ends with 14: the tag of 15, to go on with, is given up.
            if here.start == 8 {
                [16, 14, 15].iter().for_each(|start| arena.free(*start, 1).unwrap());
            }
            visited.push(here);
        });
        let allocated = visited.iter().filter(|here| here.kind == SegmentKind::Allocated).map(|here| here.start);
        let expected: Vec<_> = (0..64).filter(|start| !(14..17).contains(start)).collect();
        let seen: Vec<_> = allocated.filter(|start| !(14..17).contains(start)).collect();
        assert_eq!(seen, expected);
    });
}

#[test]
fn destroying_refuses_what_is_in_use_and_makes_the_rest_as_new() {
    with_caches(|caches| {
        let free = caches.frames().stats().free;
        let mut arena = TestArena::new(caches, "test", 1);
        arena.add(0, 100).unwrap();
        let start = arena.alloc(10).unwrap();
        assert_eq!(arena.destroy(), Err(ArenaError::Busy { segments: 1 }));
        assert_eq!(arena.size_in_use(), 10);
        arena.free(start, 10).unwrap();
        arena.destroy().unwrap();
        assert_eq!((arena.size_total(), arena.stats().tags, caches.frames().stats().free), (0, 0, free));
        assert_eq!(arena.verify(), Ok(()));
        arena.add(0, 100).unwrap();
        assert_eq!(arena.alloc(100), Ok(0));
    });
}

#[test]
fn threads_get_disjoint_segments() {
    with_arena(1, |arena| {
        arena.add(0, 1000).unwrap();
        let rounds = if cfg!(miri) { 20 } else { 2000 };
        let all: Vec<(u64, u64)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|thread| {
                    scope.spawn(move || {
                        for round in 0..rounds {
                            let size = 1 + (round + thread) % 7;
                            let start = arena.alloc(size).unwrap();
                            arena.free(start, size).unwrap();
                        }
                        (1..10).map(|size| (arena.alloc(size).unwrap(), size)).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let mut all = all;
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        assert_eq!(arena.size_in_use(), 3 * 45);
    });
}

#[test]
fn the_tables_print() {
    with_arena(4096, |arena| {
        arena.add(0x10_0000, 0x3000).unwrap();
        arena.alloc(4096).unwrap();
        let row = arena.stats().to_string();
        assert_eq!(ArenaStats::HEADER.len(), row.len());
        let columns: Vec<_> = row.split_whitespace().collect();
        assert_eq!(columns, ["test", "4096", "12288", "4096", "8192", "1", "1", "0", "0"]);
        let map = concat!(
            "0x0000000000100000..=0x0000000000102fff span\n",
            "  0x0000000000100000..=0x0000000000100fff allocated\n",
            "  0x0000000000101000..=0x0000000000102fff free\n"
        );
        assert_eq!(arena.map().to_string(), map);
        assert_eq!(format!("{arena:?}"), r#"Arena { name: "test", quantum: 4096, .. }"#);
    });
}

#[test]
fn row_103_counts_of_what_has_happened_wrap_around() {
    with_arena(1, |arena| {
        arena.add(0, 10).unwrap();
        {
            let counts = &mut arena.state.lock().counts;
            (counts.allocations, counts.frees, counts.failures) = (u64::MAX, u64::MAX, u64::MAX);
            (counts.refused, counts.searched) = (u64::MAX, u64::MAX);
        }
        let start = arena.alloc(5).unwrap();
        arena.free(start, 5).unwrap();
        arena.free(start, 5).unwrap_err();
        arena.alloc(11).unwrap_err();
        let stats = arena.stats();
        assert_eq!((stats.allocations, stats.frees, stats.failures, stats.refused), (0, 0, 0, 0));
        assert_eq!(stats.searched, 1, "each request has looked at the one free segment");
    });
}

#[test]
fn an_error_says_what_and_where() {
    let error = ArenaError::NotAllocated { start: 0x40 }.to_string();
    assert_eq!(error, "bad free of 0x40: no allocated segment starts there");
    let error = ArenaError::WrongSize { start: 0x40, freed: 1, allocated: 16 }.to_string();
    assert_eq!(error, "bad free of 0x40: freed with the size 0x1, allocated with 0x10");
    assert_eq!(ArenaError::Overlap { start: 16 }.to_string(), "the span overlaps the one at 0x10");
}
