//! Storms: every CPU allocates and frees all kinds of blocks, its own and those of others, in threads that move about and
//! in interrupts, and a shadow of who owns what is checked at each step.
//!
//! `--operations N` says how many operations the threads do together, `--seed N` what their random numbers start from: with the
//! same seed each thread does the same steps, though not at the same moments. When a storm stops the kernel, the console
//! says which step each thread was at.

mod block;
mod shadow;
mod worker;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use core::time::Duration;

use fastrand::Rng;
use kernel::cpus;
use kernel::heap::HEAP;
use kernel::threads::{self, JoinHandle};
use kernel::{cmdline, println, time, timer, traps};

use super::support::{layout, on_each, unchanged};
use crate::guest::runner::{note, test, with_last_words};
use block::{Block, Caches, TYPED, What};
use shadow::{Entry, Map};
use worker::{HELD, Handler, Phoenix, Problem, Worker};

/// Operations of a storm, unless the command line says otherwise.
const OPERATIONS: u64 = 40_000;

/// Operations between two barriers, at most.
const ROUND: u64 = 250_000;

/// Barriers, at least.
const ROUNDS: u64 = 4;

/// Where blocks are handed over.
const SLOTS: usize = 32;

/// Nobody owns an entry that waits there.
const EXCHANGED: usize = usize::MAX;

const STACK: usize = 32 * 1024;

/// A storm, for as long as it lasts.
struct Storm {
    seed: u64,
    nmis: bool,
    map: Map,
    caches: Caches,
    /// A worker's are its own, the last wait to be exchanged.
    entries: Vec<Entry>,
    exchange: [AtomicUsize; SLOTS],
    workers: Vec<Worker>,
    phoenixes: [Phoenix; 4],
    /// The timer's and the NMI's on each CPU.
    handlers: Vec<[Handler; 2]>,
}

/// That for handlers and for the report of a stop; null where there is none.
static STORM: AtomicPtr<Storm> = AtomicPtr::new(ptr::null_mut());

impl Storm {
    fn new(seed: u64, nmis: bool) -> Self {
        let cpus = cpus::count();
        // More than CPUs, so that they are interrupted.
        let workers = if cpus <= 8 { 2 * cpus } else { cpus };
        let first = workers * HELD;
        let owner = |entry| if entry < first { entry / HELD } else { EXCHANGED };
        Self {
            seed,
            nmis,
            map: Map::new(),
            caches: Caches::new(),
            entries: (0..first + SLOTS).map(|entry| Entry::new(owner(entry))).collect(),
            exchange: core::array::from_fn(|slot| AtomicUsize::new(first + slot)),
            workers: (0..workers).map(|number| Worker::new(number, seed, number * HELD)).collect(),
            phoenixes: [32, 96, 512, 3072].map(Phoenix::new),
            handlers: (0..cpus).map(|_| [const { Handler::new() }; 2]).collect(),
        }
    }

    fn allocate(&self, what: What, zeroed: bool, tag: u64) -> Result<Block, Problem> {
        if let Some(layout) = what.heap_layout().filter(|_| zeroed) {
            let start = HEAP.allocate_zeroed(layout).ok_or(Problem::NoMemory(what))?;
            if !Block::is_zero(start, layout.size()) {
                return Err(Problem::Block(Block { start, what, tag }, block::Wrong::NotZero));
            }
            return self.adopt(start, what, tag);
        }
        let start = self.caches.allocate(what).ok_or(Problem::NoMemory(what))?;
        let at = |start| Block { start, what, tag };
        self.adopt(start.map_err(|wrong| Problem::Block(at(NonNull::dangling()), wrong))?, what, tag)
    }

    fn adopt(&self, start: NonNull<u8>, what: What, tag: u64) -> Result<Block, Problem> {
        Block::adopt(start, what, tag, &self.map).map_err(|wrong| Problem::Block(Block { start, what, tag }, wrong))
    }

    fn disown(&self, block: Block) -> Result<(), Problem> {
        block.disown(&self.map).map_err(|wrong| Problem::Block(block, wrong))
    }

    fn free(&self, block: Block) -> Result<(), Problem> {
        self.disown(block)?;
        // SAFETY: it was allocated by `allocate` or reallocated, is known in one place, and was taken from there.
        unsafe { self.caches.free(block) };
        Ok(())
    }

    /// All that somebody has.
    fn all_entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().chain(self.handlers.iter().flatten().flat_map(Handler::kept))
    }

    /// While nobody works.
    fn check(&self) {
        assert_eq!(HEAP.verify(), Ok(()), "seed {}", self.seed);
        let is_object = |block: &Block| matches!(block.what, What::Object(_) | What::Typed);
        let objects = self.all_entries().filter_map(Entry::get).filter(is_object).count();
        assert_eq!(self.caches.in_use(), objects, "the caches count otherwise; seed {}", self.seed);
    }

    /// Frees all that somebody has.
    fn end(&self) {
        for block in self.all_entries().filter_map(Entry::take) {
            self.free(block).unwrap_or_else(|problem| panic!("at the end of the storm: {problem:x?}"));
        }
        assert!(self.map.is_empty(), "the map has what nobody has");
    }
}

/// The storm that there is, while there is one.
fn current() -> Option<&'static Storm> {
    // SAFETY: it stays until timers and NMIs are stopped.
    unsafe { STORM.load(Ordering::Acquire).as_ref() }
}

fn on_timer() {
    let Some(storm) = current() else { return };
    let cpu = cpus::current();
    storm.handlers[cpu][0].turn(storm, 0x1000 + cpu, false);
}

fn on_nmi() {
    let Some(storm) = current() else { return };
    let cpu = cpus::current();
    storm.handlers[cpu][1].turn(storm, 0x2000 + cpu, true);
}

fn start_timer(_: usize) {
    timer::start(timer::counts(Duration::from_micros(200)), on_timer);
}

/// What happens while the workers work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weather {
    Plain,
    /// CPUs leave and come back.
    CpusLeave,
    /// NMI handlers allocate and free.
    Nmis,
}

/// A number of the command line.
fn number(key: &str) -> Option<u64> {
    cmdline::value(key).and_then(|value| value.parse().ok())
}

/// Runs a storm of so many operations, and checks that every page frame is back.
fn storm(operations: u64, weather: Weather) {
    storm_after(operations, weather, false);
}

/// The same after a small one, if it is to be `rehearsed`.
fn storm_after(operations: u64, weather: Weather, rehearsed: bool) {
    let seed = number("seed").unwrap_or(0x5eed);
    // The page tables of the workers' stacks stay, so they are there before the count.
    let rehearse = || {
        let storm = Arc::new(Storm::new(seed, false));
        start_workers(&storm, 0).into_iter().for_each(JoinHandle::join);
    };
    rehearse();
    // And so is what checks keep for good: a cache beside each that is used, and the places of those that wait.
    if rehearsed {
        run(operations, weather, seed);
    }
    unchanged(|| with_last_words(last_words, || run(operations, weather, seed)));
    assert_eq!(TYPED.load(Ordering::Relaxed), 0, "objects were not destroyed");
}

fn run(operations: u64, weather: Weather, seed: u64) {
    let storm = Arc::new(Storm::new(seed, weather == Weather::Nmis));
    let mut rng = Rng::with_seed(seed);
    for entry in &storm.entries[storm.workers.len() * HELD..] {
        entry.put(storm.allocate(What::random(&mut rng), false, 0).expect("memory"));
    }
    STORM.store(Arc::as_ptr(&storm).cast_mut(), Ordering::Release);
    traps::set_nmi_handler(Some(|_| on_nmi()));
    let rounds = operations.div_ceil(ROUND).max(ROUNDS);
    for round in 1..=rounds {
        on_each(start_timer, 0);
        let workers = start_workers(&storm, operations * round / rounds);
        if weather == Weather::CpusLeave {
            let busy = || workers.iter().any(|worker| !worker.is_finished());
            take_cpus_away(&mut rng, busy);
        }
        workers.into_iter().for_each(JoinHandle::join);
        on_each(|_| timer::stop(), 0);
        storm.check();
        if round.is_multiple_of(4) {
            let done: u64 = storm.workers.iter().map(Worker::operations).sum();
            note(format_args!("{done} operations"));
        }
    }
    // One that was sent last comes first.
    on_each(|_| (), 0);
    traps::set_nmi_handler(None);
    STORM.store(ptr::null_mut(), Ordering::Release);
    let turns = |kind: usize| storm.handlers.iter().map(|handlers| handlers[kind].turns()).sum::<usize>();
    note(format_args!("seed {seed}, {} timer interrupts, {} NMIs", turns(0), turns(1)));
    storm.end();
    drop(storm);
}

/// Has the workers go on until they have done so many operations in all.
fn start_workers(storm: &Arc<Storm>, operations: u64) -> Vec<JoinHandle<()>> {
    let share = operations.div_ceil(storm.workers.len() as u64);
    let online: Vec<_> = cpus::online().collect();
    let start = |number: usize| {
        let storm = storm.clone();
        let work = move || storm.workers[number].work(&storm, share);
        threads::spawn_on(online[number % online.len()], "storm", STACK, work).expect("memory for a worker")
    };
    (0..storm.workers.len()).map(start).collect()
}

/// One CPU after the other leaves and comes back, while `busy`.
fn take_cpus_away(rng: &mut Rng, busy: impl Fn() -> bool) {
    let mut left = 0;
    while busy() {
        let cpu = rng.usize(..cpus::count());
        if cpus::offline(cpu).is_ok() {
            left += 1;
            time::wait(Duration::from_micros(rng.u64(..300)), || false);
            assert!(cpus::bring_online(cpu), "CPU {cpu} does not come back");
            cpus::call_on(cpu, start_timer, 0).expect("it is back");
        }
        threads::yield_now();
    }
    println!("CPUs left and came back {left} times");
}

/// Where everybody is, when the kernel stops.
fn last_words(out: &mut dyn fmt::Write) -> fmt::Result {
    let Some(storm) = current() else { return Ok(()) };
    write!(out, "storm of seed {}, {} CPUs; each worker's step:", storm.seed, cpus::count())?;
    storm.workers.iter().try_for_each(|worker| write!(out, " {}", worker.step()))?;
    writeln!(out)
}

test!(row_111_a_soak_with_every_check_ends_with_a_clean_audit);
fn row_111_a_soak_with_every_check_ends_with_a_clean_audit() {
    HEAP.set_checks("*:all").expect("rules");
    // What each size class keeps for good from now on.
    for layout in kslab::SIZES.map(|size| layout(size, 8)) {
        let block = HEAP.allocate(layout).expect("memory");
        // SAFETY: just allocated.
        unsafe { HEAP.free(block, layout) };
    }
    storm_after(operations() / 4, Weather::Plain, true);
    assert_eq!(HEAP.check_objects(), 0);
    HEAP.set_checks("*:none").expect("rules");
}

fn operations() -> u64 {
    number("operations").unwrap_or(OPERATIONS)
}

test!(row_93_all_cpus_allocate_and_free_their_own_blocks_and_those_of_others);
fn row_93_all_cpus_allocate_and_free_their_own_blocks_and_those_of_others() {
    storm(operations(), Weather::Plain);
}

test!(row_97_all_cpus_allocate_and_free_while_cpus_leave_and_come_back);
fn row_97_all_cpus_allocate_and_free_while_cpus_leave_and_come_back() {
    storm(operations(), Weather::CpusLeave);
}

test!(row_83_all_cpus_allocate_and_free_and_so_do_nmi_handlers);
fn row_83_all_cpus_allocate_and_free_and_so_do_nmi_handlers() {
    storm(operations(), Weather::Nmis);
}
