use crate::sync::Ordering::Relaxed;
use std::string::String;
use std::sync::mpsc::sync_channel;

use proptest::prelude::*;

use super::*;
use crate::cache::Round;
use crate::cache::USED;
use crate::fault::OnFault;
use crate::memory::FRAME_SIZE;
use crate::testing::{full_report_of, report_of};
use crate::{Broken, Frame};

/// Objects of 256 bytes have magazines of 15 rounds at first.
const SIZE: usize = 256;
const ROUNDS: usize = 15;

type Threaded<'a> = Cache<'a, Threads>;

fn cache(heap: &Heap<Threads>) -> Threaded<'_> {
    Cache::new(heap.caches(), "magazines", layout(SIZE, 8))
}

/// Full and empty magazines of the depot.
fn depot(cache: &Threaded<'_>) -> (usize, usize) {
    let stats = cache.stats().unwrap();
    (stats.full_magazines, stats.empty_magazines)
}

fn in_magazines(cache: &Threaded<'_>) -> usize {
    cache.stats().unwrap().in_magazines
}

/// Allocates so many objects, and frees them all.
fn cycle(cache: &Threaded<'_>, objects: usize) {
    allocate(cache, objects).into_iter().for_each(|object| free(cache, object));
}

#[test]
fn what_is_freed_is_allocated_next_without_its_slab() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    let objects = allocate(&cache, 3);
    objects.iter().for_each(|&object| free(&cache, object));
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.in_magazines, stats.magazine_rounds), (0, 3, ROUNDS));
    for &object in objects.iter().rev() {
        assert_eq!(cache.allocate(), Ok(object), "last in, first out");
    }
    assert_eq!((stats.allocations, stats.frees), (3, 3));
    heap.verify().unwrap();
    objects.into_iter().for_each(|object| free(&cache, object));
    cache.destroy().unwrap();
}

#[test]
fn row_109_going_back_and_forth_at_the_end_of_a_magazine_leaves_the_depot_alone() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    // One magazine full, the other about to be begun.
    cycle(&cache, ROUNDS);
    let mut objects = allocate(&cache, 3 * ROUNDS);
    objects.drain(..2 * ROUNDS).for_each(|object| free(&cache, object));
    let before = (depot(&cache), cache.stats().unwrap().slabs_created);
    for burst in [1, 2, 3, ROUNDS, 1] {
        for _ in 0..3 {
            let back = allocate(&cache, burst);
            assert_eq!((depot(&cache), cache.stats().unwrap().slabs_created), before);
            back.into_iter().for_each(|object| free(&cache, object));
            assert_eq!((depot(&cache), cache.stats().unwrap().slabs_created), before);
        }
    }
    objects.into_iter().for_each(|object| free(&cache, object));
    heap.verify().unwrap();
}

#[test]
fn full_magazines_go_to_the_depot_and_on_to_another_cpu() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    cycle(&cache, 4 * ROUNDS);
    assert_eq!(depot(&cache), (2, 0));
    assert_eq!(in_magazines(&cache), 4 * ROUNDS);
    let slabs = cache.stats().unwrap().slabs_created;
    on_cpu(1, || {
        let objects = allocate(&cache, 2 * ROUNDS);
        assert_eq!(depot(&cache), (0, 0));
        objects.into_iter().for_each(|object| free(&cache, object));
    });
    assert_eq!(cache.stats().unwrap().slabs_created, slabs);
    // CPU 1 has what it freed; CPU 0 cannot have it, and draws on its own and on the slabs.
    assert_eq!(in_magazines(&cache), 4 * ROUNDS);
    heap.verify().unwrap();
}

#[test]
fn a_depot_holds_only_so_many_full_magazines() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    // A 32nd of 2 MiB.
    cycle(&cache, 24 * ROUNDS);
    let most = heap.size() / 32 / (ROUNDS * cache.stats().unwrap().object_size);
    assert!((5..20).contains(&most), "{most}");
    assert_eq!(depot(&cache).0, most);
    assert!(in_magazines(&cache) <= (most + 2) * ROUNDS, "{}", in_magazines(&cache));
    heap.verify().unwrap();
}

#[test]
fn magazines_that_an_interval_did_not_need_go_back() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    heap.maintain(20_000);
    cycle(&cache, 6 * ROUNDS);
    heap.maintain(40_000);
    assert_eq!(depot(&cache), (4, 0), "they came in this interval");
    // Two of the four are wanted.
    cycle(&cache, 4 * ROUNDS);
    assert_eq!(depot(&cache), (4, 0));
    heap.maintain(60_000);
    assert_eq!(depot(&cache), (2, 0));
    assert_eq!(cache.stats().unwrap().magazines_reaped, 2);
    heap.maintain(80_000);
    assert_eq!(depot(&cache), (0, 0));
    heap.verify().unwrap();
}

/// So often that magazines grow.
fn meet_at_depot(cache: &Threaded<'_>) {
    for met in 1..=4 {
        std::thread::scope(|scope| {
            cache.existing().unwrap().magazines.with_depot_locked(|contention| {
                scope.spawn(|| {
                    be_cpu(1);
                    // It has no magazine, and neither has the depot.
                    cache.allocate().unwrap();
                });
                while contention() < met {
                    std::thread::yield_now();
                }
            });
        });
    }
}

#[test]
fn magazines_grow_when_cpus_meet_at_the_depot_and_the_small_ones_go() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = &cache(&heap);
    heap.maintain(20_000);
    cycle(cache, 1);
    meet_at_depot(cache);
    cycle(cache, 4 * ROUNDS);
    assert_eq!(cache.stats().unwrap().depot_contention, 4);
    assert_eq!(cache.stats().unwrap().magazine_rounds, ROUNDS);
    heap.maintain(40_000);
    assert_eq!(cache.stats().unwrap().magazine_rounds, 2 * ROUNDS + 1);
    assert_eq!(cache.stats().unwrap().depot_contention, 4);
    // The next exchange lets the small ones go; then one magazine holds what two did.
    cycle(cache, 4 * ROUNDS);
    cycle(cache, 4 * ROUNDS);
    assert!(depot(cache).0 <= 1, "{:?}", depot(cache));
    heap.verify().unwrap();
}

#[test]
fn a_small_magazine_makes_place_for_a_larger_one_when_the_slabs_fill_it() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = &cache(&heap);
    heap.maintain(20_000);
    cycle(cache, 1);
    meet_at_depot(cache);
    heap.maintain(40_000);
    let mut objects = allocate(cache, in_magazines(cache) + 1);
    assert_eq!(in_magazines(cache), ROUNDS, "half of the larger one");
    objects.extend(allocate(cache, ROUNDS));
    assert_eq!(in_magazines(cache), 0);
    heap.verify().unwrap();
    objects.into_iter().for_each(|object| free(cache, object));
}

#[test]
fn other_cpus_give_up_their_magazines_when_memory_was_called_for() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    on_cpu(1, || cycle(&cache, 10));
    on_cpu(2, || cycle(&cache, 2 * ROUNDS));
    heap.shrink();
    assert_eq!(in_magazines(&cache), 10 + 2 * ROUNDS, "what others have in hand only they can give");
    on_cpu(1, || heap.maintain(0));
    assert_eq!(in_magazines(&cache), 2 * ROUNDS);
    let object = cache.allocate().unwrap();
    on_cpu(2, || free(&cache, object));
    assert_eq!(in_magazines(&cache), 1, "at an exchange");
    heap.verify().unwrap();
}

#[test]
fn row_97_a_cpu_that_leaves_gives_its_magazines_back() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = cache(&heap);
    on_cpu(1, || {
        cycle(&cache, ROUNDS + 3);
        let block = heap.allocate(layout(SIZE, 8)).unwrap();
        // SAFETY: just allocated.
        unsafe { heap.free(block, layout(SIZE, 8)) };
    });
    assert_eq!(in_magazines(&cache), ROUNDS + 3);
    // SAFETY: its thread is gone.
    unsafe { heap.retire_cpu(1) };
    // SAFETY: there is no such CPU.
    unsafe { heap.retire_cpu(7) };
    assert_eq!(in_magazines(&cache), 0);
    on_cpu(1, || cycle(&cache, 5));
    assert_eq!(in_magazines(&cache), 5, "it may come back");
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn row_78_destroy_drains_the_magazines_of_all_cpus() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = cache(&heap);
    for number in 0..4 {
        on_cpu(number, || cycle(&cache, number * ROUNDS + 5));
    }
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn row_98_a_cpu_above_the_maximum_works_through_the_slabs() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    for number in [4, 5, usize::MAX] {
        on_cpu(number, || cycle(&cache, 2 * ROUNDS));
        assert_eq!(in_magazines(&cache), 0);
        assert_eq!(cache.stats().unwrap().in_use, 0);
    }
    // What it frees, and what is freed to it, is like any other.
    cycle(&cache, 3);
    let object = on_cpu(4, || cache.allocate().unwrap());
    free(&cache, object);
    assert_eq!(in_magazines(&cache), 4);
    heap.verify().unwrap();
}

#[test]
fn row_99_before_a_cpu_has_a_number_the_slabs_serve() {
    let machine = Machine::new(START, LARGE);
    let heap = Heap::<Threads>::new();
    let cache = cache(&heap);
    be_cpu(usize::MAX);
    assert_eq!(cache.allocate(), Err(AllocError::NoMemory), "before there is memory");
    // SAFETY: the memory is the machine's.
    unsafe { heap.init([machine.region()], machine.base()) }.unwrap();
    let objects = allocate(&cache, 5);
    free(&cache, objects[0]);
    assert_eq!(in_magazines(&cache), 0);
    be_cpu(0);
    objects[1..].iter().for_each(|&object| free(&cache, object));
    assert_eq!(in_magazines(&cache), 4);
    heap.verify().unwrap();
    cache.destroy().unwrap();
}

#[test]
fn row_65_without_memory_for_magazines_objects_go_to_their_slabs() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let before = settled(&heap);
    let cache = cache(&heap);
    let objects = allocate(&cache, 3 * ROUNDS);
    // The places of the CPUs take 256 bytes, a magazine 128.
    let drought = Drought::of(&heap);
    let blocks = [256, 128].map(|bytes| {
        let blocks: Vec<_> = core::iter::from_fn(|| heap.caches().allocate_metadata(bytes)).collect();
        (bytes, blocks)
    });
    let release = |(bytes, blocks): &(usize, Vec<NonNull<u8>>)| {
        for block in blocks {
            // SAFETY: allocated above with that size, and freed once.
            unsafe { heap.caches().free_metadata(block.as_ptr(), *bytes) };
        }
    };
    objects[..5].iter().for_each(|&object| free(&cache, object));
    assert_eq!(in_magazines(&cache), 0, "no places");
    release(&blocks[0]);
    objects[5..10].iter().for_each(|&object| free(&cache, object));
    assert_eq!(in_magazines(&cache), 0, "no magazine");
    heap.verify().unwrap();
    release(&blocks[1]);
    drop(drought);
    objects[10..].iter().for_each(|&object| free(&cache, object));
    assert_eq!(in_magazines(&cache), 3 * ROUNDS - 10);
    cache.destroy().unwrap();
    assert_eq!(settled(&heap), before);
}

#[test]
fn row_94_what_one_cpu_allocates_and_another_frees_stays_bounded() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = &cache(&heap);
    let objects = if cfg!(miri) { 300 } else { 50_000 };
    let (sender, receiver) = sync_channel::<Sent>(ROUNDS);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            be_cpu(1);
            (0..objects).for_each(|_| sender.send(Sent(cache.allocate().unwrap())).unwrap());
        });
        scope.spawn(move || {
            be_cpu(2);
            receiver.into_iter().for_each(|sent| free(cache, sent.0));
        });
    });
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.allocations, stats.frees), (0, objects as u64, objects as u64));
    // On their way, in the magazines of two CPUs and of the depot.
    let most = ROUNDS + (4 + 4) * stats.magazine_rounds;
    assert!(stats.in_magazines <= most, "{stats:?}");
    assert!(stats.slabs <= (most + ROUNDS) / stats.objects_per_slab + 2, "{stats:?}");
    heap.verify().unwrap();
}

/// An object on its way to another thread.
struct Sent(NonNull<u8>);

// SAFETY: only a pointer; whoever receives it has the object alone.
unsafe impl Send for Sent {}

#[test]
fn the_layer_is_off_without_cpus_in_small_heaps_for_large_objects_and_on_request() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap();
    let off = Cache::new(heap.caches(), "no CPUs", layout(SIZE, 8));
    free(&off, off.allocate().unwrap());
    let stats = off.stats().unwrap();
    assert_eq!((stats.in_magazines, stats.magazine_rounds), (0, 0));

    let small = Machine::new(START, 128);
    let small = small.heap_on::<Threads>();
    let small = cache(&small);
    cycle(&small, 5);
    assert_eq!(in_magazines(&small), 0);

    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let large = Cache::new(heap.caches(), "large", layout(40_000, 8));
    let asked = cache(&heap).without_magazines();
    for cache in [&large, &asked] {
        cycle(cache, 2);
        let stats = cache.stats().unwrap();
        assert_eq!((stats.in_magazines, stats.magazine_rounds), (0, 0), "{}", stats.name);
    }
}

#[test]
fn a_platform_without_magazines_keeps_nothing_back() {
    let machine = Machine::new(START, 512);
    let heap: crate::Heap<crate::platform::WithoutMagazines<Threads>> = machine.heap_on();
    let layout = core::alloc::Layout::new::<[u64; 8]>();
    let block = heap.allocate(layout).unwrap();
    // SAFETY: allocated above.
    unsafe { heap.free(block, layout) };
    let stats = heap.cache_stats().find(|stats| stats.object_size == 64).unwrap();
    assert_eq!((stats.magazine_rounds, stats.in_magazines, stats.empty_slabs), (0, 0, 1));
    assert_eq!(heap.frames().stats().stocked, 0);
}

#[test]
fn verify_sees_a_round_that_is_no_free_object() {
    let machine = Machine::new(START, 512);
    let heap: crate::Heap<Threads> = machine.heap_on();
    let caches = heap.caches();
    let core = caches.class(7);
    let object = core.allocate(caches, true, USED).unwrap().as_ptr();
    // SAFETY: allocated above.
    unsafe { core.free(caches, object, USED) }.unwrap();
    assert_eq!(heap.verify(), Ok(()));
    let (slab, slot) = core.slabs.find(heap.frames(), object).unwrap();
    let state = slab.states()[slot].swap(USED, Relaxed);
    let what = "a round of a magazine is not a free object of the cache";
    assert_eq!(heap.verify(), Err(Broken::Cache { id: 7, what }));
    slab.states()[slot].store(state, Relaxed);
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn a_magazine_that_is_begun_is_the_loaded_one() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on();
    let cache = cache(&heap);
    allocate(&cache, 2 * ROUNDS).into_iter().for_each(|object| free(&cache, object));
    let objects = allocate(&cache, ROUNDS + 1);
    assert_eq!(heap.verify(), Ok(()));
    objects.into_iter().for_each(|object| free(&cache, object));
    assert_eq!(heap.verify(), Ok(()));
}

/// What is reported when so many objects come and go after `damage` to the loaded magazine.
fn found_after(damage: impl Fn(&crate::cache::magazine::Magazine)) -> String {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on();
    let cache = cache(&heap);
    cycle(&cache, ROUNDS / 2);
    cache.existing().unwrap().magazines.with_loaded(damage);
    let report = full_report_of(|| {
        let objects = allocate(&cache, 5 * ROUNDS);
        objects.into_iter().for_each(|object| free(&cache, object));
        cache.shrink();
    });
    core::mem::forget(cache);
    report
}

#[test]
fn row_29_a_magazine_that_was_overwritten_is_reported_and_what_it_held_not_handed_out() {
    let overwritten = ": the allocator's own data was overwritten";
    let far = [(60_000, 15), (7, 0), (200, 200), (u16::MAX, u16::MAX)];
    // What reads or writes beside the magazine, within the metadata, before it is noticed: Miri notices first.
    let near = if cfg!(miri) { &[][..] } else { &[(16, 15), (7, 16), (7, 127)] };
    for &(rounds, capacity) in far.iter().chain(near) {
        let report = found_after(|magazine| magazine.overwrite(rounds, capacity));
        let first = report.lines().next().unwrap();
        // A count within what the largest holds leads to a round that is none, if it is met first.
        let expected = first.ends_with(overwritten) || first.ends_with(": not a free object, but in a magazine");
        assert!(expected, "{rounds} of {capacity}: {report}");
    }
    let wrong = core::ptr::without_provenance_mut::<u8>(0x4141_4140);
    let rounds: [fn(Round, *mut u8) -> Round; 2] =
        [|round, wrong| Round { object: wrong, ..round }, |_, wrong| Round { object: wrong, state: wrong.cast() }];
    // Other builds believe what is in a magazine.
    for overwritten in rounds.into_iter().filter(|_| cfg!(debug_assertions)) {
        let report = found_after(|magazine| {
            let round = magazine.pop().unwrap();
            magazine.push(overwritten(round, wrong));
        });
        assert!(report.starts_with("kslab: bad free of 0x41414140: not a free object, but in a magazine"), "{report}");
    }
}

proptest! {
    #![proptest_config(crate::testing::cases(100, 1))]

    #[test]
    fn row_29_whatever_is_written_over_a_magazines_counts_is_reported(rounds in 200..=u16::MAX, capacity: u16) {
        let report = found_after(|magazine| magazine.overwrite(rounds, capacity));
        assert!(report.lines().next().unwrap().ends_with(": the allocator's own data was overwritten"), "{report}");
    }
}

/// Page frames, the last of which is that where `object` was, with the state of an allocated slot in each byte.
fn frames_in_place_of(heap: &Heap<Threads>, object: NonNull<u8>) -> Vec<Frame> {
    let frames = heap.frames();
    let mut taken = Vec::new();
    while taken.last().copied() != frames.frame_of(object.as_ptr()) {
        let frame = frames.allocate(Order::ZERO).unwrap();
        // SAFETY: allocated just now.
        unsafe { frames.pointer(frame).write_bytes(USED, FRAME_SIZE) };
        taken.push(frame);
    }
    taken
}

#[test]
fn row_14_what_a_cpu_has_had_last_is_not_freed_again_when_its_slab_went_back() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    let object = on_cpu(1, || {
        // The third time its round is known.
        (0..3).for_each(|_| cycle(&cache, 1));
        cache.allocate().unwrap()
    });
    let taken = on_cpu(2, || {
        free(&cache, object);
        cache.shrink();
        frames_in_place_of(&heap, object)
    });
    on_cpu(1, || heap.verify()).unwrap();
    let report = on_cpu(1, || report_of(|| free(&cache, object)));
    assert!(report.ends_with(": not the start of an allocation"), "{report}");
    // SAFETY: allocated above.
    taken.into_iter().for_each(|frame| unsafe { heap.frames().free(frame, Order::ZERO) });
    heap.verify().unwrap();
}

#[test]
fn row_14_nor_what_was_in_a_magazine_that_comes_back() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    let (last, two) = on_cpu(1, || {
        let objects = allocate(&cache, ROUNDS + 2);
        objects.iter().for_each(|&object| free(&cache, object));
        // The two of the second slab, and one of the full magazine, which is the loaded one then.
        let two = allocate(&cache, 2);
        (cache.allocate().unwrap(), two)
    });
    let (taken, other) = on_cpu(2, || {
        two.iter().for_each(|&object| free(&cache, object));
        cache.shrink();
        (frames_in_place_of(&heap, two[0]), cache.allocate().unwrap())
    });
    let report = on_cpu(1, || {
        free(&cache, last);
        // This one goes where the second of the two was; behind it was the first.
        free(&cache, other);
        heap.verify().unwrap();
        report_of(|| free(&cache, two[0]))
    });
    assert!(report.ends_with(": not the start of an allocation"), "{report}");
    // SAFETY: allocated above.
    taken.into_iter().for_each(|frame| unsafe { heap.frames().free(frame, Order::ZERO) });
    heap.verify().unwrap();
}

#[test]
fn checks_count_from_the_next_allocation_on_whatever_is_at_hand() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    let checked = || {
        let mut checked = 0;
        heap.for_each_allocation(|_| checked += 1);
        checked
    };
    let earlier = [1, 2].map(|cpu| {
        on_cpu(cpu, || {
            (0..3).for_each(|_| cycle(&cache, 3));
            cache.allocate().unwrap()
        })
    });
    for (rule, expected) in [("*:redzone", 2), ("*:none", 0)] {
        heap.set_checks(rule).unwrap();
        let objects = [1, 2].map(|cpu| on_cpu(cpu, || cache.allocate().unwrap()));
        assert_eq!(checked(), expected, "{rule}");
        objects.into_iter().for_each(|object| free(&cache, object));
    }
    earlier.into_iter().for_each(|object| free(&cache, object));
    heap.verify().unwrap();
}

#[test]
fn row_5_an_object_in_two_rounds_is_handed_out_once() {
    let report = found_after(|magazine| {
        let round = magazine.pop().unwrap();
        assert!(magazine.push(round) && magazine.push(round));
    });
    assert!(report.contains(": not a free object, but in a magazine"), "{report}");
}

#[test]
fn row_5_each_object_in_two_rounds_is_reported_when_they_go_back_together() {
    let machine = Machine::new(START, LARGE);
    let heap = machine.heap_on::<Threads>();
    let cache = cache(&heap);
    heap.set_fault_handler(Some(|_| OnFault::KeepOut));
    cycle(&cache, 5);
    cache.existing().unwrap().magazines.with_loaded(|magazine| {
        let [one, two] = [(); 2].map(|()| magazine.pop().unwrap());
        [one, two, two, one].into_iter().for_each(|round| assert!(magazine.push(round)));
    });
    cache.shrink();
    assert_eq!(heap.faults(), 2);
    heap.verify().unwrap();
}
