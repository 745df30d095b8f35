//! Kernel threads.
//!
//! Each CPU runs the threads that are on it in turns: a thread runs until it [yields](yield_now), waits for another
//! ([`JoinHandle::join`]), ends, or is pre-empted by the timer, which can be switched off for each CPU
//! ([`preemption::set`]). A thread stays on the CPU that it was made for until somebody has it migrate
//! ([`migrate_to`], [`Thread::migrate_to`]); when a CPU stops running threads, those on it go to the boot CPU.
//!
//! So unless pre-emption is [paused](preemption::pause) or interrupts are off, a thread may find itself on another CPU from
//! one instruction to the next, and what [`cpus::current`] has said may be old.
//!
//! What ran before there were threads is the thread "main" of the boot CPU.
//!
//! | module | what it is |
//! |---|---|
//! | `switch` | the change of stacks, and the first frame on a new one |
//! | `context` | a thread while it does not run |
//! | `queue` | contexts in a row |
//! | `scheduler` | who runs next, and what becomes of who ran before |
//! | `thread`, `join` | the handles, and the end of a thread |
//! | `user` | what a thread has of ring 3, which its CPU loads with it |
//! | [`preemption`] | turns that the timer ends |

mod context;
mod join;
pub mod preemption;
mod queue;
mod scheduler;
mod switch;
mod thread;
pub(crate) mod user;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::ops::Range;

use kslab::IrqLock;
use x86_64::instructions::interrupts;

pub use join::JoinHandle;
pub(crate) use scheduler::guarded_at;
pub use thread::Thread;

use crate::stop::stop;
use crate::{cpus, stack};
use context::Context;
use join::Slot;
use scheduler::Then;

/// Bytes of the stack of an idle thread: interrupts run on it.
const IDLE_STACK_SIZE: usize = 32 * 1024;

/// Why there is no new thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnError {
    /// There is no memory for it, or no addresses for its stack.
    NoMemory,
    /// The CPU runs no threads, or there is none of that number.
    NoCpu,
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMemory => "no memory for a thread",
            Self::NoCpu => "the CPU runs no threads",
        })
    }
}

impl core::error::Error for SpawnError {}

/// Makes what runs now the thread "main" of the boot CPU. Stops the kernel when there is no memory for that.
pub(crate) fn init() {
    let idle = || context::new(Thread::new("idle", cpus::BOOT), IDLE_STACK_SIZE, Box::new(|| idle()));
    let contexts = stack::init().then(|| context::of_running(Thread::new("main", cpus::BOOT)).zip(idle())).flatten();
    let Some((main, idle)) = contexts else {
        stop(format_args!("no threads: {}", SpawnError::NoMemory), |_| Ok(()));
    };
    scheduler::adopt(main);
    scheduler::set_idle(context::of_idle(idle));
    open(cpus::BOOT);
    preemption::set(cpus::BOOT, true);
}

/// Gets the CPU with that number, which does not run, ready to call [`idle`]. Whether there was memory for that.
pub(crate) fn prepare(cpu: usize) -> bool {
    let is_new = !scheduler::has_current(cpu);
    let idle = is_new.then(|| context::of_running(Thread::new("idle", cpu))).flatten();
    let done = !is_new || idle.is_some();
    idle.map(context::of_idle).into_iter().for_each(scheduler::adopt);
    done
}

/// Has that CPU, which is online, run threads from now on.
pub(crate) fn open(cpu: usize) {
    scheduler::open(cpu);
}

/// Has that CPU run no more threads: those on it go to the boot CPU, each at the end of its turn.
pub(crate) fn close(cpu: usize) {
    scheduler::close(cpu);
}

/// What a CPU does while no thread is ready.
pub(crate) fn idle() -> ! {
    scheduler::idle()
}

/// Starts a thread on the CPU of the caller, or on the boot CPU where that one is going offline: see [`spawn_on`].
///
/// # Errors
///
/// [`NoMemory`](SpawnError::NoMemory).
pub fn spawn<T: Send + 'static>(
    name: &'static str,
    stack_size: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SpawnError> {
    let here = current().cpu();
    spawn_on(if run_on(here) { here } else { cpus::BOOT }, name, stack_size, body)
}

/// Starts a thread on the CPU with that number. It has a stack of `stack_size` bytes, rounded up to whole pages and to at
/// least 16 KiB, and ends when `body` returns.
///
/// When it has ended, its memory is freed by whoever joins it or drops its handle; where the handle was dropped before,
/// by the next spawn, or by a CPU that has nothing else to do.
///
/// # Errors
///
/// [`NoMemory`](SpawnError::NoMemory), [`NoCpu`](SpawnError::NoCpu).
pub fn spawn_on<T: Send + 'static>(
    cpu: usize,
    name: &'static str,
    stack_size: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SpawnError> {
    free_unused();
    if !scheduler::is_open(cpu) {
        return Err(SpawnError::NoCpu);
    }
    let value: Slot<T> = Arc::new(IrqLock::new(None));
    let thread = Thread::new(name, cpu);
    let body = {
        let value = value.clone();
        Box::new(move || {
            let returned = body();
            *value.lock() = Some(returned);
        })
    };
    let context = context::new(thread.clone(), stack_size, body).ok_or(SpawnError::NoMemory)?;
    scheduler::make_ready(context);
    Ok(JoinHandle::new(thread, value))
}

/// Whether the CPU with that number runs threads.
pub fn run_on(cpu: usize) -> bool {
    scheduler::is_open(cpu)
}

/// The current thread.
///
/// # Panics
///
/// On a CPU that does not run threads yet.
pub fn current() -> Thread {
    scheduler::with_current(|context| context.thread().clone()).expect("the CPU runs no threads yet")
}

/// The addresses of the current thread's stack; `None` where it runs on one that was there before it.
pub fn stack() -> Option<Range<usize>> {
    scheduler::with_current(Context::stack_addresses).flatten()
}

/// Lets the other threads of this CPU have their turns first.
///
/// # Panics
///
/// If interrupts are off, as they are while an [`IrqLock`] is held, or if pre-emption is [paused](preemption::pause).
pub fn yield_now() {
    scheduler::check_that_it_may_switch();
    scheduler::leave(Then::Ready);
    // Who yields often waits for another CPU, which an emulator may run only when this one pauses.
    core::hint::spin_loop();
}

/// Goes on, after others have had their turns, on the CPU with that number. Whether it does: a CPU that runs no threads is
/// refused.
///
/// # Panics
///
/// As [`yield_now`].
pub fn migrate_to(cpu: usize) -> bool {
    let me = current();
    let accepted = me.migrate_to(cpu);
    yield_now();
    accepted && me.cpu() == cpu
}

/// Frees what threads have left that ended without a handle; otherwise the next spawn does, or a CPU that has nothing
/// else to do.
pub fn free_unused() {
    scheduler::free_unused();
}

/// What a new thread does, with interrupts off.
extern "sysv64" fn run(me: *mut Context) -> ! {
    scheduler::arrive(me);
    // SAFETY: the context of this thread, which owns it; nobody else has a reference to it.
    let body = unsafe { (*me).body.take() };
    interrupts::enable();
    if let Some(body) = body {
        body();
    }
    scheduler::leave(Then::End);
    unreachable!("nobody goes on with a thread that has ended");
}
