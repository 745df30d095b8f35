//! What became of an allocator that was misused.

use std::process::ExitStatus;

use anyhow::{Result, bail};

/// The signal of a process that has used up its share of the CPU.
const TOO_LONG: &str = "SIGXCPU";

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// kslab has said what is wrong: its report.
    Reported(String),
    /// It has stopped with these words.
    Panicked(String),
    /// The process was ended by this signal.
    Crashed(String),
    /// It went on for ever.
    Hung,
    /// What was seen when it was used on.
    Seen(String),
}

impl Outcome {
    /// Of a process that ended so, and printed this.
    pub fn new(status: ExitStatus, printed: &str) -> Result<Self> {
        let printed = printed.trim_end();
        // With the name of the signal, on every system that has signals.
        let ending = status.to_string();
        let signal = ending.split(['(', ')']).nth(1);
        Ok(match (status.code(), printed.strip_prefix("panic: "), signal) {
            (Some(0), None, _) if !printed.is_empty() => Self::Seen(printed.into()),
            (Some(_), Some(report), _) if report.starts_with("kslab: ") => Self::Reported(report.into()),
            (Some(_), Some(words), _) => Self::Panicked(words.into()),
            (None, _, Some(TOO_LONG)) => Self::Hung,
            (None, _, Some(signal)) => Self::Crashed(signal.into()),
            _ => bail!("the program that misuses allocators ended with {ending}"),
        })
    }

    /// In a few words, the same each time.
    pub fn brief(&self) -> String {
        match self {
            Self::Reported(report) => {
                let kind = report.lines().find_map(|line| line.trim_start().strip_prefix("kind: ")).unwrap_or("?");
                let refused = report.starts_with("kslab: bad free");
                format!("{}: {kind}", if refused { "refused" } else { "reported" })
            }
            Self::Panicked(words) => format!("panic: {}", without_addresses(words.lines().next().unwrap_or_default())),
            Self::Crashed(signal) => format!("crash: {signal}"),
            Self::Hung => "hang".into(),
            Self::Seen(seen) => seen.clone(),
        }
    }

    /// All that is known.
    pub fn text(&self) -> String {
        match self {
            Self::Reported(report) => report.clone(),
            _ => self.brief(),
        }
    }
}

/// The same with a star for the digits of each hexadecimal number.
fn without_addresses(text: &str) -> String {
    let mut parts = text.split("0x");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |line, part| line + "0x*" + part.trim_start_matches(|c: char| c.is_ascii_hexdigit()))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    /// Of a process with this exit code.
    fn exited(code: i32, printed: &str) -> Result<Outcome> {
        Outcome::new(ExitStatus::from_raw(code << 8), printed)
    }

    #[test]
    fn each_way_to_end_is_told_apart() {
        let report = "kslab: damage at 0x12: so\n  kind: REDZONE";
        assert_eq!(exited(0, "silent: overlap\n").unwrap(), Outcome::Seen("silent: overlap".into()));
        assert_eq!(exited(1, &format!("panic: {report}\n")).unwrap(), Outcome::Reported(report.into()));
        assert_eq!(exited(1, "panic: Bad free?\n").unwrap(), Outcome::Panicked("Bad free?".into()));
        for (signal, outcome) in [(11, Outcome::Crashed("SIGSEGV".into())), (24, Outcome::Hung)] {
            assert_eq!(Outcome::new(ExitStatus::from_raw(signal), "").unwrap(), outcome);
        }
        for (code, printed) in [(0, ""), (2, ""), (2, "not noticed")] {
            assert!(exited(code, printed).is_err());
        }
    }

    #[test]
    fn in_brief_there_is_no_address() {
        let brief = |outcome: Outcome| outcome.brief();
        assert_eq!(brief(Outcome::Reported("kslab: bad free of 0x1: x\n  kind: DUPFREE\n".into())), "refused: DUPFREE");
        assert_eq!(brief(Outcome::Reported("kslab: damage at 0x1: x\n  kind: REDZONE\n".into())), "reported: REDZONE");
        assert_eq!(brief(Outcome::Panicked("node (0x7fA0) at 0x10[64]\nmore".into())), "panic: node (0x*) at 0x*[64]");
        assert_eq!(brief(Outcome::Crashed("SIGSEGV".into())), "crash: SIGSEGV");
        assert_eq!(without_addresses("none"), "none");
    }
}
