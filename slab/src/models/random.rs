//! Longer scripts, in random orders.

use super::*;
use crate::Cache;

/// So many orders of each script.
const ORDERS: usize = 1000;

/// Four CPUs allocate and free, each its own objects and those of its neighbour, in the heap and in a cache.
fn four_cpus(bench: &Bench) {
    const EACH: usize = 3 * ROUNDS;
    let heap = bench.heap();
    let cache = Cache::new(heap.caches(), "random", Layout::new::<[u64; 96]>());
    let on_the_way: [_; 4] = core::array::from_fn(|_| RefCell::new(Vec::new()));
    let script = |cpu: usize| {
        let mut mine = Vec::new();
        for turn in 0..EACH {
            mine.push(bench.allocate(&heap));
            let object = cache.allocate().unwrap();
            bench.given(object);
            on_the_way[(cpu + 1) % 4].borrow_mut().push(object);
            if turn % 3 == cpu % 3 {
                mine.drain(..).for_each(|object| bench.free(&heap, object));
            }
            let from_others = on_the_way[cpu].take();
            from_others.into_iter().for_each(|object| {
                bench.given_up(object);
                // SAFETY: allocated from it by the neighbour, who has given it away.
                unsafe { cache.free(object) };
            });
            if turn == EACH / 2 {
                match cpu {
                    0 => _ = heap.shrink(),
                    1 => heap.maintain(20_000),
                    // SAFETY: it is this one, which does nothing else meanwhile.
                    3 => unsafe { heap.retire_cpu(3) },
                    _ => {}
                }
            }
        }
        mine.into_iter().for_each(|object| bench.free(&heap, object));
    };
    let script = &script;
    bench.run((0..4).map(|cpu| (cpu, Box::new(move || script(cpu)) as Work<'_>)));
    on_the_way.iter().flat_map(RefCell::take).for_each(|object| {
        bench.given_up(object);
        // SAFETY: as above.
        unsafe { cache.free(object) };
    });
    heap.verify().unwrap();
    cache.destroy().unwrap();
    bench.finish(heap);
}

#[test]
fn four_cpus_allocate_free_reap_and_leave() {
    holds(Random(ORDERS), four_cpus);
}

#[test]
fn four_cpus_fail_without_locks() {
    fails_with(Random(ORDERS), Bug::NoExclusion, four_cpus);
}

#[test]
fn four_cpus_fail_with_one_number() {
    fails_with(Random(ORDERS), Bug::OneNumber, four_cpus);
}
