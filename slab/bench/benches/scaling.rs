//! How much more two threads do than one: allocations and their frees, where each thread has magazines of its own.
//!
//! `cargo bench --manifest-path slab/bench/Cargo.toml`, on a machine that has two idle CPUs and nothing else to do.

use std::alloc::Layout;
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use kslab::platform::{NO_CPU, Platform};
use kslab::{Cache, Heap};

thread_local! {
    static NUMBER: Cell<usize> = const { Cell::new(NO_CPU) };
}

/// The threads of a program, each with a number as if it were a CPU.
struct Threads;

// SAFETY: there are no interrupt handlers, and each number below `CPUS` is that of one thread at a time.
unsafe impl Platform for Threads {
    const CPUS: usize = 2;

    fn current_cpu() -> usize {
        NUMBER.get()
    }

    fn disable_interrupts() -> bool {
        false
    }

    fn restore_interrupts(_: bool) {}
}

static HEAP: Heap<Threads> = Heap::new();

/// Caches that only one thread uses.
static SEPARATE: [Cache<Threads>; 2] = [const { Cache::new(HEAP.caches(), "separate", LAYOUT) }; 2];
/// A cache that both use.
static SHARED: Cache<Threads> = Cache::new(HEAP.caches(), "shared", LAYOUT);

const LAYOUT: Layout = Layout::new::<[u64; 8]>();
const PAIRS: usize = 2_000_000;
/// One thread and two threads take turns so often.
const ROUNDS: usize = 25;
const MEMORY: usize = 64 << 20;

/// An allocation and its free, by the thread of this number.
type Pair = fn(usize);

/// How long so many threads take to do all pairs each.
fn time(threads: usize, pair: Pair) -> Duration {
    let barrier = Barrier::new(threads + 1);
    thread::scope(|scope| {
        for number in 0..threads {
            let barrier = &barrier;
            scope.spawn(move || {
                NUMBER.set(number);
                // The magazines are there.
                (0..1000).for_each(|_| pair(number));
                barrier.wait();
                (0..PAIRS).for_each(|_| pair(number));
                barrier.wait();
            });
        }
        barrier.wait();
        let start = Instant::now();
        barrier.wait();
        start.elapsed()
    })
}

fn pair_of(cache: &Cache<Threads>) {
    let object = black_box(cache.allocate()).expect("memory");
    // SAFETY: just allocated, and not used.
    unsafe { cache.free(object) };
}

fn pair_of_heap() {
    let block = black_box(HEAP.allocate(LAYOUT)).expect("memory");
    // SAFETY: just allocated with this layout, and not used.
    unsafe { HEAP.free(block, LAYOUT) };
}

fn main() {
    let memory = vec![0_u64; MEMORY / 8].leak();
    // SAFETY: the memory is the heap's alone from now on.
    unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), MEMORY) }.expect("memory for a heap");
    let separate: Pair = |number| pair_of(&SEPARATE[number]);
    for (name, pair) in
        [("separate caches", separate), ("one shared cache", |_| pair_of(&SHARED)), ("the heap", |_| pair_of_heap())]
    {
        let mut rounds: Vec<_> = (0..ROUNDS).map(|_| [1, 2].map(|threads| time(threads, pair))).collect();
        rounds.sort_by_key(|[one, _]| *one);
        let pair_time = rounds[ROUNDS / 2][0].as_secs_f64() / PAIRS as f64 * 1e9;
        let mut ratios: Vec<_> = rounds.iter().map(|[one, two]| 2.0 * one.as_secs_f64() / two.as_secs_f64()).collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios[ROUNDS / 2];
        println!(
            "{name}: {pair_time:.1} ns for an allocation and its free; two threads do {ratio:.2} times as much (medians)"
        );
    }
}
