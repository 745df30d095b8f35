use std::vec;

use super::*;

/// Never touched, so it can be anywhere.
fn far(address: u64, frames: u64) -> Region {
    Region::usable(address, frames * 4096)
}

#[test]
#[cfg_attr(miri, ignore = "gigabytes")]
fn records_take_at_most_four_thousandths_of_memory() {
    for mebibytes in [32, 33, 100, 1024, 4096] {
        let machine = Machine::new(START, mebibytes * 256);
        let stats = all_of::<NoInterrupts>(&machine).stats();
        assert_eq!((stats.total, stats.free + stats.metadata), (mebibytes * 256, mebibytes * 256));
        assert!(stats.metadata * 1000 <= stats.total * 4, "{mebibytes} MiB: {} frames", stats.metadata);
    }
}

#[test]
fn a_hole_of_terabytes_costs_the_nodes_above_one_leaf() {
    let machine = Machine::new(START, 64);
    for address in if cfg!(miri) { vec![1 << 40] } else { vec![1 << 32, 1 << 40, (16 << 40) - (64 << 12)] } {
        let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region(), far(address, 40)], [0, 0]);
        let stats = frames.stats();
        assert_eq!((stats.total, stats.metadata), (64 + 40, 1 + 3));
        let all = take_all(&frames, Order::ZERO);
        assert_eq!(all.len(), 100);
        assert_eq!(all.iter().filter(|frame| frame.address() >= address).count(), 40);
        all.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
        assert_eq!(frames.stats(), stats);
        frames.verify().unwrap();
    }
}

#[test]
fn regions_of_one_megabyte_share_a_leaf() {
    let machine = Machine::new(START, 256);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.usable(0, 32)], [0, 0]);
    assert_eq!(frames.stats().metadata, 1);
    assert_eq!(add(&frames, &[machine.usable(40, 8)]), Ok(8));
    assert_eq!(frames.stats().metadata, 1 + 3);
    for first in [50, 100, 248] {
        assert_eq!(add(&frames, &[machine.usable(first, 8)]), Ok(8));
        assert_eq!(frames.stats().metadata, 1 + 3);
        frames.verify().unwrap();
    }
}

#[test]
fn the_direct_table_and_the_tree_meet_inside_a_megabyte() {
    let machine = Machine::new(START, 256);
    // The longest range is in the middle.
    let regions = [machine.usable(0, 20), machine.usable(30, 150), machine.usable(190, 60)];
    let frames: Frames<NoInterrupts> = frames_of(&machine, &regions, [0, 0]);
    assert_eq!(frames.stats().total, 230);
    frames.verify().unwrap();
    let managed = |index| frames.owner(nth(index)) != Owner::Unmanaged;
    assert!(
        (0..256).all(|i| managed(i) == ((0..20).contains(&i) || (30..180).contains(&i) || (190..250).contains(&i)))
    );
    let found: Vec<_> = frames.records.managed(nth(10)..nth(200)).map(|(frame, _)| frame).collect();
    let expected: Vec<_> = (10..20).chain(30..180).chain(190..200).map(nth).collect();
    assert_eq!(found, expected);
}

#[test]
fn frames_can_be_moved_as_long_as_nobody_borrows_them() {
    let machine = Machine::new(START, 16);
    let frames = all_of::<NoInterrupts>(&machine);
    let frame = frames.allocate(Order::ZERO).unwrap();
    let moved = std::boxed::Box::new(frames);
    assert_eq!(take_all(&moved, Order::ZERO).len(), 15, "sixteen frames need no memory for their records");
    free(&moved, frame, Order::ZERO);
    moved.verify().unwrap();
}

#[test]
fn a_record_keeps_every_owner_it_is_told() {
    let owners = [
        Owner::Unmanaged,
        Owner::Inner,
        Owner::Records,
        Owner::Free(Order::MAX),
        Owner::Free(Order::ZERO),
        Owner::Stock(Order::ZERO),
        Owner::Loose,
        Owner::Deferred(3),
        Owner::Metadata(1),
        Owner::Pages(Owner::MOST),
        Owner::Slab { order: Order::LARGE_PAGE, cache: (1 << 24) - 1 },
    ];
    let record = record::Record::unmanaged();
    for owner in owners {
        record.set_owner(owner);
        assert_eq!(record.owner(), owner);
        assert!(!record.claim(u32::MAX, Owner::Inner));
        assert_eq!(record.claim(Owner::MOST, Owner::Inner), matches!(owner, Owner::Pages(_)));
    }
}
