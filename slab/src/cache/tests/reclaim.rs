use std::cell::{Cell, RefCell};

use super::*;
use crate::platform::NoInterrupts;
use crate::reclaim::{Decision, MOST_CALLBACKS, MOST_RETRIES, TooManyCallbacks};
use crate::testing::Heap;

/// One of them is a slab.
const BIG: Layout = Layout::new::<[u8; 8192]>();

std::thread_local! {
    static CALLS: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
    static SPARE: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
    static WANTED: Cell<usize> = const { Cell::new(0) };
}

fn note(call: &'static str) {
    CALLS.with_borrow_mut(|calls| calls.push(call));
}

/// Runs what the test has left to be done when memory is short; `false` where nothing is left.
fn use_spare() -> bool {
    let next = SPARE.with_borrow_mut(Vec::pop);
    next.map(|work| work()).is_some()
}

/// From now on `work` is what [`use_spare`] does next.
fn spare<'a>(work: impl FnOnce() + 'a) {
    let work: Box<dyn FnOnce() + 'a> = Box::new(work);
    // SAFETY: the tests empty the list before what the work borrows is gone.
    let work = unsafe { core::mem::transmute::<Box<dyn FnOnce() + 'a>, Box<dyn FnOnce() + 'static>>(work) };
    SPARE.with_borrow_mut(|spare| spare.push(work));
}

fn first(wanted: usize) -> usize {
    WANTED.set(wanted);
    note("first");
    0
}

fn second(_: usize) -> usize {
    note("second");
    0
}

fn frees(_: usize) -> usize {
    note("frees");
    if use_spare() { 4096 } else { 0 }
}

fn fail(_: usize) -> Decision {
    note("fail");
    Decision::Fail
}

fn retry(_: usize) -> Decision {
    note("retry");
    use_spare();
    Decision::Retry
}

fn begin() {
    CALLS.take();
    SPARE.take();
}

fn cache(heap: &Heap) -> Cache<'_, NoInterrupts> {
    Cache::new(heap.caches(), "pages", BIG)
}

#[test]
fn callbacks_come_in_the_order_of_their_registration_and_then_the_hook() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    heap.add_reclaim_callback(first).unwrap();
    heap.add_reclaim_callback(second).unwrap();
    heap.set_out_of_memory_hook(Some(fail));
    let cache = cache(&heap);
    free(&cache, cache.allocate().unwrap());
    let drought = Drought::of(&heap);
    let one = cache.allocate().unwrap();
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    assert_eq!(CALLS.take(), ["first", "second", "fail"]);
    assert_eq!(WANTED.get(), 8192, "a slab");
    assert_eq!(heap.allocate(layout(5 * 4096, 8)), None);
    assert_eq!((CALLS.take().len(), WANTED.get()), (3, 5 * 4096));
    heap.set_out_of_memory_hook(None);
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    assert_eq!(CALLS.take(), ["first", "second"]);
    assert_eq!(cache.stats().unwrap().failures, 2, "once a request");
    drop(drought);
    free(&cache, one);
}

#[test]
fn what_nobody_uses_is_given_back_before_anybody_is_called() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    heap.add_reclaim_callback(first).unwrap();
    let (idle, cache) = (Cache::new(heap.caches(), "idle", layout(3000, 8)), cache(&heap));
    // So that the cache, its slab's header and the rest of metadata are there.
    let one = cache.allocate().unwrap();
    free(&idle, idle.allocate().unwrap());
    let drought = Drought::of(&heap);
    let two = cache.allocate().unwrap();
    assert!(CALLS.take().is_empty());
    assert_eq!(idle.stats().unwrap().slabs, 0);
    drop(drought);
    free(&cache, one);
    free(&cache, two);
}

#[test]
fn a_hook_that_always_wants_another_attempt_is_asked_so_often() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    heap.set_out_of_memory_hook(Some(retry));
    let _drought = Drought::of(&heap);
    assert_eq!(cache(&heap).allocate(), Err(AllocError::NoMemory));
    assert_eq!(CALLS.take(), ["retry"; MOST_RETRIES]);
}

#[test]
fn row_67_out_of_memory_then_a_free_then_a_retry_that_succeeds() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let mut drought = Drought::of(&heap);
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    drought.give(4);
    let one = cache.allocate().unwrap();
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    // The same from within: the hook gives memory at its second call.
    heap.set_out_of_memory_hook(Some(retry));
    spare(|| drought.give(2));
    spare(|| ());
    let two = cache.allocate().unwrap();
    assert_eq!(CALLS.take(), ["retry"; 2]);
    heap.verify().unwrap();
    drop(drought);
    free(&cache, one);
    free(&cache, two);
}

#[test]
fn row_68_a_hook_that_allocates_is_not_called_by_that() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    heap.set_out_of_memory_hook(Some(retry));
    let drought = Drought::of(&heap);
    for _ in 0..3 {
        spare(|| {
            assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
            assert_eq!(heap.allocate(layout(4096, 8)), None);
            note("in vain");
        });
    }
    assert_eq!(heap.allocate(layout(4096, 8)), None);
    let calls = CALLS.take();
    assert_eq!(calls[..6], ["retry", "in vain"].repeat(3), "{calls:?}");
    assert_eq!(calls.len(), 3 + MOST_RETRIES);
    heap.verify().unwrap();
    drop(drought);
}

#[test]
fn row_88_a_callback_that_allocates_does_not_start_over() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    heap.add_reclaim_callback(frees).unwrap();
    heap.add_reclaim_callback(second).unwrap();
    let mut drought = Drought::of(&heap);
    spare(|| {
        assert_eq!(heap.allocate(layout(8192, 8)), None, "there is none for it either");
        drought.give(8);
        let block = heap.allocate(layout(100, 8)).unwrap();
        // SAFETY: just allocated.
        unsafe { heap.free(block, layout(100, 8)) };
    });
    let object = cache.allocate().unwrap();
    assert_eq!(CALLS.take(), ["frees"], "once, and then it is enough");
    heap.verify().unwrap();
    free(&cache, object);
    // The next shortage starts anew.
    drop(drought);
    assert_eq!(heap.allocate(layout(64 * 4096, 8)), None);
    assert_eq!(CALLS.take(), ["frees", "second"]);
}

#[test]
fn row_89_a_callback_may_free_into_the_cache_that_asks() {
    begin();
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "pages", BIG);
    heap.add_reclaim_callback(frees).unwrap();
    let objects = allocate(&cache, 3);
    let drought = Drought::of(&heap);
    let cache_ref = &cache;
    objects.iter().for_each(|&object| spare(move || free(cache_ref, object)));
    let again: Vec<_> = (0..3).map(|_| cache.allocate().unwrap()).collect();
    assert_eq!(CALLS.take(), ["frees"; 3]);
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    heap.verify().unwrap();
    drop(drought);
    again.into_iter().for_each(|object| free(&cache, object));
    cache.destroy().unwrap();
}

#[test]
fn there_is_room_for_so_many_callbacks() {
    let heap = Heap::new();
    for _ in 0..MOST_CALLBACKS {
        heap.add_reclaim_callback(second).unwrap();
    }
    assert_eq!(heap.add_reclaim_callback(second), Err(TooManyCallbacks));
    assert_eq!(std::format!("{TooManyCallbacks}"), "there are 16 reclaim callbacks already");
}
