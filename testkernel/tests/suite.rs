//! Shows every test of the kernel as a test of its own.
//!
//! The tests that are selected share one boot, which the first of them to run starts; each takes its verdict from there
//! as soon as it comes. A test that stops the kernel has a boot of its own. The machine has 4 CPUs.

use std::{
    collections::HashMap,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use testkernel::{
    host::{
        self,
        elf::GuestTest,
        qemu::Machine,
        report::Verdict,
        suite::{self, Event},
    },
    protocol::When,
};

/// How long a boot may make no progress.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let args = Arguments::from_args();
    match trials(&args) {
        Ok(trials) => libtest_mimic::run(&args, trials).exit_code(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(101)
        }
    }
}

fn trials(args: &Arguments) -> Result<Vec<Trial>> {
    let kernel = host::kernel()?;
    let machine = Machine { cpus: 4, ..Machine::pvh(&kernel.elf, &kernel.ramdisk) };
    let tests = kernel.tests.into_iter().filter(|test| matches!(test.when, When::Always | When::Ignored));
    let (selected, others): (Vec<_>, Vec<_>) = tests.partition(|test| is_selected(args, test));
    if !args.list && !selected.is_empty() {
        host::qemu()?;
    }
    let unselected = |test: GuestTest| trial(&test, || Err("this test was not selected".into()));
    let mut trials: Vec<_> = others.into_iter().map(unselected).collect();
    for group in suite::groups(selected) {
        trials.extend(Boot::trials(group, &machine));
    }
    trials.sort_by(|a, b| a.name().cmp(b.name()));
    Ok(trials)
}

fn trial(test: &GuestTest, run: impl FnOnce() -> Result<(), Failed> + Send + 'static) -> Trial {
    Trial::test(&test.name, run).with_ignored_flag(test.when == When::Ignored)
}

fn is_selected(args: &Arguments, test: &GuestTest) -> bool {
    let probe = trial(test, || Ok(()));
    !args.is_filtered_out(&probe) && !args.is_ignored(&probe)
}

/// A boot that several trials wait for.
struct Boot {
    machine: Machine,
    /// Taken by the first trial.
    not_started: Mutex<Option<NotStarted>>,
}

struct NotStarted {
    tests: Vec<GuestTest>,
    verdicts: HashMap<String, Sender<Verdict>>,
}

impl Boot {
    /// The trials that share the boot of `tests`.
    fn trials(tests: Vec<GuestTest>, machine: &Machine) -> Vec<Trial> {
        let (mut verdicts, mut receivers) = (HashMap::new(), Vec::new());
        for test in &tests {
            let (sender, receiver) = mpsc::channel();
            verdicts.insert(test.name.clone(), sender);
            receivers.push((test.clone(), receiver));
        }
        let not_started = Mutex::new(Some(NotStarted { tests, verdicts }));
        let boot = Arc::new(Boot { machine: machine.clone(), not_started });
        let waiting = |(test, receiver): (GuestTest, Receiver<Verdict>)| {
            let boot = Arc::clone(&boot);
            trial(&test, move || boot.wait_for(&receiver))
        };
        receivers.into_iter().map(waiting).collect()
    }

    fn wait_for(&self, verdict: &Receiver<Verdict>) -> Result<(), Failed> {
        self.start();
        let verdict = verdict.recv().map_err(|_| "the boot ended without a verdict on this test")?;
        match verdict.failure {
            None => Ok(()),
            Some(failure) => Err(format!("{}\n{}", failure.reason, failure.console.join("\n")).into()),
        }
    }

    fn start(&self) {
        let Some(NotStarted { tests, mut verdicts }) = self.not_started.lock().unwrap().take() else {
            return;
        };
        let machine = self.machine.clone();
        thread::spawn(move || {
            suite::run_group(&machine, &tests, Some(PATIENCE), &mut |event| {
                if let Event::Verdict(verdict) = event
                    && let Some(trial) = verdicts.remove(&verdict.test)
                {
                    // The trial waits until it has its verdict.
                    let _ = trial.send(verdict);
                }
                true
            });
        });
    }
}
