//! Tests that break the report or the kernel on purpose, for the tests of the host side. They never run in the suite.

use alloc::boxed::Box;
use core::arch::asm;
use core::hint::black_box;

use kernel::heap::HEAP;
use kernel::{println, qemu, serial};
use x86_64::VirtAddr;
use x86_64::instructions::tables::lidt;
use x86_64::structures::DescriptorTablePointer;

use crate::guest::runner::{REPORT, test};
use crate::protocol::{Exit, PREFIX};

test!(fails, broken);
fn fails() {
    println!("this line explains the failure");
    assert_eq!(1 + 1, 3, "broken on purpose");
}

/// Reads where nothing is mapped.
#[inline(never)]
fn read_nowhere() -> u8 {
    let byte;
    // SAFETY: the CPU refuses to.
    unsafe { asm!("mov {}, [{}]", out(reg_byte) byte, in(reg) 0xffff_b000_0000_0000_u64, options(nostack, readonly)) };
    byte
}

test!(faults, broken);
fn faults() {
    assert_eq!(read_nowhere(), 1);
}

test!(hangs, broken);
fn hangs() {
    loop {
        core::hint::spin_loop();
    }
}

test!(triple_faults, broken);
fn triple_faults() {
    let empty = DescriptorTablePointer { limit: 0, base: VirtAddr::zero() };
    // SAFETY: the machine is meant to be reset: with no vector at all the breakpoint faults, and so do the next two.
    unsafe {
        lidt(&empty);
        asm!("int3");
    }
}

test!(cuts_the_report_off, broken);
fn cuts_the_report_off() {
    qemu::exit(Exit::Success as u32);
}

test!(seals_with_a_wrong_checksum, broken);
fn seals_with_a_wrong_checksum() {
    let lines = REPORT.lock().seal.lines;
    println!("{PREFIX}whole {lines} 00000000");
    qemu::exit(Exit::Success as u32);
}

test!(leaves_its_result_out, broken);
fn leaves_its_result_out() {
    let sealed = REPORT.lock().seal.finish(&mut *serial::lock());
    sealed.expect("the port reports no errors");
    qemu::exit(Exit::Success as u32);
}

#[inline(never)]
fn makes_a_box() -> *mut [u64; 8] {
    Box::into_raw(black_box(Box::new([0; 8])))
}

#[inline(never)]
fn frees_a_box(pointer: *mut [u64; 8]) {
    // SAFETY: it was made of a box; the second time it breaks the contract, which the heap must notice.
    drop(black_box(unsafe { Box::from_raw(pointer) }));
}

test!(frees_twice, broken);
fn frees_twice() {
    HEAP.set_checks("size-64:audit").expect("rules");
    let pointer = makes_a_box();
    frees_a_box(pointer);
    frees_a_box(pointer);
}
