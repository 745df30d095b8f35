//! The code at each vector, and the table that points to it.

use core::arch::naked_asm;
use core::mem;

use x86_64::VirtAddr;
use x86_64::structures::idt::InterruptDescriptorTable;

use super::{FIRST_INTERRUPT, cpu};

/// What the CPU was doing when it took a trap. A handler that changes it changes where and how the CPU goes on.
#[derive(Debug)]
#[repr(C)]
#[expect(missing_docs, reason = "they are the registers")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    /// The number of the exception or interrupt.
    pub vector: u64,
    /// Zero where the exception has none.
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Bytes from one vector's code to that of the next.
const STRIDE: u64 = 16;

/// The code of all 256 vectors, one after the other.
///
/// Each pushes its number, below the error code (0 where the CPU pushes none: Intel SDM vol. 3, table 6-1), and
/// continues at [`save_and_call`].
#[unsafe(naked)]
unsafe extern "sysv64" fn vectors() {
    naked_asm!(
        ".set kernel_vector, 0",
        ".rept 256",
        ".balign {stride}",
        ".if kernel_vector != 8 && kernel_vector != 17 && kernel_vector != 21 && kernel_vector != 29 && kernel_vector != 30 && (kernel_vector < 10 || kernel_vector > 14)",
        "push 0",
        ".endif",
        "push kernel_vector",
        "jmp {next}",
        ".set kernel_vector, kernel_vector + 1",
        ".endr",
        stride = const STRIDE,
        next = sym save_and_call,
    )
}

/// Completes the [`TrapFrame`] on the stack, calls [`super::on_trap`], and returns from the trap.
///
/// The CPU aligns the stack to 16 bytes before it pushes its 5 words; with the 17 and 2 pushed here the call is aligned too.
/// The 2 are a frame as if the code that was interrupted had called this: who follows frame pointers finds it.
#[unsafe(naked)]
unsafe extern "sysv64" fn save_and_call() {
    naked_asm!(
        "push rax",
        "push rbx",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push rbp",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rdi, rsp",
        "push [rdi + {rip}]",
        "push rbp",
        "mov rbp, rsp",
        "cld",
        "call {on_trap}",
        "add rsp, 16", // that frame
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rbp",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "add rsp, 16", // vector and error code
        "iretq",
        rip = const mem::offset_of!(TrapFrame, rip),
        on_trap = sym super::on_trap,
    )
}

fn address(vector: u8) -> VirtAddr {
    VirtAddr::from_ptr(vectors as *const ()) + u64::from(vector) * STRIDE
}

/// The table for every CPU: an interrupt gate for each vector that a CPU may use.
pub(super) fn table() -> InterruptDescriptorTable {
    let mut table = InterruptDescriptorTable::new();

    /// Points entries, each of a type of its own, to the code of their vectors.
    macro_rules! set {
        ($($vector:literal => $field:ident $(on $stack:ident)?,)*) => { $(
            // SAFETY: the code there expects just what the CPU pushes for this vector, and saves all registers.
            let options = unsafe { table.$field.set_handler_addr(address($vector)) };
            // SAFETY: this selector is that of the kernel's code, and this stack serves this vector alone.
            unsafe { options.set_code_selector(cpu::CODE) $( .set_stack_index(cpu::$stack) )? };
        )* };
    }
    set! {
        0 => divide_error,
        1 => debug,
        2 => non_maskable_interrupt on NON_MASKABLE_INTERRUPT,
        3 => breakpoint,
        4 => overflow,
        5 => bound_range_exceeded,
        6 => invalid_opcode,
        7 => device_not_available,
        8 => double_fault on DOUBLE_FAULT,
        10 => invalid_tss,
        11 => segment_not_present,
        12 => stack_segment_fault,
        13 => general_protection_fault,
        14 => page_fault on PAGE_FAULT,
        16 => x87_floating_point,
        17 => alignment_check,
        18 => machine_check,
        19 => simd_floating_point,
        20 => virtualization,
        21 => cp_protection_exception,
        28 => hv_injection_exception,
        29 => vmm_communication_exception,
        30 => security_exception,
    }
    for (vector, entry) in (FIRST_INTERRUPT..=u8::MAX).zip(table.slice_mut(FIRST_INTERRUPT..)) {
        // SAFETY: the code there expects what the CPU pushes for an interrupt, and saves all registers.
        let options = unsafe { entry.set_handler_addr(address(vector)) };
        // SAFETY: this selector is that of the kernel's code.
        unsafe { options.set_code_selector(cpu::CODE) };
    }
    table
}
