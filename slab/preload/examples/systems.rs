//! Every function of `include/kslab.h`, over a heap of a few megabytes: for `tests/systems.c`.

use core::ffi::c_int;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicI32, AtomicU8, AtomicU32};

use kslab::memory::Region;
use kslab::platform::NoInterrupts;
use kslab::systems::malloc::Malloc;
use kslab::systems::pages::Pages;
use kslab::systems::windows::WindowsHeaps;
use kslab::systems::zones::Zones;
use kslab::{Heap, InitError};

const PAGE: usize = 2 << 20;
const PAGES_OF_MEMORY: usize = 8;

static HEAP: Heap<NoInterrupts> = Heap::new();
static C: Malloc<'static, NoInterrupts> = Malloc::new(&HEAP, |error| ERRNO.store(error, Relaxed));
static WINDOWS: WindowsHeaps<'static, NoInterrupts> =
    WindowsHeaps::new(&HEAP, |error| LAST_ERROR.store(error, Relaxed), |code| EXCEPTION.store(code, Relaxed));
static ZONES: Zones<'static, NoInterrupts> = Zones::new(&HEAP, |text| print!("{text}"));
static MAP: [AtomicU8; PAGES_OF_MEMORY] = [const { AtomicU8::new(0) }; PAGES_OF_MEMORY];
static PAGES: Pages<'static, NoInterrupts> = Pages::new(&HEAP, 0, &MAP);

kslab::export_malloc!(C);
kslab::export_windows_heaps!(WINDOWS);
kslab::export_zones!(ZONES: NoInterrupts);
kslab::export_pages!(PAGES);

static ERRNO: AtomicI32 = AtomicI32::new(0);
static LAST_ERROR: AtomicU32 = AtomicU32::new(0);
static EXCEPTION: AtomicU32 = AtomicU32::new(0);

/// What C's `errno` would be, and 0 from now on.
#[unsafe(no_mangle)]
extern "C" fn test_errno() -> c_int {
    ERRNO.swap(0, Relaxed)
}

/// What `GetLastError` would say.
#[unsafe(no_mangle)]
extern "C" fn test_last_error() -> u32 {
    LAST_ERROR.swap(0, Relaxed)
}

/// The code of the last exception.
#[unsafe(no_mangle)]
extern "C" fn test_exception() -> u32 {
    EXCEPTION.swap(0, Relaxed)
}

/// Gives the heap its memory, before `main`.
extern "C" fn set_up() {
    let bytes = (PAGES_OF_MEMORY + 1) * PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new addresses, wherever the system likes.
    let start = unsafe { libc::mmap(core::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    let start = start.cast::<u8>();
    let start = start.wrapping_add(start.align_offset(PAGE));
    let memory = [Region::usable(0, (PAGES_OF_MEMORY * PAGE) as u64)];
    // SAFETY: the memory is for this alone, and stays mapped.
    let set_up: Result<(), InitError> = unsafe { HEAP.init(memory, start) };
    set_up.unwrap();
}

#[used]
#[unsafe(link_section = ".init_array")]
static SET_UP: extern "C" fn() = set_up;
