//! What the allocators are made to do.
//!
//! A workload is a generic function, compiled for each allocator on its own. A block is used as little as one can: its owner
//! writes its first word.

mod blocks;
mod bulk;
mod frames;
mod kernel;
mod memory;
mod orders;
mod pair;
mod replace;
#[cfg(test)]
mod tests;
mod threads;

use std::fmt;

use crate::arena::Arena;
use crate::checked::{Checked, CheckedFrames};
use crate::cpu;
use crate::peers::frames::FramePeer;
use crate::peers::{Peer, Role};
use crate::run::Mode;

/// Runs a workload on one allocator, in a process in which nobody has used it yet.
pub type HeapRun = fn(Heap, u64, Mode) -> f64;

/// The same for page frames.
pub type FramesRun = fn(Frames, u64, Mode) -> f64;

/// Workloads of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heap {
    Pair,
    LastFirst,
    FirstFirst,
    Random,
    Replace,
    Kernel,
    Speedup,
    Throughput,
    Handover,
    ReplaceMemory,
    KernelMemory,
    Live,
}

/// Workloads of page frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frames {
    Pair,
    Mixed,
    AllocateMany,
    FreeMany,
    SetUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Heap(Heap),
    Frames(Frames),
}

/// What a workload is measured at several values of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    None,
    /// Blocks that are live at a time.
    Live,
    /// Bytes of memory that there are.
    Memory,
    /// Threads at a time.
    Threads,
}

/// A workload as the tables have it.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    pub name: &'static str,
    pub what: &'static str,
    pub unit: &'static str,
    pub more_is_better: bool,
    pub axis: Axis,
    pub kind: Kind,
    /// Whether instructions are counted too.
    pub counted: bool,
    /// Whether those that are no allocators can do it, and it means something.
    bounded: bool,
    /// Whether it is the same each time, so that once is enough.
    pub once: bool,
}

pub const WORKLOADS: [Workload; 17] = [
    Workload::of_heap("W1", "allocate and free 64 bytes, again and again", Heap::Pair).counted(),
    Workload::of_heap("W2-lifo", "1000 x 64 bytes, the last freed first", Heap::LastFirst).counted(),
    Workload::of_heap("W2-fifo", "1000 x 64 bytes, the first freed first", Heap::FirstFirst).counted(),
    Workload::of_heap("W2-random", "1000 x 64 bytes, freed at random", Heap::Random).counted(),
    Workload::of_heap("W3", "16 to 2048 bytes, 10,000 live, replaced at random", Heap::Replace).counted(),
    Workload::of_heap("W4", "a kernel's mix of objects, 20,000 live, in phases", Heap::Kernel).counted(),
    Workload::of_heap("W5a", "W1 on two threads, against one thread's", Heap::Speedup).more("times"),
    Workload::of_heap("W5", "W1 on several threads", Heap::Throughput).more("million pairs/s").over(Axis::Threads),
    Workload::of_heap("W5b", "64 bytes allocated by one thread, freed by another", Heap::Handover)
        .more("million blocks/s"),
    Workload::of_heap("W6-W3", "memory touched in W3", Heap::ReplaceMemory).in_unit("of live bytes").unbounded().once(),
    Workload::of_heap("W6-W4", "memory touched in W4", Heap::KernelMemory).in_unit("of live bytes").unbounded().once(),
    Workload::of_heap("W8", "W3 with as many live", Heap::Live).over(Axis::Live),
    Workload::of_frames("W7-pair", "allocate and free one page frame, again and again", Frames::Pair).counted(),
    Workload::of_frames("W7-mixed", "orders 0 to 9, 64 live, replaced at random", Frames::Mixed)
        .over(Axis::Memory)
        .unbounded(),
    Workload::of_frames("W7-many", "10,000 page frames in a row", Frames::AllocateMany).in_unit("ns a frame"),
    Workload::of_frames("W7-many-free", "10,000 page frames freed at random", Frames::FreeMany).in_unit("ns a frame"),
    Workload::of_frames("W7-init", "initialisation", Frames::SetUp).in_unit("us").over(Axis::Memory).unbounded(),
];

impl Workload {
    const fn of_heap(name: &'static str, what: &'static str, heap: Heap) -> Self {
        Self::new(name, what, Kind::Heap(heap))
    }

    const fn of_frames(name: &'static str, what: &'static str, frames: Frames) -> Self {
        Self::new(name, what, Kind::Frames(frames))
    }

    const fn new(name: &'static str, what: &'static str, kind: Kind) -> Self {
        Self {
            name,
            what,
            unit: "ns a pair",
            more_is_better: false,
            axis: Axis::None,
            kind,
            counted: false,
            bounded: true,
            once: false,
        }
    }

    const fn counted(self) -> Self {
        Self { counted: true, ..self }
    }

    const fn unbounded(self) -> Self {
        Self { bounded: false, ..self }
    }

    const fn once(self) -> Self {
        Self { once: true, ..self }
    }

    const fn in_unit(self, unit: &'static str) -> Self {
        Self { unit, ..self }
    }

    const fn more(self, unit: &'static str) -> Self {
        Self { unit, more_is_better: true, ..self }
    }

    const fn over(self, axis: Axis) -> Self {
        Self { axis, ..self }
    }

    /// Whether a row of that kind is in its table.
    pub fn suits(&self, role: Role) -> bool {
        match role {
            Role::Bound => self.bounded,
            Role::SubjectInBulk => matches!(self.kind, Kind::Frames(Frames::AllocateMany | Frames::FreeMany)),
            Role::Subject | Role::Peer => true,
        }
    }

    /// The values that it is measured at; 0 where there is only one.
    pub fn points(&self) -> Vec<u64> {
        match self.axis {
            Axis::None => vec![0],
            Axis::Live => vec![1_000, 10_000, 100_000, 1_000_000],
            Axis::Memory => [26, 28, 30, 32, 34].map(|bits| 1 << bits).to_vec(),
            Axis::Threads => (1..=cpu::available() as u64).collect(),
        }
    }
}

impl Axis {
    /// A value of it, for people.
    pub fn label(self, point: u64) -> String {
        match self {
            Self::None => String::new(),
            Self::Live if point >= 1_000_000 => format!("{},000,000", point / 1_000_000),
            Self::Live if point >= 1_000 => format!("{},000", point / 1_000),
            Self::Live => point.to_string(),
            Self::Memory if point >= 1 << 30 => format!("{} GiB", point >> 30),
            Self::Memory => format!("{} MiB", point >> 20),
            Self::Threads => point.to_string(),
        }
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Live => "live blocks",
            Self::Memory => "memory",
            Self::Threads => "threads",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.what)
    }
}

/// [`HeapRun`] of this allocator.
pub fn heap_run<A: Peer>(workload: Heap, point: u64, mode: Mode) -> f64 {
    match mode {
        Mode::Check => run_on_heap::<Checked<A>>(workload, point, mode),
        _ => run_on_heap::<A>(workload, point, mode),
    }
}

fn run_on_heap<A: Peer>(workload: Heap, point: u64, mode: Mode) -> f64 {
    cpu::enter(0);
    let arena = Arena::reserve(arena_bytes(workload, point));
    match workload {
        Heap::ReplaceMemory => return memory::run::<A>(arena, mode, replace::Replace::<A>::new(10_000, true)),
        Heap::KernelMemory => return memory::run::<A>(arena, mode, kernel::Kernel::<A>::new(true)),
        _ => A::set_up(arena),
    }
    let allocator = A::default();
    match workload {
        Heap::Pair => mode.run(pair::Pair(allocator)),
        Heap::LastFirst => mode.run(orders::Orders::new(allocator, |count| (0..count).rev().collect())),
        Heap::FirstFirst => mode.run(orders::Orders::new(allocator, |count| (0..count).collect())),
        Heap::Random => mode.run(orders::Orders::new(allocator, blocks::shuffled)),
        Heap::Replace => mode.run(replace::Replace::<A>::new(10_000, false)),
        Heap::Live => mode.run(replace::Replace::<A>::new(point as usize, false)),
        Heap::Kernel => mode.run(kernel::Kernel::<A>::new(false)),
        Heap::Speedup => threads::speedup::<A>(mode),
        Heap::Throughput => threads::throughput::<A>(point as usize, mode),
        Heap::Handover => threads::handover::<A>(mode),
        Heap::ReplaceMemory | Heap::KernelMemory => unreachable!("run above"),
    }
}

/// Enough for the most wasteful of them, and a power of two.
fn arena_bytes(workload: Heap, point: u64) -> usize {
    match workload {
        Heap::Replace | Heap::Kernel | Heap::KernelMemory => 256 << 20,
        Heap::Live => (point as usize * 4096).next_power_of_two().max(256 << 20),
        _ => 64 << 20,
    }
}

/// [`FramesRun`] of this allocator.
pub fn frames_run<F: FramePeer>(workload: Frames, point: u64, mode: Mode) -> f64 {
    match mode {
        Mode::Check => run_on_frames::<CheckedFrames<F>>(workload, point, mode),
        _ => run_on_frames::<F>(workload, point, mode),
    }
}

fn run_on_frames<F: FramePeer>(workload: Frames, point: u64, mode: Mode) -> f64 {
    cpu::enter(0);
    let arena = Arena::reserve(if point == 0 { 1 << 30 } else { point as usize });
    if workload == Frames::SetUp {
        return frames::set_up::<F>(arena);
    }
    F::set_up(arena);
    match workload {
        Frames::Pair => mode.run(frames::Pair::<F>::new()),
        Frames::Mixed => mode.run(frames::Mixed::<F>::new()),
        Frames::AllocateMany => mode.run(bulk::AllocateMany::<F>::new()),
        Frames::FreeMany => mode.run(bulk::FreeMany::<F>::new()),
        Frames::SetUp => unreachable!("run above"),
    }
}
