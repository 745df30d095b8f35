//! A binary buddy system over page frames (Knuth, TAOCP vol. 1, 2.5).
//!
//! A free block of order k is 2^k frames and starts at a multiple of 2^k. Its buddy is the other half of the block of
//! order k + 1 around it. A request splits the smallest block that is large enough; a freed block merges with its buddy
//! as long as the buddy is a free block of the same order in the same zone. The blocks of an order form a doubly linked
//! list through their records; the memory of a free block is never touched. A request that no block can serve may still
//! get blocks that follow each other.
//!
//! A few freed blocks of each order but the lowest wait in a stock, unmerged, since their order is often asked for again
//! (the lazy buddy system of Barkley & Lee, 1989). Where there is no other block for a request, they merge first. Single
//! frames have the stocks of the CPUs.
//!
//! Lock: the caller holds the one around the zone.

#![forbid(unsafe_code)]

use core::array;
use core::ops::Range;

use super::record::Owner;
use super::records::{Records, SECTION};
use super::types::{each, length, overlap};
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

/// How many loose frames before and behind another are freed with it.
const LOOSE: u32 = 64;

/// How many blocks of an order wait unmerged.
const STOCKED: usize = 8;
/// From order 1 up to this one: 2 MiB, which is a large page.
const HIGHEST_STOCKED: usize = Order::LARGE_PAGE.index();

/// Free blocks of one order that have not merged. Their records say [`Owner::Stock`].
#[derive(Debug, Clone, Copy)]
struct Stock {
    count: usize,
    blocks: [Frame; STOCKED],
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

/// The largest blocks that `range` consists of, in ascending order.
fn whole_blocks(range: Range<Frame>) -> impl Iterator<Item = (Frame, Order)> {
    let mut frame = range.start;
    core::iter::from_fn(move || {
        let first = frame;
        let order = first
            .alignment()
            .min(Order::within(range.end.number().checked_sub(first.number()).filter(|left| *left > 0)?));
        frame = first.offset(order.frames());
        Some((first, order))
    })
}

/// A part of the physical address space and its free blocks.
#[derive(Debug)]
pub(crate) struct Zone {
    /// No block, free or allocated by order, reaches beyond it.
    range: Range<Frame>,
    /// The lowest frame that was ever managed; the end of the zone while there is none.
    lowest: Frame,
    lists: [FreeList; Order::COUNT],
    /// A bit for each order that has free blocks.
    filled: u32,
    stocks: [Stock; HIGHEST_STOCKED],
    /// Those in the stocks too.
    free_frames: usize,
    total_frames: usize,
}

impl Zone {
    /// Without any memory.
    pub(crate) const fn new(range: Range<Frame>) -> Self {
        let lists = [FreeList { first: None, blocks: 0 }; Order::COUNT];
        let stocks = [Stock { count: 0, blocks: [Frame::new(0); STOCKED] }; HIGHEST_STOCKED];
        Self { lowest: range.end, range, lists, filled: 0, stocks, free_frames: 0, total_frames: 0 }
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

    /// Free blocks by their order, but for those in the stocks. What has no records yet counts as if it had merged.
    pub(crate) fn free_blocks(&self, records: &Records) -> [usize; Order::COUNT] {
        let mut blocks = self.lists.map(|list| list.blocks);
        let mut run = self.later(records);
        while !run.is_empty()
            && let Some(before) = self.block_before(records, run.start)
        {
            let order = Order::within(length(&(before..run.start)));
            blocks[order.index()] = blocks[order.index()].saturating_sub(1);
            run.start = before;
        }
        whole_blocks(run).for_each(|(_, order)| blocks[order.index()] += 1);
        blocks
    }

    /// The free frames of the zone that have no records yet.
    fn later(&self, records: &Records) -> Range<Frame> {
        records.later_in(&self.range)
    }

    /// Sets up the records of some more frames, below `limit`, so that they can be allocated; `false` where there are
    /// none.
    pub(crate) fn set_up(&mut self, records: &Records, limit: Frame) -> bool {
        let later = self.later(records);
        let section = later.start..later.end.min(later.start.block_start(Order::LARGE_PAGE).offset(SECTION));
        if section.is_empty() || section.start >= limit || !records.set_up(section.end) {
            return false;
        }
        self.free_frames = self.free_frames.saturating_sub(length(&section) as usize);
        self.merge_all(records, section);
        true
    }

    /// Whether it has memory below `limit`.
    pub(crate) fn is_populated_below(&self, limit: Frame) -> bool {
        self.total_frames > 0 && self.lowest < limit
    }

    /// Counts `range` as managed from now on. Its frames are not free yet, but for those in `later`.
    pub(crate) fn manage(&mut self, range: &Range<Frame>, later: &Range<Frame>) {
        self.total_frames += length(range) as usize;
        self.free_frames += length(later) as usize;
        self.lowest = self.lowest.min(range.start);
    }

    /// Counts so many frames, which were taken, as managed no more.
    pub(crate) fn unmanage(&mut self, frames: usize) {
        self.total_frames -= frames;
    }

    /// Allocates what `request` asks for, and no more; its first record says so. Only whole blocks are looked at.
    pub(crate) fn allocate(&mut self, records: &Records, request: &Request) -> Option<Frame> {
        let frame = self
            .split(records, request)
            .or_else(|| if self.merge_stocks(records) { self.split(records, request) } else { None })?;
        records.set_owner(frame, Owner::Pages(request.count));
        Some(frame)
    }

    /// The same from wherever there is room.
    pub(crate) fn allocate_anywhere(&mut self, records: &Records, request: &Request) -> Option<Frame> {
        let frame = self.find(records, request)?;
        self.take(records, frame..frame.offset(request.count));
        records.set_owner(frame, Owner::Pages(request.count));
        Some(frame)
    }

    /// Fills `frames` from its start with single frames, at most `most`, and says with how many. They are `owner`'s.
    pub(crate) fn allocate_bulk(
        &mut self,
        records: &Records,
        frames: &mut [Frame],
        most: usize,
        owner: Owner,
    ) -> usize {
        let wanted = frames.len().min(most);
        let mut filled = 0;
        while filled < wanted {
            let order = Order::new(self.filled.trailing_zeros());
            let Some((first, order)) = order.and_then(|order| self.pop(records, order)) else {
                if self.merge_stocks(records) || self.set_up(records, self.range.end) {
                    continue;
                }
                break;
            };
            let end = first.offset(order.frames());
            let taken = first..end.min(first.offset((wanted - filled) as u32));
            self.merge_all(records, taken.end..end);
            records.set_all(taken.clone(), owner);
            for frame in each(taken) {
                frames[filled] = frame;
                filled += 1;
            }
        }
        filled
    }

    /// The first free block of `order`; `None` where there is none, and where the list is broken.
    fn pop(&mut self, records: &Records, order: Order) -> Option<(Frame, Order)> {
        let first = self.lists[order.index()].first?;
        if !records.is(first, Owner::Free(order)) {
            records.note_damage(first);
            return None;
        }
        self.unlink(records, first, order);
        Some((first, order))
    }

    /// A block of `order` that waits in its stock. It is allocated from now on.
    #[inline]
    pub(crate) fn take_stocked(&mut self, records: &Records, order: Order) -> Option<Frame> {
        let stock = self.stocks.get_mut(order.index().wrapping_sub(1))?;
        let last = stock.count.checked_sub(1)?;
        let frame = *stock.blocks.get(last)?;
        stock.count = last;
        self.free_frames = self.free_frames.wrapping_sub(order.frames() as usize);
        let record = records.get(frame)?;
        if !record.is(Owner::Stock(order)) {
            records.note_damage(frame);
            return None;
        }
        record.set_owner(Owner::Pages(order.frames()));
        Some(frame)
    }

    /// Keeps the block of `order` at `frame`, whose record says [`Owner::Inner`], unmerged, if there is room in its stock, and
    /// all of it is in the zone.
    #[inline]
    pub(crate) fn stock(&mut self, records: &Records, frame: Frame, order: Order) -> bool {
        if frame.offset(order.frames()) > self.range.end {
            return false;
        }
        let Some(stock) = self.stocks.get_mut(order.index().wrapping_sub(1)) else { return false };
        let Some(room) = stock.blocks.get_mut(stock.count) else { return false };
        *room = frame;
        stock.count += 1;
        self.free_frames += order.frames() as usize;
        records.set_owner(frame, Owner::Stock(order));
        true
    }

    /// Merges all blocks that wait; `false` where there are none.
    pub(crate) fn merge_stocks(&mut self, records: &Records) -> bool {
        let mut merged = false;
        for order in (1..=HIGHEST_STOCKED as u32).filter_map(Order::new) {
            while self.stocks[order.index() - 1].count > 0 {
                if let Some(frame) = self.take_stocked(records, order) {
                    records.set_owner(frame, Owner::Inner);
                    self.release_block(records, frame, order);
                    merged = true;
                }
            }
        }
        merged
    }

    /// What most requests get: the first part of the smallest block that is large enough, and what is left of it is
    /// free.
    fn split(&mut self, records: &Records, request: &Request) -> Option<Frame> {
        let larger = self.filled & (u32::MAX << request.order.get());
        let order = Order::new(larger.trailing_zeros()).filter(|_| request.limit >= self.range.end)?;
        let (frame, _) = self.pop(records, order)?;
        for half in (request.order.get()..order.get()).rev().filter_map(Order::new) {
            self.push(records, frame.offset(half.frames()), half);
        }
        self.merge_all(records, frame.offset(request.count)..frame.offset(request.order.frames()));
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
            let free = records.is(*frame, Owner::Free(order));
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
            self.unlink(records, block.start, Order::within(length(&block)));
            self.merge_all(records, block.start..frame);
            self.merge_all(records, range.end.max(frame)..block.end);
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

    /// Frees the loose frames around `frame`, if it is one, up to [`LOOSE`] to both sides; says how many.
    pub(crate) fn release_loose(&mut self, records: &Records, frame: Frame) -> u32 {
        let is_loose = |frame: Frame| records.is(frame, Owner::Loose) && self.range.contains(&frame);
        if !is_loose(frame) {
            return 0;
        }
        let number = frame.number();
        let before = (1..=LOOSE.min(number)).take_while(|before| is_loose(Frame::new(number - before))).count() as u32;
        let behind = (1..=LOOSE).take_while(|behind| is_loose(frame.offset(*behind))).count() as u32;
        if before + behind == 0 {
            records.set_owner(frame, Owner::Inner);
            self.release_block(records, frame, Order::ZERO);
            return 1;
        }
        let range = Frame::new(number - before)..frame.offset(behind + 1);
        records.set_all(range.clone(), Owner::Inner);
        self.merge_all(records, range.clone());
        length(&range)
    }

    /// Frees all of `range`, whose records say [`Owner::Inner`], and merges it as far as it goes.
    pub(crate) fn merge_all(&mut self, records: &Records, range: Range<Frame>) {
        whole_blocks(range).for_each(|(frame, order)| self.release_block(records, frame, order));
    }

    /// Frees one block, which is aligned, and merges it as far as it goes.
    fn release_block(&mut self, records: &Records, mut frame: Frame, mut order: Order) {
        while let Some(larger) = order.larger() {
            let buddy = frame.buddy(order);
            if !records.is(buddy, Owner::Free(order)) || !self.range.contains(&buddy) {
                break;
            }
            self.unlink(records, buddy, order);
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
        self.filled |= order.frames();
        self.free_frames += order.frames() as usize;
    }

    /// Takes the free block of `order` that starts at `frame` out of its list.
    fn unlink(&mut self, records: &Records, frame: Frame, order: Order) {
        let Some(record) = records.get(frame) else { return };
        let list = &mut self.lists[order.index()];
        // A neighbour that does not know this block is none: something wrote over a link. Then the list ends here.
        let neighbour =
            |neighbour: Option<Frame>| records.get(neighbour?).filter(|record| record.is(Owner::Free(order)));
        let next = neighbour(record.next()).filter(|next| next.previous() == Some(frame));
        let previous = neighbour(record.previous()).filter(|previous| previous.next() == Some(frame));
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
        if list.first.is_none() {
            self.filled &= !order.frames();
        }
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
        free += length(&self.later(records)) as usize;
        let stocked = array::from_fn::<_, HIGHEST_STOCKED, _>(|order| self.stocks[order].count << (order + 1));
        free += stocked.iter().sum::<usize>();
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
