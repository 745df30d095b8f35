//! Any memory map against a list of its frames.

use std::collections::BTreeSet;
use std::ops::Range;

use arbitrary::Arbitrary;
use kslab::memory::{FRAME_SIZE, Region, UsableFrames};
use kslab::{AddError, Frame, InitError, Order, RemoveError};

use crate::decode;
use crate::machine::{BYTES, Cpus, FRAMES, Heap, Machine, START};

const PAGE: u64 = FRAME_SIZE as u64;
/// The machine's first frame.
const FIRST: u64 = START / PAGE;

#[derive(Debug, Arbitrary)]
struct Plan {
    anywhere: Vec<Anywhere>,
    boundaries: [u32; 2],
    map: Vec<Piece>,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
struct Anywhere {
    start: Address,
    length: Length,
    usable: bool,
}

#[derive(Debug, Arbitrary)]
enum Address {
    Any(u64),
    /// Where regions meet each other.
    Low(u16),
    /// Near the end of frame numbers.
    NearLimit(i16),
    /// So many bytes before the end of addresses.
    NearEnd(u16),
}

#[derive(Debug, Arbitrary)]
enum Length {
    Any(u64),
    Low(u16),
    Pages(u16),
}

/// Bytes of the machine; reserved ones may reach beyond it.
#[derive(Debug, Arbitrary)]
struct Piece {
    start: u32,
    length: u32,
    usable: bool,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Add(Vec<Piece>),
    Remove { start: u32, length: u32 },
    Reserve { start: u32, length: u32 },
}

/// What a region was made of.
#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u64,
    length: u64,
    usable: bool,
}

impl Entry {
    fn region(&self) -> Region {
        let make = if self.usable { Region::usable } else { Region::reserved };
        make(self.start, self.length)
    }

    fn has(&self, address: u64) -> bool {
        address >= self.start && address < self.start.saturating_add(self.length)
    }
}

impl Anywhere {
    fn entry(&self) -> Entry {
        let start = match self.start {
            Address::Any(start) => start,
            Address::Low(start) => start.into(),
            Address::NearLimit(offset) => (u64::from(Frame::LIMIT) * PAGE).wrapping_add_signed(offset.into()),
            Address::NearEnd(before) => u64::MAX - u64::from(before),
        };
        let length = match self.length {
            Length::Any(length) => length,
            Length::Low(length) => length.into(),
            Length::Pages(pages) => u64::from(pages) * PAGE,
        };
        Entry { start, length, usable: self.usable }
    }
}

impl Piece {
    fn entry(&self) -> Entry {
        let (start, length) = part(self.start, self.length);
        if self.usable {
            return Entry { start, length: length.min(START + BYTES as u64 - start), usable: true };
        }
        Entry { start: start - PAGE, length: length + PAGE, usable: false }
    }
}

/// Where a part of the machine starts, and how long it is; short ones are as likely as long ones, and whole pages too.
fn part(start: u32, length: u32) -> (u64, u64) {
    let start = u64::from(start) % BYTES as u64;
    let length = u64::from(length & 0xff_ffff) >> (length >> 27) & (BYTES as u64 - 1);
    match length % 3 {
        0 => (START + start / PAGE * PAGE, length.next_multiple_of(PAGE)),
        _ => (START + start, length),
    }
}

/// The frames that are usable: joined from every range between two addresses at which a region starts or ends.
fn usable_frames(entries: &[Entry]) -> Vec<Range<u64>> {
    let edges: BTreeSet<_> =
        entries.iter().flat_map(|entry| [entry.start, entry.start.saturating_add(entry.length)]).collect();
    let edges: Vec<_> = edges.into_iter().collect();
    let mut bytes: Vec<Range<u64>> = Vec::new();
    for edge in edges.windows(2) {
        let covered = |usable| entries.iter().any(|entry| entry.usable == usable && entry.has(edge[0]));
        if !covered(true) || covered(false) {
            continue;
        }
        match bytes.last_mut() {
            Some(last) if last.end == edge[0] => last.end = edge[1],
            _ => bytes.push(edge[0]..edge[1]),
        }
    }
    let whole =
        bytes.iter().map(|range| range.start.div_ceil(PAGE).max(1)..(range.end / PAGE).min(Frame::LIMIT.into()));
    whole.filter(|range| !range.is_empty()).collect()
}

fn regions(entries: &[Entry]) -> Vec<Region> {
    entries.iter().map(Entry::region).collect()
}

/// What each frame of the machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Unmanaged,
    Free,
    /// The allocator's: records, and what the heap keeps for each CPU.
    Own,
}

struct Model<'h> {
    heap: &'h Heap,
    machine: &'h Machine,
    what: [Is; FRAMES],
}

fn frame(index: usize) -> Frame {
    Frame::containing(START + (index * FRAME_SIZE) as u64).expect("a frame of the machine")
}

fn index(frame: Frame) -> usize {
    usize::try_from(u64::from(frame.number()) - FIRST).expect("a frame of the machine")
}

/// The frames of the machine that these entries make usable.
fn indices(entries: &[Entry]) -> Vec<usize> {
    let ranges = usable_frames(entries).into_iter();
    ranges.flatten().map(|number| usize::try_from(number - FIRST).expect("a frame of the machine")).collect()
}

impl Model<'_> {
    fn count(&self, is: Is) -> usize {
        self.what.iter().filter(|other| **other == is).count()
    }

    fn manage(&mut self, frames: &[usize]) {
        frames.iter().for_each(|&index| self.what[index] = Is::Free);
        self.find_own();
    }

    /// Takes every frame that can be had: just those that are usable, each once, but for what the allocator needs itself.
    fn find_own(&mut self) {
        let frames = self.heap.frames();
        let own = self.heap.used() / FRAME_SIZE;
        let mut taken = [false; FRAMES];
        // A lower zone keeps some back from this.
        while let Some(frame) = frames.allocate(Order::ZERO) {
            assert!(!std::mem::replace(&mut taken[index(frame)], true), "{frame:?} was allocated twice");
        }
        for (index, taken) in taken.iter_mut().enumerate() {
            *taken |= frames.allocate_at(frame(index), 1);
            self.what[index] = match (*taken, self.what[index]) {
                (true, Is::Free) => Is::Free,
                (false, Is::Unmanaged) => Is::Unmanaged,
                (false, Is::Free | Is::Own) => Is::Own,
                (true, is) => panic!("frame {index} was handed out, and is {is:?}"),
            };
        }
        assert_eq!(self.count(Is::Own), own);
        for index in (0..FRAMES).filter(|&index| taken[index]) {
            // SAFETY: allocated above.
            unsafe { frames.free(frame(index), Order::ZERO) };
        }
        frames.verify().expect("page frames that are right");
        let stats = frames.stats();
        assert_eq!((stats.total, stats.free), (FRAMES - self.count(Is::Unmanaged), self.count(Is::Free)));
    }

    /// All frames that are free can be written, and the allocator is as it was.
    fn write_to_all(&self) {
        let frames = self.heap.frames();
        let all: Vec<_> = std::iter::from_fn(|| frames.block(Order::ZERO)).collect();
        for block in &all {
            assert_eq!(block.pointer(), self.machine.at(index(block.frame()) * FRAME_SIZE));
            // SAFETY: the block is ours.
            unsafe { block.pointer().write_bytes(0, FRAME_SIZE) };
        }
        frames.verify().expect("page frames that are right");
        drop(all);
        assert_eq!(frames.stats().free, self.count(Is::Free));
    }

    fn add(&mut self, pieces: &[Piece]) {
        let entries: Vec<_> = pieces.iter().map(Piece::entry).collect();
        let new = indices(&entries);
        let managed = new.iter().copied().find(|&index| self.what[index] != Is::Unmanaged).map(frame);
        // SAFETY: memory of the machine, and nobody else's.
        match unsafe { self.heap.add(regions(&entries)) } {
            Ok(frames) => {
                assert_eq!((frames, managed), (new.len(), None));
                self.manage(&new);
            }
            Err(AddError::NoUsableMemory) => assert!(new.is_empty()),
            Err(AddError::AlreadyManaged { frame }) => assert_eq!(managed, Some(frame)),
            Err(AddError::MetadataDoesNotFit { .. }) => assert_eq!(managed, None),
            Err(error) => panic!("{error}"),
        }
    }

    /// What came of taking `frames` away: all of them have gone, or none, as one is the allocator's.
    fn withdrawn(&mut self, frames: Range<usize>, result: Result<usize, RemoveError>) {
        let part = &mut self.what[frames.clone()];
        let own = part.iter().position(|is| *is == Is::Own).map(|offset| frame(frames.start + offset));
        let free = part.iter().filter(|is| **is == Is::Free).count();
        match result {
            Ok(frames) => assert_eq!((frames, None), (free, own)),
            Err(RemoveError::Records { frame } | RemoveError::Busy { frame }) => assert_eq!(Some(frame), own),
            Err(error) => panic!("{error}"),
        }
        if result.is_ok() {
            part.fill(Is::Unmanaged);
        }
    }

    fn step(&mut self, step: &Step) {
        let in_machine =
            |frame: u64| usize::try_from(frame.saturating_sub(FIRST)).map_or(FRAMES, |index| index.min(FRAMES));
        match *step {
            Step::Add(ref pieces) => self.add(pieces),
            Step::Remove { start, length } => {
                let (start, length) = part(start, length);
                let frames = in_machine(start.div_ceil(PAGE))..in_machine((start + length) / PAGE);
                let removed = self.heap.frames().remove(start..start + length);
                self.withdrawn(frames.start..frames.end.max(frames.start), removed);
            }
            Step::Reserve { start, length } => {
                let (start, length) = part(start, length);
                let end = if length == 0 { start / PAGE } else { (start + length).div_ceil(PAGE) };
                let frames = in_machine(start / PAGE)..in_machine(end);
                let free = self.what[frames.clone()].iter().filter(|is| **is == Is::Free).count();
                let reserved = self.heap.frames().reserve(start..start + length);
                self.withdrawn(frames, reserved.map(|()| free));
            }
        }
        self.find_own();
    }
}

/// Any map has the frames that it should, and no others are ever handed out.
pub fn maps(data: &[u8]) {
    let Some(plan) = decode::<Plan>(data) else { return };
    let entries: Vec<_> = plan.anywhere.iter().map(Anywhere::entry).collect();
    let found: Vec<_> = UsableFrames::new(regions(&entries).into_iter())
        .map(|range| u64::from(range.start.number())..u64::from(range.end.number()))
        .collect();
    assert_eq!(found, usable_frames(&entries));
    Machine::with(|machine| run(machine, &plan));
}

fn run(machine: &Machine, plan: &Plan) {
    let boundaries = plan.boundaries.map(|boundary| START - PAGE + u64::from(boundary) % (BYTES as u64 + 2 * PAGE));
    let heap = kslab::Heap::<Cpus>::with_zones(boundaries);
    let entries: Vec<_> = plan.map.iter().map(Piece::entry).collect();
    let usable = indices(&entries);
    // SAFETY: memory of the machine, and nobody else's.
    match unsafe { heap.init(regions(&entries), machine.base()) } {
        Ok(()) => {}
        Err(InitError::NoUsableMemory) => return assert!(usable.is_empty()),
        Err(InitError::MetadataDoesNotFit { needed, largest }) => {
            return assert!(needed > largest || needed >= usable.len() * FRAME_SIZE);
        }
        Err(error) => panic!("{error}"),
    }
    let mut model = Model { heap: &heap, machine, what: [Is::Unmanaged; FRAMES] };
    model.manage(&usable);
    plan.steps.iter().for_each(|step| model.step(step));
    model.write_to_all();
}
