//! The command line of `cargo run --`.

use std::{ffi::OsString, fmt, path::PathBuf, process::ExitCode, str::FromStr, time::Duration};

use clap::{Parser, ValueEnum, error::ErrorKind};
use kslab::{Heap, platform::NoInterrupts};

use super::elf::GuestTest;
use crate::protocol::When;

/// Boots the test kernel in QEMU and shows the report of its suite.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo run --")]
pub struct Args {
    /// Run only the tests whose names contain one of these texts
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,

    /// List the tests and do not run them
    #[arg(long)]
    pub list: bool,

    /// CPUs of the machine, 1 to 255
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=255))]
    pub cpus: u16,

    /// Memory of the machine, 32M to 1T
    #[arg(long, value_name = "SIZE", default_value_t = Memory::DEFAULT)]
    pub memory: Memory,

    /// How the kernel starts
    #[arg(long, value_name = "PATH", value_enum, default_value_t = BootPath::Pvh)]
    pub boot: BootPath,

    /// Run this program in ring 3: a static ELF file for i386 (or x86_64) that exits, writes, and asks for memory
    #[arg(long, value_name = "FILE", conflicts_with_all = ["filters", "list", "demo", "bench", "ktap", "ignored", "include_ignored", "broken"])]
    pub program: Option<PathBuf>,

    /// Give the program's memory its page frames at once, and not when it is first used
    #[arg(long)]
    pub eager: bool,

    /// Show something
    #[arg(long, value_name = "WHAT", value_enum, conflicts_with_all = ["filters", "list", "boot", "check", "ktap", "gdb"])]
    pub demo: Option<Demo>,

    /// Count the instructions of operations, and compare them with those of the last change
    #[arg(long, conflicts_with_all = ["demo", "check", "ignored", "include_ignored", "broken", "gdb"])]
    pub bench: bool,

    /// Print only the table of the demo, for a Markdown file
    #[arg(long, requires = "demo")]
    pub markdown: bool,

    /// Count instructions instead of time: every run gives the same report
    #[arg(long)]
    pub icount: bool,

    /// What the random numbers of the storms start from
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// How many operations a storm does
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    operations: Option<u64>,

    /// What is checked of objects, as `dentry:redzone,poison;*:audit`; `*:all` for everything
    #[arg(long, value_name = "RULES", value_parser = rules)]
    check: Option<String>,

    /// End a boot that makes no progress for so long [default: 60; 300 to count instructions through firmware]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: Option<u64>,

    /// Print the report as KTAP version 1 and nothing else
    #[arg(long)]
    pub ktap: bool,

    /// Wait for a debugger before the first instruction, and print the line that attaches it
    #[arg(long)]
    pub gdb: bool,

    /// Run the slow tests only
    #[arg(long, conflicts_with = "include_ignored")]
    ignored: bool,

    /// Run the slow tests too
    #[arg(long)]
    include_ignored: bool,

    /// Run the tests that break the report or the kernel on purpose too
    #[arg(long, hide = true)]
    broken: bool,
}

impl Args {
    fn checked(self) -> Result<Self, clap::Error> {
        if self.boot == BootPath::Uefi && self.memory.mib < 64 {
            let error = format!("UEFI does not start in {}: `--boot uefi` needs `--memory 64M` or more\n", self.memory);
            return Err(clap::Error::raw(ErrorKind::ValueValidation, error));
        }
        if self.markdown && self.demo != Some(Demo::Faults) {
            let error = "there is a table for a Markdown file of `--demo faults` only\n";
            return Err(clap::Error::raw(ErrorKind::ArgumentConflict, error));
        }
        let is_about_programs = self.program.is_some() || matches!(self.demo, Some(Demo::Brk | Demo::Mmap));
        if self.eager && !is_about_programs {
            let error = "`--eager` is about a program: `--program <FILE>`, `--demo brk` or `--demo mmap`\n";
            return Err(clap::Error::raw(ErrorKind::MissingRequiredArgument, error));
        }
        Ok(self)
    }

    /// Whether no test is left out by its name.
    pub fn picks_all(&self) -> bool {
        self.filters.is_empty()
    }

    /// Whether instructions are counted instead of time.
    pub fn counts(&self) -> bool {
        self.icount || self.bench
    }

    /// Whether these arguments pick `test`.
    pub fn selects(&self, test: &GuestTest) -> bool {
        let wanted = match test.when {
            _ if self.bench => test.when == When::Bench,
            When::Bench => self.list,
            When::Always => !self.ignored,
            When::Ignored => self.ignored || self.include_ignored || self.list,
            When::Broken => self.broken,
        };
        wanted && (self.filters.is_empty() || self.filters.iter().any(|filter| test.name.contains(filter)))
    }

    /// What the kernel's command line says besides the tests.
    pub fn words(&self) -> String {
        let numbers = [("seed", self.seed), ("operations", self.operations)];
        let numbers = numbers.into_iter().filter_map(|(word, value)| Some(format!("{word}={}", value?)));
        let check = self.check.iter().map(|rules| format!("kslab.check={rules}"));
        numbers.chain(check).collect::<Vec<_>>().join(" ")
    }

    /// How long a boot may make no progress; `None` under a debugger.
    pub fn patience(&self) -> Option<Duration> {
        let slow = self.counts() && self.boot != BootPath::Pvh;
        let seconds = self.timeout.unwrap_or(if slow { 300 } else { 60 });
        (!self.gdb).then_some(Duration::from_secs(seconds))
    }
}

/// A word of the kernel's command line that says what is checked. What it says wrong the kernel would say too, but when it
/// stops.
fn rules(word: &str) -> Result<String, String> {
    static HEAP: Heap<NoInterrupts> = Heap::new();
    if word.contains(char::is_whitespace) {
        return Err("it has a space in it".into());
    }
    HEAP.set_checks(word.to_owned().leak()).map(|()| word.into()).map_err(|error| error.to_string())
}

/// How the kernel starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BootPath {
    /// QEMU loads the ELF file itself.
    Pvh,
    /// From a disk image, by BIOS.
    Bios,
    /// From a disk image, by UEFI.
    Uefi,
}

impl fmt::Display for BootPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pvh => "PVH",
            Self::Bios => "BIOS",
            Self::Uefi => "UEFI",
        })
    }
}

/// What is demonstrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Demo {
    /// Bad frees, and writes where a program has no business, with kslab and with other allocators.
    Faults,
    /// The break of a program: it grows by 64 MiB and is reset.
    Brk,
    /// A program's mappings, and programs that do what the protection of one forbids.
    Mmap,
}

/// A size of memory, 32 MiB to 1 TiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    mib: u64,
}

impl Memory {
    /// What a machine has unless told otherwise.
    pub const DEFAULT: Self = Self { mib: 256 };

    /// The size in MiB.
    pub fn mib(self) -> u64 {
        self.mib
    }
}

impl FromStr for Memory {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = text.split_at(text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len());
        let scale = match unit.to_ascii_uppercase().as_str() {
            "M" => 1,
            "G" => 1 << 10,
            "T" => 1 << 20,
            _ => return Err("a size is a number and a unit, M, G or T, like 256M"),
        };
        let number: u64 = number.parse().map_err(|_| "a size is a whole number and a unit, like 256M")?;
        match number.checked_mul(scale) {
            Some(mib @ 32..=0x10_0000) => Ok(Self { mib }),
            _ => Err("a size is from 32M to 1T"),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mib {
            mib if mib.is_multiple_of(1 << 20) => write!(f, "{}T", mib >> 20),
            mib if mib.is_multiple_of(1 << 10) => write!(f, "{}G", mib >> 10),
            mib => write!(f, "{mib}M"),
        }
    }
}

/// Reads the arguments. Help and errors are printed here; the exit code for them comes back.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args, ExitCode> {
    Args::try_parse_from(args).and_then(Args::checked).map_err(|error| {
        if error.kind() == ErrorKind::DisplayHelp {
            anstream::print!("{}", error.render().ansi());
            return ExitCode::SUCCESS;
        }
        eprintln!("{}", one_line(&error));
        ExitCode::from(2)
    })
}

/// The error without the paragraphs around it.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let telling: Vec<_> =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more")).collect();
    telling.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(["launcher"].into_iter().chain(line.split_whitespace())).and_then(Args::checked)
    }

    fn test(name: &str, when: When) -> GuestTest {
        GuestTest { name: name.into(), number: 0, stops_with: None, when, cpus: 1 }
    }

    #[test]
    fn sizes_are_read_and_written() {
        for (text, mib) in [("32M", 32), ("256m", 256), ("4G", 4096), ("1T", 1 << 20), ("1500M", 1500)] {
            assert_eq!(text.parse::<Memory>().unwrap().mib(), mib, "{text}");
        }
        for text in
            ["", "M", "256", "31M", "0G", "2T", "1K", "-1G", "1.5G", "99999999999999999999G", "18446744073709551615T"]
        {
            assert!(text.parse::<Memory>().is_err(), "{text}");
        }
        for text in ["32M", "4G", "1T", "1500M"] {
            assert_eq!(text.parse::<Memory>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_values_are_told_in_one_line() {
        for (line, part) in [
            ("--cpus 0", "0 is not in 1..=255"),
            ("--cpus many", "--cpus"),
            ("--memory 1K", "a size is"),
            ("--boot floppy", "[possible values: pvh, bios, uefi]"),
            ("--boot uefi --memory 32M", "needs `--memory 64M`"),
            ("--timeout 0", "--timeout"),
            ("--operations 0", "0 is not in 1.."),
            ("--colour", "unexpected argument '--colour'"),
            ("--ignored --include-ignored", "cannot be used with"),
            ("--demo", "--demo <WHAT>"),
            ("--demo heap", "[possible values: faults, brk, mmap]"),
            ("--demo brk --markdown", "`--demo faults` only"),
            ("--program", "--program <FILE>"),
            ("--program p --demo brk", "cannot be used with"),
            ("--program p heap", "cannot be used with"),
            ("--eager", "`--program <FILE>`, `--demo brk` or"),
            ("--eager --demo faults", "`--program <FILE>`, `--demo brk` or"),
            ("--demo faults heap", "cannot be used with"),
            ("--markdown", "--demo <WHAT>"),
        ] {
            let told = one_line(&args(line).unwrap_err());
            assert!(told.starts_with("error: ") && told.contains(part) && !told.contains('\n'), "{line}: {told:?}");
        }
    }

    #[test]
    fn slow_and_broken_tests_run_only_on_request() {
        let tests = [
            test("a::fast", When::Always),
            test("a::slow", When::Ignored),
            test("b::broken", When::Broken),
            test("c::count", When::Bench),
        ];
        let picked = |line: &str| {
            let args = args(line).unwrap();
            tests.iter().filter(|test| args.selects(test)).map(|test| test.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(picked(""), ["a::fast"]);
        assert_eq!(picked("--ignored"), ["a::slow"]);
        assert_eq!(picked("--include-ignored"), ["a::fast", "a::slow"]);
        assert_eq!(picked("--list"), ["a::fast", "a::slow", "c::count"]);
        assert_eq!(picked("--bench"), ["c::count"]);
        assert!(picked("--bench fast").is_empty());
        assert_eq!(picked("--broken b:: fast"), ["a::fast", "b::broken"]);
        assert!(picked("slow").is_empty());
    }

    #[test]
    fn numbers_for_storms_reach_the_command_line() {
        assert_eq!(args("").unwrap().words(), "");
        assert_eq!(args("--operations 10 --seed 7").unwrap().words(), "seed=7 operations=10");
        assert_eq!(args("--check *:audit").unwrap().words(), "kslab.check=*:audit");
    }
}
