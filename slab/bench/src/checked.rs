//! Allocators whose blocks are filled, and looked at when they are freed.

use std::alloc::{GlobalAlloc, Layout};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::arena::Arena;
use crate::peers::Peer;
use crate::peers::frames::FramePeer;

static LIVE: AtomicUsize = AtomicUsize::new(0);

/// How many blocks and page frames are allocated in all.
pub fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// `A`, of which every block is aligned and nobody else's. Each word of a block is the block's address, until it is freed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Checked<A>(A);

fn words(block: *mut u8, layout: Layout) -> impl Iterator<Item = *mut usize> {
    let block = block.cast::<usize>();
    (0..layout.size() / size_of::<usize>()).map(move |word| block.wrapping_add(word))
}

// SAFETY: `A` is an allocator.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Checked<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on to the caller.
        let block = unsafe { self.0.alloc(layout) };
        assert!(!block.is_null(), "out of memory");
        assert!(block.addr().is_multiple_of(layout.align()), "{block:?} is misaligned");
        // SAFETY: within the block.
        words(block, layout).for_each(|word| unsafe { word.write(block.addr()) });
        LIVE.fetch_add(1, Ordering::Relaxed);
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: within the block.
        let intact = words(block, layout).all(|word| unsafe { word.read() } == block.addr());
        assert!(intact, "{block:?} of {} bytes is somebody else's too", layout.size());
        // SAFETY: as above.
        words(block, layout).for_each(|word| unsafe { word.write(0) });
        LIVE.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: passed on to the caller.
        unsafe { self.0.dealloc(block, layout) }
    }
}

impl<A: Peer> Peer for Checked<A> {
    fn set_up(arena: Arena) {
        A::set_up(arena);
    }
}

/// The blocks of page frames that are allocated: where each ends, by where it starts.
static ALLOCATED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// `F`, of which every block is aligned and nobody else's.
#[derive(Debug)]
pub struct CheckedFrames<F>(F);

impl<F: FramePeer> FramePeer for CheckedFrames<F> {
    type Frame = F::Frame;

    fn set_up(arena: Arena) {
        F::set_up(arena);
    }

    fn allocate(order: u32) -> Option<F::Frame> {
        let frame = F::allocate(order)?;
        record(F::number(frame), order);
        Some(frame)
    }

    fn free(frame: F::Frame, order: u32) {
        forget(F::number(frame), order);
        F::free(frame, order);
    }

    fn number(frame: F::Frame) -> usize {
        F::number(frame)
    }

    fn allocate_many(frames: &mut [F::Frame]) {
        F::allocate_many(frames);
        frames.iter().for_each(|frame| record(F::number(*frame), 0));
    }

    fn free_many(frames: &[F::Frame]) {
        frames.iter().for_each(|frame| forget(F::number(*frame), 0));
        F::free_many(frames);
    }
}

fn record(start: usize, order: u32) {
    let end = start + (1 << order);
    assert!(start.is_multiple_of(1 << order), "frame {start} is misaligned");
    let mut allocated = ALLOCATED.lock().expect("no panic before");
    let before = allocated.range(..end).next_back();
    assert!(before.is_none_or(|(_, &before_end)| before_end <= start), "frame {start} is somebody else's too");
    allocated.insert(start, end);
    LIVE.fetch_add(1, Ordering::Relaxed);
}

fn forget(start: usize, order: u32) {
    let end = ALLOCATED.lock().expect("no panic before").remove(&start);
    assert_eq!(end, Some(start + (1 << order)), "the block that frame {start} starts");
    LIVE.fetch_sub(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    /// Gives away the same memory each time, or memory that overlaps.
    #[derive(Debug, Clone, Copy, Default)]
    struct Again<const STEP: usize>;

    static TAKEN: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
    static COUNT: AtomicUsize = AtomicUsize::new(0);

    // SAFETY: none: it is an allocator that is wrong.
    unsafe impl<const STEP: usize> GlobalAlloc for Again<STEP> {
        unsafe fn alloc(&self, _: Layout) -> *mut u8 {
            ptr::from_ref(&TAKEN).cast_mut().cast::<u8>().wrapping_add(STEP * COUNT.fetch_add(1, Ordering::Relaxed))
        }

        unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
    }

    fn take_two<A: GlobalAlloc>(allocator: A) {
        let allocator = Checked(allocator);
        COUNT.store(0, Ordering::Relaxed);
        let layout = Layout::new::<[usize; 8]>();
        // SAFETY: the memory is there.
        let blocks = [(); 2].map(|()| unsafe { allocator.alloc(layout) });
        // SAFETY: as above.
        blocks.into_iter().for_each(|block| unsafe { allocator.dealloc(block, layout) });
    }

    #[test]
    fn a_block_that_is_handed_out_twice_is_noticed() {
        let wrong = |take: fn()| std::panic::catch_unwind(take).is_err();
        assert!(wrong(|| take_two(Again::<0>)));
        assert!(wrong(|| take_two(Again::<56>)));
        assert!(!wrong(|| take_two(Again::<64>)));
        assert!(wrong(|| take_two(Again::<68>)), "misaligned");
    }

    #[test]
    fn a_page_frame_that_is_handed_out_twice_is_noticed() {
        record(1 << 30, 3);
        let wrong = |take: fn()| std::panic::catch_unwind(take).is_err();
        assert!(wrong(|| record((1 << 30) + 1, 1)), "misaligned");
        assert!(wrong(|| forget(1 << 30, 2)));
        record((1 << 30) + 8, 2);
        forget((1 << 30) + 8, 2);
    }
}
