//! Waiting for what a thread returns.

use alloc::sync::Arc;
use core::fmt;

use kslab::IrqLock;

use super::scheduler::{self, Then};
use super::thread::Thread;
use crate::cpus::Cpus;

/// Where a thread leaves what it returns.
pub(super) type Slot<T> = Arc<IrqLock<Cpus, Option<T>>>;

/// The right to wait for a thread. Dropping it leaves the thread to itself.
pub struct JoinHandle<T> {
    thread: Thread,
    value: Slot<T>,
}

impl<T> JoinHandle<T> {
    pub(super) fn new(thread: Thread, value: Slot<T>) -> Self {
        Self { thread, value }
    }

    /// The thread.
    pub fn thread(&self) -> &Thread {
        &self.thread
    }

    /// Whether it has ended, so that [`join`](Self::join) returns at once.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until the thread has ended, while others run, and returns what it has returned. Its memory is free again.
    ///
    /// # Panics
    ///
    /// As [`yield_now`](super::yield_now).
    pub fn join(self) -> T {
        scheduler::check_that_it_may_switch();
        while !self.is_finished() {
            scheduler::leave(Then::Wait(self.thread.clone()));
        }
        let value = self.value.lock().take();
        value.expect("a thread that has ended has left its value")
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        drop(self.thread.let_go());
    }
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinHandle").field("thread", &self.thread).finish_non_exhaustive()
    }
}
