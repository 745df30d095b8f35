//! Typed caches: objects that stay constructed while they are free.
//!
//! *Caches with constructors, objects kept constructed across free and allocate, per-CPU magazines, reclaim*: the second.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kslab::{AllocError, InitFailed, Object};

use super::support::{frames, give_back, layout, take_free, unchanged};
use crate::guest::runner::test;

type ObjectCache<T> = kslab::ObjectCache<'static, T, Cpus>;

/// What has been done to [`Session`]s.
#[derive(Debug)]
struct Lives {
    init: AtomicUsize,
    renew: AtomicUsize,
    recycle: AtomicUsize,
    dropped: AtomicUsize,
}

static LIVES: Lives = Lives {
    init: AtomicUsize::new(0),
    renew: AtomicUsize::new(0),
    recycle: AtomicUsize::new(0),
    dropped: AtomicUsize::new(0),
};

impl Lives {
    /// Since the last call: init, renew, recycle, drop.
    fn take(&self) -> [usize; 4] {
        [&self.init, &self.renew, &self.recycle, &self.dropped].map(|count| count.swap(0, Relaxed))
    }
}

/// Counts what is done to it, and owns memory of the heap while it is constructed.
struct Session {
    buffer: Box<[u8; 200]>,
    uses: usize,
    length: usize,
}

impl Object for Session {
    fn init() -> Result<Self, InitFailed> {
        LIVES.init.fetch_add(1, Relaxed);
        Ok(Self { buffer: Box::new([0; 200]), uses: 0, length: 0 })
    }

    fn renew(&mut self) {
        LIVES.renew.fetch_add(1, Relaxed);
        self.uses += 1;
    }

    fn recycle(&mut self) {
        LIVES.recycle.fetch_add(1, Relaxed);
        self.length = 0;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        LIVES.dropped.fetch_add(1, Relaxed);
    }
}

fn sessions() -> ObjectCache<Session> {
    ObjectCache::new(HEAP.caches(), "session")
}

test!(constructed_state_survives_free_and_allocate);
fn constructed_state_survives_free_and_allocate() {
    unchanged(|| {
        LIVES.take();
        let cache = sessions();
        for turn in 0..10 {
            let mut held: Vec<_> = (0..50).map(|_| cache.allocate().expect("memory")).collect();
            assert!(held.iter().all(|session| session.uses == turn + 1 && session.length == 0), "turn {turn}");
            assert!(held.iter().all(|session| session.buffer[7] == turn as u8), "turn {turn}");
            for session in &mut held {
                session.buffer.fill(turn as u8 + 1);
                session.length = 200;
            }
        }
        assert_eq!(LIVES.take(), [50, 500, 500, 0]);
    });
}

test!(every_object_that_was_constructed_is_dropped_once_when_its_memory_goes);
fn every_object_that_was_constructed_is_dropped_once_when_its_memory_goes() {
    unchanged(|| {
        LIVES.take();
        let cache = sessions();
        let mut held: Vec<_> = (0..300).map(|_| cache.allocate().expect("memory")).collect();
        held.truncate(1);
        cache.shrink();
        let [init, _, _, dropped] = LIVES.take();
        let slab = cache.stats().expect("counts").objects_per_slab;
        assert_eq!(init, 300);
        assert!((300 - slab..300).contains(&dropped), "all but those in the slab of the one in use: {dropped}");
        drop(held);
        cache.shrink();
        assert_eq!(LIVES.take(), [0, 0, 1, 300 - dropped]);
    });
}

test!(a_destroyed_cache_drops_its_objects);
fn a_destroyed_cache_drops_its_objects() {
    unchanged(|| {
        LIVES.take();
        let cache = sessions();
        drop([(); 3].map(|()| cache.allocate().expect("memory")));
        assert_eq!(LIVES.take(), [3, 3, 3, 0]);
        cache.destroy().expect("no object is alive");
        assert_eq!(LIVES.take(), [0, 0, 0, 3]);
    });
}

test!(row_71_a_constructor_that_fails_is_an_error_and_its_slot_is_free);
fn row_71_a_constructor_that_fails_is_an_error_and_its_slot_is_free() {
    static LEFT: AtomicUsize = AtomicUsize::new(0);

    struct Rare([u64; 20]);

    impl Object for Rare {
        fn init() -> Result<Self, InitFailed> {
            let left = LEFT.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
            left.map(|left| Self([left as u64; 20])).map_err(|_| InitFailed)
        }
    }

    unchanged(|| {
        let cache: ObjectCache<Rare> = ObjectCache::new(HEAP.caches(), "rare");
        LEFT.store(4, Relaxed);
        let held: Vec<_> = core::iter::from_fn(|| cache.allocate().ok()).collect();
        assert_eq!(held.len(), 4);
        for _ in 0..100 {
            assert_eq!(cache.allocate().err(), Some(AllocError::ConstructorFailed));
        }
        let stats = cache.stats().expect("counts");
        assert_eq!((stats.in_use, stats.slabs, stats.failures), (4, 1, 101));
        LEFT.store(1, Relaxed);
        assert_eq!(cache.allocate().expect("a slot").0, [1; 20]);
        assert!(held.iter().zip((1..=4).rev()).all(|(rare, left)| rare.0 == [left; 20]));
    });
}

test!(row_72_a_constructor_allocates_from_its_own_cache);
fn row_72_a_constructor_allocates_from_its_own_cache() {
    static CACHE: ObjectCache<Nested> = ObjectCache::new(HEAP.caches(), "nested");
    static DEPTH: AtomicUsize = AtomicUsize::new(0);
    static DEEPEST: AtomicUsize = AtomicUsize::new(0);

    struct Nested(usize);

    impl Object for Nested {
        fn init() -> Result<Self, InitFailed> {
            let depth = DEPTH.fetch_add(1, Relaxed);
            DEEPEST.fetch_max(depth, Relaxed);
            let below = if depth < 5 { CACHE.allocate().map_err(|_| InitFailed)?.0 } else { 0 };
            DEPTH.fetch_sub(1, Relaxed);
            Ok(Self(below + 1))
        }
    }

    drop(CACHE.allocate());
    CACHE.shrink();
    unchanged(|| {
        assert_eq!(CACHE.allocate().expect("memory").0, 6);
        assert_eq!(DEEPEST.load(Relaxed), 5);
        CACHE.shrink();
    });
}

test!(a_destructor_allocates_and_frees);
fn a_destructor_allocates_and_frees() {
    struct Logs;

    impl Object for Logs {
        fn init() -> Result<Self, InitFailed> {
            Ok(Self)
        }
    }

    impl Drop for Logs {
        fn drop(&mut self) {
            drop(core::hint::black_box(alloc::vec![1_u8; 3000]));
        }
    }

    struct Padded(Logs, [u64; 10]);

    impl Object for Padded {
        fn init() -> Result<Self, InitFailed> {
            Ok(Self(Logs::init()?, [3; 10]))
        }
    }

    unchanged(|| {
        let cache: ObjectCache<Padded> = ObjectCache::new(HEAP.caches(), "logs");
        let held: Vec<_> = (0..200).map(|_| cache.allocate().expect("memory")).collect();
        assert!(held.iter().all(|padded| padded.1 == [3; 10] && size_of_val(&padded.0) == 0));
        drop(held);
        cache.shrink();
        assert_eq!(cache.stats().expect("counts").slabs, 0);
    });
}

test!(a_box_returns_its_object_and_one_that_was_let_go_does_not);
fn a_box_returns_its_object_and_one_that_was_let_go_does_not() {
    unchanged(|| {
        let cache = sessions();
        let in_use = || cache.stats().expect("counts").in_use;
        let session = cache.allocate().expect("memory");
        assert_eq!(in_use(), 1);
        let raw = session.into_raw();
        assert_eq!(in_use(), 1);
        // SAFETY: let go above, and only once.
        let session = unsafe { cache.from_raw(raw) };
        assert_eq!(session.uses, 1, "it has not been allocated again");
        drop(session);
        assert_eq!(in_use(), 0);
    });
}

test!(constructed_objects_are_given_up_for_other_memory);
fn constructed_objects_are_given_up_for_other_memory() {
    unchanged(|| {
        LIVES.take();
        let cache = sessions();
        drop((0..100).map(|_| cache.allocate().expect("memory")).collect::<Vec<_>>());
        let all = take_free();
        assert_eq!(LIVES.take(), [100, 100, 100, 0]);
        let free = frames().stats().free;
        let page = HEAP.allocate(layout(4096, 4096)).expect("what the free objects have");
        assert_eq!(LIVES.take(), [0, 0, 0, 100]);
        assert!(frames().stats().free > free);
        // SAFETY: just allocated, and not used.
        unsafe { HEAP.free(page, layout(4096, 4096)) };
        give_back(all);
    });
}
