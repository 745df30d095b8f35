#[cfg(debug_assertions)]
mod watch;

use std::cell::Cell;

use super::*;
use crate::testing::{Threads, be_cpu};

#[cfg(debug_assertions)]
pub(super) use watch::most_spins;

std::thread_local! {
    static ENABLED: Cell<bool> = const { Cell::new(true) };
}

struct Flag;

// SAFETY: there are no interrupts; the flag only records what was asked for.
unsafe impl Platform for Flag {
    fn disable_interrupts() -> bool {
        ENABLED.replace(false)
    }

    fn restore_interrupts(were_enabled: bool) {
        if were_enabled {
            ENABLED.set(true);
        }
    }
}

#[test]
fn interrupts_are_off_while_held_and_as_before_afterwards() {
    let (outer, inner) = (IrqLock::<Flag, _>::new(1), IrqLock::<Flag, _>::new(2));
    let first = outer.lock();
    assert!(!ENABLED.get());
    drop(inner.lock());
    assert!(!ENABLED.get(), "the inner guard must not enable what the outer one disabled");
    drop(first);
    assert!(ENABLED.get());
}

#[test]
fn a_lock_that_is_held_is_refused_and_leaves_interrupts_alone() {
    let lock = IrqLock::<Flag, _>::new(());
    let guard = lock.lock();
    ENABLED.set(true);
    assert!(lock.try_lock().is_none());
    assert!(ENABLED.get());
    drop(guard);
    assert!(lock.try_lock().is_some());
}

#[test]
fn threads_exclude_each_other() {
    let lock = &IrqLock::<Threads, _>::new(0);
    std::thread::scope(|scope| {
        for number in 1..=2 {
            scope.spawn(move || {
                be_cpu(number);
                (0..1000).for_each(|_| *lock.lock() += 1);
            });
        }
    });
    assert_eq!(*lock.lock(), 2000);
}
