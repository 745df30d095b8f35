//! A CPU leaves while others work.

use super::*;

/// CPU 0 takes what CPU 1 has, which is still, and gives it to the slabs, while CPU 2 takes from them.
fn a_cpu_leaves(bench: &Bench) {
    let heap = bench.heap();
    explorer::be_cpu(1);
    give(&heap, take(&heap, 2 * ROUNDS));
    explorer::be_cpu(0);
    bench.run([
        // SAFETY: nobody is CPU 1.
        (0, Box::new(|| unsafe { heap.retire_cpu(1) }) as Work<'_>),
        (2, Box::new(|| bench.pair(&heap))),
    ]);
    bench.finish(heap);
}

/// The same, but CPU 1 goes on.
fn a_cpu_leaves_that_does_not(bench: &Bench) {
    let heap = bench.heap();
    explorer::be_cpu(1);
    give(&heap, take(&heap, 3 * ROUNDS));
    explorer::be_cpu(0);
    bench.run([
        // SAFETY: none: this is what must not be done.
        (0, Box::new(|| unsafe { heap.retire_cpu(1) }) as Work<'_>),
        (1, Box::new(|| bench.pair(&heap))),
    ]);
    bench.finish(heap);
}

#[test]
fn row_78_what_a_cpu_has_that_leaves_is_given_back_while_others_work() {
    holds(EveryOrder, a_cpu_leaves);
}

/// CPU 0 takes what CPU 1 has, while CPUs 2 and 3 exchange magazines at the depot.
fn a_cpu_leaves_while_others_exchange(bench: &Bench) {
    let heap = bench.heap();
    explorer::be_cpu(1);
    give(&heap, take(&heap, 2 * ROUNDS));
    explorer::be_cpu(2);
    give(&heap, take(&heap, 4 * ROUNDS));
    let kept = take(&heap, 2 * ROUNDS);
    explorer::be_cpu(0);
    bench.run([
        // SAFETY: nobody is CPU 1.
        (0, Box::new(|| unsafe { heap.retire_cpu(1) }) as Work<'_>),
        (2, Box::new(|| bench.pair(&heap))),
        (3, Box::new(|| bench.pair(&heap))),
    ]);
    give(&heap, kept);
    bench.finish(heap);
}

#[test]
fn row_97_a_cpu_leaves_while_two_exchange_magazines() {
    // There are too many for all of them.
    holds(Random(2000), a_cpu_leaves_while_others_exchange);
}

#[test]
fn row_97_it_takes_locks() {
    fails_with(EveryOrder, Bug::NoExclusion, a_cpu_leaves_while_others_exchange);
}

#[test]
fn row_78_it_takes_locks() {
    fails_with(EveryOrder, Bug::NoExclusion, a_cpu_leaves);
}

#[test]
fn a_cpu_that_goes_on_after_it_has_left_is_noticed() {
    must_fail(EveryOrder, None, a_cpu_leaves_that_does_not);
}
