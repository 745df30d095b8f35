//! Which thread runs: on each CPU those that are ready take turns, in the order of their queue.
//!
//! A thread leaves its CPU in two steps, because nobody may go on with it, or free its stack, while that stack is in use:
//! [`leave`] puts it down as the one that left, and switches; the thread that the CPU goes on with then does with it what
//! was asked for ([`arrive`]). All that happens with interrupts off, so that nothing comes in between.
//!
//! Each CPU has an idle thread, which runs when no other is ready and halts the CPU until an interrupt.
//!
//! # Locks
//!
//! One a CPU, and one for each thread's end. Neither is held while another lock is taken, while memory is allocated or
//! freed, or while the stack is switched.

use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering::Relaxed, Ordering::Release, Ordering::SeqCst};

use kslab::IrqLock;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts;

use super::context::{self, Context, Owned};
use super::preemption;
use super::queue::Queue;
use super::switch::switch;
use super::thread::{Ended, Thread};
use super::user;
use crate::cpus::{self, Cpus};

/// The threads of one CPU. Aligned so that no two CPUs share a cache line.
#[derive(Debug)]
#[repr(align(128))]
struct Scheduler {
    /// What runs. Only the CPU itself stores here, with interrupts off.
    current: AtomicPtr<Context>,
    /// Whether the CPU may be halted, so that it has to be woken.
    idles: AtomicBool,
    state: IrqLock<Cpus, State>,
}

struct State {
    /// Whether the CPU runs threads.
    open: bool,
    ready: Queue,
    /// The idle thread while it does not run.
    idle: Option<Owned>,
    /// What has just left, and what is to become of it.
    left: Option<(Owned, Then)>,
}

/// What becomes of a thread that leaves its CPU.
pub(super) enum Then {
    /// It is ready, here or on the CPU where it is to go.
    Ready,
    /// It is the idle thread.
    Idle,
    /// It is ready when that thread has ended.
    Wait(Thread),
    /// It has ended.
    End,
}

static SCHEDULERS: [Scheduler; cpus::MAX] = [const { Scheduler::new() }; _];

/// Contexts of threads that have ended, and that nobody has a handle to.
static UNUSED: IrqLock<Cpus, Queue> = IrqLock::new(Queue::new());

impl Scheduler {
    const fn new() -> Self {
        let state = State { open: false, ready: Queue::new(), idle: None, left: None };
        Self { current: AtomicPtr::new(ptr::null_mut()), idles: AtomicBool::new(false), state: IrqLock::new(state) }
    }

    /// That of the CPU that this runs on; interrupts are off.
    fn here() -> &'static Self {
        &SCHEDULERS[cpus::current()]
    }

    /// Appends a context to the queue; gives it back if this CPU runs no threads.
    fn push(&self, context: Owned) -> Result<(), Owned> {
        let mut state = self.state.lock();
        if !state.open {
            return Err(context);
        }
        // SAFETY: let go for the queue.
        unsafe { state.ready.push(context.into_raw()) };
        Ok(())
    }
}

impl State {
    /// What runs next when the current thread leaves, for which `stays` says whether it could go on as well.
    fn next(&mut self, stays: bool) -> Option<NonNull<Context>> {
        self.ready.pop().or_else(|| if stays { None } else { self.idle.take().map(Owned::into_raw) })
    }
}

/// Makes what runs on its CPU, or is about to, on a stack that lives for ever, the thread of `context`.
pub(super) fn adopt(context: Owned) {
    let there = &SCHEDULERS[context.thread().cpu()];
    there.current.store(context.into_raw().as_ptr(), Release);
}

/// Whether something was [adopted](adopt) there.
pub(super) fn has_current(cpu: usize) -> bool {
    !SCHEDULERS[cpu].current.load(Relaxed).is_null()
}

/// Makes the thread of `context`, which has not begun, the idle thread of its CPU.
pub(super) fn set_idle(context: Owned) {
    let there = &SCHEDULERS[context.thread().cpu()];
    there.state.lock().idle = Some(context);
}

/// Has that CPU, which is online, run threads from now on.
pub(super) fn open(cpu: usize) {
    SCHEDULERS[cpu].state.lock().open = true;
}

/// Has that CPU run no more threads: those that are ready go to the boot CPU, and what runs does at the end of its turn.
pub(super) fn close(cpu: usize) {
    let there = &SCHEDULERS[cpu];
    there.state.lock().open = false;
    loop {
        let ready = there.state.lock().ready.pop();
        let Some(context) = ready else { return };
        // SAFETY: the queue owned it.
        make_ready(unsafe { context::own(context) });
    }
}

/// Whether that CPU runs threads.
pub(super) fn is_open(cpu: usize) -> bool {
    SCHEDULERS.get(cpu).is_some_and(|there| there.state.lock().open)
}

/// Calls `body` with the context of the current thread; `None` before this CPU runs threads.
///
/// For the time of the call the thread stays where it is.
pub(super) fn with_current<T>(body: impl FnOnce(&Context) -> T) -> Option<T> {
    interrupts::without_interrupts(|| current().map(body))
}

/// Interrupts are off.
fn current<'a>() -> Option<&'a Context> {
    // SAFETY: a context that runs is freed when it has left, so not before interrupts are on again.
    unsafe { Scheduler::here().current.load(Relaxed).as_ref() }
}

/// The name of the thread that runs on this CPU, if `address` is in the guard page of its stack. For reports: takes no
/// lock.
pub(crate) fn guarded_at(address: VirtAddr) -> Option<&'static str> {
    current().filter(|context| context.is_guarded_at(address)).map(|context| context.thread().name())
}

/// # Panics
///
/// If the current thread may not let another one run.
pub(super) fn check_that_it_may_switch() {
    assert!(interrupts::are_enabled(), "a thread that has interrupts off would let others run");
    let pauses = with_current(|context| context.pauses.load(Relaxed));
    assert!(pauses == Some(0), "a thread that has pre-emption paused would let others run");
}

/// Makes a thread ready to run on the CPU where it is to go, or on the boot CPU where that one runs no threads.
pub(super) fn make_ready(context: Owned) {
    let cpu = context.thread().cpu();
    let Err(context) = push_and_wake(cpu, context) else { return };
    context.thread().set_cpu(cpus::BOOT);
    // The boot CPU runs threads before any is made, and for ever.
    push_and_wake(cpus::BOOT, context).expect("the boot CPU runs threads");
}

fn push_and_wake(cpu: usize, context: Owned) -> Result<(), Owned> {
    let there = &SCHEDULERS[cpu];
    there.push(context)?;
    // The CPU sets this before it looks at its queue under the lock that has just been free.
    if there.idles.load(SeqCst) && cpu != cpus::current() {
        cpus::wake(cpu);
    }
    Ok(())
}

/// Lets the next thread run, and returns when the current one runs again, perhaps on another CPU; at once if it could
/// go on and no other is ready.
pub(super) fn leave(then: Then) {
    interrupts::without_interrupts(|| {
        let here = Scheduler::here();
        let me = here.current.load(Relaxed);
        let mut state = here.state.lock();
        // SAFETY: it is the context of this thread, which owns it while it runs.
        let stays = match (&then, unsafe { &*me }) {
            (Then::Idle, _) => true,
            (Then::Ready, context) => state.open && context.thread().cpu() == cpus::current(),
            _ => false,
        };
        let Some(next) = state.next(stays) else { return };
        // SAFETY: a context that runs was let go, and leaves its CPU once.
        let context = unsafe { context::own(NonNull::new_unchecked(me)) };
        state.left = Some((context, then));
        drop(state);
        // SAFETY: as above; interrupts are off.
        unsafe { user::save(&*me) };
        // SAFETY: interrupts are off. What is next has just left its owner, and was prepared or has left its CPU before.
        // The current context is touched by `arrive` only, which runs on the other stack.
        unsafe { switch(&raw mut (*me).stack_pointer, (*next.as_ptr()).stack_pointer) };
        arrive(me);
    });
}

/// What a thread does first when it runs on a CPU, with interrupts off: sees to the one that has left.
pub(super) fn arrive(me: *mut Context) {
    let here = Scheduler::here();
    here.current.store(me, Relaxed);
    // SAFETY: it is the context of this thread, which owns it while it runs; interrupts are off.
    unsafe { user::load(&*me) };
    let Some((context, then)) = here.state.lock().left.take() else { return };
    match then {
        Then::Ready => make_ready(context),
        Then::Idle => here.state.lock().idle = Some(context),
        Then::Wait(thread) => {
            if let Some(waiting) = thread.wait(context) {
                make_ready(waiting);
            }
        }
        Then::End => match Thread::end(context) {
            Ended::Kept => {}
            Ended::Awaited(waiting) => make_ready(waiting),
            // SAFETY: let go for the queue.
            Ended::Unused(context) => unsafe { UNUSED.lock().push(context.into_raw()) },
        },
    }
}

/// Frees what threads have left that ended without a handle.
pub(super) fn free_unused() {
    loop {
        let unused = UNUSED.lock().pop();
        let Some(context) = unused else { return };
        // SAFETY: the queue owned it.
        drop(unsafe { context::own(context) });
    }
}

/// What the idle thread of a CPU does. It is never pre-empted: it looks for itself whether another one is ready.
pub(super) fn idle() -> ! {
    loop {
        free_unused();
        interrupts::disable();
        let here = Scheduler::here();
        here.idles.store(true, SeqCst);
        if here.state.lock().ready.is_empty() {
            preemption::update_timer();
            cpus::leave_if_asked();
            // An interrupt that comes in between ends the halt at once.
            interrupts::enable_and_hlt();
            continue;
        }
        here.idles.store(false, Relaxed);
        preemption::update_timer();
        leave(Then::Idle);
        interrupts::enable();
    }
}

/// Whether this CPU has nothing to run; interrupts are off.
pub(super) fn idles() -> bool {
    Scheduler::here().idles.load(Relaxed)
}
