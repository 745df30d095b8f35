//! Which segment an allocation takes, and at what cost.

use proptest::prelude::*;

use super::*;

/// An arena of `count` free fragments of `size` integers with as many allocated ones between them, and a free rest.
fn fragment(arena: &TestArena<'_>, count: u64, size: u64, rest: u64) {
    arena.add(0, 2 * count * size + rest).unwrap();
    for _ in 0..2 * count {
        arena.alloc(size).unwrap();
    }
    (0..count).for_each(|index| arena.free(2 * index * size, size).unwrap());
    assert_eq!(arena.stats().free_segments as u64, count + u64::from(rest > 0));
}

fn searched(arena: &TestArena<'_>, work: impl FnOnce()) -> u64 {
    let before = arena.stats().searched;
    work();
    arena.stats().searched - before
}

#[test]
fn instant_fit_looks_at_one_segment_however_many_there_are() {
    let count = if cfg!(miri) { 60 } else { 1000 };
    with_arena(1, |arena| {
        fragment(arena, count, 3, 1000);
        for size in [1, 2, 4, 5, 100] {
            let looked = searched(arena, || assert!(arena.alloc(size).is_ok()));
            assert_eq!(looked, 1, "size {size}");
        }
        let aligned = Constraints { align: 64, ..Constraints::NONE };
        assert_eq!(searched(arena, || assert!(arena.alloc_with(8, &aligned).unwrap().is_multiple_of(64))), 1);
    });
}

#[test]
fn freeing_looks_at_few_segments_however_many_there_are() {
    let count = if cfg!(miri) { 60 } else { 1500 };
    with_arena(1, |arena| {
        fragment(arena, count, 4096, 0);
        let state = arena.state.lock();
        let longest = (0..state.index.buckets()).map(|bucket| state.index.segments(&state.tags, bucket).count()).max();
        assert!(longest.unwrap() <= 8, "{longest:?} in one bucket");
        assert!(u64::from(state.index.buckets()) >= count);
    });
}

#[test]
fn instant_fit_fails_only_when_nothing_fits() {
    with_arena(1, |arena| {
        fragment(arena, 20, 3, 0);
        for _ in 0..20 {
            arena.alloc(3).unwrap();
        }
        assert_eq!(arena.alloc(3), Err(ArenaError::NoSpace));
        assert_eq!(arena.size_free(), 0);
    });
}

#[test]
fn best_fit_takes_the_smallest_that_fits() {
    with_arena(1, |arena| {
        // Free segments of 40, 33, 36 and 64 integers, with walls between them.
        for (start, size) in [(0, 40), (100, 33), (200, 36), (300, 64)] {
            arena.add(start, size).unwrap();
        }
        let best = Constraints { fit: Fit::Best, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(33, &best), Ok(100));
        assert_eq!(arena.alloc_with(33, &best), Ok(200));
        assert_eq!(arena.alloc_with(33, &best), Ok(0));
        assert_eq!(arena.alloc_with(33, &best), Ok(300));
        assert_eq!(arena.alloc_with(33, &best), Err(ArenaError::NoSpace));
        assert_eq!(arena.alloc_with(31, &best), Ok(333));
    });
}

#[test]
fn next_fit_uses_an_id_again_as_late_as_possible() {
    with_arena(1, |arena| {
        arena.add(1, 10).unwrap();
        let next = Constraints { fit: Fit::Next, ..Constraints::NONE };
        let alloc = || arena.alloc_with(1, &next);
        assert_eq!((alloc(), alloc(), alloc()), (Ok(1), Ok(2), Ok(3)));
        for id in [2, 3, 1] {
            arena.free(id, 1).unwrap();
            assert_eq!(arena.verify(), Ok(()));
        }
        for expected in (4..=10).chain(1..=3) {
            assert_eq!(alloc(), Ok(expected));
            assert_eq!(arena.verify(), Ok(()));
        }
        assert_eq!(alloc(), Err(ArenaError::NoSpace));
        arena.free(7, 1).unwrap();
        assert_eq!(alloc(), Ok(7));
        arena.free(7, 1).unwrap();
        arena.free(5, 1).unwrap();
        assert_eq!(alloc(), Ok(5), "7 was the last, so 8 and on come first, then from the lowest");
    });
}

#[test]
fn next_fit_looks_at_no_more_than_it_passes_over() {
    let count = if cfg!(miri) { 30 } else { 500 };
    with_arena(1, |arena| {
        arena.add(1, 2 * count).unwrap();
        let next = Constraints { fit: Fit::Next, ..Constraints::NONE };
        for _ in 0..count {
            let looked = searched(arena, || assert!(arena.alloc_with(1, &next).is_ok()));
            assert!(looked <= 3, "looked at {looked}");
        }
    });
}

#[test]
fn next_fit_goes_round_over_several_spans_and_other_allocations() {
    with_arena(1, |arena| {
        arena.add(10, 2).unwrap();
        arena.add(20, 2).unwrap();
        let next = Constraints { fit: Fit::Next, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(1, &next), Ok(10));
        assert_eq!(arena.alloc_with(2, &next), Ok(20));
        assert_eq!(arena.alloc_with(1, &next), Ok(11));
        arena.free(20, 2).unwrap();
        arena.add(15, 1).unwrap();
        assert_eq!(arena.alloc_with(1, &next), Ok(15));
        let second = Constraints { min: 21, ..next };
        assert_eq!(arena.alloc_with(1, &second), Ok(21));
        arena.free(10, 1).unwrap();
        assert_eq!(arena.alloc_with(1, &next), Ok(10));
        assert_eq!(arena.alloc_with(1, &next), Ok(20));
    });
}

#[test]
fn alignment_and_phase() {
    with_arena(16, |arena| {
        arena.add(0x110, 0x1000).unwrap();
        let request = Constraints { align: 0x100, phase: 0x20, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(0x10, &request), Ok(0x120));
        assert_eq!(arena.alloc_with(0x10, &request), Ok(0x220));
        let small = Constraints { align: 4, ..Constraints::NONE };
        assert!(arena.alloc_with(0x10, &small).unwrap().is_multiple_of(16), "less than the quantum is the quantum");
    });
    with_arena(1, |arena| {
        arena.add(1, u64::MAX).unwrap();
        let half = Constraints { align: 1 << 63, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(5, &half), Ok(1 << 63));
        assert_eq!(arena.alloc_with(5, &half), Err(ArenaError::NoSpace));
        let odd = Constraints { align: 1 << 63, phase: (1 << 63) - 1, ..Constraints::NONE };
        let mut both = [(); 2].map(|()| arena.alloc_with(1, &odd).unwrap());
        both.sort_unstable();
        assert_eq!(both, [(1 << 63) - 1, u64::MAX]);
        assert_eq!(arena.alloc_with(1, &odd), Err(ArenaError::NoSpace));
    });
}

#[test]
fn bounds_and_boundaries() {
    with_arena(1, |arena| {
        arena.add(0, 1000).unwrap();
        let within = Constraints { min: 500, max: 509, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(11, &within), Err(ArenaError::NoSpace));
        assert_eq!(arena.alloc_with(10, &within), Ok(500));
        assert_eq!(arena.alloc_with(1, &within), Err(ArenaError::NoSpace));
    });
    with_arena(1, |arena| {
        arena.add(0, 1000).unwrap();
        let isa_dma = Constraints { nocross: 64, min: 60, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(4, &isa_dma), Ok(60));
        assert_eq!(arena.alloc_with(64, &isa_dma), Ok(64));
        arena.free(60, 4).unwrap();
        arena.free(64, 64).unwrap();
        assert_eq!(arena.alloc_with(5, &isa_dma), Ok(64), "from 60 on it would cross 64");
    });
}

#[test]
fn constraints_that_nothing_could_meet_are_refused() {
    with_arena(16, |arena| {
        arena.add(0, 1 << 20).unwrap();
        let none = Constraints::NONE;
        for bad in [
            Constraints { align: 0, ..none },
            Constraints { align: 48, ..none },
            Constraints { align: 64, phase: 64, ..none },
            Constraints { align: 64, phase: 8, ..none },
            Constraints { phase: 16, ..none },
            Constraints { nocross: 48, ..none },
            Constraints { nocross: 16, ..none },
            Constraints { align: 64, phase: 48, nocross: 64, ..none },
            Constraints { align: 128, phase: 112, nocross: 64, ..none },
            Constraints { min: 5, max: 4, ..none },
        ] {
            assert_eq!(arena.alloc_with(32, &bad), Err(ArenaError::BadConstraints), "{bad:?}");
        }
        assert_eq!(arena.stats().allocations, 0);
        assert_eq!(Constraints::default(), none);
    });
}

/// The first place by trying every one.
fn first_place(size: u64, constraints: &Constraints, quantum: u64, first: u64, last: u64, floor: u64) -> Option<u64> {
    (first..=last).find(|start| {
        let end = start + size - 1;
        let align = constraints.align.max(quantum);
        let crosses = (start + 1..=end).any(|x| constraints.nocross != 0 && x % constraints.nocross == 0);
        let inside = *start >= constraints.min.max(floor) && end <= last.min(constraints.max);
        inside && start % align == constraints.phase && !crosses
    })
}

proptest! {
    #![proptest_config(crate::testing::cases(20_000, 10))]

    #[test]
    fn the_first_place_is_the_one_that_trying_finds(
        (quantum, size, align) in (0u32..3, 1u64..10, 0u32..6).prop_map(|(q, s, a)| (1u64 << q, s << q, 1u64 << a)),
        phase in 0u64..32,
        nocross in prop_oneof![Just(0u64), (0u32..8).prop_map(|log| 1 << log)],
        (min, max, floor) in (0u64..100, prop_oneof![Just(u64::MAX), 0u64..200], 0u64..100),
        (first, length) in (0u64..20, 1u64..30),
    ) {
        let constraints = Constraints { align, phase, nocross, min, max, ..Constraints::NONE };
        let (first, last) = (first * quantum, (first + length) * quantum - 1);
        match Request::new(size, quantum, &constraints) {
            Ok(request) => {
                let expected = first_place(size, &constraints, quantum, first, last, floor);
                prop_assert_eq!(request.place(first, last, floor), expected);
            }
            Err(error) => {
                prop_assert_eq!(error, ArenaError::BadConstraints);
                let anywhere = Constraints { min: 0, max: u64::MAX, ..constraints };
                let never = first_place(size, &anywhere, quantum, 0, 255, 0).is_none();
                prop_assert!(never || min > max || phase % quantum != 0, "{:?}", constraints);
            }
        }
    }
}
