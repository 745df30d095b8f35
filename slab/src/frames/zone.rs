//! A binary buddy system over page frames (Knuth, TAOCP vol. 1, 2.5).
//!
//! A free block of order k is 2^k frames and starts at a multiple of 2^k. Its buddy is the other half of the block of
//! order k + 1 around it. A request splits the smallest block that is large enough; a freed block merges with its buddy
//! as long as the buddy is a free block of the same order in the same zone. The blocks of an order form a doubly linked
//! list through their records; the memory of a free block is never touched. A request that no block can serve may still
//! get blocks that follow each other.
//!
//! Lock: the caller holds the one around the zone.

#![forbid(unsafe_code)]

use core::ops::Range;

use super::record::{Owner, Record};
use super::records::Records;
use super::types::{length, overlap};
use super::{Frame, Order};
use crate::verify::Broken;

/// How many free blocks are looked at for a run that no single free block can hold.
const SEARCH: usize = 1024;

/// The free blocks of one order.
#[derive(Debug, Clone, Copy)]
struct FreeList {
    first: Option<Frame>,
    blocks: usize,
}

/// What is asked of a zone: `count` frames in a row, not 0, the first aligned to `alignment`, all below `limit`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    count: u32,
    alignment: Order,
    /// A free block of this order surely serves it.
    order: Order,
    limit: Frame,
}

impl Request {
    /// `None` where no block can be as large or aligned.
    pub(crate) fn new(count: u32, alignment: Order, limit: Frame) -> Option<Self> {
        Some(Self { count, alignment, order: Order::containing(count)?.max(alignment), limit })
    }

    pub(crate) fn count(&self) -> usize {
        self.count as usize
    }

    pub(crate) fn limit(&self) -> Frame {
        self.limit
    }

    /// The first place for it in the free frames `run`, as far as they lie below `end`.
    fn place_in(&self, run: &Range<Frame>, end: Frame) -> Option<Frame> {
        let first = run.start.number().checked_next_multiple_of(self.alignment.frames())?;
        let last = first.checked_add(self.count)?;
        (last <= run.end.min(end).number()).then(|| Frame::new(first))
    }
}

/// A part of the physical address space and its free blocks.
#[derive(Debug)]
pub(crate) struct Zone {
    /// No block, free or allocated by order, reaches beyond it.
    range: Range<Frame>,
    /// The lowest frame that was ever managed; the end of the zone while there is none.
    lowest: Frame,
    lists: [FreeList; Order::COUNT],
    free_frames: usize,
    total_frames: usize,
}

impl Zone {
    /// Without any memory.
    pub(crate) const fn new(range: Range<Frame>) -> Self {
        let lists = [FreeList { first: None, blocks: 0 }; Order::COUNT];
        Self { lowest: range.end, range, lists, free_frames: 0, total_frames: 0 }
    }

    pub(crate) fn range(&self) -> Range<Frame> {
        self.range.clone()
    }

    pub(crate) fn free_frames(&self) -> usize {
        self.free_frames
    }

    pub(crate) fn total_frames(&self) -> usize {
        self.total_frames
    }

    pub(crate) fn free_blocks(&self) -> [usize; Order::COUNT] {
        self.lists.map(|list| list.blocks)
    }

    /// Whether it has memory below `limit`.
    pub(crate) fn is_populated_below(&self, limit: Frame) -> bool {
        self.total_frames > 0 && self.lowest < limit
    }

    /// Counts `range` as managed from now on; its frames are not free yet.
    pub(crate) fn manage(&mut self, range: &Range<Frame>) {
        self.total_frames += length(range) as usize;
        self.lowest = self.lowest.min(range.start);
    }

    /// Counts so many frames, which were taken, as managed no more.
    pub(crate) fn unmanage(&mut self, frames: usize) {
        self.total_frames -= frames;
    }

    /// Allocates what `request` asks for, and no more; its first record says so.
    pub(crate) fn allocate(&mut self, records: &Records, request: &Request) -> Option<Frame> {
        let frame = self.find(records, request)?;
        self.take(records, frame..frame.offset(request.count));
        records.set_owner(frame, Owner::Pages(request.count));
        Some(frame)
    }

    /// Where `request` can be had: at the start of the smallest block that surely holds it; else among free blocks that
    /// follow each other but are no buddies.
    ///
    /// The second search is for what buddies alone could not give, such as half of all memory when a single frame in
    /// the middle of it is taken. It is bounded. With a limit inside the zone the first one goes over all blocks that
    /// are large enough, if it must.
    fn find(&self, records: &Records, request: &Request) -> Option<Frame> {
        let end = request.limit.min(self.range.end);
        let block_of = |order: Order| move |start: Frame| start..start.offset(order.frames());
        let whole = request.order.and_up().flat_map(|order| self.blocks(records, order).map(block_of(order)));
        whole.into_iter().find_map(|block| request.place_in(&block, end)).or_else(|| {
            // Among so many frames in a row is an aligned block of at least a quarter as many.
            let parts = Order::within(request.count).smaller().and_up();
            let mut blocks = parts.flat_map(|order| self.blocks(records, order).map(block_of(order))).take(SEARCH);
            blocks.find_map(|block| request.place_in(&self.run_around(records, block, request.count), end))
        })
    }

    /// The free frames around the free block `block`, as far as about `most` to both sides.
    fn run_around(&self, records: &Records, block: Range<Frame>, most: u32) -> Range<Frame> {
        let mut run = block.clone();
        while length(&(run.start..block.start)) < most
            && let Some(before) = self.block_before(records, run.start)
        {
            run.start = before;
        }
        while length(&(block.end..run.end)) < most
            && let Owner::Free(order) = records.owner(run.end)
            && self.range.contains(&run.end)
        {
            run.end = run.end.offset(order.frames());
        }
        run
    }

    /// Where the free block starts that ends before `frame`.
    fn block_before(&self, records: &Records, frame: Frame) -> Option<Frame> {
        let last = Frame::new(frame.number().checked_sub(1)?);
        (last >= self.range.start).then(|| self.block_around(records, last))?.map(|block| block.start)
    }

    fn links(&self, records: &Records, order: Order) -> impl Iterator<Item = Frame> {
        core::iter::successors(self.lists[order.index()].first, |frame| records.get(*frame)?.next())
    }

    /// The free blocks of an order, up to the first link that leads elsewhere.
    fn blocks(&self, records: &Records, order: Order) -> impl Iterator<Item = Frame> {
        self.links(records, order).take_while(move |frame| {
            let free = records.owner(*frame) == Owner::Free(order);
            if !free {
                records.note_damage(*frame);
            }
            free
        })
    }

    /// The first frame of `range` that is not free.
    pub(crate) fn first_taken(&self, records: &Records, range: Range<Frame>) -> Option<Frame> {
        let mut frame = range.start;
        while frame < range.end {
            let Some(block) = self.block_around(records, frame) else { return Some(frame) };
            frame = block.end;
        }
        None
    }

    /// The free block that `frame` lies in.
    pub(crate) fn block_around(&self, records: &Records, frame: Frame) -> Option<Range<Frame>> {
        Order::ZERO.and_up().find_map(|order| {
            let start = frame.block_start(order);
            let Owner::Free(size) = records.owner(start) else { return None };
            (size >= order && start >= self.range.start).then(|| start..start.offset(size.frames()))
        })
    }

    /// Takes all of `range`, which is free, out of the free blocks. Its records say [`Owner::Inner`].
    pub(crate) fn take(&mut self, records: &Records, range: Range<Frame>) {
        let mut frame = range.start;
        while frame < range.end {
            let Some(block) = self.block_around(records, frame) else { return };
            self.unlink(records, block.start);
            self.release(records, block.start..frame);
            self.release(records, range.end.max(frame)..block.end);
            frame = block.end;
        }
    }

    /// Takes a block of at most `most` frames, the largest that there is.
    pub(crate) fn take_largest(&mut self, records: &Records, most: u32) -> Option<Range<Frame>> {
        let first = self.lists.iter().rev().find_map(|list| list.first)?;
        let block = self.block_around(records, first)?;
        let taken = first..first.offset(length(&block).min(most));
        self.take(records, taken.clone());
        Some(taken)
    }

    /// Frees all of `range`, whose records say [`Owner::Inner`].
    pub(crate) fn release(&mut self, records: &Records, range: Range<Frame>) {
        let (mut frame, end) = (range.start, range.end);
        while frame < end {
            let order = frame.alignment().min(Order::within(end.number() - frame.number()));
            self.release_block(records, frame, order);
            frame = frame.offset(order.frames());
        }
    }

    /// Frees one block, which is aligned, and merges it as far as it goes.
    fn release_block(&mut self, records: &Records, mut frame: Frame, mut order: Order) {
        while let Some(larger) = order.larger() {
            let buddy = frame.buddy(order);
            if records.owner(buddy) != Owner::Free(order) || !self.range.contains(&buddy) {
                break;
            }
            self.unlink(records, buddy);
            frame = frame.min(buddy);
            order = larger;
        }
        self.push(records, frame, order);
    }

    fn push(&mut self, records: &Records, frame: Frame, order: Order) {
        let Some(record) = records.get(frame) else { return };
        let list = &mut self.lists[order.index()];
        record.set_next(list.first);
        record.set_previous(None);
        record.set_owner(Owner::Free(order));
        if let Some(next) = list.first.and_then(|next| records.get(next)) {
            next.set_previous(Some(frame));
        }
        list.first = Some(frame);
        list.blocks += 1;
        self.free_frames += order.frames() as usize;
    }

    /// Takes the free block that starts at `frame` out of its list.
    fn unlink(&mut self, records: &Records, frame: Frame) {
        let Some(record) = records.get(frame) else { return };
        let Owner::Free(order) = record.owner() else { return };
        let list = &mut self.lists[order.index()];
        // A neighbour that does not know this block is none: something wrote over a link. Then the list ends here.
        let is_free = |neighbour: &Frame| records.owner(*neighbour) == Owner::Free(order);
        let knows = |neighbour: Option<Frame>, back: fn(&Record) -> Option<Frame>| {
            let record = neighbour.filter(is_free).and_then(|neighbour| records.get(neighbour));
            record.filter(|record| back(record) == Some(frame))
        };
        let (next, previous) = (knows(record.next(), Record::previous), knows(record.previous(), Record::next));
        let is_first = list.first == Some(frame);
        let known = (next.is_some(), previous.is_some()) == (record.next().is_some(), record.previous().is_some());
        if !known || previous.is_some() == is_first {
            records.note_damage(frame);
        }
        let kept = record.next().filter(|_| next.is_some());
        match previous {
            Some(previous) => previous.set_next(kept),
            None if is_first => list.first = kept,
            None => {}
        }
        if let Some(next) = next {
            next.set_previous(record.previous().filter(|_| previous.is_some()));
        }
        record.set_owner(Owner::Inner);
        list.blocks = list.blocks.saturating_sub(1);
        self.free_frames = self.free_frames.saturating_sub(order.frames() as usize);
    }

    /// Checks the lists of free blocks.
    pub(crate) fn verify(&self, records: &Records) -> Result<(), Broken> {
        let mut free = 0;
        for order in Order::ZERO.and_up() {
            let list = &self.lists[order.index()];
            let (mut previous, mut blocks) = (None, 0);
            // One more than there should be, so that a ring is found and ends.
            for frame in self.links(records, order).take(list.blocks + 1) {
                self.verify_block(records, frame, order, previous)?;
                previous = Some(frame);
                blocks += 1;
            }
            if blocks != list.blocks {
                return Err(Broken::FreeListLength { order, expected: list.blocks, found: blocks });
            }
            free += blocks * order.frames() as usize;
        }
        if free == self.free_frames {
            Ok(())
        } else {
            Err(Broken::FrameCount { expected: self.free_frames, found: free })
        }
    }

    fn verify_block(
        &self,
        records: &Records,
        frame: Frame,
        order: Order,
        previous: Option<Frame>,
    ) -> Result<(), Broken> {
        let block = frame..frame.offset(order.frames());
        if frame.alignment() < order || overlap(&block, &self.range) != block {
            return Err(Broken::FreeBlockPlace { frame, order });
        }
        if records.owner(frame) != Owner::Free(order) {
            return Err(Broken::FreeBlockOwner { frame, order });
        }
        if records.get(frame).and_then(|record| record.previous()) != previous {
            return Err(Broken::FreeListLink { frame });
        }
        let buddy = frame.buddy(order);
        let apart = order == Order::MAX || records.owner(buddy) != Owner::Free(order) || !self.range.contains(&buddy);
        if apart { Ok(()) } else { Err(Broken::NotMerged { frame, order }) }
    }
}
