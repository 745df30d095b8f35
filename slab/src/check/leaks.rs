//! Who has what: allocations by the place that made them, and those that nobody refers to any more.
//!
//! What is listed are objects with checks, and their places are known with [`Checks::AUDIT`](super::Checks::AUDIT).
//!
//! [`find_leaks`](crate::Heap::find_leaks) is the `::findleaks` of the Solaris debugger, and conservative as that is: a word
//! that could be a pointer into an object is taken for one.

use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;

use crate::cache::{AUDITED, Caches, USED};
use crate::fault::Event;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::sync::AtomicU8;
use crate::sync::Ordering::Relaxed;

/// An object with checks that is allocated.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Allocation {
    /// Its first byte.
    pub object: NonNull<u8>,
    /// Bytes that were asked for.
    pub size: usize,
    /// Its allocation, if that is known.
    pub allocated: Option<Event>,
}

/// A place in a program that has allocated objects which are still there.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Site {
    /// One of the allocations that came from there.
    pub example: Allocation,
    /// How many objects.
    pub objects: usize,
    /// How many bytes were asked for, for all of them.
    pub bytes: usize,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { example: Allocation { object, allocated, .. }, objects, bytes } = *self;
        let s = if objects == 1 { "" } else { "s" };
        write!(f, "{objects} object{s}, {bytes} bytes, such as {object:p}, allocated: ")?;
        match allocated {
            Some(event) => write!(f, "{event}"),
            None => f.write_str("it is not known where"),
        }
    }
}

/// Objects that wait to be searched for pointers. Those that find no place are found in the next pass.
const WAITING: usize = 64;

impl Allocation {
    /// Equal for those that come from one place.
    fn key(&self) -> u64 {
        let event = self.allocated.unwrap_or_default();
        let location = event.location.map_or(0, |location| core::ptr::from_ref(location).addr());
        let words = event.addresses.iter().chain([&location]);
        // FNV-1a by words.
        words.fold(0xcbf2_9ce4_8422_2325, |key: u64, &word| (key ^ word as u64).wrapping_mul(0x100_0000_01b3))
    }
}

/// Calls `visit` with each place that has made allocations of a list, in no order. `list` calls what it is given with each of
/// them; it is gone through once for every place, and once more.
pub(crate) fn group_by_site(mut list: impl FnMut(&mut dyn FnMut(&Allocation)), mut visit: impl FnMut(&Site)) {
    let mut last = None;
    loop {
        let mut next: Option<(u64, Site)> = None;
        list(&mut |allocation| {
            let key = allocation.key();
            if last.is_some_and(|last| key <= last) || next.is_some_and(|(next, _)| key > next) {
                return;
            }
            match &mut next {
                Some((next, site)) if *next == key => {
                    site.objects += 1;
                    site.bytes += allocation.size;
                }
                _ => next = Some((key, Site { example: *allocation, objects: 1, bytes: allocation.size })),
            }
        });
        let Some((key, site)) = next else { return };
        visit(&site);
        last = Some(key);
    }
}

impl<P: Platform> Caches<P> {
    /// Calls `visit` with every object with checks that is allocated.
    pub(crate) fn for_each_allocation(&self, mut visit: impl FnMut(&Allocation)) {
        self.for_each(|cache| cache.for_each_allocation(self, &mut visit));
    }

    /// Calls `visit` with each place that has allocated such objects, in no order.
    pub(crate) fn for_each_site(&self, visit: impl FnMut(&Site)) {
        group_by_site(|count| self.for_each_allocation(count), visit);
    }

    /// Calls `visit` with every object with checks that is allocated and that no word of `roots`, of objects without checks,
    /// of runs of page frames, or of an object that is reached from these, points into.
    ///
    /// # Safety
    ///
    /// See [`Heap::find_leaks`](crate::Heap::find_leaks).
    pub(crate) unsafe fn find_leaks(&self, roots: &[Range<*const u8>], mut visit: impl FnMut(&Allocation)) {
        // SAFETY: passed on to the caller.
        unsafe { self.with_leaks(roots, |leaks| leaks(&mut visit)) };
    }

    /// The same by the places that have allocated them.
    ///
    /// # Safety
    ///
    /// As [`find_leaks`](Self::find_leaks).
    pub(crate) unsafe fn find_leaks_by_site(&self, roots: &[Range<*const u8>], visit: impl FnMut(&Site)) {
        // SAFETY: passed on to the caller.
        unsafe { self.with_leaks(roots, |leaks| group_by_site(leaks, visit)) };
    }

    /// Calls `work` with what lists the leaks, any number of times.
    ///
    /// # Safety
    ///
    /// As [`find_leaks`](Self::find_leaks).
    unsafe fn with_leaks(
        &self,
        roots: &[Range<*const u8>],
        work: impl FnOnce(&mut dyn FnMut(&mut dyn FnMut(&Allocation))),
    ) {
        let mut search = Search { caches: self, waiting: [(core::ptr::null(), 0); WAITING], length: 0, reached: false };
        for root in roots {
            // SAFETY: the roots may be read, says the caller.
            unsafe { search.scan(root.start, root.end.addr() - root.start.addr()) };
        }
        self.for_each(|cache| {
            if cache.room_size().is_none() {
                let size = cache.object_size();
                // SAFETY: an object that is allocated.
                cache.slabs.for_each_used(self.frames(), |object| unsafe { search.scan(object, size) });
            }
        });
        self.frames().for_each_pages(|frame, count| {
            // SAFETY: a run of so many frames that is allocated.
            unsafe { search.scan(self.frames().pointer(frame), count as usize * FRAME_SIZE) };
        });
        loop {
            search.reached = false;
            self.for_each_checked(|object, size, state| {
                if state.load(Relaxed) == AUDITED {
                    // SAFETY: an object of so many bytes, which are initialised when their slab is first used.
                    unsafe { search.scan(object, size) };
                }
            });
            if !search.reached {
                break;
            }
        }
        work(&mut |visit| self.for_each(|cache| cache.for_each_allocation_in(self, USED, &mut *visit)));
        self.for_each_checked(|_, _, state| _ = state.compare_exchange(AUDITED, USED, Relaxed, Relaxed));
    }

    fn for_each_checked(&self, mut visit: impl FnMut(*const u8, usize, &AtomicU8)) {
        self.for_each(|cache| cache.for_each_checked(self, |slot, state| visit(slot.object(), slot.size(), state)));
    }
}

/// The objects that have been reached are [`AUDITED`] meanwhile.
struct Search<'a, P> {
    caches: &'a Caches<P>,
    /// And their bytes.
    waiting: [(*const u8, usize); WAITING],
    length: usize,
    /// Some object was, since this was last unset, that may not have been searched.
    reached: bool,
}

impl<P: Platform> Search<'_, P> {
    /// Marks what the words of `bytes` bytes at `start` point into, and what is reached from there as far as there is room.
    ///
    /// # Safety
    ///
    /// They may be read, and all of them are initialised.
    unsafe fn scan(&mut self, start: *const u8, bytes: usize) {
        // SAFETY: passed on to the caller.
        unsafe { self.scan_one(start, bytes) };
        while let Some(length) = self.length.checked_sub(1) {
            self.length = length;
            let (object, size) = self.waiting[length];
            // SAFETY: an object with checks, which are initialised.
            unsafe { self.scan_one(object, size) };
        }
    }

    /// # Safety
    ///
    /// As [`scan`](Self::scan).
    unsafe fn scan_one(&mut self, start: *const u8, bytes: usize) {
        let skipped = start.addr().next_multiple_of(align_of::<usize>()) - start.addr();
        for offset in (skipped..bytes).step_by(size_of::<usize>()).filter(|offset| offset + size_of::<usize>() <= bytes)
        {
            // SAFETY: within the bytes, and aligned.
            let word = unsafe { start.wrapping_add(offset).cast::<usize>().read_volatile() };
            self.reach(word);
        }
    }

    fn reach(&mut self, address: usize) {
        self.caches.visit_checked(address, |object, size, state| {
            if state.compare_exchange(USED, AUDITED, Relaxed, Relaxed).is_err() {
                return;
            }
            match self.waiting.get_mut(self.length) {
                Some(place) => {
                    *place = (object, size);
                    self.length += 1;
                }
                None => self.reached = true,
            }
        });
    }
}
