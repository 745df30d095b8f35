//! What a thread is while it does not run.
//!
//! A context has one owner at a time: the CPU that runs it, a queue, the end of the thread that it waits for, or, when it
//! has ended, its own end until somebody frees it.

use alloc::boxed::Box;
use core::fmt;
use core::ops::Range;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize};

use kslab::{InitFailed, Object, ObjectBox, ObjectCache};

use super::switch;
use super::thread::Thread;
use super::user::State;
use crate::cpus::Cpus;
use crate::heap::HEAP;
use crate::stack::MappedStack;

static CONTEXTS: ObjectCache<Context, Cpus> = ObjectCache::new(HEAP.caches(), "thread");

/// The fewest bytes that a stack has: an interrupt on top of a thread needs them too.
const LEAST_STACK: usize = 16 * 1024;

/// Owns a context.
pub(super) type Owned = ObjectBox<'static, Context, Cpus>;

/// What a new thread calls.
pub(super) type Body = Box<dyn FnOnce() + Send>;

/// A thread's stack, and its registers while it does not run.
pub(super) struct Context {
    /// Where the registers are saved.
    pub(super) stack_pointer: u64,
    /// Of a thread that runs on one that was there before the thread, `None`.
    stack: Option<MappedStack>,
    /// Until it begins.
    pub(super) body: Option<Body>,
    /// From [`of_running`] until it is freed.
    thread: Option<Thread>,
    /// How many [`Pause`](super::preemption::Pause)s it has.
    pub(super) pauses: AtomicUsize,
    /// What it has of ring 3, if it runs code there.
    pub(super) user: AtomicPtr<State>,
    /// The one behind it in a queue.
    pub(super) next: AtomicPtr<Context>,
}

impl Context {
    /// That of no thread.
    pub(super) const fn empty() -> Self {
        Self {
            stack_pointer: 0,
            stack: None,
            body: None,
            thread: None,
            pauses: AtomicUsize::new(0),
            user: AtomicPtr::new(ptr::null_mut()),
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// The thread.
    ///
    /// # Panics
    ///
    /// If it is that of none.
    pub(super) fn thread(&self) -> &Thread {
        self.thread.as_ref().expect("a context that is in use has a thread")
    }

    /// The addresses of its stack, if it has one of its own.
    pub(super) fn stack_addresses(&self) -> Option<Range<usize>> {
        self.stack.as_ref().map(MappedStack::addresses)
    }

    /// Whether `address` is in the guard page of its stack.
    pub(super) fn is_guarded_at(&self, address: x86_64::VirtAddr) -> bool {
        self.stack.as_ref().is_some_and(|stack| stack.is_guarded_at(address))
    }
}

impl Object for Context {
    fn init() -> Result<Self, InitFailed> {
        Ok(Self::empty())
    }

    fn recycle(&mut self) {
        *self = Self::empty();
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("thread", &self.thread).field("stack", &self.stack).finish_non_exhaustive()
    }
}

/// The context of an idle thread, which keeps its turn for as long as it wants.
pub(super) fn of_idle(mut context: Owned) -> Owned {
    context.pauses = AtomicUsize::new(1);
    context
}

/// The context of a thread that runs already, on a stack that lives for ever; `None` where there is no memory.
pub(super) fn of_running(thread: Thread) -> Option<Owned> {
    let mut context = CONTEXTS.allocate().ok()?;
    context.thread = Some(thread);
    Some(context)
}

/// The context of a new thread, with a stack of `size` bytes; `None` where there is no memory.
pub(super) fn new(thread: Thread, size: usize, body: Body) -> Option<Owned> {
    let mut context = of_running(thread)?;
    let stack = MappedStack::new(size.max(LEAST_STACK))?;
    let top = stack.top();
    (context.stack, context.body) = (Some(stack), Some(body));
    let raw = context.into_raw();
    // SAFETY: the stack is new and larger than a page; its top is page-aligned.
    let stack_pointer = unsafe { switch::prepare(top, raw) };
    // SAFETY: let go just above.
    let mut context = unsafe { own(raw) };
    context.stack_pointer = stack_pointer;
    Some(context)
}

/// Owns a context again.
///
/// # Safety
///
/// It was let go by [`ObjectBox::into_raw`], and there is no other owner.
pub(super) unsafe fn own(context: NonNull<Context>) -> Owned {
    // SAFETY: all contexts are of this cache; the rest is the caller's promise.
    unsafe { CONTEXTS.from_raw(context) }
}
