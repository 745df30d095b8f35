use std::format;
use std::string::{String, ToString};

use super::*;
use crate::memory::FRAME_SIZE;
use crate::platform::NoInterrupts;

type Plain<'a> = Cache<'a, NoInterrupts>;

#[test]
fn a_static_cache_is_registered_on_its_first_use() {
    static HEAP: Heap<Threads> = Heap::new();
    static CACHE: Cache<'static, Threads> =
        Cache::new(HEAP.caches(), "static", Layout::new::<[u64; 75]>()).cache_line_aligned().with_limit(1000);
    let machine = core::mem::ManuallyDrop::new(Machine::new(START, LARGE));
    assert_eq!(CACHE.allocate(), Err(AllocError::NoMemory), "the heap has no memory yet");
    // SAFETY: the machine's memory stays for good.
    unsafe { HEAP.init([machine.region()], machine.base()) }.unwrap();
    let registered = || {
        let mut count = 0;
        HEAP.caches().for_each(|cache| count += usize::from(cache.full_name().name == "static"));
        count
    };
    assert_eq!((registered(), CACHE.stats()), (0, None));
    let object = CACHE.allocate().unwrap();
    assert!(object.as_ptr().addr().is_multiple_of(64));
    assert_eq!((registered(), CACHE.stats().unwrap().object_size), (1, 640));
    assert_eq!((CACHE.name(), CACHE.layout().align()), ("static", 64));
    free(&CACHE, object);
    HEAP.verify().unwrap();
}

#[test]
fn row_75_a_second_cache_of_the_name_is_numbered() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let make = || {
        let cache = Plain::new(heap.caches(), "twin", layout(64, 8));
        free(&cache, cache.allocate().unwrap());
        cache
    };
    let number = |cache: &Plain<'_>| cache.stats().unwrap().namesake;
    let (first, second) = (make(), make());
    assert_eq!((number(&first), number(&second)), (0, 1));
    assert!(first.stats().unwrap().to_string().starts_with("twin "));
    assert!(second.stats().unwrap().to_string().starts_with("twin#1 "));
    first.destroy().unwrap();
    assert_eq!(number(&make()), 2, "no two that are there have the same");
    second.destroy().unwrap();
    assert_eq!(number(&make()), 0);
}

#[test]
fn row_33_objects_of_no_size_are_an_error() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = settled(&heap);
    let cache = Plain::new(heap.caches(), "empty", layout(0, 8));
    assert_eq!(cache.allocate(), Err(AllocError::BadLayout));
    assert_eq!(cache.allocate_without_growing(), Err(AllocError::BadLayout));
    assert_eq!(cache.allocate_bulk(&mut [core::ptr::null_mut(); 2]), 0);
    assert!(cache.reserve(1).is_err());
    assert_eq!((cache.stats(), cache.shrink()), (None, 0));
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn row_76_objects_of_one_byte_work_and_those_above_the_largest_slab_are_an_error() {
    let machine = Machine::new(START, 2048);
    let heap = machine.heap();
    let bytes = Plain::new(heap.caches(), "byte", layout(1, 1));
    let objects = allocate(&bytes, 600);
    for (object, fill) in objects.iter().zip(0_u64..) {
        // SAFETY: a byte, ours.
        unsafe { object.write(fill as u8) };
    }
    // SAFETY: written above.
    assert!(objects.iter().zip(0_u64..).all(|(object, fill)| unsafe { object.read() } == fill as u8));
    objects.into_iter().for_each(|object| free(&bytes, object));

    let largest = Plain::new(heap.caches(), "largest", layout(4 << 20, 8));
    free(&largest, largest.allocate().unwrap());
    for (size, align) in [((4 << 20) + 1, 8), (8, 4 << 20)] {
        let cache = Plain::new(heap.caches(), "too much", layout(size, align));
        assert_eq!(cache.allocate(), Err(AllocError::BadLayout));
    }
}

#[test]
fn a_limit_counts_what_magazines_hold_and_calls_that_back() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "limited", layout(100, 8)).with_limit(10);
    let mut objects = allocate(&cache, 10);
    assert_eq!(cache.allocate(), Err(AllocError::AtLimit));
    assert_eq!(cache.stats().unwrap().failures, 1);
    objects.drain(..6).for_each(|object| free(&cache, object));
    assert_eq!(cache.stats().unwrap().in_magazines, 6);
    // Another CPU has nothing but the slabs, and what is in CPU 0's magazines counts.
    assert_eq!(on_cpu(1, || cache.allocate()), Err(AllocError::AtLimit));
    // CPU 0's own and the depot's help.
    heap.maintain(0);
    objects.extend(allocate(&cache, 6));
    free(&cache, objects.pop().unwrap());
    assert_eq!(on_cpu(0, || cache.allocate_bulk(&mut [core::ptr::null_mut(); 3])), 1);
    heap.verify().unwrap();
}

#[test]
fn a_limit_does_not_call_for_everybodys_memory() {
    fn hook(_: usize) -> crate::reclaim::Decision {
        panic!("memory is not short");
    }
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    heap.set_out_of_memory_hook(Some(hook));
    let cache = Plain::new(heap.caches(), "limited", layout(100, 8)).with_limit(1);
    let object = cache.allocate().unwrap();
    assert_eq!(cache.allocate(), Err(AllocError::AtLimit));
    free(&cache, object);
    free(&cache, cache.allocate().unwrap());
}

#[test]
fn without_growing_only_free_objects_are_had() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "no growing", layout(1000, 8));
    assert_eq!(cache.allocate_without_growing(), Err(AllocError::WouldGrow));
    let object = cache.allocate().unwrap();
    let more: Vec<_> = core::iter::from_fn(|| cache.allocate_without_growing().ok()).collect();
    let stats = cache.stats().unwrap();
    assert_eq!((more.len() + 1, stats.slabs, stats.failures), (stats.objects_per_slab, 1, 2));
    free(&cache, object);
    assert_eq!(cache.stats().unwrap().in_magazines, 1);
    assert_eq!(cache.allocate_without_growing(), Ok(object), "from a magazine too");
    free(&cache, object);
    more.into_iter().for_each(|object| free(&cache, object));
}

#[test]
fn many_objects_come_and_go_in_one_call() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = settled(&heap);
    let cache = Plain::new(heap.caches(), "bulk", layout(200, 8));
    let mut objects = [core::ptr::null_mut(); 100];
    assert_eq!(cache.allocate_bulk(&mut objects), 100);
    for (&object, fill) in objects.iter().zip(0..) {
        // SAFETY: 200 bytes, ours.
        unsafe { object.write_bytes(fill, 200) };
    }
    for (object, fill) in objects.iter().zip(0..) {
        // SAFETY: written above.
        assert_eq!(unsafe { (object.read(), object.add(199).read()) }, (fill, fill));
    }
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.allocations, stats.failures), (100, 100, 0));
    heap.verify().unwrap();
    let objects = objects.map(|object| NonNull::new(object).unwrap());
    // SAFETY: allocated above, and not used again.
    unsafe { cache.free_bulk(&objects) };
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.frees, stats.slabs), (0, 100, 1));
    heap.verify().unwrap();

    let drought = Drought::of(&heap);
    let mut objects = [core::ptr::null_mut(); 100];
    let filled = cache.allocate_bulk(&mut objects);
    assert_eq!((filled, objects[filled]), (cache.stats().unwrap().objects_per_slab, core::ptr::null_mut()));
    let filled = objects[..filled].iter().filter_map(|&object| NonNull::new(object)).collect::<Vec<_>>();
    // SAFETY: as above.
    unsafe { cache.free_bulk(&filled) };
    drop(drought);
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn row_77_a_cache_with_live_objects_is_not_destroyed_and_lists_them() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = Cache::new(heap.caches(), "leaky", layout(64, 8));
    let mut objects = allocate(&cache, 5);
    objects.drain(..3).for_each(|object| free(&cache, object));
    let in_use = cache.destroy().unwrap_err();
    assert_eq!(in_use.objects, 2);
    assert_eq!(in_use.to_string(), "cache leaky is not destroyed: 2 of its objects are allocated");
    let mut listed = Vec::new();
    in_use.cache.for_each_object(|object| listed.push(object));
    listed.sort();
    objects.sort();
    assert_eq!(listed, objects);
    // The cache is as it was.
    let cache = in_use.cache;
    objects.push(cache.allocate().unwrap());
    objects.into_iter().for_each(|object| free(&cache, object));
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn a_cache_dropped_with_live_objects_keeps_those_and_its_own_block_only() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = Cache::new(heap.caches(), "dropped", layout(1000, 8));
    let mut objects = allocate(&cache, 40);
    let kept = objects.remove(0);
    objects.into_iter().for_each(|object| free(&cache, object));
    drop(cache);
    // SAFETY: 1000 bytes, still ours.
    unsafe { kept.write_bytes(1, 1000) };
    // A slab, and at most a page each for its header, the cache's own block, the places of its CPUs.
    let lost = (before - settled(&heap)) / FRAME_SIZE;
    assert!((1..=4).contains(&lost), "{lost}");
    let name = heap.caches().owner_of(kept.as_ptr()).map(|id| heap.caches().name_of(id)).unwrap();
    assert_eq!(name.to_string(), "dropped");
}

#[test]
fn row_66_no_memory_while_a_cache_is_made_is_an_error_and_nothing_leaks() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = settled(&heap);
    let frames = before / FRAME_SIZE;
    let mut succeeded_with = None;
    for given in 0..6 {
        let cache = Plain::new(heap.caches(), "made", layout(1000, 8));
        let mut drought = Drought::of(&heap);
        drought.give(given);
        let result = cache.allocate();
        heap.verify().unwrap();
        drop(drought);
        match result {
            Ok(object) => {
                succeeded_with = succeeded_with.or(Some(given));
                free(&cache, object);
            }
            Err(error) => assert_eq!((error, succeeded_with), (AllocError::NoMemory, None)),
        }
        free(&cache, cache.allocate().unwrap());
        cache.destroy().unwrap();
        assert_eq!(settled(&heap) / FRAME_SIZE, frames, "with {given} frames");
    }
    assert_eq!(succeeded_with, Some(3), "a page each for the cache, the slab and its header");
}

fn refused<P: Platform>(heap: &Heap<P>, cache: &Cache<'_, P>, pointer: *mut u8) -> String {
    let pointer = NonNull::new(pointer).unwrap();
    let in_use = cache.stats().map(|stats| stats.in_use);
    let report = report_of(|| free(cache, pointer));
    heap.verify().unwrap();
    assert_eq!(cache.stats().map(|stats| stats.in_use), in_use, "nothing has changed");
    // SAFETY: refused as well.
    let bulk = report_of(|| unsafe { cache.free_bulk(&[pointer]) });
    assert_eq!(bulk, report);
    report.strip_prefix(&format!("kslab: bad free of {pointer:p}: ")).expect("the pointer").to_string()
}

#[test]
fn each_wrong_free_is_refused_by_name() {
    const DOUBLE: &str = "double free: it is free already, or was never allocated";
    const BASE: &str = "not the start of an allocation";
    const FOREIGN: &str = "not memory of this allocator";
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "inode", layout(96, 8));
    let objects = allocate(&cache, 3);
    let object = objects[0].as_ptr();
    let refused = |pointer| refused(&heap, &cache, pointer);

    free(&cache, objects[2]);
    assert_eq!(refused(objects[2].as_ptr()), DOUBLE, "in a magazine");
    cache.shrink();
    assert_eq!(refused(objects[2].as_ptr()), DOUBLE, "in its slab");
    assert_eq!(refused(object.wrapping_add(20 * 96)), DOUBLE, "never allocated");
    for inside in [1, 8, 95, 97] {
        assert_eq!(refused(object.wrapping_add(inside)), BASE, "interior or misaligned");
    }
    let last = object.wrapping_sub(object.addr() % FRAME_SIZE).wrapping_add(FRAME_SIZE - 64);
    assert_eq!(refused(last), BASE, "the slab's header");
    let mut local = 0_u8;
    assert_eq!(refused(&raw mut local), FOREIGN);
    assert_eq!(refused(core::ptr::without_provenance_mut(0xdead_0000_0000_0008)), FOREIGN, "not canonical");
    let frame = heap.frames().allocate(Order::ZERO).unwrap();
    assert_eq!(refused(heap.frames().pointer(frame)), BASE, "page frames");
    // SAFETY: allocated above.
    unsafe { heap.frames().free(frame, Order::ZERO) };

    let core = core::ptr::from_ref(cache.existing().unwrap()).cast_mut().cast();
    assert_eq!(refused(core), "wrong cache: freed to inode, allocated from the allocator itself");
    let block = heap.allocate(layout(96, 8)).unwrap();
    assert_eq!(refused(block.as_ptr()), "wrong cache: freed to inode, allocated from size-96");
    objects[..2].iter().for_each(|&object| free(&cache, object));
    assert_eq!(cache.stats().unwrap().in_use, 0);
}

#[test]
fn row_9_an_object_of_another_cache_is_refused_and_both_are_named() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let make = |name| Plain::new(heap.caches(), name, layout(64, 8));
    let (inode, twin, dentry, unused) = (make("inode"), make("inode"), make("dentry"), make("unused"));
    let (first, second) = (inode.allocate().unwrap(), twin.allocate().unwrap());
    free(&dentry, dentry.allocate().unwrap());
    let refused = |cache, object: NonNull<u8>| refused(&heap, cache, object.as_ptr());
    assert_eq!(refused(&dentry, first), "wrong cache: freed to dentry, allocated from inode");
    assert_eq!(refused(&dentry, second), "wrong cache: freed to dentry, allocated from inode#1");
    assert_eq!(refused(&twin, first), "wrong cache: freed to inode#1, allocated from inode");
    assert_eq!(refused(&unused, first), "wrong cache: freed to unused, allocated from inode", "never used");
    free(&inode, first);
    free(&twin, second);
}

#[test]
fn rows_7_and_10_a_cache_without_objects_says_what_is_there_as_one_with_objects_does() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let make = |name| Plain::new(heap.caches(), name, layout(64, 8));
    let (unused, used) = (make("unused"), make("used"));
    free(&used, used.allocate().unwrap());
    let run = heap.allocate(layout(5 * 4096, 8)).unwrap();
    let gone = run.as_ptr().wrapping_add(4 * 4096);
    // SAFETY: allocated so; it keeps four frames.
    unsafe { heap.reallocate(run, layout(5 * 4096, 8), 4 * 4096) }.unwrap();
    for cache in [&unused, &used] {
        let refused = |object| refused(&heap, cache, object);
        assert_eq!(refused(run.as_ptr()), "not the start of an allocation", "of this cache");
        assert_eq!(refused(run.as_ptr().wrapping_add(4096)), "not the start of an allocation");
        assert_eq!(refused(gone), "double free: it is free already, or was never allocated");
        assert_eq!(refused(machine.at(0).wrapping_sub(4096)), "not memory of this allocator");
    }
    // SAFETY: it has four frames.
    unsafe { heap.free(run, layout(4 * 4096, 8)) };
}

#[test]
fn a_bad_one_among_many_stops_them_and_those_before_it_are_free() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = Plain::new(heap.caches(), "bulk", layout(64, 8));
    let mut objects = allocate(&cache, 40);
    objects[35] = objects[3];
    // SAFETY: refused where it is wrong.
    let report = report_of(|| unsafe { cache.free_bulk(&objects) });
    assert!(report.contains("double free"), "{report}");
    assert_eq!(cache.stats().unwrap().in_use, 40 - 35);
    heap.verify().unwrap();
}

#[test]
fn row_69_a_drained_reserve_is_an_error_and_refills() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = Cache::new(heap.caches(), "reserved", layout(1000, 8));
    let reserve = cache.reserve(5).unwrap();
    assert_eq!((reserve.available(), cache.stats().unwrap().in_use), (5, 5));
    let drought = Drought::of(&heap);
    let free_ones: Vec<_> = core::iter::from_fn(|| cache.allocate().ok()).collect();
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory), "the cache alone");
    let mut deep: Vec<_> = (0..5).map(|_| reserve.allocate().unwrap()).collect();
    assert_eq!(reserve.available(), 0);
    assert_eq!(reserve.allocate(), Err(AllocError::NoMemory));
    // SAFETY: these are from it, and not used again.
    let give = |object| unsafe { reserve.free(object) };
    give(deep.pop().unwrap());
    assert_eq!(reserve.available(), 1, "first the reserve");
    deep.push(reserve.allocate().unwrap());
    deep.into_iter().chain(free_ones).for_each(give);
    assert_eq!((reserve.available(), cache.stats().unwrap().in_use), (5, 5), "then the cache");
    drop(drought);
    let object = cache.allocate().unwrap();
    free(&cache, object);
    let report = report_of(|| give(object));
    assert!(report.contains("double free"), "{report}");
    drop(reserve);
    heap.verify().unwrap();
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn a_reserve_that_cannot_be_filled_keeps_nothing() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let before = settled(&heap);
    let cache = Plain::new(heap.caches(), "reserved", layout(1000, 8));
    for (objects, error) in [
        (1000, AllocError::NoMemory),
        (1 << 41, AllocError::NoMemory),
        ((1 << 41) + 512, AllocError::NoMemory),
        (usize::MAX / 8, AllocError::NoMemory),
        (usize::MAX, AllocError::NoMemory),
    ] {
        assert_eq!(cache.reserve(objects).map(|_| ()), Err(error), "{objects}");
        assert_eq!(cache.stats().map_or(0, |stats| stats.in_use), 0);
    }
    let limited = Plain::new(heap.caches(), "limited", layout(1000, 8)).with_limit(3);
    assert_eq!(limited.reserve(4).map(|_| ()), Err(AllocError::AtLimit));
    assert_eq!(limited.reserve(0).unwrap().available(), 0);
    cache.destroy().unwrap();
    limited.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn errors_say_what_they_are() {
    let errors = [
        (AllocError::NoMemory, "out of memory"),
        (AllocError::AtLimit, "the cache is at its limit of objects"),
        (AllocError::WouldGrow, "no object is free without taking more memory"),
        (AllocError::ConstructorFailed, "the object's constructor failed"),
        (AllocError::TooManyCaches, "there have been too many caches"),
    ];
    for (error, text) in errors {
        assert_eq!(error.to_string(), text);
    }
    assert_eq!(InitFailed.to_string(), "an object was not constructed");
}
