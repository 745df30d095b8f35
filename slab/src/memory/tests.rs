#![allow(clippy::single_range_in_vec_init, reason = "a list of one range of frames is what it says")]

use std::vec::Vec;

use proptest::prelude::*;

use super::*;

fn frames(regions: &[Region]) -> Vec<Range<u32>> {
    UsableFrames::new(regions.iter().copied()).map(|range| range.start.number()..range.end.number()).collect()
}

#[test]
fn row_46_reserved_wins_over_usable_whatever_the_order() {
    let usable = Region::usable(0x1000, 0x9000);
    let reserved = Region::reserved(0x4000, 0x2000);
    assert_eq!(frames(&[usable, reserved]), [1..4, 6..10]);
    assert_eq!(frames(&[reserved, usable]), [1..4, 6..10]);
}

#[test]
fn row_47_unsorted_regions_come_out_in_order() {
    let regions = [Region::usable(0x8000, 0x1000), Region::usable(0x2000, 0x1000), Region::usable(0x5000, 0x1000)];
    assert_eq!(frames(&regions), [2..3, 5..6, 8..9]);
}

#[test]
fn row_48_usable_edges_shrink_and_reserved_edges_grow() {
    assert_eq!(frames(&[Region::usable(0x1001, 0x3ffe)]), [2..4]);
    assert_eq!(frames(&[Region::usable(0x1000, 0x4000), Region::reserved(0x2fff, 2)]), [1..2, 4..5]);
}

#[test]
fn row_48_usable_regions_that_meet_inside_a_page_lose_nothing() {
    assert_eq!(frames(&[Region::usable(0x1000, 0x800), Region::usable(0x1800, 0x1800)]), [1..3]);
}

#[test]
fn row_49_empty_entries_are_ignored() {
    let regions = [Region::usable(0x3000, 0), Region::usable(0x1000, 0x4000), Region::reserved(0x2800, 0)];
    assert_eq!(frames(&regions), [1..5]);
}

#[test]
fn row_50_a_region_that_wraps_is_clipped() {
    let limit = Frame::LIMIT;
    assert_eq!(frames(&[Region::usable(u64::MAX - 0x1fff, 0x10000)]), []);
    assert_eq!(frames(&[Region::usable((limit as u64 - 1) * 4096, u64::MAX)]), [limit - 1..limit]);
    assert_eq!(frames(&[Region::usable(0x1000, 0x2000), Region::reserved(0x2000, u64::MAX)]), [1..2]);
}

#[test]
fn row_51_frame_0_is_never_usable() {
    assert_eq!(frames(&[Region::usable(0, 0x3000)]), [1..3]);
}

#[test]
fn row_52_memory_above_4_gib_is_usable() {
    assert_eq!(frames(&[Region::usable(4 << 30, 2 << 30)]), [1 << 20..3 << 19]);
}

#[test]
fn row_53_holes_stay_holes() {
    let regions =
        [Region::usable(0x1000, 0x9f000), Region::reserved(0xf0000, 0x10000), Region::usable(0x10_0000, 0x1000)];
    assert_eq!(frames(&regions), [1..0xa0, 0x100..0x101]);
}

#[test]
fn row_54_what_the_kernel_marks_as_its_own_is_left_out() {
    let image = Region::reserved(0x20_0123, 0x5000);
    assert_eq!(frames(&[Region::usable(0x10_0000, 0x20_0000), image]), [0x100..0x200, 0x206..0x300]);
}

#[test]
fn row_55_one_page_is_one_frame() {
    assert_eq!(frames(&[Region::usable(0x7000, 0x1000)]), [7..8]);
}

#[test]
fn row_56_empty_or_reserved_maps_have_no_frames() {
    assert_eq!(frames(&[]), []);
    assert_eq!(frames(&[Region::reserved(0, u64::MAX)]), []);
    assert_eq!(frames(&[Region::usable(0x1000, 0x1000), Region::reserved(0, u64::MAX)]), []);
}

#[test]
fn row_57_many_tiny_regions() {
    let count = if cfg!(miri) { 100 } else { 10_000 };
    let regions: Vec<_> = (0..count).map(|i| Region::usable(0x10_0000 + i * 0x2000, 0x1000)).collect();
    let found = frames(&regions);
    assert_eq!(found.len(), count as usize);
    assert!(found.iter().zip(0..).all(|(range, i)| *range == (0x100 + 2 * i..0x101 + 2 * i)));
}

#[test]
fn a_chain_of_overlapping_regions_is_one_range_in_any_order() {
    let mut regions: Vec<_> = (0..50).map(|i| Region::usable(0x1000 + i * 0x1000, 0x1800)).collect();
    assert_eq!(frames(&regions), [1..51]);
    regions.reverse();
    assert_eq!(frames(&regions), [1..51]);
}

/// Byte for byte in a small address space, the plain way.
fn model(regions: &[Region]) -> Vec<u32> {
    let covers =
        |region: &Region, from: u64, to: u64| region.start < to && region.end > from && region.start < region.end;
    let usable = |byte: u64| regions.iter().any(|region| region.usable && covers(region, byte, byte + 1));
    (1..64_u32)
        .filter(|frame| {
            let (start, end) = (u64::from(*frame) * 4096, u64::from(*frame + 1) * 4096);
            let reserved = regions.iter().any(|region| !region.usable && covers(region, start, end));
            // Edges lie at multiples of 512, so one byte in 512 speaks for the rest.
            !reserved && (start..end).step_by(512).all(usable)
        })
        .collect()
}

proptest! {
    #![proptest_config(crate::testing::cases(512, 4))]

    #[test]
    fn rows_46_to_49_any_map_yields_the_model_frames_as_ascending_ranges(
        regions in prop::collection::vec((0..500_u64, 0..80_u64, any::<bool>()), 0..24)
    ) {
        let regions: Vec<_> = regions
            .into_iter()
            .map(|(start, length, usable)| match usable {
                true => Region::usable(start * 512, length * 512),
                false => Region::reserved(start * 512, length * 512),
            })
            .collect();
        let ranges = frames(&regions);
        prop_assert!(ranges.iter().all(|range| range.start < range.end));
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        let found: Vec<_> = ranges.into_iter().flatten().filter(|frame| *frame < 64).collect();
        prop_assert_eq!(found, model(&regions));
    }
}
