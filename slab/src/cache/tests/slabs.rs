use crate::sync::Ordering::Relaxed;
use std::format;
use std::string::String;

use proptest::prelude::*;

use super::*;
use crate::Broken;
use crate::cache::magazine::Round;
use crate::cache::slab::{FREE, OF_ALL};
use crate::cache::slabs::Slabs;
use crate::memory::FRAME_SIZE;
use crate::platform::NoInterrupts;
use crate::testing::{Heap, full_report_of};

/// Objects of 1024 bytes: 4 a slab of one page, header off-slab.
const SIZE: usize = 1024;
const SLOTS: usize = 4;

fn cache(heap: &Heap) -> Cache<'_, NoInterrupts> {
    Cache::new(heap.caches(), "slabs", layout(SIZE, 8))
}

fn slabs<'a>(cache: &'a Cache<'_, NoInterrupts>) -> &'a Slabs<NoInterrupts> {
    &cache.existing().unwrap().slabs
}

fn numbers(cache: &Cache<'_, NoInterrupts>) -> (usize, usize) {
    let stats = cache.stats().unwrap();
    (stats.slabs, stats.empty_slabs)
}

#[test]
fn objects_come_from_the_fullest_slab_so_that_emptying_slabs_empty() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let mut objects = allocate(&cache, 3 * SLOTS);
    assert_eq!(numbers(&cache), (3, 0));
    // The slabs have 1, 2 and 3 objects then.
    let mut second = objects.split_off(SLOTS);
    let mut third = second.split_off(SLOTS);
    objects.drain(..3).for_each(|object| free(&cache, object));
    second.drain(..2).for_each(|object| free(&cache, object));
    third.drain(..1).for_each(|object| free(&cache, object));
    let page = |object: &NonNull<u8>| object.as_ptr().addr() / FRAME_SIZE;
    let next = allocate(&cache, 3);
    assert_eq!(page(&next[0]), page(&third[0]), "the slab with three");
    assert_eq!([page(&next[1]), page(&next[2])], [page(&second[0]); 2], "then the one with two");
    // The emptiest slab was left alone, and empties.
    objects.into_iter().for_each(|object| free(&cache, object));
    assert_eq!(numbers(&cache), (3, 1));
    heap.verify().unwrap();
    second.into_iter().chain(third).chain(next).for_each(|object| free(&cache, object));
}

#[test]
fn one_empty_slab_stays_and_the_second_goes_back() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let objects = allocate(&cache, 2 * SLOTS);
    let free_frames = || heap.frames().free_bytes() / FRAME_SIZE;
    let before = free_frames();
    objects[..SLOTS].iter().for_each(|&object| free(&cache, object));
    assert_eq!((numbers(&cache), free_frames()), ((2, 1), before));
    objects[SLOTS..].iter().for_each(|&object| free(&cache, object));
    assert_eq!((numbers(&cache), free_frames()), ((1, 1), before + 1));
    assert_eq!(cache.stats().unwrap().slabs_created, 2);
    assert_eq!(cache.stats().unwrap().slabs_released, 1);
    assert_eq!(cache.shrink(), 1);
    assert_eq!(numbers(&cache), (0, 0));
}

#[test]
fn the_working_set_of_an_interval_stays_in_the_next() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let swing = || {
        let objects = allocate(&cache, 4 * SLOTS);
        objects.into_iter().for_each(|object| free(&cache, object));
    };
    let created = || cache.stats().unwrap().slabs_created;
    heap.maintain(20_000);
    swing();
    assert_eq!(numbers(&cache), (1, 1));
    heap.maintain(40_000);
    swing();
    assert_eq!(numbers(&cache), (4, 4), "as many as the last interval went up and down by");
    let before = created();
    swing();
    assert_eq!(created(), before, "no slab comes or goes");
    heap.maintain(60_000);
    heap.maintain(80_000);
    assert_eq!(numbers(&cache), (1, 1), "an interval without use");
}

#[test]
fn what_a_slab_holds_of_raw_objects_and_memory_comes_back() {
    let machine = Machine::new(START, 256);
    let heap = machine.heap();
    let before = settled(&heap);
    for (size, align) in [(8, 8), (512, 8), (513, 8), (1000, 1), (1024, 1024), (5000, 64), (20_000, 4096), (8, 65536)] {
        let cache = Cache::new(heap.caches(), "any", layout(size, align));
        let objects = allocate(&cache, 5);
        let stats = cache.stats().unwrap();
        assert_eq!(stats.off_slab, [1024, 20_480, 65_536].contains(&stats.object_size));
        for (object, fill) in objects.iter().zip(1..) {
            assert!(object.as_ptr().addr().is_multiple_of(align));
            // SAFETY: an object of `size` bytes, ours.
            unsafe { object.write_bytes(fill, size) };
        }
        for (object, fill) in objects.iter().zip(1..) {
            // SAFETY: written above.
            let (first, last) = unsafe { (object.read(), object.add(size - 1).read()) };
            assert_eq!((first, last), (fill, fill));
        }
        heap.verify().unwrap();
        objects.into_iter().for_each(|object| free(&cache, object));
        cache.destroy().unwrap();
        assert_eq!(settled(&heap), before, "{size}, {align}");
    }
}

#[test]
fn row_64_no_memory_for_an_off_slab_header_gives_the_slab_back() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    free(&cache, cache.allocate().unwrap());
    cache.shrink();
    let mut drought = Drought::of(&heap);
    // What is left of the metadata goes too.
    let blocks: Vec<_> = core::iter::from_fn(|| heap.caches().allocate_metadata(64)).collect();
    drought.give(1);
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
    assert_eq!(heap.frames().free_bytes(), FRAME_SIZE, "the slab is back");
    heap.verify().unwrap();
    for block in blocks {
        // SAFETY: allocated above with that size.
        unsafe { heap.caches().free_metadata(block.as_ptr(), 64) };
    }
    drop(drought);
    free(&cache, cache.allocate().unwrap());
}

#[test]
fn a_walk_visits_every_allocated_object_once_and_may_free() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let mut objects = allocate(&cache, 3 * SLOTS);
    for index in [10, 7, 2] {
        free(&cache, objects.remove(index));
    }
    let mut seen = Vec::new();
    cache.for_each_object(|object| seen.push(object));
    seen.sort();
    objects.sort();
    assert_eq!(seen, objects);
    cache.for_each_object(|object| free(&cache, object));
    assert_eq!(cache.stats().unwrap().in_use, 0);
    heap.verify().unwrap();
    assert_eq!(numbers(&cache), (3, 3), "no slab goes during the walk");
    assert_eq!(cache.shrink(), 3);
}

#[test]
fn objects_are_taken_from_slabs_that_are_there_with_one_hold_of_the_lock() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap).with_limit(6);
    let mut objects = [Round::NONE; 8];
    free(&cache, cache.allocate().unwrap());
    assert_eq!(slabs(&cache).take_bulk(heap.caches(), &mut objects[..3]), 3);
    assert_eq!(slabs(&cache).take_bulk(heap.caches(), &mut objects[3..]), 1, "it does not grow");
    slabs(&cache).put(heap.caches(), objects[..4].iter().map(|round| round.object), true).release();
    let more = allocate(&cache, 5);
    assert_eq!(slabs(&cache).take_bulk(heap.caches(), &mut objects), 1, "nor pass the limit");
    slabs(&cache).put(heap.caches(), objects[..1].iter().map(|round| round.object), true).release();
    more.into_iter().for_each(|object| free(&cache, object));
    heap.verify().unwrap();
}

#[test]
fn an_object_that_is_no_free_round_is_reported_when_it_reaches_its_slab() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let (object, other) = (cache.allocate().unwrap(), cache.allocate().unwrap());
    cache.take_back(other).unwrap();
    let objects = [object.as_ptr(), other.as_ptr()];
    let report = report_of(|| _ = slabs(&cache).put(heap.caches(), objects, true).release());
    assert_eq!(report, format!("kslab: bad free of {object:p}: not a free object, but in a magazine"));
    assert_eq!(slabs(&cache).numbers().taken, 1, "the other one is back");
    heap.verify().unwrap();
}

#[test]
fn verify_names_each_kind_of_corruption() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let objects = allocate(&cache, 2 * SLOTS + 1);
    let slabs = slabs(&cache);
    let frames = heap.frames();
    let says = || match heap.verify() {
        Err(Broken::Cache { id, what }) => {
            assert_eq!(id, slabs.id);
            what
        }
        other => panic!("{other:?}"),
    };
    let (slab, slot) = slabs.find(frames, objects[0].as_ptr()).unwrap();

    let state = slab.states()[slot].swap(FREE, Relaxed);
    assert_eq!(says(), "the used count or the summary of a slab is not that of its slots");
    slab.states()[slot].store(state, Relaxed);
    heap.verify().unwrap();

    let list = slab.list();
    slab.set_list(3);
    assert_eq!(says(), "a slab is in the list of another fullness");
    slab.set_list(list);

    let (next, previous) = (slab.next(OF_ALL), slab.previous(OF_ALL));
    let first = frames.frame_of(objects[0].as_ptr()).unwrap();
    slab.set_previous(OF_ALL, if previous == Some(first) { None } else { Some(first) });
    assert_eq!(says(), "a slab does not link back to the one before it");
    slab.set_previous(OF_ALL, previous);

    let (last, _) = slabs.find(frames, objects[2 * SLOTS].as_ptr()).unwrap();
    let after_last = last.next(OF_ALL);
    last.set_next(OF_ALL, None);
    assert_eq!(says(), "the number of slabs or of objects is not that of the lists");
    last.set_next(OF_ALL, after_last);
    assert_eq!(slab.next(OF_ALL), next);

    slabs.corrupt(|filled, _| *filled ^= 1 << 1);
    assert_eq!(says(), "the bit of a list does not say whether it has a slab");
    slabs.corrupt(|filled, _| *filled ^= 1 << 1);

    slabs.corrupt(|_, empty| *empty += 1);
    assert_eq!(says(), "the number of empty slabs is wrong");
    slabs.corrupt(|_, empty| *empty -= 1);

    let place = frames.slab_place(first);
    frames.make_slab(first, 1, slabs.id + 1, place);
    assert_eq!(says(), "a frame of a slab does not name its cache");
    frames.make_slab(first, 1, slabs.id, place);
    heap.verify().unwrap();
    objects.into_iter().for_each(|object| free(&cache, object));
}

/// The page that each object is in.
fn pages(objects: &[NonNull<u8>]) -> Vec<usize> {
    objects.iter().map(|object| object.as_ptr().addr() / FRAME_SIZE).collect()
}

/// A heap and a cache of 256-byte objects (15 a slab), in which CPU 0 and CPU 1 each have three, in turns.
fn with_two_cpus(test: impl FnOnce(&crate::Heap<Threads>, &Cache<'_, Threads>, [Vec<NonNull<u8>>; 2])) {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "homes", layout(256, 8));
    let mut objects = [Vec::new(), Vec::new()];
    for _ in 0..3 {
        for (cpu, objects) in objects.iter_mut().enumerate() {
            objects.push(on_cpu(cpu, || cache.allocate().unwrap()));
        }
    }
    test(&heap, &cache, objects);
    cache.destroy().unwrap();
    heap.verify().unwrap();
}

#[test]
fn a_cpu_has_a_slab_of_its_own_and_comes_back_to_it() {
    with_two_cpus(|heap, cache, [first, second]| {
        let (homes, others) = (pages(&first), pages(&second));
        assert_eq!((homes[0], others[0]), (homes[2], others[2]), "each takes from its own");
        assert_ne!(homes[0], others[0], "and they are two");
        heap.verify().unwrap();
        // A fuller slab is left to the CPU whose home it is.
        let more = on_cpu(1, || allocate(cache, 6));
        assert_eq!(pages(&allocate(cache, 1))[0], homes[0]);
        assert_eq!(pages(&more)[5], others[0]);
        cache.for_each_object(|object| free(cache, object));
    });
}

#[test]
fn a_home_ends_with_the_interval() {
    with_two_cpus(|heap, cache, [_, second]| {
        let more = on_cpu(1, || allocate(cache, 6));
        heap.maintain(0);
        heap.maintain(20_000);
        heap.verify().unwrap();
        assert_eq!(pages(&allocate(cache, 1))[0], pages(&second)[0], "the fullest of all now");
        assert_eq!(cache.stats().unwrap().in_use, 6 + more.len() + 1);
        cache.for_each_object(|object| free(cache, object));
    });
}

#[test]
fn what_is_free_in_the_home_of_another_cpu_is_not_lost_to_one_that_finds_no_memory() {
    with_two_cpus(|heap, cache, [first, second]| {
        let drought = Drought::of(heap);
        let slots = cache.stats().unwrap().objects_per_slab;
        let rest = allocate(cache, 2 * slots - first.len() - second.len());
        assert_eq!(cache.allocate(), Err(AllocError::NoMemory));
        heap.verify().unwrap();
        // One that must not grow takes it at once.
        on_cpu(1, || free(cache, second[0]));
        drop(drought);
        cache.shrink();
        assert_eq!(pages(&[cache.allocate_without_growing().unwrap()]), pages(&second[..1]));
        assert_eq!(rest.len(), 2 * slots - 6);
        cache.for_each_object(|object| free(cache, object));
    });
}

#[test]
fn row_108_one_live_object_a_slab_is_seen_in_the_counts() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let mut objects = allocate(&cache, 10 * SLOTS);
    objects.sort();
    objects.iter().enumerate().filter(|(index, _)| index % SLOTS > 0).for_each(|(_, object)| free(&cache, *object));
    cache.shrink();
    let stats = cache.stats().unwrap();
    let seen = (stats.in_use, stats.slabs, stats.empty_slabs, stats.objects_per_slab);
    assert_eq!(seen, (10, 10, 0, SLOTS), "none of these slabs can go back");
    objects.iter().step_by(SLOTS).for_each(|object| free(&cache, *object));
    cache.shrink();
    assert_eq!(cache.stats().unwrap().slabs, 0);
}

const OVERWRITTEN: &str = "the allocator's own data was overwritten";

/// The report of what is found when every object is freed and others are allocated, after `damage` to the slab of the
/// first of `SLOTS + 1` objects.
fn found_after(damage: impl FnOnce(crate::cache::slab::Slab<'_>)) -> String {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let objects = allocate(&cache, 3 * SLOTS);
    free(&cache, objects[1]);
    let (slab, _) = slabs(&cache).find(heap.frames(), objects[0].as_ptr()).unwrap();
    damage(slab);
    let report = full_report_of(|| {
        objects.iter().enumerate().filter(|(index, _)| *index != 1).for_each(|(_, object)| free(&cache, *object));
        let others = allocate(&cache, 3 * SLOTS);
        others.iter().for_each(|object| free(&cache, *object));
        cache.shrink();
    });
    core::mem::forget(cache);
    report
}

#[test]
fn row_28_a_slabs_header_that_was_overwritten_is_reported_and_no_link_of_it_followed() {
    let far = crate::Frame::containing(1 << 40);
    type Damage<'a> = &'a dyn Fn(crate::cache::slab::Slab<'_>);
    let damages: [(&str, Damage<'_>); 6] = [
        ("next of the list", &|slab| slab.set_next(crate::cache::slab::BY_FULLNESS, far)),
        ("previous of the list", &|slab| slab.set_previous(crate::cache::slab::BY_FULLNESS, far)),
        ("next of all", &|slab| slab.set_next(OF_ALL, far)),
        ("previous of all", &|slab| slab.set_previous(OF_ALL, far)),
        ("list", &|slab| slab.set_list(7777)),
        ("all of it", &|slab| slab.overwrite(0x41)),
    ];
    for (name, damage) in damages {
        let report = found_after(damage);
        let first = report.lines().next().unwrap();
        assert!(first.ends_with(OVERWRITTEN), "{name}: {report}");
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(200, 2))]

    #[test]
    fn row_28_whatever_is_written_over_a_slabs_header_is_reported(field in 0..6, value: u32) {
        // Not a frame of the machine, where there might be a slab.
        let frame = crate::Frame::containing(u64::from(value | 1 << 20) << 12);
        let report = found_after(|slab| match field {
            0 => slab.set_next(crate::cache::slab::BY_FULLNESS, frame),
            1 => slab.set_previous(crate::cache::slab::BY_FULLNESS, frame),
            2 => slab.set_next(OF_ALL, frame),
            3 => slab.set_previous(OF_ALL, frame),
            4 => slab.set_list(100 + value as usize % 10_000),
            _ => slab.overwrite(value as u8),
        });
        let first = report.lines().next().unwrap();
        let known = [OVERWRITTEN, "not the start of an allocation", "double free: it is free already, or was never allocated"];
        assert!(known.iter().any(|text| first.ends_with(text)), "{report}");
    }
}

#[test]
fn row_104_a_count_that_would_go_below_0_is_reported() {
    let report = found_after(|slab| slab.set_used(0));
    assert!(report.lines().next().unwrap().ends_with(OVERWRITTEN), "{report}");
    let report = found_after(|slab| slab.set_used(600));
    assert!(report.lines().next().unwrap().ends_with(OVERWRITTEN), "{report}");
}

#[test]
fn row_113_a_cache_whose_name_was_overwritten_is_reported_without_it() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let cache = cache(&heap);
    let object = cache.allocate().unwrap();
    cache.existing().unwrap().name.overwrite();
    free(&cache, object);
    let report = full_report_of(|| free(&cache, object));
    assert!(report.contains("\n  kind: DUPFREE\n  cache: a cache whose name was overwritten\n"), "{report}");
    assert_eq!(cache.stats().unwrap().name, "a cache whose name was overwritten");
}
