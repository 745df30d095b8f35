//! The ramdisk, the names of functions in it, and the calls that a report names.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::arch::asm;
use core::fmt::{self, Write};
use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use kernel::backtrace::{self, Call};
use kernel::heap::HEAP;
use kernel::symbols::{self, Symbol, Table};
use kernel::traps::TrapFrame;
use kernel::{ramdisk, threads, timer};

use super::steps::stepped;
use crate::guest::boot_info;
use crate::guest::runner::test;

/// Where the ramdisk is mapped.
const RAMDISK: u64 = 0xffff_e000_0000_0000;

/// The smallest stack that a thread may have.
const SMALL_STACK: usize = 16 * 1024;

/// The last part of a function's path, without what a closure adds.
struct Short<'a>(Symbol<'a>);

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.name().to_string();
        f.write_str(name.trim_end_matches("::{{closure}}").rsplit("::").next().unwrap_or(""))
    }
}

/// The name of the function that makes the call.
fn name(call: usize) -> String {
    symbols::find(call as u64 - 1).map_or("nothing".into(), |symbol| Short(symbol).to_string())
}

fn names(calls: &[usize]) -> Vec<String> {
    calls.iter().copied().map(name).collect()
}

#[inline(never)]
fn innermost(calls: &mut [usize]) -> usize {
    black_box(backtrace::fill(calls))
}

#[inline(never)]
fn middle(calls: &mut [usize]) -> usize {
    black_box(innermost(calls))
}

#[inline(never)]
fn outermost(calls: &mut [usize]) -> usize {
    black_box(middle(calls))
}

test!(a_function_has_its_name);
fn a_function_has_its_name() {
    let start = innermost as *const () as u64;
    let symbol = symbols::find(start).expect("it has a symbol");
    assert_eq!(symbol.name().to_string(), "testkernel::guest::tests::symbols::innermost");
    assert_eq!(symbol.offset, 0);
    assert_eq!(symbols::find(start + 1).map(|symbol| symbol.offset), Some(1));
    let call = Call(start as usize + 1).to_string();
    assert_eq!(call, alloc::format!("{:#x} testkernel::guest::tests::symbols::innermost+0x1", start + 1));
}

test!(what_is_no_function_has_no_name);
fn what_is_no_function_has_no_name() {
    static VARIABLE: AtomicUsize = AtomicUsize::new(0);
    for address in [0, 1, RAMDISK, u64::MAX, (&raw const VARIABLE).addr() as u64] {
        assert_eq!(symbols::find(address), None, "{address:#x}");
    }
}

test!(a_backtrace_has_the_calls_from_the_inside_out);
fn a_backtrace_has_the_calls_from_the_inside_out() {
    let mut calls = [0; 64];
    let count = outermost(&mut calls);
    let names = names(&calls[..count]);
    let expected = ["innermost", "middle", "outermost", "a_backtrace_has_the_calls_from_the_inside_out"];
    assert_eq!(names[..4], expected);
    assert!(count < calls.len(), "{names:?}");
    assert!(!names.contains(&"nothing".into()), "{names:?}");
    assert_eq!(outermost(&mut calls[..2]), 2);
    assert_eq!(outermost(&mut []), 0);
}

test!(a_backtrace_of_a_thread_ends_where_the_thread_began);
fn a_backtrace_of_a_thread_ends_where_the_thread_began() {
    let thread = threads::spawn("walker", SMALL_STACK, || {
        let mut calls = [0; 64];
        let count = outermost(&mut calls);
        names(&calls[..count])
    });
    let names = thread.expect("memory").join();
    assert_eq!(names[..3], ["innermost", "middle", "outermost"]);
    assert_eq!(names.last().map(String::as_str), Some("begin"), "{names:?}");
}

static CALLS: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; _];
static TAKEN: AtomicBool = AtomicBool::new(false);
static WAITING: AtomicBool = AtomicBool::new(false);

#[inline(never)]
fn waits_for_the_timer() {
    while !TAKEN.load(Relaxed) {
        is_waiting();
    }
}

/// A function that calls another one has made its frame by then.
#[inline(never)]
fn is_waiting() {
    WAITING.store(true, Relaxed);
    spin_loop();
}

test!(a_backtrace_in_an_interrupt_goes_on_with_what_was_interrupted);
fn a_backtrace_in_an_interrupt_goes_on_with_what_was_interrupted() {
    timer::start(50_000, || {
        // A tick may come before the function has made its frame.
        if !WAITING.load(Relaxed) {
            return;
        }
        let mut calls = [0; CALLS.len()];
        backtrace::fill(&mut calls);
        CALLS.iter().zip(calls).for_each(|(place, call)| place.store(call, Relaxed));
        TAKEN.store(true, Relaxed);
        timer::stop();
    });
    waits_for_the_timer();
    let calls: Vec<_> = CALLS.iter().map(|call| call.load(Relaxed)).take_while(|&call| call != 0).collect();
    let names = names(&calls);
    // A function that was interrupted where it had no frame hides who called it.
    let at = names.iter().position(|name| ["waits_for_the_timer", "is_waiting"].contains(&&**name));
    let callers = at.map_or(&[][..], |at| &names[at + 1..]);
    let caller = callers.iter().find(|name| *name != "waits_for_the_timer");
    let expected = "a_backtrace_in_an_interrupt_goes_on_with_what_was_interrupted";
    assert_eq!(caller.map(String::as_str), Some(expected), "{names:?}");
}

#[inline(never)]
fn is_stepped_through() {
    spin_loop();
    spin_loop();
}

/// How often the backtrace had the first instruction of that function, and how often another one of it.
static FIRST: AtomicUsize = AtomicUsize::new(0);
static OTHERS: AtomicUsize = AtomicUsize::new(0);

/// Looks in the backtrace for the instruction that was interrupted.
fn looks_for_the_instruction(frame: &mut TrapFrame) {
    let mut calls = [0; 16];
    let count = backtrace::fill(&mut calls);
    let mut symbols = calls[..count].iter().filter_map(|&call| symbols::find(call as u64 - 1));
    let found = symbols.find(|symbol| symbol.mangled.contains("is_stepped_through"));
    if let Some(Symbol { offset, .. }) = found {
        let start = is_stepped_through as *const () as u64;
        let place = if frame.rip == start { &FIRST } else { &OTHERS };
        place.fetch_add(usize::from(start + offset == frame.rip), Relaxed);
    }
}

test!(a_backtrace_from_a_trap_names_a_function_from_its_first_instruction_on);
fn a_backtrace_from_a_trap_names_a_function_from_its_first_instruction_on() {
    stepped(looks_for_the_instruction, is_stepped_through);
    assert_eq!(FIRST.load(Relaxed), 1);
    assert!(OTHERS.load(Relaxed) >= 2, "{OTHERS:?}");
}

test!(names_take_no_memory_and_little_stack);
fn names_take_no_memory_and_little_stack() {
    /// Counts what it is given.
    struct Count(usize);

    impl Write for Count {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0 += text.len();
            Ok(())
        }
    }

    let thread = threads::spawn("namer", SMALL_STACK, || {
        let code = symbols::find as *const () as usize;
        let allocations = || HEAP.cache_stats().map(|cache| cache.allocations).sum::<u64>();
        let before = allocations();
        let (mut count, mut calls) = (Count(0), 0);
        for call in (code - 0x4_0000..code + 0x4_0000).step_by(0x1000) {
            calls += 1;
            write!(count, "{}", Call(call)).expect("it takes all");
        }
        assert_eq!(allocations(), before);
        assert!(count.0 > calls * 30, "{} bytes for {calls} calls", count.0);
    });
    thread.expect("memory").join();
}

test!(
    row_54_the_ramdisk_is_where_the_loader_says_and_read_only,
    stops_with = "page fault: write to 0xffffe00000000000, protected"
);
fn row_54_the_ramdisk_is_where_the_loader_says_and_read_only() {
    let bytes = ramdisk::bytes();
    assert_eq!(bytes.len() as u64, boot_info().ramdisk_len);
    assert_eq!(bytes.as_ptr().addr() as u64, RAMDISK);
    assert!(ramdisk::file(symbols::FILE).is_some_and(|file| file.starts_with(b"\x7fELF")));
    assert_eq!(ramdisk::file("no such file"), None);
    // SAFETY: the CPU refuses.
    unsafe { asm!("mov byte ptr [{}], 1", in(reg) RAMDISK, options(nostack)) };
}

test!(a_damaged_table_names_nothing_and_stops_nothing);
fn a_damaged_table_names_nothing_and_stops_nothing() {
    let table = ramdisk::file(symbols::FILE).expect("there are symbols");
    let address = innermost as *const () as u64;
    let find = |table: &[u8]| Table::new(table).and_then(|table| Some(table.find(address)?.to_string()));
    assert!(find(table).is_some());
    for length in (0..table.len()).step_by(table.len() / 16) {
        assert_eq!(find(&table[..length]), None, "cut to {length} bytes");
    }
    for seed in 0..4 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut damaged = table.to_vec();
        damaged.iter_mut().skip(64).for_each(|byte| *byte = random.u8(..));
        black_box(find(&damaged));
        random.fill(&mut damaged);
        assert_eq!(find(&damaged), None);
    }
}

/// What calls this function, by name.
struct Callers;

impl fmt::Display for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut calls = [0; 64];
        let count = innermost(&mut calls);
        let shown = calls[..count].iter().filter_map(|&call| symbols::find(call as u64 - 1));
        shown.filter(|symbol| symbol.mangled.contains("bad_")).try_for_each(|symbol| write!(f, " {}", Short(symbol)))
    }
}

#[inline(never)]
fn bad_inner(depth: u64) -> u64 {
    if black_box(depth) > 0 { panic!("called by{Callers}") } else { depth }
}

#[inline(never)]
fn bad_outer(depth: u64) -> u64 {
    bad_inner(black_box(depth)) + black_box(1)
}

test!(a_panic_knows_the_names_of_its_callers, stops_with = "panic: called by bad_inner bad_outer");
fn a_panic_knows_the_names_of_its_callers() {
    bad_outer(1);
}

/// Traps with this frame pointer. A report that follows it to where there is no memory is none.
fn trap_with_frame(frame: u64) -> ! {
    // SAFETY: nothing runs on with it but the report.
    unsafe { asm!("mov rbp, {}", "ud2", in(reg) frame, options(noreturn)) }
}

test!(a_report_does_not_follow_a_frame_pointer_that_is_not_canonical, stops_with = "invalid opcode");
fn a_report_does_not_follow_a_frame_pointer_that_is_not_canonical() {
    trap_with_frame(1 << 60);
}

test!(a_report_does_not_follow_a_frame_pointer_out_of_memory, stops_with = "invalid opcode");
fn a_report_does_not_follow_a_frame_pointer_out_of_memory() {
    // Among the addresses of stacks.
    trap_with_frame(0xffff_a00f_0000_0000);
}

test!(a_report_does_not_follow_frames_in_a_circle, stops_with = "invalid opcode");
fn a_report_does_not_follow_frames_in_a_circle() {
    let mut frame = [0, innermost as *const () as u64 + 1];
    frame[0] = (&raw const frame).addr() as u64;
    trap_with_frame(black_box(&raw mut frame).addr() as u64);
}

test!(a_report_does_not_follow_a_frame_that_leaves_its_stack, stops_with = "invalid opcode");
fn a_report_does_not_follow_a_frame_that_leaves_its_stack() {
    let mut frame = [u64::MAX - 7, innermost as *const () as u64 + 1];
    trap_with_frame(black_box(&raw mut frame).addr() as u64);
}
