//! Windows' heaps: the Win32 reference, `heapapi.h`.

use alloc::vec::Vec;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use kernel::heap::HEAP;
use kslab::systems::windows::{
    ERROR_INVALID_HANDLE, ERROR_INVALID_PARAMETER, ERROR_NO_MORE_ITEMS, ERROR_NOT_ENOUGH_MEMORY, GENERATE_EXCEPTIONS,
    Handle, NO_SERIALIZE, NO_SIZE, PROCESS_HEAP_ENTRY_BUSY, ProcessHeapEntry, REALLOC_IN_PLACE_ONLY,
    STATUS_ACCESS_VIOLATION, STATUS_NO_MEMORY, ZERO_MEMORY,
};

use super::super::support::{PAGE, frames, give_back, take_all, unchanged};
use super::{bytes, c, exception, fill, holds, last_error, on_four_threads};
use crate::guest::runner::test;

/// A heap of its own for `body`, which is destroyed with all that was allocated from it.
fn with_heap(options: u32, maximum: usize, body: impl FnOnce(Handle)) {
    unchanged(|| {
        let heap = c::HeapCreate(options, 0, maximum);
        assert!(!heap.is_null());
        body(heap);
        assert_ne!(destroy(heap), 0);
    });
}

fn destroy(heap: Handle) -> i32 {
    // SAFETY: no test uses what it has destroyed.
    unsafe { c::HeapDestroy(heap) }
}

fn alloc(heap: Handle, size: usize) -> *mut c_void {
    c::HeapAlloc(heap, 0, size)
}

fn realloc(heap: Handle, flags: u32, block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: no test uses a block that has moved.
    unsafe { c::HeapReAlloc(heap, flags, block, size) }
}

fn free(heap: Handle, block: *mut c_void) -> i32 {
    // SAFETY: no test uses what it has freed.
    unsafe { c::HeapFree(heap, 0, block) }
}

fn size(heap: Handle, block: *mut c_void) -> usize {
    c::HeapSize(heap, 0, block)
}

fn walk(heap: Handle, entry: &mut ProcessHeapEntry) -> i32 {
    // SAFETY: an entry of our own.
    unsafe { c::HeapWalk(heap, entry) }
}

test!(heap_create_rounds_up_to_pages_and_grows_or_is_capped_or_fails_with_a_last_error);
/// *`HeapCreate(opts, initial, max)`: sizes round up to pages. max = 0 grows; otherwise a hard cap. Failure: NULL + last
/// error.*
fn heap_create_rounds_up_to_pages_and_grows_or_is_capped_or_fails_with_a_last_error() {
    unchanged(|| {
        let before = frames().free_bytes();
        let initial = c::HeapCreate(0, (1 << 20) - PAGE + 1, 0);
        assert!(before - frames().free_bytes() >= 1 << 20, "it has its initial size from the start");
        assert_ne!(destroy(initial), 0);
        // A byte less than a cap of 65 pages is the same cap.
        let most = |maximum| {
            let heap = c::HeapCreate(0, 0, maximum);
            let blocks = (0..1000).take_while(|_| !alloc(heap, 1000).is_null()).count();
            assert_ne!(destroy(heap), 0);
            blocks
        };
        let (even, odd, less) = (most(65 * PAGE), most(65 * PAGE - 4095), most(48 * PAGE));
        assert_eq!(even, odd);
        assert!((100..=65 * PAGE / 1000).contains(&even) && less < even, "{even} blocks, or {less}");
        // One of a page serves, too, and not much more than that.
        assert!((3..=6 * PAGE / 1000).contains(&most(1)), "{} blocks", most(1));
        let growing = c::HeapCreate(0, 0, 0);
        assert!((0..1000).all(|_| !alloc(growing, 1000).is_null()));
        assert!(!alloc(growing, 3 << 20).is_null());
        assert_ne!(destroy(growing), 0);
        assert_eq!(last_error(), 0);
        for (initial, maximum, error) in [
            (2 << 20, 1 << 20, ERROR_INVALID_PARAMETER),
            (usize::MAX, 0, ERROR_NOT_ENOUGH_MEMORY),
            (0, usize::MAX, ERROR_NOT_ENOUGH_MEMORY),
            (frames().free_bytes() + PAGE, 0, ERROR_NOT_ENOUGH_MEMORY),
        ] {
            assert_eq!((c::HeapCreate(0, initial, maximum), last_error()), (ptr::null_mut(), error));
        }
    });
}

test!(heap_alloc_that_fails_is_null_without_a_last_error_and_its_flags_do_what_they_say);
/// *`HeapAlloc`: NULL on failure, last error not set. ZERO_MEMORY = 8, NO_SERIALIZE = 1, GENERATE_EXCEPTIONS = 4,
/// REALLOC_IN_PLACE_ONLY = 0x10.*
fn heap_alloc_that_fails_is_null_without_a_last_error_and_its_flags_do_what_they_say() {
    assert_eq!((NO_SERIALIZE, GENERATE_EXCEPTIONS, ZERO_MEMORY, REALLOC_IN_PLACE_ONLY), (1, 4, 8, 0x10));
    with_heap(0, 0, |heap| {
        assert!(alloc(heap, usize::MAX).is_null() && alloc(heap, isize::MAX as usize).is_null());
        let all = take_all();
        let without_memory = (alloc(heap, 1 << 20), c::HeapAlloc(heap, GENERATE_EXCEPTIONS, 1 << 20));
        give_back(all);
        assert_eq!(without_memory, (ptr::null_mut(), ptr::null_mut()));
        assert_eq!((last_error(), exception()), (0, STATUS_NO_MEMORY));
        for size in [100, 5000, 50_000] {
            let dirty = c::HeapAlloc(heap, NO_SERIALIZE, size);
            fill(dirty, size, 0xff);
            assert_ne!(free(heap, dirty), 0);
            let zeroed = c::HeapAlloc(heap, ZERO_MEMORY, size);
            assert!(holds(zeroed, size, 0), "{size}");
        }
        // It moves unless it must not.
        let block = alloc(heap, 100);
        assert!(realloc(heap, REALLOC_IN_PLACE_ONLY, block, 5000).is_null());
        assert!(!realloc(heap, 0, block, 5000).is_null());
    });
}

test!(flags_given_at_creation_apply_and_zero_bytes_are_valid_and_a_capped_heap_has_no_large_blocks);
/// *NO_SERIALIZE and GENERATE_EXCEPTIONS given at creation apply to every call. Zero bytes gives a valid pointer. On a capped
/// heap a request of 0x7FFF8 bytes or more fails.*
fn flags_given_at_creation_apply_and_zero_bytes_are_valid_and_a_capped_heap_has_no_large_blocks() {
    with_heap(NO_SERIALIZE | GENERATE_EXCEPTIONS, 2 << 20, |heap| {
        let [one, other] = [alloc(heap, 0), alloc(heap, 0)];
        assert!(!one.is_null() && !other.is_null() && one != other);
        assert_eq!((size(heap, one), exception()), (0, 0));
        assert!(!alloc(heap, 0x7_fff7).is_null());
        for bytes in [0x7_fff8, 0x7_fff9, 1 << 20] {
            assert!(alloc(heap, bytes).is_null(), "{bytes:#x}");
            assert_eq!(exception(), STATUS_NO_MEMORY);
            assert!(realloc(heap, 0, one, bytes).is_null(), "{bytes:#x}");
            assert_eq!(exception(), STATUS_NO_MEMORY);
        }
        assert!(realloc(heap, 0, one.wrapping_byte_add(8), 8).is_null());
        assert_eq!((exception(), last_error()), (STATUS_ACCESS_VIOLATION, ERROR_INVALID_PARAMETER));
    });
    with_heap(0, 0, |heap| assert!(!alloc(heap, 0x7_fff8).is_null(), "it has no cap"));
}

test!(heap_realloc_keeps_the_smaller_size_and_zeroes_the_growth_and_a_failure_leaves_the_block);
/// *`HeapReAlloc` keeps min(old, new) bytes; ZERO_MEMORY zeroes only the growth; IN_PLACE_ONLY fails rather than moves; a
/// failure leaves the original intact.*
fn heap_realloc_keeps_the_smaller_size_and_zeroes_the_growth_and_a_failure_leaves_the_block() {
    with_heap(0, 0, |heap| {
        let mut block = alloc(heap, 30);
        fill(block, 30, 9);
        let mut held = 30;
        for wanted in [31, 500, 20_000, 300_000, 299_999, 9000, 17, 4000, 0, 64] {
            block = realloc(heap, ZERO_MEMORY, block, wanted);
            assert_eq!(size(heap, block), wanted);
            let (old, new) = bytes(block, wanted).split_at(held.min(wanted));
            assert!(old.iter().all(|&byte| byte == 9) && new.iter().all(|&byte| byte == 0), "{held} to {wanted}");
            fill(block, wanted, 9);
            held = wanted;
        }
        assert!(realloc(heap, REALLOC_IN_PLACE_ONLY, block, 3000).is_null());
        assert_eq!(realloc(heap, REALLOC_IN_PLACE_ONLY, block, 33), block);
        let all = take_all();
        let moved = realloc(heap, 0, block, 1 << 20);
        give_back(all);
        assert!(moved.is_null() && realloc(heap, 0, block, usize::MAX).is_null());
        assert!(holds(block, 33, 9) && size(heap, block) == 33);
        assert_eq!(last_error(), 0);
    });
}

test!(heap_free_takes_blocks_and_null_and_heap_size_is_what_was_requested);
/// *`HeapFree`: nonzero on success, NULL allowed. `HeapSize`: the requested size, or (SIZE_T)-1.*
fn heap_free_takes_blocks_and_null_and_heap_size_is_what_was_requested() {
    with_heap(0, 0, |heap| {
        for wanted in (0..100).chain([1000, 8184, 8185, 65_536, 1 << 20]) {
            let block = alloc(heap, wanted);
            fill(block, wanted, 0xff);
            assert_eq!(size(heap, block), wanted);
            assert_ne!(free(heap, block), 0);
            assert_eq!((size(heap, block), NO_SIZE), (NO_SIZE, usize::MAX));
        }
        assert_eq!((free(heap, ptr::null_mut()), last_error()), (1, 0));
        let (block, reported) = (alloc(heap, 100), HEAP.faults());
        // Of the kernel's heap, of no heap, inside a block, and in no memory.
        let kernels = alloc::boxed::Box::into_raw(alloc::boxed::Box::new([0_u64; 16]));
        let none =
            [kernels.cast(), (&raw const block).cast_mut().cast(), block.wrapping_byte_add(8), ptr::dangling_mut()];
        for none in none {
            assert_eq!((free(heap, none), last_error()), (0, ERROR_INVALID_PARAMETER));
            assert_eq!(size(heap, none), NO_SIZE);
        }
        // SAFETY: from a box, and not freed above.
        drop(unsafe { alloc::boxed::Box::from_raw(kernels) });
        assert_eq!((free(ptr::dangling_mut(), block), last_error()), (0, ERROR_INVALID_HANDLE));
        assert_eq!((free(heap, block), free(heap, block)), (1, 0));
        assert_eq!(HEAP.faults(), reported, "none of it was reported");
        last_error();
    });
}

test!(heap_validate_of_null_checks_the_whole_heap);
/// *`HeapValidate(h, flags, NULL)` checks the whole heap.*
fn heap_validate_of_null_checks_the_whole_heap() {
    with_heap(0, 0, |heap| {
        let blocks: Vec<_> = (0..40).map(|index| alloc(heap, 100 + index * 50)).collect();
        assert_ne!(c::HeapValidate(heap, 0, ptr::null()), 0);
        assert_eq!(c::HeapValidate(heap, 0, blocks[7].wrapping_byte_add(16)), 0);
        let damaged = alloc(heap, 104);
        // SAFETY: behind what was asked for there are bytes of the block.
        unsafe { damaged.cast::<u8>().add(104 + 7).write(0xa5) };
        assert_eq!((c::HeapValidate(heap, 0, damaged), c::HeapValidate(heap, 0, ptr::null())), (0, 0));
        assert_ne!(c::HeapValidate(heap, 0, blocks[7]), 0);
        assert_ne!(free(heap, damaged), 0);
        assert_ne!(c::HeapValidate(heap, 0, ptr::null()), 0);
        assert_eq!(c::HeapValidate(ptr::null_mut(), 0, ptr::null()), 0);
    });
}

test!(heap_walk_has_one_block_a_call_and_its_state_in_the_entry);
/// *`HeapWalk`: starts with a NULL entry, one block a call, ends with FALSE and ERROR_NO_MORE_ITEMS; state is in the entry.*
fn heap_walk_has_one_block_a_call_and_its_state_in_the_entry() {
    with_heap(0, 0, |heap| {
        let sizes = [0, 1, 90, 700, 5000, 9000, 100_000];
        let mut blocks: Vec<_> = sizes.iter().map(|&size| (alloc(heap, size), size)).collect();
        blocks.sort_unstable();
        // The second walk is always a step behind.
        let [mut one, mut two] = [ProcessHeapEntry::START; 2];
        let mut found = Vec::new();
        while walk(heap, &mut one) != 0 {
            assert_eq!((one.flags, one.region), (PROCESS_HEAP_ENTRY_BUSY, 0));
            found.last().into_iter().for_each(|&last| {
                assert_ne!(walk(heap, &mut two), 0);
                assert_eq!((two.data, two.size as usize), last);
            });
            found.push((one.data, one.size as usize));
        }
        assert_eq!(last_error(), ERROR_NO_MORE_ITEMS);
        found.sort_unstable();
        assert_eq!(found, blocks);
        assert_eq!((walk(ptr::null_mut(), &mut one), last_error()), (0, ERROR_INVALID_HANDLE));
    });
}

test!(heap_destroy_frees_everything_and_refuses_the_process_heap);
/// *`HeapDestroy` frees everything without individual frees; it refuses the process heap.*
fn heap_destroy_frees_everything_and_refuses_the_process_heap() {
    let process = c::GetProcessHeap();
    assert!(!process.is_null() && process == c::GetProcessHeap());
    unchanged(|| {
        let heaps: Vec<_> = (0..4).map(|_| c::HeapCreate(0, 0, 0)).collect();
        for (number, &heap) in heaps.iter().enumerate() {
            assert!((0..100).all(|index| !alloc(heap, index * 40 * (number + 1)).is_null()));
        }
        for index in [2, 0, 3, 1] {
            assert_eq!((destroy(heaps[index]), destroy(heaps[index])), (1, 0));
            assert_eq!(last_error(), ERROR_INVALID_HANDLE);
        }
    });
    assert_eq!((destroy(process), last_error()), (0, ERROR_INVALID_HANDLE));
    let block = alloc(process, 100);
    assert_ne!(free(process, block), 0);
}

test!(a_heap_serves_four_threads);
/// *`HeapAlloc`: NULL on failure, last error not set*, where four CPUs share a heap, and each has its own last error.
fn a_heap_serves_four_threads() {
    static HEAP: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    fn work(thread: usize) -> u32 {
        let heap = HEAP.load(Ordering::Acquire);
        for round in 0..60 {
            let blocks: Vec<_> = (0..20).map(|index| (alloc(heap, index * 60 + round), index * 60 + round)).collect();
            blocks.iter().for_each(|&(block, bytes)| fill(block, bytes, thread as u8));
            for (block, bytes) in blocks {
                assert!(holds(block, bytes, thread as u8) && size(heap, block) == bytes);
                assert_ne!(free(heap, block), 0);
            }
        }
        if thread == 1 {
            assert_eq!(free(heap, ptr::dangling_mut()), 0);
        }
        last_error()
    }
    // The page tables of the stacks stay.
    on_four_threads(|_| ());
    with_heap(0, 0, |heap| {
        HEAP.store(heap, Ordering::Release);
        assert_eq!(on_four_threads(work), [0, ERROR_INVALID_PARAMETER, 0, 0]);
        assert_ne!(c::HeapValidate(heap, 0, ptr::null()), 0);
    });
}
