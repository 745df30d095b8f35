use super::*;

/// 256, 256 and 512 frames.
const BOUNDARIES: [u64; 2] = [256, 512];

fn three_zones(machine: &Machine) -> Frames<NoInterrupts> {
    frames_of(machine, &[machine.region()], BOUNDARIES)
}

fn limit(index: u64) -> u64 {
    nth(index).address()
}

#[test]
fn the_boundaries_are_16_mib_and_4_gib_unless_told_otherwise() {
    let zones = Frames::<NoInterrupts>::new().stats().zones.map(|zone| zone.start.address()..zone.end.address());
    assert_eq!(zones, [0..16 << 20, 16 << 20..4 << 30, 4 << 30..(16 << 40) - 4096]);
    let odd = Frames::<NoInterrupts>::new().with_zones([0x5fff, 0x1000]).stats().zones;
    assert_eq!(odd.map(|zone| zone.start.address()), [0, 0x5000, 0x5000]);
}

#[test]
#[cfg_attr(miri, ignore = "many frames take long there")]
fn a_request_is_served_from_the_highest_zone_and_falls_down() {
    let machine = Machine::new(START, 1024);
    let frames = three_zones(&machine);
    let order = take_all(&frames, Order::ZERO);
    let zone = |frame: &Frame| BOUNDARIES.iter().filter(|boundary| *frame >= nth(**boundary)).count();
    assert!(order.is_sorted_by_key(|frame| core::cmp::Reverse(zone(frame))));
    let zones = frames.stats().zones;
    assert_eq!(zones.map(|zone| zone.free), [2, 2, 0], "a hundred and twenty-eighth of the lower zones is kept");
    assert_eq!(zones.map(|zone| zone.reserve), [2, 2, 4]);
    assert_eq!(frames.allocate_bulk(&mut [Frame::default(); 3]), 0);
    let below_512 = frames.allocate_below(1, Order::ZERO, limit(512)).unwrap();
    assert_eq!(zone(&below_512), 1);
    frames.allocate_below(1, Order::ZERO, limit(512)).expect("no higher zone could serve it");
    assert_eq!(frames.allocate_below(1, Order::ZERO, limit(512)), None, "but the lowest zone keeps its reserve");
    assert_eq!(zone(&frames.allocate_below(1, Order::ZERO, limit(256)).unwrap()), 0);
    frames.allocate_below(1, Order::ZERO, limit(256)).unwrap();
    assert_eq!(frames.stats().free, 0);
    frames.verify().unwrap();
}

#[test]
fn without_higher_memory_nothing_is_kept() {
    let machine = Machine::new(START, 200);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], BOUNDARIES);
    assert_eq!(frames.stats().zones[0].reserve, 1);
    take_all(&frames, Order::ZERO);
    assert_eq!(frames.stats().free, 0);
}

#[test]
fn a_higher_zone_with_memory_only_above_the_limit_could_not_have_served() {
    let machine = Machine::new(START, 512);
    let regions = [machine.usable(0, 200), machine.usable(400, 112)];
    let frames: Frames<NoInterrupts> = frames_of(&machine, &regions, [256, 512]);
    let below = || frames.allocate_below(1, Order::ZERO, limit(300));
    assert_eq!(std::iter::from_fn(below).count(), frames.stats().zones[0].total - frames.stats().metadata);
}

#[test]
fn a_limit_inside_a_zone_is_kept() {
    let machine = Machine::new(START, 128);
    let frames = all_of::<NoInterrupts>(&machine);
    for end in [1, 2, 3, 40, 64, 65, 127] {
        let order = order(2);
        let runs: Vec<_> = std::iter::from_fn(|| frames.allocate_below(3, order, limit(end))).collect();
        let fit = (0..).step_by(4).take_while(|start| start + 3 <= end && start + 3 <= 127).count();
        assert_eq!(runs.len(), fit, "all that lie below frame {end}");
        assert!(runs.iter().all(|run| run.offset(3) <= nth(end)));
        runs.iter().for_each(|run| free_run(&frames, *run, 3));
        frames.verify().unwrap();
    }
    assert_eq!(frames.allocate_below(1, Order::ZERO, limit(0)), None);
    assert_eq!(frames.allocate_below(1, Order::ZERO, 0), None);
    assert_eq!(frames.allocate_below(0, Order::ZERO, u64::MAX), None);
    assert!(frames.allocate_below(1, Order::ZERO, u64::MAX).is_some());
}

#[test]
fn nothing_merges_across_a_boundary() {
    let machine = Machine::new(START, 64);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], [19, 33]);
    let before = frames.stats();
    frames.verify().unwrap();
    assert_eq!(frames.allocate(order(5)), None);
    let all = take_all(&frames, Order::ZERO);
    all.iter().for_each(|frame| free(&frames, *frame, Order::ZERO));
    assert_eq!(frames.stats(), before);
    assert_eq!(before.zones.map(|zone| zone.total), [19, 14, 31]);
    frames.verify().unwrap();
}

#[test]
fn a_run_at_a_given_place_may_lie_in_several_zones() {
    let machine = Machine::new(START, 64);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], [19, 33]);
    let before = frames.stats();
    assert!(frames.allocate_at(nth(10), 40));
    assert_eq!(frames.stats().zones.map(|zone| zone.free), [10, 0, 13]);
    frames.verify().unwrap();
    free_run(&frames, nth(10), 40);
    assert_eq!(frames.stats(), before);
}

#[test]
fn watermarks_are_a_sixty_fourth_and_a_thirty_second_of_each_zone() {
    let machine = Machine::new(START, 1024);
    let frames = three_zones(&machine);
    assert_eq!(frames.stats().zones.map(|zone| (zone.low, zone.high)), [(4, 8), (4, 8), (8, 16)]);
    assert!(!frames.below_low() && !frames.below_high());
    let free = frames.stats().free as u32;
    assert!(frames.allocate_at(nth(0), 1020 - 40));
    assert_eq!(frames.stats().free, free as usize - 980);
    for (left, low, high) in
        [(40, false, false), (32, false, false), (31, false, true), (16, false, true), (15, true, true)]
    {
        while frames.stats().free > left {
            frames.allocate(Order::ZERO).unwrap();
        }
        assert_eq!((frames.below_low(), frames.below_high()), (low, high), "{left} frames");
    }
}

#[test]
fn fragmentation_is_told_in_thousandths() {
    let machine = Machine::new(START, 16);
    let frames = all_of::<NoInterrupts>(&machine);
    let one_block = frames.stats();
    assert_eq!(
        (one_block.largest_block(), one_block.fragmentation(), one_block.unusable(order(4))),
        (Some(order(4)), 0, 0)
    );
    // 0 to 3 stay, and every other one from 4 on.
    let all = take_all(&frames, Order::ZERO);
    all.iter().filter(|frame| **frame < nth(4) || frame.number() % 2 == 0).for_each(|f| free(&frames, *f, Order::ZERO));
    let stats = frames.stats();
    assert_eq!((stats.free, stats.largest_block()), (10, Some(order(2))));
    assert_eq!(stats.fragmentation(), 600);
    assert_eq!([0, 1, 2, 3].map(|k| stats.unusable(order(k))), [0, 600, 600, 1000]);
    all.iter()
        .filter(|frame| **frame < nth(4) || frame.number() % 2 == 0)
        .for_each(|f| assert!(frames.allocate_at(*f, 1)));
    let none = frames.stats();
    assert_eq!((none.largest_block(), none.fragmentation(), none.unusable(Order::ZERO)), (None, 0, 0));
}

#[test]
fn the_table_has_a_row_for_each_zone_with_memory() {
    let machine = Machine::new(START, 64);
    let frames: Frames<NoInterrupts> = frames_of(&machine, &[machine.region()], [32, 64]);
    let table = frames.stats().to_string();
    let mut lines = table.lines();
    assert_eq!(lines.next(), Some("page frames: 256 KiB in all, 252 KiB free, 4 KiB for records"));
    let numbers = |line: &str| line.split_whitespace().map(str::to_string).collect::<Vec<_>>();
    assert_eq!(
        numbers(lines.next().unwrap())[..8],
        ["free", "blocks", "frames", "free", "reserve", "low", "high", "0"]
    );
    assert_eq!(numbers(lines.next().unwrap())[3..14], ["32", "32", "0", "0", "1", "0", "0", "0", "0", "0", "1"]);
    assert_eq!(numbers(lines.next().unwrap())[3..14], ["32", "31", "0", "0", "1", "1", "1", "1", "1", "1", "0"]);
    assert_eq!(lines.next(), None);
}
