//! The functions of `kslab.h`, as C code sees them.
//!
//! Those that C may call at any time are safe. The others free: no test uses what it has freed.

use core::ffi::{c_char, c_int, c_uint, c_void};

use kslab::systems::malloc::Mallinfo2;
use kslab::systems::windows::ProcessHeapEntry;
use kslab::systems::zones::{Range, Statistics};

pub(super) type Handle = *mut c_void;
pub(super) type Recorder = extern "C" fn(*mut c_void, c_uint, *const Range, c_uint);

// SAFETY: the parent module makes them, with these types.
unsafe extern "C" {
    pub(super) safe fn malloc(size: usize) -> *mut c_void;
    pub(super) fn free(block: *mut c_void);
    pub(super) safe fn calloc(count: usize, size: usize) -> *mut c_void;
    pub(super) fn realloc(block: *mut c_void, size: usize) -> *mut c_void;
    pub(super) fn reallocarray(block: *mut c_void, count: usize, size: usize) -> *mut c_void;
    pub(super) safe fn memalign(alignment: usize, size: usize) -> *mut c_void;
    pub(super) safe fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void;
    pub(super) fn posix_memalign(place: *mut *mut c_void, alignment: usize, size: usize) -> c_int;
    pub(super) safe fn valloc(size: usize) -> *mut c_void;
    pub(super) safe fn pvalloc(size: usize) -> *mut c_void;
    pub(super) safe fn malloc_usable_size(block: *mut c_void) -> usize;
    pub(super) safe fn mallinfo2() -> Mallinfo2;
    pub(super) safe fn malloc_trim(pad: usize) -> c_int;
}

// SAFETY: as above.
unsafe extern "system" {
    pub(super) safe fn HeapCreate(options: u32, initial: usize, maximum: usize) -> Handle;
    pub(super) fn HeapDestroy(heap: Handle) -> c_int;
    pub(super) safe fn GetProcessHeap() -> Handle;
    pub(super) safe fn HeapAlloc(heap: Handle, flags: u32, bytes: usize) -> *mut c_void;
    pub(super) fn HeapReAlloc(heap: Handle, flags: u32, block: *mut c_void, bytes: usize) -> *mut c_void;
    pub(super) fn HeapFree(heap: Handle, flags: u32, block: *mut c_void) -> c_int;
    pub(super) safe fn HeapSize(heap: Handle, flags: u32, block: *const c_void) -> usize;
    pub(super) safe fn HeapValidate(heap: Handle, flags: u32, block: *const c_void) -> c_int;
    pub(super) fn HeapWalk(heap: Handle, entry: *mut ProcessHeapEntry) -> c_int;
}

// SAFETY: as above.
unsafe extern "C" {
    pub(super) safe fn malloc_default_zone() -> Handle;
    pub(super) safe fn malloc_create_zone(start_size: usize, flags: c_uint) -> Handle;
    pub(super) fn malloc_destroy_zone(zone: Handle);
    pub(super) safe fn malloc_zone_register(zone: Handle);
    pub(super) safe fn malloc_zone_unregister(zone: Handle);
    pub(super) fn malloc_set_zone_name(zone: Handle, name: *const c_char);
    pub(super) safe fn malloc_get_zone_name(zone: Handle) -> *const c_char;
    pub(super) safe fn malloc_zone_malloc(zone: Handle, size: usize) -> *mut c_void;
    pub(super) safe fn malloc_zone_calloc(zone: Handle, count: usize, size: usize) -> *mut c_void;
    pub(super) safe fn malloc_zone_valloc(zone: Handle, size: usize) -> *mut c_void;
    pub(super) safe fn malloc_zone_memalign(zone: Handle, alignment: usize, size: usize) -> *mut c_void;
    pub(super) fn malloc_zone_free(zone: Handle, block: *mut c_void);
    pub(super) fn malloc_zone_realloc(zone: Handle, block: *mut c_void, size: usize) -> *mut c_void;
    pub(super) fn malloc_zone_batch_malloc(
        zone: Handle,
        size: usize,
        results: *mut *mut c_void,
        count: c_uint,
    ) -> c_uint;
    pub(super) fn malloc_zone_batch_free(zone: Handle, blocks: *mut *mut c_void, count: c_uint);
    pub(super) safe fn malloc_zone_from_ptr(block: *const c_void) -> Handle;
    pub(super) safe fn malloc_zone_size(zone: Handle, block: *const c_void) -> usize;
    pub(super) safe fn malloc_size(block: *const c_void) -> usize;
    pub(super) safe fn malloc_good_size(size: usize) -> usize;
    pub(super) safe fn malloc_zone_check(zone: Handle) -> c_int;
    pub(super) fn malloc_zone_statistics(zone: Handle, statistics: *mut Statistics);
    pub(super) safe fn malloc_zone_pressure_relief(zone: Handle, goal: usize) -> usize;
    pub(super) fn malloc_zone_enumerate(zone: Handle, context: *mut c_void, mask: c_uint, recorder: Recorder) -> c_int;
    pub(super) safe fn malloc_zone_print(zone: Handle, verbose: c_int);
    pub(super) safe fn malloc_zone_force_lock(zone: Handle);
    pub(super) safe fn malloc_zone_force_unlock(zone: Handle);
    pub(super) safe fn malloc_zone_locked(zone: Handle) -> c_int;
}

// SAFETY: as above.
unsafe extern "C" {
    pub(super) safe fn os_mem_allocate(pages: usize) -> *mut c_void;
    pub(super) fn os_mem_release(address: *mut c_void, pages: usize) -> usize;
    pub(super) safe fn os_mem_get_free() -> usize;
}
