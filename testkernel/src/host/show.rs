//! What the launcher prints: for people, or KTAP.

use std::{
    fmt::Write as _,
    io::{self, Write},
    time::Instant,
};

use anstyle::{AnsiColor, Style};

use super::{
    bench,
    cli::BootPath,
    elf::GuestTest,
    qemu::Machine,
    report::{Failure, Verdict},
};
use crate::protocol::Escape;

const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const FAINT: Style = Style::new().dimmed();

/// Shows a run of the suite, as it goes.
pub trait Show {
    /// A test has its verdict.
    fn verdict(&mut self, verdict: Verdict) -> io::Result<()>;

    /// The allocator's tables have come.
    fn tables(&mut self, _: Vec<String>) {}

    /// Every test has its verdict.
    fn end(&mut self) -> io::Result<()>;

    /// How many tests have failed.
    fn failed(&self) -> usize;
}

/// For people.
#[derive(Debug)]
pub struct Human<W> {
    out: W,
    width: usize,
    passed: usize,
    failures: Vec<(String, Failure)>,
    tables: Vec<String>,
    since: Option<Instant>,
}

impl<W: Write> Human<W> {
    /// Begins a run of `tests` on `machine`.
    pub fn new(mut out: W, machine: &Machine, boot: BootPath, tests: &[&GuestTest]) -> io::Result<Self> {
        let count = tests.len();
        let Machine { cpus, memory, .. } = machine;
        let icount = if machine.icount { ", counting instructions" } else { "" };
        writeln!(out, "{} on q35, {}, {memory}, {boot}{icount}", plural(count, "test"), plural((*cpus).into(), "CPU"))?;
        let width = tests.iter().map(|test| test.name.len()).max().unwrap_or(0);
        // By the clock no two runs are the same, and that is what counting is for.
        let since = (!machine.icount).then(Instant::now);
        Ok(Self { out, width, passed: 0, failures: Vec::new(), tables: Vec::new(), since })
    }
}

impl<W: Write> Show for Human<W> {
    fn verdict(&mut self, verdict: Verdict) -> io::Result<()> {
        let Self { out, width, .. } = self;
        let Verdict { test, ticks, notes, failure } = verdict;
        match failure {
            None => {
                self.passed += 1;
                write!(out, "{GOOD}ok{GOOD:#}   ")?;
                match ticks {
                    Some(ticks) => writeln!(out, "{test:width$} {FAINT}{:>15} ticks{FAINT:#}", grouped(ticks))?,
                    None => writeln!(out, "{test}")?,
                }
                notes.iter().try_for_each(|note| writeln!(out, "     {FAINT}|{FAINT:#} {note}"))?;
            }
            Some(failure) => {
                writeln!(out, "{BAD}FAIL{BAD:#} {test:width$} {}", failure.reason)?;
                self.failures.push((test, failure));
            }
        }
        self.out.flush()
    }

    fn tables(&mut self, tables: Vec<String>) {
        // The first are of the boot that most tests share.
        if self.tables.is_empty() {
            self.tables = tables;
        }
    }

    fn end(&mut self) -> io::Result<()> {
        let Self { out, failures, tables, .. } = self;
        if !tables.is_empty() {
            writeln!(out)?;
        }
        for line in tables.iter() {
            writeln!(out, "{}{line}", if line.is_empty() { "" } else { "    " })?;
        }
        for (test, failure) in failures.iter().filter(|(_, failure)| !failure.console.is_empty()) {
            writeln!(out, "\n{BAD}{test}{BAD:#}: {}", failure.reason)?;
            for line in &failure.console {
                writeln!(out, "  {FAINT}|{FAINT:#} {line}")?;
            }
        }
        let colour = if failures.is_empty() { GOOD } else { BAD };
        write!(out, "\n{colour}{} passed, {} failed{colour:#}", self.passed, failures.len())?;
        match self.since {
            Some(since) => writeln!(out, " in {:.2} s", since.elapsed().as_secs_f32()),
            None => writeln!(out),
        }
    }

    fn failed(&self) -> usize {
        self.failures.len()
    }
}

/// KTAP version 1 and nothing else: the reports of all boots as one. What the kernel says on its console besides, with the
/// calls that led to a failure, is left out.
#[derive(Debug)]
pub struct Ktap<W> {
    out: W,
    passed: usize,
    failed: usize,
}

impl<W: Write> Ktap<W> {
    /// Begins a report on so many tests.
    pub fn new(mut out: W, tests: usize) -> io::Result<Self> {
        writeln!(out, "KTAP version 1\n1..{tests}")?;
        Ok(Self { out, passed: 0, failed: 0 })
    }
}

impl<W: Write> Show for Ktap<W> {
    fn verdict(&mut self, verdict: Verdict) -> io::Result<()> {
        let Verdict { test, ticks, notes, failure } = verdict;
        if let Some(ticks) = ticks {
            writeln!(self.out, "# {test}: {ticks} ticks")?;
        }
        for note in &notes {
            match bench::count_in(note) {
                Some(_) => writeln!(self.out, "# bench {note}")?,
                None => writeln!(self.out, "# {test}: {note}")?,
            }
        }
        if let Some(failure) = &failure {
            writeln!(self.out, "# {test}: {}", one_line(&failure.reason))?;
        }
        *(if failure.is_none() { &mut self.passed } else { &mut self.failed }) += 1;
        let result = if failure.is_none() { "ok" } else { "not ok" };
        writeln!(self.out, "{result} {} {test}", self.passed + self.failed)?;
        self.out.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        let Self { out, passed, failed } = self;
        writeln!(out, "# Totals: pass:{passed} fail:{failed} xfail:0 xpass:0 skip:0 error:0")
    }

    fn failed(&self) -> usize {
        self.failed
    }
}

fn plural(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}

/// The number with its digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let (first, rest) = digits.split_at((digits.len() - 1) % 3 + 1);
    rest.as_bytes().chunks(3).fold(first.to_owned(), |text, group| text + " " + &String::from_utf8_lossy(group))
}

fn one_line(text: &str) -> String {
    let mut line = String::new();
    // A `String` takes everything.
    let _ = Escape(&mut line).write_str(text);
    line
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::protocol::When;

    fn passed() -> Verdict {
        Verdict { test: "a::x".into(), ticks: Some(1_234_567), notes: vec!["half of it".into()], failure: None }
    }

    fn failed() -> Verdict {
        let failure = Failure { reason: "QEMU ended: a\nb".into(), console: vec!["STOP".into()] };
        Verdict { test: "b::long".into(), ticks: None, notes: Vec::new(), failure: Some(failure) }
    }

    #[test]
    fn ktap_is_one_report_with_results_in_one_row() {
        let mut out = Vec::new();
        let mut show = Ktap::new(&mut out, 2).unwrap();
        show.verdict(failed()).unwrap();
        show.verdict(passed()).unwrap();
        show.end().unwrap();
        assert_eq!(show.failed(), 1);
        let expected = "KTAP version 1\n1..2\n# b::long: QEMU ended: a\\nb\nnot ok 1 b::long\n\
            # a::x: 1234567 ticks\n# a::x: half of it\nok 2 a::x\n# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn people_see_a_line_a_test_then_tables_and_failures() {
        let named =
            |name: &str| GuestTest { name: name.into(), number: 0, stops_with: None, when: When::Always, cpus: 1 };
        let machine = Machine { icount: true, ..Machine::pvh(Path::new("/kernel"), Path::new("/ramdisk")) };
        let mut out = Vec::new();
        let tests = [named("a::x"), named("b::long")];
        let mut show = Human::new(&mut out, &machine, BootPath::Pvh, &tests.each_ref()).unwrap();
        show.verdict(passed()).unwrap();
        show.verdict(failed()).unwrap();
        show.tables(vec!["order  free".into()]);
        show.end().unwrap();
        assert_eq!(show.failed(), 1);
        let shown = anstream::adapter::strip_str(&String::from_utf8(out).unwrap()).to_string();
        let expected = "2 tests on q35, 1 CPU, 256M, PVH, counting instructions\n\
            ok   a::x          1 234 567 ticks\n     | half of it\nFAIL b::long QEMU ended: a\nb\n\n    order  free\n\
            \nb::long: QEMU ended: a\nb\n  | STOP\n\n1 passed, 1 failed\n";
        assert_eq!(shown, expected);
    }

    #[test]
    fn digits_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1 000"), (12_345_678, "12 345 678")] {
            assert_eq!(grouped(number), text);
        }
    }
}
