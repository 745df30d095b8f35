//! What a thread has of ring 3: page tables, the registers of the code there, and its floating point.
//!
//! The thread runs that code in [`UserMode::run`], which returns when there is an exception or a system call. Interrupts
//! do not end it: a thread is pre-empted in ring 3 as in the kernel.
//!
//! The CPU that goes on with a thread loads what it has ([`load`]): its page tables (those of the kernel, if it has none), the
//! stack for traps from ring 3, and the registers of x87 and SSE, which the kernel itself does not use. They are saved when
//! the thread leaves its CPU ([`save`]). The state lies on the thread's own stack; the thread's [`Context`] points to it.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;

use raw_cpuid::CpuId;
use x86_64::instructions::interrupts::without_interrupts;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr2, Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::structures::paging::PhysFrame;

use super::context::Context;
use super::scheduler;
use crate::traps::{self, TrapFrame};
use crate::{cpus, memory};

/// What a thread has of ring 3.
#[repr(C)]
pub(crate) struct State {
    registers: TrapFrame,
    /// How far the thread's stack is in use while ring 3 runs.
    kernel_stack: u64,
    tables: PhysFrame,
    floating_point: FloatingPoint,
}

/// The registers of x87 and SSE, as FXSAVE has them (Intel SDM vol. 1, 10.5).
#[repr(C, align(16))]
struct FloatingPoint([u8; 512]);

impl FloatingPoint {
    /// As the CPU has them after a reset, and every exception masked: FCW 0x37f, MXCSR 0x1f80.
    const fn new() -> Self {
        let mut image = [0; 512];
        [image[0], image[1]] = [0x7f, 0x03];
        [image[24], image[25]] = [0x80, 0x1f];
        Self(image)
    }
}

/// Why ring 3 was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trap {
    /// That of an exception, or [`SYSTEM_CALL`](traps::SYSTEM_CALL).
    pub(crate) vector: u8,
    /// Zero where the exception has none.
    pub(crate) error_code: u64,
    /// Of a page fault.
    pub(crate) address: u64,
}

/// Gets this CPU ready for code in ring 3; CPUs that it starts are as it is. That code may use SSE, and the CPU keeps the
/// kernel from running or using its memory, where it can: the kernel goes by physical addresses.
pub(crate) fn prepare_cpu() {
    let features = CpuId::new().get_extended_feature_info();
    let has = |feature: bool, flag| if feature { flag } else { Cr4Flags::empty() };
    let protection = features.map_or(Cr4Flags::empty(), |features| {
        has(features.has_smep(), Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION)
            | has(features.has_smap(), Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION)
            | has(features.has_umip(), Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION)
    });
    // SAFETY: the kernel uses neither floating point nor memory of ring 3.
    unsafe {
        Cr0::update(|flags| {
            flags.insert(Cr0Flags::MONITOR_COPROCESSOR | Cr0Flags::NUMERIC_ERROR);
            flags.remove(Cr0Flags::EMULATE_COPROCESSOR | Cr0Flags::TASK_SWITCHED);
        });
        Cr4::update(|flags| flags.insert(Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE | protection));
    }
}

/// The right of a thread to run code in ring 3.
pub(crate) struct UserMode<'a> {
    state: &'a UnsafeCell<State>,
    /// It belongs to the thread that has it.
    not_send: PhantomData<*const ()>,
}

/// Calls `body` with page tables in force, whenever this thread runs, whose root is `tables`.
///
/// # Safety
///
/// They map the kernel's half of the address space as the kernel's own tables do, and stay until this returns.
pub(crate) unsafe fn with_tables<T>(tables: PhysFrame, body: impl FnOnce(&mut UserMode) -> T) -> T {
    let registers = TrapFrame::default();
    let state = UnsafeCell::new(State { registers, kernel_stack: 0, tables, floating_point: FloatingPoint::new() });
    set_state(state.get());
    let result = body(&mut UserMode { state: &state, not_send: PhantomData });
    set_state(core::ptr::null_mut());
    result
}

/// Has the current thread be one with this state, or with none.
fn set_state(state: *mut State) {
    scheduler::with_current(|context| {
        context.user.store(state, Relaxed);
        // SAFETY: the context of this thread, with interrupts off; the state stays until this is called with null.
        unsafe { load(context) };
    });
}

impl UserMode<'_> {
    /// The registers that ring 3 goes on with.
    pub(crate) fn registers(&mut self) -> &mut TrapFrame {
        // SAFETY: only this thread uses them, by way of this value, which is borrowed; a switch of threads leaves them alone.
        unsafe { &mut (*self.state.get()).registers }
    }

    /// Runs code in ring 3 until it causes an exception or makes a system call.
    ///
    /// # Safety
    ///
    /// The registers have selectors of ring 3, interrupts on, and an address to go on at that the CPU can jump to.
    pub(crate) unsafe fn run(&mut self) -> Trap {
        let state = self.state.get();
        let registers = state.wrapping_byte_add(offset_of!(State, registers)).cast();
        let kernel_stack = state.wrapping_byte_add(offset_of!(State, kernel_stack)).cast();
        let address = without_interrupts(|| {
            // SAFETY: interrupts are off, the tables of the state are in force; the rest is the caller's promise.
            unsafe { traps::enter_user(registers, kernel_stack) };
            Cr2::read_raw()
        });
        let TrapFrame { vector, error_code, .. } = *self.registers();
        Trap { vector: vector as u8, error_code, address }
    }
}

impl fmt::Debug for UserMode<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UserMode")
    }
}

/// Saves what the CPU has of the thread, which is about to leave it.
///
/// # Safety
///
/// It is the context of the current thread; interrupts are off.
pub(super) unsafe fn save(context: &Context) {
    let state = context.user.load(Relaxed);
    if !state.is_null() {
        // SAFETY: the state of a thread that runs; the place is large enough and aligned.
        unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut (*state).floating_point, options(nostack, preserves_flags)) };
    }
}

/// Loads what the thread has that goes on.
///
/// # Safety
///
/// It is the context of the current thread; interrupts are off.
pub(super) unsafe fn load(context: &Context) {
    let state = context.user.load(Relaxed);
    // SAFETY: the state of a thread stays until it has said that it has none.
    let tables = unsafe { state.as_ref() }.map(|state| state.tables).or_else(memory::kernel_tables);
    if let Some(tables) = tables.filter(|&tables| tables != Cr3::read().0) {
        // SAFETY: all tables have the kernel's half, and nothing else is in use here.
        unsafe { Cr3::write(tables, Cr3Flags::empty()) };
    }
    if !state.is_null() {
        // SAFETY: as above; what is loaded was saved, or is as after a reset.
        unsafe {
            cpus::set_kernel_stack((*state).kernel_stack);
            asm!("fxrstor64 [{}]", in(reg) &raw const (*state).floating_point, options(nostack, preserves_flags));
        }
    }
}
