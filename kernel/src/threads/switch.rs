//! The change from one thread's stack to another's.
//!
//! To the compiler a switch is the call of a function that returns later, perhaps on another CPU. So it keeps what such a
//! function must keep (System V ABI, 3.2.1): `rbx`, `rbp`, `r12` to `r15` and the stack pointer. Interrupts are off on both
//! sides, so RFLAGS need no saving; the GS base belongs to the CPU, not to the thread. The kernel is built for a target
//! without x87 and SSE (floating point is done in software), so that code in ring 3 alone has such registers: see
//! [`user`](super::user).

use core::arch::naked_asm;
use core::ptr::NonNull;

use x86_64::VirtAddr;

use super::context::Context;

/// Saves the registers on the stack in use, stores the stack pointer in `save`, and goes on where `load` was stored.
///
/// # Safety
///
/// Interrupts are off. `load` is what [`prepare`] returned or another switch has stored, and has not been gone on with
/// since; the stack that it points to is mapped. Nobody goes on with `save` before the other stack is in use.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn switch(save: *mut u64, load: u64) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// Where a new thread begins: [`switch`] has loaded what [`prepare`] laid out.
#[unsafe(naked)]
unsafe extern "sysv64" fn begin() {
    naked_asm!(
        "mov rdi, rbx",
        "call {run}",
        "ud2",
        run = sym super::run,
    )
}

/// Lays the first frame of a thread on its stack, which ends at `top`. Returns the stack pointer to [`switch`] to.
///
/// # Safety
///
/// The page below `top`, a multiple of 16, is writable and unused.
pub(super) unsafe fn prepare(top: VirtAddr, context: NonNull<Context>) -> u64 {
    // In the order of the pops: r15, r14, r13, r12, rbx, rbp (0: frame pointers end here), and where to return to.
    let words = [0, 0, 0, 0, context.addr().get() as u64, 0, begin as *const () as u64];
    let frame = top - size_of_val(&words) as u64;
    // SAFETY: the caller gives us the memory.
    unsafe { frame.as_mut_ptr::<[u64; 7]>().write(words) };
    frame.as_u64()
}
