//! Which tests share a boot, and the boots until each test has its verdict.

use std::{
    sync::{Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::{
    elf::GuestTest,
    lines,
    qemu::{Guest, Machine, Output},
    report::{End, Report, Verdict, frame_in},
};

/// Boots at the same time, at most.
const PARALLEL: usize = 2;

/// What happens during a run of the suite.
#[derive(Debug)]
pub enum Event {
    /// A test is settled.
    Verdict(Verdict),
    /// The allocator's tables at the end of a boot.
    Tables(Vec<String>),
}

/// Puts the tests that return into one group and each test that stops the kernel into a group of its own.
pub fn groups(tests: Vec<GuestTest>) -> Vec<Vec<GuestTest>> {
    let (returning, stopping): (Vec<_>, Vec<_>) = tests.into_iter().partition(|test| test.stops_with.is_none());
    let alone = stopping.into_iter().map(|test| vec![test]);
    [returning].into_iter().filter(|group| !group.is_empty()).chain(alone).collect()
}

/// Runs every group and passes on what happens, in the order of the groups. Ends early where `on_event` fails.
pub fn run(
    machine: &Machine,
    groups: &[Vec<GuestTest>],
    patience: Option<Duration>,
    mut on_event: impl FnMut(Event) -> Result<()>,
) -> Result<()> {
    let (senders, receivers): (Vec<_>, Vec<_>) = groups.iter().map(|_| mpsc::channel()).unzip();
    let waiting = Mutex::new(groups.iter().zip(senders));
    let take = || waiting.lock().ok()?.next();
    let work = || {
        while let Some((group, events)) = take() {
            // Nobody listens any more: the run has ended early.
            if run_group(machine, group, patience, &mut |event| events.send(event).is_ok()).is_none() {
                return;
            }
        }
    };
    thread::scope(|scope| {
        // A debugger can attach to one machine only.
        for _ in 0..if machine.gdb { 1 } else { PARALLEL.min(groups.len()) } {
            scope.spawn(work);
        }
        receivers.into_iter().flatten().try_for_each(&mut on_event)
    })
}

/// Boots until each of `tests` has its verdict. `None` as soon as `emit` gives `false`.
pub fn run_group(
    machine: &Machine,
    tests: &[GuestTest],
    patience: Option<Duration>,
    emit: &mut dyn FnMut(Event) -> bool,
) -> Option<()> {
    let mut rest = tests;
    while !rest.is_empty() {
        let settled = boot(machine, rest, patience, emit)?;
        rest = &rest[settled..];
    }
    Some(())
}

/// One boot. Gives how many of `tests`, from the first on, are settled: at least one.
fn boot(
    machine: &Machine,
    tests: &[GuestTest],
    patience: Option<Duration>,
    emit: &mut dyn FnMut(Event) -> bool,
) -> Option<usize> {
    let mut report = Report::new(tests);
    let mut settled = 0;
    let end = watch(machine, tests, patience, &mut |line| {
        let Some(verdict) = report.line(line) else { return true };
        settled += 1;
        emit(Event::Verdict(with_lines(machine, verdict)))
    })?;
    let ended = report.end(&end);
    settled += ended.verdicts.len();
    let verdicts = ended.verdicts.into_iter().map(|verdict| Event::Verdict(with_lines(machine, verdict)));
    let tables = (!ended.tables.is_empty()).then_some(Event::Tables(ended.tables));
    verdicts.chain(tables).all(emit).then_some(settled)
}

/// Has what the kernel says about a failure name files and lines.
fn with_lines(machine: &Machine, mut verdict: Verdict) -> Verdict {
    if let Some(failure) = &mut verdict.failure {
        lines::add(&machine.elf, &mut failure.console);
    }
    verdict
}

/// Starts the machine and passes its lines on until it ends, or makes no progress for too long. `None` as soon as
/// `on_line` gives `false`.
fn watch(
    machine: &Machine,
    tests: &[GuestTest],
    patience: Option<Duration>,
    on_line: &mut dyn FnMut(&str) -> bool,
) -> Option<End> {
    let failed = |error: anyhow::Error| Some(End::Error(format!("{error:#}")));
    let machine = machine_for(machine, tests);
    let guest = match Guest::start(&machine, &command_line(&machine, tests)) {
        Ok(guest) => guest,
        Err(error) => return failed(error),
    };
    let new_deadline = || patience.map(|patience| Instant::now() + patience);
    let mut deadline = new_deadline();
    loop {
        match guest.next(deadline) {
            Output::Line(line) => {
                if !on_line(&line) {
                    return None;
                }
                if frame_in(&line).is_some() {
                    deadline = new_deadline();
                }
            }
            Output::Overdue => {
                let all_taken = guest.kill().iter().all(|line| on_line(line));
                return patience.filter(|_| all_taken).map(End::NoProgress);
            }
            Output::End => return guest.end().map_or_else(failed, Some),
        }
    }
}

/// The machine, with as many CPUs as `tests` want at least.
fn machine_for(machine: &Machine, tests: &[GuestTest]) -> Machine {
    let wanted = tests.iter().map(|test| test.cpus).max().unwrap_or(1);
    Machine { cpus: machine.cpus.max(wanted), ..machine.clone() }
}

/// The kernel's command line that says how many CPUs there should be and picks `tests`, in this order.
pub fn command_line(machine: &Machine, tests: &[GuestTest]) -> String {
    let numbers: Vec<_> = tests.iter().map(|test| test.number).collect();
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        run => run.iter().map(usize::to_string).collect(),
    });
    let lost = machine.lost_cpu.map(|id| format!("lost-cpu={id} ")).unwrap_or_default();
    let cpus = machine.cpus - u16::from(machine.lost_cpu.is_some());
    let line = format!("cpus={cpus} {lost}tests={} {}", runs.collect::<Vec<_>>().join(","), machine.words);
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::protocol::When;

    fn test(number: usize, stops_with: Option<&str>) -> GuestTest {
        let stops_with = stops_with.map(str::to_owned);
        GuestTest { name: format!("t{number}"), number, stops_with, when: When::Always, cpus: 1 }
    }

    #[test]
    fn a_test_that_stops_the_kernel_has_a_boot_of_its_own() {
        let tests = vec![test(0, Some("panic: x")), test(1, None), test(2, Some("panic: y")), test(3, None)];
        let numbers = |group: &Vec<GuestTest>| group.iter().map(|test| test.number).collect::<Vec<_>>();
        assert_eq!(groups(tests.clone()).iter().map(numbers).collect::<Vec<_>>(), [vec![1, 3], vec![0], vec![2]]);
        assert_eq!(groups(tests[..1].to_vec()).len(), 1);
        assert!(groups(Vec::new()).is_empty());
    }

    #[test]
    fn a_machine_has_the_cpus_that_its_tests_want() {
        let machine = Machine { cpus: 2, ..Machine::pvh("/kernel".as_ref(), "/ramdisk".as_ref()) };
        let wants = |cpus| GuestTest { cpus, ..test(0, None) };
        let cpus = |tests: &[GuestTest]| machine_for(&machine, tests).cpus;
        assert_eq!((cpus(&[wants(1)]), cpus(&[wants(1), wants(4), wants(3)]), cpus(&[])), (2, 4, 2));
    }

    #[test]
    fn the_command_line_keeps_the_order_and_joins_runs() {
        let plain = Machine::pvh(Path::new("/kernel"), Path::new("/ramdisk"));
        let tests = |numbers: &[usize]| numbers.iter().map(|&n| test(n, None)).collect::<Vec<_>>();
        let line = |numbers: &[usize]| command_line(&plain, &tests(numbers));
        assert_eq!(line(&[7]), "cpus=1 tests=7");
        assert_eq!(line(&[0, 1, 2, 9, 5, 6, 4]), "cpus=1 tests=0-2,9,5-6,4");
        assert_eq!(line(&[3, 2, 1]), "cpus=1 tests=3,2,1");
        let machine = Machine { cpus: 4, lost_cpu: Some(2), words: "seed=7".into(), ..plain.clone() };
        assert_eq!(command_line(&machine, &tests(&[1])), "cpus=3 lost-cpu=2 tests=1 seed=7");
    }
}
