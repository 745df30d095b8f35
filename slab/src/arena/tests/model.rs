//! Arenas against a model that tries every place.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const QUANTUM: u64 = 4;

/// Integers in the model's world.
const WORLD: u64 = 512;

/// Spans, and allocated segments, by start.
#[derive(Debug, Default)]
struct Model {
    spans: BTreeMap<u64, u64>,
    allocated: BTreeMap<u64, u64>,
    floor: u64,
}

impl Model {
    /// The maximal free ranges, start and end.
    fn gaps(&self) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        for (start, size) in &self.spans {
            let mut from = *start;
            for (start, size) in self.allocated.range(start..&(start + size)) {
                gaps.push((from, *start));
                from = start + size;
            }
            gaps.push((from, start + size));
        }
        gaps.retain(|(start, end)| start < end);
        gaps
    }

    /// Every place where `size` integers could go, with the size of the gap.
    fn places(&self, size: u64, constraints: &Constraints) -> Vec<(u64, u64)> {
        let fits = |start: &u64, end: u64| {
            let crosses = (*start + 1..start + size).any(|x| constraints.nocross != 0 && x % constraints.nocross == 0);
            let bounded = *start >= constraints.min && start + size - 1 <= constraints.max;
            start + size <= end && start % constraints.align.max(QUANTUM) == constraints.phase && bounded && !crosses
        };
        let places = self.gaps().into_iter().map(|(first, end)| {
            let starts = (first..end).step_by(QUANTUM as usize).filter(move |start| fits(start, end));
            starts.map(move |start| (start, end - first))
        });
        places.flatten().collect()
    }

    /// Whether `start` is what the arena may say; takes it over.
    fn allocated(&mut self, size: u64, constraints: &Constraints, start: u64) {
        let places = self.places(size, constraints);
        let place = places.iter().find(|place| place.0 == start);
        let (_, gap) = place.unwrap_or_else(|| panic!("{start} is no place for {size} with {constraints:?}"));
        match constraints.fit {
            Fit::Instant => {}
            Fit::Best => assert_eq!(Some(gap), places.iter().map(|(_, gap)| gap).min()),
            Fit::Next => {
                let behind = places.iter().find(|place| place.0 >= self.floor);
                assert_eq!(behind.or(places.first()).map(|place| place.0), Some(start), "floor {}", self.floor);
                self.floor = start + size;
            }
        }
        self.allocated.insert(start, size);
    }

    fn overlaps(&self, start: u64, size: u64) -> bool {
        self.spans.iter().any(|(other, length)| start < other + length && *other < start + size)
    }

    /// What a walk must see.
    fn segments(&self) -> Vec<Segment> {
        let spans = self.spans.iter().map(|(start, size)| segment(*start, *size, SegmentKind::Span));
        let free = self.gaps().into_iter().map(|(start, end)| segment(start, end - start, SegmentKind::Free));
        let allocated = self.allocated.iter().map(|(start, size)| segment(*start, *size, SegmentKind::Allocated));
        let mut all: Vec<_> = spans.chain(free).chain(allocated).collect();
        all.sort_by_key(|segment| (segment.start, segment.kind != SegmentKind::Span));
        all
    }
}

#[derive(Debug, Clone)]
enum Step {
    Add { start: u64, size: u64 },
    Alloc { size: u64, constraints: Constraints },
    Free { which: prop::sample::Index },
    FreeWrong { start: u64, size: u64 },
}

fn constraints() -> impl Strategy<Value = Constraints> {
    let fit = prop_oneof![Just(Fit::Instant), Just(Fit::Best), Just(Fit::Next)];
    let align = prop_oneof![3 => Just((1, 0)), 1 => (0u32..7, 0u64..8).prop_map(|(log, phase)| {
        let align = 1 << log;
        (align, (phase * QUANTUM) % align.max(QUANTUM))
    })];
    let nocross = prop_oneof![3 => Just(0), 1 => (3u32..7).prop_map(|log| 1 << log)];
    let bounds = prop_oneof![3 => Just((0, u64::MAX)), 1 => (0..WORLD / 2, WORLD / 2..WORLD)];
    (fit, align, nocross, bounds).prop_map(|(fit, (align, phase), nocross, (min, max))| Constraints {
        align,
        phase,
        nocross,
        min,
        max,
        fit,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let quanta = |most| (1..=most).prop_map(|quanta: u64| quanta * QUANTUM);
    prop_oneof![
        1 => (0..WORLD / QUANTUM, quanta(40u64)).prop_map(|(start, size)| Step::Add { start: start * QUANTUM, size }),
        3 => quanta(12u64).prop_map(|size| Step::Alloc { size, constraints: Constraints::NONE }),
        4 => (quanta(8u64), constraints()).prop_map(|(size, constraints)| Step::Alloc { size, constraints }),
        5 => any::<prop::sample::Index>().prop_map(|which| Step::Free { which }),
        1 => (0..WORLD, 1..40u64).prop_map(|(start, size)| Step::FreeWrong { start, size }),
    ]
}

fn take(arena: &TestArena<'_>, model: &mut Model, step: Step) {
    match step {
        Step::Add { start, size } => match arena.add(start, size) {
            Ok(()) => {
                assert!(!model.overlaps(start, size));
                model.spans.insert(start, size);
            }
            Err(error) => {
                assert!(
                    matches!(error, ArenaError::Overlap { start } if model.spans.contains_key(&start)),
                    "{error:?}"
                );
                assert!(model.overlaps(start, size));
            }
        },
        Step::Alloc { size, constraints } => match arena.alloc_with(size, &constraints) {
            Ok(start) => model.allocated(size, &constraints, start),
            Err(ArenaError::NoSpace | ArenaError::BadConstraints) => {
                assert_eq!(model.places(size, &constraints), [], "{size} with {constraints:?}");
            }
            Err(error) => panic!("{error:?}"),
        },
        Step::Free { which } => {
            let Some(start) = pick(&model.allocated, which) else { return };
            let size = model.allocated.remove(&start).unwrap();
            assert_eq!(arena.free(start, size), Ok(()));
        }
        Step::FreeWrong { start, size } => {
            let rounded = size.next_multiple_of(QUANTUM);
            let expected = match model.allocated.get(&start) {
                Some(allocated) if *allocated == rounded => return,
                Some(allocated) => ArenaError::WrongSize { start, freed: rounded, allocated: *allocated },
                None => ArenaError::NotAllocated { start },
            };
            assert_eq!(arena.free(start, size), Err(expected));
        }
    }
}

fn pick(allocated: &BTreeMap<u64, u64>, which: prop::sample::Index) -> Option<u64> {
    (!allocated.is_empty()).then(|| *allocated.keys().nth(which.index(allocated.len())).unwrap())
}

proptest! {
    #![proptest_config(crate::testing::cases(400, 2))]

    #[test]
    fn an_arena_does_what_the_model_does(steps in prop::collection::vec(step(), 1..if cfg!(miri) { 25 } else { 150 })) {
        with_arena(QUANTUM, |arena| {
            let mut model = Model::default();
            arena.add(64, 256).unwrap();
            model.spans.insert(64, 256);
            for step in steps {
                take(arena, &mut model, step);
                assert_eq!(arena.verify(), Ok(()));
                let stats = arena.stats();
                assert_eq!(stats.in_use, model.allocated.values().sum());
                assert_eq!(stats.largest_free, model.gaps().iter().map(|(start, end)| end - start).max().unwrap_or(0));
            }
            assert_eq!(segments(arena), model.segments());
        });
    }

    #[test]
    fn what_children_import_is_what_the_parent_has_lent(
        unit in 1u64..100,
        steps in prop::collection::vec(
            (any::<bool>(), prop::bool::weighted(0.6), 1u64..60, 0u32..6, any::<prop::sample::Index>()),
            1..if cfg!(miri) { 12 } else { 150 },
        ),
    ) {
        with_caches(|caches| {
            let parent = TestArena::new(caches, "parent", 16);
            parent.add(0x100, 0x800).unwrap();
            let children = [4, 1].map(|quantum| TestArena::with_source(caches, "child", quantum, &parent, unit));
            let mut allocated = [BTreeMap::new(), BTreeMap::new()];
            for (child, allocates, size, align, which) in steps {
                let (arena, allocated) = (&children[usize::from(child)], &mut allocated[usize::from(child)]);
                if allocates {
                    let aligned = Constraints { align: 1 << align, ..Constraints::NONE };
                    match arena.alloc_with(size, &aligned) {
                        Ok(start) => {
                            assert!(start.is_multiple_of(1 << align));
                            assert_eq!(allocated.insert(start, size), None);
                        }
                        Err(error) => assert_eq!(error, ArenaError::NoSpace),
                    }
                } else if let Some(start) = pick(allocated, which) {
                    assert_eq!(arena.free(start, allocated.remove(&start).unwrap()), Ok(()));
                }
                check_family(&parent, &children, allocated);
            }
            for (child, allocated) in children.iter().zip(allocated) {
                allocated.into_iter().for_each(|(start, size)| child.free(start, size).unwrap());
            }
            assert_eq!((parent.size_in_use(), parent.stats().refused), (0, 0));
        });
    }
}

/// What a child has is what the parent lent, in whole quanta of the parent, and no two have the same.
fn check_family(parent: &TestArena<'_>, children: &[TestArena<'_>; 2], allocated: &BTreeMap<u64, u64>) {
    let spans = children.iter().flat_map(|child| {
        assert_eq!(child.verify(), Ok(()));
        segments(child).into_iter().filter(|segment| segment.kind == SegmentKind::Imported)
    });
    let mut spans: Vec<_> = spans.map(|span| (span.start, span.size.next_multiple_of(16))).collect();
    spans.sort_unstable();
    let lent = segments(parent).into_iter().filter(|segment| segment.kind == SegmentKind::Allocated);
    assert_eq!(lent.map(|segment| (segment.start, segment.size)).collect::<Vec<_>>(), spans);
    assert_eq!(parent.verify(), Ok(()));
    let disjoint = allocated.iter().zip(allocated.iter().skip(1)).all(|(one, next)| one.0 + one.1 <= *next.0);
    assert!(disjoint);
}
