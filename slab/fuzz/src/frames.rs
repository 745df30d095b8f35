//! Any sequence of requests for page frames against a table of what each frame is.

use std::ops::Range;

use arbitrary::Arbitrary;
use kslab::memory::FRAME_SIZE;
use kslab::{AddError, Frame, FrameBlock, Order, RemoveError};

use crate::decode;
use crate::machine::{CPUS, Cpus, FRAMES, Heap, Machine, START, be_cpu, on_first_cpu};

#[derive(Debug, Arbitrary)]
struct Plan {
    first: u16,
    boundaries: [u16; 2],
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Allocate { order: u8 },
    Run { count: u16, alignment: u8 },
    Below { count: u8, alignment: u8, limit: u16 },
    At { first: u16, count: u8 },
    Bulk { count: u8 },
    Free { which: u8 },
    FreeOwned { which: u8 },
    FreeBulk { which: u8, count: u8 },
    FreeInNmi { which: u8 },
    Remove { first: u16, count: u16 },
    Reserve { first: u16, count: u8 },
    Add { first: u16, count: u16 },
    BeCpu(u8),
    RetireCpu(u8),
    Check,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Unmanaged,
    Free,
    Used,
    /// The allocator's: records, and what the heap keeps for each CPU.
    Own,
}

struct Model<'h> {
    heap: &'h Heap,
    what: [Is; FRAMES],
    /// Runs that are allocated: the first frame, and how many.
    live: Vec<(usize, usize)>,
}

fn address(index: usize) -> u64 {
    START + (index * FRAME_SIZE) as u64
}

fn frame(index: usize) -> Frame {
    Frame::containing(address(index)).expect("a frame of the machine")
}

fn index(frame: Frame) -> usize {
    usize::try_from(frame.address() - START).expect("a frame of the machine") / FRAME_SIZE
}

fn order(number: u8) -> Order {
    Order::new(u32::from(number) % Order::COUNT as u32).expect("an order")
}

/// A range of frames of the machine.
fn range(first: u16, count: u16) -> Range<usize> {
    let first = usize::from(first) % FRAMES;
    first..FRAMES.min(first + usize::from(count) % FRAMES)
}

impl Model<'_> {
    fn frames(&self) -> &kslab::Frames<Cpus> {
        self.heap.frames()
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Allocate { order: number } => {
                let order = order(number);
                self.allocated(self.frames().allocate(order), order.frames(), order, usize::MAX);
            }
            Step::Run { count, alignment } => {
                let (count, alignment) = (u32::from(count) % 600, order(alignment));
                self.allocated(self.frames().allocate_run(count, alignment), count, alignment, usize::MAX);
            }
            Step::Below { count, alignment, limit } => {
                let (alignment, limit) = (order(alignment), usize::from(limit) % (FRAMES + 1));
                let found = self.frames().allocate_below(count.into(), alignment, address(limit));
                self.allocated(found, count.into(), alignment, limit);
            }
            Step::At { first, count } => self.at(usize::from(first) % FRAMES, count.into()),
            Step::Bulk { count } => {
                let mut bulk = vec![Frame::default(); count.into()];
                let filled = self.frames().allocate_bulk(&mut bulk);
                bulk[..filled].iter().for_each(|frame| self.allocated(Some(*frame), 1, Order::ZERO, usize::MAX));
            }
            Step::Free { which } => _ = self.take(which).map(|run| self.free(run)),
            Step::FreeOwned { which } => {
                if let Some((first, count)) = self.take(which) {
                    self.what[first..first + count].fill(Is::Free);
                    // SAFETY: allocated so, and nobody else frees it.
                    drop(unsafe { FrameBlock::from_raw(self.frames(), frame(first), count as u32) });
                }
            }
            Step::FreeBulk { which, count } => self.free_bulk(which.into(), count.into()),
            Step::FreeInNmi { which } => self.free_in_nmi(which),
            Step::Remove { first, count } => {
                let part = range(first, count);
                let removed = self.frames().remove(address(part.start)..address(part.end));
                self.withdrawn(part, removed.map(Some));
            }
            Step::Reserve { first, count } => {
                let part = range(first, count.into());
                let reserved = self.frames().reserve(address(part.start)..address(part.end));
                self.withdrawn(part, reserved.map(|()| None));
            }
            Step::Add { first, count } => self.add(range(first, count)),
            Step::BeCpu(cpu) => self.be_cpu(cpu),
            Step::RetireCpu(cpu) => self.retire(usize::from(cpu) % CPUS),
            Step::Check => self.check(),
        }
    }

    /// A CPU with a number, or without; NMIs have a step of their own.
    fn be_cpu(&self, cpu: u8) {
        be_cpu(cpu % (CPUS as u8 + 1));
    }

    fn retire(&self, cpu: usize) {
        // SAFETY: no other thread uses the heap.
        unsafe { self.heap.retire_cpu(cpu) };
    }

    /// A run that was handed out is free, aligned and below the limit; and where there is none, none could be had.
    fn allocated(&mut self, found: Option<Frame>, count: u32, alignment: Order, limit: usize) {
        let (count, step) = (count as usize, alignment.frames() as usize);
        let Some(found) = found else {
            let single = count == 1 && step == 1 && limit == usize::MAX;
            return assert!(!single || self.is_used_up(), "there are free frames");
        };
        let first = index(found);
        assert!(count > 0 && first.saturating_add(count) <= limit.min(FRAMES));
        assert_eq!(found.number() as usize % step, 0);
        assert!(self.what[first..first + count].iter().all(|is| *is == Is::Free), "frame {first}, {count} frames");
        self.what[first..first + count].fill(Is::Used);
        self.live.push((first, count));
    }

    /// Whether no frame is free, but for what other CPUs have in stock and lower zones keep back.
    fn is_used_up(&self) -> bool {
        let stats = self.frames().stats();
        let kept: usize = stats.zones.iter().map(|zone| zone.free.min(zone.reserve)).sum();
        stats.free <= stats.stocked + kept
    }

    fn at(&mut self, first: usize, count: u32) {
        let taken = self.frames().allocate_at(frame(first), count);
        let part = self.what.get(first..first + count as usize);
        let is_free = count > 0 && part.is_some_and(|part| part.iter().all(|is| *is == Is::Free));
        // What other CPUs have in stock is free and cannot be had.
        assert!(taken == is_free || (!taken && self.frames().stats().stocked > 0));
        if taken {
            self.allocated(Some(frame(first)), count, Order::ZERO, usize::MAX);
        }
    }

    fn take(&mut self, which: u8) -> Option<(usize, usize)> {
        let index = usize::from(which).checked_rem(self.live.len())?;
        Some(self.live.swap_remove(index))
    }

    fn free(&mut self, (first, count): (usize, usize)) {
        // SAFETY: allocated so, and used by nobody.
        unsafe { self.frames().free_run(frame(first), count as u32) };
        self.what[first..first + count].fill(Is::Free);
    }

    fn free_in_nmi(&mut self, which: u8) {
        let Some(run) = self.take(which) else { return };
        be_cpu(CPUS as u8 + 1);
        self.free(run);
        be_cpu(0);
        // Whoever comes next takes it in.
        assert_eq!(self.frames().allocate_bulk(&mut []), 0);
    }

    fn free_bulk(&mut self, which: usize, count: usize) {
        let singles: Vec<_> = self.live.iter().filter(|(_, count)| *count == 1).map(|(first, _)| *first).collect();
        let start = which.checked_rem(singles.len()).unwrap_or(0);
        let some = &singles[start..singles.len().min(start + count)];
        let bulk: Vec<_> = some.iter().map(|first| frame(*first)).collect();
        // SAFETY: allocated, and used by nobody.
        unsafe { self.frames().free_bulk(&bulk) };
        self.live.retain(|(first, _)| !some.contains(first));
        some.iter().for_each(|first| self.what[*first] = Is::Free);
    }

    fn withdrawn(&mut self, range: Range<usize>, result: Result<Option<usize>, RemoveError>) {
        let part = &mut self.what[range];
        match result {
            Ok(frames) => {
                assert!(part.iter().all(|is| matches!(is, Is::Free | Is::Unmanaged)));
                let free = part.iter().filter(|is| **is == Is::Free).count();
                assert!(frames.is_none_or(|frames| frames == free));
                part.fill(Is::Unmanaged);
            }
            Err(RemoveError::Busy { frame }) => {
                assert!(matches!(self.what[index(frame)], Is::Used | Is::Own) || self.frames().stats().stocked > 0);
            }
            Err(RemoveError::Records { frame }) => assert_eq!(self.what[index(frame)], Is::Own),
            Err(error) => panic!("{error}"),
        }
    }

    fn add(&mut self, range: Range<usize>) {
        let managed = range.clone().find(|&index| self.what[index] != Is::Unmanaged).map(frame);
        // SAFETY: memory of the machine, and nobody else's.
        match unsafe { self.heap.add([Machine::region(range.start, range.len())]) } {
            Ok(frames) => {
                assert_eq!((frames, managed), (range.len(), None));
                self.what[range].fill(Is::Free);
                self.find_own();
            }
            Err(AddError::NoUsableMemory) => assert!(range.is_empty()),
            Err(AddError::AlreadyManaged { frame }) => assert_eq!(managed, Some(frame)),
            Err(AddError::MetadataDoesNotFit { .. }) => assert_eq!(managed, None),
            Err(error) => panic!("{error}"),
        }
    }

    /// The allocator chooses where its own frames are: they cannot be had, though nobody has them.
    fn find_own(&mut self) {
        (0..CPUS).for_each(|cpu| self.retire(cpu));
        on_first_cpu(|| {
            for free in (0..FRAMES).filter(|&index| self.what[index] == Is::Free).collect::<Vec<_>>() {
                if self.heap.frames().allocate_at(frame(free), 1) {
                    // SAFETY: just allocated.
                    unsafe { self.heap.frames().free(frame(free), Order::ZERO) };
                } else {
                    self.what[free] = Is::Own;
                }
            }
        });
    }

    fn count(&self, is: Is) -> usize {
        self.what.iter().filter(|other| **other == is).count()
    }

    fn check(&self) {
        self.frames().verify().expect("page frames that are right");
        let stats = self.frames().stats();
        assert_eq!(stats.free, self.count(Is::Free));
        assert!(stats.metadata <= self.count(Is::Own));
        assert_eq!(stats.total, FRAMES - self.count(Is::Unmanaged));
        let mut runs = self.live.len();
        self.heap.for_each_block(|_, _| runs -= 1);
        assert_eq!(runs, 0);
    }
}

/// Any sequence leaves every frame what it should be.
pub fn frames(data: &[u8]) {
    let Some(plan) = decode::<Plan>(data) else { return };
    Machine::with(|machine| run(machine, &plan));
}

fn run(machine: &Machine, plan: &Plan) {
    let heap = Heap::with_zones(plan.boundaries.map(|boundary| address(usize::from(boundary) % (FRAMES + 1))));
    let first = 2 + usize::from(plan.first) % (FRAMES - 1);
    // SAFETY: memory of the machine, and nobody else's.
    unsafe { heap.init([Machine::region(0, first)], machine.base()) }.expect("memory for page frames");
    let mut what = [Is::Unmanaged; FRAMES];
    what[..first].fill(Is::Free);
    let mut model = Model { heap: &heap, what, live: Vec::new() };
    model.find_own();
    plan.steps.iter().for_each(|step| model.step(step));
    on_first_cpu(|| model.check());
    while let Some(run) = model.take(0) {
        model.free(run);
    }
    (0..CPUS).for_each(|cpu| model.retire(cpu));
    model.check();
}
