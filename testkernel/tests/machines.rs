//! The suite on machines other than the usual one.

use std::{
    fs, iter,
    sync::OnceLock,
    time::{Duration, Instant},
};

use testkernel::host::{
    self, Kernel,
    elf::GuestTest,
    qemu::{Guest, Machine, Output, Start},
    suite::{self, Event},
};

/// How long a boot may make no progress: some of these machines are slow.
const PATIENCE: Duration = Duration::from_secs(120);

fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(|| {
        host::qemu().unwrap();
        host::kernel().unwrap()
    })
}

/// Boots every ordinary test on the machine that `change` makes of the usual one.
#[track_caller]
fn passes(change: impl FnOnce(Machine) -> Machine) {
    passes_with("", change);
}

/// The same with the tests whose names contain `text`.
#[track_caller]
fn passes_with(text: &str, change: impl FnOnce(Machine) -> Machine) {
    let kernel = kernel();
    let is_wanted = |test: &&GuestTest| test.is_ordinary() && test.name.contains(text);
    let tests: Vec<_> = kernel.tests.iter().filter(is_wanted).cloned().collect();
    assert!(!tests.is_empty());
    let mut passed = 0;
    let mut failures = Vec::new();
    let machine = change(Machine::pvh(&kernel.elf, &kernel.ramdisk));
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

/// The suite itself has 4.
#[test]
fn with_2_and_8_cpus() {
    passes_with("cpus::", |machine| Machine { cpus: 2, ..machine });
    passes_with("cpus::", |machine| Machine { cpus: 8, ..machine });
}

#[test]
#[ignore = "slow"]
fn with_64_cpus() {
    passes_with("cpus::", |machine| Machine { cpus: 64, ..machine });
}

#[test]
fn a_cpu_that_does_not_start_is_reported_and_the_rest_go_on() {
    let kernel = kernel();
    let machine = Machine { cpus: 4, lost_cpu: Some(1), ..Machine::pvh(&kernel.elf, &kernel.ramdisk) };
    let tests: Vec<_> = kernel.tests.iter().filter(|test| test.name.starts_with("cpus::all_")).cloned().collect();
    let guest = Guest::start(&machine, &suite::command_line(&machine, &tests)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let lines: Vec<_> = iter::from_fn(|| match guest.next(Some(deadline)) {
        Output::Line(line) => Some(line),
        _ => None,
    })
    .collect();
    let reported = "The CPU with APIC id 1 was not started: it does not answer";
    assert_eq!(lines.iter().filter(|line| *line == reported).count(), 1, "{lines:#?}");
    let passed = lines.iter().filter(|line| line.starts_with("@kslab ktap ok ")).count();
    assert!(passed == tests.len() && passed > 0, "{lines:#?}");
}

#[test]
fn without_a_ramdisk_or_with_a_damaged_one_a_report_has_addresses_alone() {
    let kernel = kernel();
    let whole = fs::read(&kernel.ramdisk).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        Some(path)
    };
    let noise: Vec<_> = (0..100_001_u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let ramdisks = [None, file("cut", &whole[..whole.len() / 2]), file("noise", &noise), file("byte", &[7])];
    let tests: Vec<_> = kernel.tests.iter().filter(|test| test.name == "broken::fails").cloned().collect();
    for ramdisk in ramdisks {
        let start = Start::Pvh { ramdisk };
        let machine = Machine { start, ..Machine::pvh(&kernel.elf, &kernel.ramdisk) };
        let mut failures = Vec::new();
        suite::run_group(&machine, &tests, Some(PATIENCE), &mut |event| {
            let Event::Verdict(verdict) = event else { return true };
            failures.extend(verdict.failure);
            true
        });
        let [failure] = &failures[..] else { panic!("{:?}: {failures:#?}", machine.start) };
        assert!(failure.reason.ends_with("right: 3"), "{:?}: {failure:#?}", machine.start);
        let calls: Vec<_> = failure.console.iter().filter(|line| line.starts_with("  at 0x")).collect();
        let source = |line: &&String| line.contains(" (testkernel/src/guest/tests/broken.rs:");
        assert!(calls.iter().any(source) && !calls.iter().any(|line| line.contains("+0x")), "{failure:#?}");
    }
}

#[test]
fn with_a_clock_that_counts_instructions() {
    passes(|machine| Machine { icount: true, ..machine });
}
