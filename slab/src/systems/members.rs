//! Heaps within a heap that have handles: what Windows' heaps and macOS's zones have in common.
//!
//! A handle is a member's address. It is looked for in the list, and never dereferenced before it is found there.
//!
//! Lock: one around the list, in which no other is taken. A member stays there as long as somebody visits the list.

use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr::{self, NonNull};

use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicUsize, spin_loop};
use crate::{ChildHeap, Heap, IrqLock, Order};

/// Has a heap borrow so many bytes of its parent, in a row, that it may keep; `false` where they are not there.
pub(super) fn commit<P: Platform>(heap: &Heap<P>, bytes: usize) -> bool {
    let frames = u32::try_from(bytes.div_ceil(FRAME_SIZE)).unwrap_or(u32::MAX);
    let Some(first) = heap.allocate_frames(frames, Order::ZERO, u64::MAX) else { return frames == 0 };
    // SAFETY: allocated above, and used by nobody.
    unsafe { heap.frames().free_run(first, frames) };
    true
}

/// A heap, and what its system knows of it.
pub(super) struct Member<'a, P: Platform, T> {
    pub(super) heap: ChildHeap<'a, P>,
    pub(super) own: T,
    next: AtomicPtr<Member<'a, P, T>>,
}

/// All members.
pub(super) struct Members<'a, P: Platform, T> {
    parent: &'a Heap<P>,
    first: AtomicPtr<Member<'a, P, T>>,
    /// The member that is made at its first use, and that nobody destroys.
    main: AtomicPtr<Member<'a, P, T>>,
    /// Held while the list changes.
    changes: IrqLock<P, ()>,
    visits: AtomicUsize,
}

impl<P: Platform, T> Member<'_, P, T> {
    pub(super) fn handle(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

impl<'a, P: Platform, T> Members<'a, P, T> {
    pub(super) const fn new(parent: &'a Heap<P>, name: &'static str) -> Self {
        let [first, main] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];
        Self { parent, first, main, changes: IrqLock::named(name, ()), visits: AtomicUsize::new(0) }
    }

    pub(super) const fn parent(&self) -> &'a Heap<P> {
        self.parent
    }

    /// Another member; `None`, and the heap is no more, where there is no memory.
    pub(super) fn add(&self, heap: ChildHeap<'a, P>, own: T) -> Option<&Member<'a, P, T>> {
        let member = self.parent.allocate(Layout::new::<Member<'a, P, T>>())?.cast::<Member<'a, P, T>>();
        let _changes = self.changes.lock();
        let next = AtomicPtr::new(self.first.load(Relaxed));
        // SAFETY: just allocated for it.
        unsafe { member.write(Member { heap, own, next }) };
        self.first.store(member.as_ptr(), Release);
        // SAFETY: just written; it stays until it is destroyed.
        Some(unsafe { &*member.as_ptr() })
    }

    /// The member with this handle. It is there until [`destroy`](Self::destroy), which nobody calls meanwhile.
    pub(super) fn find(&self, handle: *const c_void) -> Option<&Member<'a, P, T>> {
        let mut found = None;
        self.visit(|member| {
            if member.handle().cast_const() == handle {
                found = Some(NonNull::from(member));
            }
            found.is_none()
        });
        // SAFETY: it was there just now, and stays, says the caller.
        found.map(|member| unsafe { &*member.as_ptr() })
    }

    /// Calls `visit` with each member until it says `false`, with no lock held. It must not destroy one.
    pub(super) fn visit(&self, mut visit: impl FnMut(&Member<'a, P, T>) -> bool) {
        {
            // A change that is under way is over then, and others wait for the visit.
            let _changes = self.changes.lock();
            self.visits.fetch_add(1, Acquire);
        }
        let mut next = self.first.load(Acquire);
        // SAFETY: what is in the list is there, as long as it is visited.
        while let Some(member) = unsafe { next.as_ref() }
            && visit(member)
        {
            next = member.next.load(Acquire);
        }
        self.visits.fetch_sub(1, Release);
    }

    /// The main member, which `make` makes where there is none.
    pub(super) fn main(&self, make: impl FnOnce() -> *mut c_void) -> *mut c_void {
        let main = self.main.load(Acquire);
        if !main.is_null() {
            return main.cast();
        }
        let new = make();
        match self.main.compare_exchange(main, new.cast(), Release, Acquire) {
            Ok(_) => new,
            Err(first) => {
                // SAFETY: nobody else knows it; another CPU's came first.
                unsafe { self.destroy(new, false) };
                first.cast()
            }
        }
    }

    /// Ends a member, and frees all that is allocated from it. `false` where there is none, or it is the main one and that is
    /// not meant. It waits until nobody visits the list.
    ///
    /// # Safety
    ///
    /// Nobody uses it or anything that is allocated from it any more.
    pub(super) unsafe fn destroy(&self, handle: *mut c_void, main_too: bool) -> bool {
        let is_main = !handle.is_null() && self.main.load(Acquire).cast() == handle;
        let unlinked = if is_main && !main_too { None } else { self.unlink(handle) };
        let Some(member) = unlinked else { return false };
        // SAFETY: written by `add`, and in no list any more.
        unsafe { member.drop_in_place() };
        // SAFETY: allocated by `add`.
        unsafe { self.parent.free(member.cast(), Layout::new::<Member<'a, P, T>>()) };
        true
    }

    fn unlink(&self, handle: *mut c_void) -> Option<NonNull<Member<'a, P, T>>> {
        let _changes = loop {
            let changes = self.changes.lock();
            if self.visits.load(Acquire) == 0 {
                break changes;
            }
            drop(changes);
            spin_loop();
        };
        let mut place = &self.first;
        loop {
            let next = place.load(Relaxed);
            // SAFETY: what is in the list is there.
            let here = unsafe { next.as_ref() }?;
            if next.cast() == handle {
                place.store(here.next.load(Relaxed), Release);
                return NonNull::new(next);
            }
            place = &here.next;
        }
    }
}

impl<P: Platform, T> Drop for Members<'_, P, T> {
    fn drop(&mut self) {
        loop {
            let first = self.first.load(Relaxed);
            // SAFETY: nobody has the handles any more, who could use them.
            if first.is_null() || !unsafe { self.destroy(first.cast(), true) } {
                return;
            }
        }
    }
}
