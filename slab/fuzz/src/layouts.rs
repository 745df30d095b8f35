//! Any layout, and any other one after it.

use std::alloc::Layout;
use std::ptr::NonNull;

use allocator_api2::alloc::Allocator;
use arbitrary::Arbitrary;

use crate::blocks::{Block, Blocks, Origin};
use crate::machine::{Heap, Machine, be_cpu, settled};
use crate::{decode, size};

#[derive(Debug, Arbitrary)]
struct Plan {
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Allocate {
        layout: Shape,
        zeroed: bool,
    },
    /// To any size, with the alignment that it has.
    Reallocate {
        which: u8,
        size: Size,
    },
    /// To any size and alignment, as collections do it, which never ask for nothing.
    Resize {
        which: u8,
        layout: Shape,
        zeroed: bool,
    },
    Free {
        which: u8,
    },
    BeCpu(u8),
}

#[derive(Debug, Arbitrary)]
struct Shape {
    size: Size,
    align: u8,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Size {
    Usual(u16),
    /// About a power of two.
    Near {
        log: u8,
        more: i8,
    },
    Any(u64),
}

impl Size {
    fn bytes(self) -> usize {
        match self {
            Self::Usual(number) => size(number),
            Self::Near { log, more } => (1_usize << (log % 64)).wrapping_add_signed(more.into()),
            Self::Any(number) => number as usize,
        }
    }
}

impl Shape {
    /// Alignments up to 2 MiB are more likely than all above.
    fn layout(&self) -> Option<Layout> {
        let log = if self.align < 240 { self.align % 22 } else { self.align % 64 };
        Layout::from_size_align(self.size.bytes(), 1 << log).ok()
    }
}

struct Model<'h> {
    heap: &'h Heap,
    blocks: Blocks,
}

impl Model<'_> {
    fn step(&mut self, step: &Step) {
        match *step {
            Step::Allocate { ref layout, zeroed } => _ = layout.layout().map(|layout| self.allocate(layout, zeroed)),
            Step::Reallocate { which, size } => self.reallocate(which, size.bytes()),
            Step::Resize { which, ref layout, zeroed } => {
                if let Some(layout) = layout.layout().filter(|layout| layout.size() > 0) {
                    self.resize(which, layout, zeroed);
                }
            }
            Step::Free { which } => {
                if let Some(block) = self.blocks.remove(which) {
                    // SAFETY: allocated so, and used by nobody any more.
                    unsafe { self.heap.free(block.start, block.layout) };
                }
            }
            // An NMI gets less.
            Step::BeCpu(cpu) => be_cpu(cpu % 4),
        }
    }

    fn allocate(&mut self, layout: Layout, zeroed: bool) {
        let block = if zeroed { self.heap.allocate_zeroed(layout) } else { self.heap.allocate(layout) };
        let Some(block) = block else { return self.is_too_much(layout) };
        assert!(!zeroed || Block::holds(block, layout.size(), 0));
        self.insert(block, layout);
    }

    /// A request that has failed could not be served.
    fn is_too_much(&self, layout: Layout) {
        let small = layout.size() <= 64 << 10 && layout.align() <= 64 << 10;
        assert!(!small || !self.blocks.live.is_empty(), "nothing is allocated, and {layout:?} cannot be had");
    }

    fn insert(&mut self, block: NonNull<u8>, layout: Layout) {
        let usable = Heap::usable_size(layout).expect("a size, as there is a block");
        self.blocks.insert(block, usable, layout, Origin::Heap);
    }

    fn reallocate(&mut self, which: u8, size: usize) {
        let Some(old) = self.blocks.remove(which) else { return };
        // SAFETY: allocated so; it is forgotten if there is another.
        match unsafe { self.heap.reallocate(old.start, old.layout, size) } {
            Some(block) => {
                assert!(old.has_moved_well(block, old.layout.size().min(size)));
                self.insert(
                    block,
                    Layout::from_size_align(size, old.layout.align()).expect("a layout, as there is a block"),
                );
            }
            None => self.blocks.put_back(old),
        }
    }

    fn resize(&mut self, which: u8, layout: Layout, zeroed: bool) {
        let Some(old) = self.blocks.remove(which) else { return };
        if old.layout.size() == 0 {
            return self.blocks.put_back(old);
        }
        let grows = layout.size() >= old.layout.size();
        // SAFETY: allocated so; it is forgotten if there is another.
        let resized = unsafe {
            match (grows, zeroed) {
                (true, true) => Allocator::grow_zeroed(&self.heap, old.start, old.layout, layout),
                (true, false) => Allocator::grow(&self.heap, old.start, old.layout, layout),
                (false, _) => Allocator::shrink(&self.heap, old.start, old.layout, layout),
            }
        };
        let Ok(block) = resized else { return self.blocks.put_back(old) };
        assert!(block.len() >= layout.size() && Some(block.len()) == Heap::usable_size(layout));
        let (start, kept) = (block.cast::<u8>(), old.layout.size().min(layout.size()));
        assert!(old.has_moved_well(start, kept));
        // SAFETY: the rest of the block.
        assert!(!(grows && zeroed) || Block::holds(unsafe { start.add(kept) }, layout.size() - kept, 0));
        self.insert(start, layout);
    }
}

/// Any layout gets a block that is aligned to it and large enough, or none; and keeps what was written when it changes.
pub fn layouts(data: &[u8]) {
    let Some(plan) = decode::<Plan>(data) else { return };
    Machine::with(|machine| {
        let heap = machine.heap(usize::MAX);
        let before = settled(&heap);
        let mut model = Model { heap: &heap, blocks: Blocks::default() };
        for step in &plan.steps {
            model.step(step);
        }
        model.blocks.check();
        heap.verify().expect("a heap that is right");
        while let Some(block) = model.blocks.remove(0) {
            // SAFETY: allocated so, and used by nobody any more.
            unsafe { heap.free(block.start, block.layout) };
        }
        assert_eq!(settled(&heap), before, "memory is missing");
    });
}
