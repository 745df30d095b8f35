//! Tries out orders of the CPUs' steps. A step is an access to an atomic of this crate, or to one of its locks.
//!
//! | mode | what it does before a step |
//! |---|---|
//! | [`Off`](Mode::Off) | nothing: as shipped |
//! | [`Alone`](Mode::Alone) | nothing; there is one CPU, which must never wait for itself |
//! | [`Loom`](Mode::Loom) | each CPU may go on instead, and a load may have any value that the memory orderings allow |
//! | [`LoomBlocking`](Mode::LoomBlocking) | the same, for fewer orders |
//! | [`Shuttle`](Mode::Shuttle) | chance says which CPU goes on |
//!
//! In all but the first an [`Interruption`] may come before a chosen step of a CPU too.
//!
//! The crate makes its atomics by `const fn` and out of page frames full of zeros, and loom knows neither. So an atomic
//! of loom is found by the address of ours, and has been there, with the value that was found in memory at its first use,
//! since before the CPUs were started. Each store goes to both. Where memory no longer has what was last stored, it was
//! written anew by other means, as the header of a new slab is, and another atomic takes its place.
//!
//! All CPUs of a model are run by one thread of the host, one at a time.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::atomic::Ordering::{self, Relaxed};
use std::vec::Vec;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::sync::{Mutex, MutexGuard};

use crate::platform::{IN_NMI, Platform};

/// Who decides what happens next; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Off,
    Alone,
    Loom,
    /// The same, but a CPU that waits for a lock is not tried out until it is free, and all that locks do is ordered. So
    /// there are far fewer orders, and weak orderings may go unnoticed.
    LoomBlocking,
    Shuttle,
}

/// What is done wrong on purpose, from outside the code that is shipped, to see that the models would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// Every access to an atomic is `Relaxed`, but for those of locks.
    WeakAtomics,
    /// Locks exclude, but order nothing.
    WeakLocks,
    /// `compare_exchange` is a load and a store.
    TornExchange,
    /// A lock is had by whoever asks.
    NoExclusion,
    /// Interrupts stay enabled.
    InterruptsStayOn,
    /// Every CPU says that it is number 0.
    OneNumber,
}

/// Atomics and probes that there are at most in a model.
const POOL: usize = 500;
/// Locks.
const LOCKS: usize = 40;

/// A task of the explorer's: a CPU.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    Only,
    Loom(loom::thread::ThreadId),
    Shuttle(shuttle::thread::ThreadId),
}

/// A CPU of a model.
struct Cpu {
    number: Cell<usize>,
    enabled: Cell<bool>,
    /// Of what it does outside of handlers.
    steps: Cell<usize>,
    interruption: RefCell<Option<Interruption>>,
    handling: Cell<bool>,
}

/// What interrupts a CPU, and when.
#[derive(Clone)]
pub(crate) struct Interruption {
    /// Before this step, from 0 on; while interrupts are disabled, as soon as they no longer are.
    pub(crate) step: usize,
    /// Cannot be disabled.
    pub(crate) non_maskable: bool,
    pub(crate) handler: Rc<dyn Fn()>,
}

/// A loom atomic that stands for one of ours. It began with 0, which stands for `first`.
#[derive(Clone)]
struct StandIn {
    atomic: Rc<AtomicU64>,
    first: u64,
    /// What memory has if nobody wrote there by other means.
    last: u64,
}

#[derive(Default)]
struct Tables {
    stand_ins: HashMap<usize, StandIn>,
    unused: Vec<Rc<AtomicU64>>,
    probes: HashMap<usize, Rc<UnsafeCell<()>>>,
    unused_probes: Vec<Rc<UnsafeCell<()>>>,
    locks: HashMap<usize, Rc<Mutex<()>>>,
    unused_locks: Vec<Rc<Mutex<()>>>,
    held: HashMap<usize, MutexGuard<'static, ()>>,
    cpus: Vec<(Task, Rc<Cpu>)>,
}

std::thread_local! {
    static MODE: Cell<Mode> = const { Cell::new(Mode::Off) };
    static BUG: Cell<Option<Bug>> = const { Cell::new(None) };
    static TABLES: RefCell<Tables> = RefCell::default();
}

/// From here on steps are explored. In [`Mode::Loom`], before the CPUs are started.
pub(crate) fn start(mode: Mode, bug: Option<Bug>) {
    clear();
    TABLES.with_borrow_mut(|tables| {
        if matches!(mode, Mode::Loom | Mode::LoomBlocking) {
            tables.unused.extend((0..POOL).map(|_| Rc::new(AtomicU64::new(0))));
            tables.unused_probes.extend((0..POOL).map(|_| Rc::new(UnsafeCell::new(()))));
            tables.unused_locks.extend((0..LOCKS).map(|_| Rc::new(Mutex::new(()))));
        }
    });
    BUG.set(bug);
    MODE.set(mode);
}

/// Steps are no longer explored; memory has the latest values.
pub(crate) fn stop() {
    MODE.set(Mode::Off);
    BUG.set(None);
    clear();
}

fn clear() {
    let mut tables = TABLES.take();
    // After a failure: what loom knew of them is gone.
    core::mem::forget(core::mem::take(&mut tables.held));
}

/// Whether this is done wrong.
pub(crate) fn has(bug: Bug) -> bool {
    BUG.get() == Some(bug)
}

fn mode() -> Mode {
    // Once something has failed all that is left is dropped, outside of what explores.
    if std::thread::panicking() { Mode::Off } else { MODE.get() }
}

/// A step is about to be taken: `true` if loom has to take it.
#[inline]
pub(super) fn step() -> bool {
    if MODE.get() == Mode::Off {
        return false;
    }
    step_alone();
    match mode() {
        Mode::Loom | Mode::LoomBlocking => true,
        Mode::Shuttle => {
            shuttle::thread::yield_now();
            false
        }
        _ => false,
    }
}

/// A step of which other CPUs see nothing.
#[inline]
pub(super) fn step_alone() {
    if mode() != Mode::Off {
        let cpu = cpu();
        if !cpu.handling.get() {
            let step = cpu.steps.replace(cpu.steps.get() + 1);
            cpu.interrupt_at(step);
        }
    }
}

/// Something is not yet as it has to be: another CPU must go on.
#[track_caller]
pub(super) fn wait() {
    match mode() {
        Mode::Off => core::hint::spin_loop(),
        Mode::Alone => panic!("a CPU waits for itself for ever"),
        Mode::Loom | Mode::LoomBlocking => loom::thread::yield_now(),
        Mode::Shuttle => shuttle::thread::yield_now(),
    }
}

/// The ordering that an access of this kind shall have.
pub(super) fn atomic_order(order: Ordering) -> Ordering {
    if has(Bug::WeakAtomics) { Relaxed } else { order }
}

/// The same for an access of a lock.
pub(super) fn lock_order(order: Ordering) -> Ordering {
    if has(Bug::WeakLocks) { Relaxed } else { order }
}

/// The stand-in for the atomic at `place`, which has this word in memory.
fn stand_in(place: usize, word: u64) -> StandIn {
    TABLES.with_borrow_mut(|tables| {
        if let Some(known) = tables.stand_ins.get(&place)
            && known.last == word
        {
            return known.clone();
        }
        let atomic = tables.unused.pop().expect("more atomics than the POOL has");
        let new = StandIn { atomic, first: word, last: word };
        tables.stand_ins.insert(place, new.clone());
        new
    })
}

fn note_store(place: usize, word: u64) {
    TABLES.with_borrow_mut(|tables| {
        if let Some(known) = tables.stand_ins.get_mut(&place) {
            known.last = word;
        }
    });
}

#[track_caller]
pub(super) fn load(place: usize, word: impl Fn() -> u64, order: Ordering) -> u64 {
    let known = stand_in(place, word());
    known.atomic.load(order) ^ known.first
}

#[track_caller]
pub(super) fn store(place: usize, word: impl Fn() -> u64, new: u64, order: Ordering) {
    let known = stand_in(place, word());
    known.atomic.store(new ^ known.first, order);
    note_store(place, new);
}

#[track_caller]
pub(super) fn swap(place: usize, word: impl Fn() -> u64, new: u64, order: Ordering) -> u64 {
    let known = stand_in(place, word());
    let before = known.atomic.swap(new ^ known.first, order) ^ known.first;
    note_store(place, new);
    before
}

#[track_caller]
pub(super) fn compare_exchange(
    place: usize,
    word: impl Fn() -> u64,
    (expected, new): (u64, u64),
    (success, failure): (Ordering, Ordering),
) -> Result<u64, u64> {
    let known = stand_in(place, word());
    let first = known.first;
    let result = known.atomic.compare_exchange(expected ^ first, new ^ first, success, failure);
    if result.is_ok() {
        note_store(place, new);
    }
    result.map(|before| before ^ first).map_err(|before| before ^ first)
}

/// A change that always succeeds, in one step.
#[track_caller]
pub(super) fn change(place: usize, word: impl Fn() -> u64, change: impl Fn(u64) -> u64, order: Ordering) -> u64 {
    let mut now = word();
    loop {
        // What memory has is the latest store, and so what an access of this kind sees, unless another CPU comes between.
        match compare_exchange(place, &word, (now, change(now)), (order, Relaxed)) {
            Ok(before) => return before,
            Err(other) => now = other,
        }
    }
}

/// Whether locks are loom's own, and taken by the three functions below.
pub(super) fn has_own_locks() -> bool {
    mode() == Mode::LoomBlocking
}

fn own_lock(place: usize) -> Rc<Mutex<()>> {
    TABLES.with_borrow_mut(|tables| {
        let Tables { locks, unused_locks, .. } = tables;
        locks.entry(place).or_insert_with(|| unused_locks.pop().expect("more locks than the POOL has")).clone()
    })
}

pub(super) fn take_own_lock(place: usize, wait: bool) -> bool {
    step_alone();
    let lock = own_lock(place);
    let Some(guard) = (if wait { lock.lock().ok() } else { lock.try_lock().ok() }) else { return false };
    // SAFETY: the lock stays in the table until after the guard.
    let guard = unsafe { core::mem::transmute::<MutexGuard<'_, ()>, MutexGuard<'static, ()>>(guard) };
    TABLES.with_borrow_mut(|tables| tables.held.insert(place, guard));
    true
}

pub(super) fn give_up_own_lock(place: usize) {
    step_alone();
    let guard = TABLES.with_borrow_mut(|tables| tables.held.remove(&place));
    drop(guard);
}

/// Says that what is at this address is written here: an error, in a model of loom's, unless every other such access
/// happened before this one.
pub(crate) fn probe(place: usize) {
    if !matches!(mode(), Mode::Loom | Mode::LoomBlocking) {
        return;
    }
    let probe = TABLES.with_borrow_mut(|tables| {
        let Tables { probes, unused_probes, .. } = tables;
        probes.entry(place).or_insert_with(|| unused_probes.pop().expect("more probes than the POOL has")).clone()
    });
    probe.with_mut(|_| ());
}

fn task() -> Task {
    match mode() {
        Mode::Loom | Mode::LoomBlocking => Task::Loom(loom::thread::current().id()),
        Mode::Shuttle => Task::Shuttle(shuttle::thread::current().id()),
        Mode::Off | Mode::Alone => Task::Only,
    }
}

/// The CPU that this runs on.
fn cpu() -> Rc<Cpu> {
    let task = task();
    TABLES.with_borrow_mut(|tables| {
        if let Some((_, cpu)) = tables.cpus.iter().find(|(known, _)| *known == task) {
            return cpu.clone();
        }
        let cpu = Rc::new(Cpu {
            number: Cell::new(0),
            enabled: Cell::new(true),
            steps: Cell::new(0),
            interruption: RefCell::new(None),
            handling: Cell::new(false),
        });
        tables.cpus.push((task, cpu.clone()));
        cpu
    })
}

/// From now on the caller is that CPU.
pub(crate) fn be_cpu(number: usize) {
    cpu().number.set(number);
}

/// Runs `work` while this CPU is interrupted once. Whether it came to that: `false` if `work` has fewer steps.
pub(crate) fn interrupted(interruption: Interruption, work: impl FnOnce()) -> bool {
    let cpu = cpu();
    cpu.steps.set(0);
    *cpu.interruption.borrow_mut() = Some(interruption);
    work();
    cpu.interruption.take().is_none()
}

impl Cpu {
    fn interrupt_at(&self, step: usize) {
        let due =
            self.interruption.borrow().as_ref().is_some_and(|interruption| {
                step >= interruption.step && (interruption.non_maskable || self.enabled.get())
            });
        if due {
            self.interrupt();
        }
    }

    fn interrupt(&self) {
        let Some(interruption) = self.interruption.take() else { return };
        let enabled = self.enabled.replace(false);
        let number = self.number.get();
        if interruption.non_maskable {
            self.number.set(IN_NMI);
        }
        self.handling.set(true);
        (interruption.handler)();
        self.handling.set(false);
        self.number.set(number);
        self.enabled.set(enabled);
    }
}

/// The CPUs of a model.
#[derive(Debug)]
pub(crate) struct Cpus;

// SAFETY: a handler runs only where interrupts are enabled, and each CPU has a number of its own (but for planted bugs).
unsafe impl Platform for Cpus {
    const CPUS: usize = 4;

    fn current_cpu() -> usize {
        if has(Bug::OneNumber) { 0 } else { cpu().number.get() }
    }

    fn disable_interrupts() -> bool {
        if has(Bug::InterruptsStayOn) { cpu().enabled.get() } else { cpu().enabled.replace(false) }
    }

    fn restore_interrupts(were_enabled: bool) {
        if were_enabled && !std::thread::panicking() {
            let cpu = cpu();
            cpu.enabled.set(true);
            if !cpu.handling.get() {
                cpu.interrupt_at(cpu.steps.get());
            }
        }
    }
}
