//! The code at each vector, and the table that points to it.

use core::arch::naked_asm;
use core::mem;

use x86_64::structures::idt::InterruptDescriptorTable;
use x86_64::{PrivilegeLevel, VirtAddr};

use super::{FIRST_INTERRUPT, NON_MASKABLE_INTERRUPT, SYSTEM_CALL, cpu};
use crate::cpus::KERNEL_STACK;

/// What the CPU was doing when it took a trap. A handler that changes it changes where and how the CPU goes on.
#[derive(Debug, Clone, Default)]
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

/// The registers with the address in GS, and with the one that [`Block::load`](crate::cpus::Block) leaves there.
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The selector that RSP, DS and ES have in ring 3.
const USER_DATA: u16 = cpu::USER_DATA.0;

/// Completes the [`TrapFrame`] on the stack, calls [`super::on_trap`], and returns from the trap.
///
/// The CPU aligns the stack to 16 bytes before it pushes its 5 words; with the 17 and 2 pushed here the call is aligned too.
/// The 2 are a frame as if the code that was interrupted had called this: who follows frame pointers finds it. What it
/// returns to is said to be one byte behind RIP: before such an address there is the call, and so here the instruction
/// that was interrupted, be it the first of its function.
///
/// Ring 3 has no address in GS, and segments that it may have changed: on the way in the kernel's address comes from the
/// register that only the kernel can read, on the way out all are as ring 3 has them at first. A non-maskable interrupt
/// may come between the two, and leaves the address as it was.
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
        "test byte ptr [rdi + {cs}], 3",
        "jnz {from_user}",
        "cmp byte ptr [rdi + {vector}], {nmi}",
        "je 2f",
        "push [rdi + {rip}]",
        "inc qword ptr [rsp]",
        "push rbp",
        "mov rbp, rsp",
        "cld",
        "call {on_trap}",
        "add rsp, 16", // that frame
        "jmp {restore}",
        "2:",
        "mov ecx, {gs}",
        "rdmsr",
        "push rax",
        "push rdx",
        "mov ecx, {kernel_gs}",
        "rdmsr",
        "mov ecx, {gs}",
        "wrmsr",
        "push [rdi + {rip}]",
        "inc qword ptr [rsp]",
        "push rbp",
        "mov rbp, rsp",
        "cld",
        "call {on_trap}",
        "add rsp, 16",
        "pop rdx",
        "pop rax",
        "mov ecx, {gs}",
        "wrmsr",
        "jmp {restore}",
        cs = const mem::offset_of!(TrapFrame, cs),
        vector = const mem::offset_of!(TrapFrame, vector),
        rip = const mem::offset_of!(TrapFrame, rip),
        nmi = const NON_MASKABLE_INTERRUPT,
        gs = const GS_BASE,
        kernel_gs = const KERNEL_GS_BASE,
        on_trap = sym super::on_trap,
        from_user = sym from_user,
        restore = sym restore,
    )
}

/// Goes on with the [`TrapFrame`] at the top of the stack.
#[unsafe(naked)]
unsafe extern "sysv64" fn restore() {
    naked_asm!(
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
    )
}

/// The same with a frame of ring 3.
#[unsafe(naked)]
unsafe extern "sysv64" fn restore_to_user() {
    naked_asm!(
        "mov eax, {data}",
        "mov ds, eax",
        "mov es, eax",
        "xor eax, eax",
        "xor edx, edx",
        "mov fs, eax",
        "mov gs, eax",
        "mov ecx, {gs}",
        "wrmsr",
        "jmp {restore}",
        data = const USER_DATA,
        gs = const GS_BASE,
        restore = sym restore,
    )
}

/// What [`save_and_call`] does where ring 3 was interrupted, RDI being the frame.
///
/// Interrupts, and what says that the machine is broken, go the same way as in the kernel. Exceptions and system calls
/// are what [`enter_user`] returns with: the frame goes where that one was told, the stack and registers back to those of
/// its caller.
#[unsafe(naked)]
unsafe extern "sysv64" fn from_user() {
    naked_asm!(
        "mov ecx, {kernel_gs}",
        "rdmsr",
        "mov ecx, {gs}",
        "wrmsr",
        "push 2", // no flag of ring 3 stays
        "popfq",
        "mov eax, [rdi + {vector}]",
        "cmp eax, {system_call}",
        "je 2f",
        "cmp eax, {first_interrupt}",
        "jae 3f",
        "cmp eax, {nmi}",
        "je 3f",
        "cmp eax, 8", // double fault
        "je 3f",
        "cmp eax, 18", // machine check
        "je 3f",
        "2:",
        "mov rsi, rdi",
        "mov rsp, gs:[{kernel_stack}]",
        "pop rdi",
        "mov ecx, {words}",
        "rep movsq",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        "3:",
        "xor ebp, ebp",
        "push [rdi + {rip}]",
        "push rbp",
        "mov rbp, rsp",
        "call {on_trap}",
        "add rsp, 16",
        "jmp {restore_to_user}",
        vector = const mem::offset_of!(TrapFrame, vector),
        rip = const mem::offset_of!(TrapFrame, rip),
        system_call = const SYSTEM_CALL,
        first_interrupt = const FIRST_INTERRUPT,
        nmi = const NON_MASKABLE_INTERRUPT,
        gs = const GS_BASE,
        kernel_gs = const KERNEL_GS_BASE,
        kernel_stack = const KERNEL_STACK,
        words = const size_of::<TrapFrame>() / 8,
        on_trap = sym super::on_trap,
        restore_to_user = sym restore_to_user,
    )
}

/// Goes on in ring 3 with what `frame` says, and returns when that has caused an exception or made a system call, with
/// interrupts off, and `frame` being as it was then. Interrupts are served meanwhile, and other threads may run.
///
/// `stack` is told how far the stack is in use then, before this leaves the kernel: whoever has this thread go on, on
/// whatever CPU, tells it that CPU (see [`set_kernel_stack`](crate::cpus::set_kernel_stack)).
///
/// # Safety
///
/// Interrupts are off. The page tables in force are those that the code in ring 3 is meant for, and stay in force
/// whenever the thread runs. The frame has selectors of ring 3 and an address that the CPU can jump to.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn enter_user(frame: *mut TrapFrame, stack: *mut u64) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "mov [rsi], rsp",
        "mov gs:[{kernel_stack}], rsp",
        "sub rsp, 8 * {words}",
        "mov rsi, rdi",
        "mov rdi, rsp",
        "mov ecx, {words}",
        "cld",
        "rep movsq",
        "jmp {restore_to_user}",
        kernel_stack = const KERNEL_STACK,
        words = const size_of::<TrapFrame>() / 8,
        restore_to_user = sym restore_to_user,
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
        let options = unsafe { options.set_code_selector(cpu::CODE) };
        if vector == SYSTEM_CALL {
            options.set_privilege_level(PrivilegeLevel::Ring3);
        }
    }
    table
}
