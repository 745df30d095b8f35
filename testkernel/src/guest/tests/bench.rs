//! How many instructions operations take, on a machine whose clock counts them: `cargo run -- --bench`.
//!
//! Those that are done in a row are counted together, the loop among them, with interrupts on, as most callers have them.
//! Those that happen now and then are counted one by one, with interrupts off.

use alloc::alloc::{alloc, dealloc};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;
use core::alloc::{GlobalAlloc, Layout};
use core::hint::black_box;

use kernel::heap::HEAP;
use kernel::time;
use kslab::Order;
use x86_64::instructions::interrupts::without_interrupts;

use super::support::{frames, free_object, new_cache, order, shrink_everywhere};
use crate::guest::runner::{note, test};

/// Calls in a row.
const ROW: u64 = 100;
/// Rows; the one in the middle counts. An interrupt is in few of them.
const ROWS: usize = 21;

/// Instructions of a call of `operation`, of many in a row.
fn in_a_row(name: &str, mut operation: impl FnMut()) {
    let mut row = || {
        let start = time::ticks();
        (0..ROW).for_each(|_| operation());
        time::ticks() - start
    };
    // What is made once is there.
    (0..3).for_each(|_| _ = row());
    let mut rows = [(); ROWS].map(|()| row());
    rows.sort_unstable();
    say(name, rows[ROWS / 2] / ROW);
}

fn say(name: &str, instructions: u64) {
    note(format_args!("{name} = {instructions} instructions"));
}

/// Calls `operation`, and says how many instructions it takes.
fn counted<T>(operation: impl FnOnce() -> T) -> (T, u64) {
    without_interrupts(|| {
        let start = time::ticks();
        let result = operation();
        (result, time::ticks() - start)
    })
}

fn block(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, 8).expect("a layout")
}

/// An allocation and its free through the kernel's `#[global_allocator]`.
fn pair(layout: Layout) {
    // SAFETY: the layout is not empty, and the block freed once.
    unsafe { dealloc(black_box(alloc(layout)), layout) };
}

test!(pairs, bench);
fn pairs() {
    const KNOWN: Layout = Layout::new::<[u64; 8]>();
    in_a_row("hot_pair_64", || pair(KNOWN));
    without_interrupts(|| in_a_row("hot_pair_64_interrupts_off", || pair(KNOWN)));
    in_a_row("box_64", || drop(black_box(Box::new([0_u64; 8]))));
    for bytes in [600, 1024, 4096, 16 << 10, 2 << 20] {
        let layout = black_box(block(bytes));
        in_a_row(&format!("pair_{bytes}"), || pair(layout));
    }
    in_a_row("five_in_order_64", || {
        // SAFETY: the layout is not empty, and each block freed once.
        let blocks: [_; 5] = core::array::from_fn(|_| black_box(unsafe { alloc(KNOWN) }));
        // SAFETY: as above.
        blocks.into_iter().for_each(|block| unsafe { dealloc(block, KNOWN) });
    });
}

test!(objects, bench);
fn objects() {
    let cache = new_cache("bench", 64, 8);
    in_a_row("object_pair", || free_object(&cache, cache.allocate().expect("memory")));
    in_a_row("realloc_in_place", {
        let layout = block(100);
        // SAFETY: the layout is not empty.
        let block = unsafe { alloc(layout) };
        // SAFETY: allocated above, of this layout.
        move || assert_eq!(black_box(unsafe { HEAP.realloc(block, layout, 104) }), block)
    });
}

test!(page_frames, bench);
fn page_frames() {
    let pair = |order: Order| {
        let frame = black_box(frames().allocate(order).expect("memory"));
        // SAFETY: allocated just now, and not used.
        unsafe { frames().free(frame, order) };
    };
    in_a_row("frame_pair", || pair(Order::ZERO));
    in_a_row("frame_pair_order_1", || pair(order(1)));
    in_a_row("frame_pair_order_9", || pair(order(9)));
}

/// Objects of a cache that are allocated, and then freed: more than a CPU's magazines hold.
const OBJECTS: usize = 4000;

/// The same of 512 bytes: more than its depot holds, too.
const MANY_OBJECTS: usize = 20_000;

/// The allocations and the frees of `count` objects of a new cache: which is longer than half of them, than all but one in a
/// hundred, and the longest.
fn of_many(name: &'static str, size: usize, count: usize) -> [[u64; 3]; 2] {
    let cache = new_cache(name, size, 8);
    let mut objects = Vec::with_capacity(count);
    let mut times = [const { Vec::new() }; 2].map(|mut times: Vec<u64>| {
        times.reserve(count);
        times
    });
    for _ in 0..count {
        let (object, ticks) = counted(|| cache.allocate().expect("memory"));
        objects.push(object);
        times[0].push(ticks);
    }
    for object in objects {
        times[1].push(counted(|| free_object(&cache, object)).1);
    }
    times.map(|mut times| {
        times.sort_unstable();
        [count / 2, count - count / 100, count - 1].map(|at| times[at])
    })
}

test!(the_slow_path, bench);
fn the_slow_path() {
    let [allocations, frees] = of_many("bench", 64, OBJECTS);
    for (what, [median, most, longest]) in [("allocation", allocations), ("free", frees)] {
        say(&format!("{what}_of_4000_median"), median);
        say(&format!("{what}_of_4000_99th"), most);
        say(&format!("{what}_of_4000_longest"), longest);
    }
    let [_, [_, _, longest]] = of_many("past", 512, MANY_OBJECTS);
    say("free_past_the_depot_longest", longest);
    shrink_everywhere();
    // A larger block is cut, and made whole.
    let (frame, ticks) = counted(|| frames().allocate(order(1)));
    say("frame_allocation_cut", ticks);
    // SAFETY: allocated just now, and not used.
    let ((), ticks) = counted(|| unsafe { frames().free(frame.expect("memory"), order(1)) });
    say("frame_free_merged", ticks);
}

test!(what_is_alive_costs_nothing, bench);
fn what_is_alive_costs_nothing() {
    let alone = of_many("alone", 64, OBJECTS);
    let cache = new_cache("alive", 64, 8);
    let alive: Vec<_> = (0..200_000).map(|_| cache.allocate().expect("memory")).collect();
    let others: Vec<_> = (0..50).map(|_| new_cache("other", 96, 8)).collect();
    others.iter().for_each(|cache| free_object(cache, cache.allocate().expect("memory")));
    let among = of_many("among", 64, OBJECTS);
    for (alone, among) in alone.into_iter().zip(among) {
        let grows = |at: usize| among[at] * 4 > alone[at] * 5;
        assert!(!grows(0) && !grows(1), "operations take {among:?} among many objects and caches, and {alone:?} alone");
        // One in some thousands takes page frames for the CPU's stock.
        assert!(among[2].max(alone[2]) < 30_000, "the longest operations take {among:?}, and {alone:?}");
    }
    alive.into_iter().for_each(|object| free_object(&cache, object));
}
