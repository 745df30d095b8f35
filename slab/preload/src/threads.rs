//! Threads as the CPUs of the heap, and what a fork waits for.

use core::cell::Cell;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize};

use kslab::platform::{IN_NMI, NO_CPU, Platform};

use crate::{HEAP, memory, report};

/// So many threads have magazines of their own at a time.
const NUMBERS: usize = 32;

/// In place of a number: the thread is about to be no more.
const EXITED: usize = usize::MAX - 2;

std::thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(NO_CPU) };
    /// Calls that this thread is in: more than one where a signal handler has interrupted one.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// This thread forks.
    static FORKS: Cell<bool> = const { Cell::new(false) };
}

/// A bit for each number that a thread has.
static TAKEN: AtomicU32 = AtomicU32::new(0);

/// Who is in a call, by number.
static INSIDE: [Inside; NUMBERS] = [const { Inside(AtomicBool::new(false)) }; NUMBERS];
/// How many threads without a number are.
static OTHERS_INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Somebody forks: who comes to a call waits.
static FORKING: AtomicBool = AtomicBool::new(false);

/// What the thread's destructor is known by.
static KEY: AtomicU32 = AtomicU32::new(u32::MAX);

static STATE: AtomicU8 = AtomicU8::new(NEW);
const NEW: u8 = 0;
const BEING_MADE: u8 = 1;
const READY: u8 = 2;

#[repr(align(64))]
struct Inside(AtomicBool);

/// Threads as CPUs.
#[derive(Debug)]
pub(crate) struct Threads;

// SAFETY: a thread that is pre-empted goes on later, and no other has its number meanwhile. A signal handler on the same
// thread is to the heap a handler of an NMI.
unsafe impl Platform for Threads {
    const CPUS: usize = NUMBERS;

    #[inline]
    fn current_cpu() -> usize {
        if DEPTH.get() > 1 { IN_NMI } else { NUMBER.get() }
    }

    #[inline]
    fn disable_interrupts() -> bool {
        false
    }

    #[inline]
    fn restore_interrupts(_: bool) {}
}

/// This thread is in a call until this is dropped.
pub(crate) struct Call {
    /// `None` where it was not asked to wait, and so is not waited for either.
    number: Option<usize>,
}

/// To be held during each call.
#[inline]
pub(crate) fn enter() -> Call {
    if STATE.load(Acquire) != READY {
        set_up();
    }
    if NUMBER.get() == NO_CPU {
        take_number();
    }
    let depth = DEPTH.get();
    DEPTH.set(depth + 1);
    if depth > 0 || FORKS.get() {
        return Call { number: None };
    }
    let number = NUMBER.get();
    loop {
        mark(number, true);
        if !FORKING.load(SeqCst) {
            return Call { number: Some(number) };
        }
        mark(number, false);
        wait_while(|| FORKING.load(SeqCst));
    }
}

impl Drop for Call {
    #[inline]
    fn drop(&mut self) {
        if let Some(number) = self.number {
            mark(number, false);
        }
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// Whoever forks looks at the marks after it has said so, and who marks looks at that afterwards: one of the two sees the other.
#[inline]
fn mark(number: usize, inside: bool) {
    match INSIDE.get(number) {
        Some(mark) if inside => mark.0.store(true, SeqCst),
        Some(mark) => mark.0.store(false, core::sync::atomic::Ordering::Release),
        None if inside => _ = OTHERS_INSIDE.fetch_add(1, SeqCst),
        None => _ = OTHERS_INSIDE.fetch_sub(1, SeqCst),
    }
}

pub(crate) fn wait_while(mut condition: impl FnMut() -> bool) {
    while condition() {
        // SAFETY: it has no conditions.
        unsafe { libc::sched_yield() };
    }
}

#[cold]
fn set_up() {
    if STATE.compare_exchange(NEW, BEING_MADE, AcqRel, Acquire).is_err() {
        return wait_while(|| STATE.load(Acquire) != READY);
    }
    memory::set_up();
    HEAP.set_fault_handler(Some(report::stop));
    // What follows may allocate.
    STATE.store(READY, core::sync::atomic::Ordering::Release);
    let mut key = 0;
    // SAFETY: a place of our own, and functions that stay.
    unsafe {
        if libc::pthread_key_create(&raw mut key, Some(thread_exits)) == 0 {
            KEY.store(key, core::sync::atomic::Ordering::Release);
        }
        // As early as this, they are the last to be called before a fork, and the first after it: what other libraries do
        // then may wait for threads that allocate.
        libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork_in_child));
    }
}

#[cold]
fn take_number() {
    let key = KEY.load(Acquire);
    if key == u32::MAX {
        return;
    }
    let take = |taken: u32| (taken != u32::MAX).then(|| taken | 1 << taken.trailing_ones());
    let Ok(taken) = TAKEN.fetch_update(AcqRel, Acquire, take) else { return };
    let number = taken.trailing_ones() as usize;
    NUMBER.set(number);
    // SAFETY: the key is ours; the value is a number that is not 0.
    if unsafe { libc::pthread_setspecific(key, core::ptr::without_provenance(number + 1)) } != 0 {
        NUMBER.set(NO_CPU);
        give_back(number);
    }
}

/// Of a thread that uses it no more.
fn give_back(number: usize) {
    // SAFETY: nobody else has the number until its bit is cleared.
    unsafe { HEAP.retire_cpu(number) };
    TAKEN.fetch_and(!(1 << number), AcqRel);
}

extern "C" fn thread_exits(value: *mut libc::c_void) {
    NUMBER.set(EXITED);
    let _call = enter();
    give_back(value.addr() - 1);
}

extern "C" fn before_fork() {
    wait_while(|| FORKING.swap(true, SeqCst));
    FORKS.set(true);
    wait_while(|| INSIDE.iter().any(|mark| mark.0.load(SeqCst)) || OTHERS_INSIDE.load(SeqCst) > 0);
}

extern "C" fn after_fork() {
    FORKS.set(false);
    FORKING.store(false, SeqCst);
}

/// Of all threads only this one is left.
extern "C" fn after_fork_in_child() {
    let taken = TAKEN.load(Relaxed);
    let gone = (0..NUMBERS).filter(|number| taken & 1 << number != 0 && *number != NUMBER.get());
    let call = enter();
    gone.for_each(give_back);
    drop(call);
    after_fork();
}
