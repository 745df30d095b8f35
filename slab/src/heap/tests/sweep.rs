//! Out of memory at every page frame: each script runs once for each of its requests for frames, which then fails.
//!
//! A script copes with failure as a kernel must, checks what it has, and frees it. Afterwards as much is free as before.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::vec::Vec;

use super::*;
use crate::{AllocError, Cache, FaultMode, InitFailed, Object, ObjectCache};

/// What a script has allocated, and how often it was refused.
struct Script<'a, P: Platform> {
    heap: &'a crate::Heap<P>,
    live: Vec<(NonNull<u8>, Layout, u8)>,
    refused: usize,
}

impl<P: Platform> Script<'_, P> {
    fn allocate(&mut self, size: usize) {
        let (wanted, byte) = (layout(size, 8), size as u8);
        match self.heap.allocate(wanted) {
            Some(block) => {
                fill(block, size, byte);
                self.live.push((block, wanted, byte));
            }
            None => self.refused += 1,
        }
    }

    /// Changes the size of the last block.
    fn reallocate(&mut self, size: usize) {
        let Some((block, old, byte)) = self.live.pop() else { return };
        let kept = match AnyHeap::reallocate(self.heap, block, old, size) {
            Some(block) => {
                assert!(holds(block, old.size().min(size), byte));
                fill(block, size, byte);
                (block, layout(size, 8), byte)
            }
            None => {
                self.refused += 1;
                (block, old, byte)
            }
        };
        self.live.push(kept);
    }

    /// Frees all but the first `keep`.
    fn free(&mut self, keep: usize) {
        for (block, wanted, byte) in self.live.drain(keep.min(self.live.len())..) {
            assert!(holds(block, wanted.size(), byte), "{wanted:?}");
            AnyHeap::free(self.heap, block, wanted);
        }
    }

    /// The object, or a mark that there is none.
    fn keep<T>(&mut self, object: Result<T, AllocError>) -> Option<T> {
        self.refused += usize::from(object.is_err());
        object.ok()
    }
}

fn boxes_and_vectors<P: Platform>(script: &mut Script<'_, P>) {
    for round in 1..if cfg!(miri) { 12 } else { 60 } {
        script.allocate(round * 7 % 64 + 1);
        script.allocate(round * 577);
        script.reallocate(round * 600 + 3000);
        if round % 10 == 0 {
            script.free(round);
        }
    }
}

fn chains_of_reallocation<P: Platform>(script: &mut Script<'_, P>) {
    for start in [1, 100, 3000] {
        script.allocate(start);
        (0..12).for_each(|doubled| script.reallocate(start << doubled.min(15 - start.ilog2())));
        (0..12).rev().for_each(|doubled| script.reallocate((start << doubled.min(15 - start.ilog2())) - start / 2));
    }
}

fn magazines_that_fill_and_drain<P: Platform>(script: &mut Script<'_, P>) {
    for rounds in [70, 10, 40, 90].map(|rounds| if cfg!(miri) { rounds / 2 } else { rounds }) {
        for size in [64, 200, 1500] {
            (0..rounds).for_each(|_| script.allocate(size));
            script.free(rounds / 4);
        }
    }
}

/// Objects that are constructed in the cache; some of them more than once.
struct Request([u64; 100]);

static CONSTRUCTED: AtomicUsize = AtomicUsize::new(0);

impl Object for Request {
    fn init() -> Result<Self, InitFailed> {
        CONSTRUCTED.fetch_add(1, Ordering::Relaxed);
        Ok(Self([7; 100]))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        assert_eq!(self.0, [7; 100]);
        CONSTRUCTED.fetch_sub(1, Ordering::Relaxed);
    }
}

fn constructed_objects<P: Platform>(script: &mut Script<'_, P>) {
    let requests: ObjectCache<'_, Request, P> = ObjectCache::new(script.heap.caches(), "request");
    for rounds in [5, 40, 20] {
        let objects: Vec<_> = (0..rounds).filter_map(|_| script.keep(requests.allocate())).collect();
        assert!(objects.iter().all(|object| object.0[99] == 7));
    }
    assert!(requests.destroy().is_ok());
}

fn bulk_and_reserve<P: Platform>(script: &mut Script<'_, P>) {
    let cache = Cache::new(script.heap.caches(), "bulk", layout(700, 8));
    let mut objects = [ptr::null_mut(); 40];
    let allocated = cache.allocate_bulk(&mut objects);
    script.refused += usize::from(allocated < objects.len());
    if let Some(reserve) = script.keep(cache.reserve(30)) {
        assert_eq!(reserve.available(), 30);
        if let Some(object) = script.keep(reserve.allocate()) {
            // SAFETY: allocated from this reserve, and never used.
            unsafe { reserve.free(object) };
        }
    }
    let objects: Vec<_> = objects[..allocated].iter().copied().filter_map(NonNull::new).collect();
    assert_eq!(objects.len(), allocated);
    // SAFETY: allocated above, and never used.
    unsafe { cache.free_bulk(&objects) };
    assert!(cache.destroy().is_ok());
}

/// Fails each request for frames of a script in turn.
fn sweep<P: Platform>(heap: &crate::Heap<P>, script: fn(&mut Script<'_, P>)) {
    let injector = heap.frames().injector();
    let before = heap.settled();
    // How often the script was told, and how often it has asked for frames.
    let run = |mode| {
        let mut run = Script { heap, live: Vec::new(), refused: 0 };
        let first = injector.seen();
        injector.set(mode);
        script(&mut run);
        injector.set(FaultMode::Never);
        let requests = injector.seen() - first;
        run.free(0);
        assert_eq!(heap.verify(), Ok(()), "{mode:?}");
        assert_eq!(heap.settled(), before, "{mode:?}");
        (run.refused, requests)
    };
    let (refused, requests) = run(FaultMode::Never);
    assert_eq!(refused, 0);
    assert!(requests >= 3, "{requests}");
    let step = if cfg!(miri) { requests.div_ceil(6) } else { 1 };
    let (mut failed, mut reached) = (0, 0);
    for request in (1..=requests).step_by(step as usize) {
        let refused = injector.refused();
        let (told, asked) = run(FaultMode::Nth(request));
        // How large magazines are depends on what there was before, so a run may ask less often.
        assert_eq!(injector.refused(), refused + u64::from(asked >= request), "request {request} of {requests}");
        failed += told;
        reached += u64::from(asked >= request);
    }
    assert!(reached * step >= requests - requests / 4, "{reached} of {requests}");
    assert!(failed > 0, "some of it is felt");
    assert!(run(FaultMode::OneIn { requests: 3, seed: 1 }).0 > 0);
    assert!(run(FaultMode::EveryNth(1)).0 > 0, "no frames at all");
    assert_eq!(run(FaultMode::Never).0, 0, "and now there are");
}

fn sweep_both(without: fn(&mut Script<'_, crate::platform::NoInterrupts>), with: fn(&mut Script<'_, Threads>)) {
    let machine = Machine::new(START, 2 * FRAMES);
    sweep(&machine.heap(), without);
    let machine = Machine::new(START, 2 * FRAMES);
    sweep(&machine.heap_on::<Threads>(), with);
}

#[test]
fn row_63_boxes_and_vectors() {
    sweep_both(boxes_and_vectors, boxes_and_vectors);
}

#[test]
fn row_63_chains_of_reallocation() {
    sweep_both(chains_of_reallocation, chains_of_reallocation);
}

#[test]
fn row_64_constructed_objects_in_slabs_with_their_headers_elsewhere() {
    sweep_both(constructed_objects, constructed_objects);
    assert_eq!(CONSTRUCTED.load(Ordering::Relaxed), 0, "each was destroyed as often as constructed");
}

#[test]
fn row_65_magazines_that_fill_and_drain() {
    sweep_both(magazines_that_fill_and_drain, magazines_that_fill_and_drain);
}

#[test]
fn row_66_caches_that_are_made_and_destroyed_bulk_and_reserve() {
    sweep_both(bulk_and_reserve, bulk_and_reserve);
}

#[test]
fn row_66_without_memory_a_cache_is_not_made_and_later_is() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let before = heap.used();
    let cache = Cache::new(heap.caches(), "inode", layout(64, 8));
    heap.frames().injector().set(FaultMode::EveryNth(1));
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    assert_eq!(cache.injector().err(), Some(AllocError::NoMemory));
    assert_eq!((cache.stats(), heap.used()), (None, before));
    heap.frames().injector().set(FaultMode::Never);
    let object = cache.allocate().unwrap();
    // SAFETY: allocated above.
    unsafe { cache.free(object) };
}

static CALLED_BACK: AtomicUsize = AtomicUsize::new(0);

#[test]
fn a_refused_request_fails_without_relief_and_counts_as_a_failure() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let callback = |_| CALLED_BACK.fetch_add(1, Ordering::Relaxed);
    heap.add_reclaim_callback(callback).unwrap();
    let cache = Cache::new(heap.caches(), "inode", layout(64, 8));
    let injectors = [heap.class_injector(100).unwrap(), cache.injector().unwrap(), heap.frames().injector()];
    injectors[0].set(FaultMode::Nth(2));
    assert!(heap.allocate(layout(97, 8)).is_some());
    assert_eq!(heap.allocate(layout(104, 8)), None);
    assert!(heap.allocate(layout(100, 8)).is_some());
    injectors[1].set(FaultMode::Nth(1));
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    let object = cache.allocate().unwrap();
    injectors[2].set(FaultMode::Nth(1));
    assert_eq!(heap.allocate(layout(10_000, 8)), None);
    assert_eq!(CALLED_BACK.load(Ordering::Relaxed), 0);
    assert_eq!(injectors.map(|injector| injector.refused()), [1; 3]);
    let failures = heap.cache_stats().map(|stats| stats.failures).sum::<u64>();
    assert_eq!((failures, cache.stats().unwrap().failures), (1, 1));
    assert_eq!(heap.allocate(layout(heap.size(), 8)), None, "this is no injected fault");
    assert_eq!(CALLED_BACK.load(Ordering::Relaxed), 1);
    assert!(heap.class_injector(8192).is_some() && heap.class_injector(8193).is_none());
    // SAFETY: allocated above.
    unsafe { cache.free(object) };
}
