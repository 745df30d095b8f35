//! Measurements: each in a process of its own, and of each allocator one after the other, round by round.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::arena;
use crate::callgrind;
use crate::peers::frames::FRAMES;
use crate::peers::{HEAPS, Role};
use crate::run::{Mode, median};
use crate::workloads::{Kind, WORKLOADS, Workload};

/// What a child does: a workload, an allocator, a point, and how. See [`Mode`].
const CHILD: &str = "KSLAB_COMPARE";

/// A child that takes longer has lost its way. Seconds.
const LONGEST: u32 = 300;

/// Batches whose instructions are counted.
const COUNTED: usize = 10;

/// What is measured of one allocator.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub workload: &'static Workload,
    pub point: u64,
    pub peer: &'static str,
    pub role: Role,
}

/// All values of a job, one a round; none where it failed.
#[derive(Debug, Clone)]
pub struct Measured {
    pub job: Job,
    pub values: Vec<f64>,
}

impl Measured {
    pub fn median(&self) -> Option<f64> {
        (!self.values.is_empty()).then(|| median(self.values.clone()))
    }
}

impl Job {
    /// Every job of the workloads and allocators that are wanted.
    pub fn all(workloads: &[String], peers: &[String]) -> Vec<Self> {
        let workloads = WORKLOADS.iter().filter(|workload| wanted(workload.name, workloads));
        let jobs = workloads.flat_map(|workload| {
            let rows: Vec<_> = match workload.kind {
                Kind::Heap(_) => HEAPS.iter().map(|entry| (entry.name, entry.role)).collect(),
                Kind::Frames(_) => FRAMES.iter().map(|entry| (entry.name, entry.role)).collect(),
            };
            let at = move |point| {
                let jobs = rows.clone().into_iter().map(move |(peer, role)| Self { workload, point, peer, role });
                jobs.filter(|job| workload.suits(job.role))
            };
            workload.points().into_iter().flat_map(at)
        });
        jobs.filter(|job| wanted(job.peer, peers)).collect()
    }

    /// A process that does it.
    fn child(self, mode: Mode) -> anyhow::Result<Command> {
        let (mode, number) = match mode {
            Mode::Time(time) => ("time", time.as_micros()),
            Mode::Count(batches) => ("count", batches as u128),
            Mode::Check => ("check", 0),
        };
        let mut child = Command::new(env::current_exe().context("where this program is")?);
        child
            .env(CHILD, [self.workload.name, self.peer, &self.point.to_string(), mode, &number.to_string()].join("\t"));
        Ok(child)
    }

    /// The value that a child of its own measures.
    pub fn measure(self, mode: Mode) -> anyhow::Result<f64> {
        let output = self.child(mode)?.stdin(Stdio::null()).output().context("a process")?;
        if !output.status.success() {
            anyhow::bail!("{}", last_words(output.status, &output.stderr));
        }
        String::from_utf8_lossy(&output.stdout).trim().parse().context("a number")
    }

    /// Instructions an operation: the difference of two runs.
    pub fn count(self) -> anyhow::Result<f64> {
        let [few, many] = [1, 1 + COUNTED].map(|batches| callgrind::count(&self.child(Mode::Count(batches))?));
        let (few, many) = (few?, many?);
        let operations: f64 = few.output.trim().parse().context("a number")?;
        Ok((many.instructions - few.instructions) as f64 / (COUNTED as f64 * operations))
    }
}

fn wanted(name: &str, words: &[String]) -> bool {
    words.is_empty() || words.iter().any(|word| name.starts_with(word.as_str()))
}

/// Why a child ended: the text of its panic, if it has one.
fn last_words(status: ExitStatus, text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let panic = text.lines().skip_while(|line| !line.contains("panicked at")).nth(1);
    match (panic, status.signal()) {
        (Some(panic), _) => panic.to_owned(),
        (None, Some(libc::SIGALRM)) => format!("not done in {LONGEST} s"),
        _ => status.to_string(),
    }
}

/// Does what a parent wants done, if there is one.
pub fn run_as_child() -> bool {
    let Ok(child) = env::var(CHILD) else { return false };
    let [workload, peer, point, mode, number] = child.split('\t').collect::<Vec<_>>()[..] else { return false };
    let number = number.parse().expect("a number");
    let mode = match mode {
        "time" => Mode::Time(Duration::from_micros(number)),
        "count" => Mode::Count(number as usize),
        _ => Mode::Check,
    };
    // SAFETY: nobody waits for this signal, which ends the process.
    unsafe { libc::alarm(LONGEST) };
    arena::only_small_pages();
    let value = run(workload, peer, point.parse().expect("a number"), mode);
    println!("{}", value.expect("a workload and an allocator"));
    true
}

/// In this process.
fn run(workload: &str, peer: &str, point: u64, mode: Mode) -> Option<f64> {
    match WORKLOADS.iter().find(|known| known.name == workload)?.kind {
        Kind::Heap(heap) => Some((HEAPS.iter().find(|entry| entry.name == peer)?.run)(heap, point, mode)),
        Kind::Frames(frames) => Some((FRAMES.iter().find(|entry| entry.name == peer)?.run)(frames, point, mode)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_of_the_workloads_and_allocators_that_are_wanted() {
        let words = |words: &[&str]| words.iter().map(|word| word.to_string()).collect::<Vec<_>>();
        let jobs = Job::all(&words(&["W2"]), &words(&["kslab", "glibc"]));
        let names: Vec<_> = jobs.iter().map(|job| (job.workload.name, job.peer)).collect();
        let [a, b, c] = ["W2-lifo", "W2-fifo", "W2-random"].map(|name| [(name, "kslab"), (name, "glibc")]);
        assert_eq!(names, [a, b, c].concat());
        assert!(Job::all(&words(&["W6"]), &[]).iter().all(|job| job.role != Role::Bound));
    }

    #[test]
    fn the_last_words_of_a_child_are_those_of_its_panic() {
        let text = b"thread 'main' panicked at src/lib.rs:1:2:\nout of memory\nnote: run with";
        assert_eq!(last_words(ExitStatus::from_raw(101 << 8), text), "out of memory");
        assert!(last_words(ExitStatus::from_raw(libc::SIGALRM), b"").starts_with("not done in"));
    }
}
