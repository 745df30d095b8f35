//! An interrupt or an NMI whose handler allocates and frees, before each step of a call.

use super::*;

/// CPU 0's magazines have so many rounds. It does `work`, and a handler frees an object and allocates another.
fn interrupted(bench: &Bench, non_maskable: bool, rounds: usize, work: impl Fn(&Heap)) {
    let heap = bench.heap();
    give(&heap, take(&heap, 4 * ROUNDS));
    let mut kept = take(&heap, 4 * ROUNDS - rounds);
    let freed_in_handler = kept.pop().unwrap();
    bench.given(freed_in_handler);
    let handler = || {
        bench.free(&heap, freed_in_handler);
        // In an NMI there may be nothing at once.
        if let Some(object) = heap.allocate(LAYOUT) {
            bench.given(object);
            bench.free(&heap, object);
        } else {
            assert!(non_maskable);
        }
    };
    bench.run([(0, Box::new(|| bench.interrupt(non_maskable, || work(&heap), handler)) as Work<'_>)]);
    if bench.is_owned(freed_in_handler) {
        bench.free(&heap, freed_in_handler);
    }
    give(&heap, kept);
    bench.finish(heap);
}

/// From a magazine, and back.
fn a_pair(bench: &Bench) {
    interrupted(bench, false, 2, |heap| bench.pair(heap));
}

/// The loaded magazine gets empty or full on the way, so that the two are swapped and then exchanged.
fn many(bench: &Bench) {
    interrupted(bench, false, ROUNDS + 1, |heap| many_of(bench, heap, 3 * ROUNDS));
}

/// Slabs are made on the way, and given back.
fn many_more(bench: &Bench) {
    interrupted(bench, false, 1, |heap| {
        many_of(bench, heap, 4 * ROUNDS);
        heap.caches().class(class()).reap(heap.caches());
    });
}

fn many_of(bench: &Bench, heap: &Heap, count: usize) {
    let objects: Vec<_> = (0..count).map(|_| bench.allocate(heap)).collect();
    objects.into_iter().for_each(|object| bench.free(heap, object));
}

/// A run of page frames, and single ones from the stock.
fn frames(bench: &Bench, non_maskable: bool) {
    let heap = bench.heap();
    let run = |count| heap.frames().allocate_run(count, crate::Order::ZERO);
    let theirs = run(1).unwrap();
    let given_back = Cell::new(false);
    let handler = || {
        // SAFETY: allocated so, and freed nowhere else.
        unsafe { heap.frames().free_run(theirs, 1) };
        given_back.set(true);
        if let Some(frame) = run(1) {
            // SAFETY: as above.
            unsafe { heap.frames().free_run(frame, 1) };
        }
    };
    let work = || {
        for count in [1, 3] {
            let first = run(count).unwrap();
            // SAFETY: as above.
            unsafe { heap.frames().free_run(first, count) };
        }
    };
    bench.run([(0, Box::new(|| bench.interrupt(non_maskable, work, handler)) as Work<'_>)]);
    if !given_back.get() {
        // SAFETY: as above.
        unsafe { heap.frames().free_run(theirs, 1) };
    }
    bench.finish(heap);
}

/// While CPU 0 is interrupted, CPU 1 takes from the depot.
fn exchange_with_another_cpu(bench: &Bench) {
    let heap = bench.heap();
    give(&heap, take(&heap, 4 * ROUNDS));
    let kept = take(&heap, 2 * ROUNDS);
    bench.run([
        (0, Box::new(|| bench.interrupt(false, || bench.pair(&heap), || bench.pair(&heap))) as Work<'_>),
        (1, Box::new(|| bench.pair(&heap))),
    ]);
    give(&heap, kept);
    bench.finish(heap);
}

#[test]
fn row_82_an_interrupt_at_each_step_of_an_allocation_and_a_free() {
    holds(EveryStep, a_pair);
}

#[test]
fn row_82_an_interrupt_at_each_step_of_magazine_swaps_and_exchanges() {
    holds(EveryStep, many);
}

#[test]
fn row_82_an_interrupt_at_each_step_of_making_slabs() {
    holds(EveryStep, many_more);
}

#[test]
fn row_82_an_interrupt_at_each_step_of_taking_page_frames() {
    holds(EveryStep, |bench| frames(bench, false));
}

#[test]
fn row_82_an_interrupt_at_each_step_while_another_cpu_exchanges() {
    holds(EveryOrderAndStep, exchange_with_another_cpu);
}

#[test]
fn row_82_with_interrupts_on_that_fails() {
    fails_with(EveryOrderAndStep, Bug::InterruptsStayOn, exchange_with_another_cpu);
}

#[test]
fn row_82_with_interrupts_on_an_allocation_and_a_free_fail() {
    fails_with(EveryStep, Bug::InterruptsStayOn, a_pair);
}

#[test]
fn row_82_with_interrupts_on_swaps_and_exchanges_fail() {
    fails_with(EveryStep, Bug::InterruptsStayOn, many);
}

#[test]
fn row_82_with_interrupts_on_making_slabs_fails() {
    fails_with(EveryStep, Bug::InterruptsStayOn, many_more);
}

#[test]
fn row_82_with_interrupts_on_taking_page_frames_fails() {
    fails_with(EveryStep, Bug::InterruptsStayOn, |bench| frames(bench, false));
}

#[test]
fn row_83_an_nmi_at_each_step_of_an_allocation_and_a_free() {
    holds(EveryStep, |bench| interrupted(bench, true, 2, |heap| bench.pair(heap)));
}

#[test]
fn row_83_an_nmi_at_each_step_of_magazine_swaps_and_exchanges() {
    holds(EveryStep, |bench| interrupted(bench, true, ROUNDS + 1, |heap| many_of(bench, heap, 3 * ROUNDS)));
}

#[test]
fn row_83_an_nmi_at_each_step_of_making_slabs() {
    holds(EveryStep, |bench| {
        interrupted(bench, true, 1, |heap| {
            many_of(bench, heap, 4 * ROUNDS);
            heap.caches().class(class()).reap(heap.caches());
        });
    });
}

#[test]
fn row_83_an_nmi_at_each_step_of_taking_page_frames() {
    holds(EveryStep, |bench| frames(bench, true));
}

#[test]
fn row_83_an_nmi_that_has_the_number_of_its_cpu_fails() {
    fails_with(EveryStep, Bug::OneNumber, |bench| {
        interrupted(bench, true, ROUNDS + 1, |heap| many_of(bench, heap, 3 * ROUNDS));
    });
}
