use std::format;
use std::string::String;
use std::vec::Vec;

use super::*;
use crate::SIZES;
use crate::cache::geometry::{Geometry, IN_SLAB, Places};
use crate::memory::FRAME_SIZE;

/// Bytes of a slab, and of its header elsewhere, that are no object's.
fn lost(geometry: &Geometry) -> usize {
    let elsewhere = if geometry.off_slab { geometry.header_bytes().next_power_of_two().max(64) } else { 0 };
    geometry.bytes() - geometry.slots * geometry.stride + elsewhere
}

fn check(size: usize, align: usize) {
    let geometry = Geometry::new(layout(size, align)).unwrap_or_else(|| panic!("no slab for {size}, {align}"));
    assert!(lost(&geometry) * 8 < geometry.bytes(), "{size}: {geometry:?}");
    assert!(geometry.stride >= size && geometry.stride < size + align.max(8), "{geometry:?}");
    assert_eq!(geometry.stride % align, 0);
    assert!(geometry.slots > 0);
    assert!(geometry.slots >= 4 || geometry.stride > FRAME_SIZE);
    // The header takes the room of no object above 512 bytes.
    let room = geometry.bytes() - geometry.slots * geometry.stride;
    assert!(geometry.off_slab || geometry.stride <= IN_SLAB || room < geometry.stride, "{geometry:?}");
    assert!(!geometry.off_slab || room < geometry.header_bytes(), "{geometry:?}");
    for colour in [0, geometry.colours / 2, geometry.colours - 1] {
        check_places(&geometry, colour);
    }
    // The last object is found, and what is beside it is not.
    let last = (geometry.slots - 1) * geometry.stride;
    assert_eq!(geometry.finder.at(last), Some(geometry.slots - 1));
    assert_eq!((geometry.finder.at(last + 1), geometry.finder.at(last.wrapping_sub(1))), (None, None), "{geometry:?}");
    // Where the block ends, the first object is the next.
    let behind = (!(last + geometry.stride).is_power_of_two()).then_some(last + geometry.stride);
    assert_eq!(behind.and_then(|behind| geometry.finder.at(behind)), None);
}

/// Objects are aligned and in the slab, and neither another one nor the header is where one is.
fn check_places(geometry: &Geometry, colour: u32) {
    let Places { header, first_slot } = geometry.places(colour);
    let object = |slot| geometry.finder.round(first_slot + slot * geometry.stride);
    let header = (!geometry.off_slab).then(|| header..header + geometry.header_bytes());
    let mut taken: Vec<_> = (0..geometry.slots).map(|slot| object(slot)..object(slot) + geometry.stride).collect();
    assert!(taken.iter().all(|object| object.start.is_multiple_of(geometry.align)), "{colour}: {geometry:?}");
    taken.extend(header);
    taken.sort_by_key(|range| range.start);
    assert!(taken.is_sorted_by(|one, next| one.end <= next.start), "{colour}: {geometry:?}");
    assert!(taken.last().unwrap().end <= geometry.bytes(), "{colour}: {geometry:?}");
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
fn every_size_from_8_bytes_to_128_kib_loses_less_than_an_eighth_of_a_slab() {
    (8..=128 << 10).step_by(8).for_each(|size| check(size, 8));
    (1..=128 << 10).step_by(97).for_each(|size| check(size, 1));
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
fn every_alignment_from_8_bytes_to_2_mib_is_kept() {
    for align in (3..=21).map(|log| 1 << log) {
        for size in [1, 8, 24, 100, 512, 4096, 5000, 1 << 20] {
            check(size, align);
            let geometry = Geometry::new(layout(size, align)).unwrap();
            assert!(geometry.order.bytes() >= align, "{geometry:?}");
        }
    }
}

#[test]
fn a_slot_is_found_at_its_start_and_nowhere_else() {
    let sizes: &[usize] = if cfg!(miri) { &[8, 4096] } else { &[8, 24, 72, 104, 512, 640, 2048, 4096, 5000, 131_072] };
    for &size in sizes {
        let geometry = Geometry::new(layout(size, 8)).unwrap();
        for offset in (0..geometry.bytes()).step_by(if cfg!(miri) { 509 } else { 1 }) {
            let slot = (offset % geometry.stride == 0).then_some(offset / geometry.stride);
            assert_eq!(
                geometry.finder.at(offset),
                slot.filter(|&slot| slot < geometry.slots),
                "{offset}: {geometry:?}"
            );
        }
        assert_eq!(geometry.finder.at(usize::MAX), None);
    }
}

#[test]
fn what_no_slab_can_hold_has_no_geometry() {
    assert_eq!(Geometry::new(layout(0, 8)), None);
    assert_eq!(Geometry::new(layout((4 << 20) + 1, 8)), None);
    assert_eq!(Geometry::new(layout(8, 4 << 20)), None);
    assert!(Geometry::new(layout(4 << 20, 2 << 20)).is_some());
}

fn row(size: usize) -> String {
    let natural = 1 << size.trailing_zeros().min(12);
    let geometry = Geometry::new(layout(size, natural)).unwrap();
    let lost = lost(&geometry);
    let percent = lost as f64 * 100.0 / geometry.bytes() as f64;
    let kib = geometry.bytes() / 1024;
    format!("//! | {size} | {kib} | {} | {lost} | {percent:.1} | {} |", geometry.slots, geometry.colours)
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
fn the_table_of_the_size_classes_is_true() {
    let source = include_str!("../geometry.rs");
    let missing: Vec<_> = SIZES.iter().map(|&size| row(size)).filter(|row| !source.contains(row.as_str())).collect();
    assert!(missing.is_empty(), "not in the table:\n{}", missing.join("\n"));
}

/// Where in its slab each object starts.
fn starts_of(geometry: &Geometry, colour: u32) -> Vec<usize> {
    let first_slot = geometry.places(colour).first_slot;
    let mut starts: Vec<_> =
        (0..geometry.slots).map(|slot| geometry.finder.round(first_slot + slot * geometry.stride)).collect();
    starts.sort_unstable();
    starts
}

#[test]
fn headers_of_successive_slabs_share_few_cache_lines_of_a_page() {
    for size in SIZES.iter().filter(|&&size| size <= 512) {
        let geometry = Geometry::new(layout(*size, 8)).unwrap();
        let mut lines: Vec<_> = (0..geometry.colours).map(|colour| geometry.places(colour).header / 64).collect();
        lines.dedup();
        assert!(lines.len() >= 5 && lines.len() == geometry.colours as usize, "{size}: {geometry:?}");
    }
}

#[test]
fn successive_slabs_start_at_successive_colours_and_wrap() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap();
    let cache = Cache::new(heap.caches(), "coloured", layout(600, 8));
    let geometry = Geometry::new(layout(600, 8)).unwrap();
    assert!(geometry.colours > 2, "{geometry:?}");
    let slabs = if cfg!(miri) { 3 } else { geometry.colours as usize + 2 };
    let objects = allocate(&cache, slabs * geometry.slots);
    for (index, slab) in objects.chunks(geometry.slots).enumerate() {
        let colour = index as u32 % geometry.colours;
        let mut starts: Vec<_> = slab.iter().map(|object| object.as_ptr().addr() % FRAME_SIZE).collect();
        starts.sort_unstable();
        assert_eq!(starts, starts_of(&geometry, colour), "slab {index}");
    }
    assert_eq!(cache.stats().unwrap().colours, geometry.colours);
    objects.into_iter().for_each(|object| free(&cache, object));
    assert_eq!(cache.stats().unwrap().slabs, 1);
}
