use super::stock::Two;
use super::*;
use proptest::prelude::*;
use std::vec::Vec;

use crate::Broken;
use crate::testing::report_of;

/// What `verify` says after `damage`, and how it reads.
fn broken_by(damage: impl FnOnce(&Frames<NoInterrupts>)) -> (Broken, std::string::String) {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    // Free are 4 to 7 as one block, 10, 12, and from 16 on.
    assert!(frames.allocate_at(nth(0), 4) && frames.allocate_at(nth(8), 8));
    free_run(&frames, nth(8), 8);
    assert!(frames.allocate_at(nth(8), 2) && frames.allocate_at(nth(11), 1) && frames.allocate_at(nth(13), 3));
    frames.verify().unwrap();
    damage(&frames);
    let broken = frames.verify().unwrap_err();
    (broken, broken.to_string())
}

fn record(frames: &Frames<NoInterrupts>, index: u64) -> &record::Record {
    frames.records.get(nth(index)).unwrap()
}

#[test]
fn row_30_a_list_that_was_overwritten_is_found() {
    // The blocks of order 0 are 10, 12 and 62, in some order.
    let end = |frames: &Frames<NoInterrupts>, is_end: fn(&record::Record) -> bool| {
        let found = [10, 12, 62].map(nth).into_iter().find(|frame| is_end(frames.records.get(*frame).unwrap()));
        found.expect("one end of the list")
    };
    let first = |frames: &Frames<NoInterrupts>| end(frames, |record| record.previous().is_none());
    let last = |frames: &Frames<NoInterrupts>| end(frames, |record| record.next().is_none());
    let (broken, text) = broken_by(|frames| frames.records.get(last(frames)).unwrap().set_next(Some(first(frames))));
    assert!(matches!(broken, Broken::FreeListLink { .. }), "a ring: {text}");
    let (broken, text) = broken_by(|frames| frames.records.get(last(frames)).unwrap().set_previous(Some(nth(3))));
    assert!(matches!(broken, Broken::FreeListLink { .. }), "{text}");
    assert!(text.ends_with("does not point back to the one before it"));
    let (broken, text) = broken_by(|frames| frames.records.get(first(frames)).unwrap().set_next(None));
    assert!(matches!(broken, Broken::FreeListLength { expected: 3, found, .. } if found < 3), "{broken:?}");
    assert!(text.starts_with("free blocks of order 0: 3 counted, "), "{text}");
    let (broken, text) = broken_by(|frames| record(frames, 4).set_next(Some(nth(17))));
    assert_eq!(broken, Broken::FreeBlockPlace { frame: nth(17), order: order(2) });
    assert_eq!(text, "free block of order 2 at 0x4011000: not aligned, or not in its zone");
}

#[test]
fn a_free_block_that_is_not_recorded_as_such_is_found() {
    let (broken, text) = broken_by(|frames| record(frames, 12).set_owner(Owner::Inner));
    assert_eq!(broken, Broken::FreeBlockOwner { frame: nth(12), order: Order::ZERO });
    assert_eq!(text, "free block of order 0 at 0x400c000: its record says otherwise");
}

#[test]
fn buddies_that_are_apart_are_found() {
    let (broken, text) = broken_by(|frames| record(frames, 11).set_owner(Owner::Free(Order::ZERO)));
    assert_eq!(broken, Broken::NotMerged { frame: nth(10), order: Order::ZERO });
    assert!(text.ends_with("its buddy is free, and not merged"));
}

#[test]
fn a_frame_that_belongs_to_nothing_or_to_two_is_found() {
    let (broken, text) = broken_by(|frames| record(frames, 11).set_owner(Owner::Inner));
    assert_eq!(
        (broken, text.as_str()),
        (Broken::Lost { frame: nth(11) }, "managed frame at 0x400b000: belongs to nothing")
    );
    let (broken, text) = broken_by(|frames| record(frames, 14).set_owner(Owner::Pages(1)));
    assert_eq!(broken, Broken::Overlap { frame: nth(13), inner: nth(14) });
    assert_eq!(text, "what starts at 0x400d000 has the frame at 0x400e000, which is not its own");
}

#[test]
fn counts_that_are_wrong_are_found() {
    let (broken, text) = broken_by(|frames| record(frames, 11).set_owner(Owner::Records));
    assert_eq!(broken, Broken::FrameCount { expected: 1, found: 2 });
    assert_eq!(text, "frames: 1 counted, the records say 2");
    let (broken, _) = broken_by(|frames| record(frames, 11).set_owner(Owner::Stock(Order::ZERO)));
    assert_eq!(broken, Broken::FrameCount { expected: 53, found: 54 });
}

#[test]
fn a_broken_stock_is_found() {
    let machine = Machine::new(START, 1024);
    let frames = all_of::<Two>(&machine);
    let one = frames.allocate(Order::ZERO).unwrap();
    free(&frames, one, Order::ZERO);
    frames.records.set_owner(one, Owner::Inner);
    let broken = frames.verify().unwrap_err();
    assert_eq!(broken, Broken::StockOwner { cpu: 0, frame: one });
    assert!(broken.to_string().starts_with("stock of CPU 0: the record of the frame at 0x"));
    frames.records.set_owner(one, Owner::Stock(Order::ZERO));
    frames.verify().unwrap();
    // The stocks are in front of the four frames of records. In each the records are behind a count and 60 numbers.
    let count = frames.pointer(nth(1024 - 5)).cast::<u32>();
    let first = count.wrapping_add(62).cast::<*mut u8>();
    // SAFETY: where the record of the first frame is, an atomic; nobody else runs.
    let own = unsafe { first.replace(core::ptr::null_mut()) };
    assert!(matches!(frames.verify(), Err(Broken::StockOwner { cpu: 0, .. })));
    // SAFETY: as above.
    unsafe { first.write(own) };
    // SAFETY: the first field of the first stock, an atomic; nobody else runs.
    unsafe { count.write(1000) };
    let broken = frames.verify().unwrap_err();
    assert_eq!(broken, Broken::StockCount { cpu: 0, count: 1000 });
    assert_eq!(broken.to_string(), "stock of CPU 0: 1000 frames are more than it can have");
    assert!(frames.allocate(order(3)).is_some(), "what is broken there is not followed");
}

/// The report of what is found when all frames are allocated, after `damage` to the record of a free block of order 0.
fn found_after(damage: impl FnOnce(&record::Record)) -> std::string::String {
    let machine = Machine::new(START, 64);
    let frames = all_of::<NoInterrupts>(&machine);
    let taken: Vec<_> = core::iter::from_fn(|| frames.allocate(Order::ZERO)).collect();
    // 4 to 7 merge; 10, 12 and 14 stay alone.
    [4, 5, 6, 7, 10, 12, 14].into_iter().for_each(|index| free_run(&frames, nth(index), 1));
    frames.drain_stock();
    frames.verify().unwrap();
    damage(record(&frames, 12));
    report_of(|| {
        let again: Vec<_> = core::iter::from_fn(|| frames.allocate(Order::ZERO)).collect();
        assert!(again.is_empty(), "{again:?} were given out of {}", taken.len());
    })
}

#[test]
fn row_30_a_link_that_was_overwritten_is_reported_before_it_is_followed() {
    // What is written over the links of a free block of order 0, and to where.
    type Set = fn(&record::Record, Option<Frame>);
    let links: [(&str, Set); 2] = [("next", record::Record::set_next), ("previous", record::Record::set_previous)];
    for (name, set) in links {
        // An allocated frame, one within a free block, the block itself, one far outside.
        for to in [1, 5, 12, 1 << 20] {
            let report = found_after(|record| set(record, Some(nth(to))));
            assert!(report.starts_with("kslab: damage at 0x"), "{name} to {to}: {report}");
            assert!(report.ends_with(": the allocator's own data was overwritten"), "{name} to {to}: {report}");
        }
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(200, 2))]

    #[test]
    fn row_30_whatever_is_written_over_a_link_is_reported_before_it_is_followed(
        frame in prop_oneof![(0..64_u32).prop_map(|index| nth(0).offset(index)), any::<u32>().prop_map(crate::Frame::new)],
        next: bool,
    ) {
        // Of the other free blocks of the order one is where the link leads anyhow.
        prop_assume!(![10, 14].map(nth).contains(&frame) && frame.number() != u32::MAX);
        let set = if next { record::Record::set_next } else { record::Record::set_previous };
        let report = found_after(|record| set(record, Some(frame)));
        assert!(report.ends_with(": the allocator's own data was overwritten"), "{frame:?}: {report}");
    }
}
