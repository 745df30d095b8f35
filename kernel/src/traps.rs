//! Exceptions and interrupts: every vector has an entry.
//!
//! An exception is reported and ends the run. Double faults, page faults and non-maskable interrupts are reported from
//! stacks of their own, so that a broken stack does not matter. An interrupt goes to the handler that
//! [`set_interrupt_handler`] named, on the stack that was in use.

mod cpu;
mod entry;
mod report;

use core::mem;
use core::sync::atomic::{AtomicPtr, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::boot;
use cpu::Cpu;
pub use entry::TrapFrame;

/// The first vector that is not an exception.
pub const FIRST_INTERRUPT: u8 = 32;

/// What an interrupt calls. Interrupts are off; it must tell the interrupt controller when it is done.
pub type InterruptHandler = fn(&mut TrapFrame);

static BOOT_CPU: Cpu = Cpu::new();
static TABLE: Once<InterruptDescriptorTable> = Once::new();
static HANDLERS: [AtomicPtr<()>; 256 - FIRST_INTERRUPT as usize] = [const { AtomicPtr::new(core::ptr::null_mut()) }; _];

/// Sets up segments, stacks and vectors on the boot CPU.
pub(crate) fn init() {
    BOOT_CPU.load();
    TABLE.call_once(entry::table).load();
}

/// Has `handler` called by interrupts of `vector`, from now on.
///
/// # Panics
///
/// If `vector` is one of an exception, below [`FIRST_INTERRUPT`].
pub fn set_interrupt_handler(vector: u8, handler: InterruptHandler) {
    assert!(vector >= FIRST_INTERRUPT, "vector {vector} is one of an exception");
    HANDLERS[usize::from(vector - FIRST_INTERRUPT)].store(handler as *mut (), Ordering::Release);
}

/// The name of each stack of this CPU, and the start of its guard page.
pub(crate) fn guards() -> impl Iterator<Item = (&'static str, VirtAddr)> {
    core::iter::once(("boot stack", boot::STACK.guard())).chain(BOOT_CPU.guards())
}

/// What every entry calls.
extern "sysv64" fn on_trap(frame: &mut TrapFrame) {
    let vector = frame.vector as u8;
    let Some(interrupt) = vector.checked_sub(FIRST_INTERRUPT) else { report::stop(frame) };
    let handler = HANDLERS[usize::from(interrupt)].load(Ordering::Acquire);
    if handler.is_null() {
        report::stop(frame);
    }
    // SAFETY: only `set_interrupt_handler` stores here, and only this type.
    let handler: InterruptHandler = unsafe { mem::transmute(handler) };
    handler(frame);
}
