//! Contexts in the order in which they came, linked through themselves: a queue needs no memory.

use core::ptr::{self, NonNull};
use core::sync::atomic::Ordering::Relaxed;

use super::context::Context;

/// First in, first out. It holds contexts without their owners: see [`Self::push`].
#[derive(Debug)]
pub(super) struct Queue {
    first: *mut Context,
    last: *mut Context,
}

// SAFETY: a context may be used on any CPU, and whoever has the queue has those in it.
unsafe impl Send for Queue {}

impl Queue {
    /// An empty queue.
    pub(super) const fn new() -> Self {
        Self { first: ptr::null_mut(), last: ptr::null_mut() }
    }

    /// Whether nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_null()
    }

    /// Appends a context.
    ///
    /// # Safety
    ///
    /// The queue owns it until it is popped.
    pub(super) unsafe fn push(&mut self, context: NonNull<Context>) {
        // SAFETY: ours from here on.
        unsafe { context.as_ref() }.next.store(ptr::null_mut(), Relaxed);
        // SAFETY: what is in the queue is ours.
        match unsafe { self.last.as_ref() } {
            Some(last) => last.next.store(context.as_ptr(), Relaxed),
            None => self.first = context.as_ptr(),
        }
        self.last = context.as_ptr();
    }

    /// Takes out the one that has been in it for longest.
    pub(super) fn pop(&mut self) -> Option<NonNull<Context>> {
        let first = NonNull::new(self.first)?;
        // SAFETY: what is in the queue is ours.
        self.first = unsafe { first.as_ref() }.next.load(Relaxed);
        if self.first.is_null() {
            self.last = ptr::null_mut();
        }
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_leave_in_the_order_in_which_they_came() {
        let mut contexts = [const { Context::empty() }; 4];
        let contexts = contexts.each_mut().map(NonNull::from);
        let mut queue = Queue::new();
        assert_eq!(queue.pop(), None);
        for round in 1..=contexts.len() {
            for &context in &contexts[..round] {
                // SAFETY: it is popped below.
                unsafe { queue.push(context) };
                assert!(!queue.is_empty());
            }
            for &context in &contexts[..round] {
                assert_eq!(queue.pop(), Some(context));
            }
            assert!(queue.is_empty() && queue.pop().is_none());
        }
    }

    #[test]
    fn one_that_comes_back_goes_to_the_end() {
        let mut contexts = [const { Context::empty() }; 3];
        let contexts = contexts.each_mut().map(NonNull::from);
        let mut queue = Queue::new();
        // SAFETY: the queue has them only as long as they live.
        contexts.iter().for_each(|&context| unsafe { queue.push(context) });
        for turn in 0..7 {
            let context = queue.pop().expect("three are in it");
            assert_eq!(context, contexts[turn % 3]);
            // SAFETY: as above, and popped.
            unsafe { queue.push(context) };
        }
    }
}
