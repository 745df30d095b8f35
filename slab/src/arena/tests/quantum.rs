use super::*;
use crate::testing::{Machine, Threads, be_cpu};

/// Memory enough for magazines.
fn with_arena(test: impl FnOnce(&crate::Heap<Threads>, &Arena<'_, Threads>)) {
    let machine = Machine::new(64 << 20, 512);
    let heap: crate::Heap<Threads> = machine.heap_on();
    heap.shrink();
    let before = heap.frames().free_bytes();
    let arena = Arena::new(heap.caches(), "test", 4096).with_quantum_caches(4);
    arena.add(0, 4096 * 1000).unwrap();
    test(&heap, &arena);
    drop(arena);
    heap.shrink();
    assert_eq!(heap.frames().free_bytes(), before, "pages of tags and magazines have not come back");
}

#[test]
fn a_freed_quantum_comes_back_without_the_arena() {
    with_arena(|_, arena| {
        let first = arena.alloc(4096).unwrap();
        arena.free(first, 4096).unwrap();
        let before = arena.stats();
        for _ in 0..100 {
            assert_eq!(arena.alloc(4096), Ok(first));
            arena.free(first, 4096).unwrap();
        }
        let after = arena.stats();
        assert_eq!((after.allocations, after.frees), (before.allocations, before.frees));
        assert_eq!(arena.size_in_use(), 4096, "what is in a magazine counts as allocated");
        arena.reap();
        assert_eq!(arena.size_in_use(), 0);
        assert_eq!(arena.verify(), Ok(()));
    });
}

#[test]
fn sizes_do_not_mix_and_larger_ones_and_constraints_go_past_the_magazines() {
    with_arena(|_, arena| {
        let starts: Vec<_> = (1..=5).map(|quanta| arena.alloc(quanta * 4096).unwrap()).collect();
        for (start, quanta) in starts.iter().zip(1..) {
            arena.free(*start, quanta * 4096).unwrap();
        }
        assert_eq!(arena.size_in_use(), (1 + 2 + 3 + 4) * 4096, "five quanta are not cached");
        assert_eq!(arena.alloc(2 * 4096), Ok(starts[1]));
        let other = arena.alloc_with(4096, &Constraints { fit: Fit::Best, ..Constraints::NONE }).unwrap();
        assert_ne!(other, starts[0], "it is still in a magazine");
        arena.free(other, 4096).unwrap();
        arena.free(starts[1], 2 * 4096).unwrap();
    });
}

#[test]
fn what_magazines_have_is_found_before_an_allocation_fails() {
    with_arena(|_, arena| {
        let starts: Vec<_> = core::iter::from_fn(|| arena.alloc(4096).ok()).collect();
        assert_eq!(starts.len(), 1000);
        starts.iter().for_each(|start| arena.free(*start, 4096).unwrap());
        assert_eq!(arena.alloc(4096 * 1000), Ok(0), "all of it, merged again");
        arena.free(0, 4096 * 1000).unwrap();
    });
}

#[test]
fn a_wrong_free_shows_when_the_magazine_is_emptied() {
    with_arena(|_, arena| {
        let start = arena.alloc(4096).unwrap();
        arena.free(start, 4096).unwrap();
        arena.free(start, 4096).unwrap();
        arena.reap();
        assert_eq!(arena.stats().refused, 1);
        assert_eq!(arena.verify(), Ok(()));
    });
}

#[test]
fn other_cpus_magazines_are_emptied_when_the_arena_goes() {
    with_arena(|_, arena| {
        std::thread::scope(|scope| {
            for cpu in 1..3 {
                scope.spawn(move || {
                    be_cpu(cpu);
                    let starts: Vec<_> = (0..20).map(|_| arena.alloc(4096).unwrap()).collect();
                    starts.into_iter().for_each(|start| arena.free(start, 4096).unwrap());
                });
            }
        });
        assert!(arena.size_in_use() > 0);
    });
}
