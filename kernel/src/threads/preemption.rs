//! Threads that do not yield are interrupted: on each CPU the timer gives the turn to the next thread that is ready.

use core::marker::PhantomData;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::scheduler::{self, Then};
use crate::{cpus, timer};

static OFF: [AtomicBool; cpus::MAX] = [const { AtomicBool::new(false) }; _];

/// Switches pre-emption on that CPU on or off. It is on at first. Threads can still yield, wait and end.
///
/// # Panics
///
/// If there can be no such CPU.
pub fn set(cpu: usize, on: bool) {
    OFF[cpu].store(!on, Relaxed);
    // One that is not online does it when it has something to run.
    let _ = cpus::call_on(cpu, |_| update_timer(), 0);
}

/// Whether threads are pre-empted on that CPU.
///
/// # Panics
///
/// If there can be no such CPU.
pub fn is_on(cpu: usize) -> bool {
    !OFF[cpu].load(Relaxed)
}

/// Keeps the thread that made it on its CPU, and the other threads of that CPU from running, until it is dropped.
/// Interrupts still come. Pauses nest.
#[derive(Debug)]
pub struct Pause {
    /// Before the CPU runs threads there is nothing to pause.
    counted: bool,
    /// It belongs to the thread that made it.
    not_send: PhantomData<*const ()>,
}

/// Pauses pre-emption for the current thread.
#[must_use]
pub fn pause() -> Pause {
    let counted = scheduler::with_current(|context| context.pauses.fetch_add(1, Relaxed)).is_some();
    Pause { counted, not_send: PhantomData }
}

impl Drop for Pause {
    fn drop(&mut self) {
        if self.counted {
            scheduler::with_current(|context| context.pauses.fetch_sub(1, Relaxed));
        }
    }
}

/// Calls `body` while the current thread is not pre-empted, so that it stays on its CPU.
pub fn without_preemption<T>(body: impl FnOnce() -> T) -> T {
    let _pause = pause();
    body()
}

/// Has this CPU's timer end turns, or not: where no thread runs, it need not. Interrupts are off.
pub(super) fn update_timer() {
    timer::end_turns(is_on(cpus::current()) && !scheduler::idles());
}

/// What an interrupt does last that ends a turn, after its end was told to the interrupt controller: the interrupted thread
/// leaves, with the interrupt's frame on its stack, and returns from the interrupt when it has its next turn.
pub(crate) fn end_turn() {
    let pauses = scheduler::with_current(|context| context.pauses.load(Relaxed));
    if pauses == Some(0) && is_on(cpus::current()) {
        scheduler::leave(Then::Ready);
    }
}
