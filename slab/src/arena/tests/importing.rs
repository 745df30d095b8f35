//! Spans from a source, and back.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A parent of 64 KiB at 1 MiB with a child that imports `unit` at a time.
fn with_child(quantum: u64, unit: u64, test: impl FnOnce(&TestArena<'_>, &TestArena<'_>)) {
    with_caches(|caches| {
        let parent = TestArena::new(caches, "parent", 4096);
        parent.add(1 << 20, 64 << 10).unwrap();
        {
            let child = TestArena::with_source(caches, "child", quantum, &parent, unit);
            test(&parent, &child);
            assert_eq!(child.verify(), Ok(()));
        }
        assert_eq!(parent.verify(), Ok(()));
    });
}

#[test]
fn a_span_is_imported_when_nothing_fits_and_goes_back_when_it_is_free() {
    with_child(256, 8192, |parent, child| {
        assert_eq!(child.size_total(), 0);
        let (first, second) = (child.alloc(256).unwrap(), child.alloc(8192 - 256).unwrap());
        assert_eq!((first, second), (1 << 20, (1 << 20) + 256));
        assert_eq!((parent.size_in_use(), child.stats().imports), (8192, 1));
        assert_eq!(segments(child)[0], segment(1 << 20, 8192, SegmentKind::Imported));
        let third = child.alloc(256).unwrap();
        assert_eq!((parent.size_in_use(), child.stats().imports), (16384, 2));
        child.free(second, 8192 - 256).unwrap();
        assert_eq!(parent.size_in_use(), 16384, "a part of each is in use");
        child.free(first, 256).unwrap();
        assert_eq!((parent.size_in_use(), child.stats().returns), (8192, 1));
        child.free(third, 256).unwrap();
        assert_eq!((parent.size_in_use(), child.size_total(), child.stats().returns), (0, 0, 2));
    });
}

#[test]
fn a_span_that_was_added_stays() {
    with_child(256, 8192, |parent, child| {
        child.add(0, 512).unwrap();
        let start = child.alloc(512).unwrap();
        child.free(start, 512).unwrap();
        assert_eq!((start, child.size_total(), parent.size_in_use()), (0, 512, 0));
    });
}

#[test]
fn an_import_is_of_whole_units_or_of_what_the_parent_has() {
    with_child(256, 5000, |parent, child| {
        child.alloc(256).unwrap();
        assert_eq!(child.size_total(), 5120, "the unit is rounded up to the quantum");
        assert_eq!(parent.size_in_use(), 8192, "and by the parent to its own");
    });
    with_child(4096, 48 << 10, |parent, child| {
        child.alloc(4096).unwrap();
        let rest = child.alloc(44 << 10).unwrap();
        assert_eq!(child.alloc(16 << 10), Ok(rest + (44 << 10)), "less than a unit is left");
        assert_eq!(parent.size_free(), 0);
        assert_eq!(child.alloc(4096), Err(ArenaError::NoSpace));
        assert_eq!(child.stats().failures, 1);
    });
}

#[test]
fn an_import_is_large_enough_for_the_alignment() {
    with_child(4096, 4096, |parent, child| {
        parent.alloc(4096).unwrap();
        let aligned = Constraints { align: 16384, phase: 4096, ..Constraints::NONE };
        let start = child.alloc_with(8192, &aligned).unwrap();
        assert_eq!(start % 16384, 4096);
        child.free(start, 8192).unwrap();
        assert_eq!(parent.size_in_use(), 4096);
    });
}

#[test]
fn a_parent_with_a_smaller_quantum_lends_what_suits_the_child() {
    with_caches(|caches| {
        let parent = TestArena::new(caches, "parent", 16);
        parent.add(0x110, 0x4000).unwrap();
        let child = TestArena::with_source(caches, "child", 4096, &parent, 4096);
        assert_eq!((child.alloc(1), child.alloc(1)), (Ok(0x1000), Ok(0x2000)));
        assert_eq!(child.alloc(8192), Err(ArenaError::NoSpace));
    });
}

#[test]
fn bounds_never_make_it_import() {
    with_child(4096, 4096, |parent, child| {
        for bounds in [
            Constraints { min: 1, ..Constraints::NONE },
            Constraints { max: 1 << 30, ..Constraints::NONE },
            Constraints { nocross: 1 << 16, ..Constraints::NONE },
        ] {
            assert_eq!(child.alloc_with(4096, &bounds), Err(ArenaError::NoSpace));
        }
        assert_eq!(parent.stats().allocations, 0);
    });
}

#[test]
fn before_it_imports_it_looks_at_few_segments_and_before_it_fails_at_all() {
    with_caches(|caches| {
        let parent = TestArena::new(caches, "parent", 1);
        let child = TestArena::with_source(caches, "child", 1, &parent, 1);
        // Free segments of 4 and 5, all in one list; the ones of 5 are behind more of 4 than a short search looks at.
        (0..5).for_each(|index| child.add(1000 + 10 * index, 5).unwrap());
        (0..20).for_each(|index| child.add(10 * index, 4).unwrap());
        parent.add(1 << 20, 5).unwrap();
        let before = child.stats().searched;
        assert_eq!(child.alloc(5), Ok(1 << 20));
        assert!(child.stats().searched - before <= search::SHORT_LOOK as u64);
        assert!(child.alloc(5).unwrap() < 1 << 20, "the parent has nothing left");
    });
}

#[test]
fn spans_go_down_and_back_up_through_several_arenas() {
    with_caches(|caches| {
        let top = TestArena::new(caches, "top", 4096);
        top.add(0, 1 << 20).unwrap();
        let middle = TestArena::with_source(caches, "middle", 512, &top, 16384);
        let bottom = TestArena::with_source(caches, "bottom", 8, &middle, 1024);
        let starts: Vec<_> = (0..100).map(|_| bottom.alloc(40).unwrap()).collect();
        assert_eq!((bottom.size_in_use(), middle.size_in_use(), top.size_in_use()), (4000, 4096, 16384));
        for start in starts {
            bottom.free(start, 40).unwrap();
        }
        assert_eq!((bottom.size_total(), middle.size_total(), top.size_in_use()), (0, 0, 0));
        for arena in [&top, &middle, &bottom] {
            assert_eq!(arena.verify(), Ok(()));
        }
    });
}

#[test]
fn what_a_parent_did_not_lend_is_refused_and_counted() {
    with_child(4096, 4096, |parent, child| {
        let start = child.alloc(4096).unwrap();
        parent.free(start, 4096).unwrap();
        child.free(start, 4096).unwrap();
        assert_eq!(parent.stats().refused, 1);
    });
}

#[test]
fn dropping_an_arena_keeps_the_spans_that_are_in_use() {
    with_child(4096, 8192, |parent, child| {
        child.alloc(4096).unwrap();
        assert_eq!(parent.size_in_use(), 8192);
    });
}

/// Lends the same start every time, whatever is asked for.
struct Stubborn {
    start: u64,
    lent: Mutex<Vec<(u64, u64)>>,
}

impl Source for Stubborn {
    fn lend(&self, size: u64, _align: u64) -> Result<u64, ArenaError> {
        self.lent.lock().unwrap().push((self.start, size));
        Ok(self.start)
    }

    fn take_back(&self, start: u64, size: u64) {
        let mut lent = self.lent.lock().unwrap();
        let index = lent.iter().position(|span| *span == (start, size)).expect("was lent");
        lent.swap_remove(index);
    }
}

#[test]
fn a_bad_span_from_a_source_goes_back_at_once() {
    with_caches(|caches| {
        // Not of whole quanta, past the end, and over a span that there is.
        for start in [8, u64::MAX - 15, 0x1000, 0xff0] {
            let source = Stubborn { start, lent: Mutex::new(Vec::new()) };
            let arena = TestArena::with_source(caches, "test", 16, &source, 16);
            arena.add(0x1000, 16).unwrap();
            let before = segments(&arena);
            assert_eq!(arena.alloc(32), Err(ArenaError::BadImport { start, size: 32 }));
            assert_eq!((segments(&arena), arena.verify()), (before, Ok(())));
            assert!(source.lent.lock().unwrap().is_empty());
        }
    });
}

#[test]
fn a_span_that_there_are_no_tags_for_goes_back_at_once() {
    with_caches(|caches| {
        let source = Stubborn { start: 0, lent: Mutex::new(Vec::new()) };
        let arena = TestArena::with_source(caches, "test", 1, &source, 100);
        let taken: Vec<_> = core::iter::from_fn(|| caches.frames().allocate(crate::Order::ZERO)).collect();
        assert_eq!(arena.alloc(10), Err(ArenaError::NoMemory));
        assert!(source.lent.lock().unwrap().is_empty());
        // SAFETY: nobody has used them.
        taken.into_iter().for_each(|frame| unsafe { caches.frames().free(frame, crate::Order::ZERO) });
        assert_eq!(arena.alloc(10), Ok(0));
        assert_eq!(*source.lent.lock().unwrap(), [(0, 100)]);
    });
}

static HEAP: Heap = Heap::new();
static IMPORTING: TestArena<'static> = TestArena::with_source(HEAP.caches(), "static", 1, &Observer, 10);
static LENT: AtomicU64 = AtomicU64::new(0);

/// Looks whether the borrower's lock is free.
struct Observer;

impl Source for Observer {
    fn lend(&self, size: u64, _align: u64) -> Result<u64, ArenaError> {
        assert!(IMPORTING.state.try_lock().is_some(), "called under the lock");
        Ok(LENT.fetch_add(size, Ordering::Relaxed))
    }

    fn take_back(&self, _start: u64, size: u64) {
        assert!(IMPORTING.state.try_lock().is_some(), "called under the lock");
        LENT.fetch_sub(size, Ordering::Relaxed);
    }
}

#[test]
fn a_source_is_called_with_no_lock_held_and_arenas_may_be_statics() {
    let machine = Machine::new(START, 64);
    assert_eq!(IMPORTING.alloc(5), Err(ArenaError::NoMemory), "before there is memory");
    assert_eq!(LENT.load(Ordering::Relaxed), 0);
    // SAFETY: the memory is the test's, and stays as long as the program.
    unsafe { HEAP.init([machine.region()], machine.base()) }.unwrap();
    core::mem::forget(machine);
    let start = IMPORTING.alloc(5).unwrap();
    assert_eq!(LENT.load(Ordering::Relaxed), 10);
    IMPORTING.free(start, 5).unwrap();
    assert_eq!(LENT.load(Ordering::Relaxed), 0);
}

#[test]
fn threads_import_and_give_back_at_the_same_time() {
    let rounds = if cfg!(miri) { 15 } else { 2000 };
    with_child(16, 4096, |parent, child| {
        std::thread::scope(|scope| {
            for thread in 0..3 {
                scope.spawn(move || {
                    for round in 0..rounds {
                        let size = 16 * (1 + (round * 7 + thread) % 200);
                        let start = child.alloc(size).unwrap();
                        child.free(start, size).unwrap();
                    }
                });
            }
        });
        assert_eq!((child.size_total(), parent.size_in_use()), (0, 0));
        let stats = child.stats();
        assert!(stats.imports > 0 && stats.imports == stats.returns);
    });
}
