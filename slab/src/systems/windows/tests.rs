//! The bullets of *Windows heaps*, one after the other.

use std::cell::Cell;
use std::vec::Vec;

use super::*;
use crate::testing::{Heap, Machine, Threads};

const START: u64 = 64 << 20;
const FRAMES: usize = if cfg!(miri) { 1024 } else { 2048 };

std::thread_local! {
    static LAST_ERROR: Cell<u32> = const { Cell::new(0) };
    static RAISED: Cell<u32> = const { Cell::new(0) };
}

fn heaps<P: Platform>(parent: &crate::Heap<P>) -> WindowsHeaps<'_, P> {
    WindowsHeaps::new(parent, |error| LAST_ERROR.set(error), |code| RAISED.set(code))
}

/// The last error, and none from now on.
fn last_error() -> u32 {
    LAST_ERROR.replace(0)
}

fn raised() -> u32 {
    RAISED.replace(0)
}

fn destroy<P: Platform>(windows: &WindowsHeaps<'_, P>, heap: Handle) -> bool {
    // SAFETY: no test uses what it has destroyed.
    unsafe { windows.heap_destroy(heap) }
}

fn free<P: Platform>(windows: &WindowsHeaps<'_, P>, heap: Handle, block: *mut c_void) -> bool {
    // SAFETY: no test uses what it has freed.
    unsafe { windows.heap_free(heap, 0, block) }
}

fn realloc<P: Platform>(
    windows: &WindowsHeaps<'_, P>,
    heap: Handle,
    flags: u32,
    block: *mut c_void,
    bytes: usize,
) -> *mut c_void {
    // SAFETY: no test uses a block that has moved.
    unsafe { windows.heap_realloc(heap, flags, block, bytes) }
}

fn fill(block: *mut c_void, bytes: usize, value: u8) {
    // SAFETY: the callers have a block with so many bytes.
    unsafe { block.cast::<u8>().write_bytes(value, bytes) };
}

fn holds(block: *mut c_void, from: usize, to: usize, value: u8) -> bool {
    // SAFETY: as above.
    let bytes = unsafe { core::slice::from_raw_parts(block.cast::<u8>(), to) };
    bytes[from..].iter().all(|byte| *byte == value)
}

fn walk<P: Platform>(windows: &WindowsHeaps<'_, P>, heap: Handle) -> Vec<(*mut c_void, u32)> {
    let mut entry = ProcessHeapEntry::START;
    let mut found = Vec::new();
    while windows.heap_walk(heap, &mut entry) {
        assert_eq!((entry.flags, entry.region), (PROCESS_HEAP_ENTRY_BUSY, 0));
        found.push((entry.data, entry.size));
    }
    assert_eq!(last_error(), ERROR_NO_MORE_ITEMS);
    found
}

#[test]
fn heap_create_rounds_up_to_pages_and_a_maximum_is_a_hard_cap() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 1, (256 << 10) - 100);
    let mut blocks = Vec::new();
    loop {
        let block = windows.heap_alloc(heap, 0, 8000);
        if block.is_null() {
            break;
        }
        blocks.push(block);
    }
    assert!((16..=32).contains(&blocks.len()), "{}", blocks.len());
    let control = windows.heaps.find(heap).unwrap();
    let most = (256 << 10) + for_records(256 << 10);
    assert!((200 << 10..=most).contains(&control.heap.size()), "{}", control.heap.size());
    assert!(parent.available() > 1 << 20, "its parent has more");
    assert!(free(&windows, heap, blocks.pop().unwrap()));
    assert!(!windows.heap_alloc(heap, 0, 8000).is_null());
    assert!(windows.heap_validate(heap, 0, ptr::null()));
}

#[test]
fn a_heap_with_a_cap_of_a_few_pages_serves_about_so_many() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    for pages in (1..=8).chain([12, 16, 31]) {
        for (initial, size) in [(0, 100), (1, 1000), (pages * FRAME_SIZE, 1000), (0, 4000)] {
            let heap = windows.heap_create(0, initial, pages * FRAME_SIZE);
            let blocks = (0..1 << 12).take_while(|_| !windows.heap_alloc(heap, 0, size).is_null()).count();
            let served = (blocks * (size + SIZE_WORD)).div_ceil(FRAME_SIZE);
            let expected = pages - 1 - pages / 8..=pages + for_records(pages * FRAME_SIZE) / FRAME_SIZE;
            assert!(blocks > 0 && expected.contains(&served), "{pages} pages: {served}, blocks of {size}");
            assert!(windows.heap_validate(heap, 0, ptr::null()) && destroy(&windows, heap));
        }
    }
}

#[test]
fn heap_create_without_a_maximum_grows() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap_on::<Threads>();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let blocks: Vec<_> = (0..8).map(|_| windows.heap_alloc(heap, 0, 200_000)).collect();
    assert!(blocks.iter().all(|block| !block.is_null()));
    assert!(windows.heaps.find(heap).unwrap().heap.size() > 1_600_000);
}

#[test]
fn heap_create_has_its_initial_size_from_the_start() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let before = parent.available();
    let heap = windows.heap_create(0, 1 << 20, 0);
    assert!(!heap.is_null() && parent.available() <= before - (1 << 20));
    let capped = windows.heap_create(0, 1 << 20, 1 << 20);
    assert!(!capped.is_null());
    assert!(destroy(&windows, heap) && destroy(&windows, capped));
    parent.shrink();
    assert_eq!(parent.available(), before);
}

#[test]
fn heap_create_that_fails_returns_null_and_sets_the_last_error() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let before = parent.available();
    let create = |initial, maximum| (windows.heap_create(0, initial, maximum), last_error());
    assert_eq!(create(2 << 20, 1 << 20), (ptr::null_mut(), ERROR_INVALID_PARAMETER));
    for (initial, maximum) in [(64 << 20, 0), (64 << 20, 128 << 20), (usize::MAX, 0), (0, usize::MAX)] {
        assert_eq!(create(initial, maximum), (ptr::null_mut(), ERROR_NOT_ENOUGH_MEMORY), "{initial} {maximum}");
    }
    let without_memory = Heap::new();
    assert!(heaps(&without_memory).heap_create(0, 0, 0).is_null());
    assert_eq!(last_error(), ERROR_NOT_ENOUGH_MEMORY);
    parent.shrink();
    assert_eq!(parent.available(), before);
}

#[test]
fn heap_alloc_that_fails_returns_null_and_leaves_the_last_error() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    LAST_ERROR.set(77);
    for bytes in [64 << 20, 2 << 30, isize::MAX as usize, usize::MAX, usize::MAX - 7] {
        assert!(windows.heap_alloc(heap, 0, bytes).is_null(), "{bytes}");
    }
    assert!(windows.heap_alloc(ptr::without_provenance_mut(16), 0, 8).is_null());
    assert_eq!((last_error(), raised()), (77, 0));
}

#[test]
fn zero_memory_is_zero() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(NO_SERIALIZE, 0, 0);
    for bytes in [100, 9000] {
        let dirty = windows.heap_alloc(heap, NO_SERIALIZE, bytes);
        fill(dirty, bytes, 0xff);
        assert!(free(&windows, heap, dirty));
        let block = windows.heap_alloc(heap, ZERO_MEMORY, bytes);
        assert!(holds(block, 0, bytes, 0));
        assert!(free(&windows, heap, block));
    }
}

#[test]
fn generate_exceptions_calls_the_embedder() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 256 << 10);
    assert!(windows.heap_alloc(heap, GENERATE_EXCEPTIONS, 300 << 10).is_null());
    assert_eq!(raised(), STATUS_NO_MEMORY);
    assert!(windows.heap_alloc(heap, 0, 300 << 10).is_null());
    assert_eq!(raised(), 0);
    let block = windows.heap_alloc(heap, 0, 100);
    assert!(realloc(&windows, heap, GENERATE_EXCEPTIONS, block, 300 << 10).is_null());
    assert_eq!(raised(), STATUS_NO_MEMORY);
    let inside = block.wrapping_byte_add(16);
    assert!(realloc(&windows, heap, GENERATE_EXCEPTIONS, inside, 100).is_null());
    assert_eq!((raised(), last_error()), (STATUS_ACCESS_VIOLATION, ERROR_INVALID_PARAMETER));
}

#[test]
fn flags_given_at_creation_apply_to_every_call() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(GENERATE_EXCEPTIONS | NO_SERIALIZE, 0, 256 << 10);
    assert!(windows.heap_alloc(heap, 0, 300 << 10).is_null());
    assert_eq!(raised(), STATUS_NO_MEMORY);
    let block = windows.heap_alloc(heap, 0, 100);
    assert!(realloc(&windows, heap, 0, block, 300 << 10).is_null());
    assert_eq!(raised(), STATUS_NO_MEMORY);
    assert!(free(&windows, heap, block));
}

#[test]
fn zero_bytes_give_a_valid_pointer() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let [one, other] = [windows.heap_alloc(heap, 0, 0), windows.heap_alloc(heap, 0, 0)];
    assert!(!one.is_null() && !other.is_null() && one != other);
    assert_eq!(windows.heap_size(heap, 0, one), 0);
    assert!(free(&windows, heap, one) && free(&windows, heap, other));
}

#[test]
fn a_capped_heap_refuses_0x7fff8_bytes_and_more() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let capped = windows.heap_create(0, 0, 4 << 20);
    let block = windows.heap_alloc(capped, 0, 0x7_fff7);
    assert!(!block.is_null());
    for bytes in [0x7_fff8, 0x7_fff9, 1 << 20] {
        assert!(windows.heap_alloc(capped, 0, bytes).is_null());
        assert!(realloc(&windows, capped, 0, block, bytes).is_null());
    }
    assert_eq!(windows.heap_size(capped, 0, block), 0x7_fff7);
    assert!(free(&windows, capped, block));
    let growing = windows.heap_create(0, 0, 0);
    assert!(!windows.heap_alloc(growing, 0, 0x7_fff8).is_null());
}

#[test]
fn heap_realloc_keeps_the_smaller_of_the_two_sizes() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let mut block = windows.heap_alloc(heap, 0, 10);
    fill(block, 10, 5);
    let mut held = 10;
    for bytes in [11, 100, 9000, 100_000, 20_000, 400, 16, 0, 50] {
        block = realloc(&windows, heap, 0, block, bytes);
        assert!(holds(block, 0, held.min(bytes), 5), "{bytes}");
        assert_eq!(windows.heap_size(heap, 0, block), bytes);
        fill(block, bytes, 5);
        held = bytes;
    }
    assert_eq!(walk(&windows, heap), [(block, 50)]);
}

#[test]
fn heap_realloc_with_zero_memory_zeroes_only_the_growth() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let mut block = windows.heap_alloc(heap, 0, 10);
    fill(block, 10, 5);
    let mut held = 10;
    for bytes in [12, 20, 100, 9000, 15_000, 40_000] {
        block = realloc(&windows, heap, ZERO_MEMORY, block, bytes);
        assert!(holds(block, 0, held, 5) && holds(block, held, bytes, 0), "{bytes}");
        fill(block, bytes, 5);
        held = bytes;
    }
}

#[test]
fn heap_realloc_in_place_only_fails_rather_than_moves() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let block = windows.heap_alloc(heap, 0, 100);
    fill(block, 100, 5);
    assert!(realloc(&windows, heap, REALLOC_IN_PLACE_ONLY, block, 5000).is_null());
    assert!(holds(block, 0, 100, 5) && windows.heap_size(heap, 0, block) == 100);
    for bytes in [10, 101, 0, 104] {
        let resized = realloc(&windows, heap, REALLOC_IN_PLACE_ONLY, block, bytes);
        assert!(resized == block || resized.is_null() && bytes > 10, "{bytes}");
    }
    assert!(windows.heap_validate(heap, 0, ptr::null()));
    let large = windows.heap_alloc(heap, 0, 50_000);
    fill(large, 50_000, 6);
    for bytes in [20_000, 50_000, 10] {
        assert_eq!(realloc(&windows, heap, REALLOC_IN_PLACE_ONLY, large, bytes), large, "{bytes}");
        assert_eq!(windows.heap_size(heap, 0, large), bytes);
        assert!(holds(large, 0, bytes.min(20_000), 6));
    }
    assert!(windows.heap_validate(heap, 0, ptr::null()));
}

#[test]
fn heap_realloc_that_fails_leaves_the_original_intact() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let block = windows.heap_alloc(heap, 0, 100);
    fill(block, 100, 5);
    for bytes in [64 << 20, usize::MAX, isize::MAX as usize] {
        assert!(realloc(&windows, heap, 0, block, bytes).is_null());
    }
    assert!(holds(block, 0, 100, 5) && windows.heap_size(heap, 0, block) == 100);
    assert_eq!(last_error(), 0);
    assert!(realloc(&windows, heap, 0, ptr::null_mut(), 10).is_null());
    assert_eq!(last_error(), ERROR_INVALID_PARAMETER);
}

#[test]
fn heap_free_says_whether_it_was_a_block_and_null_is_allowed() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let [heap, other] = [windows.heap_create(0, 0, 0), windows.heap_create(0, 0, 0)];
    let block = windows.heap_alloc(heap, 0, 100);
    assert!(free(&windows, heap, ptr::null_mut()));
    assert_eq!(last_error(), 0);
    let on_stack = 0_u64;
    let no_blocks = [block.wrapping_byte_add(16), (&raw const on_stack).cast_mut().cast(), ptr::dangling_mut()];
    for no_block in no_blocks {
        assert!(!free(&windows, heap, no_block));
        assert_eq!(last_error(), ERROR_INVALID_PARAMETER);
    }
    assert!(!free(&windows, other, block), "of another heap");
    assert_eq!(last_error(), ERROR_INVALID_PARAMETER);
    assert!(!free(&windows, ptr::dangling_mut(), block));
    assert_eq!(last_error(), ERROR_INVALID_HANDLE);
    assert!(free(&windows, heap, block) && !free(&windows, heap, block));
    assert_eq!((last_error(), parent.faults()), (ERROR_INVALID_PARAMETER, 0));
}

#[test]
fn heap_size_is_the_requested_size_or_minus_1() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    for bytes in (0..150).chain([1000, 4089, 8184, 8185, 8192, 8193, 60_001]) {
        let block = windows.heap_alloc(heap, 0, bytes);
        fill(block, bytes, 0xff);
        assert_eq!(windows.heap_size(heap, 0, block), bytes);
        assert!(block.addr().is_multiple_of(16));
        assert!(free(&windows, heap, block));
        assert_eq!(windows.heap_size(heap, 0, block), usize::MAX);
    }
    for no_block in [ptr::null(), ptr::dangling(), ptr::without_provenance(usize::MAX)] {
        assert_eq!(windows.heap_size(heap, 0, no_block), usize::MAX);
    }
    assert_eq!(windows.heap_size(ptr::null_mut(), 0, ptr::null()), usize::MAX);
}

#[test]
fn heap_validate_of_null_checks_the_whole_heap() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    let blocks: Vec<_> = (0..10).map(|_| windows.heap_alloc(heap, 0, 104)).collect();
    assert!(windows.heap_validate(heap, 0, ptr::null()));
    assert!(windows.heap_validate(heap, 0, blocks[3]));
    assert!(!windows.heap_validate(heap, 0, blocks[3].wrapping_byte_add(16)));
    // SAFETY: the byte behind its 104 is still the block's.
    unsafe { blocks[3].cast::<u8>().add(104 + 7).write(0xa5) };
    assert!(!windows.heap_validate(heap, 0, blocks[3]) && windows.heap_validate(heap, 0, blocks[4]));
    assert!(!windows.heap_validate(heap, 0, ptr::null()));
    assert_eq!(windows.heap_size(heap, 0, blocks[3]), usize::MAX);
    assert!(free(&windows, heap, blocks[3]), "it can be freed all the same");
    assert!(windows.heap_validate(heap, 0, ptr::null()));
    assert!(!windows.heap_validate(ptr::null_mut(), 0, ptr::null()));
}

#[test]
fn heap_walk_has_one_block_a_call_and_ends_with_no_more_items() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let [heap, other] = [windows.heap_create(0, 0, 0), windows.heap_create(0, 0, 0)];
    assert_eq!(walk(&windows, heap), []);
    let sizes = [0, 1, 100, 100, 5000, 20_000, 8192];
    let mut blocks: Vec<_> = sizes.iter().map(|&size| (windows.heap_alloc(heap, 0, size), size as u32)).collect();
    assert!(!windows.heap_alloc(other, 0, 100).is_null());
    blocks.sort();
    assert_eq!(walk(&windows, heap), blocks);
    let (freed, _) = blocks.remove(3);
    assert!(free(&windows, heap, freed));
    // Two walks at once, each with its own state.
    let [mut one, mut two] = [ProcessHeapEntry::START; 2];
    assert!(windows.heap_walk(heap, &mut one) && windows.heap_walk(heap, &mut one));
    assert!(windows.heap_walk(heap, &mut two));
    assert_eq!((one.data, two.data), (blocks[1].0, blocks[0].0));
    assert_eq!(walk(&windows, heap), blocks);
    assert!(!windows.heap_walk(ptr::null_mut(), &mut one));
    assert_eq!(last_error(), ERROR_INVALID_HANDLE);
    assert_eq!(size_of::<ProcessHeapEntry>(), 40);
}

#[test]
fn heap_destroy_frees_everything_and_refuses_the_process_heap() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap_on::<Threads>();
    let windows = heaps(&parent);
    let process = windows.get_process_heap();
    assert!(!process.is_null() && process == windows.get_process_heap());
    parent.shrink();
    let before = parent.available();
    let heaps: Vec<_> = (0..3).map(|_| windows.heap_create(0, 0, 0)).collect();
    for heap in &heaps {
        assert!((0..50).all(|block| !windows.heap_alloc(*heap, 0, block * 100).is_null()));
    }
    for index in [1, 2, 0] {
        assert!(destroy(&windows, heaps[index]) && !destroy(&windows, heaps[index]));
        assert_eq!(last_error(), ERROR_INVALID_HANDLE);
    }
    parent.shrink();
    assert_eq!(parent.available(), before);
    assert!(!destroy(&windows, process));
    assert_eq!(last_error(), ERROR_INVALID_HANDLE);
    let block = windows.heap_alloc(process, 0, 100);
    assert!(!block.is_null() && free(&windows, process, block));
    assert!(!destroy(&windows, ptr::null_mut()));
    assert_eq!(parent.verify(), Ok(()));
}

#[test]
fn blocks_with_checks_have_their_sizes_too() {
    let machine = Machine::new(START, FRAMES);
    let parent = machine.heap();
    let windows = heaps(&parent);
    let heap = windows.heap_create(0, 0, 0);
    windows.heaps.find(heap).unwrap().heap.set_checks("*:redzone,poison").unwrap();
    let blocks: Vec<_> = [0, 1, 101, 7000].map(|size| (windows.heap_alloc(heap, 0, size), size)).into();
    for &(block, size) in &blocks {
        fill(block, size, 1);
        assert_eq!(windows.heap_size(heap, 0, block), size);
    }
    assert!(windows.heap_validate(heap, 0, ptr::null()));
    assert_eq!(walk(&windows, heap).len(), 4);
    assert!(blocks.into_iter().all(|(block, _)| free(&windows, heap, block)));
}
