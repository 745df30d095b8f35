//! Threads as if they were CPUs, for allocators that keep something for each.

use std::cell::Cell;

use kslab::platform::NO_CPU;

/// So many threads have numbers.
pub const CPUS: usize = 8;

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(NO_CPU) };
}

/// Gives this thread a number, which no other has.
pub fn enter(number: usize) {
    assert!(number < CPUS);
    NUMBER.set(number);
}

/// Keeps this thread on a CPU of its own, as long as there are as many: a scheduler may take longer to find one than the
/// thread has to do.
pub fn pin(number: usize) {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: a set of CPUs is bits.
    let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes a set, which is that large.
    if unsafe { libc::sched_getaffinity(0, size, &raw mut allowed) } != 0 {
        return;
    }
    // SAFETY: in the set's range.
    let cpus = (0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &allowed) });
    let Some(cpu) = cpus.cycle().nth(number) else { return };
    // SAFETY: as above.
    let mut own: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::CPU_SET(cpu, &mut own) };
    // SAFETY: reads a set, which is that large. Where it is refused the thread goes where it likes.
    unsafe { libc::sched_setaffinity(0, size, &raw const own) };
}

/// This thread's number.
#[inline]
pub fn current() -> usize {
    NUMBER.get()
}

/// How many threads can run at once, as far as they have numbers.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(CPUS))
}
