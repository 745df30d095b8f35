//! What the kernel lends the allocator.
//!
//! The allocator runs on whatever CPU calls it, in threads and in interrupt handlers alike. It needs to know which CPU
//! that is, and how to keep everything else off it for a few instructions.

/// The CPUs as the allocator needs them.
///
/// A kernel on one x86_64 CPU uses [`X86_64`] and writes nothing.
///
/// # Safety
///
/// 1. Between [`disable_interrupts`](Self::disable_interrupts) and the matching
///    [`restore_interrupts`](Self::restore_interrupts) no code that can allocate or free may run on the same CPU other than
///    the caller: no interrupt handler, no other thread. And the caller stays on that CPU.
/// 2. Between them, [`current_cpu`](Self::current_cpu) returns the same number each time, and on no two CPUs at once the same
///    number below [`CPUS`](Self::CPUS).
pub unsafe trait Platform: 'static {
    /// How many CPUs get magazines and stocks of their own: those with a number below this. Others are served too, from
    /// what all CPUs share. 0 turns the per-CPU layer off, and leaves it out of the code.
    const CPUS: usize = 1;

    /// The number of the CPU that this runs on. A CPU that has none yet may say `usize::MAX`.
    fn current_cpu() -> usize {
        0
    }

    /// Disables interrupts on this CPU and says whether they were enabled before.
    fn disable_interrupts() -> bool;

    /// Enables interrupts again if `were_enabled`, the answer of the matching
    /// [`disable_interrupts`](Self::disable_interrupts), says so.
    fn restore_interrupts(were_enabled: bool);
}

/// A kernel in ring 0 of the only x86_64 CPU that is started: interrupts are the flag IF of RFLAGS.
///
/// A kernel with several CPUs writes a platform of its own, with [`CPUS`](Platform::CPUS) and
/// [`current_cpu`](Platform::current_cpu). Non-maskable interrupts stay on: an NMI handler must not allocate.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub struct X86_64;

// SAFETY: with IF clear a CPU takes no maskable interrupt, and so starts no handler and no other thread (Intel SDM vol. 3,
// 6.8.1 "Masking Maskable Hardware Interrupts"). There is one CPU, number 0.
#[cfg(target_arch = "x86_64")]
unsafe impl Platform for X86_64 {
    #[inline]
    fn disable_interrupts() -> bool {
        const INTERRUPT_FLAG: u64 = 1 << 9;
        let flags: u64;
        // SAFETY: reads RFLAGS by way of the stack and clears IF; ring 0 is what choosing this platform promises. Memory
        // is not declared untouched, so that the compiler moves no access of the critical section over it.
        unsafe { core::arch::asm!("pushfq", "pop {}", "cli", out(reg) flags) };
        flags & INTERRUPT_FLAG != 0
    }

    #[inline]
    fn restore_interrupts(were_enabled: bool) {
        if were_enabled {
            // SAFETY: they were enabled before the matching `disable_interrupts`, so handlers are ready for them.
            unsafe { core::arch::asm!("sti") };
        }
    }
}

/// A platform without the per-CPU layer: nothing is kept in magazines and stocks, and their code is left out. For a
/// kernel on one CPU that wants every free object back in its slab: `Heap<WithoutMagazines<X86_64>>`.
#[derive(Debug, Clone, Copy)]
pub struct WithoutMagazines<P>(core::marker::PhantomData<P>);

// SAFETY: `P` keeps the first promise; with no numbers below `CPUS` there is nothing to promise of them.
unsafe impl<P: Platform> Platform for WithoutMagazines<P> {
    const CPUS: usize = 0;

    #[inline]
    fn disable_interrupts() -> bool {
        P::disable_interrupts()
    }

    #[inline]
    fn restore_interrupts(were_enabled: bool) {
        P::restore_interrupts(were_enabled);
    }
}

/// A program without interrupts, such as a test on the host; its threads are like CPUs that have no number, so nothing is
/// kept for one of them alone.
///
/// Never for a kernel whose interrupt handlers allocate: they would spin for ever.
#[derive(Debug, Clone, Copy)]
pub struct NoInterrupts;

// SAFETY: there are no interrupt handlers, and a thread that is pre-empted goes on later and releases its lock.
unsafe impl Platform for NoInterrupts {
    const CPUS: usize = 0;

    #[inline]
    fn disable_interrupts() -> bool {
        false
    }

    #[inline]
    fn restore_interrupts(_: bool) {}
}
