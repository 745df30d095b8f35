//! kslab, in release mode, with its checks of frees and without those that are switched on at run time.

use kslab::Heap;
use kslab::memory::Region;
use kslab::platform::Platform;

use super::peer;
use crate::cpu;

/// The threads of a program, each with a number as if it were a CPU. There is no guard against interrupts: a program has
/// none, and what a kernel's costs depends on the kernel.
#[derive(Debug)]
pub struct Threads;

// SAFETY: there are no interrupt handlers, and each number below `CPUS` is that of one thread at a time.
unsafe impl Platform for Threads {
    const CPUS: usize = cpu::CPUS;

    #[inline]
    fn current_cpu() -> usize {
        cpu::current()
    }

    #[inline]
    fn disable_interrupts() -> bool {
        false
    }

    #[inline]
    fn restore_interrupts(_: bool) {}
}

/// The page frames of this one are measured too.
pub static HEAP: Heap<Threads> = Heap::new();

peer!(Kslab, HEAP, |arena| {
    let map = [Region::usable(0, arena.bytes as u64)];
    // SAFETY: the arena is nobody else's, and stays.
    unsafe { HEAP.init(map, arena.start) }.expect("memory for a heap");
});
