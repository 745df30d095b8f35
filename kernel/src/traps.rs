//! Exceptions and interrupts: every vector has an entry.
//!
//! An exception in the kernel is reported and ends the run; one in ring 3 goes back to [who runs that code](crate::threads). Double faults, page faults and non-maskable interrupts are reported from
//! stacks of their own, each CPU's, so that a broken stack does not matter. An interrupt goes to the handler that
//! [`set_interrupt_handler`] named, on the stack that was in use; a non-maskable one first to that of
//! [`set_nmi_handler`], if there is one.

mod cpu;
mod entry;
mod report;

use core::mem;
use core::sync::atomic::{AtomicPtr, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::{boot, cpus, memory, stop};
pub(crate) use cpu::{Cpu, STACK_SIZE, STACKS, USER_CODE_32, USER_CODE_64, USER_DATA};
pub use entry::TrapFrame;
pub(crate) use entry::enter_user;
pub(crate) use report::name;

/// The first vector that is not an exception.
pub const FIRST_INTERRUPT: u8 = 32;

/// The vector by which ring 3 calls the kernel, the only one that it may name.
pub const SYSTEM_CALL: u8 = 0x80;

/// What an interrupt calls. Interrupts are off; it must tell the interrupt controller when it is done.
pub type InterruptHandler = fn(&mut TrapFrame);

const DEBUG: u8 = 1;
const NON_MASKABLE_INTERRUPT: u8 = 2;
pub(crate) const PAGE_FAULT: u8 = 14;

static TABLE: Once<InterruptDescriptorTable> = Once::new();
static HANDLERS: [AtomicPtr<()>; 256 - FIRST_INTERRUPT as usize] = [const { AtomicPtr::new(core::ptr::null_mut()) }; _];
static NMI_HANDLER: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static DEBUG_HANDLER: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static PAGE_FAULT_HANDLER: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Sets up the vectors on the CPU that this runs on.
pub(crate) fn load_table() {
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

/// Has `handler` called by non-maskable interrupts of every CPU, from now on; with `None` they are reported and end the run.
///
/// It runs on a stack of its own and may have interrupted anything, with any lock held. What it may do with the heap is
/// in the documentation of [`kslab::platform`].
pub fn set_nmi_handler(handler: Option<InterruptHandler>) {
    set(&NMI_HANDLER, handler);
}

/// The same for debug exceptions, such as the trap flag raises after each instruction. The handler runs on the stack that
/// was in use, and not masked: as with a non-maskable interrupt, any lock may be held.
pub fn set_debug_handler(handler: Option<InterruptHandler>) {
    set(&DEBUG_HANDLER, handler);
}

/// Has `handler` called by page faults, from now on; with `None` they are reported and end the run.
///
/// It runs on a stack of its own, which it must not need twice: a fault in it is lost. Any lock may be held, and whoever
/// allocates in it must know that the allocator was not interrupted.
pub fn set_page_fault_handler(handler: Option<InterruptHandler>) {
    set(&PAGE_FAULT_HANDLER, handler);
}

fn set(place: &AtomicPtr<()>, handler: Option<InterruptHandler>) {
    place.store(handler.map_or(core::ptr::null_mut(), |handler| handler as *mut ()), Ordering::Release);
}

/// The name of each static stack of the boot CPU, and the start of its guard page.
pub(crate) fn guards() -> impl Iterator<Item = (&'static str, VirtAddr)> {
    core::iter::once(("boot stack", boot::STACK.guard())).chain(cpu::boot_guards())
}

/// What every entry calls.
extern "sysv64" fn on_trap(frame: &mut TrapFrame) {
    let vector = frame.vector as u8;
    match vector {
        NON_MASKABLE_INTERRUPT => cpus::this().in_nmi(|| {
            stop::halt_if_another_stops();
            call(&NMI_HANDLER, frame);
        }),
        DEBUG => call(&DEBUG_HANDLER, frame),
        PAGE_FAULT if memory::catch_up(frame.error_code) => {}
        PAGE_FAULT => call(&PAGE_FAULT_HANDLER, frame),
        FIRST_INTERRUPT.. => call(&HANDLERS[usize::from(vector - FIRST_INTERRUPT)], frame),
        _ => report::stop(frame),
    }
}

/// Calls the handler there; where there is none, the trap ends the run.
fn call(handler: &AtomicPtr<()>, frame: &mut TrapFrame) {
    let handler = handler.load(Ordering::Acquire);
    if handler.is_null() {
        report::stop(frame);
    }
    // SAFETY: only the functions above store here, and only this type.
    let handler: InterruptHandler = unsafe { mem::transmute(handler) };
    handler(frame);
}
