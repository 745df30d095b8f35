//! CPUs that leave and come back.
//!
//! An offline CPU gives the heap back all that it keeps, has no number for the allocator any more, and waits with its
//! timer stopped until it is brought back. Interrupts from other CPUs that were on their way still reach it.

use core::sync::atomic::{AtomicU8, Ordering};

use x86_64::instructions::{interrupts, tlb};

use super::{BOOT, Block, NotOnline, apic, block, this, wait_until};
use crate::heap::HEAP;
use crate::{threads, timer};

/// Whether a CPU runs.
#[derive(Debug)]
pub(super) struct State(AtomicU8);

const STARTING: u8 = 0;
const ABANDONED: u8 = 1;
const ONLINE: u8 = 2;
const LEAVING: u8 = 3;
const OFFLINE: u8 = 4;
const RETURNING: u8 = 5;

impl State {
    pub(super) const fn new() -> Self {
        Self(AtomicU8::new(STARTING))
    }

    fn is(&self, state: u8) -> bool {
        self.0.load(Ordering::SeqCst) == state
    }

    fn change(&self, from: u8, to: u8) -> bool {
        self.0.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    pub(super) fn is_online(&self) -> bool {
        self.is(ONLINE)
    }

    /// Whether it runs code that may use any page.
    pub(super) fn answers(&self) -> bool {
        matches!(self.0.load(Ordering::SeqCst), ONLINE | LEAVING)
    }

    /// A CPU that starts says that it runs; `false` where nobody waits for it any more.
    pub(super) fn set_online(&self) -> bool {
        self.change(STARTING, ONLINE)
    }

    /// Nobody waits any more for the CPU to start; `false` where it runs.
    pub(super) fn abandon(&self) -> bool {
        self.change(STARTING, ABANDONED)
    }
}

/// Takes the CPU with this number offline, and waits until it is. The threads on it go to the boot CPU; the one that runs
/// there, if it cannot be pre-empted, when its turn ends.
///
/// The boot CPU cannot leave: it takes them all.
///
/// # Errors
///
/// It is the boot CPU, there is no such CPU, or it is not online.
pub fn offline(number: usize) -> Result<(), NotOnline> {
    let block = block(number).filter(|_| number != BOOT && number != super::current()).ok_or(NotOnline(number))?;
    if !block.mail.state.change(ONLINE, LEAVING) {
        return Err(NotOnline(number));
    }
    threads::close(number);
    apic::send(apic::WAKE_VECTOR, block.apic_id());
    wait_until(|| block.mail.state.is(OFFLINE));
    Ok(())
}

/// Brings a CPU back that was taken [`offline`], and waits until it runs. Whether it was offline.
pub fn bring_online(number: usize) -> bool {
    let Some(block) = block(number).filter(|block| block.mail.state.change(OFFLINE, RETURNING)) else { return false };
    apic::send(apic::WAKE_VECTOR, block.apic_id());
    wait_until(|| !block.mail.state.is(RETURNING));
    threads::open(number);
    true
}

/// Whether this CPU is asked to leave.
pub(super) fn is_leaving() -> bool {
    this().mail.state.is(LEAVING)
}

/// Leaves, and returns when this CPU is brought back. Interrupts are off.
pub(super) fn park() {
    let block = this();
    timer::stop();
    leave_heap(block);
    block.mail.state.change(LEAVING, OFFLINE);
    while !block.mail.state.is(RETURNING) {
        interrupts::enable_and_hlt();
        interrupts::disable();
    }
    block.mail.state.change(RETURNING, ONLINE);
    enter(block);
}

fn leave_heap(block: &Block) {
    // First, so that what is drained does not end up with this CPU again.
    block.take_number_back();
    // SAFETY: this is that CPU, its interrupts are off, and whatever it allocates from here on is not by that number.
    unsafe { HEAP.retire_cpu(block.number()) };
}

/// What a CPU does that has just said that it is online.
pub(super) fn enter(block: &Block) {
    // Whoever changes page tables from now on asks this CPU; all that was changed before is seen from here.
    tlb::flush_all();
    block.lend_number();
}
