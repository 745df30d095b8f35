//! What the kernel lends the allocator.
//!
//! The allocator runs on whatever CPU calls it, in threads and in interrupt handlers alike. It needs to know which CPU
//! that is, and how to keep everything else off it for a few instructions.
//!
//! # Why the fast path is safe
//!
//! What a CPU has for itself, magazines and a stock of page frames, is used with interrupts off on that CPU and without
//! a lock: from before its number is read until after the last store.
//!
//! | what could come between | and why it does not |
//! |---|---|
//! | an interrupt handler that allocates or frees | it is not started while interrupts are off |
//! | another thread on the same CPU | pre-emption is by an interrupt, and the allocator never yields |
//! | the thread moves to another CPU | it is not pre-empted, so nobody can move it; the number that was read stays right |
//! | another CPU | it never touches what belongs to this one; only [`retire_cpu`](crate::Heap::retire_cpu) does, by contract |
//! | an NMI handler | it comes all the same, and gets no number: see below |
//!
//! A mark *busy* in the CPU's own memory, which a nested handler sees and then takes the slow path, would be a few
//! instructions cheaper. But a thread that is pre-empted between reading its CPU's number and setting the mark may go on
//! elsewhere; so every scheduler would have to know of the mark. The interrupt flag asks nothing of anybody. It is
//! *tested* before it is set again: in an interrupt handler, or with a lock held, it was clear already, and stays so. It is
//! never restored by `popf`: natively that is 14 ns for an allocation and its free, the test 5 ns.
//!
//! # NMI
//!
//! A non-maskable interrupt can come at any instruction, also while what it interrupts holds a lock of the allocator or is
//! half-way through a magazine. While its handler runs, [`current_cpu`](Platform::current_cpu) says [`IN_NMI`]. Then
//!
//! - an allocation takes what can be had at once: an object of a slab, of a larger size class where its own has none, or
//!   page frames, and each only if the lock of it is free. Else it fails. It never spins, and nothing is reclaimed,
//!   borrowed or constructed for it, and no callback, hook or source is called;
//! - a free is checked and takes effect at once, with no lock; the memory itself waits in a list until somebody else takes
//!   the slow path of its cache or of the page frames, calls [`maintain`](crate::Heap::maintain) or
//!   [`shrink`](crate::Heap::shrink), or runs short. A free in an NMI never fails, and nothing is lost;
//! - counts and tables may be read; what is locked just then shows as 0;
//! - what changes the allocator itself says that it cannot, or must not be called: adding and removing memory, creating
//!   and ending caches and heaps, callbacks and hooks, [`verify`](crate::Heap::verify), arenas. In debug builds a lock that
//!   would be waited for is reported.
//!
//! Other exceptions that code with interrupts off can raise, a machine check or a page fault in the allocator's own
//! memory, are of the same kind. So is the end: a kernel that stops its CPUs wherever they are, to report a panic, may say
//! [`IN_NMI`] from then on, and nothing in the allocator waits for what they hold. A kernel whose NMI handlers never allocate and free need not know of any of this.

/// What [`Platform::current_cpu`] says while a handler of a non-maskable interrupt runs, on whatever CPU.
pub const IN_NMI: usize = usize::MAX - 1;

/// What [`Platform::current_cpu`] says on a CPU that has no number yet, as before its per-CPU memory is set up.
pub const NO_CPU: usize = usize::MAX;

/// Whether an NMI handler calls.
#[inline]
pub(crate) fn in_nmi<P: Platform>() -> bool {
    P::current_cpu() == IN_NMI
}

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

    /// The number of the CPU that this runs on; [`NO_CPU`] on one that has none yet, [`IN_NMI`] in an NMI handler. The
    /// two have nothing of their own, like every number from [`CPUS`](Self::CPUS) on.
    ///
    /// It is also asked with interrupts on, where only whether it says [`IN_NMI`] counts.
    fn current_cpu() -> usize {
        0
    }

    /// Disables interrupts on this CPU and says whether they were enabled before.
    ///
    /// Both this and [`restore_interrupts`](Self::restore_interrupts) are part of each allocation and each free.
    fn disable_interrupts() -> bool;

    /// Enables interrupts again if `were_enabled`, the answer of the matching
    /// [`disable_interrupts`](Self::disable_interrupts), says so.
    fn restore_interrupts(were_enabled: bool);
}

/// A kernel in ring 0 of the only x86_64 CPU that is started: interrupts are the flag IF of RFLAGS.
///
/// A kernel with several CPUs writes a platform of its own, with [`CPUS`](Platform::CPUS) and
/// [`current_cpu`](Platform::current_cpu); so does one whose NMI handlers allocate or free, since this one does not tell
/// them apart.
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
        // SAFETY: reads RFLAGS by way of the stack and clears IF; ring 0 is what choosing this platform promises. An interrupt
        // that comes in between returns, and leaves it as it was. Memory is not declared untouched, so that the compiler
        // moves no access of the critical section over it.
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
    fn current_cpu() -> usize {
        P::current_cpu()
    }

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
