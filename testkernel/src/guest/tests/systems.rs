//! Memory as other systems offer it ([`kslab::systems`]), by the names that C calls, over the kernel's heap.
//!
//! Each test is about a bullet, or a sentence of one, of what the originals promise; its documentation names it.

mod c;
mod malloc;
mod pages;
mod windows;
mod zones;

use alloc::vec::Vec;
use core::ffi::{c_int, c_void};
use core::fmt;
use core::hint::black_box;
use core::slice;
use core::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicUsize, Ordering::Relaxed};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::threads;
use kslab::systems::malloc::Malloc;
use kslab::systems::pages::Pages;
use kslab::systems::windows::WindowsHeaps;
use kslab::systems::zones::Zones;

static C: Malloc<'static, Cpus> = Malloc::new(&HEAP, |error| mine(&ERRNO).store(error, Relaxed));
static WINDOWS: WindowsHeaps<'static, Cpus> = WindowsHeaps::new(
    &HEAP,
    |error| mine(&LAST_ERROR).store(error, Relaxed),
    |code| mine(&EXCEPTION).store(code, Relaxed),
);
static ZONES: Zones<'static, Cpus> = Zones::new(&HEAP, count_printed);
static PAGES: Pages<'static, Cpus> = Pages::new(&HEAP, 0, &MAP);

kslab::export_malloc!(C);
kslab::export_windows_heaps!(WINDOWS);
kslab::export_zones!(ZONES: Cpus);
kslab::export_pages!(PAGES);

/// For the first GiB of physical addresses.
static MAP: [AtomicU8; 512] = [const { AtomicU8::new(0) }; _];

/// One for each thread, as the originals have it. Two threads of one test never share one.
type PerThread<T> = [T; 64];

static ERRNO: PerThread<AtomicI32> = [const { AtomicI32::new(0) }; _];
static LAST_ERROR: PerThread<AtomicU32> = [const { AtomicU32::new(0) }; _];
static EXCEPTION: PerThread<AtomicU32> = [const { AtomicU32::new(0) }; _];

fn mine<T>(all: &'static PerThread<T>) -> &'static T {
    &all[threads::current().id() as usize % all.len()]
}

/// This thread's `errno`, and 0 from now on.
fn errno() -> c_int {
    mine(&ERRNO).swap(0, Relaxed)
}

/// What `GetLastError` says on this thread, and 0 from now on.
fn last_error() -> u32 {
    mine(&LAST_ERROR).swap(0, Relaxed)
}

/// The code of this thread's last exception, and 0 from now on.
fn exception() -> u32 {
    mine(&EXCEPTION).swap(0, Relaxed)
}

/// Characters that zones have printed.
static PRINTED: AtomicUsize = AtomicUsize::new(0);

fn count_printed(text: fmt::Arguments<'_>) {
    struct Count;
    impl fmt::Write for Count {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            PRINTED.fetch_add(text.len(), Relaxed);
            Ok(())
        }
    }
    fmt::Write::write_fmt(&mut Count, text).expect("it cannot fail");
}

/// A block as the compiler has to take it: it knows what the function `malloc` of C does, and might do without.
fn seen(block: *mut c_void) -> *mut c_void {
    black_box(block)
}

/// The bytes of a block.
fn bytes<'a>(block: *mut c_void, count: usize) -> &'a mut [u8] {
    assert!(!block.is_null());
    // SAFETY: the tests have a block with so many bytes, all of which are initialised as soon as they are filled.
    unsafe { slice::from_raw_parts_mut(block.cast(), count) }
}

/// Fills bytes of a block.
fn fill(block: *mut c_void, count: usize, value: u8) {
    // SAFETY: the tests have a block with so many bytes.
    unsafe { block.cast::<u8>().write_bytes(value, count) };
}

/// Whether bytes of a block are as they were filled.
fn holds(block: *mut c_void, count: usize, value: u8) -> bool {
    bytes(block, count).iter().all(|&byte| byte == value)
}

/// Runs `body` with the numbers from 0 to 3 on threads of their own, each on another CPU as far as there are CPUs, and returns
/// what they have returned.
fn on_four_threads<T: Send + 'static>(body: fn(usize) -> T) -> Vec<T> {
    let cpus: Vec<_> = kernel::cpus::online().filter(|&cpu| threads::run_on(cpu)).collect();
    let spawn = |number| {
        let cpu = cpus[number % cpus.len()];
        threads::spawn_on(cpu, "worker", 32 << 10, move || body(number)).expect("memory")
    };
    let workers: Vec<_> = (0..4).map(spawn).collect();
    workers.into_iter().map(|worker| worker.join()).collect()
}
