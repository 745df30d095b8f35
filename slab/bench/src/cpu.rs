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

/// This thread's number.
#[inline]
pub fn current() -> usize {
    NUMBER.get()
}

/// How many threads can run at once, as far as they have numbers.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get().min(CPUS))
}
