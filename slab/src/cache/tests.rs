use std::vec;
use std::vec::Vec;

use super::*;
use crate::platform::NoInterrupts;
use crate::testing::{Heap, Machine};

const START: u64 = 64 << 20;

fn sizes() -> impl Iterator<Item = usize> {
    (8..=2048).step_by(8)
}

fn free(cache: &Cache<NoInterrupts>, heap: &Heap, object: *mut u8) -> Result<(), Fault> {
    // SAFETY: these tests never access what they have freed.
    unsafe { cache.free(heap.frames(), object) }
}

#[test]
fn a_slab_loses_at_most_an_eighth() {
    for size in sizes() {
        let geometry = Geometry::new(size);
        let bytes = geometry.order.bytes();
        assert!((bytes - geometry.slots * size) * 8 <= bytes, "{geometry:?}");
    }
}

#[test]
fn slots_header_and_bitmap_do_not_overlap() {
    for size in sizes() {
        let geometry = Geometry::new(size);
        assert!(geometry.slots * size <= geometry.header_offset(), "{geometry:?}");
        let bitmap = geometry.order.bytes() - geometry.words() * 8;
        assert!(geometry.header_offset() + size_of::<slab::Header>() <= bitmap, "{geometry:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "no unsafe code, and takes long there")]
fn row_7_only_the_start_of_a_slot_is_a_slot() {
    for size in sizes() {
        let geometry = Geometry::new(size);
        for offset in 0..geometry.order.bytes() {
            let expected = (offset % size == 0 && offset / size < geometry.slots).then_some(offset / size);
            assert_eq!(geometry.slot_at(offset), expected, "{offset} of {geometry:?}");
        }
        assert_eq!(geometry.slot_at(usize::MAX), None);
    }
}

#[test]
fn objects_are_disjoint_and_keep_what_is_written_to_them() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    for size in [8, 64, 72, 640, 2048] {
        let cache = Cache::<NoInterrupts>::new(0, size);
        let objects: Vec<_> = (0..30_u8).map(|_| cache.allocate(heap.frames()).unwrap()).collect();
        for (object, fill) in objects.iter().zip(1_u8..) {
            // SAFETY: an object of `size` bytes, ours.
            unsafe { object.write_bytes(fill, size) };
        }
        for (object, fill) in objects.iter().zip(1_u8..) {
            // SAFETY: as above, written.
            let bytes = unsafe { core::slice::from_raw_parts(*object, size) };
            assert_eq!(bytes, vec![fill; size]);
        }
        objects.iter().for_each(|object| free(&cache, &heap, *object).unwrap());
    }
}

#[test]
fn a_slab_goes_back_when_its_last_object_is_freed() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Cache::<NoInterrupts>::new(0, 512);
    let before = heap.frames().stats();
    let per_slab = cache.stats().objects_per_slab;
    let objects: Vec<_> = (0..3 * per_slab).map(|_| cache.allocate(heap.frames()).unwrap()).collect();
    assert_eq!((cache.stats().slabs, cache.stats().in_use), (3, 3 * per_slab));
    for (freed, object) in objects.iter().enumerate() {
        assert_eq!(cache.stats().slabs, 3 - freed / per_slab);
        free(&cache, &heap, *object).unwrap();
    }
    assert_eq!((cache.stats().slabs, cache.stats().in_use), (0, 0));
    assert_eq!(heap.frames().stats(), before);
}

#[test]
fn a_freed_slot_of_a_full_slab_is_used_before_a_new_slab() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Cache::<NoInterrupts>::new(0, 256);
    let per_slab = cache.stats().objects_per_slab;
    let objects: Vec<_> = (0..2 * per_slab).map(|_| cache.allocate(heap.frames()).unwrap()).collect();
    for object in [objects[3], objects[per_slab + 1], objects[0]] {
        free(&cache, &heap, object).unwrap();
        assert_eq!(cache.allocate(heap.frames()), Some(object));
    }
    assert_eq!(cache.stats().slabs, 2);
}

#[test]
fn slabs_leave_the_middle_of_the_list_in_any_order() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Cache::<NoInterrupts>::new(0, 1024);
    let per_slab = cache.stats().objects_per_slab;
    let before = heap.frames().stats();
    let mut objects: Vec<_> = (0..6 * per_slab).map(|_| cache.allocate(heap.frames()).unwrap()).collect();
    // Every slab partial first, then emptied from the middle outwards.
    for slab in 0..6 {
        free(&cache, &heap, objects[slab * per_slab]).unwrap();
    }
    for slab in [2, 3, 0, 5, 1, 4] {
        for object in &mut objects[slab * per_slab + 1..(slab + 1) * per_slab] {
            free(&cache, &heap, *object).unwrap();
        }
    }
    assert_eq!(heap.frames().stats(), before);
    assert!(cache.allocate(heap.frames()).is_some());
}

#[test]
fn row_63_and_67_exhaustion_is_counted_and_passes_when_something_is_freed() {
    let machine = Machine::new(START, 8);
    let heap = machine.heap();
    let cache = Cache::<NoInterrupts>::new(0, 128);
    let objects: Vec<_> = std::iter::from_fn(|| cache.allocate(heap.frames())).collect();
    assert_eq!(objects.len(), cache.stats().objects_per_slab * 8);
    assert_eq!((cache.stats().failures, heap.frames().stats().free), (1, 0));
    free(&cache, &heap, objects[100]).unwrap();
    assert_eq!(cache.allocate(heap.frames()), Some(objects[100]));
}

#[test]
fn faults_are_told_apart_and_change_nothing() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Cache::<NoInterrupts>::new(3, 64);
    let other = Cache::<NoInterrupts>::new(4, 64);
    let object = cache.allocate(heap.frames()).unwrap();
    let theirs = other.allocate(heap.frames()).unwrap();
    let gone = cache.allocate(heap.frames()).unwrap();
    free(&cache, &heap, gone).unwrap();
    let before = cache.stats();
    let mut on_stack = 0_u8;
    let cases = [
        (gone, Fault::DoubleFree),
        (object.wrapping_add(8), Fault::BadBase),
        (object.wrapping_add(4090), Fault::BadBase),
        (theirs, Fault::BadBase),
        (&raw mut on_stack, Fault::BadAddress),
        (core::ptr::null_mut(), Fault::BadAddress),
        (core::ptr::without_provenance_mut(usize::MAX), Fault::BadAddress),
    ];
    for (pointer, fault) in cases {
        assert_eq!(free(&cache, &heap, pointer), Err(fault), "{pointer:p}");
        assert_eq!(cache.check(heap.frames(), pointer), Err(fault), "{pointer:p}");
    }
    assert_eq!(cache.stats(), before);
    assert_eq!(cache.check(heap.frames(), object), Ok(()));
}
