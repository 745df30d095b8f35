//! What one boot says, checked line by line.
//!
//! A test is *open* from its `start` frame until the next one, or until the boot has ended. Only then is it settled:
//! whatever is wrong with the boot as a whole (it hangs, it is cut off, its checksum is wrong) is the failure of the
//! test that ran last, and only one verdict waits for it.

use std::{collections::VecDeque, fmt::Write, time::Duration};

use super::elf::GuestTest;
use crate::protocol::{Escape, Exit, Expectation, Kind, PREFIX, Seal, parse_frame};

#[cfg(test)]
mod tests;

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The test's name.
    pub test: String,
    /// How long it took, in ticks of the machine; `None` where it did not come to its end.
    pub ticks: Option<u64>,
    /// What it says about itself.
    pub notes: Vec<String>,
    /// Why it failed; `None` where it passed.
    pub failure: Option<Failure>,
}

/// Why a test failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In one line.
    pub reason: String,
    /// The last lines on the console since the test started.
    pub console: Vec<String>,
}

/// How a boot ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// QEMU ended.
    Exit {
        /// Its exit code; `None` where a signal killed it.
        code: Option<i32>,
        /// What it wrote to its standard error.
        said: String,
    },
    /// There was no frame for so long, and QEMU was killed.
    NoProgress(Duration),
    /// QEMU could not be started or waited for.
    Error(String),
}

/// Lines of console text kept for a failure.
const CONSOLE_LINES: usize = 400;

/// The report of a boot that is under way.
#[derive(Debug)]
pub struct Report<'a> {
    tests: &'a [GuestTest],
    started: usize,
    open: Option<Open>,
    console: VecDeque<String>,
    seal: Seal,
    version: bool,
    plan: Option<usize>,
    passed: usize,
    failed: usize,
    totals: Option<(usize, usize)>,
    stop: Option<String>,
    tables: Vec<String>,
    whole: bool,
    damage: Option<String>,
}

#[derive(Debug)]
struct Open {
    test: GuestTest,
    ticks: Option<u64>,
    passed: Option<bool>,
    notes: Vec<String>,
}

/// What is known only when a boot has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// About the test that ran last; where none had started, about every test of the boot.
    pub verdicts: Vec<Verdict>,
    /// The allocator's tables.
    pub tables: Vec<String>,
}

impl<'a> Report<'a> {
    /// The report of a boot that was told to run `tests` in this order.
    pub fn new(tests: &'a [GuestTest]) -> Self {
        Self {
            tests,
            started: 0,
            open: None,
            console: VecDeque::new(),
            seal: Seal::default(),
            version: false,
            plan: None,
            passed: 0,
            failed: 0,
            totals: None,
            stop: None,
            tables: Vec::new(),
            whole: false,
            damage: None,
        }
    }

    /// Takes in one line. Gives the verdict about the test that is settled by it.
    pub fn line(&mut self, line: &str) -> Option<Verdict> {
        let Some(frame) = frame_in(line) else {
            self.keep(line);
            return None;
        };
        // What a test printed without ending the line.
        let before = &line[..line.len() - frame.len()];
        if !before.is_empty() {
            self.keep(before);
        }
        let (kind, payload) = parse_frame(frame)?;
        if self.whole {
            self.damaged("there are frames after the last one");
        }
        if kind != Kind::Whole {
            self.seal.receive(&frame[PREFIX.len()..]);
        }
        match kind {
            Kind::Start => return self.start(payload),
            Kind::Ktap => self.ktap(payload),
            Kind::Stop if self.stop.is_some() => self.damaged("the kernel stopped twice"),
            Kind::Stop => self.stop = Some(payload.to_owned()),
            Kind::Program => self.damaged("a program ran among the tests"),
            Kind::Table => self.tables.push(payload.to_owned()),
            Kind::Whole if self.seal.matches(payload) => self.whole = true,
            Kind::Whole => self.damaged("its checksum is wrong"),
        }
        None
    }

    /// Takes in how the boot ended.
    pub fn end(mut self, end: &End) -> Ended {
        let fault = self.fault(end);
        let verdicts = match self.open.take() {
            Some(open) => vec![self.settle(open, fault)],
            None => {
                let reason = fault.unwrap_or_else(|| "the kernel ended before the first test".into());
                let failure = Failure { reason, console: self.console.into() };
                let failed = |test: &GuestTest| Verdict {
                    test: test.name.clone(),
                    ticks: None,
                    notes: Vec::new(),
                    failure: Some(failure.clone()),
                };
                self.tests.iter().map(failed).collect()
            }
        };
        Ended { verdicts, tables: self.tables }
    }

    fn keep(&mut self, line: &str) {
        if self.console.len() == CONSOLE_LINES {
            self.console.pop_front();
        }
        self.console.push_back(line.to_owned());
    }

    /// Remembers what is wrong first: the rest may follow from it.
    fn damaged(&mut self, what: impl Into<String>) {
        self.damage.get_or_insert(what.into());
    }

    fn start(&mut self, name: &str) -> Option<Verdict> {
        let Some(test) = self.tests.get(self.started).filter(|test| test.name == name && self.damage.is_none()) else {
            self.damaged(format!("`{name}` started out of turn"));
            return None;
        };
        let open = Open { test: test.clone(), ticks: None, passed: None, notes: Vec::new() };
        let before = self.open.replace(open).map(|before| self.settle(before, None));
        self.started += 1;
        self.console.clear();
        before
    }

    fn ktap(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("ok ") {
            self.result(true, result);
        } else if let Some(result) = line.strip_prefix("not ok ") {
            self.result(false, result);
        } else if let Some(totals) = line.strip_prefix("# Totals: ") {
            self.totals = parse_totals(totals);
        } else if let Some(note) = line.strip_prefix("# ") {
            self.note(note);
        } else if let Some(plan) = line.strip_prefix("1..") {
            self.plan(plan);
        } else if line == "KTAP version 1" {
            self.version = true;
        } else {
            self.damaged(format!("`{line}` is no line of KTAP"));
        }
    }

    fn result(&mut self, passed: bool, rest: &str) {
        let number = self.started;
        match &mut self.open {
            Some(open) if open.passed.is_none() && rest == format!("{number} {}", open.test.name) => {
                open.passed = Some(passed);
                *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
            }
            _ => self.damaged(format!("the result `{rest}` is out of turn")),
        }
    }

    fn note(&mut self, note: &str) {
        let Some(open) = &mut self.open else { return };
        let Some(note) = note.strip_prefix(&open.test.name).and_then(|note| note.strip_prefix(": ")) else {
            return;
        };
        match note.strip_suffix(" ticks").and_then(|ticks| ticks.parse().ok()) {
            Some(ticks) => open.ticks = Some(ticks),
            None => open.notes.push(note.to_owned()),
        }
    }

    fn plan(&mut self, plan: &str) {
        let selected = self.tests.len();
        if plan.parse() == Ok(selected) && self.plan.is_none() {
            self.plan = Some(selected);
        } else {
            self.damaged(format!("its plan is 1..{plan}, and {selected} tests were selected"));
        }
    }

    fn settle(&self, open: Open, fault: Option<String>) -> Verdict {
        let reason = reason(&open, self.stop.as_deref(), fault);
        let failure = reason.map(|reason| Failure { reason, console: self.console.iter().cloned().collect() });
        // What a stop says is expected, or the failure.
        let returned = failure.is_none() && open.test.stops_with.is_none();
        let notes = if returned { open.notes } else { Vec::new() };
        Verdict { test: open.test.name, ticks: open.ticks, notes, failure }
    }

    /// What is wrong with the boot as a whole.
    fn fault(&self, end: &End) -> Option<String> {
        if let Some(damage) = &self.damage {
            return Some(format!("the report is damaged: {damage}"));
        }
        let code = match exit_code(end) {
            Ok(code) => code,
            Err(fault) => return Some(fault),
        };
        if !self.whole {
            return Some("the report is cut off: its last line is missing".into());
        }
        if self.open.as_ref().is_some_and(|open| open.passed.is_none()) {
            return Some("the report has no result for this test".into());
        }
        if !self.version || self.plan.is_none() || self.totals != Some((self.passed, self.failed)) {
            return Some("the report is damaged: its version, plan or totals are missing or wrong".into());
        }
        let left = self.tests.get(self.started).filter(|_| self.stop.is_none());
        if let Some(test) = left {
            return Some(format!("the kernel ended before it started `{}`", test.name));
        }
        let right = if self.failed == 0 { Exit::Success } else { Exit::Failure }.code();
        (code != right).then(|| format!("the exit code is {code} and not {right}"))
    }
}

/// The exit code that the kernel chose; an error where it chose none.
fn exit_code(end: &End) -> Result<i32, String> {
    Err(match end {
        End::Error(error) => error.clone(),
        End::NoProgress(time) => format!("no progress for {} s", time.as_secs()),
        End::Exit { code: None, .. } => "QEMU was killed by a signal".into(),
        End::Exit { code: Some(0), .. } => "the machine was reset: probably a triple fault".into(),
        End::Exit { code: Some(code), said } => {
            if [Exit::Success.code(), Exit::Failure.code()].contains(code) {
                return Ok(*code);
            }
            format!("QEMU ended with code {code}: {}", said.trim())
        }
    })
}

/// Why a test failed, `fault` being what is wrong with its boot; `None` where it passed.
fn reason(open: &Open, stop: Option<&str>, fault: Option<String>) -> Option<String> {
    let must = open.test.stops_with.as_deref().map(escape);
    let own = match (open.passed, stop, must) {
        (Some(true), None, None) => None,
        (Some(true), Some(stop), Some(must)) if is_met(&must, stop) => None,
        (_, Some(stop), Some(must)) if !is_met(&must, stop) => {
            Some(format!("stopped with `{stop}` instead of `{must}`"))
        }
        (Some(_), None, Some(must)) => Some(format!("returned, and had to stop with `{must}`")),
        (Some(true), Some(stop), _) => Some(format!("stopped with `{stop}`, and yet its result is ok")),
        (_, Some(stop), None) => Some(stop.to_owned()),
        (Some(false), _, _) if !open.notes.is_empty() => Some(open.notes.join("; ")),
        (Some(false), _, _) => Some("failed without a reason".into()),
        (None, _, _) if fault.is_some() => None,
        (None, _, _) => Some("the report has no result for this test".into()),
    };
    match (own, fault) {
        (Some(own), Some(fault)) => Some(format!("{own}; and {fault}")),
        (own, fault) => own.or(fault),
    }
}

fn parse_totals(text: &str) -> Option<(usize, usize)> {
    let count = |key: &str| text.split(' ').find_map(|word| word.strip_prefix(key))?.parse().ok();
    Some((count("pass:")?, count("fail:")?))
}

/// The frame in `line`: from its start, or after text whose line was left open.
pub fn frame_in(line: &str) -> Option<&str> {
    line.match_indices(PREFIX).map(|(at, _)| &line[at..]).find(|rest| parse_frame(rest).is_some())
}

/// Whether `headline` is what a test expects, both escaped.
fn is_met(expected: &str, headline: &str) -> bool {
    let mut expectation = Expectation::new(expected);
    expectation.write_str(headline).is_ok() && expectation.is_met()
}

/// As the kernel writes a text into a frame.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    // A `String` takes everything.
    let _ = Escape(&mut escaped).write_str(text);
    escaped
}
