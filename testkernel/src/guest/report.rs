//! The report of the suite: what has run so far, and the frames that say so.

use core::fmt::{self, Write};

use kernel::time;

use crate::protocol::{Exit, Expectation, Kind, Seal, Test};

/// The state of the report. It must be whole at any moment at which a test may stop the kernel.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) seal: Seal,
    selected: usize,
    running: Option<&'static Test>,
    started: u64,
    passed: usize,
    failed: usize,
}

impl Report {
    pub(super) const fn new() -> Self {
        Self { seal: Seal { lines: 0, crc: 0 }, selected: 0, running: None, started: 0, passed: 0, failed: 0 }
    }

    /// Opens the report on `selected` tests.
    pub(super) fn open(&mut self, out: &mut dyn Write, selected: usize) -> fmt::Result {
        self.selected = selected;
        self.ktap(out, format_args!("KTAP version 1"))?;
        self.ktap(out, format_args!("1..{selected}"))
    }

    /// Says what a program does.
    pub(super) fn program(&mut self, out: &mut dyn Write, said: fmt::Arguments) -> fmt::Result {
        self.seal.write(out, Kind::Program, said)
    }

    /// Says that `test` starts.
    pub(super) fn start(&mut self, out: &mut dyn Write, test: &'static Test) -> fmt::Result {
        self.seal.write(out, Kind::Start, format_args!("{}", test.name.get()))?;
        self.running = Some(test);
        self.started = time::ticks();
        Ok(())
    }

    /// Says something about the running test, which is shown with its result.
    pub(super) fn note(&mut self, out: &mut dyn Write, note: fmt::Arguments) -> fmt::Result {
        match self.running {
            Some(test) => self.ktap(out, format_args!("# {}: {note}", test.name.get())),
            None => Ok(()),
        }
    }

    /// Says that the running test returned.
    pub(super) fn returned(&mut self, out: &mut dyn Write) -> fmt::Result {
        let ticks = time::ticks() - self.started;
        let Some(test) = self.running.take() else { return Ok(()) };
        let (name, stops_with) = (test.name.get(), test.stops_with.get());
        self.ktap(out, format_args!("# {name}: {ticks} ticks"))?;
        if !stops_with.is_empty() {
            self.ktap(out, format_args!("# {name}: returned, but must stop with: {stops_with}"))?;
        }
        self.result(out, name, stops_with.is_empty())
    }

    /// Says that the kernel stopped, and ends the report. Returns how the machine should exit.
    pub(super) fn stopped(&mut self, out: &mut dyn Write, headline: fmt::Arguments) -> Result<Exit, fmt::Error> {
        self.seal.write(out, Kind::Stop, headline)?;
        let mut expected = false;
        if let Some(test) = self.running.take() {
            let name = test.name.get();
            expected = is_met(test.stops_with.get(), headline) && self.passed + self.failed + 1 == self.selected;
            self.ktap(out, format_args!("# {name}: {headline}"))?;
            self.result(out, name, expected)?;
        }
        self.totals(out)?;
        self.seal.finish(out)?;
        Ok(if expected && self.failed == 0 { Exit::Success } else { Exit::Failure })
    }

    /// Ends the report when all tests have returned; `tables` are lines about the allocator.
    pub(super) fn close(&mut self, out: &mut dyn Write, tables: fmt::Arguments) -> Result<Exit, fmt::Error> {
        self.totals(out)?;
        let mut lines = Lines { seal: &mut self.seal, out, line: [0; MAX_LINE], length: 0 };
        lines.write_fmt(tables)?;
        lines.end()?;
        self.seal.finish(out)?;
        Ok(if self.failed == 0 { Exit::Success } else { Exit::Failure })
    }

    fn result(&mut self, out: &mut dyn Write, name: &str, passed: bool) -> fmt::Result {
        let number = self.passed + self.failed + 1;
        let count = if passed { &mut self.passed } else { &mut self.failed };
        *count += 1;
        let word = if passed { "ok" } else { "not ok" };
        self.ktap(out, format_args!("{word} {number} {name}"))
    }

    fn totals(&mut self, out: &mut dyn Write) -> fmt::Result {
        let (passed, failed) = (self.passed, self.failed);
        self.ktap(out, format_args!("# Totals: pass:{passed} fail:{failed} xfail:0 xpass:0 skip:0 error:0"))
    }

    fn ktap(&mut self, out: &mut dyn Write, line: fmt::Arguments) -> fmt::Result {
        self.seal.write(out, Kind::Ktap, line)
    }
}

/// Whether `headline` prints as what a test expects.
fn is_met(expected: &str, headline: fmt::Arguments) -> bool {
    let mut expectation = Expectation::new(expected);
    expectation.write_fmt(headline).is_ok() && expectation.is_met()
}

/// Bytes of a table's line that are shown.
const MAX_LINE: usize = 240;

/// Makes a frame of each line written to it.
struct Lines<'a> {
    seal: &'a mut Seal,
    out: &'a mut dyn Write,
    line: [u8; MAX_LINE],
    length: usize,
}

impl Lines<'_> {
    fn end(&mut self) -> fmt::Result {
        let line = self.line[..self.length].utf8_chunks().next().map_or("", |chunk| chunk.valid());
        self.length = 0;
        if line.is_empty() {
            return Ok(());
        }
        self.seal.write(self.out, Kind::Table, format_args!("{line}"))
    }
}

impl Write for Lines<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive('\n') {
            let content = part.strip_suffix('\n').unwrap_or(part);
            let room = &mut self.line[self.length..];
            let taken = content.len().min(room.len());
            room[..taken].copy_from_slice(&content.as_bytes()[..taken]);
            self.length += taken;
            if part.ends_with('\n') {
                self.end()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Text, When};

    static RETURNS: Test = test("a::returns", "");
    static STOPS: Test = test("a::stops", "panic: 1 + 1 = 2");

    const fn test(name: &'static str, stops_with: &'static str) -> Test {
        Test { name: Text::new(name), stops_with: Text::new(stops_with), run: || {}, when: When::Always, cpus: 1 }
    }

    /// The payloads of frames of KTAP, without ticks.
    fn ktap(out: &str) -> Vec<&str> {
        out.lines()
            .filter_map(|line| line.strip_prefix("@kslab ktap "))
            .filter(|line| !line.ends_with(" ticks"))
            .collect()
    }

    #[test]
    fn a_report_on_tests_that_return() {
        let (mut out, mut report) = (String::new(), Report::new());
        report.open(&mut out, 1).unwrap();
        report.start(&mut out, &RETURNS).unwrap();
        report.returned(&mut out).unwrap();
        let exit = report.close(&mut out, format_args!("one {}\n\ntwo", 1)).unwrap();
        assert_eq!(exit, Exit::Success);
        let totals = "# Totals: pass:1 fail:0 xfail:0 xpass:0 skip:0 error:0";
        assert_eq!(ktap(&out), ["KTAP version 1", "1..1", "ok 1 a::returns", totals]);
        assert!(out.contains("@kslab table one 1\n@kslab table two\n@kslab whole 8 "), "{out}");
    }

    #[test]
    fn only_the_declared_headline_passes_and_only_in_the_last_place() {
        for (selected, result, expected, exit) in
            [(1, 2, "ok", Exit::Success), (1, 3, "not ok", Exit::Failure), (2, 2, "not ok", Exit::Failure)]
        {
            let (mut out, mut report) = (String::new(), Report::new());
            report.open(&mut out, selected).unwrap();
            report.start(&mut out, &STOPS).unwrap();
            assert_eq!(report.stopped(&mut out, format_args!("panic: 1 + 1 = {result}")), Ok(exit));
            assert!(ktap(&out).contains(&format!("{expected} 1 a::stops").as_str()), "{out}");
            assert!(out.contains(&format!("@kslab stop panic: 1 + 1 = {result}\n")), "{out}");
        }
    }

    #[test]
    fn a_test_that_must_stop_and_returns_fails() {
        let (mut out, mut report) = (String::new(), Report::new());
        report.open(&mut out, 1).unwrap();
        report.start(&mut out, &STOPS).unwrap();
        report.returned(&mut out).unwrap();
        assert_eq!(report.close(&mut out, format_args!("")), Ok(Exit::Failure));
        assert!(ktap(&out).contains(&"not ok 1 a::stops"), "{out}");
    }

    #[test]
    fn a_line_of_a_table_that_is_too_long_is_cut() {
        let (mut out, mut report) = (String::new(), Report::new());
        report.close(&mut out, format_args!("{:é>200}\nshort\n", "")).unwrap();
        let table: Vec<_> = out.lines().filter_map(|line| line.strip_prefix("@kslab table ")).collect();
        assert_eq!(table, [&*"é".repeat(MAX_LINE / 2), "short"]);
    }
}
