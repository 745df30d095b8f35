//! What was freed in an NMI and is still to be taken in.
//!
//! A stack of frames, linked through words of their records or their slabs' headers: one for runs of page frames, and one a
//! cache for its slabs with freed objects. So nothing is written to what was freed, and a constructed object stays constructed. A
//! push is an exchange that is tried again where another one came first; the stack is only ever taken as a whole. Nobody follows a
//! link that can still change, and so it does not matter whether a frame has been away and come back (no ABA).
//!
//! Lock: none; no step waits for another CPU, or for what an NMI has interrupted.

#![forbid(unsafe_code)]

use super::Frame;
use crate::sync::AtomicU32;
use crate::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// In the link of a frame: it is on no list. Frame 0 is never handed out.
pub(crate) const NOT_LISTED: u32 = 0;

/// Frames with something to be taken in.
#[derive(Debug)]
pub(crate) struct Deferred {
    first: AtomicU32,
}

impl Deferred {
    pub(crate) const fn new() -> Self {
        Self { first: AtomicU32::new(Frame::NONE) }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.first.load(Relaxed) == Frame::NONE
    }

    /// Pushes a frame that is on no list; `link` is its own.
    pub(crate) fn push(&self, frame: Frame, link: &AtomicU32) {
        let mut next = self.first.load(Relaxed);
        loop {
            // An exchange, like all that is done to a link: see `push_once`.
            link.swap(next, AcqRel);
            match self.first.compare_exchange_weak(next, frame.number(), Release, Relaxed) {
                Ok(_) => return,
                Err(now) => next = now,
            }
        }
    }

    /// Pushes a frame unless it is on this list, or on its way there. Who takes it off with [`unlink`] afterwards sees
    /// all that was done before.
    pub(crate) fn push_once(&self, frame: Frame, link: &AtomicU32) {
        let mut found = link.load(Relaxed);
        loop {
            let listed = if found == NOT_LISTED { Frame::NONE } else { found };
            // Also where it changes nothing: so whatever is done to the link later knows of it.
            match link.compare_exchange_weak(found, listed, AcqRel, Relaxed) {
                Ok(NOT_LISTED) => return self.push(frame, link),
                Ok(_) => return,
                Err(now) => found = now,
            }
        }
    }

    /// All that is on the list: the first frame, with the others behind it.
    pub(crate) fn take_all(&self) -> Option<Frame> {
        Frame::some(self.first.swap(Frame::NONE, Acquire))
    }
}

/// Takes the first frame off a list that was taken, and says which one is behind it. From then on it may be pushed again.
pub(crate) fn unlink(link: &AtomicU32) -> Option<Frame> {
    Frame::some(link.swap(NOT_LISTED, AcqRel))
}
