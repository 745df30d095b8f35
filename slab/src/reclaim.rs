//! What happens when memory is short: from giving back what nobody uses to asking the kernel.
//!
//! An allocation that fails goes through these steps, and tries again after each, until it succeeds or the last one has
//! nothing more:
//!
//! 1. the allocator gives back what it holds and does not use: magazines, empty slabs, stocks of frames;
//! 2. the *reclaim callbacks* of caches' owners, in the order of their registration, each followed by step 1, since what they
//!    free lands in magazines;
//! 3. the *out-of-memory hook*, which may add memory, end a program, or give up; again as long as it says so, up to
//!    [`MOST_RETRIES`] times.
//!
//! The same happens before anything fails, in [`Heap::maintain`](crate::Heap::maintain), when memory is low: steps 1 and 2,
//! until it no longer is. It is low when fewer page frames are free than the low watermarks of all zones say together, and
//! no longer when as many are free as the high ones say. So it is with a zone and those below it, which requests with a
//! limit depend on, if there were such requests since the last time.
//!
//! No lock is held meanwhile: callbacks and hook may allocate and free. What they allocate does not start these steps
//! over: it gets memory that is free, or fails.

#![deny(unsafe_code)]

use core::array;
use core::fmt;

use crate::cache::Caches;
use crate::frames::ZONES;
use crate::lock::{IrqLock, Level};
use crate::platform::{Platform, in_nmi};
use crate::sync::{AtomicBool, AtomicU64, Ordering};

/// Length of an interval in the unit of [`Heap::maintain`](crate::Heap::maintain): 15 seconds.
pub const INTERVAL: u64 = 15_000;

/// The most reclaim callbacks.
pub const MOST_CALLBACKS: usize = 16;

/// How often the out-of-memory hook may ask for another attempt at one allocation.
pub const MOST_RETRIES: usize = 16;

/// Frees what its owner can do without. It is told how many bytes are wanted, and says about how many it has freed.
pub type Callback = fn(wanted: usize) -> usize;

/// Decides what to do when so many bytes cannot be had.
pub type Hook = fn(wanted: usize) -> Decision;

/// What an out-of-memory hook wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It has done something about it: try again.
    Retry,
    /// The allocation is to fail.
    Fail,
}

/// There are [`MOST_CALLBACKS`] already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyCallbacks;

impl fmt::Display for TooManyCallbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there are {MOST_CALLBACKS} reclaim callbacks already")
    }
}

impl core::error::Error for TooManyCallbacks {}

/// The callbacks, the hook, and whether they are at work.
#[derive(Debug)]
pub(crate) struct Reclaim<P> {
    asked: IrqLock<P, Asked>,
    at_work: AtomicBool,
    /// When the interval began.
    interval: AtomicU64,
}

#[derive(Debug)]
struct Asked {
    callbacks: [Option<Callback>; MOST_CALLBACKS],
    hook: Option<Hook>,
}

impl<P> Reclaim<P> {
    pub(crate) const fn new() -> Self {
        let asked = Asked { callbacks: [None; MOST_CALLBACKS], hook: None };
        Self {
            asked: IrqLock::ordered(Level::Reclaim, asked),
            at_work: AtomicBool::new(false),
            interval: AtomicU64::new(0),
        }
    }
}

impl<P: Platform> Reclaim<P> {
    pub(crate) fn add_callback(&self, callback: Callback) -> Result<(), TooManyCallbacks> {
        let mut asked = self.asked.lock();
        let place = asked.callbacks.iter_mut().find(|place| place.is_none()).ok_or(TooManyCallbacks)?;
        *place = Some(callback);
        Ok(())
    }

    pub(crate) fn set_hook(&self, hook: Option<Hook>) {
        self.asked.lock().hook = hook;
    }

    /// Whether an interval is over at `now`; the next one has begun then.
    fn interval_is_over(&self, now: u64) -> bool {
        let begun = self.interval.load(Ordering::Relaxed);
        let over = now.wrapping_sub(begun) >= INTERVAL;
        over && self.interval.compare_exchange(begun, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn callback(&self, index: usize) -> Option<Callback> {
        self.asked.lock().callbacks.get(index).copied().flatten()
    }

    fn hook(&self) -> Option<Hook> {
        self.asked.lock().hook
    }
}

/// What [`Heap::maintain`](crate::Heap::maintain) does.
pub(crate) fn maintain<P: Platform>(caches: &Caches<P>, now: u64) {
    if in_nmi::<P>() {
        return;
    }
    caches.follow_reap();
    let frames = caches.frames();
    let short: [bool; ZONES] = array::from_fn(|zone| frames.take_asked(zone) && frames.zone_below_low(zone));
    if short.contains(&true)
        && let Some(mut relief) = Relief::begin(caches, 0)
    {
        let goes_on = || (0..ZONES).any(|zone| short[zone] && frames.zone_below_high(zone));
        while !matches!(relief.next, Step::Hook(_)) && goes_on() && relief.step() {}
    }
    if caches.reclaim.interval_is_over(now) {
        caches.end_interval();
    }
}

/// The steps for one allocation that failed.
#[derive(Debug)]
pub(crate) struct Relief<'a, P: Platform> {
    caches: &'a Caches<P>,
    wanted: usize,
    next: Step,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Reap,
    Callback(usize),
    Hook(usize),
}

impl<'a, P: Platform> Relief<'a, P> {
    /// `None` where the steps are being taken already, which this allocation may be part of.
    pub(crate) fn begin(caches: &'a Caches<P>, wanted: usize) -> Option<Self> {
        let at_work = caches.reclaim.at_work.swap(true, Ordering::Acquire);
        // Not `then_some`: dropping one says that the steps are over.
        (!at_work).then(|| Self { caches, wanted, next: Step::Reap })
    }

    /// Takes the next step; `false` where there is none.
    pub(crate) fn step(&mut self) -> bool {
        match self.next {
            Step::Reap => {
                self.caches.reap();
                self.next = Step::Callback(0);
                true
            }
            Step::Callback(index) => match self.caches.reclaim.callback(index) {
                Some(callback) => {
                    callback(self.wanted);
                    self.caches.reap();
                    self.next = Step::Callback(index + 1);
                    true
                }
                None => {
                    self.next = Step::Hook(0);
                    self.wanted > 0 && self.step()
                }
            },
            Step::Hook(asked) => {
                self.next = Step::Hook(asked + 1);
                let hook = if asked < MOST_RETRIES { self.caches.reclaim.hook() } else { None };
                hook.is_some_and(|hook| hook(self.wanted) == Decision::Retry)
            }
        }
    }
}

impl<P: Platform> Drop for Relief<'_, P> {
    fn drop(&mut self) {
        self.caches.reclaim.at_work.store(false, Ordering::Release);
    }
}
