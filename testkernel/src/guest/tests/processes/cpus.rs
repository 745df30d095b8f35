//! Processes on several CPUs, and several on one: each has its registers, its memory and its turns.
//!
//! On a machine with one CPU some of these test little.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kernel::processes::{Exit, Options, Process};
use kernel::{cpus, threads, traps};

use super::{program, programs, start, test, unchanged};

/// A program that has `$value` in a register, on its stack, in an SSE and an x87 register and at an address where others
/// have theirs, and looks for long whether it stays.
macro_rules! keeps {
    ($name:ident, $value:literal) => {
        program!($name:
            "mmap2 $0x10000000, $4096, $R+W, $PRIVATE+ANONYMOUS+FIXED",
            concat!("movl $", $value, ", %esi"),
            "movl %esi, 0x10000000", "pushl %esi", "fildl (%esp)", "movd %esi, %xmm7",
            "movl $2000000, %ecx",
            "1: movd %xmm7, %eax", "cmpl %esi, %eax", "jne 5f",
            "cmpl %esi, (%esp)", "jne 5f",
            "cmpl %esi, 0x10000000", "jne 5f",
            "decl %ecx", "jnz 1b",
            "fistpl (%esp)", "cmpl %esi, (%esp)", "jne 5f",
            "exit $0",
            "5: exit $1");
    };
}
keeps!(keeps_one, 0x01010101);
keeps!(keeps_two, 0x02020202);
keeps!(keeps_three, 0x03030303);

fn all_exit_well(processes: Vec<Process>) {
    processes.into_iter().for_each(|process| assert_eq!(process.wait(), Exit::Status(0)));
}

test!(programs_that_take_turns_on_a_cpu_keep_their_registers_and_memory);
fn programs_that_take_turns_on_a_cpu_keep_their_registers_and_memory() {
    let round = || {
        all_exit_well([keeps_one(), keeps_two(), keeps_three()].map(|elf| start(elf, Options::default())).into());
    };
    round();
    unchanged(round);
}

test!(programs_run_on_all_cpus_at_once);
fn programs_run_on_all_cpus_at_once() {
    let round = || {
        let on = |cpu| [keeps_one(), keeps_two(), programs::mmap()].map(|elf| (cpu, elf));
        let start = |(cpu, elf)| start(elf, Options { cpu: Some(cpu), watch: super::silent(), ..Options::default() });
        all_exit_well(cpus::online().take(4).flat_map(on).map(start).collect());
    };
    round();
    unchanged(round);
}

test!(a_program_that_is_sent_from_cpu_to_cpu_keeps_its_registers_and_memory);
fn a_program_that_is_sent_from_cpu_to_cpu_keeps_its_registers_and_memory() {
    let all: Vec<_> = cpus::online().collect();
    let round = || {
        let processes: Vec<_> = [keeps_one(), keeps_three()].map(|elf| start(elf, Options::default())).into();
        let mut turn = 0;
        while processes.iter().any(|process| !process.is_finished()) {
            turn += 1;
            for (index, process) in processes.iter().enumerate() {
                assert!(process.thread().migrate_to(all[(turn + index) % all.len()]));
            }
            threads::yield_now();
        }
        all_exit_well(processes);
    };
    round();
    unchanged(round);
}

// Wherever it comes, in ring 3 or on the way in or out.
test!(a_non_maskable_interrupt_leaves_a_program_alone);
fn a_non_maskable_interrupt_leaves_a_program_alone() {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let cpu = cpus::online().last().expect("the boot CPU");
    traps::set_nmi_handler(Some(|_| {
        // By way of the CPU's own block.
        COUNT.fetch_add(1 + cpus::current() * 0x1000, Relaxed);
    }));
    let processes: Vec<_> =
        [keeps_one(), makes_calls()].map(|elf| start(elf, Options { cpu: Some(cpu), ..Options::default() })).into();
    let mut sent = 0;
    while processes.iter().any(|process| !process.is_finished()) {
        if COUNT.load(Relaxed) == sent * (1 + cpu * 0x1000) {
            cpus::send_nmi(cpu).expect("it is online");
            sent += 1;
        }
        threads::yield_now();
    }
    all_exit_well(processes);
    while COUNT.load(Relaxed) != sent * (1 + cpu * 0x1000) {
        threads::yield_now();
    }
    traps::set_nmi_handler(None);
    assert!(sent > 0);
}

program!(makes_calls:
    "movl $20000, %ebp",
    "1: brk $0", "testl $4095, %eax", "jnz 5f", "decl %ebp", "jnz 1b",
    "exit $0",
    "5: exit $1");

program!(spins: "movl $100000000, %ecx", "1: decl %ecx", "jnz 1b", "exit $0");
// Ring 3 is interrupted as the kernel is: others have their turns, and a CPU that waits for this one is answered.
test!(a_program_that_makes_no_calls_does_not_keep_the_cpu);
fn a_program_that_makes_no_calls_does_not_keep_the_cpu() {
    let process = start(spins(), Options::default());
    let mut turns = 0;
    while !process.is_finished() && turns < 5 {
        threads::yield_now();
        turns += 1;
    }
    assert_eq!(turns, 5, "it had its whole run in less than five turns");
    assert!(!process.is_finished());
    assert_eq!(process.wait(), Exit::Status(0));
}
