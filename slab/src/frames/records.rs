//! Where the frame records are, so that the record of any frame is found with no lock held.
//!
//! The records of the largest range at `init` are one table, the *direct* one, in that range's end; those of at most
//! sixteen frames lie in the allocator itself. A large table has two parts: the *high* one, of the frames in the highest zone
//! that it reaches into, which serves most requests, and the *low* one, of those before. Each is set up from its start on as
//! the memory is needed, so that `init` takes no longer with more of it, and records of what nobody uses take no memory.
//!
//! All others are in a radix tree over the frame number, whose nodes are page frames: a leaf has the 256 records of 1 MiB,
//! above it are two levels of 512 pointers, and a root of 64. So a hole of terabytes costs nothing.
//!
//! Invariants:
//! 1. A pointer in the tree is null or points to a node that was whole before the pointer was stored (release and acquire),
//!    and that stays where it is until [`dismantle`](Records::dismantle). `direct` has room for `planned` records, `high` is in
//!    it, and of each part so many are set up as `low_frames` and `high_frames` say; both are stored before these.
//! 2. Nodes and tables lie in frames that nobody else uses, and are only ever accessed through shared references.
//! 3. Only one caller at a time adds nodes; see `Frames::changing`.
//!
//! Locks: none.

use crate::sync::Ordering::{Acquire, Relaxed, Release};
use crate::sync::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize};
use core::ops::Range;

use super::record::{Owner, Record};
use super::types::{length, overlap};
use super::{Frame, Order};
use crate::memory::FRAME_SIZE;

const LEAF_BITS: u32 = 8;
const NODE_BITS: u32 = 9;
const LOWER_SHIFT: u32 = LEAF_BITS + NODE_BITS;
const UPPER_SHIFT: u32 = LOWER_SHIFT + NODE_BITS;
const ROOT_ENTRIES: usize = 1 << (u32::BITS - UPPER_SHIFT);

/// Of so many frames, aligned, the records are set up at a time: a large page. They have 8 KiB.
pub(crate) const SECTION: u32 = Order::LARGE_PAGE.frames();

/// The records of 1 MiB.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Leaf([Record; 1 << LEAF_BITS]);

/// Pointers to the nodes of the level below. All bytes zero is one without children.
#[derive(Debug)]
#[repr(C, align(4096))]
struct Node<T>([AtomicPtr<T>; 1 << NODE_BITS]);

type Lower = Node<Leaf>;
type Upper = Node<Lower>;

const _: () = assert!(size_of::<Leaf>() == FRAME_SIZE && size_of::<Lower>() == FRAME_SIZE);

/// All frame records.
#[derive(Debug)]
pub(crate) struct Records {
    /// The first frame of the direct table.
    direct_first: AtomicU32,
    /// Null where the records are in `inline`.
    direct: AtomicPtr<Record>,
    /// Of how many frames the low part has records by now.
    low_frames: AtomicU32,
    /// The first frame of the high part, of how many it has records by now, and where the first is.
    high_first: AtomicU32,
    high_frames: AtomicU32,
    high: AtomicPtr<Record>,
    /// Where the first frame of the high part is, and how many bytes the frames have whose records are set up.
    start: AtomicPtr<u8>,
    bytes: AtomicUsize,
    /// How many frames the direct table is for, or `inline`; 0 before there is one.
    planned: AtomicU32,
    /// The first of the frames of tables in the end of the direct range.
    tables: AtomicU32,
    /// Somebody is setting up records.
    setting_up: AtomicBool,
    inline: [Record; Self::INLINE as usize],
    /// A frame whose record was found overwritten, which nobody has reported yet.
    damaged: AtomicU32,
    root: [AtomicPtr<Upper>; ROOT_ENTRIES],
}

/// Entry `index` of the node that `slot` points to. No reference to a whole node is made: nodes are large, entries are
/// few.
fn entry<T>(slot: &AtomicPtr<Node<T>>, index: usize) -> Option<&AtomicPtr<T>> {
    let node = slot.load(Acquire);
    if node.is_null() {
        return None;
    }
    // SAFETY: a whole node that stays (invariant 1), never accessed but by shared references (2).
    Some(unsafe { &(*node).0[index] })
}

fn in_node(frame: Frame, shift: u32) -> usize {
    (frame.number() >> shift) as usize % (1 << NODE_BITS)
}

fn in_leaf(frame: Frame) -> usize {
    frame.number() as usize % (1 << LEAF_BITS)
}

impl Records {
    /// The records of so many frames need no memory.
    pub(crate) const INLINE: u32 = 16;

    pub(crate) const fn new() -> Self {
        Self {
            direct_first: AtomicU32::new(0),
            direct: AtomicPtr::new(core::ptr::null_mut()),
            low_frames: AtomicU32::new(0),
            high_first: AtomicU32::new(0),
            high_frames: AtomicU32::new(0),
            high: AtomicPtr::new(core::ptr::null_mut()),
            start: AtomicPtr::new(core::ptr::null_mut()),
            bytes: AtomicUsize::new(0),
            planned: AtomicU32::new(0),
            tables: AtomicU32::new(0),
            setting_up: AtomicBool::new(false),
            inline: [const { Record::inner() }; Self::INLINE as usize],
            damaged: AtomicU32::new(Frame::NONE),
            root: [const { AtomicPtr::new(core::ptr::null_mut()) }; ROOT_ENTRIES],
        }
    }

    /// The record of `frame` was overwritten: to be reported when no lock is held.
    #[cold]
    pub(crate) fn note_damage(&self, frame: Frame) {
        self.damaged.store(frame.number(), Relaxed);
    }

    /// What [`note_damage`](Self::note_damage) has noted, once.
    #[inline]
    pub(crate) fn take_damage(&self) -> Option<Frame> {
        if self.damaged.load(Relaxed) == Frame::NONE {
            return None;
        }
        Frame::some(self.damaged.swap(Frame::NONE, Relaxed))
    }

    /// Frames that the direct table of so many frames takes.
    pub(crate) fn direct_size(frames: u32) -> u32 {
        match frames {
            0..=Self::INLINE => 0,
            _ => frames.div_ceil((FRAME_SIZE / size_of::<Record>()) as u32),
        }
    }

    /// Whether there is no memory yet.
    pub(crate) fn are_empty(&self) -> bool {
        self.planned.load(Acquire) == 0
    }

    /// What `look` says of the record of the frame that `pointer` points into, if that is in the high part of the direct
    /// table: in the fewest steps.
    #[inline]
    pub(crate) fn direct<T>(&self, pointer: *const u8, look: impl FnOnce(&Record) -> Option<T>) -> Option<T> {
        let (bytes, start) = (self.bytes.load(Acquire), self.start.load(Relaxed));
        let offset = pointer.addr().wrapping_sub(start.addr());
        if offset >= bytes {
            return None;
        }
        // SAFETY: each frame of so many bytes has a record in the high part (invariants 1 and 2).
        look(unsafe { &*self.high.load(Relaxed).add(offset / FRAME_SIZE) })
    }

    /// The record of `frame`; `None` where nothing near it was ever managed.
    #[inline]
    pub(crate) fn get(&self, frame: Frame) -> Option<&Record> {
        let frames = self.high_frames.load(Acquire);
        let index = frame.number().wrapping_sub(self.high_first.load(Relaxed));
        if index < frames {
            // SAFETY: the high part has more records than `index` (invariants 1 and 2).
            return Some(unsafe { &*self.high.load(Relaxed).add(index as usize) });
        }
        self.get_elsewhere(frame)
    }

    /// The same, where it is not in the high part, or not yet.
    #[inline(never)]
    fn get_elsewhere(&self, frame: Frame) -> Option<&Record> {
        let index = frame.number().wrapping_sub(self.direct_first.load(Relaxed));
        if index < self.planned.load(Acquire) {
            return self.row(frame..frame.offset(1)).0?.first();
        }
        let leaf = self.leaf_slot(frame)?.load(Acquire);
        if leaf.is_null() {
            return None;
        }
        // SAFETY: a whole leaf that stays (invariant 1), never accessed but by shared references (2).
        Some(unsafe { &(*leaf).0[in_leaf(frame)] })
    }

    /// Where the leaf of `frame` is, or would be; `None` where there is not so much as a node for it.
    fn leaf_slot(&self, frame: Frame) -> Option<&AtomicPtr<Leaf>> {
        entry(self.lower_slot(frame)?, in_node(frame, LEAF_BITS))
    }

    fn lower_slot(&self, frame: Frame) -> Option<&AtomicPtr<Lower>> {
        entry(self.upper_slot(frame), in_node(frame, LOWER_SHIFT))
    }

    fn upper_slot(&self, frame: Frame) -> &AtomicPtr<Upper> {
        &self.root[(frame.number() >> UPPER_SHIFT) as usize]
    }

    /// Who owns `frame`.
    #[inline]
    pub(crate) fn owner(&self, frame: Frame) -> Owner {
        self.get(frame).map_or(Owner::Unmanaged, Record::owner)
    }

    /// Whether just `owner` owns `frame`.
    #[inline]
    pub(crate) fn is(&self, frame: Frame, owner: Owner) -> bool {
        self.get(frame).is_some_and(|record| record.is(owner))
    }

    /// Changes who owns `frame`, which has a record.
    #[inline]
    pub(crate) fn set_owner(&self, frame: Frame, owner: Owner) {
        if let Some(record) = self.get(frame) {
            record.set_owner(owner);
        }
    }

    /// Changes who owns each frame of `range`.
    pub(crate) fn set_all(&self, range: Range<Frame>, owner: Owner) {
        self.rows(range).for_each(|(_, row)| row.iter().for_each(|record| record.set_owner(owner)));
    }

    /// The frames of `range` that are managed.
    pub(crate) fn managed(&self, range: Range<Frame>) -> impl Iterator<Item = (Frame, Owner)> {
        let owners = self.rows(range).flat_map(|(first, row)| {
            // In this order, so that the numbers do not pass their end.
            row.iter().zip(first.number()..).map(|(record, number)| (Frame::new(number), record.owner()))
        });
        owners.filter(|(_, owner)| *owner != Owner::Unmanaged)
    }

    /// The records of `range`, in rows that lie together, each with its first frame. Where there are none, time goes by
    /// the megabyte or more, not by the frame.
    pub(crate) fn rows(&self, mut range: Range<Frame>) -> impl Iterator<Item = (Frame, &[Record])> {
        core::iter::from_fn(move || {
            while range.start < range.end {
                let first = range.start;
                let (row, frames) = self.row(range.clone());
                range.start = first.offset(frames);
                if let Some(row) = row {
                    return Some((first, row));
                }
            }
            None
        })
    }

    /// The records from the start of `range` on that lie in one row, or how many frames have none.
    fn row(&self, range: Range<Frame>) -> (Option<&[Record]>, u32) {
        let (start, planned) = (range.start, self.planned.load(Acquire));
        let first = self.direct_first.load(Relaxed);
        let index = start.number().wrapping_sub(first);
        if index < planned {
            let length = length(&range).min(planned - index);
            let table = self.direct.load(Relaxed);
            if table.is_null() {
                return (self.inline.get(index as usize..(index + length) as usize), length);
            }
            let low = self.high_first.load(Relaxed) - first;
            let (there, length) = match index < low {
                true => (self.low_frames.load(Acquire), length.min(low - index)),
                false => (low + self.high_frames.load(Acquire), length),
            };
            let length = match there.saturating_sub(index) {
                0 => return (None, length),
                there => length.min(there),
            };
            // SAFETY: the direct table has so many records from `index` on (invariants 1 and 2).
            let row = unsafe { core::slice::from_raw_parts(table.add(index as usize), length as usize) };
            return (Some(row), length);
        }
        // The direct table's records count, not those in a leaf that it shares a megabyte with.
        let ahead = if planned > 0 && first > start.number() { first - start.number() } else { u32::MAX };
        let until = |shift: u32| length(&range).min(ahead).min((1 << shift) - start.number() % (1 << shift));
        let Some(lower) = self.lower_slot(start) else { return (None, until(UPPER_SHIFT)) };
        let Some(leaf) = entry(lower, in_node(start, LEAF_BITS)) else { return (None, until(LOWER_SHIFT)) };
        // SAFETY: null or a whole leaf that stays (invariant 1), never accessed but by shared references (2).
        let leaf = unsafe { leaf.load(Acquire).as_ref() };
        let length = until(LEAF_BITS);
        (leaf.map(|leaf| &leaf.0[in_leaf(start)..][..length as usize]), length)
    }

    /// Makes room for the records of `range` in the direct table; they are still to be [set up](Self::set_up), unless the
    /// table needs no memory.
    ///
    /// # Safety
    ///
    /// There is none yet. The high part begins with `high`, a frame of `range` that is at `start`, and the end of `range` from
    /// `tables` on is for tables. At `table`, aligned to a frame, are as many frames as [`direct_size`](Self::direct_size)
    /// says, the allocator's own until [`dismantle`](Self::dismantle).
    pub(crate) unsafe fn set_direct(
        &self,
        range: Range<Frame>,
        high: Frame,
        tables: Frame,
        start: *mut u8,
        table: *mut u8,
    ) {
        let (frames, table) = (length(&range), table.cast::<Record>());
        if frames > Self::INLINE {
            self.direct.store(table, Relaxed);
        }
        self.direct_first.store(range.start.number(), Relaxed);
        self.high.store(table.wrapping_add(length(&(range.start..high)) as usize), Relaxed);
        self.high_first.store(high.number(), Relaxed);
        self.start.store(start, Relaxed);
        self.tables.store(tables.number(), Relaxed);
        self.planned.store(frames, Release);
    }

    /// The free frames of the low and of the high part whose records are not set up. Each of the two ranges is in one zone,
    /// and no zone has frames of both.
    #[inline]
    pub(crate) fn later(&self) -> [Range<Frame>; 2] {
        let (tables, high) = (Frame::new(self.tables.load(Relaxed)), Frame::new(self.high_first.load(Relaxed)));
        if self.direct.load(Relaxed).is_null() {
            return [high..high, tables..tables];
        }
        let low = Frame::new(self.direct_first.load(Relaxed)).offset(self.low_frames.load(Acquire));
        [low..high, high.offset(self.high_frames.load(Acquire)).min(tables)..tables]
    }

    /// Those in `range`, which is in one zone.
    #[inline]
    pub(crate) fn later_in(&self, range: &Range<Frame>) -> Range<Frame> {
        let [low, high] = self.later().map(|later| overlap(&later, range));
        if low.is_empty() { high } else { low }
    }

    /// Sets up the records of the part that reaches to `end` or beyond it, up to there, or if that leaves none but those of
    /// the tables, all. They say [`Owner::Inner`], and the tables' [`Owner::Records`]. `false`, and nothing done, where another
    /// call is under way.
    pub(crate) fn set_up(&self, end: Frame) -> bool {
        if self.setting_up.swap(true, Acquire) {
            return false;
        }
        let [low, high] = self.later();
        let make = |range: Range<Frame>, table: &AtomicPtr<Record>, made: &AtomicU32| {
            let before = made.load(Relaxed);
            // SAFETY: the table has room for a record a frame (invariant 1), and nobody looks at these yet; all bytes zero is
            // a valid one.
            unsafe { table.load(Relaxed).add(before as usize).write_bytes(0, length(&range) as usize) };
            made.store(before + length(&range), Release);
        };
        let all = Frame::new(self.direct_first.load(Relaxed)).offset(self.planned.load(Relaxed));
        let made = Frame::new(self.high_first.load(Relaxed)).offset(self.high_frames.load(Relaxed));
        let high_end = if end < high.end { end } else { all };
        if end <= low.end {
            if low.start < end {
                make(low.start..end, &self.direct, &self.low_frames);
            }
        } else if made < high_end && !self.direct.load(Relaxed).is_null() {
            make(made..high_end, &self.high, &self.high_frames);
            self.bytes.store(self.high_frames.load(Relaxed) as usize * FRAME_SIZE, Release);
            self.set_all(high.end.min(high_end)..high_end, Owner::Records);
        }
        self.setting_up.store(false, Release);
        true
    }

    /// Adds to the tree what is missing for `range`, each node from `page`. New records are [`Owner::Unmanaged`].
    /// `None` where there is no page for a node; it is then missing still.
    ///
    /// # Safety
    ///
    /// `page` returns the start of another frame at each call, the allocator's own until [`dismantle`](Self::dismantle). No
    /// other call is under way.
    pub(crate) unsafe fn cover(&self, range: Range<Frame>, page: &mut impl FnMut() -> Option<*mut u8>) -> Option<()> {
        for frame in self.beside_direct(range).flat_map(leaves) {
            // SAFETY: `page` returns frames that are ours for good, says the caller.
            fill(self.upper_slot(frame), || Some(unsafe { new_node(page()?) }))?;
            // SAFETY: as above.
            fill(self.lower_slot(frame)?, || Some(unsafe { new_node(page()?) }))?;
            // SAFETY: as above.
            fill(self.leaf_slot(frame)?, || Some(unsafe { new_leaf(page()?) }))?;
        }
        Some(())
    }

    /// What of `range` has no record in the direct table: up to two ranges.
    fn beside_direct(&self, range: Range<Frame>) -> impl Iterator<Item = Range<Frame>> + use<> {
        let first = Frame::new(self.direct_first.load(Relaxed));
        let end = first.offset(self.planned.load(Acquire));
        let parts = [range.start..range.end.min(first), range.start.max(end)..range.end];
        parts.into_iter().filter(|part| !part.is_empty())
    }

    /// How many nodes [`cover`](Self::cover) will take for `ranges`, which ascend.
    pub(crate) fn missing(&self, ranges: impl Iterator<Item = Range<Frame>>) -> u32 {
        let mut nodes = 0;
        let mut last: Option<Frame> = None;
        for frame in ranges.flat_map(|range| self.beside_direct(range)).flat_map(leaves) {
            let new = |shift: u32| last.is_none_or(|last| last.number() >> shift != frame.number() >> shift);
            let (lower, leaf) = (self.lower_slot(frame), self.leaf_slot(frame));
            nodes += u32::from(new(UPPER_SHIFT) && lower.is_none());
            nodes += u32::from(new(LOWER_SHIFT) && leaf.is_none());
            nodes += u32::from(new(LEAF_BITS) && leaf.is_none_or(|leaf| leaf.load(Acquire).is_null()));
            last = Some(frame);
        }
        nodes
    }

    /// Gives the frames of all nodes and of the direct table back, a node after those below it, and is as new.
    ///
    /// # Safety
    ///
    /// Nobody else uses any record, now or until `give` has returned for the last time.
    pub(crate) unsafe fn dismantle(&self, give: &mut dyn FnMut(*mut u8)) {
        for upper in &self.root {
            take_node(upper, give, |lower, give| take_node(lower, give, |leaf, give| take(leaf, give)));
        }
        let table = self.direct.swap(core::ptr::null_mut(), Relaxed).cast::<u8>();
        self.bytes.store(0, Relaxed);
        self.low_frames.store(0, Relaxed);
        self.high_frames.store(0, Relaxed);
        let pages = Self::direct_size(self.planned.swap(0, Relaxed)) as usize;
        (0..pages).for_each(|page| give(table.wrapping_add(page * FRAME_SIZE)));
        self.inline.iter().for_each(|record| record.set_owner(Owner::Inner));
    }
}

/// The first frame of each leaf that `range` touches.
fn leaves(range: Range<Frame>) -> impl Iterator<Item = Frame> {
    let (first, end) = (range.start.number() >> LEAF_BITS, range.end.number().div_ceil(1 << LEAF_BITS));
    (first..end).map(|leaf| Frame::new(leaf << LEAF_BITS))
}

/// A node without children in the frame at `page`.
///
/// # Safety
///
/// The frame is the caller's alone.
unsafe fn new_node<T>(page: *mut u8) -> *mut Node<T> {
    // SAFETY: a node is as large as a frame; all bytes zero is a valid one.
    unsafe { page.write_bytes(0, FRAME_SIZE) };
    page.cast()
}

/// A leaf of unmanaged frames in the frame at `page`.
///
/// # Safety
///
/// The frame is the caller's alone.
unsafe fn new_leaf(page: *mut u8) -> *mut Leaf {
    for index in 0..1 << LEAF_BITS {
        // SAFETY: a leaf's records fill a frame.
        unsafe { page.cast::<Record>().add(index).write(Record::unmanaged()) };
    }
    page.cast()
}

/// Stores in `slot` what `new` makes, if there is nothing. `None` where `new` could not.
fn fill<T>(slot: &AtomicPtr<T>, new: impl FnOnce() -> Option<*mut T>) -> Option<()> {
    if slot.load(Acquire).is_null() {
        slot.store(new()?, Release);
    }
    Some(())
}

/// Gives the frame of the node in `slot` back, after `below` has done so with each of the node's children.
fn take_node<T>(
    slot: &AtomicPtr<Node<T>>,
    give: &mut dyn FnMut(*mut u8),
    below: impl Fn(&AtomicPtr<T>, &mut dyn FnMut(*mut u8)),
) {
    (0..1 << NODE_BITS).map_while(|index| entry(slot, index)).for_each(|child| below(child, give));
    take(slot, give);
}

fn take<T>(slot: &AtomicPtr<T>, give: &mut dyn FnMut(*mut u8)) {
    let node = slot.swap(core::ptr::null_mut(), Acquire);
    if !node.is_null() {
        give(node.cast());
    }
}
