//! A cache against what is known of it: which objects are allocated, and what is in them.

use std::cell::Cell;

use proptest::prelude::*;

use super::*;
use crate::platform::NoInterrupts;

/// The constructor's mark, in the first bytes; users leave it as it is.
const MARK: [u8; 8] = *b"built up";

std::thread_local! {
    static CONSTRUCTED: Cell<isize> = const { Cell::new(0) };
}

unsafe fn init(object: *mut u8) -> Result<(), InitFailed> {
    CONSTRUCTED.set(CONSTRUCTED.get() + 1);
    // SAFETY: an object of more bytes than that.
    unsafe { object.cast::<[u8; 8]>().write_unaligned(MARK) };
    Ok(())
}

unsafe fn fini(object: *mut u8) {
    CONSTRUCTED.set(CONSTRUCTED.get() - 1);
    // SAFETY: constructed by `init`.
    assert_eq!(unsafe { object.cast::<[u8; 8]>().read_unaligned() }, MARK);
}

#[derive(Debug, Clone)]
enum Step {
    Allocate,
    AllocateWithoutGrowing,
    AllocateBulk(usize),
    Free(prop::sample::Index),
    FreeBulk(usize),
    Shrink,
    ShrinkHeap,
    /// So many seconds later.
    Maintain(u64),
    /// The next steps are on this CPU; 4 has nothing of its own.
    OnCpu(usize),
    RetireCpu(usize),
}

/// Objects that a step takes or gives at once: each takes Miri a second.
const BULK: usize = if cfg!(miri) { 8 } else { 50 };

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Allocate),
        2 => Just(Step::AllocateWithoutGrowing),
        2 => (1..BULK).prop_map(Step::AllocateBulk),
        8 => any::<prop::sample::Index>().prop_map(Step::Free),
        2 => (1..BULK).prop_map(Step::FreeBulk),
        1 => Just(Step::Shrink),
        1 => Just(Step::ShrinkHeap),
        1 => (1..20_u64).prop_map(Step::Maintain),
        2 => (0..5_usize).prop_map(Step::OnCpu),
        1 => (0..5_usize).prop_map(Step::RetireCpu),
    ]
}

#[derive(Debug, Clone)]
struct Plan {
    size: usize,
    align: usize,
    limit: Option<usize>,
    constructs: bool,
    steps: Vec<Step>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let steps = prop::collection::vec(step(), 0..if cfg!(miri) { 16 } else { 120 });
    let size = prop_oneof![8..64_usize, 64..600_usize, 600..6000_usize];
    let limit = prop_oneof![2 => Just(None), 1 => (0..60_usize).prop_map(Some)];
    (size, 0..8_u32, limit, any::<bool>(), steps).prop_map(|(size, align, limit, constructs, steps)| Plan {
        size,
        align: 1 << align,
        limit,
        constructs,
        steps,
    })
}

/// The cache, and what it must be like.
struct Model<'h, P: Platform> {
    heap: &'h Heap<P>,
    cache: Cache<'h, P>,
    plan: &'h Plan,
    live: Vec<(NonNull<u8>, u8)>,
    next: u8,
    now: u64,
}

impl<P: Platform> Model<'_, P> {
    fn limit(&self) -> usize {
        self.plan.limit.unwrap_or(usize::MAX)
    }

    fn start(&self) -> usize {
        if self.plan.constructs { MARK.len() } else { 0 }
    }

    /// A new object: aligned, constructed, and from now on filled with a byte of its own.
    fn add(&mut self, object: NonNull<u8>) {
        assert!(object.as_ptr().addr().is_multiple_of(self.plan.align));
        if self.plan.constructs {
            // SAFETY: ours, and constructed.
            assert_eq!(unsafe { object.cast::<[u8; 8]>().read_unaligned() }, MARK);
        }
        self.next = self.next.wrapping_add(1);
        let start = self.start();
        // SAFETY: `size` bytes, ours.
        unsafe { object.add(start).write_bytes(self.next, self.plan.size - start) };
        self.live.push((object, self.next));
    }

    /// An object that is about to be freed, and still holds what was written.
    fn remove(&mut self, index: usize) -> NonNull<u8> {
        let (object, fill) = self.live.swap_remove(index);
        let start = self.start();
        // SAFETY: ours, and written in `add`.
        let bytes = unsafe { core::slice::from_raw_parts(object.as_ptr().add(start), self.plan.size - start) };
        assert!(bytes == std::vec![fill; bytes.len()]);
        object
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Allocate => match self.cache.allocate() {
                Ok(object) => self.add(object),
                Err(error) => assert!(error == AllocError::AtLimit && self.limit() < usize::MAX, "{error}"),
            },
            Step::AllocateWithoutGrowing => match self.cache.allocate_without_growing() {
                Ok(object) => self.add(object),
                Err(error) => assert!(matches!(error, AllocError::WouldGrow | AllocError::AtLimit), "{error}"),
            },
            Step::AllocateBulk(count) => {
                let mut objects = std::vec![core::ptr::null_mut(); *count];
                let filled = self.cache.allocate_bulk(&mut objects);
                assert!(filled == *count || self.limit() < usize::MAX);
                objects[..filled].iter().for_each(|&object| self.add(NonNull::new(object).unwrap()));
                assert!(objects[filled..].iter().all(|object| object.is_null()));
            }
            Step::Free(_) | Step::FreeBulk(_) if self.live.is_empty() => {}
            Step::Free(index) => {
                let object = self.remove(index.index(self.live.len()));
                free(&self.cache, object);
            }
            Step::FreeBulk(count) => {
                let objects: Vec<_> = (0..*count.min(&self.live.len())).map(|_| self.remove(0)).collect();
                // SAFETY: allocated, and not used again.
                unsafe { self.cache.free_bulk(&objects) };
            }
            Step::Shrink => _ = self.cache.shrink(),
            Step::ShrinkHeap => _ = self.heap.shrink(),
            Step::Maintain(seconds) => {
                self.now += seconds * 1000;
                self.heap.maintain(self.now);
            }
            Step::OnCpu(number) => be_cpu(*number),
            // SAFETY: no other thread uses the heap.
            Step::RetireCpu(number) => unsafe { self.heap.retire_cpu(*number) },
        }
    }

    fn check(&self) {
        self.heap.verify().unwrap();
        let Some(stats) = self.cache.stats() else { return };
        assert_eq!(stats.in_use, self.live.len());
        assert_eq!(stats.allocations - stats.frees, self.live.len() as u64);
        assert!(stats.in_use + stats.in_magazines <= self.limit());
        assert!(stats.slabs * stats.objects_per_slab >= stats.in_use + stats.in_magazines);
        if self.plan.constructs {
            let constructed = usize::try_from(CONSTRUCTED.get()).unwrap();
            assert!(constructed >= stats.in_use + stats.in_magazines);
            assert!(constructed <= stats.slabs * stats.objects_per_slab);
        }
        let mut seen = 0;
        self.cache.for_each_object(|object| {
            seen += 1;
            assert!(self.live.iter().any(|(live, _)| *live == object));
        });
        assert_eq!(seen, self.live.len());
    }
}

fn run<P: Platform>(plan: &Plan) {
    CONSTRUCTED.set(0);
    be_cpu(0);
    let machine = Machine::new(START, if cfg!(miri) { 300 } else { 2 * LARGE });
    let heap = machine.heap_on::<P>();
    let before = settled(&heap);
    let mut cache = Cache::new(heap.caches(), "model", layout(plan.size, plan.align));
    if let Some(limit) = plan.limit {
        cache = cache.with_limit(limit);
    }
    if plan.constructs {
        // SAFETY: `init` makes what `fini` and the model expect, in objects of at least 8 bytes.
        cache = unsafe { cache.with_constructor(init, fini) };
    }
    let mut model = Model { heap: &heap, cache, plan, live: Vec::new(), next: 0, now: 0 };
    for (number, step) in plan.steps.iter().enumerate() {
        model.take(step);
        // Looking at everything takes minutes under Miri.
        if !cfg!(miri) || number % 8 == 7 {
            model.check();
        }
    }
    model.check();
    while !model.live.is_empty() {
        let object = model.remove(0);
        free(&model.cache, object);
    }
    be_cpu(0);
    model.cache.destroy().unwrap();
    assert_eq!(CONSTRUCTED.get(), 0);
    for number in 0..4 {
        // SAFETY: no other thread uses the heap.
        unsafe { heap.retire_cpu(number) };
    }
    assert_eq!(settled(&heap), before);
}

proptest! {
    #![proptest_config(crate::testing::cases(96, 1))]

    #[test]
    fn any_sequence_leaves_a_cache_with_magazines_as_the_model(plan in plan()) {
        run::<Threads>(&plan);
    }

    #[test]
    fn any_sequence_leaves_a_cache_without_them_as_the_model(plan in plan()) {
        run::<NoInterrupts>(&plan);
    }
}
