//! Objects kept back for those who cannot do without: a memory pool in front of a cache.

use crate::sync::{AtomicPtr, Ordering::Relaxed};
use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use super::AllocError;
use super::public::Cache;
use crate::lock::{IrqLock, Level};
use crate::platform::Platform;

/// A minimum of objects of a cache that only the holder of this can have.
///
/// [`allocate`](Self::allocate) asks the cache first, and takes from the reserve what the cache cannot give;
/// [`free`](Self::free) fills the reserve up before it frees to the cache. So whoever has a reserve of n objects, and
/// frees what it has, is served n objects deep however little memory there is. Until it is dropped, the cache counts
/// them as allocated.
pub struct Reserve<'c, P: Platform> {
    cache: &'c Cache<'c, P>,
    /// The free objects are the first of these.
    places: &'c [AtomicPtr<u8>],
    free: IrqLock<P, usize>,
}

impl<'c, P: Platform> Reserve<'c, P> {
    pub(super) fn new(cache: &'c Cache<'c, P>, objects: usize) -> Result<Self, AllocError> {
        let bytes = size_of::<AtomicPtr<u8>>().checked_mul(objects).ok_or(AllocError::NoMemory)?;
        let places = cache.caches().allocate_metadata(bytes).ok_or(AllocError::NoMemory)?.cast::<AtomicPtr<u8>>();
        for index in 0..objects {
            // SAFETY: the block has room for so many, and is aligned as metadata is.
            unsafe { places.add(index).write(AtomicPtr::new(core::ptr::null_mut())) };
        }
        // SAFETY: written above; ours until `drop`.
        let places = unsafe { core::slice::from_raw_parts(places.as_ptr(), objects) };
        let reserve = Self { cache, places, free: IrqLock::ordered(Level::Reserve, 0) };
        for _ in 0..objects {
            let object = cache.allocate_unchecked()?;
            if let Err(fault) = reserve.refill(object) {
                cache.report(fault, object, None);
            }
        }
        Ok(reserve)
    }

    /// An object of the cache, or of the reserve where the cache has none. `None` where both are empty; see
    /// [`Cache::allocate`].
    ///
    /// # Errors
    ///
    /// The cache's, when the reserve is used up too.
    pub fn allocate(&self) -> Result<NonNull<u8>, AllocError> {
        let error = match self.cache.allocate() {
            Ok(object) => return Ok(object),
            Err(error) => error,
        };
        let object = {
            let mut free = self.free.lock_unless_nmi().ok_or(error)?;
            *free = free.checked_sub(1).ok_or(error)?;
            self.places[*free].load(Relaxed)
        };
        let object = NonNull::new(object).ok_or(error)?;
        self.cache.hand_out(object).ok_or(error)
    }

    /// Frees an object of the cache: into the reserve if it is not full.
    ///
    /// # Safety
    ///
    /// As [`Cache::free`].
    #[track_caller]
    pub unsafe fn free(&self, object: NonNull<u8>) {
        let caller = Some(Location::caller());
        if self.is_full() {
            // SAFETY: passed on to the caller.
            return unsafe { self.cache.free_for(object, caller) };
        }
        if self.cache.twin_of(object).is_some() {
            // SAFETY: passed on to the caller.
            unsafe { self.cache.free_for(object, caller) };
            return self.refill_from_cache();
        }
        if let Err(fault) = self.refill(object) {
            self.cache.report(fault, object, caller);
        }
    }

    /// What has checks is for the cache; the reserve gets another one for it, without.
    fn refill_from_cache(&self) {
        if let Ok(other) = self.cache.allocate_unchecked()
            && let Err(fault) = self.refill(other)
        {
            self.cache.report(fault, other, None);
        }
    }

    /// Objects in the reserve now; 0 where that cannot be looked at, in an NMI.
    pub fn available(&self) -> usize {
        self.free.lock_unless_nmi().map_or(0, |free| *free)
    }

    fn is_full(&self) -> bool {
        self.available() == self.places.len()
    }

    /// Takes an object in, or gives it to the cache where there is no more room.
    fn refill(&self, object: NonNull<u8>) -> Result<(), crate::fault::Fault> {
        self.cache.take_back(object)?;
        if let Some(mut free) = self.free.lock_unless_nmi()
            && let Some(place) = self.places.get(*free)
        {
            place.store(object.as_ptr(), Relaxed);
            *free += 1;
            return Ok(());
        }
        self.cache.keep(object);
        Ok(())
    }
}

impl<P: Platform> Drop for Reserve<'_, P> {
    fn drop(&mut self) {
        for place in &self.places[..*self.free.lock()] {
            if let Some(object) = NonNull::new(place.load(Relaxed)) {
                self.cache.keep(object);
            }
        }
        let block = self.places.as_ptr().cast_mut().cast();
        // SAFETY: allocated in `new` with this size; nobody has it after this.
        unsafe { self.cache.caches().free_metadata(block, size_of_val(self.places)) };
    }
}

impl<P: Platform> fmt::Debug for Reserve<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reserve")
            .field("cache", self.cache)
            .field("objects", &self.places.len())
            .finish_non_exhaustive()
    }
}
