//! Programs that use up memory: they alone are ended.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::arch::asm;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{Acquire, Release};

use kernel::memory;
use kernel::processes::{Call, Called, Cause, Exit, LoadError, Memory, Options, Process, Watch};
use kslab::Order;
use x86_64::VirtAddr;

use super::super::support::{Block, PAGE, frames, free, give_back, layout, order, take_all};
use super::{program, programs, run, start, test, unchanged, watched};

/// Runs `body` while little more memory is free than the kernel keeps for itself.
fn with_little_memory(body: impl FnOnce()) {
    const LITTLE: usize = 6 << 20;
    let low: usize = frames().stats().zones.iter().map(|zone| zone.low).sum();
    let target = low * PAGE + LITTLE;
    let mut taken = take_all();
    while frames().free_bytes() < target {
        let Some((frame, order)) = taken.pop() else { break };
        free(frame, order);
    }
    // The last block may have been a large one.
    for order in (0..=Order::MAX.get()).rev().map(order) {
        while frames().free_bytes() >= target + order.frames() as usize * PAGE {
            let Some(frame) = frames().allocate(order) else { break };
            taken.push((frame, order));
        }
    }
    body();
    give_back(taken);
}

program!(uses_all:
    "brk $0", "movl %eax, %ebp",
    "brk $0xb0000000", "expect $0xb0000000, 1",
    "1: movl $1, (%ebp)", "addl $4096, %ebp", "jmp 1b");
program!(works_on:
    "mmap2 $0, $16*4096, $R+W, $PRIVATE+ANONYMOUS", "movl %eax, %ebp",
    "movl $200, %edx",
    "2: movl %ebp, %edi", "movl $16*1024, %ecx", "movl %edx, %eax", "rep stosl",
    "movl %ebp, %edi", "movl $16*1024, %ecx", "movl %edx, %eax", "repe scasl", "jne 5f",
    "decl %edx", "jnz 2b",
    "exit $0",
    "5: exit $1");
// On the first touch of a page for which there is no frame the process alone is ended.
test!(a_program_that_uses_up_memory_is_ended_alone);
fn a_program_that_uses_up_memory_is_ended_alone() {
    let both = || {
        with_little_memory(|| {
            let other = start(works_on(), Options::default());
            let Exit::Killed(killed) = run(uses_all()) else { panic!("it has used up memory") };
            let Cause::OutOfMemory { address, mapping } = killed.cause else { panic!("{killed}") };
            assert!(mapping.addresses().contains(&address));
            assert!(alloc::format!("{killed}").starts_with("out of memory: 0x"), "{killed}");
            // What the kernel keeps for itself is still there.
            assert!(Block::new(layout(64 << 10, 4096), 1).is_some());
            assert_eq!(other.wait(), Exit::Status(0));
            // So is what the program has had: the next can use it.
            assert_eq!(run(works_on()), Exit::Status(0));
        });
    };
    both();
    unchanged(both);
}

program!(has_large_locals:
    // An array of 1 MiB, from its lowest byte on; then the lowest byte that a stack has on Linux, too.
    "subl $0x100000, %esp", "cmpl $0, (%esp)", "jne 5f", "movl $1, (%esp)",
    "movb $1, 0xbf7ff000",
    "brk $0",
    "exit $0",
    "5: exit $1");
// The stack is as large as on Linux; of it a page has its frame when it is used, also where all else is backed at once.
test!(a_stack_has_8_mib_of_which_what_is_used_has_frames);
fn a_stack_has_8_mib_of_which_what_is_used_has_frames() {
    for eager in [false, true] {
        let (exit, record) = watched(has_large_locals(), Options { eager, ..Options::default() });
        assert_eq!(exit, Exit::Status(0));
        let [first, last] = [record.memory[0], record.memory[1]];
        // The program's page, and the one that its arguments are in.
        assert_eq!((first.resident, first.reserved), (2 << 12, (8 << 20) + 4096));
        assert_eq!((last.resident, last.reserved), (first.resident + (2 << 12), first.reserved));
    }
}

program!(asks_for_too_much:
    "brk $0", "movl %eax, %ebp",
    "leal 4096(%ebp), %edi", "brk %edi", "expect %edi, 1",
    "leal 0x8000000(%ebp), %esi", "brk %esi", "expect %edi, 2",
    "mmap2 $0, $0x8000000, $R+W, $PRIVATE+ANONYMOUS", "expect $ENOMEM, 3",
    // What nobody can use needs no memory.
    "mmap2 $0, $0x8000000, $0, $PRIVATE+ANONYMOUS", "testl $4095, %eax", "jnz 5f",
    "mmap2 $0, $4096, $R+W, $PRIVATE+ANONYMOUS", "testl $4095, %eax", "jnz 5f", "movl $1, (%eax)",
    "exit $0",
    "5: exit $4");
// With memory that is backed at once a call fails that there is no memory for, and nothing has changed.
test!(what_cannot_be_backed_at_once_is_refused);
fn what_cannot_be_backed_at_once_is_refused() {
    let ask = || {
        with_little_memory(|| {
            let process = start(asks_for_too_much(), Options { eager: true, ..Options::default() });
            assert_eq!(process.wait(), Exit::Status(0));
        });
    };
    ask();
    unchanged(ask);
}

test!(without_memory_no_program_starts);
fn without_memory_no_program_starts() {
    let attempt = || Process::start(programs::brk(), Options::default()).map(|_| ());
    unchanged(|| {
        let mut taken = take_all();
        assert_eq!(attempt(), Err(LoadError::NoMemory));
        // Some, but the kernel's own.
        let some = taken.len() - taken.len().min(3);
        taken.drain(some..).for_each(|(frame, order)| free(frame, order));
        assert_eq!(attempt(), Err(LoadError::NoMemory));
        give_back(taken);
    });
}

/// Holds a process at two points until it has been looked at: before its first instruction and where it exits.
struct Halts(Arc<AtomicUsize>);

/// The process may run; it has come to its end; it may end.
const RUN: usize = 1;
const AT_EXIT: usize = 2;
const END: usize = 3;

fn wait_for(point: &AtomicUsize, value: usize) {
    while point.load(Acquire) != value {
        kernel::threads::yield_now();
    }
}

impl Watch for Halts {
    fn started(&mut self, _: &Memory) {
        wait_for(&self.0, RUN);
    }

    fn called(&mut self, called: &Called) {
        if matches!(called.call, Call::Exit { .. }) {
            self.0.store(AT_EXIT, Release);
            wait_for(&self.0, END);
        }
    }
}

program!(touches_its_memory:
    "mmap2 $0, $32*4096, $R+W, $PRIVATE+ANONYMOUS", "movl %eax, %ebp",
    "movl $32, %ecx", "1: movl %ecx, (%ebp)", "addl $4096, %ebp", "decl %ecx", "jnz 1b",
    "exit $0");
// What a process has can be seen while it runs; when it has ended it has nothing.
test!(memory_is_shown_while_a_process_runs_and_after_it);
fn memory_is_shown_while_a_process_runs_and_after_it() {
    let point = Arc::new(AtomicUsize::new(0));
    let watch = Box::new(Halts(point.clone()));
    let process = start(touches_its_memory(), Options { watch, ..Options::default() });
    let before = process.memory();
    assert!(before.resident > 0 && before.resident < before.reserved);
    point.store(RUN, Release);
    wait_for(&point, AT_EXIT);
    let most = process.memory();
    assert_eq!((most.resident - before.resident, most.reserved - before.reserved), (32 << 12, 32 << 12));
    point.store(END, Release);
    while !process.is_finished() {
        kernel::threads::yield_now();
    }
    assert_eq!(process.memory(), Memory::default());
    assert_eq!(process.wait(), Exit::Status(0));
}

/// Has the kernel do something on the thread of a process.
struct Does(fn());

impl Watch for Does {
    fn called(&mut self, _: &Called) {
        (self.0)();
    }
}

program!(calls_once: "brk $0", "exit $0");

// A process has the kernel's half of the address space as it was when it began; what comes is added when it is used.
test!(what_the_kernel_maps_anew_is_there_on_the_threads_of_processes);
fn what_the_kernel_maps_anew_is_there_on_the_threads_of_processes() {
    /// Where nothing else is, for half a terabyte around.
    const WINDOW: VirtAddr = VirtAddr::new(0xffff_d800_0000_0000);
    let maps_and_writes = || {
        let word = WINDOW.as_mut_ptr::<u64>();
        assert!(memory::map_new(WINDOW, 1), "no memory");
        // SAFETY: just mapped, for this alone.
        unsafe { word.write_volatile(7) };
        // SAFETY: as above.
        assert_eq!(unsafe { word.read_volatile() }, 7);
        memory::unmap(WINDOW, 1);
    };
    let watch = Box::new(Does(maps_and_writes));
    assert_eq!(start(calls_once(), Options { watch, ..Options::default() }).wait(), Exit::Status(0));
}

test!(
    the_kernel_does_not_use_a_programs_memory_by_its_addresses,
    stops_with = "page fault: read from 0x8048000, protected"
);
fn the_kernel_does_not_use_a_programs_memory_by_its_addresses() {
    let reads = || {
        // SAFETY: the CPU refuses to.
        unsafe { asm!("mov {0}, [{0}]", inout(reg) 0x0804_8000_u64 => _, options(nostack, readonly)) };
    };
    start(calls_once(), Options { watch: Box::new(Does(reads)), ..Options::default() }).wait();
}
