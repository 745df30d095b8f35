//! Frees that cannot be right, between such as are.
//!
//! A bad free is any pointer, given back by any *door*. [`Model::expected`] says what must come of it. Every second plan has
//! it of objects with checks.

use std::alloc::Layout;
use std::ptr::NonNull;

use arbitrary::Arbitrary;
use kslab::memory::FRAME_SIZE;
use kslab::stats::{CacheStats, FrameStats};
use kslab::{Cache, Frame, Order};

use crate::blocks::{Block, Blocks, Origin};
use crate::machine::{Cpus, FRAMES, Heap, Machine, be_cpu, on_first_cpu, report_of, settled};
use crate::{decode, size};

#[derive(Debug, Arbitrary)]
struct Plan {
    frames: u16,
    caches: [Shape; CACHES],
    turns: Vec<Turn>,
}

/// A size and an alignment.
#[derive(Debug, Clone, Copy, Arbitrary)]
struct Shape {
    size: u16,
    align: u8,
}

/// What is right, and then what is not.
#[derive(Debug, Arbitrary)]
struct Turn {
    step: Step,
    place: Place,
    door: AnyDoor,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Allocate(Shape),
    AllocateObject { cache: u8 },
    AllocateFrames { count: u8 },
    Free { which: u8 },
    FreeTwice { which: u8 },
    Shrink,
    BeCpu(u8),
}

/// Where a bad free points.
#[derive(Debug, Arbitrary)]
enum Place {
    Live {
        which: u8,
        offset: Offset,
    },
    /// What was freed, not necessarily just now.
    Gone {
        which: u8,
    },
    Machine {
        offset: u32,
    },
    Anywhere(u64),
    OnStack,
}

/// How far into a block.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Offset {
    Bytes(u16),
    /// Eighths of it; the eighth one is its end.
    Part(u8),
}

#[derive(Debug, Arbitrary)]
enum AnyDoor {
    /// That by which the block was to be freed.
    Own,
    Heap(Shape),
    Reallocate(Shape),
    Cache(u8),
    CacheBulk(u8),
    Frames(u8),
}

/// How a pointer is given back.
#[derive(Debug, Clone, Copy)]
enum Door {
    Heap(Layout),
    Reallocate(Layout),
    Cache(usize),
    CacheBulk(usize),
    Frames(u32),
}

/// What must come of it.
#[derive(Debug)]
enum Expected {
    /// It is right, or nothing tells it from what is.
    Free,
    /// A report that starts so.
    Report(String),
    /// Some report: of free memory it depends on what it was last.
    AnyReport,
}

const DOUBLE_FREE: &str = "double free: it is free already, or was never allocated";
const BAD_BASE: &str = "not the start of an allocation";
const BAD_ADDRESS: &str = "not memory of this allocator";

const CACHES: usize = 2;
const NAMES: [&str; CACHES] = ["first", "second"];

impl Shape {
    fn layout(self) -> Layout {
        Layout::from_size_align(size(self.size), 1 << (self.align % 16)).expect("a layout")
    }
}

impl Expected {
    fn report(text: impl Into<String>) -> Self {
        Self::Report(text.into())
    }
}

/// Bytes of a block for `layout`, and whether it is page frames. The two together say whether two layouts are the same to
/// the heap.
fn block_of(layout: Layout) -> Option<(usize, bool)> {
    let rounded = layout.size().max(1).next_multiple_of(layout.align());
    Some((Heap::usable_size(layout)?, rounded > 2 * FRAME_SIZE || layout.align() > FRAME_SIZE))
}

struct Model<'h> {
    heap: &'h Heap,
    machine: &'h Machine,
    caches: [Cache<'h, Cpus>; CACHES],
    blocks: Blocks,
    gone: Vec<Block>,
    /// With checks the layout of a block is known to the byte.
    checks: bool,
}

impl Model<'_> {
    fn step(&mut self, step: &Step) {
        match *step {
            Step::Allocate(shape) => {
                let layout = shape.layout();
                if let (Some(block), Some((size, _))) = (self.heap.allocate(layout), block_of(layout)) {
                    self.blocks.insert(block, size, layout, Origin::Heap);
                }
            }
            Step::AllocateObject { cache } => {
                let cache = usize::from(cache) % CACHES;
                if let Ok(object) = self.caches[cache].allocate() {
                    let layout = self.caches[cache].layout();
                    self.blocks.insert(object, layout.size(), layout, Origin::Cache(cache));
                }
            }
            Step::AllocateFrames { count } => self.allocate_frames(count.into()),
            Step::Free { which } => _ = self.free(which),
            Step::FreeTwice { which } => {
                if let Some(block) = self.free(which) {
                    self.misuse(block.start.as_ptr(), self.own_door(&block), Expected::report(DOUBLE_FREE));
                }
            }
            Step::Shrink => _ = self.heap.shrink(),
            Step::BeCpu(cpu) => be_cpu(cpu),
        }
    }

    fn allocate_frames(&mut self, count: u32) {
        let Some(frame) = self.heap.frames().allocate_run(count, Order::ZERO) else { return };
        let layout = Layout::from_size_align(count as usize * FRAME_SIZE, FRAME_SIZE).expect("a layout");
        let start = NonNull::new(self.heap.frames().pointer(frame)).expect("a frame that is mapped");
        self.blocks.insert(start, layout.size(), layout, Origin::Frames(frame, count));
    }

    fn free(&mut self, which: u8) -> Option<Block> {
        let block = self.blocks.remove(which)?;
        self.give_back(block.start.as_ptr(), self.own_door(&block));
        self.gone.push(block);
        Some(block)
    }

    fn own_door(&self, block: &Block) -> Door {
        match block.origin {
            Origin::Heap => Door::Heap(block.layout),
            Origin::Cache(cache) => Door::Cache(cache),
            Origin::Frames(_, count) => Door::Frames(count),
        }
    }

    /// Gives a pointer back, rightly or wrongly.
    fn give_back(&self, pointer: *mut u8, door: Door) {
        let Some(block) = NonNull::new(pointer) else { return };
        // SAFETY: either it is allocated and no longer used, or it is refused, which is what is tried.
        unsafe {
            match door {
                Door::Heap(layout) => self.heap.free(block, layout),
                Door::Reallocate(layout) => _ = self.heap.reallocate(block, layout, layout.size()),
                Door::Cache(cache) => self.caches[cache].free(block),
                Door::CacheBulk(cache) => self.caches[cache].free_bulk(&[block]),
                Door::Frames(count) => {
                    _ = self.frame_of(pointer).map(|frame| self.heap.frames().free_run(frame, count))
                }
            }
        }
    }

    /// The frame that `pointer` points into, or would.
    fn frame_of(&self, pointer: *const u8) -> Option<Frame> {
        Frame::containing(pointer.addr().wrapping_sub(self.machine.base().addr()) as u64)
    }

    fn misuse_at(&mut self, place: &Place, door: &AnyDoor) {
        let mut on_stack = 0_u8;
        let (pointer, own) = match *place {
            Place::Live { which, offset } => {
                let Some(block) = usize::from(which).checked_rem(self.blocks.live.len()) else { return };
                let block = self.blocks.live[block];
                let offset = match offset {
                    Offset::Bytes(bytes) => usize::from(bytes) % (block.size + 1),
                    Offset::Part(eighths) => block.size * (usize::from(eighths) % 9) / 8,
                };
                (block.start.as_ptr().wrapping_add(offset), Some(block))
            }
            Place::Gone { which } => {
                let Some(block) = usize::from(which).checked_rem(self.gone.len()) else { return };
                (self.gone[block].start.as_ptr(), Some(self.gone[block]))
            }
            Place::Machine { offset } => (self.machine.at(offset as usize % (FRAMES * FRAME_SIZE)), None),
            Place::Anywhere(address) => (std::ptr::without_provenance_mut(address as usize), None),
            Place::OnStack => (&raw mut on_stack, None),
        };
        let door = match *door {
            AnyDoor::Own => own.map_or(Door::Frames(1), |block| self.own_door(&block)),
            AnyDoor::Heap(shape) => Door::Heap(shape.layout()),
            AnyDoor::Reallocate(shape) => Door::Reallocate(shape.layout()),
            AnyDoor::Cache(cache) => Door::Cache(usize::from(cache) % CACHES),
            AnyDoor::CacheBulk(cache) => Door::CacheBulk(usize::from(cache) % CACHES),
            AnyDoor::Frames(count) => Door::Frames(count.into()),
        };
        // A frame that cannot be named cannot be freed.
        if pointer.is_null() || matches!(door, Door::Frames(_)) && self.frame_of(pointer).is_none() {
            return;
        }
        self.misuse(pointer, door, self.expected(pointer, door));
    }

    /// What must come of giving `pointer` back.
    fn expected(&self, pointer: *const u8, door: Door) -> Expected {
        let Some(offset) = self.machine.offset(pointer) else { return Expected::report(BAD_ADDRESS) };
        let whole_frames = matches!(door, Door::Frames(_));
        let offset = if whole_frames { offset / FRAME_SIZE * FRAME_SIZE } else { offset };
        let address = self.machine.at(offset).addr();
        let Some(block) = self.blocks.around(address) else { return Expected::AnyReport };
        let at_start = address == block.start.addr().get();
        let kind = self.kind_of(block);
        match (door, kind) {
            (Door::Heap(layout) | Door::Reallocate(layout), _) => self.expected_of_heap(block, kind, layout, at_start),
            (Door::Cache(cache) | Door::CacheBulk(cache), _) => match kind {
                Kind::Object(owner) if owner != cache => wrong_cache(NAMES[cache], NAMES[owner]),
                Kind::Object(_) if at_start => Expected::Free,
                Kind::Object(_) | Kind::Frames(_) => Expected::report(BAD_BASE),
                // A larger one where its own had no memory.
                Kind::Class => wrong_cache(NAMES[cache], "size-"),
            },
            (Door::Frames(count), Kind::Frames(allocated)) if at_start => match count == allocated {
                true => Expected::Free,
                false => {
                    Expected::report(format!("wrong size: freed as {count} page frames, allocated as {allocated}"))
                }
            },
            (Door::Frames(_), _) => Expected::report(BAD_BASE),
        }
    }

    fn expected_of_heap(&self, block: &Block, kind: Kind, layout: Layout, at_start: bool) -> Expected {
        let Some(freed) = block_of(layout) else { return Expected::report(BAD_ADDRESS) };
        let allocated = match kind {
            Kind::Object(owner) => return wrong_cache("the heap", NAMES[owner]),
            _ if !at_start => return Expected::report(BAD_BASE),
            Kind::Class if self.checks => {
                let same = layout == block.layout;
                return if same { Expected::Free } else { Expected::report("wrong layout: freed as ") };
            }
            Kind::Class => (block.size, false),
            Kind::Frames(count) => (count as usize * FRAME_SIZE, true),
        };
        if freed == allocated {
            return Expected::Free;
        }
        let (freed, allocated) = (freed.0, allocated.0);
        Expected::report(format!("wrong layout: freed as a block of {freed} bytes, allocated as one of {allocated}"))
    }

    fn kind_of(&self, block: &Block) -> Kind {
        match (block.origin, block_of(block.layout)) {
            (Origin::Cache(cache), _) => Kind::Object(cache),
            (Origin::Heap, Some((_, false))) => Kind::Class,
            _ => Kind::Frames((block.size / FRAME_SIZE) as u32),
        }
    }

    /// Does it: the report must be the right one, and nothing must have changed.
    fn misuse(&self, pointer: *mut u8, door: Door, expected: Expected) {
        if matches!(expected, Expected::Free) {
            return;
        }
        let before = on_first_cpu(|| self.counts());
        let report = report_of(|| self.give_back(pointer, door));
        let named = match door {
            Door::Frames(_) => self.frame_of(pointer).map_or(pointer, |frame| self.heap.frames().pointer(frame)),
            _ => pointer,
        };
        let text = report.strip_prefix(&format!("kslab: bad free of {named:p}: "));
        let text = text.unwrap_or_else(|| panic!("{pointer:p} by {door:?}: {report}"));
        if let Expected::Report(expected) = expected {
            assert!(text.starts_with(&expected), "{pointer:p} by {door:?}: {expected:?} was expected, not {text:?}");
        }
        let after = on_first_cpu(|| self.counts());
        assert!(before == after, "{pointer:p} by {door:?} has changed {before:?} to {after:?}");
        on_first_cpu(|| self.heap.verify()).expect("a heap that is right");
    }

    fn counts(&self) -> (FrameStats, Vec<CacheStats>) {
        let mut caches = Vec::new();
        self.heap.for_each_cache(|cache| caches.push(*cache));
        (self.heap.frames().stats(), caches)
    }
}

/// What a block is, to those who free it.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Of the cache with this number.
    Object(usize),
    Class,
    Frames(u32),
}

fn wrong_cache(freed: &str, owner: &str) -> Expected {
    Expected::report(format!("wrong cache: freed to {freed}, allocated from {owner}"))
}

/// Every bad free is refused with the right report and changes nothing.
pub fn misuse(data: &[u8]) {
    let Some(plan) = decode::<Plan>(data) else { return };
    Machine::with(|machine| run(machine, &plan));
}

fn run(machine: &Machine, plan: &Plan) {
    // Less than 256 frames are too few for magazines.
    let heap = machine.heap(8 + usize::from(plan.frames) % (FRAMES - 8));
    let checks = plan.frames >= 1 << 15;
    if checks {
        heap.set_checks("*:poison,audit").expect("rules");
    }
    let before = settled(&heap);
    let cache = |number: usize| {
        let layout = plan.caches[number].layout();
        let layout = Layout::from_size_align(layout.size().max(1), layout.align()).expect("a layout");
        Cache::new(heap.caches(), NAMES[number], layout)
    };
    let caches = std::array::from_fn(cache);
    let mut model = Model { heap: &heap, machine, caches, blocks: Blocks::default(), gone: Vec::new(), checks };
    for turn in &plan.turns {
        model.step(&turn.step);
        model.misuse_at(&turn.place, &turn.door);
    }
    model.blocks.check();
    while model.free(0).is_some() {}
    be_cpu(0);
    for cache in model.caches {
        cache.destroy().expect("a cache without objects in use");
    }
    let after = settled(&heap);
    // What is kept for classes with checks stays.
    assert!(after == before || checks && after < before, "memory is missing");
}
