//! The demonstration of misuse: of kslab and of other allocators, each time in a process of its own, and of the kernel.
//!
//! [`peers`] runs the processes, [`outcome`] is what became of one, [`mod@table`] shows all of them side by side.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Result, ensure};

use self::{
    outcome::Outcome,
    peers::{CHECKED, Misuse, Peers},
};
use super::{
    Kernel,
    cli::Args,
    elf::GuestTest,
    kernel, kernel_build, qemu,
    qemu::Machine,
    suite::{self, Event},
};

pub mod outcome;
pub mod peers;
pub mod table;

/// The tests that misuse the kernel's allocator, each in a boot of its own.
const KERNEL_TESTS: [&str; 3] = ["misuse::", "checks::", "guard::"];

/// A misuse, and what became of it with each allocator.
type Row = (Misuse, Vec<Outcome>);

/// Prints the table and nothing else.
pub fn table() -> Result<ExitCode> {
    let peers = Peers::list(kernel_build::peers()?)?;
    let rows = peers.misuses.iter().map(|misuse| misused(&peers, misuse)).collect::<Result<Vec<_>>>()?;
    write!(io::stdout(), "{}", table::of(&peers.allocators, &rows))?;
    Ok(verdict(&rows, 0))
}

/// Shows each misuse with kslab's report, then the table, then the kernel's reports. The exit code is 0 where kslab has
/// named each misuse and each of the kernel's reports is as expected.
pub fn run(args: &Args) -> Result<ExitCode> {
    qemu()?;
    let peers = Peers::list(kernel_build::peers()?)?;
    let mut out = io::stdout();
    let mut rows = Vec::new();
    for misuse in &peers.misuses {
        let row = misused(&peers, misuse)?;
        show(&mut out, &row)?;
        rows.push(row);
    }
    writeln!(out, "{}", table::of(&peers.allocators, &rows))?;
    let failed = misuse_kernel(args, &mut out)?;
    Ok(verdict(&rows, failed))
}

fn misused(peers: &Peers, misuse: &Misuse) -> Result<Row> {
    Ok((misuse.clone(), (0..peers.allocators.len()).map(|number| peers.misuse(number, misuse)).collect::<Result<_>>()?))
}

/// The misuse and the report of kslab with checks.
fn show(out: &mut impl Write, (misuse, outcomes): &Row) -> Result<()> {
    let Misuse { rows, title, .. } = misuse;
    writeln!(out, "{}: {title}", if rows.contains(',') { format!("rows {rows}") } else { format!("row {rows}") })?;
    for line in outcomes[CHECKED].text().lines() {
        writeln!(out, "    {line}")?;
    }
    Ok(writeln!(out)?)
}

/// Boots the kernel for each of its own tests of misuse. Gives how many did not stop as expected.
fn misuse_kernel(args: &Args, out: &mut impl Write) -> Result<usize> {
    let Kernel { elf, ramdisk, mut tests } = kernel()?;
    let is_misuse = |test: &GuestTest| KERNEL_TESTS.iter().any(|module| test.name.starts_with(module));
    tests.retain(|test| is_misuse(test) && test.stops_with.is_some() && args.selects(test));
    ensure!(!tests.is_empty(), "the kernel has no tests of misuse");
    let Args { cpus, memory, icount, .. } = *args;
    let machine = Machine { cpus, memory, icount, ..Machine::pvh(&elf, &ramdisk) };
    let mut failed = 0;
    let count = tests.len();
    suite::run(&machine, &suite::groups(tests), args.patience(), |event| {
        if let Event::Verdict(verdict) = event
            && let Some(failure) = verdict.failure
        {
            failed += 1;
            writeln!(out, "{}: {}", verdict.test, failure.reason)?;
        }
        Ok(())
    })?;
    writeln!(out, "the kernel, misused in {count} boots: {} stopped with exactly the report expected", count - failed)?;
    Ok(failed)
}

/// Whether kslab was as it should be.
fn verdict(rows: &[Row], failed: usize) -> ExitCode {
    let named = rows.iter().all(|(_, outcomes)| matches!(outcomes[CHECKED], Outcome::Reported(_)));
    if named && failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
