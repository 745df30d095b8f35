//! Interrupts after every single instruction of the allocator, and NMIs.
//!
//! With the trap flag set the CPU raises a debug exception after each instruction. Its handler does what an interrupt
//! handler might do there, where interrupts are on; or it raises an NMI, wherever that is.

use alloc::vec;
use alloc::vec::Vec;
use core::hint::black_box;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::traps::{TrapFrame, set_debug_handler, set_nmi_handler};
use kslab::{IrqLock, Order};
use x86_64::registers::rflags::{self, RFlags};

use super::support::{cache, fill, frames, free, is_filled, layout, unchanged, verify};
use crate::guest::runner::test;

/// Bytes of the blocks that both sides allocate: of one size class.
const SIZE: usize = 96;

/// The rounds in a magazine for such blocks that is as large as they become.
const ROUNDS: usize = 127;

/// Blocks that the handler allocates before it frees them again: more than go into two magazines.
const KEPT: usize = 2 * ROUNDS + 4;

/// What a handler has allocated.
static BLOCKS: IrqLock<Cpus, [Vec<u8>; KEPT]> = IrqLock::new([const { Vec::new() }; KEPT]);

/// Instructions since [`stepped`] began, and those after which interrupts were on.
static STEPS: AtomicUsize = AtomicUsize::new(0);
static TURNS: AtomicUsize = AtomicUsize::new(0);

/// The instruction after which [`burst`] does its work.
static AT: AtomicUsize = AtomicUsize::new(0);

/// Runs `body` with `handler` called after each of its instructions, and says how many there were.
pub(super) fn stepped(handler: fn(&mut TrapFrame), body: impl FnOnce()) -> usize {
    STEPS.store(0, Relaxed);
    set_debug_handler(Some(handler));
    let flags = rflags::read();
    // SAFETY: the exceptions that the flag raises have a handler.
    unsafe { rflags::write(flags | RFlags::TRAP_FLAG) };
    body();
    // SAFETY: the flags as they were.
    unsafe { rflags::write(flags) };
    set_debug_handler(None);
    STEPS.load(Relaxed)
}

/// Counts the instruction; whether an interrupt could come after it, and which one that is.
fn step(frame: &TrapFrame) -> Option<usize> {
    let step = STEPS.fetch_add(1, Relaxed);
    RFlags::from_bits_truncate(frame.rflags).contains(RFlags::INTERRUPT_FLAG).then_some(step)
}

/// Allocates a block, or frees one that is still as it was filled: first all are allocated, then all freed.
fn disturb(frame: &mut TrapFrame) {
    if step(frame).is_some() {
        change(TURNS.fetch_add(1, Relaxed));
    }
}

fn change(turn: usize) {
    let block = &mut BLOCKS.lock()[turn % KEPT];
    let fill = (turn % KEPT) as u8;
    if block.is_empty() {
        *block = vec![fill; SIZE];
    } else {
        assert!(block.iter().all(|&byte| byte == fill), "somebody wrote to a block of the handler");
        *block = Vec::new();
    }
}

/// Allocates and frees enough to exchange magazines with the depot, after one instruction.
fn burst(frame: &mut TrapFrame) {
    if step(frame) == Some(AT.load(Relaxed)) {
        (0..2 * KEPT).for_each(change);
    }
}

/// Through both magazines and the depot, and back.
fn allocate_and_free_many() {
    let mut blocks = [const { Vec::new() }; KEPT];
    for (number, block) in blocks.iter_mut().enumerate() {
        *block = vec![number as u8; SIZE];
    }
    let intact = |(number, block): (usize, &Vec<u8>)| block.iter().all(|&byte| byte == number as u8);
    assert!(blocks.iter().enumerate().all(intact), "the handler wrote to a block of the main line");
}

fn forget_blocks() {
    BLOCKS.lock().iter_mut().for_each(|block| *block = Vec::new());
}

test!(row_82_an_interrupt_after_every_instruction_of_the_magazines);
fn row_82_an_interrupt_after_every_instruction_of_the_magazines() {
    unchanged(|| {
        allocate_and_free_many();
        TURNS.store(0, Relaxed);
        let steps = stepped(disturb, || (0..3).for_each(|_| allocate_and_free_many()));
        let turns = TURNS.load(Relaxed);
        assert!(turns > steps / 2, "interrupts were on after {turns} of {steps} instructions");
        verify();
        forget_blocks();
    });
}

/// Full and empty magazines in the depot.
fn depot() -> (usize, usize) {
    let cache = cache(SIZE);
    (cache.full_magazines, cache.empty_magazines)
}

/// Steps through a call of `change` that exchanges a magazine with the depot, once for each of its instructions, with
/// a burst after that one. `change` allocates or frees one of the blocks.
fn burst_during_an_exchange(change: fn(&mut Vec<Vec<u8>>)) {
    let mut blocks = Vec::new();
    // They grow with use, up to here.
    while blocks.is_empty() || cache(SIZE).magazine_rounds < ROUNDS {
        blocks.clear();
        blocks.resize_with(4 * KEPT, || vec![1_u8; SIZE]);
    }
    for at in 0.. {
        // As many free as are not.
        blocks.truncate(2 * KEPT);
        blocks.resize_with(2 * KEPT, || vec![1_u8; SIZE]);
        let mut before = depot();
        while depot() == before {
            change(&mut blocks);
        }
        // From one exchange to the next.
        (1..ROUNDS).for_each(|_| change(&mut blocks));
        before = depot();
        AT.store(at, Relaxed);
        if stepped(burst, || change(&mut blocks)) <= at {
            assert_ne!(depot(), before, "no exchange");
            return;
        }
        assert!(at < 10_000, "an exchange takes so many instructions");
    }
}

test!(row_82_a_burst_of_interrupts_after_each_instruction_of_an_allocation_that_exchanges);
fn row_82_a_burst_of_interrupts_after_each_instruction_of_an_allocation_that_exchanges() {
    unchanged(|| burst_during_an_exchange(|blocks| blocks.push(vec![1_u8; SIZE])));
}

test!(row_82_a_burst_of_interrupts_after_each_instruction_of_a_free_that_exchanges);
fn row_82_a_burst_of_interrupts_after_each_instruction_of_a_free_that_exchanges() {
    unchanged(|| burst_during_an_exchange(|blocks| drop(blocks.pop())));
}

test!(row_82_an_interrupt_after_every_instruction_of_growing_and_giving_back);
fn row_82_an_interrupt_after_every_instruction_of_growing_and_giving_back() {
    unchanged(|| {
        TURNS.store(0, Relaxed);
        HEAP.shrink();
        stepped(disturb, || {
            allocate_and_free_many();
            let frames: [_; 70] = core::array::from_fn(|_| frames().allocate(Order::ZERO).expect("memory"));
            frames.into_iter().for_each(|frame| free(frame, Order::ZERO));
            drop(black_box(vec![1_u8; 5 * SIZE * SIZE]));
            HEAP.shrink();
        });
        verify();
        forget_blocks();
    });
}

/// Blocks that the NMI handler keeps; each 0 or the address of one.
static KEPT_BY_NMI: [AtomicUsize; KEPT] = [const { AtomicUsize::new(0) }; KEPT];
/// How many it has had so far.
static SERVED: AtomicUsize = AtomicUsize::new(0);

/// Raises an NMI after every instruction, whose handler is [`on_nmi`].
fn raise_nmi(_: &mut TrapFrame) {
    STEPS.fetch_add(1, Relaxed);
    // SAFETY: the vector has a handler, which returns; the CPU enters it as it does for one from outside.
    unsafe { core::arch::asm!("int 2") };
}

/// Frees the block that was allocated so many turns ago, unharmed; allocates another, or goes without.
fn on_nmi(_: &mut TrapFrame) {
    let turn = TURNS.fetch_add(1, Relaxed);
    let place = &KEPT_BY_NMI[turn % KEPT];
    let layout = layout(SIZE, 8);
    if let Some(block) = NonNull::new(place.load(Relaxed) as *mut u8) {
        assert!(is_filled(block, SIZE, (turn % KEPT) as u8), "somebody wrote to a block of the NMI handler");
        place.store(0, Relaxed);
        // SAFETY: allocated below, and forgotten above.
        unsafe { HEAP.free(block, layout) };
    } else if let Some(block) = HEAP.allocate(layout) {
        SERVED.fetch_add(1, Relaxed);
        fill(block, SIZE, (turn % KEPT) as u8);
        place.store(block.as_ptr() as usize, Relaxed);
    }
}

test!(row_83_an_nmi_after_every_instruction_allocates_or_frees);
fn row_83_an_nmi_after_every_instruction_allocates_or_frees() {
    unchanged(|| {
        TURNS.store(0, Relaxed);
        SERVED.store(0, Relaxed);
        set_nmi_handler(Some(on_nmi));
        let steps = stepped(raise_nmi, || {
            drop(black_box([const { Vec::<u8>::new() }; 3].map(|_| vec![1_u8; SIZE])));
            let frame = frames().allocate(Order::ZERO).expect("memory");
            free(frame, Order::ZERO);
        });
        let served = SERVED.load(Relaxed);
        // Mostly there is no free slot: what it has freed waits for the main line.
        assert!(served > KEPT, "{served} allocations in {steps} NMIs");
        for place in &KEPT_BY_NMI {
            if let Some(block) = NonNull::new(place.swap(0, Relaxed) as *mut u8) {
                // SAFETY: allocated by the handler, which runs no more.
                unsafe { HEAP.free(block, layout(SIZE, 8)) };
            }
        }
        set_nmi_handler(None);
        verify();
    });
}
