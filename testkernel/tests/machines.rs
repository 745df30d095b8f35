//! The suite on machines other than the usual one.

use std::{sync::OnceLock, time::Duration};

use testkernel::host::{
    self, Kernel,
    qemu::Machine,
    suite::{self, Event},
};

/// How long a boot may make no progress: some of these machines are slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// Boots every ordinary test on the machine that `change` makes of the usual one.
#[track_caller]
fn passes(change: impl FnOnce(Machine) -> Machine) {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    let kernel = KERNEL.get_or_init(|| {
        host::qemu().unwrap();
        host::kernel().unwrap()
    });
    let tests: Vec<_> = kernel.tests.iter().filter(|test| test.is_ordinary()).cloned().collect();
    assert!(!tests.is_empty());
    let mut passed = 0;
    let mut failures = Vec::new();
    let machine = change(Machine::pvh(&kernel.elf));
    suite::run_group(&machine, &tests, Some(PATIENCE), &mut |event| {
        match event {
            Event::Verdict(verdict) if verdict.failure.is_some() => failures.push(verdict),
            Event::Verdict(_) => passed += 1,
            Event::Tables(_) => (),
        }
        true
    });
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(passed, tests.len());
}

#[test]
fn with_32_mib() {
    passes(|machine| Machine { memory: "32M".parse().unwrap(), ..machine });
}

#[test]
fn with_4_gib_and_so_memory_above_the_hole_for_devices() {
    passes(|machine| Machine { memory: "4G".parse().unwrap(), ..machine });
}

#[test]
fn with_16_gib() {
    passes(|machine| Machine { memory: "16G".parse().unwrap(), ..machine });
}

#[test]
fn with_4_cpus() {
    passes(|machine| Machine { cpus: 4, ..machine });
}

#[test]
fn with_a_clock_that_counts_instructions() {
    passes(|machine| Machine { icount: true, ..machine });
}
