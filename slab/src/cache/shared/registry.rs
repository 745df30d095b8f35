//! The registry: the caches that an embedder has made, and the twins of those with checks.
//!
//! Lock: the registry's, the first in the order. A cache that is looked at without it has a visitor meanwhile, and stays.

use core::ptr::NonNull;

use super::{Caches, FIRST_REGISTERED};
use crate::cache::AllocError;
use crate::cache::core::Core;
use crate::check::Rules;
use crate::lock::{IrqGuard, IrqLock};
use crate::platform::Platform;
use crate::sync::AtomicPtr;
use crate::sync::Ordering::{Acquire, Relaxed, Release};

/// The largest number that a cache can have.
const LAST: u32 = (1 << 24) - 1;

/// The caches that an embedder has made, in the order of their making.
pub(super) struct Registry<P> {
    first: AtomicPtr<Core<P>>,
    last: AtomicPtr<Core<P>>,
    next_id: u32,
    /// What is checked in which cache.
    pub(super) rules: Rules<'static>,
}

type RegistryGuard<'a, P> = IrqGuard<'a, P, Registry<P>>;

impl<P> Registry<P> {
    pub(super) const fn new() -> Self {
        let null = core::ptr::null_mut();
        Self { first: AtomicPtr::new(null), last: AtomicPtr::new(null), next_id: FIRST_REGISTERED, rules: Rules::NONE }
    }

    /// A number that no cache of this name has, larger than those of all that there are.
    fn count_namesakes(&self, name: &str) -> u32 {
        let mut number = 0;
        let mut position = self.first.load(Relaxed);
        // SAFETY: what is in the registry is there, and the caller holds its lock.
        while let Some(cache) = unsafe { position.as_ref() } {
            if cache.name.get() == name && cache.room.is_none() {
                number = cache.namesake + 1;
            }
            position = cache.next.load(Relaxed);
        }
        number
    }
}

impl<P: Platform> Caches<P> {
    /// Runs `work` with the registry's lock held.
    #[cfg(test)]
    pub(crate) fn with_registry_locked<T>(&self, work: impl FnOnce() -> T) -> T {
        let _registry = self.registry.lock();
        work()
    }

    /// Writes a new cache to `memory`, registers it, and shows it in `place`, unless another CPU has shown one there: then the
    /// memory goes back, as it does with an error.
    ///
    /// # Safety
    ///
    /// `memory` is metadata of a cache's size, and the caller's. The cache stays there until
    /// [`uninstall`](Self::uninstall).
    pub(in crate::cache) unsafe fn install(
        &self,
        memory: NonNull<Core<P>>,
        cache: Core<P>,
        place: &AtomicPtr<Core<P>>,
    ) -> Result<(), AllocError> {
        // SAFETY: the memory is ours, large enough, and aligned as metadata is.
        unsafe { memory.write(cache) };
        // SAFETY: just written; passed on to the caller.
        let registered = unsafe { self.register(memory, place) };
        if registered != Ok(true) {
            // SAFETY: metadata of this size, and never shown to anybody.
            unsafe { self.free_metadata(memory.as_ptr().cast(), size_of::<Core<P>>()) };
        }
        registered.map(|_| ())
    }

    /// Ends the cache in `place`, all of whose objects are free.
    ///
    /// # Safety
    ///
    /// Nobody else uses it, or will; [`install`](Self::install) has put it there.
    pub(in crate::cache) unsafe fn uninstall(&self, place: &AtomicPtr<Core<P>>) {
        let cache = place.load(Relaxed);
        // SAFETY: null, or installed.
        let Some(core) = (unsafe { cache.as_ref() }) else { return };
        self.unregister(core);
        // SAFETY: nobody uses it, says the caller, nor finds it in the registry any more.
        unsafe { core.tear_down(self) };
        // SAFETY: metadata of this size, and now known to nobody.
        unsafe { self.free_metadata(cache.cast(), size_of::<Core<P>>()) };
    }

    /// Puts a new cache last in the registry, gives it its numbers, and shows it in `place`. Whether it has done so:
    /// another CPU may have put a cache there already.
    ///
    /// # Safety
    ///
    /// `cache` is written, nobody else knows it, and it stays there until [`unregister`](Self::unregister).
    unsafe fn register(&self, cache: NonNull<Core<P>>, place: &AtomicPtr<Core<P>>) -> Result<bool, AllocError> {
        let mut registry = self.registry.lock();
        if !place.load(Relaxed).is_null() {
            return Ok(false);
        }
        if registry.next_id > LAST {
            return Err(AllocError::TooManyCaches);
        }
        let last = registry.last.load(Relaxed);
        // SAFETY: nobody else knows it yet, says the caller.
        let new = unsafe { &mut *cache.as_ptr() };
        new.slabs.set_id(registry.next_id);
        if new.room.is_none() {
            new.namesake = registry.count_namesakes(new.name.get());
            if let Some(checks) = registry.rules.checks_of(new.name.get()) {
                new.set_checks(checks);
            }
        }
        *new.previous.get_mut() = last;
        registry.next_id += 1;
        // SAFETY: what is in the registry is there.
        match unsafe { last.as_ref() } {
            Some(last) => last.next.store(cache.as_ptr(), Relaxed),
            None => registry.first.store(cache.as_ptr(), Relaxed),
        }
        registry.last.store(cache.as_ptr(), Relaxed);
        place.store(cache.as_ptr(), Release);
        Ok(true)
    }

    /// Takes a cache out of the registry. It waits until nobody looks at it there, which is short: but whoever is
    /// called back while it is looked at, a destructor of its objects above all, must not come here.
    fn unregister(&self, cache: &Core<P>) {
        let registry = loop {
            let registry = self.registry.lock();
            if cache.visitors.load(Acquire) == 0 {
                break registry;
            }
            drop(registry);
            crate::sync::spin_loop();
        };
        let (next, previous) = (cache.next.load(Relaxed), cache.previous.load(Relaxed));
        // SAFETY: what is in the registry is there.
        match unsafe { previous.as_ref() } {
            Some(previous) => previous.next.store(next, Relaxed),
            None => registry.first.store(next, Relaxed),
        }
        // SAFETY: as above.
        match unsafe { next.as_ref() } {
            Some(next) => next.previous.store(previous, Relaxed),
            None => registry.last.store(previous, Relaxed),
        }
    }

    /// Calls `visit` with each cache of the size classes and of the registry, with no lock held.
    pub(crate) fn for_each(&self, visit: impl FnMut(&Core<P>)) {
        self.walk(|registry| Some(registry.lock()), visit);
    }

    /// The same for reports. Where the registry cannot be looked at (see [`IrqLock::lock_to_report`]), the rest of it is
    /// left out.
    pub(crate) fn for_each_to_report(&self, visit: impl FnMut(&Core<P>)) {
        self.walk(IrqLock::lock_to_report, visit);
    }

    fn walk(
        &self,
        lock: impl Fn(&IrqLock<P, Registry<P>>) -> Option<RegistryGuard<'_, P>>,
        mut visit: impl FnMut(&Core<P>),
    ) {
        self.classes().for_each(&mut visit);
        let mut next = lock(&self.registry).and_then(|registry| Self::visit_after(&registry, None));
        while let Some(here) = next {
            visit(here.cache);
            next = lock(&self.registry).and_then(|registry| Self::visit_after(&registry, Some(&here)));
        }
    }

    fn visit_after<'a>(registry: &Registry<P>, place: Option<&Visit<'_, P>>) -> Option<Visit<'a, P>> {
        let next = place.map_or(&registry.first, |place| &place.cache.next).load(Relaxed);
        // SAFETY: what is in the registry is there, and as long as it has a visitor it stays.
        let cache = unsafe { next.as_ref() }?;
        cache.begin_visit();
        Some(Visit { cache })
    }
}

/// A look at a cache of the registry, which stays there until this is dropped.
struct Visit<'a, P> {
    cache: &'a Core<P>,
}

impl<P> Drop for Visit<'_, P> {
    fn drop(&mut self) {
        self.cache.end_visit();
    }
}
