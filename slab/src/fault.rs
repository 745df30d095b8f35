//! Faults: what is wrong with a pointer that was given back, or with an object that somebody wrote over, and the report.
//!
//! A free that cannot be right is refused before anything has changed, in release builds too. The report names it; no
//! lock is held then, and nothing is allocated for it. What happens next is for the embedder to say, by a [`Handler`]: stop,
//! which is what happens without one, or keep the object out of circulation and go on.
//!
//! The names are those of the Solaris allocator (`kmem`), from which the kinds come.
//!
//! # What is done about what
//!
//! Tests whose names say nothing else are those of this crate, or run in the test kernel: `cargo test NAME` finds both. Those
//! of `fuzz` run what fuzzing has found, in the workspace `slab/fuzz`. With checks means those of [`check`](crate::check), where
//! a cache has them.
//!
#![doc = include_str!("fault/rows.md")]

mod report;

use core::fmt;

pub(crate) use report::{ADDRESSES, Caller};
pub use report::{Damage, Event, Place, Report};

use crate::platform::Platform;
use crate::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicUsize, Counter};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// `DUPFREE`: it is free already, or was never allocated.
    DoubleFree,
    /// `BADBASE`: it points into memory that is allocated, but not to where an allocation starts.
    BadBase,
    /// `BADADDR`: this allocator has never handed it out.
    BadAddress,
    /// `BADSIZE`: it was allocated with another size; in bytes.
    BadSize {
        /// As which it was given back.
        freed: usize,
        /// As which it was allocated.
        allocated: usize,
    },
    /// `BADSIZE`: it was allocated with another alignment, in bytes. Known only of objects with checks.
    BadAlignment {
        /// As which it was given back.
        freed: usize,
        /// As which it was allocated.
        allocated: usize,
    },
    /// `BADSIZE`: another number of page frames was allocated.
    BadFrameCount {
        /// As which they were given back.
        freed: u32,
        /// As which they were allocated.
        allocated: u32,
    },
    /// `BADCACHE`: it is an object of another cache.
    WrongCache {
        /// To which it was given back.
        freed: CacheName,
        /// From which it came.
        owner: CacheName,
    },
    /// `REDZONE`: bytes before or behind the object were written to.
    RedZone,
    /// `MODIFIED`: it was written to while it was free.
    Modified,
    /// `BADSTATE`: it was not given back as its constructor left it.
    NotConstructed,
    /// `BADBUFTAG`: what is written beside the object about its allocation was overwritten.
    BadTag,
    /// `BADBUFCTL`: a magazine holds what is not a free object of its cache, because a free raced with another of the same
    /// object, or something wrote over the magazine.
    BadRound,
    /// `BADBUFCTL`: something wrote over what describes a slab, a magazine or a free block.
    BadControl,
    /// `GUARD`: an access before an object that has pages of its own, counted from its start. Of this kind are only the answers
    /// of [`Heap::explain`](crate::Heap::explain).
    AccessBefore {
        /// 1 for the byte just before it.
        bytes: usize,
    },
    /// `GUARD`: the same behind it, counted from its end.
    AccessBehind {
        /// 1 for the byte just behind it.
        bytes: usize,
    },
    /// `GUARD`: an access to an object that had pages of its own, after its free.
    AccessAfterFree,
}

impl Fault {
    /// Its name in reports: `DUPFREE` and so on.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::DoubleFree => "DUPFREE",
            Self::BadBase => "BADBASE",
            Self::BadAddress => "BADADDR",
            Self::BadSize { .. } | Self::BadAlignment { .. } | Self::BadFrameCount { .. } => "BADSIZE",
            Self::WrongCache { .. } => "BADCACHE",
            Self::RedZone => "REDZONE",
            Self::Modified => "MODIFIED",
            Self::NotConstructed => "BADSTATE",
            Self::BadTag => "BADBUFTAG",
            Self::BadRound | Self::BadControl => "BADBUFCTL",
            Self::AccessBefore { .. } | Self::AccessBehind { .. } | Self::AccessAfterFree => "GUARD",
        }
    }

    /// What somebody has done to the pointer of the report.
    const fn deed(&self) -> &'static str {
        match self {
            Self::RedZone | Self::Modified | Self::NotConstructed | Self::BadTag | Self::BadControl => "damage at",
            Self::AccessBefore { .. } | Self::AccessBehind { .. } | Self::AccessAfterFree => "access to",
            _ => "bad free of",
        }
    }
}

/// What a cache is called: its name, and its number among those of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheName {
    /// As it was given.
    pub name: &'static str,
    /// 0 for the first of the name.
    pub number: u32,
}

impl CacheName {
    pub(crate) const fn first(name: &'static str) -> Self {
        Self { name, number: 0 }
    }
}

impl fmt::Display for CacheName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            0 => f.write_str(self.name),
            number => write!(f, "{}#{number}", self.name),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DoubleFree => f.write_str("double free: it is free already, or was never allocated"),
            Self::BadBase => f.write_str("not the start of an allocation"),
            Self::BadAddress => f.write_str("not memory of this allocator"),
            Self::BadSize { freed, allocated } => {
                write!(f, "wrong layout: freed as a block of {freed} bytes, allocated as one of {allocated}")
            }
            Self::BadAlignment { freed, allocated } => {
                write!(f, "wrong layout: freed as aligned to {freed} bytes, allocated as aligned to {allocated}")
            }
            Self::BadFrameCount { freed, allocated } => {
                write!(f, "wrong size: freed as {freed} page frames, allocated as {allocated}")
            }
            Self::WrongCache { freed, owner } => write!(f, "wrong cache: freed to {freed}, allocated from {owner}"),
            Self::RedZone => f.write_str("written to outside the object"),
            Self::Modified => f.write_str("written to after it was freed"),
            Self::NotConstructed => f.write_str("not given back as its constructor left it"),
            Self::BadTag => f.write_str("what is known of its allocation was overwritten"),
            Self::BadRound => f.write_str("not a free object, but in a magazine"),
            Self::BadControl => f.write_str("the allocator's own data was overwritten"),
            Self::AccessBefore { bytes } => write!(f, "{bytes} byte{} before an object", plural(*bytes)),
            Self::AccessBehind { bytes } => write!(f, "{bytes} byte{} behind an object", plural(*bytes)),
            Self::AccessAfterFree => f.write_str("read or written after it was freed"),
        }
    }
}

/// What a [`Handler`] wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFault {
    /// Stop with the report: a panic whose message it is.
    Stop,
    /// Go on. A free is refused, and nothing has changed. An object that was written over, or beside which was written, is
    /// never allocated again, and its slab never freed.
    KeepOut,
}

const fn plural(number: usize) -> &'static str {
    if number == 1 { "" } else { "s" }
}

/// What an embedder does about a fault.
///
/// It is called with no lock of the allocator held, on the CPU and in the context in which the fault was found, an
/// interrupt handler perhaps. What it allocates and frees is served as ever; a fault of that is not reported again, but
/// treated as [`OnFault::KeepOut`].
pub type Handler = fn(&Report) -> OnFault;

/// Writes the return addresses of its callers, the innermost first, and leaves the rest of the slots as they are: 0. There are
/// few slots, so it does well to leave out the calls within the allocator, and within the collections that called it.
///
/// It is called with no lock held, in every context that allocates and frees objects with checks. It must not allocate.
pub type Backtrace = fn(&mut [usize]);

/// The faults of one allocator.
#[derive(Debug)]
pub(crate) struct Faults {
    /// A [`Handler`], or null.
    handler: AtomicPtr<()>,
    /// A [`Backtrace`], or null.
    backtrace: AtomicPtr<()>,
    seen: Counter,
    /// Events that were numbered.
    events: Counter,
    /// Stands for the CPU that is making a report; 0 for none.
    reporting: AtomicUsize,
}

impl Faults {
    pub(crate) const fn new() -> Self {
        Self {
            handler: AtomicPtr::new(core::ptr::null_mut()),
            backtrace: AtomicPtr::new(core::ptr::null_mut()),
            seen: Counter::new(0),
            events: Counter::new(0),
            reporting: AtomicUsize::new(0),
        }
    }

    pub(crate) fn set_handler(&self, handler: Option<Handler>) {
        self.handler.store(handler.map_or(core::ptr::null_mut(), |handler| handler as *mut ()), Release);
    }

    pub(crate) fn set_backtrace(&self, backtrace: Option<Backtrace>) {
        self.backtrace.store(backtrace.map_or(core::ptr::null_mut(), |backtrace| backtrace as *mut ()), Release);
    }

    /// The call that is being made, without a number.
    pub(crate) fn event<P: Platform>(&self, location: Caller) -> Event {
        let mut event = Event { cpu: P::current_cpu(), location, ..Event::default() };
        let backtrace = self.backtrace.load(Acquire);
        if !backtrace.is_null() {
            // SAFETY: only `set_backtrace` writes it, from a `Backtrace`.
            let backtrace = unsafe { core::mem::transmute::<*mut (), Backtrace>(backtrace) };
            backtrace(&mut event.addresses);
        }
        event
    }

    /// The same with the next number.
    pub(crate) fn numbered_event<P: Platform>(&self, location: Caller) -> Event {
        let sequence = self.events.fetch_add(1, Relaxed).wrapping_add(1);
        Event { sequence, ..self.event::<P>(location) }
    }

    /// The number of the last event.
    pub(crate) fn last_event(&self) -> u64 {
        self.events.load(Relaxed)
    }

    /// Faults so far.
    pub(crate) fn seen(&self) -> u64 {
        self.seen.load(Relaxed)
    }

    /// Counts a fault, and asks what is to be done. It returns where the answer is to go on.
    #[cold]
    pub(crate) fn report<P: Platform>(&self, report: &Report) {
        self.seen.fetch_add(1, Relaxed);
        let handler = self.handler.load(Acquire);
        if handler.is_null() {
            panic!("{report}");
        }
        // SAFETY: only `set_handler` writes it, from a `Handler`.
        let handler = unsafe { core::mem::transmute::<*mut (), Handler>(handler) };
        // No CPU has a number so large that it would be taken for one that has none.
        let me = (!P::current_cpu()).max(2);
        let _at_work = match self.reporting.compare_exchange(0, me, AcqRel, Acquire) {
            // A fault of the handler's own.
            Err(other) if other == me => return,
            // Another CPU makes one: what is told apart is only a report within a report.
            Err(_) => None,
            Ok(_) => Some(AtWork(&self.reporting)),
        };
        if handler(report) == OnFault::Stop {
            panic!("{report}");
        }
    }
}

/// A report is being made until this is dropped.
struct AtWork<'a>(&'a AtomicUsize);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.store(0, Release);
    }
}
