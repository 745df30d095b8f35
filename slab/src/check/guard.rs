//! Guarded objects: each at the end of pages of its own, with unmapped pages on both sides, which are unmapped at its free.
//!
//! The embedder sets addresses aside for them; they are divided into *places*, each with a page that is never mapped and
//! two that are while there is an object:
//!
//! ```text
//! | never mapped | unmapped or mapped | red zone, object, slack | never mapped | ...
//! ```
//!
//! A table says of each place which object is in it, or was last. Places are used in turn and a quarter of them always
//! rests, so an object stays known for a while after its free.
//!
//! Invariants:
//! 1. A place that is free is in the queue, and nothing is mapped there. It leaves the queue with the lock held.
//! 2. Any other has a run of page frames, mapped at the end of its pages. Whoever has made its state `CACHED` may write there
//!    and unmap it; `USED` is the user's, `QUARANTINED` is freed but could not be unmapped yet, `KEPT` stays so for good.
//!
//! Lock: one, around the queue; no other is taken inside it. States and tags need none. The embedder is called without it.

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use super::room::{Kept, Room, Slot, Tag};
use crate::cache::{CACHED, Caches, FREE, QUARANTINED, USED};
use crate::fault::Fault;
use crate::frames::{Frame, Order};
use crate::lock::{Interrupts, IrqLock, Level};
use crate::memory::FRAME_SIZE;
use crate::platform::{Platform, in_nmi};
use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Once};

/// Pages that an object can have.
const PAGES: usize = 2;

/// From one place to the next.
const STRIDE: usize = (1 + PAGES) * FRAME_SIZE;

/// Bytes of the largest object that is guarded: that of the largest size class.
pub const LARGEST_GUARDED: usize = PAGES * FRAME_SIZE;

/// Maps the pages of guarded objects: those of caches with the check [`GUARD`](super::Checks::GUARD).
///
/// Such an object has one or two page frames to itself, and its end, rounded up to its alignment, is the end of their last
/// page. So an access one byte behind it is a page fault at that instruction, unless its size is no multiple of its
/// alignment: up to the next one it is found at its free, as is a write between the start of its pages and it. After its free
/// its pages are unmapped, and the next access is a page fault too. What the kernel's handler says then, is
/// [`Heap::explain`](crate::Heap::explain)'s to tell.
///
/// There are as many places as [`addresses`](Self::addresses) has room for, 12 KiB each. An object is guarded if there is a
/// place for it, memory, and neither an NMI nor
/// [`allocate_without_growing`](crate::Cache::allocate_without_growing) asks; if it is not larger than
/// [`LARGEST_GUARDED`], nor aligned to more than a page; and if `map` succeeds. Else it has just the cache's other checks.
///
/// Where `unmap` refuses, the object is free all the same, but its pages stay mapped until a later free of a guarded
/// object, which unmaps two of those, [`maintain`](crate::Heap::maintain) or [`shrink`](crate::Heap::shrink): until then, poison, if the
/// cache has it, shows writes to it.
///
/// The same frames are mapped with all other memory, too: a wild pointer finds them there. A heap within another has no
/// guarded objects.
///
/// # Safety
///
/// The addresses are for nothing else. Where [`map`](Self::map) says so, the page frames are mapped there, writable, and
/// stay so until [`unmap`](Self::unmap); where that says so, no CPU can reach them there any more.
pub unsafe trait GuardPages: Sync {
    /// The first of the addresses, from which pointers to all of them can be made, and how many there are. It is asked once.
    fn addresses(&self) -> (NonNull<u8>, usize);

    /// Maps `pages` page frames in a row, of which `first` is the first, from `start` on. Nothing is mapped there now.
    /// `false`, and nothing done, where it cannot.
    ///
    /// It is called with no lock of the allocator held, in any context but an NMI, with interrupts off or on. It may
    /// allocate page frames, but no object of a cache that has guarded ones.
    fn map(&self, start: NonNull<u8>, first: Frame, pages: usize) -> bool;

    /// Unmaps what it has mapped there, and has every CPU forget it. `false`, and nothing done, where it cannot just now:
    /// above all where other CPUs cannot be waited for, as with interrupts off.
    ///
    /// It is called as [`map`](Self::map) is: whoever frees may hold locks of the kernel's.
    fn unmap(&self, start: NonNull<u8>, pages: usize) -> bool;
}

/// The guarded objects of a heap.
pub(crate) struct Guard<P> {
    region: Once<Region>,
    /// Whether it may have any: not in a heap that ends, since its memory serves others then.
    is_open: bool,
    /// As many as the region has; null before the first object.
    places: AtomicPtr<Place>,
    free: IrqLock<P, Queue>,
    /// Places that could not be unmapped.
    waiting: AtomicUsize,
}

/// The addresses for guarded objects.
#[derive(Clone, Copy)]
struct Region {
    pages: &'static dyn GuardPages,
    start: *mut u8,
    places: usize,
}

// SAFETY: a pointer into it is used by whoever has the object there, wherever that is.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// What is known of a place. All of it is atomic, so that anybody may look.
struct Place {
    state: AtomicU8,
    /// The number of the cache that the object is from.
    cache: AtomicU32,
    /// The first page frame.
    frame: AtomicU32,
    /// The next place in the queue.
    next: AtomicU32,
    tag: Kept,
}

/// Free places, that which was freed first in front.
#[derive(Debug)]
struct Queue {
    first: u32,
    last: u32,
    length: usize,
}

/// A place that has been used, and the object in it.
#[derive(Clone, Copy)]
pub(crate) struct Guarded<'a> {
    pub(crate) index: usize,
    pub(crate) cache: u32,
    pub(crate) slot: Slot,
    pub(crate) tag: Tag,
    pub(crate) state: &'a AtomicU8,
}

impl<P> Guard<P> {
    pub(crate) const fn new(is_open: bool) -> Self {
        let free = Queue { first: 0, last: 0, length: 0 };
        Self {
            region: Once::new(),
            is_open,
            places: AtomicPtr::new(core::ptr::null_mut()),
            free: IrqLock::ordered(Level::Guard, free),
            waiting: AtomicUsize::new(0),
        }
    }

    fn region(&self) -> Option<&Region> {
        self.region.get()
    }

    /// The places, once there are any.
    fn places(&self) -> &[Place] {
        let (Some(region), Some(places)) = (self.region(), NonNull::new(self.places.load(Acquire))) else { return &[] };
        // SAFETY: `set_up` has written so many, which stay.
        unsafe { core::slice::from_raw_parts(places.as_ptr(), region.places) }
    }

    /// The object that is in a place or was there last; `None` where there was none, or one is just being put there.
    fn at(&self, index: usize) -> Option<Guarded<'_>> {
        let (region, place) = (self.region()?, self.places().get(index)?);
        let tag = place.tag.read()?;
        let (size, align) = tag.requested;
        let room = room_for(Layout::from_size_align(size, align).ok()?)?;
        // SAFETY: what is or was in the place has this room, says the tag, and the table stays.
        let slot = unsafe { room.slot_with(region.start_of(index, room), &place.tag) };
        Some(Guarded { index, cache: place.cache.load(Relaxed), slot, tag, state: &place.state })
    }

    /// The object in whose place a pointer is.
    pub(crate) fn around(&self, pointer: *const u8) -> Option<Guarded<'_>> {
        self.at(self.place_of(pointer)?)
    }

    /// The number of the place that a pointer is in.
    pub(crate) fn place_of(&self, pointer: *const u8) -> Option<usize> {
        self.region()?.place_of(pointer.addr())
    }

    /// The objects of a cache, by its number: those that are there, and those that were in places that are free now.
    pub(crate) fn of_cache(&self, cache: u32) -> impl Iterator<Item = Guarded<'_>> {
        let places = self.places().iter().enumerate();
        let places = places.filter(move |(_, place)| place.cache.load(Relaxed) == cache);
        places.filter_map(|(index, _)| self.at(index))
    }

    /// How many of a cache are there, those that wait to be unmapped among them.
    pub(crate) fn taken(&self, cache: u32) -> usize {
        let is_there = |place: &&Place| place.cache.load(Relaxed) == cache && place.state.load(Relaxed) != FREE;
        self.places().iter().filter(is_there).count()
    }

    /// How many wait to be unmapped.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// Takes one that waits to be unmapped: its place is the caller's now.
    pub(crate) fn take_waiting(&self) -> Option<Guarded<'_>> {
        let claim = |place: &Place| place.state.compare_exchange(QUARANTINED, CACHED, Acquire, Relaxed).is_ok();
        let index = self.places().iter().position(claim)?;
        self.waiting.fetch_sub(1, Relaxed);
        self.at(index)
    }

    /// What an access to this address was that has caused a page fault, and to which object: where it is between two, to the
    /// nearer.
    pub(crate) fn explain(&self, address: usize) -> Option<(Guarded<'_>, Fault)> {
        let start = self.region()?.start.addr();
        // Its first page, never mapped, is also the page behind the place before it.
        let place = address.checked_sub(start)? / STRIDE;
        let [behind, before] = [place.checked_sub(1), Some(place)].map(|place| self.at(place?));
        if let Some(inside) = before.filter(|guarded| guarded.slot.addresses().contains(&address)) {
            // What is allocated does not fault for want of a page.
            return inside.tag.is_free.then_some((inside, Fault::AccessAfterFree));
        }
        let behind = behind.map(|guarded| (address - guarded.end() + 1, guarded));
        let before = before.map(|guarded| (guarded.slot.object().addr() - address, guarded));
        match (behind, before) {
            (Some((bytes, guarded)), other) if other.is_none_or(|(distance, _)| bytes <= distance) => {
                Some((guarded, Fault::AccessBehind { bytes }))
            }
            (_, other) => other.map(|(bytes, guarded)| (guarded, Fault::AccessBefore { bytes })),
        }
    }
}

impl Region {
    fn place_of(&self, address: usize) -> Option<usize> {
        let index = address.checked_sub(self.start.addr())? / STRIDE;
        (index < self.places).then_some(index)
    }

    /// Where the pages of an object start that is in this place.
    fn start_of(&self, index: usize, room: Room) -> *mut u8 {
        self.start.wrapping_add((index + 1) * STRIDE - room.bytes())
    }
}

impl Guarded<'_> {
    /// Just behind the bytes that were asked for.
    fn end(&self) -> usize {
        self.slot.object().addr() + self.tag.requested.0
    }
}

impl<P: Platform> Guard<P> {
    /// `false` where there are such pages already, or may not be, or not even one place.
    pub(crate) fn set(&self, pages: &'static dyn GuardPages) -> bool {
        let (start, bytes) = pages.addresses();
        let skipped = start.as_ptr().addr().wrapping_neg() % FRAME_SIZE;
        // Behind the last place there is a page, too, that is never mapped.
        let places = (bytes.saturating_sub(skipped + FRAME_SIZE) / STRIDE).min(u32::MAX as usize);
        let region = Region { pages, start: start.as_ptr().wrapping_add(skipped), places };
        let mut set = false;
        // Others wait until it is set.
        let _interrupts = Interrupts::<P>::disable();
        if self.is_open && places > 0 {
            self.region.call_once(|| {
                set = true;
                region
            });
        }
        set
    }

    /// Maps pages for an object of this layout, of the cache with this number. Not in an NMI.
    pub(crate) fn take<'a>(&'a self, shared: &'a Caches<P>, cache: u32, layout: Layout) -> Option<Taken<'a, P>> {
        let (room, region) = (room_for(layout)?, *self.region()?);
        self.set_up(shared, region.places);
        let index = self.pop()?;
        let place = &self.places()[index];
        let start = region.start_of(index, room);
        let Some(frame) = map(shared, &region, start, room) else {
            self.push(index);
            return None;
        };
        place.frame.store(frame.number(), Relaxed);
        place.cache.store(cache, Relaxed);
        place.state.store(CACHED, Relaxed);
        // SAFETY: mapped above, and its size is that of the room; the table stays.
        let slot = unsafe { room.slot_with(start, &place.tag) };
        slot.initialise_object();
        Some(Taken { shared, index, slot })
    }

    /// Unmaps the pages of a place that is the caller's, and frees them; `false` where they have to wait for that.
    pub(crate) fn release(&self, shared: &Caches<P>, index: usize, slot: &Slot) -> bool {
        let (Some(region), Some(place)) = (self.region(), self.places().get(index)) else { return false };
        let pages = slot.addresses().len() / FRAME_SIZE;
        let start = NonNull::new(slot.start()).filter(|_| !in_nmi::<P>());
        let unmapped = start.is_some_and(|start| region.pages.unmap(start, pages));
        if !unmapped {
            self.waiting.fetch_add(1, Relaxed);
            place.state.store(QUARANTINED, Release);
            return false;
        }
        shared.frames().free_metadata(Frame::new(place.frame.load(Relaxed)), pages as u32);
        place.state.store(FREE, Relaxed);
        self.push(index);
        true
    }

    fn pop(&self) -> Option<usize> {
        let places = self.places();
        let mut queue = self.free.lock();
        if queue.length <= places.len() / 4 {
            return None;
        }
        let index = queue.first as usize;
        queue.first = places.get(index)?.next.load(Relaxed);
        queue.length -= 1;
        Some(index)
    }

    fn push(&self, index: usize) {
        let places = self.places();
        let mut queue = self.free.lock();
        match places.get(queue.last as usize) {
            Some(last) if queue.length > 0 => last.next.store(index as u32, Relaxed),
            _ => queue.first = index as u32,
        }
        queue.last = index as u32;
        queue.length += 1;
    }

    /// Makes the table, where there is none and memory for it.
    fn set_up(&self, shared: &Caches<P>, places: usize) {
        if !self.places.load(Relaxed).is_null() {
            return;
        }
        let bytes = places * size_of::<Place>();
        let Some(table) = shared.allocate_metadata(bytes) else { return };
        for index in 0..places {
            let next = AtomicU32::new(index as u32 + 1);
            let [cache, frame] = [const { AtomicU32::new(0) }; 2];
            let place = Place { state: AtomicU8::new(FREE), cache, frame, next, tag: Kept::none() };
            // SAFETY: the memory is ours, with room for so many, and aligned as metadata is.
            unsafe { table.cast::<Place>().add(index).write(place) };
        }
        let mut queue = self.free.lock();
        let is_first = self.places.load(Relaxed).is_null();
        if is_first {
            *queue = Queue { first: 0, last: places as u32 - 1, length: places };
            self.places.store(table.as_ptr().cast(), Release);
        }
        drop(queue);
        if !is_first {
            // SAFETY: allocated above with this size, and shown to nobody.
            unsafe { shared.free_metadata(table.as_ptr(), bytes) };
        }
    }
}

/// The room of an object of this layout, if it can be guarded.
fn room_for(object: Layout) -> Option<Room> {
    let room = Room::at_the_end_of_pages(object)?;
    (room.bytes() <= LARGEST_GUARDED && object.align() <= FRAME_SIZE).then_some(room)
}

fn map<P: Platform>(shared: &Caches<P>, region: &Region, start: *mut u8, room: Room) -> Option<Frame> {
    let pages = (room.bytes() / FRAME_SIZE) as u32;
    let frame = shared.allocate_frames(pages, Order::ZERO)?;
    // No free of a pointer into other mappings of them can be right.
    shared.frames().make_metadata(frame, pages);
    if region.pages.map(NonNull::new(start)?, frame, pages as usize) {
        return Some(frame);
    }
    shared.frames().free_metadata(frame, pages);
    None
}

/// A place whose pages are mapped, for a new object. Dropping it gives it back.
pub(crate) struct Taken<'a, P: Platform> {
    shared: &'a Caches<P>,
    index: usize,
    pub(crate) slot: Slot,
}

impl<P: Platform> Taken<'_, P> {
    /// The object is its user's from now on.
    pub(crate) fn hand_out(self) -> Option<NonNull<u8>> {
        self.shared.guard.places().get(self.index)?.state.store(USED, Relaxed);
        let object = NonNull::new(self.slot.object());
        core::mem::forget(self);
        object
    }
}

impl<P: Platform> Drop for Taken<'_, P> {
    fn drop(&mut self) {
        self.shared.guard.release(self.shared, self.index, &self.slot);
    }
}

impl<P> fmt::Debug for Guard<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
