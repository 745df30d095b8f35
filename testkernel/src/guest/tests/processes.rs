//! Processes: programs in ring 3, what they may do, and what becomes of those that do more.
//!
//! The programs check what they can see, and end with another status than 0 where it is wrong.

mod breaks;
mod cpus;
mod files;
mod mappings;
mod memory;
mod pointers;
mod rights;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use kernel::cpus::Cpus;
use kernel::processes::{Called, Exit, Killed, LoadError, Memory, Options, Process, Watch};
use kslab::IrqLock;

use super::support::{frames, unchanged};
use crate::guest::programs::{self, program};
use crate::guest::runner::test;

/// Starts a program.
fn start(elf: &[u8], options: Options) -> Process {
    Process::start(elf, options).expect("a program that can be started")
}

/// Runs a program to its end.
fn run(elf: &[u8]) -> Exit {
    start(elf, Options::default()).wait()
}

/// Runs a program, lazily backed and eagerly, which finds all as it should; all its memory comes back.
fn succeeds(elf: &[u8]) {
    for eager in [false, true] {
        let run = || {
            let exit = start(elf, Options { eager, ..Options::default() }).wait();
            assert_eq!(exit, Exit::Status(0), "eager: {eager}");
        };
        // Page tables for the stacks of threads stay.
        run();
        unchanged(run);
    }
}

/// Runs a program that is ended for what it does, which then is told; all its memory comes back.
fn is_killed(elf: &[u8]) -> Killed {
    let run_it = || match run(elf) {
        Exit::Killed(killed) => killed,
        exit => panic!("it was not killed: {exit}"),
    };
    let killed = run_it();
    unchanged(|| assert_eq!(run_it(), killed));
    killed
}

/// What a program has done.
struct Record {
    text: Vec<u8>,
    /// At the start, and after each call.
    memory: Vec<Memory>,
    /// Free bytes of page frames then.
    free: Vec<usize>,
    calls: Vec<Called>,
}

impl Record {
    /// With room, so that keeping it changes nothing.
    fn new() -> Self {
        const ROOM: usize = 64;
        Self {
            text: Vec::with_capacity(8192),
            memory: Vec::with_capacity(ROOM),
            free: Vec::with_capacity(ROOM),
            calls: Vec::with_capacity(ROOM),
        }
    }

    fn add(&mut self, memory: &Memory) {
        self.memory.push(*memory);
        self.free.push(frames().free_bytes());
    }
}

/// Writes down what a program does.
struct Writer(Arc<IrqLock<Cpus, Record>>);

impl Watch for Writer {
    fn started(&mut self, memory: &Memory) {
        self.0.lock().add(memory);
    }

    fn wrote(&mut self, _: u32, text: &[u8]) {
        self.0.lock().text.extend_from_slice(text);
    }

    fn called(&mut self, called: &Called) {
        let mut record = self.0.lock();
        record.calls.push(*called);
        record.add(&called.memory);
    }
}

/// Shows nothing.
fn silent() -> Box<dyn Watch> {
    Box::new(Writer(Arc::new(IrqLock::new(Record::new()))))
}

/// Runs a program to its end, and writes down what it does.
fn watched(elf: &[u8], options: Options) -> (Exit, Record) {
    let record = Arc::new(IrqLock::new(Record::new()));
    let exit = start(elf, Options { watch: Box::new(Writer(record.clone())), ..options }).wait();
    let record = core::mem::replace(&mut *record.lock(), Record::new());
    (exit, record)
}

program!(status_300: "exit $300");
test!(the_status_of_a_program_is_its_lowest_byte);
fn the_status_of_a_program_is_its_lowest_byte() {
    assert_eq!(run(status_300()), Exit::Status(300 & 0xff));
}

program!(writes:
    "write $2, $0x08048001, $3",
    "expect $3, 1",
    "write $1, $0x08048001, $0",
    "expect $0, 2",
    // In parts, over the ends of pages, from memory that was never used.
    "mmap2 $0, $3*4096, $R, $PRIVATE+ANONYMOUS",
    "leal 4000(%eax), %ebp",
    "write $1, %ebp, $5000",
    "expect $5000, 3",
    "exit $0");
test!(what_a_program_writes_comes_whole);
fn what_a_program_writes_comes_whole() {
    let (exit, record) = watched(writes(), Options::default());
    assert_eq!(exit, Exit::Status(0));
    assert_eq!(&record.text[..3], b"ELF");
    assert!(record.text.len() == 5003 && record.text[3..].iter().all(|&byte| byte == 0));
}

program!(unknown_calls:
    "movl $0, %eax", "int $0x80", "expect $ENOSYS, 1",
    "movl $2, %eax", "int $0x80", "expect $ENOSYS, 2",
    "movl $0xffffffff, %eax", "int $0x80", "expect $ENOSYS, 3",
    "movl $90, %eax", "int $0x80", "expect $ENOSYS, 4",
    "exit $0");
test!(calls_that_are_not_there_say_so);
fn calls_that_are_not_there_say_so() {
    succeeds(unknown_calls());
}

program!(descriptors:
    "write $0, $0x08048000, $1", "expect $EBADF, 1",
    "write $3, $0x08048000, $1", "expect $EBADF, 2",
    "write $-1, $0, $0", "expect $EBADF, 3",
    "exit $0");
test!(two_descriptors_are_open);
fn two_descriptors_are_open() {
    succeeds(descriptors());
}

program!(first_registers:
    "orl %ebx, %eax", "orl %ecx, %eax", "orl %edx, %eax", "orl %esi, %eax", "orl %edi, %eax", "orl %ebp, %eax",
    "expect $0, 1",
    // What the ABI has on the stack: one argument, the program's name, then nothing.
    "cmpl $1, (%esp)", "jne 5f",
    "movl 4(%esp), %eax", "cmpl $0x676f7270, (%eax)", "jne 5f",
    "cmpl $0, 8(%esp)", "jne 5f",
    "cmpl $0, 12(%esp)", "jne 5f",
    "cmpl $6, 16(%esp)", "jne 5f",
    "cmpl $4096, 20(%esp)", "jne 5f",
    "testl $15, %esp", "jnz 5f",
    "exit $0",
    "5: exit $2");
program!(first_registers_64 of 64 bits:
    "orq %rbx, %rax", "orq %rcx, %rax", "orq %rdx, %rax", "orq %rsi, %rax", "orq %rdi, %rax", "orq %rbp, %rax",
    "orq %r8, %rax", "orq %r9, %rax", "orq %r10, %rax", "orq %r11, %rax", "orq %r12, %rax", "orq %r13, %rax",
    "orq %r14, %rax", "orq %r15, %rax",
    "jnz 5f",
    "movq %xmm0, %rax", "testq %rax, %rax", "jnz 5f",
    "movq %xmm15, %rax", "testq %rax, %rax", "jnz 5f",
    "cmpq $1, (%rsp)", "jne 5f",
    "cmpq $0, 16(%rsp)", "jne 5f",
    "movq 8(%rsp), %rax", "cmpl $0x676f7270, (%rax)", "jne 5f",
    "exit $0",
    "5: exit $1");
test!(a_program_starts_with_nothing_of_the_kernels);
fn a_program_starts_with_nothing_of_the_kernels() {
    succeeds(first_registers());
    succeeds(first_registers_64());
}

program!(keeps_registers of 64 bits:
    "movq $0x1111111111111111, %r8", "movq $0x2222222222222222, %r9", "movq $0x3333333333333333, %r10",
    "movq $0x4444444444444444, %r11", "movq $0x5555555555555555, %r12", "movq $0x6666666666666666, %r13",
    "movq $0x7777777777777777, %r14", "movq $0x8888888888888888, %r15", "movq $0x9999999999999999, %rbp",
    "movq %r9, %xmm3",
    "std",
    // The upper halves do not count, and stay.
    "movq $0x0000000500000000, %rbx",
    "movl $45, %eax", "int $0x80",
    "cld",
    "testl %eax, %eax", "jz 5f",
    "movq %rax, %rcx", "shrq $32, %rcx", "jnz 5f",
    "movq $0x0000000500000000, %rcx", "cmpq %rcx, %rbx", "jne 5f",
    "movq $0x1111111111111111, %rcx", "cmpq %rcx, %r8", "jne 5f",
    "movq $0x2222222222222222, %rcx", "cmpq %rcx, %r9", "jne 5f",
    "movq %xmm3, %rdx", "cmpq %rcx, %rdx", "jne 5f",
    "movq $0x3333333333333333, %rcx", "cmpq %rcx, %r10", "jne 5f",
    "movq $0x4444444444444444, %rcx", "cmpq %rcx, %r11", "jne 5f",
    "movq $0x8888888888888888, %rcx", "cmpq %rcx, %r15", "jne 5f",
    "movq $0x9999999999999999, %rcx", "cmpq %rcx, %rbp", "jne 5f",
    // An error is one in 64 bits too.
    "movl $999, %eax", "int $0x80",
    "cmpq $ENOSYS, %rax", "jne 5f",
    "exit $0",
    "5: exit $1");
test!(a_64_bit_program_keeps_its_registers_over_calls);
fn a_64_bit_program_keeps_its_registers_over_calls() {
    succeeds(keeps_registers());
}

test!(a_program_that_cannot_be_started_is_told_and_leaves_nothing);
fn a_program_that_cannot_be_started_is_told_and_leaves_nothing() {
    let attempt = |options| Process::start(programs::brk(), options).map(|_| ());
    let nowhere = || Options { cpu: Some(kernel::cpus::MAX), ..Options::default() };
    let small = || Options { limit: 8192, ..Options::default() };
    assert_eq!(attempt(nowhere()), Err(LoadError::NoCpu));
    unchanged(|| {
        assert_eq!(attempt(nowhere()), Err(LoadError::NoCpu));
        assert_eq!(attempt(small()), Err(LoadError::NoMemory));
    });
}
