//! Allocators of page frames, behind a trait of the harness' own, since there is none that they share.

use std::cell::{Cell, UnsafeCell};
use std::fmt::Debug;
use std::slice;

use bitmap_allocator::{BitAlloc, BitAlloc16M};
use buddy_slab_allocator::BuddyAllocator;
use buddy_system_allocator::FrameAllocator;
use kslab::{Frame, Order};
use spin::Mutex;

use super::kslab::HEAP;
use super::{Entry, Peer, Role};
use crate::arena::Arena;
use crate::workloads::{FramesRun, frames_run};

const FRAME: usize = 4096;

/// An allocator of blocks of 2^k page frames.
pub trait FramePeer: 'static {
    type Frame: Copy + Default + Debug;

    /// Takes the arena.
    fn set_up(arena: Arena);

    fn allocate(order: u32) -> Option<Self::Frame>;

    /// Frees what was allocated with that order.
    fn free(frame: Self::Frame, order: u32);

    /// A number that is one more for the next frame.
    fn number(frame: Self::Frame) -> usize;

    /// Single frames, as many as there is room for.
    #[inline]
    fn allocate_many(frames: &mut [Self::Frame]) {
        frames.fill_with(|| Self::allocate(0).expect("a frame"));
    }

    #[inline]
    fn free_many(frames: &[Self::Frame]) {
        frames.iter().for_each(|frame| Self::free(*frame, 0));
    }
}

/// The allocators of page frames.
pub const FRAMES: [Entry<FramesRun>; 7] = [
    frames::<Nothing>("harness alone", Role::Bound),
    frames::<Stack>("stack of frames", Role::Bound),
    frames::<Kslab>("kslab", Role::Subject),
    frames::<KslabBulk>("kslab, in bulk", Role::SubjectInBulk),
    frames::<Bitmap>("bitmap-allocator", Role::Peer),
    frames::<BuddySlab>("buddy-slab-allocator", Role::Peer),
    frames::<BuddySystem>("buddy_system_allocator", Role::Peer),
];

const fn frames<F: FramePeer>(name: &'static str, role: Role) -> Entry<FramesRun> {
    Entry { name, role, run: frames_run::<F> }
}

/// What is measured is the harness.
#[derive(Debug)]
pub struct Nothing;

impl FramePeer for Nothing {
    type Frame = usize;

    fn set_up(_: Arena) {}

    #[inline]
    fn allocate(_: u32) -> Option<usize> {
        Some(0)
    }

    #[inline]
    fn free(_: usize, _: u32) {}

    fn number(frame: usize) -> usize {
        frame
    }
}

/// The least there can be for single frames and one thread: a stack of those that are free.
#[derive(Debug)]
pub struct Stack {
    count: Cell<usize>,
    frames: UnsafeCell<[u32; Self::FRAMES]>,
}

// SAFETY: only one thread uses it.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack { count: Cell::new(0), frames: UnsafeCell::new([0; _]) };

impl Stack {
    const FRAMES: usize = 1 << 14;
}

impl FramePeer for Stack {
    type Frame = u32;

    fn set_up(_: Arena) {
        (0..Self::FRAMES).rev().for_each(|number| Self::free(number as u32, 0));
    }

    #[inline]
    fn allocate(_: u32) -> Option<u32> {
        let count = STACK.count.get().checked_sub(1)?;
        STACK.count.set(count);
        // SAFETY: nobody else uses it, and there are no more than there is room for.
        Some(unsafe { (*STACK.frames.get())[count] })
    }

    #[inline]
    fn free(frame: u32, _: u32) {
        let count = STACK.count.get();
        // SAFETY: nobody else uses it.
        unsafe { (*STACK.frames.get())[count] = frame };
        STACK.count.set(count + 1);
    }

    fn number(frame: u32) -> usize {
        frame as usize
    }
}

/// kslab's page frames, one by one.
#[derive(Debug)]
pub struct Kslab;

#[inline]
fn order_of(order: u32) -> Order {
    Order::new(order).expect("an order")
}

impl FramePeer for Kslab {
    type Frame = Frame;

    fn set_up(arena: Arena) {
        super::kslab::Kslab::set_up(arena);
    }

    #[inline]
    fn allocate(order: u32) -> Option<Frame> {
        HEAP.frames().allocate(order_of(order))
    }

    #[inline]
    fn free(frame: Frame, order: u32) {
        // SAFETY: nobody uses it.
        unsafe { HEAP.frames().free(frame, order_of(order)) };
    }

    fn number(frame: Frame) -> usize {
        frame.number() as usize
    }
}

/// The same, where there are many with the calls for many, which the others do not have.
#[derive(Debug)]
pub struct KslabBulk;

impl FramePeer for KslabBulk {
    type Frame = Frame;

    fn set_up(arena: Arena) {
        Kslab::set_up(arena);
    }

    #[inline]
    fn allocate(order: u32) -> Option<Frame> {
        Kslab::allocate(order)
    }

    #[inline]
    fn free(frame: Frame, order: u32) {
        Kslab::free(frame, order);
    }

    fn number(frame: Frame) -> usize {
        Kslab::number(frame)
    }

    #[inline]
    fn allocate_many(frames: &mut [Frame]) {
        assert_eq!(HEAP.frames().allocate_bulk(frames), frames.len(), "as many frames");
    }

    #[inline]
    fn free_many(frames: &[Frame]) {
        // SAFETY: nobody uses them.
        unsafe { HEAP.frames().free_bulk(frames) };
    }
}

/// Up to 64 GiB of frames, one bit each.
#[derive(Debug)]
pub struct Bitmap;

static BITMAP: Mutex<BitAlloc16M> = Mutex::new(BitAlloc16M::DEFAULT);

impl FramePeer for Bitmap {
    type Frame = usize;

    fn set_up(arena: Arena) {
        BITMAP.lock().insert(0..arena.bytes / FRAME);
    }

    #[inline]
    fn allocate(order: u32) -> Option<usize> {
        match order {
            0 => BITMAP.lock().alloc(),
            _ => BITMAP.lock().alloc_contiguous(None, 1 << order, order as usize),
        }
    }

    #[inline]
    fn free(frame: usize, order: u32) {
        match order {
            0 => BITMAP.lock().dealloc(frame),
            _ => BITMAP.lock().dealloc_contiguous(frame, 1 << order),
        };
    }

    fn number(frame: usize) -> usize {
        frame
    }
}

/// The buddy system of buddy-slab-allocator.
#[derive(Debug)]
pub struct BuddySlab;

static BUDDY_SLAB: Mutex<BuddyAllocator<FRAME>> = Mutex::new(BuddyAllocator::new());

impl FramePeer for BuddySlab {
    type Frame = usize;

    fn set_up(arena: Arena) {
        // SAFETY: the arena is nobody else's, and stays.
        let region = unsafe { slice::from_raw_parts_mut(arena.start, arena.bytes) };
        // SAFETY: as above.
        unsafe { BUDDY_SLAB.lock().init(region) }.expect("enough memory");
    }

    #[inline]
    fn allocate(order: u32) -> Option<usize> {
        BUDDY_SLAB.lock().alloc_pages(1 << order, FRAME << order).ok()
    }

    #[inline]
    fn free(address: usize, order: u32) {
        BUDDY_SLAB.lock().dealloc_pages(address, 1 << order);
    }

    fn number(address: usize) -> usize {
        address / FRAME
    }
}

/// The frames of buddy_system_allocator: trees of numbers, which take their memory from another allocator.
#[derive(Debug)]
pub struct BuddySystem;

static BUDDY_SYSTEM: Mutex<FrameAllocator> = Mutex::new(FrameAllocator::new());

impl FramePeer for BuddySystem {
    type Frame = usize;

    fn set_up(arena: Arena) {
        BUDDY_SYSTEM.lock().insert(0..arena.bytes / FRAME);
    }

    #[inline]
    fn allocate(order: u32) -> Option<usize> {
        BUDDY_SYSTEM.lock().alloc(1 << order)
    }

    #[inline]
    fn free(frame: usize, order: u32) {
        BUDDY_SYSTEM.lock().dealloc(frame, 1 << order);
    }

    fn number(frame: usize) -> usize {
        frame
    }
}
