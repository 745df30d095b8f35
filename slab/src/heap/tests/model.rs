//! Any sequence of requests, against a list of what is live.

use std::collections::BTreeMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Allocate { size: usize, align: usize, zeroed: bool },
    Free { which: usize },
    Reallocate { which: usize, size: usize },
    Shrink,
    Maintain { later: u64 },
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0..300_usize, 2 => 300..2100_usize, 2 => 2100..8300_usize, 1 => 8300..30_000_usize]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let align = (0..14_u32).prop_map(|log| 1 << log);
    let step = prop_oneof![
        8 => (size(), align, any::<bool>()).prop_map(|(size, align, zeroed)| Step::Allocate { size, align, zeroed }),
        6 => any::<usize>().prop_map(|which| Step::Free { which }),
        4 => (any::<usize>(), size()).prop_map(|(which, size)| Step::Reallocate { which, size }),
        1 => Just(Step::Shrink),
        1 => (0..20_000_u64).prop_map(|later| Step::Maintain { later }),
    ];
    prop::collection::vec(step, 1..if cfg!(miri) { 25 } else { 250 })
}

/// A live block, its layout, and the byte that fills it.
type Live = Vec<(NonNull<u8>, Layout, u8)>;

fn apply<P: Platform>(heap: &super::super::Heap<P>, live: &mut Live, step: Step, byte: u8, now: &mut u64) {
    match step {
        Step::Allocate { size, align, zeroed } => {
            let wanted = layout(size, align);
            let block = if zeroed { heap.allocate_zeroed(wanted) } else { heap.allocate(wanted) };
            let Some(block) = block else { return };
            assert!(is_aligned(block, align));
            assert!(!zeroed || holds(block, size, 0));
            fill(block, size, byte);
            live.push((block, wanted, byte));
        }
        Step::Free { which } if !live.is_empty() => {
            let (block, wanted, byte) = live.swap_remove(which % live.len());
            assert!(holds(block, wanted.size(), byte));
            AnyHeap::free(heap, block, wanted);
        }
        Step::Reallocate { which, size } if !live.is_empty() => {
            let index = which % live.len();
            let (block, old, written) = live[index];
            let Some(block) = AnyHeap::reallocate(heap, block, old, size) else { return };
            assert!(holds(block, size.min(old.size()), written));
            assert!(is_aligned(block, old.align()));
            fill(block, size, byte);
            live[index] = (block, layout(size, old.align()), byte);
        }
        Step::Shrink => _ = heap.shrink(),
        Step::Maintain { later } => {
            *now += later;
            heap.maintain(*now);
        }
        _ => {}
    }
}

fn run<P: Platform>(heap: &super::super::Heap<P>, steps: Vec<Step>) {
    let before = heap.settled();
    let (mut live, mut now) = (Live::new(), 0);
    for (number, step) in steps.into_iter().enumerate() {
        apply(heap, &mut live, step, number as u8, &mut now);
        // Looking at everything takes minutes under Miri.
        if !cfg!(miri) || number % 16 == 15 {
            assert_eq!(heap.verify(), Ok(()));
        }
    }
    let mut visited = BTreeMap::new();
    heap.for_each_block(|block, size| _ = visited.insert(block, size));
    assert_eq!(visited.len(), live.len());
    for (block, wanted, byte) in live {
        assert!(visited[&block] >= wanted.size(), "at least, since it may be lent");
        assert!(holds(block, wanted.size(), byte));
        AnyHeap::free(heap, block, wanted);
    }
    assert_eq!(heap.settled(), before);
}

proptest! {
    #![proptest_config(crate::testing::cases(100, 1))]

    #[test]
    fn any_sequence_keeps_every_block_as_it_was_written(steps in steps()) {
        let machine = Machine::new(START, 100);
        run(&machine.heap(), steps);
    }

    #[test]
    fn any_sequence_does_with_magazines_too(steps in steps()) {
        let machine = Machine::new(START, 300);
        run(&machine.heap_on::<Threads>(), steps);
    }
}
