//! Atomics, a spin lock and a `Once` that take part in what the [explorer](super::explorer) does.
//!
//! They are laid out as the real ones, since page frames full of zeros are used as such, and made by `const fn`. Where
//! nothing is explored they do as the real ones do.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::MaybeUninit;
use core::ops::{Deref, DerefMut};
use core::sync::atomic as real;
use core::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release};

use super::explorer::{self, Bug};

/// A value that is also a word of 64 bits.
trait Word: Copy {
    fn to_word(self) -> u64;
    fn from_word(word: u64) -> Self;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Word for $type {
            fn to_word(self) -> u64 {
                self as u64
            }
            fn from_word(word: u64) -> Self {
                word as $type
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, usize);

impl Word for bool {
    fn to_word(self) -> u64 {
        self.into()
    }
    fn from_word(word: u64) -> Self {
        word != 0
    }
}

impl<T> Word for *mut T {
    fn to_word(self) -> u64 {
        self.expose_provenance() as u64
    }
    fn from_word(word: u64) -> Self {
        core::ptr::with_exposed_provenance_mut(word as usize)
    }
}

macro_rules! atomic {
    ($name:ident $(<$t:ident>)?, $value:ty) => {
        #[repr(transparent)]
        pub(crate) struct $name $(<$t>)? (real::$name $(<$t>)?);

        impl $(<$t>)? $name $(<$t>)? {
            pub(crate) const fn new(value: $value) -> Self {
                Self(real::$name::new(value))
            }

            #[track_caller]
            pub(crate) fn load(&self, order: Ordering) -> $value {
                if !explorer::step() {
                    return self.0.load(order);
                }
                <$value>::from_word(explorer::load(self.place(), || self.word(), explorer::atomic_order(order)))
            }

            #[track_caller]
            pub(crate) fn store(&self, value: $value, order: Ordering) {
                if !explorer::step() {
                    return self.0.store(value, order);
                }
                explorer::store(self.place(), || self.word(), value.to_word(), explorer::atomic_order(order));
                self.0.store(value, Relaxed);
            }

            #[track_caller]
            #[allow(dead_code, reason = "not used with each type")]
            pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                if !explorer::step() {
                    return self.0.swap(value, order);
                }
                let before = explorer::swap(self.place(), || self.word(), value.to_word(), explorer::atomic_order(order));
                self.0.store(value, Relaxed);
                <$value>::from_word(before)
            }

            #[track_caller]
            #[allow(dead_code, reason = "not used with each type")]
            pub(crate) fn compare_exchange(
                &self,
                expected: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                if explorer::has(Bug::TornExchange) {
                    let now = self.load(failure);
                    return if now == expected { self.store(new, success); Ok(now) } else { Err(now) };
                }
                if !explorer::step() {
                    return self.0.compare_exchange(expected, new, success, failure);
                }
                let words = (expected.to_word(), new.to_word());
                let orders = (explorer::atomic_order(success), explorer::atomic_order(failure));
                let result = explorer::compare_exchange(self.place(), || self.word(), words, orders);
                if result.is_ok() {
                    self.0.store(new, Relaxed);
                }
                result.map(<$value>::from_word).map_err(<$value>::from_word)
            }

            #[track_caller]
            #[allow(dead_code, reason = "not used with each type")]
            pub(crate) fn compare_exchange_weak(
                &self,
                expected: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(expected, new, success, failure)
            }

            #[track_caller]
            #[allow(dead_code, reason = "not used with each type")]
            pub(crate) fn fetch_update(
                &self,
                success: Ordering,
                failure: Ordering,
                mut change: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                let mut now = self.load(failure);
                while let Some(new) = change(now) {
                    match self.compare_exchange(now, new, success, failure) {
                        Ok(before) => return Ok(before),
                        Err(other) => now = other,
                    }
                }
                Err(now)
            }

            #[allow(dead_code, reason = "not used with each type")]
            pub(crate) fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            fn place(&self) -> usize {
                (&raw const *self).addr()
            }

            /// What is in memory: the latest store, by whatever means.
            fn word(&self) -> u64 {
                self.0.load(Relaxed).to_word()
            }
        }

        impl $(<$t>)? Default for $name $(<$t>)? {
            fn default() -> Self {
                Self(real::$name::default())
            }
        }

        impl $(<$t>)? fmt::Debug for $name $(<$t>)? {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! arithmetic {
    ($($name:ident, $value:ty;)*) => {$(
        #[allow(dead_code, reason = "not used with each type")]
        impl $name {
            #[track_caller]
            pub(crate) fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                self.change(order, |now| now.wrapping_add(value))
            }

            #[track_caller]
            pub(crate) fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                self.change(order, |now| now.wrapping_sub(value))
            }

            #[track_caller]
            pub(crate) fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                self.change(order, |now| now | value)
            }

            #[track_caller]
            pub(crate) fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                self.change(order, |now| now & value)
            }

            #[track_caller]
            pub(crate) fn fetch_max(&self, value: $value, order: Ordering) -> $value {
                self.change(order, |now| now.max(value))
            }

            fn change(&self, order: Ordering, change: impl Fn($value) -> $value) -> $value {
                if !explorer::step() {
                    return self.0.fetch_update(order, Relaxed, |now| Some(change(now))).unwrap_or_else(|now| now);
                }
                let word = |word| change(<$value>::from_word(word)).to_word();
                let before = <$value>::from_word(explorer::change(self.place(), || self.word(), word, explorer::atomic_order(order)));
                self.0.store(change(before), Relaxed);
                before
            }
        }
    )*};
}

atomic!(AtomicBool, bool);
atomic!(AtomicU8, u8);
atomic!(AtomicU16, u16);
atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);
atomic!(AtomicUsize, usize);
atomic!(AtomicPtr<T>, *mut T);
arithmetic!(AtomicU8, u8; AtomicU16, u16; AtomicU32, u32; AtomicU64, u64; AtomicUsize, usize;);

/// A number for tables. An interrupt may come before it is changed, but which CPU changes it first is not explored:
/// nothing depends on that.
#[derive(Debug)]
pub(crate) struct Counter(real::AtomicU64);

impl Counter {
    pub(crate) const fn new(value: u64) -> Self {
        Self(real::AtomicU64::new(value))
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        explorer::step_alone();
        self.0.load(order)
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        explorer::step_alone();
        self.0.store(value, order);
    }

    pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        explorer::step_alone();
        self.0.fetch_add(value, order)
    }
}

/// Tells that this waits for another CPU.
pub(crate) fn spin_loop() {
    explorer::wait();
}

/// Whether a lock is held.
struct LockWord(real::AtomicBool);

impl LockWord {
    fn take(&self, wait: bool) -> bool {
        if explorer::has_own_locks() {
            let taken = explorer::take_own_lock(self.place(), wait);
            self.0.fetch_or(taken, Relaxed);
            return taken;
        }
        if !explorer::step() {
            return self.0.compare_exchange(false, true, Acquire, Relaxed).is_ok();
        }
        let words = (false.to_word(), true.to_word());
        let orders = (explorer::lock_order(Acquire), Relaxed);
        let taken = explorer::compare_exchange(self.place(), || self.word(), words, orders).is_ok();
        if taken {
            self.0.store(true, Relaxed);
        }
        taken
    }

    fn give_up(&self) {
        if explorer::has_own_locks() {
            self.0.store(false, Relaxed);
            return explorer::give_up_own_lock(self.place());
        }
        if !explorer::step() {
            return self.0.store(false, Release);
        }
        explorer::store(self.place(), || self.word(), false.to_word(), explorer::lock_order(Release));
        self.0.store(false, Relaxed);
    }

    fn place(&self) -> usize {
        (&raw const *self).addr()
    }

    fn word(&self) -> u64 {
        self.0.load(Relaxed).to_word()
    }
}

/// A spin lock with the interface of `spin`'s.
pub(crate) struct SpinMutex<T> {
    locked: LockWord,
    value: UnsafeCell<T>,
}

// SAFETY: it gives access to the value to one holder at a time (planted bugs apart), who may be any thread.
unsafe impl<T: Send> Sync for SpinMutex<T> {}

pub(crate) struct SpinMutexGuard<'a, T> {
    lock: &'a SpinMutex<T>,
}

impl<T> SpinMutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self { locked: LockWord(real::AtomicBool::new(false)), value: UnsafeCell::new(value) }
    }

    #[track_caller]
    #[cfg_attr(debug_assertions, allow(dead_code, reason = "debug builds try again and again"))]
    pub(crate) fn lock(&self) -> SpinMutexGuard<'_, T> {
        loop {
            if let Some(guard) = self.guard_if(self.locked.take(true)) {
                return guard;
            }
            explorer::wait();
        }
    }

    #[track_caller]
    pub(crate) fn try_lock(&self) -> Option<SpinMutexGuard<'_, T>> {
        self.guard_if(self.locked.take(false))
    }

    fn guard_if(&self, taken: bool) -> Option<SpinMutexGuard<'_, T>> {
        (taken || explorer::has(Bug::NoExclusion)).then(|| SpinMutexGuard { lock: self })
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.locked.0.load(Relaxed)
    }
}

impl<T> Drop for SpinMutexGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.locked.give_up();
    }
}

impl<T> Deref for SpinMutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinMutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held, by the owner of this alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> fmt::Debug for SpinMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpinMutex").finish_non_exhaustive()
    }
}

impl<T: fmt::Debug> fmt::Debug for SpinMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

const EMPTY: u8 = 0;
const FILLING: u8 = 1;
const FULL: u8 = 2;

/// A value that is set once.
pub(crate) struct Once<T> {
    state: AtomicU8,
    value: UnsafeCell<MaybeUninit<T>>,
}

// SAFETY: whoever wins the change to `FILLING` writes the value; it is read after `FULL` was seen, and shared then.
unsafe impl<T: Send + Sync> Sync for Once<T> {}

impl<T> Once<T> {
    pub(crate) const fn new() -> Self {
        Self { state: AtomicU8::new(EMPTY), value: UnsafeCell::new(MaybeUninit::uninit()) }
    }

    pub(crate) fn call_once(&self, make: impl FnOnce() -> T) -> &T {
        if self.state.compare_exchange(EMPTY, FILLING, AcqRel, Acquire).is_ok() {
            let value = make();
            // SAFETY: only who has changed the state to `FILLING` comes here.
            unsafe { (*self.value.get()).write(value) };
            self.state.store(FULL, Release);
        }
        loop {
            match self.get() {
                Some(value) => return value,
                None => explorer::wait(),
            }
        }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        // SAFETY: it is written, and stays.
        (self.state.load(Acquire) == FULL).then(|| unsafe { (*self.value.get()).assume_init_ref() })
    }
}
