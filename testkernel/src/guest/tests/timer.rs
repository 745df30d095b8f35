//! Interrupts of the timer, and the heap in them.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicUsize, Ordering};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::timer;
use kslab::IrqLock;
use x86_64::instructions::interrupts;

use crate::guest::runner::test;

/// Counts of the timer's clock between two interrupts: 50 microseconds under QEMU.
const PERIOD: u32 = 50_000;

/// Blocks that each side keeps at a time.
const KEPT: usize = 32;

/// A block filled with a value that tells its owner and its turn, to find out whether anyone else wrote to it.
fn block(turn: usize, owner: u8) -> Vec<u8> {
    vec![fill(turn, owner); size(turn)]
}

fn fill(turn: usize, owner: u8) -> u8 {
    owner ^ (turn as u8)
}

/// From 8 bytes to above a page, so that caches and frames both serve.
fn size(turn: usize) -> usize {
    8 << (turn % 11)
}

/// Replaces the block of `turn - KEPT` with that of `turn`, after a look whether it is still as it was.
fn replace(kept: &mut [Vec<u8>; KEPT], turn: usize, owner: u8) {
    let old = &mut kept[turn % KEPT];
    if let Some(last) = turn.checked_sub(KEPT) {
        assert_eq!(old.len(), size(last), "the block of turn {last} is gone");
        assert!(old.iter().all(|&byte| byte == fill(last, owner)), "the block of turn {last} was written to");
    }
    *old = block(turn, owner);
}

test!(interrupts_arrive_until_the_timer_is_stopped);
fn interrupts_arrive_until_the_timer_is_stopped() {
    static TICKS: AtomicUsize = AtomicUsize::new(0);
    timer::start(PERIOD, || {
        assert!(!interrupts::are_enabled(), "a handler was interrupted");
        TICKS.fetch_add(1, Ordering::Relaxed);
    });
    while TICKS.load(Ordering::Relaxed) < 10 {
        spin_loop();
    }
    timer::stop();
    let ticks = TICKS.load(Ordering::Relaxed);
    (0..100_000).for_each(|_| spin_loop());
    assert_eq!(TICKS.load(Ordering::Relaxed), ticks, "the timer went on");
}

test!(an_interrupt_allocates_while_the_main_line_allocates);
fn an_interrupt_allocates_while_the_main_line_allocates() {
    const WANTED: usize = 300;
    static TURNS: AtomicUsize = AtomicUsize::new(0);
    static KEPT_BY_INTERRUPT: IrqLock<Cpus, [Vec<u8>; KEPT]> = IrqLock::new([const { Vec::new() }; KEPT]);

    let in_use = || HEAP.cache_stats().map(|cache| cache.in_use).sum::<usize>();
    HEAP.shrink();
    let (in_use_before, free_before) = (in_use(), HEAP.frames().free_bytes());
    timer::start(PERIOD, || {
        replace(&mut KEPT_BY_INTERRUPT.lock(), TURNS.fetch_add(1, Ordering::Relaxed), 0xaa);
    });
    let mut kept = [const { Vec::new() }; KEPT];
    for turn in 0.. {
        replace(&mut kept, turn, 0x55);
        if TURNS.load(Ordering::Relaxed) >= WANTED {
            break;
        }
    }
    timer::stop();
    drop(kept);
    KEPT_BY_INTERRUPT.lock().fill_with(Vec::new);
    HEAP.shrink();
    assert_eq!((in_use(), HEAP.frames().free_bytes()), (in_use_before, free_before), "not all came back");
}

test!(the_heap_leaves_interrupts_as_they_were);
fn the_heap_leaves_interrupts_as_they_were() {
    assert!(interrupts::are_enabled());
    drop(black_box(Box::new([1_u8; 100])));
    drop(black_box(vec![1_u8; 100_000]));
    assert!(interrupts::are_enabled(), "an allocation turned interrupts off");
    interrupts::without_interrupts(|| {
        drop(black_box(Box::new([1_u8; 100])));
        drop(black_box(vec![1_u8; 100_000]));
        assert!(!interrupts::are_enabled(), "an allocation turned interrupts on");
    });
}
