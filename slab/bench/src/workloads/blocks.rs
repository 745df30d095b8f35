//! Blocks, and what their owner does with them.

use std::alloc::{GlobalAlloc, Layout};

use fastrand::Rng;

/// All that is random is the same in each run.
pub fn rng() -> Rng {
    Rng::with_seed(0x6b73_6c61_6221_0006)
}

/// The numbers below `count` in a random order.
pub fn shuffled(count: usize) -> Vec<usize> {
    let mut numbers: Vec<_> = (0..count).collect();
    rng().shuffle(&mut numbers);
    numbers
}

/// A number below `count`, which is at most 2^32, in the fewest steps.
#[inline]
pub fn below(rng: &mut Rng, count: usize) -> usize {
    ((rng.u32(..) as u64 * count as u64) >> 32) as usize
}

/// A block for a layout of at least a word.
#[inline]
pub fn allocate<A: GlobalAlloc>(allocator: &A, layout: Layout) -> *mut u8 {
    // SAFETY: the layout is not empty.
    let block = unsafe { allocator.alloc(layout) };
    if block.is_null() {
        out_of_memory();
    }
    // SAFETY: the block has room for a word, and is aligned to one.
    unsafe { block.cast::<usize>().write(block.addr()) };
    block
}

#[cold]
#[inline(never)]
fn out_of_memory() -> ! {
    panic!("out of memory")
}

/// Frees a block that is not used any more.
#[inline]
pub fn free<A: GlobalAlloc>(allocator: &A, block: *mut u8, layout: Layout) {
    // SAFETY: the workloads free each block once, with its layout.
    unsafe { allocator.dealloc(block, layout) };
}

/// Writes to each word of a block, as an owner does who needs all of it.
pub fn fill(block: *mut u8, layout: Layout) {
    for word in 0..layout.size() / 8 {
        // SAFETY: within the block.
        unsafe { block.cast::<usize>().add(word).write(block.addr()) };
    }
}
