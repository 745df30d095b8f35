//! Any sequence of operations against a list of what is allocated.

use std::alloc::Layout;
use std::cell::Cell;
use std::ptr::NonNull;

use arbitrary::Arbitrary;
use kslab::memory::FRAME_SIZE;
use kslab::{AllocError, Cache, FaultMode, InitFailed, Order};

use crate::blocks::{Block, Blocks, Origin};
use crate::machine::{CPUS, Cpus, FRAMES, Heap, Machine, be_cpu, in_nmi, on_first_cpu, settled};
use crate::{decode, size};

#[derive(Debug, Arbitrary)]
struct Plan {
    frames: u16,
    caches: [Shape; 3],
    steps: Vec<Step>,
}

/// Of a cache.
#[derive(Debug, Arbitrary)]
struct Shape {
    size: u16,
    align: u8,
    limit: Option<u8>,
    constructs: bool,
    magazines: bool,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Allocate { size: u16, align: u8, zeroed: bool },
    AllocateFrames { count: u8, alignment: u8 },
    AllocateObject { cache: u8, grow: bool },
    AllocateObjects { cache: u8, count: u8 },
    Free { which: u8 },
    FreeObjects { cache: u8, count: u8 },
    Reallocate { which: u8, size: u16 },
    ShrinkCache { cache: u8 },
    EndCache { cache: u8 },
    Shrink,
    Maintain { seconds: u8 },
    BeCpu(u8),
    RetireCpu(u8),
    RefuseFrames { nth: u8 },
    RefuseObjects { size: u16, nth: u8 },
    FailConstructor,
    ChildHeap { limit: u8, blocks: u8, size: u16 },
    Check,
}

/// The constructor's mark, in the first bytes; users leave it as it is.
const MARK: [u8; 8] = *b"built up";

thread_local! {
    static CONSTRUCTED: Cell<isize> = const { Cell::new(0) };
    static NEXT_FAILS: Cell<bool> = const { Cell::new(false) };
}

unsafe fn init(object: *mut u8) -> Result<(), InitFailed> {
    if NEXT_FAILS.take() {
        return Err(InitFailed);
    }
    CONSTRUCTED.set(CONSTRUCTED.get() + 1);
    // SAFETY: an object that has at least as many bytes.
    unsafe { object.cast::<[u8; 8]>().write_unaligned(MARK) };
    Ok(())
}

unsafe fn fini(object: *mut u8) {
    CONSTRUCTED.set(CONSTRUCTED.get() - 1);
    assert!(is_marked(object));
}

fn is_marked(object: *mut u8) -> bool {
    // SAFETY: the callers pass objects that were constructed.
    unsafe { object.cast::<[u8; 8]>().read_unaligned() == MARK }
}

impl Shape {
    fn layout(&self) -> Layout {
        let least = if self.constructs { MARK.len() } else { 1 };
        Layout::from_size_align(size(self.size).max(least), 1 << (self.align % 14)).expect("a layout")
    }

    fn limit(&self) -> usize {
        self.limit.map_or(usize::MAX, usize::from)
    }

    /// Bytes of an object that its user leaves as they are.
    fn kept(&self) -> usize {
        if self.constructs { MARK.len() } else { 0 }
    }

    fn cache<'h>(&self, heap: &'h Heap) -> Cache<'h, Cpus> {
        let mut cache = Cache::new(heap.caches(), "fuzzed", self.layout()).with_limit(self.limit());
        if !self.magazines {
            cache = cache.without_magazines();
        }
        if self.constructs {
            // SAFETY: `init` makes what `fini` expects, in objects of at least that size.
            cache = unsafe { cache.with_constructor(init, fini) };
        }
        cache
    }
}

struct Model<'h> {
    heap: &'h Heap,
    shapes: &'h [Shape; 3],
    caches: Vec<Cache<'h, Cpus>>,
    blocks: Blocks,
    now: u64,
}

impl Model<'_> {
    fn step(&mut self, step: &Step) {
        self.take(step);
        if let Step::AllocateObject { cache, .. } | Step::AllocateObjects { cache, .. } = *step {
            let cache = usize::from(cache) % 3;
            assert!(self.blocks.count_of(Origin::Cache(cache)) <= self.shapes[cache].limit());
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Allocate { size, align, zeroed } => self.allocate(size, align, zeroed),
            Step::AllocateFrames { count, alignment } => self.allocate_frames(count.into(), alignment),
            Step::AllocateObject { cache, grow } => self.allocate_object(usize::from(cache) % 3, grow),
            Step::AllocateObjects { cache, count } => self.allocate_objects(usize::from(cache) % 3, count.into()),
            Step::Free { which } => _ = self.blocks.remove(which).map(|block| self.free(&block)),
            Step::FreeObjects { cache, count } => self.free_objects(usize::from(cache) % 3, count.into()),
            Step::Reallocate { which, size } => self.reallocate(which, crate::size(size)),
            Step::ShrinkCache { cache } => _ = self.caches[usize::from(cache) % 3].shrink(),
            Step::EndCache { cache } => self.end_cache(usize::from(cache) % 3),
            Step::Shrink => _ = self.heap.shrink(),
            Step::Maintain { seconds } => {
                self.now += u64::from(seconds) * 1000;
                self.heap.maintain(self.now);
            }
            Step::BeCpu(cpu) => be_cpu(cpu),
            // SAFETY: no other thread uses the heap.
            Step::RetireCpu(cpu) if !in_nmi() => unsafe { self.heap.retire_cpu(usize::from(cpu) % CPUS) },
            Step::RetireCpu(_) => {}
            Step::RefuseFrames { nth } => self.heap.frames().injector().set(FaultMode::Nth(nth.into())),
            Step::RefuseObjects { size, nth } => {
                if let Some(injector) = self.heap.class_injector(crate::size(size)) {
                    injector.set(FaultMode::Nth(nth.into()));
                }
            }
            Step::FailConstructor => NEXT_FAILS.set(true),
            Step::ChildHeap { limit, blocks, size } if !in_nmi() => self.child_heap(limit, blocks, size),
            Step::ChildHeap { .. } => {}
            Step::Check => self.check(),
        }
    }

    fn allocate(&mut self, size: u16, align: u8, zeroed: bool) {
        let layout = Layout::from_size_align(crate::size(size), 1 << (align % 20)).expect("a layout");
        let block = if zeroed { self.heap.allocate_zeroed(layout) } else { self.heap.allocate(layout) };
        let Some(block) = block else { return };
        assert!(!zeroed || Block::holds(block, layout.size(), 0));
        self.blocks.insert(block, usable(layout), layout, Origin::Heap);
    }

    fn allocate_frames(&mut self, count: u32, alignment: u8) {
        let alignment = Order::new(u32::from(alignment) % 10).expect("an order");
        let Some(frame) = self.heap.allocate_frames(count, alignment, u64::MAX) else { return };
        let layout = Layout::from_size_align(count as usize * FRAME_SIZE, alignment.bytes()).expect("a layout");
        let start = NonNull::new(self.heap.frames().pointer(frame)).expect("a frame that is mapped");
        self.blocks.insert(start, layout.size(), layout, Origin::Frames(frame, count));
    }

    fn allocate_object(&mut self, cache: usize, grow: bool) {
        let allocated = match grow {
            true => self.caches[cache].allocate(),
            false => self.caches[cache].allocate_without_growing(),
        };
        match allocated {
            Ok(object) => self.add_object(cache, object),
            Err(AllocError::AtLimit) => assert!(self.shapes[cache].limit.is_some()),
            Err(AllocError::ConstructorFailed) => assert!(self.shapes[cache].constructs),
            Err(AllocError::WouldGrow) => assert!(!grow || in_nmi()),
            Err(AllocError::NoMemory) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn allocate_objects(&mut self, cache: usize, count: usize) {
        let mut objects = vec![std::ptr::null_mut(); count];
        let filled = self.caches[cache].allocate_bulk(&mut objects);
        let (objects, rest) = objects.split_at(filled);
        objects.iter().for_each(|&object| self.add_object(cache, NonNull::new(object).expect("an object")));
        assert!(rest.iter().all(|object| object.is_null()));
    }

    fn add_object(&mut self, cache: usize, object: NonNull<u8>) {
        let shape = &self.shapes[cache];
        assert!(!shape.constructs || is_marked(object.as_ptr()));
        let layout = shape.layout();
        self.blocks.insert_kept(object, layout.size(), layout, Origin::Cache(cache), shape.kept());
    }

    fn free(&self, block: &Block) {
        // SAFETY: allocated so, and used by nobody any more.
        unsafe {
            match block.origin {
                Origin::Heap => self.heap.free(block.start, block.layout),
                Origin::Cache(cache) => self.caches[cache].free(block.start),
                Origin::Frames(frame, count) => self.heap.frames().free_run(frame, count),
            }
        }
    }

    fn free_objects(&mut self, cache: usize, count: usize) {
        let objects: Vec<_> =
            self.blocks.remove_of(Origin::Cache(cache), count).iter().map(|block| block.start).collect();
        // SAFETY: allocated from it, and used by nobody any more.
        unsafe { self.caches[cache].free_bulk(&objects) };
    }

    fn reallocate(&mut self, which: u8, size: usize) {
        let Some(block) = self.blocks.remove(which) else { return };
        if block.origin != Origin::Heap {
            return self.blocks.put_back(block);
        }
        // SAFETY: allocated so; it is forgotten if there is another.
        let Some(moved) = (unsafe { self.heap.reallocate(block.start, block.layout, size) }) else {
            return self.blocks.put_back(block);
        };
        assert!(block.has_moved_well(moved, block.layout.size().min(size)));
        let layout = Layout::from_size_align(size, block.layout.align()).expect("a layout, as there is a block");
        self.blocks.insert(moved, usable(layout), layout, Origin::Heap);
    }

    /// Ends a cache and makes another, unless it is in use.
    fn end_cache(&mut self, number: usize) {
        if in_nmi() {
            return;
        }
        let live = self.blocks.count_of(Origin::Cache(number));
        let cache = self.caches.remove(number);
        let next = match cache.destroy() {
            Ok(()) => self.shapes[number].cache(self.heap),
            Err(refused) => {
                assert_eq!(refused.objects, live);
                refused.cache
            }
        };
        assert!(live == 0 || next.stats().is_some());
        self.caches.insert(number, next);
    }

    /// A heap within the heap, which ends with its blocks.
    fn child_heap(&mut self, limit: u8, blocks: u8, size: u16) {
        let Ok(child) = self.heap.create_heap("child", usize::from(limit) * FRAME_SIZE) else { return };
        let layout = Layout::from_size_align(crate::size(size), 1).expect("a layout");
        let before = self.blocks.live.len();
        for block in (0..blocks).map_while(|_| child.allocate(layout)) {
            self.blocks.insert(block, usable(layout), layout, Origin::Heap);
        }
        child.verify().expect("a heap that is right");
        while self.blocks.live.len() > before {
            self.blocks.remove_last();
        }
    }

    fn check(&self) {
        self.blocks.check();
        on_first_cpu(|| self.heap.verify()).expect("a heap that is right");
        on_first_cpu(|| self.check_counts());
    }

    fn check_counts(&self) {
        let constructed: usize = (0..3).map(|cache| self.check_cache(cache)).sum();
        assert!(usize::try_from(CONSTRUCTED.get()).is_ok_and(|now| now >= constructed));
        let mut visited = std::collections::BTreeMap::new();
        self.heap.for_each_block(|block, size| assert_eq!(visited.insert(block, size), None));
        let blocks = self.blocks.live.iter().filter(|block| !matches!(block.origin, Origin::Cache(_)));
        for block in blocks {
            assert!(
                visited.get(&block.start).is_some_and(|size| *size >= block.layout.size()),
                "{block:?} is not visited"
            );
        }
    }

    /// Says how many of its objects are constructed at least.
    fn check_cache(&self, cache: usize) -> usize {
        let (live, shape) = (self.blocks.count_of(Origin::Cache(cache)), &self.shapes[cache]);
        let Some(stats) = self.caches[cache].stats() else {
            assert_eq!(live, 0);
            return 0;
        };
        assert_eq!(stats.in_use, live);
        assert!(stats.in_use + stats.in_magazines <= shape.limit());
        assert!(stats.in_use + stats.in_magazines <= stats.slabs * stats.objects_per_slab);
        let mut seen = 0;
        self.caches[cache].for_each_object(|object| {
            seen += 1;
            assert!(self.blocks.starts_at(object));
        });
        assert_eq!(seen, live);
        if shape.constructs { live } else { 0 }
    }
}

/// Bytes that a block for `layout` has.
fn usable(layout: Layout) -> usize {
    Heap::usable_size(layout).expect("a size, as there is a block")
}

/// Any sequence of operations leaves every block as it was written, and the heap right; and all memory comes back.
pub fn operations(data: &[u8]) {
    let Some(plan) = decode::<Plan>(data) else { return };
    CONSTRUCTED.set(0);
    NEXT_FAILS.set(false);
    Machine::with(|machine| {
        // Less than 256 frames are too few for magazines.
        let heap = machine.heap(8 + usize::from(plan.frames) % (FRAMES - 8));
        run(&heap, &plan);
    });
}

fn run(heap: &Heap, plan: &Plan) {
    let before = settled(heap);
    let caches = plan.caches.iter().map(|shape| shape.cache(heap)).collect();
    let mut model = Model { heap, shapes: &plan.caches, caches, blocks: Blocks::default(), now: 0 };
    plan.steps.iter().for_each(|step| model.step(step));
    model.check();
    while let Some(block) = model.blocks.remove(0) {
        model.free(&block);
    }
    be_cpu(0);
    model.caches.into_iter().for_each(|cache| cache.destroy().expect("a cache without objects in use"));
    assert_eq!(CONSTRUCTED.get(), 0);
    assert_eq!(settled(heap), before, "memory is missing");
}
