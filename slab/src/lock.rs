//! A spin lock that keeps interrupts off while it is held.
//!
//! An interrupt handler that allocates can then never find a lock held by the code it interrupted.

use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use spin::mutex::{SpinMutex, SpinMutexGuard};

use crate::platform::Platform;

/// A value behind a spin lock; holding it disables interrupts on the CPU that holds it.
pub struct IrqLock<P, T> {
    value: SpinMutex<T>,
    platform: PhantomData<fn() -> P>,
}

impl<P, T> IrqLock<P, T> {
    /// A lock that nobody holds.
    pub const fn new(value: T) -> Self {
        Self { value: SpinMutex::new(value), platform: PhantomData }
    }
}

impl<P: Platform, T> IrqLock<P, T> {
    /// Disables interrupts on this CPU, then spins until the lock is free.
    ///
    /// Taking a lock that this CPU holds already never returns.
    #[inline]
    pub fn lock(&self) -> IrqGuard<'_, P, T> {
        let interrupts = Interrupts::disable();
        IrqGuard { value: self.value.lock(), _interrupts: interrupts }
    }

    /// The lock if nobody holds it; never spins.
    #[inline]
    pub fn try_lock(&self) -> Option<IrqGuard<'_, P, T>> {
        let interrupts = Interrupts::disable();
        let value = self.value.try_lock()?;
        Some(IrqGuard { value, _interrupts: interrupts })
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
mod tests {
    use std::cell::Cell;

    use super::*;

    std::thread_local! {
        static ENABLED: Cell<bool> = const { Cell::new(true) };
    }

    struct Flag;

    // SAFETY: there are no interrupts; the flag only records what was asked for.
    unsafe impl Platform for Flag {
        fn disable_interrupts() -> bool {
            ENABLED.replace(false)
        }

        fn restore_interrupts(were_enabled: bool) {
            if were_enabled {
                ENABLED.set(true);
            }
        }
    }

    #[test]
    fn interrupts_are_off_while_held_and_as_before_afterwards() {
        let (outer, inner) = (IrqLock::<Flag, _>::new(1), IrqLock::<Flag, _>::new(2));
        let first = outer.lock();
        assert!(!ENABLED.get());
        drop(inner.lock());
        assert!(!ENABLED.get(), "the inner guard must not enable what the outer one disabled");
        drop(first);
        assert!(ENABLED.get());
    }

    #[test]
    fn a_lock_that_is_held_is_refused_and_leaves_interrupts_alone() {
        let lock = IrqLock::<Flag, _>::new(());
        let guard = lock.lock();
        ENABLED.set(true);
        assert!(lock.try_lock().is_none());
        assert!(ENABLED.get());
        drop(guard);
        assert!(lock.try_lock().is_some());
    }

    #[test]
    fn threads_exclude_each_other() {
        let lock = IrqLock::<Flag, _>::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..1000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), 2000);
    }
}
