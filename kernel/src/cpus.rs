//! The CPUs of the machine.
//!
//! Each has a number, from 0 (the boot CPU) up and without gaps, and a block of memory of its own that its GS base
//! points to. That is set before anything on the CPU can log or allocate.
//!
//! The boot CPU finds the others in the ACPI table MADT and starts them one by one ([`start`]). Each
//! runs [threads](crate::threads), and answers to the others in interrupts: it runs what they [call](call_on) and forgets
//! address translations. One that has no thread to run can go [offline] and come back.
//!
//! What waits for another CPU here holds no lock, and while its interrupts are off it serves the others, so that two
//! CPUs may wait for each other.

pub(crate) mod apic;
mod block;
mod call;
mod madt;
mod offline;
mod platform;
mod start;
pub(crate) mod tlb;

use core::fmt;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use x86_64::VirtAddr;
use x86_64::instructions::interrupts;

pub(crate) use block::{Block, KERNEL_STACK, set_kernel_stack, start_boot_cpu, this};
pub use call::{call_on, call_on_others};
pub use offline::{bring_online, offline};
pub use platform::Cpus;
pub(crate) use start::start_all;
pub use start::{NotStarted, start};

/// CPUs that the kernel serves; more stay off.
pub const MAX: usize = 64;

/// The number of the boot CPU.
pub const BOOT: usize = 0;

/// The blocks of the CPUs, by number.
static BLOCKS: [AtomicPtr<Block>; MAX] = [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX];

static COUNT: AtomicUsize = AtomicUsize::new(0);

/// The CPU with this number is not there, or is offline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotOnline(pub usize);

impl fmt::Display for NotOnline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPU {} is not online", self.0)
    }
}

impl core::error::Error for NotOnline {}

/// The number of the CPU that this runs on. Where that can change, because the thread may move, the answer may be old.
#[inline]
pub fn current() -> usize {
    this().number()
}

/// How many CPUs were started; their numbers are those below this.
pub fn count() -> usize {
    COUNT.load(Ordering::Acquire)
}

/// Whether the CPU with this number runs.
pub fn is_online(number: usize) -> bool {
    block(number).is_some_and(|block| block.mail.state.is_online())
}

/// The numbers of the CPUs that run.
pub fn online() -> impl Iterator<Item = usize> + Clone {
    (0..count()).filter(|&number| is_online(number))
}

/// Goes offline if this CPU was asked to, and returns when it was brought back. Interrupts are off. For the idle thread.
pub(crate) fn leave_if_asked() {
    if offline::is_leaving() {
        offline::park();
    }
}

/// Has a CPU go on that may be halted.
pub(crate) fn wake(number: usize) {
    block(number).into_iter().for_each(|block| apic::send(apic::WAKE_VECTOR, block.apic_id()));
}

/// The name of the stack in whose guard page `address` is, and the number of the CPU that another has started with it.
pub(crate) fn guarded_at(address: VirtAddr) -> Option<(&'static str, usize)> {
    all().find_map(|block| Some((block.stacks.get()?.guarded_at(address)?, block.number())))
}

/// Sends a non-maskable interrupt to the CPU with this number, which may be this one.
///
/// # Errors
///
/// There is no such CPU, or it is offline.
pub fn send_nmi(number: usize) -> Result<(), NotOnline> {
    let block = block(number).filter(|block| block.mail.state.is_online()).ok_or(NotOnline(number))?;
    apic::send_nmi(block.apic_id());
    Ok(())
}

/// How often the CPU with this number has forgotten its address translations because another asked for it; 0 where there is
/// no such CPU.
pub fn flushes(number: usize) -> u64 {
    block(number).map_or(0, |block| block.mail.flushes_done.load(Ordering::Relaxed))
}

/// Runs `body` with interrupts off, as on a CPU that the allocator knows no number of. That is how the boot CPU runs
/// until the heap is there, and every CPU that is offline.
pub fn without_number<T>(body: impl FnOnce() -> T) -> T {
    interrupts::without_interrupts(|| this().without_number(body))
}

/// The block of the CPU with this number, if it was started.
fn block(number: usize) -> Option<&'static Block> {
    let block = BLOCKS.get(number)?.load(Ordering::Acquire);
    // SAFETY: null, or a block that `publish` was given for ever.
    unsafe { block.as_ref() }
}

/// The blocks of all CPUs that were started, and of one that is about to.
fn all() -> impl Iterator<Item = &'static Block> {
    (0..MAX).map_while(block)
}

/// Makes the block of a CPU known under its number.
fn publish(block: &'static Block) {
    BLOCKS[block.number()].store((&raw const *block).cast_mut(), Ordering::Release);
}

/// Every other CPU that was started.
pub(crate) fn others() -> impl Iterator<Item = &'static Block> {
    (0..count()).filter(|&number| number != current()).filter_map(block)
}

/// Waits until `done`; with interrupts off it serves other CPUs meanwhile.
fn wait_until(done: impl Fn() -> bool) {
    while !done() {
        if !interrupts::are_enabled() {
            tlb::serve();
            call::serve();
        }
        core::hint::spin_loop();
    }
}
