//! The quarantine: freed objects that wait before they may be allocated again, first in, first out.
//!
//! Lock: one a heap, inside which no other is taken.

use core::fmt;
use core::ptr::NonNull;

use crate::cache::{Caches, Core};
use crate::lock::{IrqLock, Level};
use crate::platform::Platform;

/// Objects that wait at most, however small they are.
const PLACES: usize = 256;

/// Bytes that wait at most, unless the embedder says otherwise.
const BYTES: usize = 256 << 10;

/// An object that waits: its slot, and the cache that it is from.
#[derive(Debug)]
pub(crate) struct Waiting<P> {
    pub(crate) slot: *mut u8,
    pub(crate) cache: NonNull<Core<P>>,
    pub(crate) bytes: usize,
}

impl<P> Clone for Waiting<P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Waiting<P> {}

/// The objects that wait.
pub(crate) struct Quarantine<P> {
    queue: IrqLock<P, Queue<P>>,
}

struct Queue<P> {
    /// [`PLACES`] of them; none before the first use.
    places: Option<NonNull<Waiting<P>>>,
    first: usize,
    length: usize,
    bytes: usize,
    most_bytes: usize,
}

// SAFETY: it only knows where slots and places are; whoever takes one out has it.
unsafe impl<P> Send for Queue<P> {}

impl<P> Quarantine<P> {
    pub(crate) const fn new() -> Self {
        let queue = Queue { places: None, first: 0, length: 0, bytes: 0, most_bytes: BYTES };
        Self { queue: IrqLock::ordered(Level::Quarantine, queue) }
    }
}

/// What became of an object that is to wait.
pub(crate) enum Wait<P> {
    Waits,
    /// It does, and this one does no longer.
    Instead(Waiting<P>),
    /// It does not: it is larger than may wait at all, or there is no room for a queue.
    No,
}

impl<P: Platform> Quarantine<P> {
    /// Bytes that may wait from now on.
    pub(crate) fn set_limit(&self, bytes: usize) {
        self.queue.lock().most_bytes = bytes;
    }

    /// Lets an object wait.
    pub(crate) fn put(&self, shared: &Caches<P>, waiting: Waiting<P>) -> Wait<P> {
        self.set_up(shared);
        let mut queue = self.queue.lock();
        if waiting.bytes > queue.most_bytes || queue.places.is_none() {
            return Wait::No;
        }
        let left = if queue.length == PLACES { queue.pop() } else { None };
        queue.length += 1;
        queue.bytes += waiting.bytes;
        let last = queue.length - 1;
        queue.write(last, waiting);
        left.map_or(Wait::Waits, Wait::Instead)
    }

    /// One that has waited long enough: there are more bytes than may wait.
    pub(crate) fn take_surplus(&self) -> Option<Waiting<P>> {
        let mut queue = self.queue.lock();
        if queue.bytes > queue.most_bytes { queue.pop() } else { None }
    }

    /// Any object, of this cache where there is one.
    pub(crate) fn take(&self, cache: Option<&Core<P>>) -> Option<Waiting<P>> {
        let mut queue = self.queue.lock();
        let Some(cache) = cache else { return queue.pop() };
        let found = (0..queue.length)
            .find(|&index| queue.read(index).is_some_and(|waiting| core::ptr::eq(waiting.cache.as_ptr(), cache)))?;
        // It goes to the front, and those before it move up.
        let waiting = queue.read(found)?;
        for index in (0..found).rev() {
            let before = queue.read(index)?;
            queue.write(index + 1, before);
        }
        queue.write(0, waiting);
        queue.pop()
    }

    #[cold]
    fn set_up(&self, shared: &Caches<P>) {
        let bytes = PLACES * size_of::<Waiting<P>>();
        if self.queue.lock().places.is_some() {
            return;
        }
        let Some(places) = shared.allocate_metadata(bytes) else { return };
        let mut queue = self.queue.lock();
        let unused = match queue.places {
            Some(_) => Some(places),
            None => {
                queue.places = Some(places.cast());
                None
            }
        };
        drop(queue);
        if let Some(places) = unused {
            // SAFETY: allocated above with this size, and shown to nobody.
            unsafe { shared.free_metadata(places.as_ptr(), bytes) };
        }
    }
}

impl<P> Queue<P> {
    /// Takes the first one out. As long as nobody has called [`Caches::end_wait`] for it, its cache stays.
    fn pop(&mut self) -> Option<Waiting<P>> {
        let first = if self.length > 0 { self.read(0)? } else { return None };
        // SAFETY: a cache ends only when none of its objects waits, and none has been taken out of here that still counts.
        unsafe { first.cache.as_ref() }.begin_visit();
        self.length -= 1;
        self.first = (self.first + 1) % PLACES;
        self.bytes -= first.bytes;
        Some(first)
    }

    /// The place of the `index`th that waits.
    fn place(&self, index: usize) -> Option<NonNull<Waiting<P>>> {
        // SAFETY: there are so many places.
        self.places.map(|places| unsafe { places.add((self.first + index) % PLACES) })
    }

    /// The `index`th that waits, of as many as there are.
    fn read(&self, index: usize) -> Option<Waiting<P>> {
        // SAFETY: written by `write`, since it waits.
        self.place(index).map(|place| unsafe { place.read() })
    }

    fn write(&mut self, index: usize, waiting: Waiting<P>) {
        if let Some(place) = self.place(index) {
            // SAFETY: the place is the queue's.
            unsafe { place.write(waiting) };
        }
    }
}

impl<P> fmt::Debug for Quarantine<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quarantine").finish_non_exhaustive()
    }
}
