//! What each CPU has for itself.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use kslab::platform::{IN_NMI, NO_CPU};
use spin::Once;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use super::apic::Apic;
use super::call::Call;
use super::offline::State;
use super::start::Stacks;
use super::{COUNT, publish};
use crate::{timer, traps};

/// The memory of one CPU; its GS base points here. Aligned so that no two CPUs share a cache line.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Block {
    /// Where this is, for [`this`].
    address: AtomicUsize,
    /// What the allocator is told, see [`seen_by_allocator`].
    seen_by_allocator: AtomicUsize,
    number: AtomicUsize,
    /// What its timer's interrupts are for.
    pub(crate) timer: timer::Wanted,
    /// The local APIC.
    pub(super) apic: Apic,
    /// The segments.
    pub(super) traps: traps::Cpu,
    /// The tops of the stacks for traps, where another CPU starts this one.
    pub(super) trap_stacks: [AtomicU64; traps::STACKS.len()],
    /// Of a CPU that another has started.
    pub(super) stacks: Once<Stacks>,
    /// What other CPUs write to.
    pub(super) mail: Mail,
}

/// What other CPUs write to, away from what this one reads all the time.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Mail {
    pub(super) apic_id: AtomicU32,
    pub(super) state: State,
    /// What it is to run for others, the newest first.
    pub(super) calls: AtomicPtr<Call>,
    /// How often it was asked to forget its address translations.
    pub(super) flushes_wanted: AtomicU64,
    /// For how many of these it has.
    pub(super) flushes_done: AtomicU64,
    /// Whether it has halted for good.
    pub(super) has_stopped: AtomicBool,
}

/// Where in the block the CPU finds the stack for traps from ring 3.
pub(crate) const KERNEL_STACK: usize = offset_of!(Block, traps) + traps::Cpu::KERNEL_STACK;

/// That of the boot CPU.
static BOOT: Block = Block::new(0);

impl Block {
    /// That of a CPU that does not run yet, and will have this number.
    pub(crate) const fn new(number: usize) -> Self {
        Self {
            address: AtomicUsize::new(0),
            seen_by_allocator: AtomicUsize::new(NO_CPU),
            number: AtomicUsize::new(number),
            timer: timer::Wanted::new(),
            apic: Apic::new(),
            traps: traps::Cpu::new(),
            trap_stacks: [const { AtomicU64::new(0) }; _],
            stacks: Once::new(),
            mail: Mail {
                apic_id: AtomicU32::new(0),
                state: State::new(),
                calls: AtomicPtr::new(ptr::null_mut()),
                flushes_wanted: AtomicU64::new(0),
                flushes_done: AtomicU64::new(0),
                has_stopped: AtomicBool::new(false),
            },
        }
    }

    /// The number of the CPU.
    #[inline]
    pub(crate) fn number(&self) -> usize {
        self.number.load(Relaxed)
    }

    /// What other CPUs call it in messages to its local APIC.
    pub(super) fn apic_id(&self) -> u32 {
        self.mail.apic_id.load(Relaxed)
    }

    /// Makes this the block of the CPU that this runs on. The allocator serves the CPU as one without a number until
    /// [`lend_number`](Self::lend_number).
    pub(super) fn load(&'static self) {
        self.address.store((&raw const *self).addr(), Relaxed);
        GsBase::write(VirtAddr::from_ptr(self));
        // Traps from ring 3 get it from there: nobody swaps the two.
        KernelGsBase::write(VirtAddr::from_ptr(self));
    }

    /// Has the allocator keep things for this CPU from now on.
    pub(crate) fn lend_number(&self) {
        self.seen_by_allocator.store(self.number(), Relaxed);
    }

    /// Has the allocator serve this CPU as one without a number. What it keeps for the number is to be drained.
    pub(super) fn take_number_back(&self) {
        self.seen_by_allocator.store(NO_CPU, Relaxed);
    }

    /// Runs a handler of a non-maskable interrupt: the allocator is told so, whatever was interrupted, another of these
    /// handlers included.
    pub(crate) fn in_nmi<T>(&self, handler: impl FnOnce() -> T) -> T {
        self.seen_as(IN_NMI, handler)
    }

    /// Runs `body` as on a CPU that has no number.
    pub(super) fn without_number<T>(&self, body: impl FnOnce() -> T) -> T {
        self.seen_as(NO_CPU, body)
    }

    fn seen_as<T>(&self, seen: usize, body: impl FnOnce() -> T) -> T {
        let before = self.seen_by_allocator.swap(seen, Relaxed);
        let result = body();
        self.seen_by_allocator.store(before, Relaxed);
        result
    }

    /// Says that this CPU has halted for good, or is about to.
    pub(crate) fn set_stopped(&self) {
        self.mail.has_stopped.store(true, Relaxed);
    }

    /// Whether this CPU has halted for good.
    pub(crate) fn has_stopped(&self) -> bool {
        self.mail.has_stopped.load(Relaxed)
    }
}

/// Makes the boot CPU number 0, and ready to report what goes wrong: it has its segments and its block.
pub(crate) fn start_boot_cpu() {
    // SAFETY: this is the boot CPU, which calls this once.
    unsafe { BOOT.traps.load_on_boot_cpu() };
    BOOT.load();
    BOOT.mail.state.set_online();
    publish(&BOOT);
    COUNT.store(1, Relaxed);
}

/// Has traps from ring 3 use the stack below `top` on this CPU. Interrupts are off.
pub(crate) fn set_kernel_stack(top: u64) {
    // SAFETY: writes to the task state segment in this CPU's block, which nothing else refers to. It has no alignment, and
    // need not: this is a CPU that does without.
    unsafe { asm!("mov gs:[{}], {}", const KERNEL_STACK, in(reg) top, options(nostack, preserves_flags)) };
}

/// The block of the CPU that this runs on.
#[inline]
pub(crate) fn this() -> &'static Block {
    let address: *const Block;
    // SAFETY: the GS base of every CPU that runs Rust code points to its block, which says where it is.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) address, const offset_of!(Block, address),
            options(nostack, preserves_flags, readonly));
        &*address
    }
}

/// What this CPU tells the allocator: its number, [`NO_CPU`] before it has one and while it is offline, or [`IN_NMI`].
#[inline]
pub(super) fn seen_by_allocator() -> usize {
    let seen;
    // SAFETY: as above.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) seen, const offset_of!(Block, seen_by_allocator),
            options(nostack, preserves_flags, readonly));
    }
    seen
}
