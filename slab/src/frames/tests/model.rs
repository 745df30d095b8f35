//! Any sequence of operations against the plainest model there is: for each frame, what it is.

use std::vec::Vec;

use proptest::prelude::*;

use super::stock::{Two, on_cpu};
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Allocate { count: u32, alignment: u32 },
    Below { count: u32, limit: u64 },
    At { first: u64, count: u32 },
    Bulk { count: usize },
    Free { which: usize },
    FreeBulk { which: usize, count: usize },
    Shrink { which: usize, keep: u32 },
    Grow { which: usize, by: u32 },
    Remove { first: u64, count: u64 },
    Reserve { first: u64, count: u64 },
    Add { first: u64, count: u64 },
    Drain,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let place = || (0..SPAN, 1..SPAN / 4);
    let step = prop_oneof![
        8 => (1..40_u32, 0..5_u32).prop_map(|(count, alignment)| Step::Allocate { count, alignment }),
        4 => (Just(1_u32), Just(0)).prop_map(|(count, alignment)| Step::Allocate { count, alignment }),
        2 => (1..20_u32, 0..SPAN).prop_map(|(count, limit)| Step::Below { count, limit }),
        2 => (0..SPAN, 1..40_u32).prop_map(|(first, count)| Step::At { first, count }),
        1 => (0..40_usize).prop_map(|count| Step::Bulk { count }),
        8 => any::<usize>().prop_map(|which| Step::Free { which }),
        1 => (any::<usize>(), 0..40_usize).prop_map(|(which, count)| Step::FreeBulk { which, count }),
        1 => (any::<usize>(), 1..40_u32).prop_map(|(which, keep)| Step::Shrink { which, keep }),
        2 => (any::<usize>(), 1..20_u32).prop_map(|(which, by)| Step::Grow { which, by }),
        2 => place().prop_map(|(first, count)| Step::Remove { first, count }),
        1 => place().prop_map(|(first, count)| Step::Reserve { first, count: count / 8 }),
        3 => place().prop_map(|(first, count)| Step::Add { first, count }),
        1 => Just(Step::Drain),
    ];
    prop::collection::vec((0..3_usize, step), 1..if cfg!(miri) { 12 } else { 200 })
}

/// Frames of the machine.
const SPAN: u64 = if cfg!(miri) { 40 } else { 1024 };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Unmanaged,
    Free,
    Used,
    /// The allocator's own.
    Records,
}

struct Model<'a> {
    frames: &'a Frames<Two>,
    machine: &'a Machine,
    what: Vec<Is>,
    live: Vec<(Frame, u32)>,
}

type Checked = Result<(), TestCaseError>;

impl Model<'_> {
    fn index(frame: Frame) -> usize {
        (frame.number() - nth(0).number()) as usize
    }

    fn part(&mut self, frame: Frame, count: u32) -> &mut [Is] {
        &mut self.what[Self::index(frame)..][..count as usize]
    }

    fn all_free(&self, first: u64, count: u32) -> bool {
        self.what
            .get(first as usize..(first as usize + count as usize))
            .is_some_and(|part| part.iter().all(|is| *is == Is::Free))
    }

    fn allocated(&mut self, frame: Frame, count: u32) -> Checked {
        prop_assert!(self.part(frame, count).iter().all(|is| *is == Is::Free));
        self.part(frame, count).fill(Is::Used);
        self.live.push((frame, count));
        Ok(())
    }

    /// The `which`th live run, which is then no more.
    fn take(&mut self, which: usize) -> Option<(Frame, u32)> {
        let index = which.checked_rem(self.live.len())?;
        Some(self.live.swap_remove(index))
    }

    fn free(&mut self, (frame, count): (Frame, u32)) {
        free_run(self.frames, frame, count);
        self.part(frame, count).fill(Is::Free);
    }

    fn step(&mut self, step: Step) -> Checked {
        match step {
            Step::Allocate { count, alignment } => {
                let Some(run) = self.frames.allocate_run(count, order(alignment)) else { return Ok(()) };
                let aligned = order(alignment);
                prop_assert_eq!(run.number() % aligned.frames(), 0);
                self.allocated(run, count)
            }
            Step::Below { count, limit } => {
                let Some(run) = self.frames.allocate_below(count, Order::ZERO, nth(limit).address()) else {
                    return Ok(());
                };
                prop_assert!(run.offset(count) <= nth(limit));
                self.allocated(run, count)
            }
            Step::At { first, count } => self.at(first, count),
            Step::Bulk { count } => {
                let mut bulk = [Frame::default(); 40];
                let filled = self.frames.allocate_bulk(&mut bulk[..count]);
                bulk[..filled].iter().try_for_each(|frame| self.allocated(*frame, 1))
            }
            Step::Free { which } => {
                if let Some(run) = self.take(which) {
                    self.free(run);
                }
                Ok(())
            }
            Step::FreeBulk { which, count } => {
                self.free_bulk(which, count);
                Ok(())
            }
            Step::Shrink { which, keep } => {
                let Some((frame, count)) = self.take(which) else { return Ok(()) };
                let keep = keep.min(count);
                prop_assert_eq!(self.frames.try_shrink_run(frame, count, keep), Ok(()));
                self.part(frame, count)[keep as usize..].fill(Is::Free);
                self.live.push((frame, keep));
                Ok(())
            }
            Step::Grow { which, by } => self.grow(which, by),
            Step::Remove { first, count } => {
                let bytes = nth(first).address()..nth(first + count).address();
                let result = self.frames.remove(bytes).map(Some);
                self.withdrawn(first, count, result)
            }
            Step::Reserve { first, count } => {
                let bytes = nth(first).address()..nth(first + count).address();
                let result = self.frames.reserve(bytes).map(|()| None);
                self.withdrawn(first, count, result)
            }
            Step::Add { first, count } => self.add(first, count),
            Step::Drain => {
                self.frames.drain_stock();
                Ok(())
            }
        }
    }

    fn at(&mut self, first: u64, count: u32) -> Checked {
        // What other CPUs have in stock is free and cannot be had.
        let all_free = self.all_free(first, count);
        let stocked = (0..count).any(|index| matches!(self.frames.owner(nth(first).offset(index)), Owner::Stock(_)));
        let taken = self.frames.allocate_at(nth(first), count);
        prop_assert!(taken == all_free || (!taken && stocked));
        if taken { self.allocated(nth(first), count) } else { Ok(()) }
    }

    fn free_bulk(&mut self, which: usize, count: usize) {
        let singles: Vec<_> = self.live.iter().filter(|(_, count)| *count == 1).map(|(frame, _)| *frame).collect();
        let start = which.checked_rem(singles.len()).unwrap_or(0);
        let some = &singles[start..singles.len().min(start + count)];
        // SAFETY: nobody uses them.
        unsafe { self.frames.free_bulk(some) };
        self.live.retain(|(frame, _)| !some.contains(frame));
        some.iter().for_each(|frame| self.part(*frame, 1).fill(Is::Free));
    }

    fn grow(&mut self, which: usize, by: u32) -> Checked {
        let Some((frame, count)) = self.take(which) else { return Ok(()) };
        let behind = Self::index(frame) as u64 + u64::from(count);
        let stocked = (0..by).any(|index| matches!(self.frames.owner(nth(behind).offset(index)), Owner::Stock(_)));
        let grown = self.frames.try_grow_run(frame, count, count + by).unwrap();
        prop_assert!(grown == self.all_free(behind, by) || (!grown && stocked));
        let count = if grown { count + by } else { count };
        self.part(frame, count).fill(Is::Used);
        self.live.push((frame, count));
        Ok(())
    }

    fn withdrawn(&mut self, first: u64, count: u64, result: Result<Option<usize>, RemoveError>) -> Checked {
        let end = (first + count).min(SPAN) as usize;
        let part = &mut self.what[first as usize..end];
        match result {
            Ok(frames) => {
                prop_assert!(part.iter().all(|is| matches!(is, Is::Free | Is::Unmanaged)));
                let free = part.iter().filter(|is| **is == Is::Free).count();
                prop_assert!(frames.is_none_or(|frames| frames == free));
                part.fill(Is::Unmanaged);
            }
            Err(RemoveError::Busy { frame }) => {
                let stocked = matches!(self.frames.owner(frame), Owner::Stock(_));
                prop_assert!(stocked || self.what[Self::index(frame)] == Is::Used);
            }
            Err(RemoveError::Records { frame }) => prop_assert_eq!(self.what[Self::index(frame)], Is::Records),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
        Ok(())
    }

    fn add(&mut self, first: u64, count: u64) -> Checked {
        let count = count.min(SPAN - first);
        let part = first as usize..(first + count) as usize;
        match add(self.frames, &[self.machine.usable(first as usize, count as usize)]) {
            Ok(frames) => {
                prop_assert_eq!(frames, count as usize);
                prop_assert!(self.what[part.clone()].iter().all(|is| *is == Is::Unmanaged));
                self.what[part].fill(Is::Free);
                self.find_records();
            }
            Err(AddError::AlreadyManaged { frame }) => {
                prop_assert!(self.what[Self::index(frame)] != Is::Unmanaged);
            }
            Err(AddError::MetadataDoesNotFit { .. }) => {}
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
        Ok(())
    }

    /// The allocator chooses where its records are, but takes no frame that is in use.
    fn find_records(&mut self) {
        for (is, frame) in self.what.iter_mut().zip(0..) {
            if self.frames.owner(nth(frame)) == Owner::Records {
                assert!(matches!(is, Is::Free | Is::Records));
                *is = Is::Records;
            }
        }
    }

    fn check(&self) -> Checked {
        prop_assert_eq!(self.frames.verify(), Ok(()));
        let count = |wanted: &[Is]| self.what.iter().filter(|is| wanted.contains(is)).count();
        let stats = self.frames.stats();
        prop_assert_eq!(stats.free, count(&[Is::Free]));
        prop_assert_eq!(stats.metadata, count(&[Is::Records]));
        prop_assert_eq!(stats.total, SPAN as usize - count(&[Is::Unmanaged]));
        Ok(())
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(200, 2))]

    #[test]
    fn any_sequence_is_as_the_model_has_it(
        steps in steps(), first in 1..SPAN as usize, boundaries in (0..SPAN, 0..SPAN)
    ) {
        let machine = Machine::new(START, SPAN as usize);
        let frames: Frames<Two> = frames_of(&machine, &[machine.usable(0, first)], boundaries.into());
        let mut what = std::vec![Is::Unmanaged; SPAN as usize];
        what[..first].fill(Is::Free);
        let mut model = Model { frames: &frames, machine: &machine, what, live: Vec::new() };
        model.find_records();
        for (cpu, step) in steps {
            on_cpu(cpu, || model.step(step))?;
            model.check()?;
        }
        while let Some(run) = model.take(0) {
            model.free(run);
        }
        // SAFETY: there is one thread.
        (0..4).for_each(|cpu| _ = unsafe { frames.drain_stock_of(cpu) });
        model.check()?;
        let mut given = 0;
        // SAFETY: nobody uses the frames.
        unsafe { frames.dissolve(&mut |_| given += 1) };
        prop_assert_eq!(given, SPAN as usize - model.what.iter().filter(|is| **is == Is::Unmanaged).count());
    }
}
