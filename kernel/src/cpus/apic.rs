//! The local APIC of each CPU, by which it is interrupted and interrupts others.

use core::cell::UnsafeCell;
use core::fmt;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use raw_cpuid::CpuId;
use spin::Once;
use x2apic::lapic::{LocalApic, LocalApicBuilder, TimerMode, xapic_base};
use x86_64::VirtAddr;
use x86_64::instructions::interrupts::without_interrupts;
use x86_64::instructions::port::Port;

use super::{Block, call, this, tlb};
use crate::memory::device::{self, Attribute};
use crate::threads::preemption;
use crate::traps::{FIRST_INTERRUPT, set_interrupt_handler};
use crate::{println, stop};

/// The vector of the timer.
pub(crate) const TIMER_VECTOR: u8 = FIRST_INTERRUPT;
/// The vector of [`call_on`](super::call_on).
pub(super) const CALL_VECTOR: u8 = 0xf0;
/// The vector that asks a CPU to forget its address translations.
pub(super) const FLUSH_VECTOR: u8 = 0xf1;
/// The vector that ends a `hlt`, or else the turn of the thread that runs.
pub(super) const WAKE_VECTOR: u8 = 0xf2;
const ERROR_VECTOR: u8 = 0xfe;
const SPURIOUS_VECTOR: u8 = 0xff;

/// Bytes of its registers.
const REGISTERS_SIZE: usize = 4096;

/// Where the registers of every CPU's own local APIC are mapped.
static REGISTERS: Once<VirtAddr> = Once::new();

/// Whether APIC ids have 32 bits and are where the x2APIC has them: `x2apic` uses it where it can.
static HAS_LONG_IDS: AtomicBool = AtomicBool::new(false);

/// The local APIC of one CPU.
pub(super) struct Apic(UnsafeCell<Option<LocalApic>>);

// SAFETY: `with` uses only that of the CPU it runs on, with interrupts off.
unsafe impl Sync for Apic {}

impl Apic {
    /// One that is off.
    pub(super) const fn new() -> Self {
        Self(UnsafeCell::new(None))
    }
}

impl fmt::Debug for Apic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Apic")
    }
}

/// Turns the old interrupt controllers off and the boot CPU's local APIC on, its timer stopped.
pub(crate) fn init() {
    // SAFETY: these are the mask registers of the two 8259s; with all their lines masked they raise nothing.
    unsafe {
        Port::<u8>::new(0x21).write(0xff);
        Port::<u8>::new(0xa1).write(0xff);
    }
    set_interrupt_handler(CALL_VECTOR, |_| {
        end_of_interrupt();
        call::serve();
    });
    set_interrupt_handler(FLUSH_VECTOR, |_| {
        end_of_interrupt();
        tlb::serve();
    });
    set_interrupt_handler(WAKE_VECTOR, |_| {
        end_of_interrupt();
        // Whoever runs on a CPU that is to go offline goes first.
        preemption::end_turn();
    });
    set_interrupt_handler(ERROR_VECTOR, |_| {
        end_of_interrupt();
        // SAFETY: the register may be read at any time.
        println!("CPU {}: APIC error: {:?}", super::current(), with(|apic| unsafe { apic.error_flags() }));
    });
    // A spurious interrupt needs no answer (Intel SDM vol. 3, 11.9).
    set_interrupt_handler(SPURIOUS_VECTOR, |_| {});
    // SAFETY: every x86-64 CPU has the register that says where they are. Each CPU finds its own there.
    match device::map(unsafe { xapic_base() }, REGISTERS_SIZE, Attribute::Uncached) {
        Ok(registers) => _ = REGISTERS.call_once(|| VirtAddr::from_ptr(registers.as_ptr())),
        Err(error) => stop::stop(format_args!("the local APIC was not mapped: {error}"), |_| Ok(())),
    }
    HAS_LONG_IDS.store(CpuId::new().get_feature_info().is_some_and(|info| info.has_x2apic()), Relaxed);
    turn_on(this());
}

/// Turns on the local APIC of the CPU that this runs on, with its timer stopped.
pub(super) fn turn_on(block: &Block) {
    let Some(mut apic) = build() else {
        stop::stop(format_args!("CPU {} has no local APIC", block.number()), |_| Ok(()));
    };
    // SAFETY: its registers are mapped, and each vector that it may raise has a handler.
    let id = unsafe {
        apic.enable();
        apic.id()
    };
    let id = if has_long_ids() { id } else { id >> 24 };
    block.mail.apic_id.store(id, Relaxed);
    // SAFETY: this CPU's own, which uses it for the first time now.
    without_interrupts(|| unsafe { *block.apic.0.get() = Some(apic) });
}

/// A handle of the local APIC of the CPU that this runs on, for this CPU alone.
fn build() -> Option<LocalApic> {
    let built = LocalApicBuilder::new()
        .timer_vector(TIMER_VECTOR.into())
        .error_vector(ERROR_VECTOR.into())
        .spurious_vector(SPURIOUS_VECTOR.into())
        .timer_mode(TimerMode::Periodic)
        .timer_initial(0)
        .set_xapic_base(REGISTERS.get()?.as_u64())
        .build();
    built.ok()
}

/// Runs `work` with interrupts off on the local APIC of this CPU; `None` where it is not on yet. Not for handlers of
/// non-maskable interrupts.
pub(crate) fn with<T>(work: impl FnOnce(&mut LocalApic) -> T) -> Option<T> {
    without_interrupts(|| {
        // SAFETY: this CPU's, and with interrupts off nothing else runs on it; no `work` comes here again.
        unsafe { (*this().apic.0.get()).as_mut() }.map(work)
    })
}

/// Tells the local APIC of this CPU that the interrupt is served.
pub(crate) fn end_of_interrupt() {
    // SAFETY: handlers of interrupts from it call this, once each.
    with(|apic| unsafe { apic.end_of_interrupt() });
}

/// Raises the interrupt `vector` on the CPU whose local APIC has this id.
pub(super) fn send(vector: u8, id: u32) {
    // SAFETY: the vectors that are sent have handlers.
    send_with(id, |apic, destination| unsafe { apic.send_ipi(vector, destination) });
}

/// Raises a non-maskable interrupt there.
pub(super) fn send_nmi(id: u32) {
    // SAFETY: each CPU that runs has an entry for it.
    send_with(id, |apic, destination| unsafe { apic.send_nmi(destination) });
}

/// Resets the CPU there, which then waits to be started.
pub(super) fn send_init(id: u32) {
    // SAFETY: the callers use it on CPUs that do not run kernel code, or should not.
    send_with(id, |apic, destination| unsafe { apic.send_init_ipi(destination) });
}

/// Starts the CPU there, which has been reset, in real mode at the page `page`.
pub(super) fn send_start(id: u32, page: u8) {
    // SAFETY: the caller has put the code there.
    send_with(id, |apic, destination| unsafe { apic.send_sipi(page, destination) });
}

fn send_with(id: u32, send: impl FnOnce(&mut LocalApic, u32)) {
    with(|apic| {
        send(apic, destination(id));
        wait_until_sent(apic);
    });
}

/// Raises a non-maskable interrupt on every other CPU. For a CPU that is about to stop everything: it
/// may have been interrupted anywhere, so this uses a handle of its own.
pub(crate) fn send_nmi_to_others_in_emergency() {
    let Some(mut apic) = build() else { return };
    for block in super::others() {
        wait_until_sent(&apic);
        // SAFETY: each CPU that was started has an entry for it.
        unsafe { apic.send_nmi(destination(block.apic_id())) };
    }
}

/// Waits for a short time until the last message was sent: the next must not come earlier (Intel SDM vol. 3, 11.6.1).
fn wait_until_sent(apic: &LocalApic) {
    for _ in 0..10_000 {
        // SAFETY: the register may be read at any time.
        if !unsafe { apic.get_ipi_delivery_status() } {
            return;
        }
        spin_loop();
    }
}

/// Where the register for messages has the id of the addressee.
fn destination(id: u32) -> u32 {
    if has_long_ids() { id } else { id << 24 }
}

fn has_long_ids() -> bool {
    HAS_LONG_IDS.load(Relaxed)
}
