//! Functions that one CPU runs for another.

use core::array;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use x86_64::instructions::interrupts::without_interrupts;

use super::{Block, MAX, NotOnline, all, apic, block, this, wait_until};
use crate::threads::preemption;

/// A function that a CPU is to run for another, which waits for it.
#[derive(Debug)]
pub(super) struct Call {
    function: fn(usize),
    argument: usize,
    next: AtomicPtr<Call>,
    is_done: AtomicBool,
}

impl Call {
    const fn new(function: fn(usize), argument: usize) -> Self {
        Self { function, argument, next: AtomicPtr::new(ptr::null_mut()), is_done: AtomicBool::new(false) }
    }

    /// Has the CPU of `block` run this.
    ///
    /// # Safety
    ///
    /// It stays where it is until it is done.
    unsafe fn send_to(&self, block: &Block) {
        let call = (&raw const *self).cast_mut();
        let calls = &block.mail.calls;
        let mut newest = calls.load(Ordering::Relaxed);
        loop {
            self.next.store(newest, Ordering::Relaxed);
            match calls.compare_exchange_weak(newest, call, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => break,
                Err(found) => newest = found,
            }
        }
        apic::send(apic::CALL_VECTOR, block.apic_id());
    }

    fn is_done(&self) -> bool {
        self.is_done.load(Ordering::Acquire)
    }
}

/// Runs what other CPUs want from this one, the oldest first. Interrupts are off.
pub(super) fn serve() {
    let mut oldest = reverse(this().mail.calls.swap(ptr::null_mut(), Ordering::Acquire));
    // SAFETY: whoever sent it waits until it is done.
    while let Some(call) = unsafe { oldest.as_ref() } {
        // Done, it is no more.
        oldest = call.next.load(Ordering::Relaxed);
        (call.function)(call.argument);
        call.is_done.store(true, Ordering::Release);
    }
}

fn reverse(mut newest: *mut Call) -> *mut Call {
    let mut reversed = ptr::null_mut();
    // SAFETY: as above.
    while let Some(call) = unsafe { newest.as_ref() } {
        let next = call.next.swap(reversed, Ordering::Relaxed);
        reversed = newest;
        newest = next;
    }
    reversed
}

/// Runs `function(argument)` on the CPU with this number, in an interrupt and so with interrupts off, and waits until it
/// has returned. On this CPU it is called at once.
///
/// Whoever waits holds no lock that a function may take which another CPU has called here: with interrupts off, this runs
/// them while it waits.
///
/// # Errors
///
/// There is no such CPU, or it is offline.
pub fn call_on(number: usize, function: fn(usize), argument: usize) -> Result<(), NotOnline> {
    let block = block(number).filter(|block| block.mail.state.is_online()).ok_or(NotOnline(number))?;
    let is_here = without_interrupts(|| {
        let is_here = this().number() == number;
        if is_here {
            function(argument);
        }
        is_here
    });
    if !is_here {
        let call = Call::new(function, argument);
        // SAFETY: it stays until it is done.
        unsafe { call.send_to(block) };
        wait_until(|| call.is_done());
    }
    Ok(())
}

/// Runs `function(argument)` on every other CPU that is online, on all at once, as [`call_on`] does. Returns how many
/// there were.
pub fn call_on_others(function: fn(usize), argument: usize) -> usize {
    // The others stay the others.
    let _pause = preemption::pause();
    let calls: [Call; MAX] = array::from_fn(|_| Call::new(function, argument));
    let here = this().number();
    let mut sent = 0;
    for (block, call) in all().filter(|block| block.number() != here && block.mail.state.is_online()).zip(&calls) {
        // SAFETY: it stays until it is done.
        unsafe { call.send_to(block) };
        sent += 1;
    }
    wait_until(|| calls[..sent].iter().all(Call::is_done));
    sent
}
