//! What everybody may know of a thread, and how it ends.

use alloc::sync::Arc;
use core::fmt;
use core::mem;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use kslab::IrqLock;

use super::context::Owned;
use super::scheduler;
use crate::cpus::Cpus;

/// A thread: its name, its number, and where it runs.
#[derive(Clone)]
pub struct Thread(Arc<Shared>);

struct Shared {
    name: &'static str,
    id: u64,
    /// The CPU that it runs on, or is to run on from its next turn.
    cpu: AtomicUsize,
    end: IrqLock<Cpus, End>,
}

/// How far a thread is, and who cares.
enum End {
    /// It has not ended; there is a handle.
    Open,
    /// It has not ended, and there is no handle: whoever notices that it has ended frees it.
    Detached,
    /// It has not ended, and this thread waits for that.
    Awaited(Owned),
    /// It has ended. Its context, for whoever has the handle, until that is taken.
    Ended(Option<Owned>),
}

impl Thread {
    /// A thread that is to run on the CPU with that number.
    pub(super) fn new(name: &'static str, cpu: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Relaxed);
        Self(Arc::new(Shared { name, id, cpu: AtomicUsize::new(cpu), end: IrqLock::new(End::Open) }))
    }

    /// The name that it was given.
    pub fn name(&self) -> &'static str {
        self.0.name
    }

    /// A number that no other thread has or had.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// The number of the CPU that it runs on, or is to run on from its next turn.
    pub fn cpu(&self) -> usize {
        self.0.cpu.load(Relaxed)
    }

    /// Has the thread run on that CPU from its next turn on: when it has yielded, was pre-empted or has waited. One that
    /// already has its place in a queue runs once more on the CPU of that queue.
    ///
    /// Whether it will: a CPU that runs no threads is refused.
    pub fn migrate_to(&self, cpu: usize) -> bool {
        let runs_threads = scheduler::is_open(cpu);
        if runs_threads {
            self.set_cpu(cpu);
        }
        runs_threads
    }

    pub(super) fn set_cpu(&self, cpu: usize) {
        self.0.cpu.store(cpu, Relaxed);
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        matches!(*self.0.end.lock(), End::Ended(_))
    }

    /// Has `waiting`, which has a handle, wait for the end; gives it back if that was before.
    pub(super) fn wait(self, waiting: Owned) -> Option<Owned> {
        let shared = Arc::as_ptr(&self.0);
        // SAFETY: the handle keeps it, and goes away only after this lock was free.
        let mut end = unsafe { &*shared }.end.lock();
        // Now, since who has waited expects that all memory of the thread is free when it goes on.
        drop(self);
        match *end {
            End::Ended(_) => Some(waiting),
            _ => {
                *end = End::Awaited(waiting);
                None
            }
        }
    }

    /// The thread of `context` has ended, and its stack is not in use any more.
    pub(super) fn end(context: Owned) -> Ended {
        let shared = Arc::as_ptr(&context.thread().0);
        // SAFETY: the context keeps it, and whoever frees that has taken this lock before, or has it from here.
        let mut end = unsafe { &*shared }.end.lock();
        match mem::replace(&mut *end, End::Ended(None)) {
            End::Detached => Ended::Unused(context),
            before => {
                *end = End::Ended(Some(context));
                match before {
                    End::Awaited(waiting) => Ended::Awaited(waiting),
                    _ => Ended::Kept,
                }
            }
        }
    }

    /// The handle goes away. The context, if the thread has ended: the caller frees it.
    pub(super) fn let_go(&self) -> Option<Owned> {
        let mut end = self.0.end.lock();
        match &mut *end {
            End::Ended(context) => context.take(),
            _ => {
                *end = End::Detached;
                None
            }
        }
    }
}

/// What is to be done when a thread has ended.
pub(super) enum Ended {
    /// Nothing.
    Kept,
    /// This one has waited for it, and is ready now.
    Awaited(Owned),
    /// Nobody wants this context any more.
    Unused(Owned),
}

impl fmt::Debug for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { name, id, .. } = *self.0;
        f.debug_struct("Thread").field("name", &name).field("id", &id).field("cpu", &self.cpu()).finish()
    }
}
