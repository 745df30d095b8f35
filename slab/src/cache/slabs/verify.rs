//! The check of the invariants of all slabs of a cache.

use super::{ALL, EMPTY, FULL, HOME, LISTS, Slabs, State, links_of};
use crate::cache::slab::{BY_FULLNESS, Slab};
use crate::frames::{Frames, Owner};
use crate::platform::Platform;
use crate::verify::Broken;

impl<P: Platform> Slabs<P> {
    /// Checks the invariants of all slabs.
    pub(crate) fn verify(&self, frames: &Frames<P>) -> Result<(), Broken> {
        let state = self.state.lock();
        let broken = |what: &'static str| Broken::Cache { id: self.id, what };
        let mut listed = 0;
        for list in (0..LISTS).filter(|&list| list != ALL) {
            self.verify_list(&state, frames, list, |slab| {
                listed += 1;
                let band = self.band_of(slab);
                let right = slab.list() == list
                    && (band == list
                        || list >= HOME && (EMPTY + 1..FULL).contains(&band) && slab.next(BY_FULLNESS).is_none());
                if right { Ok(()) } else { Err("a slab is in the list of another fullness") }
            })
            .map_err(broken)?;
            if list == EMPTY && listed != state.numbers.empty {
                return Err(broken("the number of empty slabs is wrong"));
            }
        }
        let (mut slabs, mut full, mut taken) = (0, 0, 0);
        self.verify_list(&state, frames, ALL, |slab| {
            slabs += 1;
            full += usize::from(slab.list() == FULL);
            taken += slab.used();
            if !slab.is_consistent() {
                return Err("the used count or the summary of a slab is not that of its slots");
            }
            if (slab.list() == FULL) == (self.band_of(slab) == FULL) {
                Ok(())
            } else {
                Err("a slab is in the list of another fullness")
            }
        })
        .map_err(broken)?;
        if (slabs, listed + full, taken) != (state.numbers.slabs, state.numbers.slabs, state.numbers.taken) {
            return Err(broken("the number of slabs or of objects is not that of the lists"));
        }
        Ok(())
    }

    /// Checks the links of a list and the records of its slabs, and calls `check` with each slab.
    fn verify_list(
        &self,
        state: &State,
        frames: &Frames<P>,
        list: usize,
        mut check: impl FnMut(Slab<'_>) -> Result<(), &'static str>,
    ) -> Result<(), &'static str> {
        if state.lists[list].is_some() != (state.filled & 1 << list != 0) {
            return Err("the bit of a list does not say whether it has a slab");
        }
        let (mut position, mut previous) = (state.lists[list], None);
        while let Some(first) = position {
            for offset in 0..self.geometry.frames {
                if !matches!(frames.owner(first.offset(offset)), Owner::Slab { cache, .. } if cache == self.id) {
                    return Err("a frame of a slab does not name its cache");
                }
            }
            // SAFETY: its records say that it is a slab of this cache.
            let slab = unsafe { self.slab(frames, first) };
            if slab.previous(links_of(list)) != previous {
                return Err("a slab does not link back to the one before it");
            }
            check(slab)?;
            (previous, position) = (position, slab.next(links_of(list)));
        }
        Ok(())
    }
}
