//! What ring 3 may not do: each ends the program, with a report, and the kernel goes on.

use kernel::processes::{Cause, Kind, Protection};

use super::{is_killed, program, succeeds, test};

const INVALID_OPCODE: u8 = 6;
const GENERAL_PROTECTION: u8 = 13;

program!(halts: "hlt");
program!(masks_interrupts: "cli");
program!(reads_a_port: "inb $0x60, %al");
program!(writes_to_a_port: "movl $0x10, %eax", "movw $0xf4, %dx", "outl %eax, %dx");
program!(reads_cr3: "movl %cr3, %eax");
program!(writes_cr0: "xorl %eax, %eax", "movl %eax, %cr0");
program!(loads_segments: "lgdt (%esp)");
program!(reads_a_register_of_the_model: "movl $0xc0000102, %ecx", "rdmsr");
program!(takes_a_kernel_segment: "movl $0x10, %eax", "movl %eax, %ds");
program!(jumps_to_the_kernels_segment: "ljmpl $0x8, $0x08048000");
program!(raises_a_page_fault: "int $14");
program!(raises_the_timers_interrupt: "int $32");
program!(breaks: "int3");
program!(enters_by_sysenter: "sysenter");
program!(reads_a_strange_address of 64 bits: "movq $0x1000000000000000, %rax", "movl (%rax), %eax");
program!(jumps_to_a_strange_address of 64 bits: "movq $0x8000000000000000, %rax", "pushq %rax", "ret");
program!(changes_the_gs_base of 64 bits: "swapgs");

test!(what_only_the_kernel_may_do_ends_the_program);
fn what_only_the_kernel_may_do_ends_the_program() {
    for elf in [
        halts(),
        masks_interrupts(),
        reads_a_port(),
        writes_to_a_port(),
        reads_cr3(),
        writes_cr0(),
        loads_segments(),
        reads_a_register_of_the_model(),
        takes_a_kernel_segment(),
        jumps_to_the_kernels_segment(),
        raises_a_page_fault(),
        raises_the_timers_interrupt(),
        breaks(),
        enters_by_sysenter(),
        reads_a_strange_address(),
        jumps_to_a_strange_address(),
        changes_the_gs_base(),
    ] {
        let killed = is_killed(elf);
        assert_eq!(killed.cause, Cause::Exception(GENERAL_PROTECTION), "{killed}");
    }
}

program!(divides: "xorl %ecx, %ecx", "movl $1, %eax", "xorl %edx, %edx", "divl %ecx");
program!(has_no_opcode: "ud2");
program!(enters_by_syscall of 64 bits: "syscall");
program!(single_steps: "pushfl", "orl $0x100, (%esp)", "popfl", "nop", "exit $0");
program!(divides_with_x87: "pushl $0x0340", "fldcw (%esp)", "fldz", "fld1", "fdiv %st(1), %st", "fwait", "exit $0");

test!(exceptions_end_the_program_and_are_named);
fn exceptions_end_the_program_and_are_named() {
    for (elf, vector, name) in [
        (divides(), 0, "divide error; rip 0x0804805d in segment 0x08048000-0x08049000 r-x"),
        (single_steps(), 1, "debug exception; rip 0x"),
        (has_no_opcode(), INVALID_OPCODE, "invalid opcode; rip 0x08048054 in segment"),
        (enters_by_syscall(), INVALID_OPCODE, "invalid opcode; rip 0x08048078 in segment"),
        (divides_with_x87(), 16, "x87 floating-point error; rip 0x"),
    ] {
        let killed = is_killed(elf);
        assert_eq!(killed.cause, Cause::Exception(vector), "{killed}");
        assert!(alloc::format!("{killed}").starts_with(name), "{killed}");
    }
}

program!(reads_null: "movl 0, %eax");
program!(jumps_to_null: "xorl %eax, %eax", "jmpl *%eax");
program!(writes_high: "movl $1, 0xfffffffc");
program!(reads_the_kernel of 64 bits: "movq $0xffffffff80200000, %rax", "movl (%rax), %eax");
program!(writes_to_the_kernel of 64 bits: "movq $0xffffffff80200000, %rax", "movl $1, (%rax)");
program!(runs_the_kernel of 64 bits: "movq $0xffffffff80200000, %rax", "jmpq *%rax");
program!(reads_all_memory of 64 bits: "movq $0xffff800000001000, %rax", "movl (%rax), %eax");
program!(reads_above_32_bits of 64 bits: "movq $0x700000000000, %rax", "movl (%rax), %eax");

// A page fault that no mapping covers.
test!(memory_that_is_not_the_programs_ends_it);
fn memory_that_is_not_the_programs_ends_it() {
    for (elf, access, address) in [
        (reads_null(), Protection::READ, 0),
        (jumps_to_null(), Protection::EXECUTE, 0),
        (writes_high(), Protection::WRITE, 0xffff_fffc),
        (reads_the_kernel(), Protection::READ, 0xffff_ffff_8020_0000),
        (writes_to_the_kernel(), Protection::WRITE, 0xffff_ffff_8020_0000),
        (runs_the_kernel(), Protection::EXECUTE, 0xffff_ffff_8020_0000),
        (reads_all_memory(), Protection::READ, 0xffff_8000_0000_1000),
        (reads_above_32_bits(), Protection::READ, 0x7000_0000_0000),
    ] {
        let killed = is_killed(elf);
        assert_eq!(killed.cause, Cause::BadAccess { access, address, mapping: None }, "{killed}");
    }
}

program!(writes_to_its_code: "movl $1, 0x08048000");
program!(overflows_its_stack: "1: pushl %eax", "jmp 1b");
program!(runs_its_stack: "pushl $0xc3", "calll *%esp");

test!(a_program_is_held_to_what_its_file_says);
fn a_program_is_held_to_what_its_file_says() {
    let killed = is_killed(writes_to_its_code());
    let Cause::BadAccess { access: Protection::WRITE, address: 0x0804_8000, mapping: Some(mapping) } = killed.cause
    else {
        panic!("{killed}");
    };
    assert_eq!((mapping.kind, mapping.protection), (Kind::Segment, Protection::READ.with(Protection::EXECUTE)));
    let killed = is_killed(runs_its_stack());
    let Cause::BadAccess { access: Protection::EXECUTE, mapping: Some(mapping), .. } = killed.cause else {
        panic!("{killed}");
    };
    assert_eq!(mapping.kind, Kind::Stack);
    // All of the stack, and not a byte more.
    let killed = is_killed(overflows_its_stack());
    let below = mapping.start - 4;
    assert_eq!(killed.cause, Cause::BadAccess { access: Protection::WRITE, address: below, mapping: None }, "{killed}");
}

program!(changes_segments:
    "xorl %eax, %eax", "movl %eax, %fs", "movl %eax, %gs",
    "movl $10000000, %ecx", "1: decl %ecx", "jnz 1b",
    "movl %ss, %eax", "movl %eax, %gs", "movl %eax, %fs",
    "movl %gs:0x08048000, %eax", "expect $0x464c457f, 1",
    "movl $10000000, %ecx", "1: decl %ecx", "jnz 1b",
    // These are in the kernel's hands too.
    "pushfl", "orl $0x40400, (%esp)", "popfl",
    "brk $0", "cld",
    "exit $0");
test!(what_a_program_does_to_its_segments_and_flags_is_its_own);
fn what_a_program_does_to_its_segments_and_flags_is_its_own() {
    succeeds(changes_segments());
}
