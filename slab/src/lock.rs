//! A spin lock that keeps interrupts off while it is held.
//!
//! An interrupt handler that allocates can then never find a lock held by the code it interrupted. An NMI handler can:
//! it only ever tries.
//!
//! The allocator's locks have an order ([`Level`]). Debug builds check it, and more: see `watch`.

#[cfg(debug_assertions)]
mod held;
mod watch;

use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use crate::platform::{Platform, in_nmi};
use crate::sync::{SpinMutex, SpinMutexGuard, spin_loop};

pub(crate) use watch::Level;
use watch::{Holding, Watch};

/// How often a reader of counts tries before it takes a lock as lost: its holder may have stopped for good.
const PATIENCE: u32 = if cfg!(miri) { 1 << 12 } else { 1 << 24 };

/// A value behind a spin lock; holding it disables interrupts on the CPU that holds it.
///
/// In debug builds it is reported, by a panic that names the lock, when a CPU takes a lock that it holds already, waits for
/// one in an NMI handler, or waits for one that is not released.
pub struct IrqLock<P, T> {
    value: SpinMutex<T>,
    watch: Watch,
    platform: PhantomData<fn() -> P>,
}

impl<P, T> IrqLock<P, T> {
    /// A lock that nobody holds.
    pub const fn new(value: T) -> Self {
        Self::named("without a name", value)
    }

    /// The same, with a name for reports.
    pub const fn named(name: &'static str, value: T) -> Self {
        Self { value: SpinMutex::new(value), watch: Watch::named(name), platform: PhantomData }
    }

    /// One of the allocator's own.
    pub(crate) const fn ordered(level: Level, value: T) -> Self {
        Self { value: SpinMutex::new(value), watch: Watch::ordered(level), platform: PhantomData }
    }
}

impl<P: Platform, T> IrqLock<P, T> {
    /// Disables interrupts on this CPU, then spins until the lock is free.
    ///
    /// Taking a lock that this CPU holds already never returns; in debug builds it is reported.
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn lock(&self) -> IrqGuard<'_, P, T> {
        let interrupts = Interrupts::disable();
        let value = self.watch.lock::<P, T>(&self.value);
        IrqGuard { _holding: self.watch.hold::<P>(), value, _interrupts: interrupts }
    }

    /// The lock if nobody holds it; never spins.
    #[inline]
    pub fn try_lock(&self) -> Option<IrqGuard<'_, P, T>> {
        let interrupts = Interrupts::disable();
        let value = self.value.try_lock()?;
        Some(IrqGuard { _holding: self.watch.hold::<P>(), value, _interrupts: interrupts })
    }

    /// As [`lock`](Self::lock), but in an NMI handler as [`try_lock`](Self::try_lock).
    #[inline]
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn lock_unless_nmi(&self) -> Option<IrqGuard<'_, P, T>> {
        if in_nmi::<P>() { self.try_lock() } else { Some(self.lock()) }
    }

    /// For reports, which may be made when the kernel stops, or in an NMI handler: the lock if it can be had. Its holder
    /// may be what is interrupted, or a CPU that was stopped.
    pub(crate) fn lock_to_report(&self) -> Option<IrqGuard<'_, P, T>> {
        if in_nmi::<P>() {
            return self.try_lock();
        }
        (0..PATIENCE).find_map(|_| {
            let lock = self.try_lock();
            if lock.is_none() {
                spin_loop();
            }
            lock
        })
    }
}

impl<P, T> fmt::Debug for IrqLock<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLock").field("locked", &self.value.is_locked()).finish_non_exhaustive()
    }
}

/// Holds an [`IrqLock`]. Dropping it releases the lock, then restores interrupts.
#[derive(Debug)]
pub struct IrqGuard<'a, P: Platform, T> {
    // Fields drop in this order: the lock must be free before a handler can run.
    _holding: Holding<'a>,
    value: SpinMutexGuard<'a, T>,
    _interrupts: Interrupts<P>,
}

impl<P: Platform, T> Deref for IrqGuard<'_, P, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<P: Platform, T> DerefMut for IrqGuard<'_, P, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// What CPUs write in turn, on cache lines of its own: a CPU that only reads what lies beside it waits for none.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct OwnLines<T>(pub(crate) T);

impl<T> Deref for OwnLines<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Interrupts are off on this CPU until this is dropped. The raw pointer keeps it there: it is not `Send`.
#[derive(Debug)]
pub(crate) struct Interrupts<P: Platform> {
    were_enabled: bool,
    platform: PhantomData<*const P>,
}

impl<P: Platform> Interrupts<P> {
    #[inline]
    pub(crate) fn disable() -> Self {
        Self { were_enabled: P::disable_interrupts(), platform: PhantomData }
    }
}

impl<P: Platform> Drop for Interrupts<P> {
    #[inline]
    fn drop(&mut self) {
        P::restore_interrupts(self.were_enabled);
    }
}

#[cfg(test)]
mod tests;
