//! Exceptions, interrupts and panics: each is named in the report, whatever state the kernel was in.

use core::alloc::Layout;
use core::arch::asm;
use core::fmt;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};

use kernel::heap::HEAP;
use kernel::{print, serial, traps};
use x86_64::VirtAddr;
use x86_64::instructions::tables::{lidt, sidt};
use x86_64::structures::DescriptorTablePointer;

use crate::guest::runner::test;

/// An address that nothing is mapped at, on any way of booting.
const NOWHERE: u64 = 0xffff_b000_0000_0000;

/// Reads a byte where no Rust reference may point.
fn read(address: u64) -> u8 {
    let byte;
    // SAFETY: the tests read where the CPU refuses to.
    unsafe { asm!("mov {}, [{}]", out(reg_byte) byte, in(reg) address, options(nostack, readonly)) };
    byte
}

/// Writes a byte where no Rust reference may point.
fn write(address: u64) {
    // SAFETY: the tests write where the CPU refuses to.
    unsafe { asm!("mov byte ptr [{}], 1", in(reg) address, options(nostack)) };
}

fn execute(address: u64) {
    // SAFETY: the tests call what the CPU refuses to execute.
    unsafe { asm!("call {}", in(reg) address) };
}

/// Uses the stack at the address `stack`, which is none.
fn push_on(stack: u64) {
    // SAFETY: the CPU refuses, so nothing is overwritten.
    unsafe { asm!("mov rsp, {}", "push rax", "ud2", in(reg) stack, options(noreturn)) };
}

test!(a_read_from_nowhere_is_named, stops_with = "page fault: read from 0xffffb00000000123, not mapped");
fn a_read_from_nowhere_is_named() {
    read(NOWHERE + 0x123);
}

test!(a_write_to_nowhere_is_named, stops_with = "page fault: write to 0xffffb00000000fff, not mapped");
fn a_write_to_nowhere_is_named() {
    write(NOWHERE + 0xfff);
}

test!(execution_of_nowhere_is_named, stops_with = "page fault: execution at 0xffffb00000000000, not mapped");
fn execution_of_nowhere_is_named() {
    execute(NOWHERE);
}

test!(the_null_pointer_is_not_mapped, stops_with = "page fault: read from 0x0, not mapped");
fn the_null_pointer_is_not_mapped() {
    read(0);
}

test!(code_is_read_only, stops_with = "page fault: write to kernel text, protected");
fn code_is_read_only() {
    write(code_is_read_only as *const () as u64);
}

test!(constants_are_read_only, stops_with = "page fault: write to kernel rodata, protected");
fn constants_are_read_only() {
    static CONSTANT: u8 = 0;
    write((&raw const CONSTANT).addr() as u64);
}

test!(data_is_not_executable, stops_with = "page fault: execution at kernel data, protected");
fn data_is_not_executable() {
    static DATA: AtomicU64 = AtomicU64::new(0);
    execute(DATA.as_ptr().addr() as u64);
}

test!(
    the_map_of_physical_memory_is_not_executable,
    stops_with = "page fault: execution at 0xffff800000200000, protected"
);
fn the_map_of_physical_memory_is_not_executable() {
    execute(kernel::memory::physical(0x20_0000).addr() as u64);
}

test!(a_stack_overflow_is_named, stops_with = "stack overflow: boot stack");
fn a_stack_overflow_is_named() {
    fn descend(depth: u64) -> u64 {
        if black_box(depth) == u64::MAX { 0 } else { descend(depth + 1) + black_box(1) }
    }
    descend(0);
}

test!(row_105_a_stack_overflow_in_the_allocator_is_named, stops_with = "stack overflow: boot stack");
fn row_105_a_stack_overflow_in_the_allocator_is_named() {
    // So little of a frame that it is the allocator which goes over the end, or what it calls.
    fn descend(depth: u64) -> bool {
        let block = black_box(HEAP.allocate(Layout::new::<[u64; 40]>()));
        black_box(depth) == u64::MAX || descend(depth + 1) && black_box(block).is_some()
    }
    black_box(descend(0));
}

test!(a_frame_larger_than_the_stack_does_not_pass_the_guard, stops_with = "stack overflow: boot stack");
fn a_frame_larger_than_the_stack_does_not_pass_the_guard() {
    black_box([1_u8; 256 * 1024]);
}

test!(a_fault_on_a_broken_stack_is_reported, stops_with = "page fault: write to 0xffffb00000000ff8, not mapped");
fn a_fault_on_a_broken_stack_is_reported() {
    push_on(NOWHERE + 0x1000);
}

test!(a_fault_in_a_fault_is_a_double_fault, stops_with = "double fault");
fn a_fault_in_a_fault_is_a_double_fault() {
    // Not canonical: the push faults, and so does what the CPU pushes for that fault.
    push_on(1 << 60);
}

test!(a_vector_without_an_entry_is_a_double_fault, stops_with = "double fault");
fn a_vector_without_an_entry_is_a_double_fault() {
    const DOUBLE_FAULT: usize = 8;
    let mut table = [0_u128; 32];
    // SAFETY: the kernel's table has an entry of 16 bytes for each vector.
    table[DOUBLE_FAULT] = unsafe { sidt().base.as_ptr::<u128>().add(DOUBLE_FAULT).read() };
    let pointer = DescriptorTablePointer { limit: size_of_val(&table) as u16 - 1, base: VirtAddr::from_ptr(&table) };
    // SAFETY: the invalid opcode finds no entry, the fault about that none either; then comes the copied one.
    unsafe {
        lidt(&pointer);
        asm!("ud2");
    }
}

test!(a_divide_error_is_named, stops_with = "divide error");
fn a_divide_error_is_named() {
    // SAFETY: faults before it changes a register.
    unsafe { asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _) };
}

test!(an_invalid_opcode_is_named, stops_with = "invalid opcode");
fn an_invalid_opcode_is_named() {
    // SAFETY: does nothing but fault.
    unsafe { asm!("ud2") };
}

test!(a_breakpoint_is_named, stops_with = "breakpoint");
fn a_breakpoint_is_named() {
    x86_64::instructions::interrupts::int3();
}

test!(a_general_protection_fault_is_named, stops_with = "general protection fault");
fn a_general_protection_fault_is_named() {
    read(1 << 60);
}

test!(a_non_maskable_interrupt_is_named, stops_with = "non-maskable interrupt");
fn a_non_maskable_interrupt_is_named() {
    // SAFETY: the kernel has an entry for this vector.
    unsafe { asm!("int 2") };
}

test!(an_interrupt_that_nobody_expects_is_named, stops_with = "unexpected interrupt 77");
fn an_interrupt_that_nobody_expects_is_named() {
    // SAFETY: the kernel has an entry for every vector.
    unsafe { asm!("int 77") };
}

test!(an_interrupt_keeps_every_register);
fn an_interrupt_keeps_every_register() {
    const VECTOR: u8 = 0x50;
    static SEEN: AtomicU64 = AtomicU64::new(0);
    traps::set_interrupt_handler(VECTOR, |frame| {
        let sum = frame.rax + frame.rcx + frame.rdx + frame.rsi + frame.rdi;
        SEEN.store(
            sum + frame.r8 + frame.r9 + frame.r10 + frame.r11 + frame.r12 + frame.r13 + frame.r14 + frame.r15,
            Ordering::Relaxed,
        );
        // Registers that a function need not keep.
        // SAFETY: they are declared as changed.
        unsafe {
            asm!("", out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _)
        };
    });
    let (mut a, mut c, mut d, mut si, mut di) = (1_u64, 2_u64, 4_u64, 8_u64, 16_u64);
    let (mut r8, mut r9, mut r10, mut r11) = (32_u64, 64_u64, 128_u64, 256_u64);
    let (mut r12, mut r13, mut r14, mut r15) = (512_u64, 1024_u64, 2048_u64, 4096_u64);
    // SAFETY: the kernel has an entry for every vector, and this one returns.
    unsafe {
        asm!("int {vector}", vector = const VECTOR,
            inout("rax") a, inout("rcx") c, inout("rdx") d, inout("rsi") si, inout("rdi") di, inout("r8") r8,
            inout("r9") r9, inout("r10") r10, inout("r11") r11, inout("r12") r12, inout("r13") r13, inout("r14") r14,
            inout("r15") r15)
    };
    assert_eq!(SEEN.load(Ordering::Relaxed), (1 << 13) - 1, "the handler saw other values");
    let after = [a, c, d, si, di, r8, r9, r10, r11, r12, r13, r14, r15];
    assert!((0..).zip(after).all(|(bit, value)| value == 1 << bit), "changed: {after:?}");
}

test!(a_panic_gives_its_message, stops_with = "panic: six times seven is 42");
fn a_panic_gives_its_message() {
    panic!("six times seven is {}", black_box(6) * 7);
}

test!(a_message_of_several_lines_is_one_headline, stops_with = "panic: one\ntwo\t\u{1b}[31mred");
fn a_message_of_several_lines_is_one_headline() {
    panic!("one\ntwo\t\u{1b}[31mred");
}

test!(a_panic_in_an_interrupt_is_reported, stops_with = "panic: in an interrupt");
fn a_panic_in_an_interrupt_is_reported() {
    traps::set_interrupt_handler(0x51, |_| panic!("in an interrupt"));
    // SAFETY: the kernel has an entry for every vector.
    unsafe { asm!("int 0x51") };
}

test!(a_panic_with_the_serial_port_locked_is_reported, stops_with = "panic: with the port locked");
fn a_panic_with_the_serial_port_locked_is_reported() {
    let _port = serial::lock();
    panic!("with the port locked");
}

test!(a_panic_in_the_middle_of_a_line_is_reported, stops_with = "panic: while printing");
fn a_panic_in_the_middle_of_a_line_is_reported() {
    print!("half a line {}", PanicsWhenPrinted("while printing"));
}

test!(row_87_a_report_during_a_report_ends_the_run, stops_with = "report during a report");
fn row_87_a_report_during_a_report_ends_the_run() {
    panic!("{}", PanicsWhenPrinted("while reporting"));
}

struct PanicsWhenPrinted(&'static str);

impl fmt::Display for PanicsWhenPrinted {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("{}", self.0)
    }
}
