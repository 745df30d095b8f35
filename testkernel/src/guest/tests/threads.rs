//! Kernel threads: turns, pre-emption, migration, and that nothing of a thread is left when it has ended.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use kernel::cpus::{self, Cpus};
use kernel::heap::HEAP;
use kernel::threads::{self, JoinHandle, SpawnError, preemption};
use kernel::timer;
use kslab::IrqLock;
use x86_64::instructions::interrupts;

use super::support::{free, give_back, on_each, order, take_all, unchanged};
use crate::guest::runner::test;

/// Counts of the timer's clock between two interrupts.
const PERIOD: u32 = 50_000;

const STACK: usize = 32 * 1024;

/// Timer interrupts that each CPU has had.
static TICKS: [AtomicUsize; cpus::MAX] = [const { AtomicUsize::new(0) }; _];

fn spawn<T: Send + 'static>(name: &'static str, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    threads::spawn(name, STACK, body).expect("memory")
}

fn spawn_on<T: Send + 'static>(cpu: usize, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    threads::spawn_on(cpu, "worker", STACK, body).expect("memory")
}

/// The CPUs that run threads.
fn all_cpus() -> Vec<usize> {
    (0..cpus::MAX).filter(|&cpu| threads::run_on(cpu)).collect()
}

/// Calls `body` with timer interrupts that come often on every CPU, and counts them.
fn with_timer<T>(body: impl FnOnce() -> T) -> T {
    on_each(|_| timer::start(PERIOD, || _ = ticks().fetch_add(1, Relaxed)), 0);
    let result = body();
    on_each(|_| timer::stop(), 0);
    result
}

/// Calls `body` without pre-emption on this CPU, which the thread does not leave.
fn in_turns<T>(body: impl FnOnce() -> T) -> T {
    let cpu = cpus::current();
    preemption::set(cpu, false);
    let result = body();
    preemption::set(cpu, true);
    result
}

/// How many threads there are that have not been freed.
fn alive() -> usize {
    let mut alive = 0;
    HEAP.for_each_cache(|cache| alive += if cache.name == "thread" { cache.in_use } else { 0 });
    alive
}

/// Of this CPU.
fn ticks() -> &'static AtomicUsize {
    &TICKS[cpus::current()]
}

/// Spins until so many timer interrupts have come. The thread does not migrate meanwhile.
fn wait_for_ticks(count: usize) {
    let (ticks, start) = (ticks(), ticks().load(Relaxed));
    while ticks.load(Relaxed) - start < count {
        spin_loop();
    }
}

test!(a_thread_returns_a_value_to_who_joins_it);
fn a_thread_returns_a_value_to_who_joins_it() {
    let captured = [1, 2, 3].map(Box::new);
    let handle = spawn("sum", move || captured.iter().map(|value| **value).sum::<i32>());
    assert_eq!(handle.thread().name(), "sum");
    assert_eq!(handle.join(), 6);
    assert_eq!(*spawn("box", || Box::new(7)).join(), 7);
}

test!(a_thread_that_has_ended_is_joined_at_once);
fn a_thread_that_has_ended_is_joined_at_once() {
    in_turns(|| {
        let handle = spawn("quick", || 1);
        assert!(!handle.is_finished());
        threads::yield_now();
        assert!(handle.is_finished());
        assert_eq!(handle.join(), 1);
    });
}

test!(each_thread_has_its_name_and_number);
fn each_thread_has_its_name_and_number() {
    assert_eq!((threads::current().name(), threads::current().cpu()), ("main", cpus::current()));
    let handles = ["a", "b", "c"].map(|name| spawn(name, threads::current));
    let expected = handles.each_ref().map(|handle| (handle.thread().name(), handle.thread().id()));
    let seen = handles.map(JoinHandle::join).map(|thread| (thread.name(), thread.id()));
    assert_eq!(seen, expected);
    assert!(seen[0].1 < seen[1].1 && seen[1].1 < seen[2].1 && threads::current().id() < seen[0].1);
}

test!(threads_take_turns_in_the_order_in_which_they_were_made);
fn threads_take_turns_in_the_order_in_which_they_were_made() {
    static TURNS: IrqLock<Cpus, Vec<usize>> = IrqLock::new(Vec::new());
    let turns = in_turns(|| {
        let take_turns = |number| {
            move || {
                for _ in 0..4 {
                    TURNS.lock().push(number);
                    threads::yield_now();
                }
            }
        };
        *TURNS.lock() = Vec::with_capacity(16);
        let handles = [0, 1, 2].map(|number| spawn("turns", take_turns(number)));
        assert!(TURNS.lock().is_empty(), "a new thread waits for its turn");
        handles.into_iter().for_each(JoinHandle::join);
        core::mem::take(&mut *TURNS.lock())
    });
    assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]);
}

test!(a_thread_that_yields_alone_goes_on);
fn a_thread_that_yields_alone_goes_on() {
    let cpu = cpus::current();
    (0..100).for_each(|_| threads::yield_now());
    assert_eq!(cpus::current(), cpu);
    assert!(interrupts::are_enabled());
}

test!(registers_and_stack_survive_the_turns_of_others);
fn registers_and_stack_survive_the_turns_of_others() {
    let work = |seed: u64| {
        move || {
            // More values than there are registers to keep them in, all changed between any two turns.
            let mut values: [u64; 12] = core::array::from_fn(|index| seed + index as u64);
            for round in 0..50 {
                threads::yield_now();
                values = values.map(|value| value.wrapping_mul(6364136223846793005).wrapping_add(seed ^ round));
            }
            values
        }
    };
    let alone = work(1)();
    let handles = [1, 2, 3].map(|seed| spawn("values", work(seed)));
    let [first, second, third] = handles.map(JoinHandle::join);
    assert_eq!(first, alone);
    assert!(first != second && second != third);
}

test!(the_timer_interrupts_a_thread_that_spins);
fn the_timer_interrupts_a_thread_that_spins() {
    static STOP: AtomicBool = AtomicBool::new(false);
    STOP.store(false, Relaxed);
    with_timer(|| {
        let spin = || {
            let mut rounds = 0_u64;
            while !STOP.load(Relaxed) {
                rounds += 1;
            }
            rounds
        };
        let handles = [spawn("spins", spin), spawn("spins", spin)];
        for _ in 0..5 {
            threads::yield_now();
            assert!(interrupts::are_enabled());
        }
        assert!(handles.iter().all(|handle| !handle.is_finished()));
        STOP.store(true, Relaxed);
        assert!(handles.map(JoinHandle::join).iter().all(|&rounds| rounds > 0));
    });
}

test!(without_pre_emption_a_thread_keeps_its_turn);
fn without_pre_emption_a_thread_keeps_its_turn() {
    assert!(preemption::is_on(cpus::current()));
    with_timer(|| {
        in_turns(|| {
            assert!(!preemption::is_on(cpus::current()));
            let handle = spawn("keeps", || wait_for_ticks(10));
            threads::yield_now();
            assert!(handle.is_finished(), "it was interrupted for good");
            handle.join();
        });
    });
}

test!(a_thread_that_has_paused_pre_emption_keeps_its_turn);
fn a_thread_that_has_paused_pre_emption_keeps_its_turn() {
    static PAUSED: AtomicBool = AtomicBool::new(false);
    /// Of the main thread, one at least between any two pauses.
    static TURNS: AtomicUsize = AtomicUsize::new(0);
    with_timer(|| {
        let handle = spawn("pauses", || {
            for _ in 0..5 {
                preemption::without_preemption(|| {
                    PAUSED.store(true, Relaxed);
                    let (outer, inner) = (preemption::pause(), preemption::pause());
                    drop(outer);
                    wait_for_ticks(3);
                    drop(inner);
                    wait_for_ticks(3);
                    PAUSED.store(false, Relaxed);
                });
                let turn = TURNS.load(Relaxed);
                while TURNS.load(Relaxed) == turn {
                    spin_loop();
                }
            }
        });
        while !handle.is_finished() {
            assert!(!PAUSED.load(Relaxed), "it was interrupted");
            TURNS.fetch_add(1, Relaxed);
            threads::yield_now();
        }
        handle.join();
    });
}

test!(a_thread_with_a_lock_does_not_yield, stops_with = "panic: a thread that has interrupts off would let others run");
fn a_thread_with_a_lock_does_not_yield() {
    static LOCK: IrqLock<Cpus, ()> = IrqLock::new(());
    let _held = LOCK.lock();
    threads::yield_now();
}

test!(
    a_thread_that_has_paused_pre_emption_does_not_wait,
    stops_with = "panic: a thread that has pre-emption paused would let others run"
);
fn a_thread_that_has_paused_pre_emption_does_not_wait() {
    let handle = spawn("waited for", || ());
    preemption::without_preemption(|| handle.join());
}

test!(the_memory_of_many_threads_of_all_sizes_comes_back);
fn the_memory_of_many_threads_of_all_sizes_comes_back() {
    let many = || {
        let body = |size: usize| {
            move || {
                threads::yield_now();
                // Of 4 KiB each.
                let pages = size.saturating_sub(12 * 1024) / 4096;
                (fill_stack(black_box(pages)), threads::yield_now()).0
            }
        };
        let sizes = (0..24).map(|number: usize| (1 << (number % 8)) * 4096 + number);
        let handles: Vec<_> =
            sizes.map(|size| (size, threads::spawn("sized", size, body(size)).expect("memory"))).collect();
        for (size, handle) in handles {
            assert_eq!(handle.join(), size.saturating_sub(12 * 1024) / 4096);
        }
    };
    // Page tables stay.
    many();
    unchanged(|| with_timer(many));
}

/// Writes to so many pages of the stack.
fn fill_stack(pages: usize) -> usize {
    if pages == 0 {
        return 0;
    }
    let page = black_box([pages as u8; 4000]);
    let below = fill_stack(pages - 1);
    assert!(page.iter().all(|&byte| byte == pages as u8), "somebody else wrote to the stack");
    below + 1
}

test!(a_thread_that_nobody_joins_leaves_nothing);
fn a_thread_that_nobody_joins_leaves_nothing() {
    struct Dropped(Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
        }
    }
    let before = alive();
    let start_and_leave = || {
        let drops = Arc::new(AtomicUsize::new(0));
        for _ in 0..5 {
            let (captured, returned) = (Dropped(drops.clone()), Dropped(drops.clone()));
            drop(spawn("left", move || (captured, returned).1));
            // This one has ended when its handle goes.
            let value = Dropped(drops.clone());
            let ended = spawn("ended", || value);
            threads::yield_now();
            drop(ended);
        }
        // Idle CPUs free them too.
        while alive() > before {
            threads::yield_now();
            threads::free_unused();
        }
        assert_eq!(drops.load(Relaxed), 15);
    };
    start_and_leave();
    unchanged(start_and_leave);
}

test!(without_memory_there_is_no_thread);
fn without_memory_there_is_no_thread() {
    let attempt = |size| threads::spawn("large", size, || ()).map(JoinHandle::join);
    attempt(1 << 20).expect("memory");
    unchanged(|| {
        assert_eq!(attempt(usize::MAX), Err(SpawnError::NoMemory));
        assert_eq!(attempt(1 << 40), Err(SpawnError::NoMemory));
        let mut all = take_all();
        // A little, for all but the stack.
        let some = all.iter().rposition(|&(_, found)| found == order(4)).expect("a block of 16 frames");
        let (frame, _) = all.swap_remove(some);
        free(frame, order(4));
        assert_eq!(attempt(1 << 20), Err(SpawnError::NoMemory));
        give_back(all);
    });
    let no_cpu = threads::spawn_on(cpus::MAX, "nowhere", STACK, || ()).map(|_| ());
    assert_eq!(no_cpu, Err(SpawnError::NoCpu));
}

test!(a_stack_overflow_names_the_thread, stops_with = "stack overflow: thread deep");
fn a_stack_overflow_names_the_thread() {
    fn descend(depth: u64) -> u64 {
        if black_box(depth) == u64::MAX { 0 } else { descend(depth + 1) + black_box(1) }
    }
    let others = [spawn("before", threads::yield_now), spawn("deep", || _ = descend(0))];
    others.into_iter().for_each(JoinHandle::join);
}

test!(a_frame_larger_than_the_stack_of_a_thread_is_named, stops_with = "stack overflow: thread wide");
fn a_frame_larger_than_the_stack_of_a_thread_is_named() {
    spawn("wide", || _ = black_box([1_u8; 2 * STACK])).join();
}

test!(a_panic_in_a_thread_stops_the_kernel, stops_with = "panic: in a thread");
fn a_panic_in_a_thread_stops_the_kernel() {
    spawn("panics", || panic!("in a thread")).join()
}

test!(a_thread_migrates_to_every_cpu_and_back);
fn a_thread_migrates_to_every_cpu_and_back() {
    let all = all_cpus();
    let home = cpus::current();
    let visit = |all: Vec<usize>| {
        for &cpu in all.iter().chain(all.iter().rev()) {
            assert!(threads::migrate_to(cpu));
            assert_eq!((cpus::current(), threads::current().cpu()), (cpu, cpu));
            threads::yield_now();
            assert_eq!(cpus::current(), cpu, "it stays where it is");
        }
    };
    spawn("traveller", {
        let all = all.clone();
        move || visit(all)
    })
    .join();
    // So does the main thread.
    visit(all);
    assert!(threads::migrate_to(home));
    assert!(!threads::migrate_to(cpus::MAX) && !threads::migrate_to(usize::MAX));
    assert_eq!(cpus::current(), home);
}

test!(a_thread_is_joined_from_other_cpus);
fn a_thread_is_joined_from_other_cpus() {
    for cpu in all_cpus() {
        let before = spawn_on(cpu, cpus::current);
        assert_eq!(before.join(), cpu);
        // One that waits there for one here.
        let here = cpus::current();
        let inner = spawn_on(here, || {
            (0..10).for_each(|_| threads::yield_now());
            cpus::current()
        });
        assert_eq!(spawn_on(cpu, move || (inner.join(), cpus::current())).join(), (here, cpu));
    }
}

/// Blocks that a thread keeps at a time.
const KEPT: usize = 16;

/// Allocates and frees blocks that it fills with its own values, and looks at each before it frees it.
fn allocate_and_check(owner: usize, turns: usize, between: impl Fn(usize)) -> usize {
    let fill = |turn: usize| (owner * 31 + turn) as u8;
    let mut kept = [const { Vec::<u8>::new() }; KEPT];
    for turn in 0..turns {
        let new = vec![fill(turn); 8 << ((turn + owner) % 10)];
        between(turn);
        let old = core::mem::replace(&mut kept[turn % KEPT], new);
        assert!(old.iter().all(|&byte| byte == fill(turn.wrapping_sub(KEPT))), "a block of {owner} was written to");
    }
    turns
}

test!(threads_that_allocate_and_are_interrupted_keep_their_blocks);
fn threads_that_allocate_and_are_interrupted_keep_their_blocks() {
    let storm = || {
        let start = |owner| spawn("allocates", move || allocate_and_check(owner, 1500, |_| {}));
        let handles: Vec<_> = (0..6).map(start).collect();
        handles.into_iter().for_each(|handle| assert_eq!(handle.join(), 1500));
    };
    storm();
    unchanged(|| with_timer(storm));
}

test!(row_96_a_thread_that_migrates_between_and_in_allocations_keeps_its_blocks);
fn row_96_a_thread_that_migrates_between_and_in_allocations_keeps_its_blocks() {
    static LEFT: AtomicUsize = AtomicUsize::new(0);
    let storm = || {
        let all: Arc<[usize]> = all_cpus().into();
        let start = |owner: usize| {
            let all = all.clone();
            // Every other one goes by itself, from one allocation to the next.
            let go = move |turn: usize| {
                if owner.is_multiple_of(2) && turn.is_multiple_of(8) {
                    assert!(threads::migrate_to(all[(owner + turn / 8) % all.len()]));
                }
            };
            spawn("migrates", move || {
                let turns = allocate_and_check(owner, 800, go);
                LEFT.fetch_sub(1, Relaxed);
                turns
            })
        };
        LEFT.store(8, Relaxed);
        let handles: Vec<_> = (0..8).map(start).collect();
        // The others are sent away, wherever they are, when they are interrupted.
        let mut round = 0;
        while LEFT.load(Relaxed) > 0 {
            round += 1;
            for (index, handle) in handles.iter().enumerate().skip(1).step_by(2) {
                assert!(handle.thread().migrate_to(all[(index + round) % all.len()]));
            }
            threads::yield_now();
        }
        handles.into_iter().for_each(|handle| assert_eq!(handle.join(), 800));
    };
    storm();
    unchanged(|| with_timer(storm));
}

test!(row_96_who_has_paused_pre_emption_stays_on_its_cpu);
fn row_96_who_has_paused_pre_emption_stays_on_its_cpu() {
    with_timer(|| {
        let all = all_cpus();
        let handle = spawn("pinned", || {
            for _ in 0..20 {
                let _pause = preemption::pause();
                let cpu = cpus::current();
                (0..2000).for_each(|_| assert_eq!(cpus::current(), cpu));
            }
        });
        for round in 0.. {
            if handle.is_finished() {
                break;
            }
            assert!(handle.thread().migrate_to(all[round % all.len()]));
            threads::yield_now();
        }
        handle.join();
    });
}

test!(threads_go_on_when_their_cpu_goes_offline);
fn threads_go_on_when_their_cpu_goes_offline() {
    static STOP: AtomicBool = AtomicBool::new(false);
    let others = all_cpus().into_iter().filter(|&cpu| cpu != cpus::BOOT);
    assert!(threads::migrate_to(cpus::BOOT));
    let round = || {
        for cpu in others.clone() {
            STOP.store(false, Relaxed);
            let spin = || {
                let _kept = Box::new([1_u8; 100]);
                // Without a pause: an emulator that counts instructions would take long for a turn.
                while !STOP.load(Relaxed) {
                    black_box(());
                }
                cpus::current()
            };
            let spinning = [spawn_on(cpu, spin), spawn_on(cpu, spin)];
            // One that waits for a thread there, and one that is to go there.
            let waiting = spawn_on(cpu, || spawn("inner", threads::yield_now).join());
            cpus::offline(cpu).expect("it is online");
            assert!(!threads::run_on(cpu) && !threads::migrate_to(cpu));
            assert_eq!(threads::spawn_on(cpu, "late", STACK, || ()).map(|_| ()), Err(SpawnError::NoCpu));
            STOP.store(true, Relaxed);
            assert_eq!(spinning.map(JoinHandle::join), [cpus::BOOT; 2]);
            waiting.join();
            assert!(cpus::bring_online(cpu));
            assert_eq!(spawn_on(cpu, cpus::current).join(), cpu);
        }
    };
    round();
    unchanged(round);
}
