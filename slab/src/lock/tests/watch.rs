use std::cell::Cell;

use super::*;
use crate::platform::{IN_NMI, NoInterrupts};
use crate::testing::report_of;

std::thread_local! {
    static MOST_SPINS: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// How long a thread of a test waits for a lock; for ever, if the test does not say otherwise.
pub(in crate::lock) fn most_spins() -> u64 {
    MOST_SPINS.get()
}

#[test]
fn row_90_a_lock_taken_twice_on_one_cpu_is_named() {
    let lock = IrqLock::<Threads, _>::named("console", ());
    let _held = lock.lock();
    assert_eq!(report_of(|| drop(lock.lock())), "kslab: lock taken twice on CPU 0: console");
    assert!(lock.try_lock().is_none());
    be_cpu(2);
    let zone = IrqLock::<Threads, _>::ordered(Level::Zone1, ());
    let held = zone.lock();
    assert_eq!(report_of(|| drop(zone.lock())), "kslab: lock taken twice on CPU 2: zone 1");
    drop(held);
    drop(zone.lock());
}

#[test]
fn row_91_locks_out_of_order_are_both_named() {
    let [depot, slabs] = [Level::Depot, Level::Slabs].map(|level| IrqLock::<Threads, _>::ordered(level, ()));
    let own = IrqLock::<Threads, _>::new(());
    {
        let _order = (depot.lock(), own.lock(), slabs.lock());
    }
    let held = slabs.lock();
    assert_eq!(report_of(|| drop(depot.lock())), "kslab: locks out of order on CPU 0: depot, with slab list held");
    let another = IrqLock::<Threads, _>::ordered(Level::Slabs, ());
    assert_eq!(
        report_of(|| drop(another.lock())),
        "kslab: locks out of order on CPU 0: slab list, with slab list held"
    );
    assert!(depot.try_lock().is_some(), "to try does no harm");
    drop(own.lock());
    be_cpu(1);
    drop(depot.lock());
    be_cpu(0);
    drop(held);
    drop(depot.lock());
}

#[test]
fn row_92_a_lock_that_is_not_released_is_reported_with_its_holder() {
    let lock = &IrqLock::<Threads, _>::named("disk", ());
    let _held = lock.lock();
    let report = std::thread::scope(|scope| {
        let waiting = || {
            be_cpu(3);
            MOST_SPINS.set(100);
            report_of(|| drop(lock.lock()))
        };
        scope.spawn(waiting).join().unwrap()
    });
    assert_eq!(report, "kslab: lock held too long by CPU 0: disk");
}

#[test]
fn row_92_without_numbers_the_holder_is_not_named() {
    MOST_SPINS.set(100);
    let unnumbered = IrqLock::<NoInterrupts, _>::named("log", ());
    let _other = unnumbered.lock();
    assert_eq!(report_of(|| drop(unnumbered.lock())), "kslab: lock held too long: log");
}

#[test]
fn row_90_an_nmi_that_would_wait_for_a_lock_is_reported() {
    let lock = IrqLock::<Threads, _>::named("console", ());
    be_cpu(IN_NMI);
    assert_eq!(report_of(|| drop(lock.lock())), "kslab: lock waited for in an NMI: console");
    assert!(lock.try_lock().is_some() && lock.lock_unless_nmi().is_some());
    be_cpu(0);
    let held = lock.lock();
    be_cpu(IN_NMI);
    assert!(lock.lock_unless_nmi().is_none() && lock.lock_to_report().is_none());
    drop(held);
}
