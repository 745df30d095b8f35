//! The command line, and what is done in which order.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;

use crate::cpu;
use crate::measure::{self, Job, Measured};
use crate::peers::HEAPS;
use crate::peers::frames::FRAMES;
use crate::run::Mode;
use crate::workloads::WORKLOADS;
use crate::{plot, results, table};

/// Compares kslab with other allocators.
#[derive(Debug, Parser)]
#[command(name = "compare", about)]
struct Options {
    /// Workloads whose names begin so, such as W1,W3; all if there is none
    #[arg(long, short, value_delimiter = ',')]
    workload: Vec<String>,
    /// Allocators whose names begin so; all if there is none
    #[arg(long, short, value_delimiter = ',')]
    peer: Vec<String>,
    /// How often each is measured
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// One short round, to try
    #[arg(long)]
    quick: bool,
    /// Counts instructions, with valgrind, instead of time
    #[arg(long)]
    instructions: bool,
    /// Looks at each block that is allocated, and measures nothing
    #[arg(long)]
    check: bool,
    /// Where the results go, as CSV
    #[arg(long, value_name = "DIR", default_value = "target/bench-results")]
    csv: PathBuf,
    /// Draws charts, as SVG
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Says which workloads and allocators there are
    #[arg(long)]
    list: bool,
    /// What `cargo bench` says
    #[arg(long, hide = true)]
    bench: bool,
}

/// How long a workload is timed in each round.
const TIME: Duration = Duration::from_millis(50);
const QUICK_TIME: Duration = Duration::from_millis(10);

/// What the program does.
pub fn main() -> ExitCode {
    if measure::run_as_child() {
        return ExitCode::SUCCESS;
    }
    match compare(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(options: &Options) -> anyhow::Result<()> {
    if options.list {
        list();
        return Ok(());
    }
    let jobs = Job::all(&options.workload, &options.peer);
    anyhow::ensure!(!jobs.is_empty(), "no workload and allocator of these names: --list says which there are");
    if options.check {
        return check(&jobs);
    }
    let (name, measured) =
        if options.instructions { ("instructions", count(jobs)?) } else { ("times", time(&jobs, options)) };
    results::write(&options.csv, name, &measured).with_context(|| options.csv.display().to_string())?;
    println!("{}\n", conditions(options));
    print!("{}", table::of(&measured, options.instructions));
    if let Some(directory) = &options.plot {
        plot::draw(directory, name, &measured).with_context(|| directory.display().to_string())?;
    }
    Ok(())
}

/// What the results were measured on, and how.
fn conditions(options: &Options) -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or("an unknown CPU", |(_, name)| name);
    let how = match options {
        Options { instructions: true, .. } => "instructions counted by callgrind".to_owned(),
        Options { quick: true, .. } => "one short round".to_owned(),
        Options { rounds, .. } => format!("medians of {rounds} rounds"),
    };
    format!("{} x {name}; {how}. kslab's threads have numbers, and no interrupt guard.", cpu::available())
}

fn list() {
    for workload in &WORKLOADS {
        println!("{workload}");
    }
    let heaps = HEAPS.iter().map(|entry| entry.name);
    println!("blocks: {}", heaps.collect::<Vec<_>>().join(", "));
    let frames = FRAMES.iter().map(|entry| entry.name);
    println!("page frames: {}", frames.collect::<Vec<_>>().join(", "));
}

fn time(jobs: &[Job], options: &Options) -> Vec<Measured> {
    let (rounds, time) = if options.quick { (1, QUICK_TIME) } else { (options.rounds, TIME) };
    let start = Instant::now();
    let mut measured: Vec<_> = jobs.iter().map(|&job| Measured { job, values: Vec::new() }).collect();
    for round in 1..=rounds {
        for Measured { job, values } in measured.iter_mut().filter(|one| round == 1 || !one.job.workload.once) {
            match job.measure(Mode::Time(time)) {
                Ok(value) => values.push(value),
                Err(error) if round == 1 => failed(job, &error),
                Err(_) => {}
            }
        }
        eprintln!("round {round} of {rounds}: {:.0} s", start.elapsed().as_secs_f64());
    }
    measured
}

fn count(jobs: Vec<Job>) -> anyhow::Result<Vec<Measured>> {
    let mut measured = Vec::new();
    let mut works = false;
    for job in jobs.into_iter().filter(|job| job.workload.counted) {
        let values = match job.count() {
            Ok(value) => vec![value],
            Err(error) if !works => return Err(error),
            Err(error) => {
                failed(&job, &error);
                Vec::new()
            }
        };
        works = true;
        measured.push(Measured { job, values });
    }
    Ok(measured)
}

fn check(jobs: &[Job]) -> anyhow::Result<()> {
    let mut bad = 0;
    for job in jobs.iter().filter(|job| job.peer != "harness alone") {
        if let Err(error) = job.measure(Mode::Check) {
            failed(job, &error);
            bad += 1;
        }
    }
    anyhow::ensure!(bad == 0, "{bad} of {} failed", jobs.len());
    println!("{} checked", jobs.len());
    Ok(())
}

fn failed(job: &Job, error: &anyhow::Error) {
    eprintln!("{} {} {}: {error:#}", job.peer, job.workload.name, job.workload.axis.label(job.point));
}
