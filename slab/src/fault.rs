//! Bad frees, named.
//!
//! A free that cannot be right is refused before anything has changed, in release builds too, and reported: the kernel
//! stops with a panic whose message says what is wrong and where. No lock is held then.

use core::fmt;

/// What is wrong with a pointer that was given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is free already, or was never allocated.
    DoubleFree,
    /// It points into memory that is allocated, but not to where an allocation starts.
    BadBase,
    /// This allocator has never handed it out.
    BadAddress,
    /// It was allocated with another size or alignment.
    BadSize { freed: usize, allocated: usize },
    /// It is an object of another cache.
    WrongCache { freed: CacheName, owner: CacheName },
    /// Not the caller's fault: a magazine holds what is not a free object of its cache, because a free raced with
    /// another of the same object, or something wrote over the magazine.
    BadRound,
    /// Another number of frames was allocated.
    BadFrameCount { freed: u32, allocated: u32 },
}

/// What a cache is called: its name, and its number among those of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheName(pub(crate) &'static str, pub(crate) u32);

impl fmt::Display for CacheName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(name, 0) => f.write_str(name),
            Self(name, number) => write!(f, "{name}#{number}"),
        }
    }
}

impl Fault {
    /// Stops with the report.
    #[cold]
    pub(crate) fn report(self, pointer: *const u8) -> ! {
        panic!("kslab: bad free of {pointer:p}: {self}");
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
            Self::WrongCache { freed, owner } => write!(f, "wrong cache: freed to {freed}, allocated from {owner}"),
            Self::BadRound => f.write_str("not a free object, but in a magazine"),
            Self::BadFrameCount { freed, allocated } => {
                write!(f, "wrong size: freed as {freed} page frames, allocated as {allocated}")
            }
        }
    }
}
