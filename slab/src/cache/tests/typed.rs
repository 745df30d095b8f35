use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::vec;

use super::*;
use crate::platform::NoInterrupts;

std::thread_local! {
    static INITS: Cell<usize> = const { Cell::new(0) };
    static FINIS: Cell<usize> = const { Cell::new(0) };
    static MOOD: Cell<Mood> = const { Cell::new(Mood::Well) };
    static CALLS: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

/// What constructors and destructors do.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Well,
    InitFails,
    InitPanics,
    FiniPanics,
}

/// Begins a test; with one test thread it may have run others before.
fn begin() {
    INITS.set(0);
    FINIS.set(0);
    MOOD.set(Mood::Well);
    CALLS.take();
}

fn counts() -> (usize, usize) {
    (INITS.get(), FINIS.get())
}

fn add_one(counter: &'static std::thread::LocalKey<Cell<usize>>) {
    counter.set(counter.get() + 1);
}

/// Large enough that a slab has four.
struct Counted {
    uses: usize,
    filler: [u8; 1000],
}

impl Object for Counted {
    fn init() -> Result<Self, InitFailed> {
        match MOOD.get() {
            Mood::InitFails => return Err(InitFailed),
            Mood::InitPanics => panic!("in a bad mood"),
            _ => {}
        }
        add_one(&INITS);
        Ok(Self { uses: 0, filler: [7; 1000] })
    }

    fn renew(&mut self) {
        CALLS.with_borrow_mut(|calls| calls.push("renew"));
        self.uses += 1;
    }

    fn recycle(&mut self) {
        CALLS.with_borrow_mut(|calls| calls.push("recycle"));
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        assert_eq!(self.filler[0], 7);
        add_one(&FINIS);
        if MOOD.get() == Mood::FiniPanics {
            MOOD.set(Mood::Well);
            panic!("in a bad mood");
        }
    }
}

type Counters<'a, P> = ObjectCache<'a, Counted, P>;

#[test]
fn constructed_state_survives_free_and_allocate() {
    begin();
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Counters::new(heap.caches(), "counted");
    let mut most = 0;
    for round in 1..=10 {
        let objects: Vec<_> = (0..6).map(|_| cache.allocate().unwrap()).collect();
        most = most.max(objects.iter().map(|object| object.uses).max().unwrap());
        assert!(objects.iter().all(|object| object.filler[999] == 7));
        assert_eq!(counts(), (6, 0), "round {round}");
    }
    assert_eq!(most, 10, "the same objects each time");
    heap.verify().unwrap();
    cache.shrink();
    assert_eq!(counts(), (6, 6), "destroyed once each, when their memory leaves");
    drop(cache.allocate().unwrap());
    cache.destroy().unwrap();
    assert_eq!(counts(), (7, 7));
}

#[test]
fn only_constructed_objects_are_destroyed() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Counters::new(heap.caches(), "counted");
    drop(cache.allocate().unwrap());
    assert_eq!(cache.shrink(), 1, "a slab with one constructed object and three raw slots");
    assert_eq!(counts(), (1, 1));
}

#[test]
fn a_dropped_cache_destroys_its_free_objects() {
    begin();
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Counters::new(heap.caches(), "counted");
    drop((cache.allocate().unwrap(), cache.allocate().unwrap()));
    drop(cache);
    assert_eq!(counts(), (2, 2));
}

#[test]
fn renew_and_recycle_go_around_each_use() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Counters::new(heap.caches(), "counted");
    let object = cache.allocate().unwrap();
    assert_eq!(CALLS.take(), ["renew"]);
    let raw = object.into_raw();
    assert!(CALLS.take().is_empty(), "let go, still allocated");
    assert_eq!(cache.stats().unwrap().in_use, 1);
    // SAFETY: let go above.
    let object = unsafe { cache.from_raw(raw) };
    assert!(CALLS.take().is_empty());
    drop(object);
    assert_eq!(CALLS.take(), ["recycle"]);
    drop(cache.allocate_without_growing().unwrap());
    assert_eq!(CALLS.take(), ["renew", "recycle"]);
    assert_eq!(counts(), (1, 0));
    let leaked = cache.allocate().unwrap().into_raw();
    let in_use = cache.destroy().unwrap_err();
    assert_eq!(in_use.objects, 1);
    free(&in_use.cache, leaked.cast());
    in_use.cache.destroy().unwrap();
    assert_eq!(counts(), (1, 1));
}

#[test]
fn a_box_goes_to_another_thread_and_is_freed_there() {
    fn is_send<T: Send>(_: &T) {}
    begin();
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = &Counters::new(heap.caches(), "counted");
    let object = cache.allocate().unwrap();
    is_send(&object);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            be_cpu(1);
            assert_eq!(object.filler[500], 7);
            drop(object);
        });
    });
    assert_eq!(cache.stats().unwrap().in_use, 0);
    heap.verify().unwrap();
}

#[test]
fn row_71_a_constructor_that_fails_is_an_error_and_the_slot_is_back() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = settled(&heap);
    let cache = Counters::new(heap.caches(), "counted");
    MOOD.set(Mood::InitFails);
    for _ in 0..10 {
        assert_eq!(cache.allocate().map(|_| ()), Err(AllocError::ConstructorFailed));
    }
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.slabs, stats.empty_slabs, stats.failures), (0, 1, 1, 10));
    heap.verify().unwrap();
    MOOD.set(Mood::Well);
    assert_eq!(cache.allocate().unwrap().uses, 1);
    cache.destroy().unwrap();
    assert_eq!((counts(), settled(&heap)), ((1, 1), before));
}

#[test]
fn row_70_a_constructor_that_panics_gives_its_slot_back() {
    begin();
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = Counters::new(heap.caches(), "counted");
    MOOD.set(Mood::InitPanics);
    for _ in 0..5 {
        catch_unwind(AssertUnwindSafe(|| cache.allocate().map(|_| ()))).unwrap_err();
    }
    MOOD.set(Mood::Well);
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.in_magazines, stats.slabs), (0, 0, 1));
    heap.verify().unwrap();
    assert_eq!(cache.allocate().unwrap().uses, 1);
    cache.destroy().unwrap();
    assert_eq!((counts(), settled(&heap)), ((1, 1), before));
}

#[test]
fn row_73_a_destructor_that_panics_is_not_called_again_and_no_slab_is_lost() {
    begin();
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = settled(&heap);
    let cache = Counters::new(heap.caches(), "counted");
    heap.maintain(20_000);
    drop((0..10).map(|_| cache.allocate().unwrap()).collect::<Vec<_>>());
    MOOD.set(Mood::FiniPanics);
    let (inits, finis) = counts();
    catch_unwind(AssertUnwindSafe(|| cache.shrink())).unwrap_err();
    assert_eq!(counts(), (inits, finis + 1));
    heap.verify().unwrap();
    // The cache goes on, and what is left of it goes once.
    drop(cache.allocate().unwrap());
    MOOD.set(Mood::FiniPanics);
    catch_unwind(AssertUnwindSafe(|| heap.shrink())).unwrap_err();
    heap.verify().unwrap();
    cache.shrink();
    assert_eq!(INITS.get(), FINIS.get());
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

/// Its constructor and its destructor allocate from its own cache.
struct Nested {
    inner: vec::Vec<u8>,
}

static HEAP: Heap<NoInterrupts> = Heap::new();
static NESTED: ObjectCache<'static, Nested, NoInterrupts> =
    ObjectCache::new(HEAP.caches(), "nested").cache_line_aligned();

std::thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

fn one_deeper() {
    if DEPTH.get() < 3 {
        DEPTH.set(DEPTH.get() + 1);
        assert_eq!(NESTED.allocate().unwrap().inner, [1, 2, 3]);
        DEPTH.set(DEPTH.get() - 1);
    }
}

impl Object for Nested {
    fn init() -> Result<Self, InitFailed> {
        one_deeper();
        Ok(Self { inner: vec![1, 2, 3] })
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        one_deeper();
    }
}

#[test]
fn row_72_and_73_constructor_and_destructor_may_allocate_from_their_own_cache() {
    let machine = core::mem::ManuallyDrop::new(Machine::new(START, 64));
    // SAFETY: the machine's memory stays for good.
    unsafe { HEAP.init([machine.region()], machine.base()) }.unwrap();
    let object = NESTED.allocate().unwrap();
    assert_eq!(NESTED.stats().unwrap().in_use, 1);
    drop(object);
    for _ in 0..3 {
        NESTED.shrink();
        HEAP.verify().unwrap();
        assert_eq!(NESTED.stats().unwrap().in_use, 0);
    }
    drop(NESTED.allocate().unwrap());
    // Nothing is constructed from here on.
    DEPTH.set(3);
    NESTED.shrink();
    assert_eq!(NESTED.stats().unwrap().slabs, 0);
    DEPTH.set(0);
}
