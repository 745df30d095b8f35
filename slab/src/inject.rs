//! Fault injection: requests that fail on purpose (feature `fault-injection`).
//!
//! The page frames and each cache have an [`Injector`] of their own. It counts requests, and refuses those that its mode
//! says. A refused request fails at once, as if there were no memory; nothing is reclaimed and no hook is asked for its
//! sake. Without the feature none of this is compiled in: an [`Injection`] is empty then, and refuses nothing.
//!
//! Lock: none. All fields are atomic; a request that races with a change of the mode may follow the old one or the new
//! one.

#![forbid(unsafe_code)]

#[cfg(feature = "fault-injection")]
use crate::sync::Ordering::Relaxed;
#[cfg(feature = "fault-injection")]
use injector::NEVER;
#[cfg(feature = "fault-injection")]
pub use injector::{FaultMode, Injector};

/// What a layer holds whose requests may be refused.
#[derive(Debug)]
pub(crate) struct Injection {
    #[cfg(feature = "fault-injection")]
    injector: Injector,
}

#[cfg(feature = "fault-injection")]
impl Injection {
    pub(crate) const fn new() -> Self {
        Self { injector: Injector::new() }
    }

    pub(crate) const fn injector(&self) -> &Injector {
        &self.injector
    }

    /// Whether this request must fail.
    pub(crate) fn refuse(&self) -> bool {
        self.injector.refuse()
    }

    /// Whether a request may fail.
    pub(crate) fn is_armed(&self) -> bool {
        self.injector.kind.load(Relaxed) != NEVER
    }

    /// Counts a request that was served.
    pub(crate) fn count(&self) {
        self.injector.seen.fetch_add(1, Relaxed);
    }

    /// How many requests had to fail so far.
    pub(crate) fn refusals(&self) -> u64 {
        self.injector.refused()
    }
}

#[cfg(not(feature = "fault-injection"))]
impl Injection {
    pub(crate) const fn new() -> Self {
        Self {}
    }

    /// Whether this request must fail: never.
    #[inline(always)]
    pub(crate) fn refuse(&self) -> bool {
        false
    }

    /// Whether a request may fail: never.
    #[inline(always)]
    pub(crate) fn is_armed(&self) -> bool {
        false
    }

    /// Nothing is counted.
    #[inline(always)]
    pub(crate) fn count(&self) {}

    /// How many requests had to fail so far: none.
    #[inline(always)]
    pub(crate) fn refusals(&self) -> u64 {
        0
    }
}

#[cfg(feature = "fault-injection")]
mod injector {
    use crate::sync::{AtomicU8, AtomicU64, Counter, Ordering::Relaxed};

    /// Which requests fail, counted from the [`set`](Injector::set) that says so.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum FaultMode {
        /// None.
        Never,
        /// The one with this number, from 1 on, and no other.
        Nth(u64),
        /// Every one whose number is a multiple of this, which is not 0.
        EveryNth(u64),
        /// Each by chance, on average one in so many; a seed gives the same sequence each time.
        OneIn {
            /// 1 or more: 1 refuses every request.
            requests: u64,
            /// Where the sequence starts; any number.
            seed: u64,
        },
    }

    /// Refuses requests on purpose, as its [`FaultMode`] says; at first none.
    ///
    /// There is one for page frames ([`Frames::injector`](crate::Frames::injector)), one for each size class
    /// ([`Heap::class_injector`](crate::Heap::class_injector)) and one for each cache
    /// ([`Cache::injector`](crate::Cache::injector)).
    ///
    /// ```
    /// # use kslab::platform::NoInterrupts;
    /// # use core::alloc::Layout;
    /// use kslab::{FaultMode, Heap, memory::Region};
    ///
    /// # let mut memory = vec![0_u64; 64 * 512];
    /// # let start = memory.as_mut_ptr().cast::<u8>();
    /// # let start = start.wrapping_add(start.align_offset(4096));
    /// # let base = start.wrapping_sub(1 << 20);
    /// # let region = Region::usable(1 << 20, 60 * 4096);
    /// let heap: Heap<NoInterrupts> = Heap::new();
    /// # // SAFETY: the buffer is nobody else's, and outlives the heap.
    /// # unsafe { heap.init([region], base) }.unwrap();
    /// heap.frames().injector().set(FaultMode::Nth(2));
    /// let layout = Layout::new::<[u8; 3 * 4096]>();
    /// assert!(heap.allocate(layout).is_some());
    /// assert!(heap.allocate(layout).is_none(), "the second request for page frames");
    /// assert!(heap.allocate(layout).is_some());
    /// ```
    #[derive(Debug)]
    pub struct Injector {
        pub(super) kind: AtomicU8,
        /// Of the mode.
        number: AtomicU64,
        /// What `seen` was when the mode was set.
        since: AtomicU64,
        pub(super) seen: Counter,
        refused: Counter,
        /// Not 0: the state of a xorshift generator (Marsaglia 2003).
        random: AtomicU64,
    }

    pub(super) const NEVER: u8 = 0;
    const NTH: u8 = 1;
    const EVERY_NTH: u8 = 2;
    const ONE_IN: u8 = 3;

    /// Stands for a seed of 0, at which xorshift would stay.
    const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

    impl Injector {
        /// One that refuses nothing yet.
        #[allow(clippy::new_without_default, reason = "it is part of statics, and `Default` is not const")]
        pub const fn new() -> Self {
            Self {
                kind: AtomicU8::new(NEVER),
                number: AtomicU64::new(0),
                since: AtomicU64::new(0),
                seen: Counter::new(0),
                refused: Counter::new(0),
                random: AtomicU64::new(SEED),
            }
        }

        /// Refuses what `mode` says from now on.
        pub fn set(&self, mode: FaultMode) {
            let (kind, number) = match mode {
                FaultMode::Never => (NEVER, 0),
                FaultMode::Nth(number) => (NTH, number),
                FaultMode::EveryNth(number) => (EVERY_NTH, number),
                FaultMode::OneIn { requests, seed } => {
                    self.random.store(if seed == 0 { SEED } else { seed }, Relaxed);
                    (ONE_IN, requests)
                }
            };
            self.kind.store(NEVER, Relaxed);
            self.number.store(number, Relaxed);
            self.since.store(self.seen.load(Relaxed), Relaxed);
            self.kind.store(kind, Relaxed);
        }

        /// Requests so far, in any mode; wraps.
        pub fn seen(&self) -> u64 {
            self.seen.load(Relaxed)
        }

        /// Of them, those that it refused.
        pub fn refused(&self) -> u64 {
            self.refused.load(Relaxed)
        }

        /// Counts a request, and says whether it must fail.
        pub(crate) fn refuse(&self) -> bool {
            let seen = self.seen.fetch_add(1, Relaxed).wrapping_add(1);
            let (request, number) = (seen.wrapping_sub(self.since.load(Relaxed)), self.number.load(Relaxed));
            let refuse = match self.kind.load(Relaxed) {
                NTH => request == number,
                EVERY_NTH => number > 0 && request.is_multiple_of(number),
                ONE_IN => number > 0 && self.next_random().is_multiple_of(number),
                _ => false,
            };
            self.refused.fetch_add(refuse.into(), Relaxed);
            refuse
        }

        fn next_random(&self) -> u64 {
            let mut next = self.random.load(Relaxed);
            next ^= next << 13;
            next ^= next >> 7;
            next ^= next << 17;
            self.random.store(next, Relaxed);
            next
        }
    }
}

#[cfg(all(test, feature = "fault-injection"))]
mod tests {
    use std::vec::Vec;

    use super::*;

    /// Which of the next requests are refused, by number.
    fn refused(injector: &Injector, requests: u64) -> Vec<u64> {
        (1..=requests).filter(|_| injector.refuse()).collect()
    }

    #[test]
    fn each_mode_refuses_what_it_says_counted_from_when_it_was_set() {
        let injector = Injector::new();
        assert_eq!(refused(&injector, 10), []);
        injector.set(FaultMode::Nth(3));
        assert_eq!(refused(&injector, 10), [3]);
        injector.set(FaultMode::EveryNth(4));
        assert_eq!(refused(&injector, 10), [4, 8]);
        injector.set(FaultMode::Never);
        assert_eq!(refused(&injector, 10), []);
        assert_eq!((injector.seen(), injector.refused()), (40, 3));
    }

    #[test]
    fn a_number_of_0_refuses_nothing_and_one_in_1_everything() {
        let injector = Injector::new();
        for mode in [FaultMode::Nth(0), FaultMode::EveryNth(0), FaultMode::OneIn { requests: 0, seed: 1 }] {
            injector.set(mode);
            assert_eq!(refused(&injector, 10), [], "{mode:?}");
        }
        injector.set(FaultMode::OneIn { requests: 1, seed: 1 });
        assert_eq!(refused(&injector, 3), [1, 2, 3]);
    }

    #[test]
    fn chance_is_about_as_asked_and_the_same_for_the_same_seed() {
        let injector = Injector::new();
        let run = |seed| {
            injector.set(FaultMode::OneIn { requests: 8, seed });
            refused(&injector, 8000)
        };
        let (first, again, other, zero) = (run(7), run(7), run(8), run(0));
        assert_eq!(first, again);
        assert_ne!(first, other);
        for refused in [first, other, zero] {
            assert!((800..1200).contains(&refused.len()), "{}", refused.len());
        }
    }
}
