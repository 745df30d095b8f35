//! What the kernel lends the allocator.

use kslab::platform::{Platform, X86_64};

use super::{MAX, block};

/// The CPUs of this kernel, as the allocator needs them.
#[derive(Debug, Clone, Copy)]
pub struct Cpus;

// SAFETY: interrupts are those of `X86_64`. Numbers are given to one CPU each; one that is offline shows none, and it
// changes what it shows only with interrupts off or in the handler of a non-maskable interrupt, which restores it.
unsafe impl Platform for Cpus {
    const CPUS: usize = MAX;

    #[inline]
    fn current_cpu() -> usize {
        block::seen_by_allocator()
    }

    #[inline]
    fn disable_interrupts() -> bool {
        X86_64::disable_interrupts()
    }

    #[inline]
    fn restore_interrupts(were_enabled: bool) {
        X86_64::restore_interrupts(were_enabled);
    }
}
