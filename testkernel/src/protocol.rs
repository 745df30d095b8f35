//! What the kernel (guest) and the program that boots it (host) agree on: the frame around each line of the report, the
//! kernel's command line, and the record that each test leaves in the ELF file.
//!
//! # Frames
//!
//! Everything the kernel says goes to COM1, and firmware writes there too. A line belongs to the report only if it is
//! [`PREFIX`], a [`Kind`] word, a space and a payload. Control characters inside a payload are escaped, so a frame is one
//! line. The last frame is [`Kind::Whole`]: how many frames came before it and the CRC-32 over `KIND PAYLOAD\n` of each.
//!
//! # Command line
//!
//! Words of the form `key=value`, separated by spaces. `tests=` picks what runs and in which order: a comma-separated
//! list of test numbers (`7`), ranges (`0-5`) and texts (every ordinary test whose name contains it). Without it every
//! ordinary test runs. `cpus=` says how many CPUs the kernel should find, and `lost-cpu=` is the APIC id of one that starts
//! and never comes to the kernel. `programs=` has the kernel run programs in ring 3 and no tests: a comma-separated list of names of
//! its own, or [`PROGRAM_FILE`] for that file of the ramdisk, each with [`EAGER`] behind it if its memory is to be backed at once. `seed=` and `operations=` are the numbers that the storms start from and do.

use core::fmt::{self, Write};

/// What every frame starts with.
pub const PREFIX: &str = "@kslab ";

/// The file of the ramdisk that is a program.
pub const PROGRAM_FILE: &str = "program";

/// Stands behind a program's name.
pub const EAGER: &str = ":eager";

/// Stands for a call in what a program has of memory at first.
pub const START: &str = "start";

/// The section of the ELF file that holds one [`Test`] after the other.
pub const TESTS_SECTION: &str = ".tests";

/// What the guest writes to QEMU's `isa-debug-exit` device; QEMU exits with `2 * value + 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Exit {
    /// Every selected test passed.
    Success = 0x10,
    /// A test failed, or the kernel stopped.
    Failure = 0x11,
}

impl Exit {
    /// The exit code of the QEMU process.
    pub const fn code(self) -> i32 {
        self as i32 * 2 + 1
    }
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A line of KTAP.
    Ktap,
    /// The name of the test that starts now.
    Start,
    /// The headline of the report with which the kernel stopped.
    Stop,
    /// A line of the allocator's own tables.
    Table,
    /// What a program does, see [`Said`].
    Program,
    /// The last frame: `COUNT CRC`, in decimal and in eight hexadecimal digits.
    Whole,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Ktap, Self::Start, Self::Stop, Self::Table, Self::Program, Self::Whole];

    /// The word that stands for it on the line.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ktap => "ktap",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Table => "table",
            Self::Program => "program",
            Self::Whole => "whole",
        }
    }
}

/// The number of frames so far and the checksum over them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seal {
    /// Frames counted, [`Kind::Whole`] not among them.
    pub lines: u32,
    /// CRC-32 (IEEE) over them.
    pub crc: u32,
}

impl Seal {
    /// Counts `text`, a part of a frame.
    pub fn add(&mut self, text: &str) {
        let mut hasher = crc32fast::Hasher::new_with_initial(self.crc);
        hasher.update(text.as_bytes());
        self.crc = hasher.finalize();
    }

    /// Writes one frame to `out`, line end included, and counts it.
    pub fn write(&mut self, out: &mut dyn Write, kind: Kind, payload: fmt::Arguments) -> fmt::Result {
        out.write_str(PREFIX)?;
        let mut counted = Counted { seal: self, out };
        counted.write_str(kind.word())?;
        counted.write_str(" ")?;
        Escape(&mut counted).write_fmt(payload)?;
        counted.write_str("\n")?;
        self.lines += 1;
        Ok(())
    }

    /// Counts a frame that was received: the line without [`PREFIX`] and without its end.
    pub fn receive(&mut self, frame: &str) {
        self.add(frame);
        self.add("\n");
        self.lines += 1;
    }

    /// Writes the last frame.
    pub fn finish(mut self, out: &mut dyn Write) -> fmt::Result {
        let Seal { lines, crc } = self;
        self.write(out, Kind::Whole, format_args!("{lines} {crc:08x}"))
    }

    /// Whether `payload`, that of a [`Kind::Whole`] frame, says just this.
    pub fn matches(&self, payload: &str) -> bool {
        let mut words = payload.split(' ');
        words.next().and_then(|w| w.parse().ok()) == Some(self.lines)
            && words.next().and_then(|w| u32::from_str_radix(w, 16).ok()) == Some(self.crc)
            && words.next().is_none()
    }
}

/// Splits a line into the frame's kind and payload; `None` where the line is not a frame.
pub fn parse_frame(line: &str) -> Option<(Kind, &str)> {
    let (word, payload) = line.strip_prefix(PREFIX)?.split_once(' ')?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.word() == word)?;
    Some((kind, payload))
}

/// What a frame of [`Kind::Program`] says: a word, a space, and text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said<'a> {
    /// A program starts, `begin NAME`.
    Begin(&'a str),
    /// It has written this, `wrote BYTES`, escaped as [`slice::escape_ascii`] does.
    Wrote(&'a str),
    /// What it has of memory after a call, `memory BREAK MAPPINGS RESIDENT RESERVED RESULT CALL`, in KiB.
    Memory(Memory<'a>),
    /// It has called `exit` with this, `status NUMBER`.
    Status(u8),
    /// It was killed for this, `killed TEXT`.
    Killed(&'a str),
    /// It was not started, `refused TEXT`.
    Refused(&'a str),
    /// How many page frames were free before it and are behind it, `frames BEFORE AFTER`.
    Frames(u64, u64),
}

/// What a program has of memory, as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory<'a> {
    /// The break.
    pub program_break: &'a str,
    /// How many mappings there are.
    pub mappings: &'a str,
    /// KiB that have page frames.
    pub resident: &'a str,
    /// KiB in all mappings.
    pub reserved: &'a str,
    /// What the call has given.
    pub result: &'a str,
    /// The call.
    pub call: &'a str,
}

impl<'a> Said<'a> {
    /// Reads the payload of a frame.
    pub fn parse(payload: &'a str) -> Option<Self> {
        let (word, text) = payload.split_once(' ')?;
        Some(match word {
            "begin" => Self::Begin(text),
            "wrote" => Self::Wrote(text),
            "memory" => {
                let mut words = text.splitn(6, ' ');
                let mut next = || words.next();
                let (program_break, mappings, resident) = (next()?, next()?, next()?);
                let (reserved, result, call) = (next()?, next()?, next()?);
                Self::Memory(Memory { program_break, mappings, resident, reserved, result, call })
            }
            "status" => Self::Status(text.parse().ok()?),
            "killed" => Self::Killed(text),
            "refused" => Self::Refused(text),
            "frames" => {
                let (before, after) = text.split_once(' ')?;
                Self::Frames(before.parse().ok()?, after.parse().ok()?)
            }
            _ => return None,
        })
    }
}

struct Counted<'a> {
    seal: &'a mut Seal,
    out: &'a mut dyn Write,
}

impl Write for Counted<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.seal.add(text);
        self.out.write_str(text)
    }
}

/// Passes text on with its control characters escaped as in a Rust string.
pub struct Escape<W>(pub W);

impl<W> fmt::Debug for Escape<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Escape")
    }
}

impl<W: Write> Write for Escape<W> {
    fn write_str(&mut self, mut text: &str) -> fmt::Result {
        while let Some(at) = text.find(char::is_control) {
            let (plain, rest) = text.split_at(at);
            self.0.write_str(plain)?;
            let mut rest = rest.chars();
            if let Some(control) = rest.next() {
                write!(self.0, "{}", control.escape_default())?;
            }
            text = rest.as_str();
        }
        self.0.write_str(text)
    }
}

/// Compares what is written to it with the headline that a test declares, where `0x*` stands for any hexadecimal number,
/// and `...` for the rest of a line: addresses differ from run to run, and places in the source from change to change.
#[derive(Debug)]
pub struct Expectation<'a> {
    expected: &'a str,
    /// How far it is met.
    at: usize,
    /// Digits met in place of the `*` at `at`.
    digits: usize,
    failed: bool,
}

impl<'a> Expectation<'a> {
    /// Nothing has been written yet.
    pub fn new(expected: &'a str) -> Self {
        Self { expected, at: 0, digits: 0, failed: false }
    }

    /// Whether what was written is just what is expected.
    pub fn is_met(mut self) -> bool {
        self.leave_number();
        self.leave_rest();
        !self.failed && self.at == self.expected.len()
    }

    fn is_in_rest(&self) -> bool {
        self.expected[self.at..].starts_with(REST)
    }

    fn is_in_number(&self) -> bool {
        self.expected[..self.at].ends_with("0x") && self.expected[self.at..].starts_with('*')
    }

    fn leave_rest(&mut self) {
        if self.is_in_rest() {
            self.at += REST.len();
        }
    }

    fn leave_number(&mut self) {
        if self.is_in_number() && self.digits > 0 {
            self.at += 1;
            self.digits = 0;
        }
    }
}

impl Write for Expectation<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if self.is_in_number() && character.is_ascii_hexdigit() {
                self.digits += 1;
                continue;
            }
            self.leave_number();
            // The host has the line's end as an escape.
            if self.is_in_rest() && !matches!(character, '\n' | '\\') {
                continue;
            }
            self.leave_rest();
            match self.expected[self.at..].chars().next() {
                Some(expected) if expected == character => self.at += expected.len_utf8(),
                _ => self.failed = true,
            }
        }
        Ok(())
    }
}

/// Stands for the rest of a line.
const REST: &str = "...";

/// A string in the ELF file; the host reads the two words of it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Text {
    start: *const u8,
    len: usize,
}

impl Text {
    /// Refers to `text`.
    pub const fn new(text: &'static str) -> Self {
        Self { start: text.as_ptr(), len: text.len() }
    }

    /// The text.
    pub fn get(&self) -> &'static str {
        // SAFETY: `new` is the only constructor, so these are the parts of a `&'static str`.
        unsafe { core::str::from_utf8_unchecked(core::slice::from_raw_parts(self.start, self.len)) }
    }
}

/// One test as the ELF file records it: seven words of eight bytes, in this order: the name's address and length, the
/// expected report's address and length, the function's address, the kind, the number of CPUs.
#[derive(Debug)]
#[repr(C)]
pub struct Test {
    /// Module path and function name, without the path that all tests share.
    pub name: Text,
    /// The headline of the report with which this test must stop the kernel, see [`Expectation`]; empty for one that
    /// returns.
    pub stops_with: Text,
    /// The test itself. It fails by panicking.
    pub run: fn(),
    /// When it runs.
    pub when: When,
    /// CPUs that its machine must have, or it tests little.
    pub cpus: u64,
}

// SAFETY: a test is read-only, and what its texts point to is `'static` and read-only.
unsafe impl Sync for Test {}

impl Test {
    /// Whether it runs when the command line does not ask for it by number.
    pub fn is_ordinary(&self) -> bool {
        self.when == When::Always && self.stops_with.len == 0
    }
}

/// When a test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum When {
    /// In every run.
    Always = 0,
    /// Only on request (`--ignored`): it takes long.
    Ignored = 1,
    /// Never in a run of the suite: it breaks the report or the kernel on purpose, for the tests of the host side.
    Broken = 2,
    /// Only where instructions are counted (`--bench`): it says how many operations take.
    Bench = 3,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(payloads: &[&str]) -> (String, Seal) {
        let (mut out, mut seal) = (String::new(), Seal::default());
        for payload in payloads {
            seal.write(&mut out, Kind::Ktap, format_args!("{payload}")).unwrap();
        }
        (out, seal)
    }

    #[test]
    fn a_frame_reads_back_as_it_was_written() {
        let (out, sent) = sealed(&["ok 1 a::b", ""]);
        let mut received = Seal::default();
        for line in out.lines() {
            received.receive(line.strip_prefix(PREFIX).unwrap());
        }
        assert_eq!(sent, received);
        let frames: Vec<_> = out.lines().map(parse_frame).collect();
        assert_eq!(frames, [Some((Kind::Ktap, "ok 1 a::b")), Some((Kind::Ktap, ""))]);
    }

    #[test]
    fn what_a_program_does_is_read() {
        assert_eq!(Said::parse("begin brk:eager"), Some(Said::Begin("brk:eager")));
        assert_eq!(Said::parse("wrote "), Some(Said::Wrote("")));
        let Some(Said::Memory(memory)) = Said::parse("memory 0x804a000 3 8 8200 0x804a000 brk(0, 1)") else { panic!() };
        assert_eq!((memory.resident, memory.reserved, memory.call), ("8", "8200", "brk(0, 1)"));
        assert_eq!(Said::parse("status 7"), Some(Said::Status(7)));
        assert_eq!(Said::parse("frames 10 11"), Some(Said::Frames(10, 11)));
        for payload in ["", "begin", "memory 1 2 3 4 5", "status 256", "frames 1", "else x"] {
            assert_eq!(Said::parse(payload), None, "{payload}");
        }
    }

    #[test]
    fn control_characters_do_not_break_the_line() {
        let (out, _) = sealed(&["one\ntwo\x1b[0m\r"]);
        assert_eq!(out, "@kslab ktap one\\ntwo\\u{1b}[0m\\r\n");
    }

    #[test]
    fn the_last_frame_proves_count_and_content() {
        let (_, seal) = sealed(&["a", "b"]);
        let mut last = String::new();
        seal.finish(&mut last).unwrap();
        let (kind, payload) = parse_frame(last.trim_end()).unwrap();
        assert_eq!(kind, Kind::Whole);
        assert!(seal.matches(payload));
        assert!(!sealed(&["a"]).1.matches(payload));
        assert!(!sealed(&["a", "c"]).1.matches(payload));
        assert!(!seal.matches(&format!("{payload} 1")));
    }

    #[test]
    fn a_headline_is_met_by_itself_and_by_any_number_for_a_star() {
        let meets = |expected: &str, parts: &[&str]| {
            let mut expectation = Expectation::new(expected);
            parts.iter().for_each(|part| expectation.write_str(part).unwrap());
            expectation.is_met()
        };
        assert!(meets("panic: 2 * 3", &["panic: ", "2 * 3"]));
        assert!(!meets("panic: 2 * 3", &["panic: 2 5 3"]));
        assert!(meets("at 0x*: bad", &["at ", "0x", "12", "ab: bad"]));
        assert!(meets("at 0x*", &["at 0xf"]));
        assert!(meets("now: ...\n  end", &["now: a", ".rs:1\n", "  end"]));
        assert!(meets("now: ...\\n  end", &["now: a\\n  end"]));
        assert!(meets("now: ...", &["now: 0x1"]));
        assert!(!meets("now: ...", &["now: 0x1\n"]));
        for found in ["at 0x: bad", "at 0xg1: bad", "at 12: bad", "at 0x12", "at 0x12: bad!", ""] {
            assert!(!meets("at 0x*: bad", &[found]), "{found:?}");
        }
    }

    #[test]
    fn firmware_text_is_no_frame() {
        for line in ["", "SeaBIOS (version 1.16)", "ktap ok 1", "@kslab ", "@kslab nothing x", " @kslab ktap x"] {
            assert_eq!(parse_frame(line), None, "{line:?}");
        }
    }
}
