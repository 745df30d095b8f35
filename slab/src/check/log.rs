//! The log of events: the last allocations and frees of objects with [`Checks::AUDIT`](super::Checks::AUDIT), whatever has
//! become of the objects since. It is the transaction log of the Solaris allocator.
//!
//! No lock. An entry is written by the one CPU whose event has its number, and says so before and after; a reader takes
//! only what has not changed meanwhile.

use core::fmt;
use core::ptr::NonNull;

use super::room::KeptEvent;
use crate::cache::Caches;
use crate::fault::{CacheName, Event};
use crate::platform::Platform;
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicU32, AtomicUsize};

/// An allocation or a free that is in the log.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Logged {
    /// When, where and by whom.
    pub event: Event,
    /// What was allocated or freed; it may be something else by now.
    pub object: *const u8,
    /// The cache that it is from.
    pub cache: CacheName,
    /// Whether it was freed.
    pub freed: bool,
}

impl fmt::Display for Logged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.freed { "freed" } else { "allocated" };
        write!(f, "{:p} of {} {what}: {}", self.object, self.cache, self.event)
    }
}

/// The events.
pub(crate) struct Log {
    /// Null before there is one.
    entries: AtomicPtr<Entry>,
    length: AtomicUsize,
}

/// Of an event that is being written the number is 0.
#[derive(Debug)]
struct Entry {
    event: KeptEvent,
    object: AtomicPtr<u8>,
    cache: AtomicU32,
    freed: AtomicU32,
}

impl Log {
    pub(crate) const fn new() -> Self {
        Self { entries: AtomicPtr::new(core::ptr::null_mut()), length: AtomicUsize::new(0) }
    }

    /// Makes room for so many events; `false` where there is no memory, or there is a log already.
    pub(crate) fn set_up<P: Platform>(&self, shared: &Caches<P>, events: usize) -> bool {
        let Some(bytes) = events.checked_mul(size_of::<Entry>()).filter(|&bytes| bytes > 0) else { return false };
        let Some(memory) = shared.allocate_metadata(bytes) else { return false };
        let entries = memory.cast::<Entry>();
        for index in 0..events {
            let entry = Entry {
                event: KeptEvent::none(),
                object: AtomicPtr::new(core::ptr::null_mut()),
                cache: AtomicU32::new(0),
                freed: AtomicU32::new(0),
            };
            // SAFETY: the memory is ours, with room for so many, and aligned as metadata is.
            unsafe { entries.add(index).write(entry) };
        }
        if self.length.compare_exchange(0, events, Relaxed, Relaxed).is_err() {
            // SAFETY: allocated above with this size, and shown to nobody.
            unsafe { shared.free_metadata(memory.as_ptr(), bytes) };
            return false;
        }
        self.entries.store(entries.as_ptr(), Release);
        true
    }

    fn entry(&self, sequence: u64) -> Option<&Entry> {
        let entries = NonNull::new(self.entries.load(Acquire))?;
        let index = (sequence % self.length.load(Relaxed) as u64) as usize;
        // SAFETY: `set_up` has written so many, which stay.
        Some(unsafe { entries.add(index).as_ref() })
    }

    /// Keeps an event until as many others have come as there is room for.
    pub(crate) fn record(&self, event: &Event, object: *mut u8, cache: u32, freed: bool) {
        let Some(entry) = self.entry(event.sequence) else { return };
        entry.event.begin();
        entry.object.store(object, Relaxed);
        entry.cache.store(cache, Relaxed);
        entry.freed.store(freed.into(), Relaxed);
        entry.event.write(Some(*event));
    }

    /// Calls `visit` with the events that are kept, the last first.
    pub(crate) fn for_each<P: Platform>(&self, shared: &Caches<P>, last: u64, mut visit: impl FnMut(&Logged)) {
        for sequence in (1..=last).rev().take(self.length.load(Relaxed)) {
            let Some(entry) = self.entry(sequence) else { return };
            // SAFETY: only `record` writes it, with the parts of an event.
            let Some(event) = (unsafe { entry.event.read() }) else { continue };
            let (object, cache) = (entry.object.load(Acquire), entry.cache.load(Acquire));
            let freed = entry.freed.load(Acquire) != 0;
            if event.sequence == sequence && entry.event.sequence() == sequence {
                visit(&Logged { event, object, cache: shared.name_of(cache), freed });
            }
        }
    }
}
