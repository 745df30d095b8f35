//! The cache that an embedder makes: by layout, without a type.

use crate::sync::{AtomicPtr, Ordering};
use core::alloc::Layout;
use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use super::core::{Core, Request};
use super::geometry::Geometry;
use super::magazine::Round;
use super::shared::Caches;
use super::slab::USED;
use super::slabs::Lifecycle;
use super::{AllocError, InitFailed, layout};
use crate::check::{Allocation, Checks, group_by_site};
use crate::fault::{CacheName, Caller, Fault};
use crate::platform::{Platform, in_nmi};
use crate::stats::CacheStats;

/// So many objects go back to their slabs with one hold of the lock.
pub(super) const BATCH: usize = 32;

/// A cache of objects of one layout (Bonwick 1994, section 2).
///
/// It can be a `static`; it takes no memory, and is in no table, before its first allocation.
///
/// ```
/// # use kslab::platform::NoInterrupts;
/// use core::alloc::Layout;
/// use kslab::{Cache, Heap};
///
/// static HEAP: Heap<NoInterrupts> = Heap::new();
/// static INODES: Cache<NoInterrupts> = Cache::new(HEAP.caches(), "inode", Layout::new::<[u64; 75]>());
///
/// assert!(INODES.allocate().is_err(), "the heap has no memory yet");
/// ```
pub struct Cache<'a, P: Platform> {
    caches: &'a Caches<P>,
    name: &'static str,
    layout: Layout,
    lifecycle: Option<Lifecycle>,
    limit: usize,
    magazines: bool,
    checks: Checks,
    /// Null before the first use. A block of metadata.
    core: AtomicPtr<Core<P>>,
}

/// So many places that have allocated objects of a cache that is not destroyed are shown.
const SHOWN: usize = 8;

/// Bytes of a cache line.
const CACHE_LINE: usize = 64;

impl<'a, P: Platform> Cache<'a, P> {
    /// A cache of objects of `layout`, from the memory of `caches`. Tables call it `name`; several may have the same.
    ///
    /// An empty layout, one above 4 MiB or aligned to more than 2 MiB makes every allocation fail with
    /// [`AllocError::BadLayout`].
    pub const fn new(caches: &'a Caches<P>, name: &'static str, layout: Layout) -> Self {
        let core = AtomicPtr::new(core::ptr::null_mut());
        Self { caches, name, layout, lifecycle: None, limit: usize::MAX, magazines: true, checks: Checks::NONE, core }
    }

    /// Aligns objects to a cache line of the hardware, 64 bytes, so that no two share one.
    #[must_use]
    pub const fn cache_line_aligned(mut self) -> Self {
        self.align_to_cache_line();
        self
    }

    pub(super) const fn align_to_cache_line(&mut self) {
        if self.layout.align() < CACHE_LINE {
            self.layout = layout(self.layout.size(), CACHE_LINE);
        }
    }

    /// Never more than `objects` out of their slabs: allocated, or free in magazines or in quarantine. While the cache has
    /// checks, those with and those without count together.
    #[must_use]
    pub const fn with_limit(mut self, objects: usize) -> Self {
        self.limit(objects);
        self
    }

    pub(super) const fn limit(&mut self, objects: usize) {
        self.limit = objects;
    }

    /// Without magazines: every object goes to its slab at once, for caches of few or rarely used objects.
    #[must_use]
    pub const fn without_magazines(mut self) -> Self {
        self.magazines = false;
        self
    }

    /// With checks from its first use on, unless a rule of [`Heap::set_checks`](crate::Heap::set_checks) names the cache.
    #[must_use]
    pub const fn with_checks(mut self, checks: Checks) -> Self {
        self.check(checks);
        self
    }

    pub(super) const fn check(&mut self, checks: Checks) {
        self.checks = checks;
    }

    /// Constructs objects: `init` when their memory enters the cache, `fini` when it leaves it. In between an object is
    /// allocated and freed any number of times, and whoever frees it leaves it constructed.
    ///
    /// Neither is called with a lock held; both may allocate and free, from this cache too, but not end a cache. An
    /// `init` that fails or panics leaves its slot free; a `fini` that panics is not called again for its object.
    ///
    /// # Safety
    ///
    /// Both are called with a pointer to an object of the cache's layout that is nobody else's: `init` with memory that
    /// is not initialised, `fini` with what `init` made of it and users left of it.
    #[must_use]
    pub const unsafe fn with_constructor(
        mut self,
        init: unsafe fn(*mut u8) -> Result<(), InitFailed>,
        fini: unsafe fn(*mut u8),
    ) -> Self {
        self.lifecycle = Some(Lifecycle { init, fini });
        self
    }

    /// Its name in tables.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The layout of its objects.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// An object: constructed if the cache constructs, else not initialised.
    ///
    /// # Errors
    ///
    /// See [`AllocError`]; nothing has changed then. Before it fails for want of memory it has had memory given back
    /// and called the callbacks of [`reclaim`](crate::reclaim).
    #[inline]
    #[track_caller]
    pub fn allocate(&self) -> Result<NonNull<u8>, AllocError> {
        match self.existing().and_then(|core| core.allocate_at_hand(self.caches)) {
            Some(object) => Ok(object),
            None => self.allocate_slowly(self.request(Location::caller())),
        }
    }

    #[cold]
    fn allocate_slowly(&self, request: Request) -> Result<NonNull<u8>, AllocError> {
        let core = self.core()?;
        let refusals = core.refusals(self.caches);
        core.allocate_for(self.caches, true, request).or_else(|error| match core.refusals(self.caches) {
            now if now == refusals => core.allocate_again(self.caches, error, request),
            _ => Err(error),
        })
    }

    #[inline]
    fn request(&self, caller: &'static Location<'static>) -> Request {
        Request { layout: self.layout, caller: Some(caller) }
    }

    /// An object that is free already: takes no memory, and so never waits for any.
    ///
    /// # Errors
    ///
    /// [`AllocError::WouldGrow`] where there is none, or as [`allocate`](Self::allocate).
    #[track_caller]
    pub fn allocate_without_growing(&self) -> Result<NonNull<u8>, AllocError> {
        let core = self.core()?;
        let request = self.request(Location::caller());
        core.allocate_for(self.caches, false, request).inspect_err(|_| core.count_failure())
    }

    /// The same without checks: for a reserve.
    pub(super) fn allocate_unchecked(&self) -> Result<NonNull<u8>, AllocError> {
        self.core()?.allocate(self.caches, true, USED)
    }

    /// Fills the front of `objects` with objects, and says how many: fewer than asked for only where the next one failed.
    #[track_caller]
    pub fn allocate_bulk(&self, objects: &mut [*mut u8]) -> usize {
        let Ok(core) = self.core() else { return 0 };
        let mut filled = 0;
        while filled < objects.len() {
            let end = objects.len().min(filled + BATCH);
            filled += core.allocate_bulk(self.caches, &mut objects[filled..end]);
            if filled == end {
                continue;
            }
            let Ok(object) = self.allocate() else { break };
            objects[filled] = object.as_ptr();
            filled += 1;
        }
        filled
    }

    /// Frees an object. What is no allocated object of this cache is refused with a report: see *Bad frees* in the
    /// crate's documentation.
    ///
    /// # Safety
    ///
    /// It came from this cache, nobody uses it any more, and if the cache constructs, it is as its constructor left it.
    #[inline]
    #[track_caller]
    pub unsafe fn free(&self, object: NonNull<u8>) {
        // SAFETY: passed on to the caller.
        unsafe { self.free_for(object, Some(Location::caller())) };
    }

    /// # Safety
    ///
    /// As [`free`](Self::free).
    #[inline]
    pub(super) unsafe fn free_for(&self, object: NonNull<u8>, caller: Caller) {
        // SAFETY: passed on to the caller.
        unsafe { self.try_free(object, caller) }.unwrap_or_else(|fault| self.report(fault, object, caller));
    }

    /// It returns where the embedder wants to go on.
    #[cold]
    pub(super) fn report(&self, fault: Fault, object: NonNull<u8>, caller: Caller) {
        self.caches.report(fault, object.as_ptr(), caller);
    }

    #[inline]
    unsafe fn try_free(&self, object: NonNull<u8>, caller: Caller) -> Result<(), Fault> {
        // SAFETY: passed on to the caller.
        if self.existing().is_some_and(|core| unsafe { core.free_at_hand(self.caches, object.as_ptr()) }) {
            return Ok(());
        }
        let core = self.core_of(object)?;
        // SAFETY: as above.
        let freed = unsafe { core.free(self.caches, object.as_ptr(), USED) };
        // SAFETY: as above.
        freed.or_else(|fault| unsafe { self.free_other(object, fault, caller) })
    }

    /// Frees what is no object of the core: with checks, or else wrongly.
    ///
    /// # Safety
    ///
    /// As [`free`](Self::free).
    #[cold]
    unsafe fn free_other(&self, object: NonNull<u8>, fault: Fault, caller: Caller) -> Result<(), Fault> {
        match self.twin_of(object) {
            // SAFETY: passed on to the caller.
            Some(twin) => unsafe { twin.free_checked(self.caches, object.as_ptr(), None, caller) },
            None => Err(self.name_owner(object, fault)),
        }
    }

    /// Whether objects are asked if they are constructed.
    pub(super) fn asks_objects(&self) -> bool {
        cfg!(debug_assertions) || self.existing().is_some_and(|core| !core.checks().is_empty())
    }

    /// Takes an object from its user, but not back, and reports why.
    #[cold]
    pub(super) fn keep_out(&self, object: NonNull<u8>, fault: Fault) {
        let core = self.twin_of(object).or(self.existing());
        let fault = core.and_then(|core| core.withdraw(self.caches, object.as_ptr()).err()).unwrap_or(fault);
        self.report(fault, object, None);
    }

    /// The cache of the objects with checks, where this is in a slab of it.
    pub(super) fn twin_of(&self, object: NonNull<u8>) -> Option<&Core<P>> {
        let owner = self.caches.owner_of(object.as_ptr())?;
        self.existing()?.twin().filter(|twin| twin.slabs.id == owner)
    }

    /// The core, which an object to be freed came from.
    fn core_of(&self, object: NonNull<u8>) -> Result<&Core<P>, Fault> {
        self.existing().ok_or_else(|| self.name_owner(object, self.caches.frames().fault_of(object.as_ptr())))
    }

    /// A pointer of another cache is named as that.
    #[cold]
    fn name_owner(&self, object: NonNull<u8>, fault: Fault) -> Fault {
        let core = self.existing();
        match self.caches.owner_of(object.as_ptr()) {
            Some(owner) if core.is_none_or(|core| core.slabs.id != owner) => Fault::WrongCache {
                freed: core.map_or(CacheName::first(self.name), Core::full_name),
                owner: self.caches.name_of(owner),
            },
            _ => fault,
        }
    }

    /// Frees many objects with few holds of a lock, past the magazines. One that is refused is reported when those before it
    /// are freed; where the report does not stop the kernel, so are those behind it.
    ///
    /// # Safety
    ///
    /// As [`free`](Self::free), for each.
    #[track_caller]
    pub unsafe fn free_bulk(&self, mut objects: &[NonNull<u8>]) {
        let mut batch = [Round::NONE; BATCH];
        while !objects.is_empty() {
            let (mut taken, mut refused) = (0, None);
            for &object in &objects[..objects.len().min(BATCH)] {
                match self.take_back(object) {
                    Ok(round) => batch[taken] = round,
                    Err(fault) => {
                        refused = Some((object, fault));
                        break;
                    }
                }
                taken += 1;
            }
            if let Some(core) = self.existing() {
                core.put_batch(self.caches, &batch[..taken]);
            }
            if let Some((object, fault)) = refused {
                let caller = Some(Location::caller());
                // SAFETY: passed on to the caller.
                let freed = unsafe { self.free_other(object, fault, caller) };
                freed.unwrap_or_else(|fault| self.report(fault, object, caller));
                taken += 1;
            }
            objects = &objects[taken..];
        }
    }

    /// Gives back what the cache holds and does not use: what is in the magazines of this CPU and of the depot, and empty
    /// slabs. Returns the page frames that went back.
    pub fn shrink(&self) -> usize {
        self.existing().map_or(0, |core| core.reap(self.caches))
    }

    /// What makes allocations from this cache fail. Asking for it is a first use.
    ///
    /// # Errors
    ///
    /// As [`allocate`](Self::allocate), where the cache does not exist yet and cannot be made.
    #[cfg(feature = "fault-injection")]
    pub fn injector(&self) -> Result<&crate::Injector, AllocError> {
        self.core().map(Core::injector)
    }

    /// Counts; `None` before the first use. Objects with checks are counted as allocated and freed, too; the rest is of the
    /// slabs without.
    pub fn stats(&self) -> Option<CacheStats> {
        let core = self.existing()?;
        let mut stats = core.stats();
        if let Some(twin) = core.twin().map(Core::stats) {
            stats.in_use += twin.in_use;
            stats.allocations = stats.allocations.wrapping_add(twin.allocations);
            stats.frees = stats.frees.wrapping_add(twin.frees);
        }
        Some(stats)
    }

    /// Calls `visit` with each object that is allocated, in no order and with no lock held. What is allocated or freed
    /// meanwhile may be left out or visited.
    pub fn for_each_object(&self, mut visit: impl FnMut(NonNull<u8>)) {
        if let Some(core) = self.existing() {
            core.slabs.for_each_used(self.caches.frames(), |object| _ = NonNull::new(object).map(&mut visit));
            if let Some(twin) = core.twin() {
                twin.for_each_allocation(self.caches, |allocation| visit(allocation.object));
            }
        }
    }

    /// Ends the cache: the objects in all magazines go back, those that are constructed are destroyed, and the slabs go
    /// back to the page frames.
    ///
    /// # Errors
    ///
    /// With objects still allocated, and in an NMI, it refuses, and returns the cache with their number; nothing has
    /// changed.
    ///
    /// Whoever has ended a cache cannot use it again: that is no program (row_79).
    ///
    /// ```compile_fail,E0382
    /// # use kslab::{Cache, Heap, platform::NoInterrupts};
    /// # static HEAP: Heap<NoInterrupts> = Heap::new();
    /// let cache = Cache::new(HEAP.caches(), "inode", core::alloc::Layout::new::<u64>());
    /// cache.destroy().unwrap();
    /// cache.allocate();
    /// ```
    pub fn destroy(self) -> Result<(), InUse<'a, P>> {
        let objects = self.in_use();
        if objects > 0 || (in_nmi::<P>() && self.existing().is_some()) {
            return Err(InUse { cache: self, objects });
        }
        Ok(())
    }

    /// Objects that are allocated, with checks or without.
    fn in_use(&self) -> usize {
        self.existing().map_or(0, |core| core.in_use() + core.twin().map_or(0, Core::in_use))
    }

    /// Prepares a reserve of `objects` objects; see [`Reserve`](crate::Reserve).
    ///
    /// # Errors
    ///
    /// As [`allocate`](Self::allocate); nothing is kept then.
    pub fn reserve(&self, objects: usize) -> Result<super::Reserve<'_, P>, AllocError> {
        super::Reserve::new(self, objects)
    }

    pub(super) fn caches(&self) -> &'a Caches<P> {
        self.caches
    }

    /// Takes an object back from its user without giving it to anybody.
    pub(super) fn take_back(&self, object: NonNull<u8>) -> Result<Round, Fault> {
        let core = self.core_of(object)?;
        core.take_back(self.caches, object.as_ptr(), USED)
    }

    /// Hands out an object that was taken back.
    pub(super) fn hand_out(&self, object: NonNull<u8>) -> Option<NonNull<u8>> {
        let core = self.existing()?;
        core.hand_out(self.caches, core.round_of(self.caches, object.as_ptr())?, USED)
    }

    /// Keeps an object that was taken back.
    pub(super) fn keep(&self, object: NonNull<u8>) {
        if let Some(core) = self.existing()
            && let Some(round) = core.round_of(self.caches, object.as_ptr())
        {
            core.keep(self.caches, round);
        }
    }

    #[inline]
    pub(super) fn existing(&self) -> Option<&Core<P>> {
        // SAFETY: null, or what `create` has made, which stays until `self` is dropped.
        unsafe { self.core.load(Ordering::Acquire).as_ref() }
    }

    #[inline]
    fn core(&self) -> Result<&Core<P>, AllocError> {
        self.existing().map_or_else(|| self.create(), Ok)
    }

    #[cold]
    fn create(&self) -> Result<&Core<P>, AllocError> {
        let geometry = Geometry::new(self.layout).ok_or(AllocError::BadLayout)?;
        let allocate = || self.caches.allocate_metadata(size_of::<Core<P>>());
        let memory = allocate()
            .or_else(|| self.caches.with_relief(size_of::<Core<P>>(), allocate))
            .ok_or(AllocError::NoMemory)?;
        let memory = memory.cast::<Core<P>>();
        let mut core = Core::new(self.name, 0, geometry, self.lifecycle, self.magazines);
        core.slabs.limit = self.limit;
        core.set_checks(self.checks);
        // SAFETY: the memory is for this, and the core stays there until `drop`.
        unsafe { self.caches.install(memory, core, &self.core) }?;
        self.existing().ok_or(AllocError::TooManyCaches)
    }
}

/// Ends the cache as [`destroy`](Cache::destroy) does. With objects still allocated, or in an NMI, it and they stay as they
/// are for good: in tables, and usable by pointer.
impl<P: Platform> Drop for Cache<'_, P> {
    fn drop(&mut self) {
        let Some(core) = self.existing() else { return };
        if self.in_use() > 0 || in_nmi::<P>() {
            return;
        }
        // SAFETY: nobody has borrowed `self`, and its objects are all free.
        unsafe { core.end_twin(self.caches) };
        // SAFETY: nobody has borrowed `self`, so no CPU is in any of its methods.
        unsafe { self.caches.uninstall(&self.core) };
    }
}

/// A cache that was not destroyed, because objects of it are allocated.
pub struct InUse<'a, P: Platform> {
    /// The cache, as it was.
    pub cache: Cache<'a, P>,
    /// How many objects are allocated; [`Cache::for_each_object`] lists them.
    pub objects: usize,
}

impl<P: Platform> fmt::Display for InUse<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cache {} is not destroyed: {} of its objects are allocated", self.cache.name, self.objects)?;
        let (mut shown, mut result) = (0, Ok(()));
        if let Some(twin) = self.cache.existing().and_then(Core::twin) {
            let allocations = |visit: &mut dyn FnMut(&Allocation)| twin.for_each_allocation(self.cache.caches, visit);
            group_by_site(allocations, |site| {
                if site.example.allocated.is_some() && shown < SHOWN {
                    shown += 1;
                    result = result.and_then(|()| write!(f, "\n  {site}"));
                }
            });
        }
        result
    }
}

impl<P: Platform> fmt::Debug for InUse<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<P: Platform> core::error::Error for InUse<'_, P> {}

impl<P: Platform> fmt::Debug for Cache<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("name", &self.name).field("layout", &self.layout).finish_non_exhaustive()
    }
}
