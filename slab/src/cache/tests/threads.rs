use super::*;

#[test]
fn cpus_at_one_cache_leave_nothing_behind() {
    let machine = Machine::new(START, LARGE);
    let heap = &machine.heap_on::<Threads>();
    let before = settled(heap);
    let cache = &Cache::new(heap.caches(), "shared", layout(128, 8));
    let steps = if cfg!(miri) { 60 } else { 20_000 };
    std::thread::scope(|scope| {
        for number in 1..=3_u8 {
            scope.spawn(move || {
                be_cpu(number.into());
                work(heap, cache, number, steps);
            });
        }
    });
    heap.verify().unwrap();
    let stats = cache.stats().unwrap();
    assert_eq!((stats.in_use, stats.allocations), (0, stats.frees));
    for number in 0..4 {
        // SAFETY: the threads have ended.
        unsafe { heap.retire_cpu(number) };
    }
    cache.shrink();
    assert_eq!((cache.stats().unwrap().slabs, cache.stats().unwrap().in_magazines), (0, 0));
    heap.verify().unwrap();
    for number in 1..4 {
        on_cpu(number, || heap.shrink());
    }
    assert!(before - settled(heap) <= 3 * 4096, "the cache's own block, and its places for CPUs");
}

/// Allocates and frees at random; every object must hold what its owner wrote.
fn work(heap: &Heap<Threads>, cache: &Cache<'_, Threads>, number: u8, steps: usize) {
    let mut random = usize::from(number);
    let mut live = Vec::new();
    for step in 0..steps {
        // Knuth's constants for a linear congruential generator; the upper bits are the better ones.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let choice = random >> 33;
        match choice % 16 {
            0 if step % 64 == 0 => _ = heap.shrink(),
            1 if step % 64 == 1 => heap.maintain(step as u64 * 1000),
            2..=8 if live.len() < 150 => {
                let object = cache.allocate().unwrap();
                // SAFETY: 128 bytes, ours.
                unsafe { object.write_bytes(number, 128) };
                live.push(object);
            }
            _ if !live.is_empty() => release(cache, live.swap_remove(choice / 16 % live.len()), number),
            _ => {}
        }
    }
    live.into_iter().for_each(|object| release(cache, object, number));
}

fn release(cache: &Cache<'_, Threads>, object: NonNull<u8>, number: u8) {
    // SAFETY: 128 bytes, ours, written by `work`.
    let bytes = unsafe { object.cast::<[u8; 128]>().read() };
    assert_eq!(bytes, [number; 128]);
    free(cache, object);
}

#[test]
fn caches_come_and_go_while_others_give_memory_back() {
    let machine = Machine::new(START, LARGE);
    let heap = &machine.heap_on::<Threads>();
    let before = settled(heap);
    let rounds = if cfg!(miri) { 5 } else { 500 };
    std::thread::scope(|scope| {
        for number in 1..=2 {
            scope.spawn(move || {
                be_cpu(number);
                for _ in 0..rounds {
                    let cache = Cache::new(heap.caches(), "short-lived", layout(200, 8));
                    allocate(&cache, 20).into_iter().for_each(|object| free(&cache, object));
                    cache.destroy().unwrap();
                }
            });
        }
        scope.spawn(move || {
            be_cpu(3);
            for round in 0..rounds {
                heap.shrink();
                heap.maintain(round as u64 * 20_000);
                let kept = Cache::new(heap.caches(), "kept", layout(64, 8));
                free(&kept, kept.allocate().unwrap());
            }
        });
    });
    for number in 1..4 {
        on_cpu(number, || heap.shrink());
    }
    assert_eq!(settled(heap), before);
}

#[test]
fn the_first_use_on_many_cpus_makes_one_cache() {
    let machine = Machine::new(START, LARGE);
    let heap = &machine.heap_on::<Threads>();
    for _ in 0..if cfg!(miri) { 3 } else { 100 } {
        let cache = &Cache::new(heap.caches(), "first", layout(100, 8));
        std::thread::scope(|scope| {
            for number in 1..=3 {
                scope.spawn(move || {
                    be_cpu(number);
                    free(cache, cache.allocate().unwrap());
                });
            }
        });
        let stats = cache.stats().unwrap();
        assert_eq!((stats.namesake, stats.allocations, stats.frees, stats.in_use), (0, 3, 3, 0));
    }
}
