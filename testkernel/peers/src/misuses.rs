//! The misuses, each of a fresh allocator.

use std::{ptr, sync::atomic::AtomicU64};

use crate::{
    run::{Run, layout},
    subjects::Subject,
};

/// A misuse.
pub(crate) struct Misuse<S> {
    /// Its rows in the table of faults.
    pub(crate) rows: &'static str,
    pub(crate) title: &'static str,
    pub(crate) commit: fn(&mut Run<S>),
}

/// All of them, the same for each allocator, but first none: what is seen then says nothing about misuse.
pub(crate) fn misuses<S: Subject>() -> [Misuse<S>; 23] {
    let misuse = |rows, title, commit| Misuse { rows, title, commit };
    [
        misuse("", "none, for comparison", |_| {}),
        misuse("1, 6", "double free, at once", double_free_at_once),
        misuse("2", "double free, after other frees", double_free_after_others),
        misuse("3", "double free, after the next allocation", double_free_after_reuse),
        misuse("7", "pointer into a block", inner_pointer),
        misuse("8", "misaligned pointer", misaligned_pointer),
        misuse("9", "block of another cache or instance", block_of_a_relative),
        misuse("10", "memory never allocated", never_allocated),
        misuse("11", "address on the stack", address_on_the_stack),
        misuse("11", "address of a static", address_of_a_static),
        misuse("11", "address that is not mapped", unmapped_address),
        misuse("12", "address that is not canonical", non_canonical_address),
        misuse("13", "address of the allocator's own data", own_data),
        misuse("14", "block whose memory went back", memory_that_went_back),
        misuse("15", "twice the size", wrong_size),
        misuse("15", "4 bytes more, in the same block", wrong_size_in_block),
        misuse("16", "larger alignment", wrong_alignment),
        misuse("17", "overflow by 1 byte", overflow_by_1),
        misuse("18", "overflow by 8 bytes", overflow_by_8),
        misuse("19", "underflow by 1 byte", underflow_by_1),
        misuse("20", "overflow by 1 byte, into slack", overflow_into_slack),
        misuse("22, 24", "write after free, first word", write_to_first_word),
        misuse("23", "write after free, a byte in the middle", write_to_middle),
    ]
}

fn double_free_at_once<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.free(block);
    run.bad_free(block.start, block.layout);
}

fn double_free_after_others<S: Subject>(run: &mut Run<S>) {
    let blocks = run.blocks();
    for number in [3, 1, 6] {
        run.free(blocks[number]);
    }
    run.bad_free(blocks[3].start, blocks[3].layout);
}

fn double_free_after_reuse<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.free(block);
    run.allocate(block.layout);
    run.bad_free(block.start, block.layout);
}

fn inner_pointer<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.bad_free(block.start.wrapping_add(16), block.layout);
}

fn misaligned_pointer<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.bad_free(block.start.wrapping_add(1), block.layout);
}

fn block_of_a_relative<S: Subject>(run: &mut Run<S>) {
    let layout = run.blocks()[3].layout;
    let block = run.subject.relatives(&run.other_memory, layout);
    run.bad_free(block, layout);
}

fn never_allocated<S: Subject>(run: &mut Run<S>) {
    let blocks = run.blocks();
    let stride = blocks[7].start.addr() - blocks[6].start.addr();
    run.bad_free(blocks[7].start.wrapping_add(2 * stride), blocks[7].layout);
}

fn address_on_the_stack<S: Subject>(run: &mut Run<S>) {
    let mut variable = [0_u64; 64];
    let layout = run.blocks()[3].layout;
    run.bad_free((&raw mut variable[16]).cast(), layout);
}

fn address_of_a_static<S: Subject>(run: &mut Run<S>) {
    static WORDS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
    let layout = run.blocks()[3].layout;
    run.bad_free(WORDS[16].as_ptr().cast(), layout);
}

fn unmapped_address<S: Subject>(run: &mut Run<S>) {
    let layout = run.blocks()[3].layout;
    run.bad_free(ptr::without_provenance_mut(0x1000), layout);
}

fn non_canonical_address<S: Subject>(run: &mut Run<S>) {
    let layout = run.blocks()[3].layout;
    run.bad_free(ptr::without_provenance_mut(1 << 60), layout);
}

fn own_data<S: Subject>(run: &mut Run<S>) {
    let blocks = run.blocks();
    let own_data = run.subject.own_data(&blocks);
    run.bad_free(own_data, blocks[3].layout);
}

fn memory_that_went_back<S: Subject>(run: &mut Run<S>) {
    let blocks = run.blocks();
    blocks.iter().for_each(|block| run.free(*block));
    run.subject.give_back();
    run.bad_free(blocks[3].start, blocks[3].layout);
}

fn wrong_size<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.free_as(block, layout(2 * S::SIZE, 8));
}

fn wrong_size_in_block<S: Subject>(run: &mut Run<S>) {
    run.blocks();
    let block = run.allocate(layout(S::SIZE - 4, 8));
    run.blocks();
    run.free_as(block, layout(S::SIZE, 8));
}

fn wrong_alignment<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.free_as(block, layout(S::SIZE, 128));
}

fn overflow_by_1<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    spoil(block.end(), 1);
    run.free(block);
}

fn overflow_by_8<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    spoil(block.end(), 8);
    run.free(block);
}

fn overflow_into_slack<S: Subject>(run: &mut Run<S>) {
    run.blocks();
    let block = run.allocate(layout(S::SIZE - 4, 8));
    run.blocks();
    spoil(block.end(), 1);
    run.free(block);
}

fn underflow_by_1<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    spoil(block.start.wrapping_sub(1), 1);
    run.free(block);
}

/// A link, as the program writes it that still takes the block for a node of its list.
fn write_to_first_word<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    let nodes = run.other_memory.start.wrapping_add(run.other_memory.bytes / 2);
    let node = |number: usize| nodes.wrapping_add(64 * number).cast::<*mut u8>();
    for number in 0..8 {
        // SAFETY: memory of this program's, which nobody uses.
        unsafe { node(number).write_bytes(0, 8) };
        // SAFETY: as above.
        unsafe { node(number).write(node(number + 1).cast()) };
    }
    run.free(block);
    // SAFETY: in the allocator's memory; nobody else runs.
    unsafe { block.start.cast::<*mut u8>().write_volatile(nodes) };
}

fn write_to_middle<S: Subject>(run: &mut Run<S>) {
    let block = run.blocks()[3];
    run.free(block);
    spoil(block.start.wrapping_add(S::SIZE / 2 + 3), 1);
}

/// Changes so many bytes.
fn spoil(start: *mut u8, bytes: usize) {
    for offset in 0..bytes {
        // SAFETY: in the allocator's memory, beside or in a block in its midst; nobody else runs.
        unsafe { start.add(offset).write_volatile(!start.add(offset).read_volatile()) };
    }
}
