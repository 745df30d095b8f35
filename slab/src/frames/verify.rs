//! Checking the page frames as a whole.

#![forbid(unsafe_code)]

use crate::sync::Ordering::Relaxed;

use super::records::Records;
use super::types::length;
use super::{Frame, Frames, Owner};
use crate::platform::Platform;
use crate::verify::Broken;

/// What the records say there is.
#[derive(Debug, Default)]
struct Tally {
    managed: usize,
    /// Of the managed frames, those of something that starts at or before them.
    owned: usize,
    /// In the stocks too.
    free: usize,
    metadata: usize,
}

impl Tally {
    /// Goes over all records: whatever starts at a frame must have just the frames inside it that it says.
    fn of(records: &Records) -> Result<Self, Broken> {
        let mut tally = Self::default();
        let mut outer = Frame::default()..Frame::default();
        for (frame, owner) in records.managed(Frame::default()..Frame::new(Frame::LIMIT)) {
            tally.managed += 1;
            if outer.contains(&frame) {
                if owner != Owner::Inner {
                    return Err(Broken::Overlap { frame: outer.start, inner: frame });
                }
                continue;
            }
            outer = frame..frame.offset(tally.add(owner).ok_or(Broken::Lost { frame })?);
            tally.owned += length(&outer) as usize;
        }
        Ok(tally)
    }

    /// Counts what starts at a frame; says how many frames it has, `None` where nothing starts there.
    fn add(&mut self, owner: Owner) -> Option<u32> {
        match owner {
            // Who frees loose frames is not done.
            Owner::Unmanaged | Owner::Inner | Owner::Loose => return None,
            Owner::Records => self.metadata += 1,
            Owner::Free(order) | Owner::Stock(order) => {
                self.free += order.frames() as usize;
                return Some(order.frames());
            }
            Owner::Pages(count) | Owner::Metadata(count) | Owner::Deferred(count) => return Some(count),
            Owner::Slab { .. } => {}
        }
        Some(1)
    }
}

impl<P: Platform> Frames<P> {
    /// Runs `work` with all zones locked.
    #[cfg(test)]
    pub(crate) fn with_zones_locked<T>(&self, work: impl FnOnce() -> T) -> T {
        let _zones = self.zones.lock();
        work()
    }

    /// Checks every invariant of the page frames: the lists of free blocks, that buddies have merged, the stocks, that
    /// each managed frame belongs to just one thing, and that all counts are true.
    ///
    /// It takes time in proportion to all managed memory, with interrupts off: for tests, and for kernels in trouble.
    /// Frames that another CPU is just about to allocate or to free may be called broken.
    ///
    /// # Errors
    ///
    /// The first invariant that does not hold.
    pub fn verify(&self) -> Result<(), Broken> {
        let zones = self.zones.lock();
        zones.verify(&self.records)?;
        let stocked = self.stocks.verify(&self.records)?;
        let found = Tally::of(&self.records)?;
        let later = self.records.later().iter().map(|later| length(later) as usize).sum::<usize>();
        let tables = if later > 0 { self.metadata.load(Relaxed) - found.metadata } else { 0 };
        let counts = [
            (zones.total_frames(), found.managed + later + tables),
            (found.managed, found.owned),
            (zones.free_frames() + stocked, found.free + later),
            (self.metadata.load(Relaxed), found.metadata + tables),
        ];
        let wrong = counts.into_iter().find(|(expected, found)| expected != found);
        wrong.map_or(Ok(()), |(expected, found)| Err(Broken::FrameCount { expected, found }))
    }
}
