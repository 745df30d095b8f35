//! A stop of the kernel where several CPUs run: the others halt, and there is one report.

use alloc::boxed::Box;
use core::alloc::Layout;
use core::fmt;
use core::hint::{black_box, spin_loop};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use core::time::Duration;

use kernel::heap::HEAP;
use kernel::{cpus, print, stop, timer};

use super::support::another;
use crate::guest::runner::test;

/// Has another CPU run `function` in an interrupt of its timer, and prints meanwhile, for ever. Where there is no other
/// CPU, it runs here.
fn run_elsewhere(function: fn()) {
    static FUNCTION: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());
    FUNCTION.store(function as *mut (), Ordering::Relaxed);
    let Some(cpu) = another() else { return function() };
    let start = |period| {
        // SAFETY: stored above, and of this type.
        timer::start(period as u32, unsafe { mem::transmute::<*mut (), fn()>(FUNCTION.load(Ordering::Relaxed)) });
    };
    let period = timer::counts(Duration::from_millis(1));
    cpus::call_on(cpu, start, period as usize).expect("it is online");
    loop {
        print!("this CPU prints and prints ");
        // Where instructions are counted, the CPUs take turns.
        spin_loop();
    }
}

test!(row_86_a_panic_on_another_cpu_is_reported_while_this_one_prints, stops_with = "panic: somewhere else");
fn row_86_a_panic_on_another_cpu_is_reported_while_this_one_prints() {
    run_elsewhere(|| panic!("somewhere else"));
}

test!(row_87_of_panics_on_all_cpus_at_once_one_is_reported, stops_with = "panic: at once");
fn row_87_of_panics_on_all_cpus_at_once_one_is_reported() {
    fn start(_: usize) {
        timer::start(timer::counts(Duration::from_millis(1)), || panic!("at once"));
    }
    cpus::call_on_others(start, 0);
    start(0);
    loop {
        spin_loop();
    }
}

test!(cpus_that_are_offline_or_have_interrupts_off_halt_too, stops_with = "panic: all halt");
fn cpus_that_are_offline_or_have_interrupts_off_halt_too() {
    static SPINNING: AtomicUsize = AtomicUsize::new(0);
    for cpu in cpus::online().filter(|cpu| cpu % 2 == 1) {
        assert_eq!(cpus::offline(cpu), Ok(()));
    }
    fn spin() {
        SPINNING.fetch_add(1, Ordering::Relaxed);
        loop {
            spin_loop();
        }
    }
    for cpu in cpus::online().filter(|&cpu| cpu != 0) {
        let start = |_| timer::start(timer::counts(Duration::from_micros(100)), spin);
        assert_eq!(cpus::call_on(cpu, start, 0), Ok(()));
    }
    while SPINNING.load(Ordering::Relaxed) < cpus::online().count() - 1 {
        spin_loop();
    }
    panic!("all halt");
}

test!(a_stack_overflow_on_another_cpu_is_named, stops_with = "stack overflow: idle stack of CPU 1");
fn a_stack_overflow_on_another_cpu_is_named() {
    fn descend(depth: u64) -> u64 {
        if black_box(depth) == u64::MAX { 0 } else { descend(depth + 1) + black_box(1) }
    }
    if another().is_none() {
        stop::stop(format_args!("stack overflow: idle stack of CPU 1"), |_| Ok(()));
    }
    run_elsewhere(|| _ = descend(0));
}

test!(a_fault_on_another_cpu_is_named, stops_with = "general protection fault");
fn a_fault_on_another_cpu_is_named() {
    let read = || {
        // SAFETY: not canonical: the CPU refuses.
        unsafe { core::arch::asm!("mov {}, [{}]", out(reg_byte) _, in(reg) 1_u64 << 60, options(nostack, readonly)) }
    };
    run_elsewhere(read);
}

/// Allocates when it is printed.
struct Allocates;

impl fmt::Display for Allocates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = Layout::new::<[u64; 100]>();
        let served = (0..1000).filter(|_| HEAP.allocate(layout).is_some()).count();
        // While it is all but stopped, the kernel has what is at hand.
        let whether = if served > 0 { "some" } else { "none" };
        write!(f, "{whether} of the allocations of a report was served")
    }
}

test!(
    row_85_an_allocation_in_a_panic_is_served_from_what_is_at_hand,
    stops_with = "panic: some of the allocations of a report was served"
);
fn row_85_an_allocation_in_a_panic_is_served_from_what_is_at_hand() {
    // Its slab has free objects, and the lock of no cache is held.
    drop(Box::new([0_u64; 100]));
    panic!("{Allocates}");
}
