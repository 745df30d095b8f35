//! What an operation costs when more CPUs do the same, counted in instructions: on a machine whose clock counts them
//! (`--icount --cpus 8`), where one CPU runs after the other.
//!
//! Each CPU counts while it does a few operations in a row; then it lets the next one go on. So it counts its own alone.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;
use core::hint::{black_box, spin_loop};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use kernel::threads::{self, JoinHandle, preemption};
use kernel::{cpus, time};

use super::support::{Cache, free_object, new_cache};
use crate::guest::runner::{note, test};

/// Operations in a row: more than two magazines have room for.
const ROW: usize = 60;

/// Rows that each CPU does; the one in the middle counts.
const ROWS: usize = 31;

/// What a CPU does with its cache.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// An allocation and its free, again and again.
    Pairs,
    /// A row of allocations, then their frees: through the depot.
    Rows,
    /// A row of allocations, then frees of those of the next CPU.
    Passed,
}

/// Whether the clock counts instructions: then the same ones take the same time.
fn counts_instructions() -> bool {
    /// One function, so that each call has the same instructions.
    #[inline(never)]
    fn loop_time() -> u64 {
        let start = time::ticks();
        (0..1000).for_each(|turn| _ = black_box(turn));
        time::ticks() - start
    }
    let first = loop_time();
    (0..10).all(|_| loop_time() == first)
}

/// What each CPU has allocated for the one before it.
static PASSED: [[AtomicPtr<u8>; ROW]; cpus::MAX] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; ROW] }; cpus::MAX];

fn free_row(cache: &Cache, row: &[AtomicPtr<u8>; ROW]) {
    let objects = row.iter().map(|place| place.swap(ptr::null_mut(), Ordering::Relaxed));
    objects.filter_map(NonNull::new).for_each(|object| free_object(cache, object));
}

impl Work {
    /// One row, on the CPU of this number of so many.
    fn run(self, cache: &Cache, cpu: usize, count: usize) {
        let allocate = || cache.allocate().expect("memory");
        match self {
            Self::Pairs => (0..ROW).for_each(|_| free_object(cache, allocate())),
            Self::Rows => {
                let mut held = [NonNull::dangling(); ROW];
                held.iter_mut().for_each(|place| *place = allocate());
                held.iter().for_each(|object| free_object(cache, *object));
            }
            Self::Passed => {
                PASSED[cpu].iter().for_each(|place| place.store(allocate().as_ptr(), Ordering::Relaxed));
                free_row(cache, &PASSED[(cpu + 1) % count]);
            }
        }
    }

    /// Instructions of an allocation and a free, in hundredths, while others do the same.
    fn count(self, cache: &Cache, cpu: usize, count: usize) -> u64 {
        let mut rows = [0; ROWS];
        for row in &mut rows {
            let start = time::ticks();
            self.run(cache, cpu, count);
            *row = time::ticks() - start;
            // The next CPU goes on.
            spin_loop();
        }
        rows.sort_unstable();
        rows[ROWS / 2] * 100 / ROW as u64
    }
}

/// The least and the most of what the first `count` CPUs count, in hundredths.
fn measure(count: usize, work: Work, cache: impl Fn(usize) -> Arc<Cache>) -> (u64, u64) {
    let ready = Arc::new(AtomicUsize::new(0));
    let start = |cpu| {
        let (cache, ready) = (cache(cpu), ready.clone());
        let body = move || {
            // Its magazines are there.
            Work::Rows.run(&cache, cpu, count);
            ready.fetch_add(1, Ordering::Relaxed);
            while ready.load(Ordering::Relaxed) < count {
                spin_loop();
            }
            work.count(&cache, cpu, count)
        };
        threads::spawn_on(cpu, "counts", 32 * 1024, body).expect("memory for a thread")
    };
    let threads: Vec<_> = (0..count).map(start).collect();
    let counted: Vec<_> = threads.into_iter().map(JoinHandle::join).collect();
    // What the last row has left.
    PASSED.iter().for_each(|row| free_row(&cache(0), row));
    (counted.iter().copied().min().unwrap_or(0), counted.iter().copied().max().unwrap_or(0))
}

test!(an_operation_takes_no_more_instructions_when_more_cpus_work);
fn an_operation_takes_no_more_instructions_when_more_cpus_work() {
    if !counts_instructions() {
        return;
    }
    cpus::online().for_each(|cpu| preemption::set(cpu, false));
    for (what, work, is_shared) in [
        ("separate caches, an allocation and its free", Work::Pairs, false),
        ("one shared cache, an allocation and its free", Work::Pairs, true),
        ("separate caches, many and their frees", Work::Rows, false),
        ("one shared cache, many and their frees", Work::Rows, true),
        ("one shared cache, many and frees of another's", Work::Passed, true),
    ] {
        let caches: Vec<_> = cpus::online().map(|_| Arc::new(new_cache("scaling", 64, 8))).collect();
        let cache = |cpu: usize| caches[if is_shared { 0 } else { cpu }].clone();
        let (mut line, mut alone) = (String::new(), 0);
        for count in [1, 2, 4, 8].into_iter().take_while(|&count| count <= cpus::online().count()) {
            let (least, most) = measure(count, work, cache);
            alone = if count == 1 { most } else { alone };
            _ = write!(line, " {} to {} on {count};", Hundredths(least), Hundredths(most));
            assert!(most * 10 <= alone * 11, "{what}: instructions on each of so many CPUs:{line}");
        }
        note(format_args!("{what}: instructions on each of so many CPUs:{line}"));
    }
    cpus::online().for_each(|cpu| preemption::set(cpu, true));
}

/// A number of hundredths.
struct Hundredths(u64);

impl core::fmt::Display for Hundredths {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{:02}", self.0 / 100, self.0 % 100)
    }
}
