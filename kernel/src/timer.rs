//! The timer of the local APIC, and the interrupt controllers as far as it needs them.

use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use kslab::IrqLock;
use kslab::platform::X86_64;
use x2apic::lapic::{LocalApic, LocalApicBuilder, TimerMode, xapic_base};
use x86_64::PhysAddr;
use x86_64::instructions::port::Port;

use crate::traps::{FIRST_INTERRUPT, TrapFrame, set_interrupt_handler};
use crate::{memory, stop};

const TIMER_VECTOR: u8 = FIRST_INTERRUPT;
const ERROR_VECTOR: u8 = 0xfe;
const SPURIOUS_VECTOR: u8 = 0xff;

static APIC: IrqLock<X86_64, Option<Apic>> = IrqLock::new(None);
static TICK: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// The local APIC of the boot CPU.
struct Apic(LocalApic);

// SAFETY: there is one CPU, so whoever uses this runs on the CPU that it belongs to.
unsafe impl Send for Apic {}

/// Turns the local APIC on, its timer stopped, and the old interrupt controllers off.
pub(crate) fn init() {
    // SAFETY: these are the mask registers of the two 8259s; with all their lines masked they raise nothing.
    unsafe {
        Port::<u8>::new(0x21).write(0xff);
        Port::<u8>::new(0xa1).write(0xff);
    }
    set_interrupt_handler(TIMER_VECTOR, on_timer);
    // A spurious interrupt needs no answer (Intel SDM vol. 3, 11.9).
    set_interrupt_handler(SPURIOUS_VECTOR, |_| {});

    // SAFETY: the address is that of the local APIC's registers, which firmware left where they are.
    let registers = unsafe { memory::map_device(PhysAddr::new(xapic_base())) };
    let built = LocalApicBuilder::new()
        .timer_vector(TIMER_VECTOR.into())
        .error_vector(ERROR_VECTOR.into())
        .spurious_vector(SPURIOUS_VECTOR.into())
        .timer_mode(TimerMode::Periodic)
        .timer_initial(0)
        .set_xapic_base(registers.as_u64())
        .build();
    match built {
        Ok(mut apic) => {
            // SAFETY: its registers are mapped, and each vector that it may raise has an entry.
            unsafe { apic.enable() };
            *APIC.lock() = Some(Apic(apic));
        }
        Err(error) => stop::stop(format_args!("no timer: {error}"), |_| Ok(())),
    }
}

/// Calls `tick` from a timer interrupt every `period` counts of the APIC's clock, until [`stop()`].
///
/// `tick` runs with interrupts off, on the stack that was in use. A `period` of 0 never ends: no interrupt comes.
pub fn start(period: u32, tick: fn()) {
    TICK.store(tick as *mut (), Ordering::Release);
    set_period(period);
}

/// Stops the calls that [`start`] began; none comes after this returns.
pub fn stop() {
    set_period(0);
    TICK.store(ptr::null_mut(), Ordering::Release);
}

fn set_period(period: u32) {
    if let Some(Apic(apic)) = &mut *APIC.lock() {
        // SAFETY: the registers are mapped, and the timer's vector has a handler.
        unsafe { apic.set_timer_initial(period) };
    }
}

fn on_timer(_: &mut TrapFrame) {
    let tick = TICK.load(Ordering::Acquire);
    if !tick.is_null() {
        // SAFETY: only `start` stores here, and only this type.
        let tick: fn() = unsafe { mem::transmute(tick) };
        tick();
    }
    if let Some(Apic(apic)) = &mut *APIC.lock() {
        // SAFETY: this handler serves an interrupt of this APIC, and is done with it.
        unsafe { apic.end_of_interrupt() };
    }
}
