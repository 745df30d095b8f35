//! A binary buddy system over page frames (Knuth, TAOCP vol. 1, 2.5).
//!
//! A free block of order k is 2^k frames and starts at a multiple of 2^k. Its buddy is the other half of the block of order
//! k + 1 around it. A request splits the smallest block that is large enough; a freed block merges with its buddy as long
//! as the buddy is a free block of the same order. The blocks of an order form a doubly linked list through their records;
//! the memory of a free block is never touched.
//!
//! Lock: the caller holds the one around the zone.

#![forbid(unsafe_code)]

use core::ops::Range;

use super::record::{Owner, Record, Records};
use super::{Frame, Order};

/// The free blocks of one order.
#[derive(Debug, Clone, Copy)]
struct FreeList {
    first: Option<Frame>,
    blocks: usize,
}

/// The free blocks of all orders.
#[derive(Debug)]
pub(crate) struct Zone {
    lists: [FreeList; Order::COUNT],
    free_frames: usize,
    total_frames: usize,
}

impl Zone {
    /// Without any memory.
    pub(crate) const fn new() -> Self {
        Self { lists: [FreeList { first: None, blocks: 0 }; Order::COUNT], free_frames: 0, total_frames: 0 }
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

    /// Takes over `range`, whose frames all have records.
    pub(crate) fn add(&mut self, records: &Records, range: Range<Frame>) {
        self.total_frames += (range.end.number() - range.start.number()) as usize;
        self.free_range(records, range);
    }

    /// A block of 2^`order` frames, its first record saying that it is allocated.
    pub(crate) fn allocate(&mut self, records: &Records, order: Order) -> Option<Frame> {
        let (found, frame) = order.and_up().find_map(|o| Some((o, self.lists[o.index()].first?)))?;
        self.unlink(records, records.get(frame)?, found);
        for half in found.down_to(order) {
            self.push(records, frame.offset(half.frames()), half);
        }
        records.set_owner(frame, Owner::Pages(order.frames()));
        Some(frame)
    }

    /// Frees all of `range`, whose frames are not free and whose records are nobody's.
    pub(crate) fn free_range(&mut self, records: &Records, range: Range<Frame>) {
        let (mut frame, end) = (range.start, range.end);
        while frame < end {
            let order = frame.alignment().min(Order::within(end.number() - frame.number()));
            self.free(records, frame, order);
            frame = frame.offset(order.frames());
        }
    }

    /// Frees one block, which is aligned and whose records are nobody's, and merges it as far as it goes.
    fn free(&mut self, records: &Records, mut frame: Frame, mut order: Order) {
        while let Some(larger) = order.larger() {
            let buddy = frame.buddy(order);
            match records.get(buddy) {
                Some(record) if record.owner() == Owner::Free(order) => {
                    self.unlink(records, record, order);
                    record.set_owner(Owner::Nobody);
                }
                _ => break,
            }
            frame = frame.min(buddy);
            order = larger;
        }
        self.push(records, frame, order);
    }

    fn push(&mut self, records: &Records, frame: Frame, order: Order) {
        let Some(record) = records.get(frame) else { return };
        record.set_owner(Owner::Free(order));
        let list = &mut self.lists[order.index()];
        record.set_next(list.first);
        if let Some(next) = list.first.and_then(|next| records.get(next)) {
            next.set_previous(Some(frame));
        }
        list.first = Some(frame);
        list.blocks += 1;
        self.free_frames += order.frames() as usize;
    }

    /// Takes the block with this record out of its list; what owns the block is then the caller's to say.
    fn unlink(&mut self, records: &Records, record: &Record, order: Order) {
        let (next, previous) = record.links();
        let list = &mut self.lists[order.index()];
        match previous.and_then(|frame| records.get(frame)) {
            Some(previous) => previous.set_next(next),
            None => list.first = next,
        }
        if let Some(next) = next.and_then(|frame| records.get(frame)) {
            next.set_previous(previous);
        }
        list.blocks -= 1;
        self.free_frames -= order.frames() as usize;
    }
}
