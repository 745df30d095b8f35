//! Boots the kernel to run programs, and shows what they write and what becomes of their memory.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    Kernel,
    cli::Args,
    kernel, needs,
    qemu::{Guest, Machine, Output},
    ramdisk,
    report::{End, frame_in},
    setup, start,
};
use crate::protocol::{EAGER, Exit, Kind, Memory, PREFIX, PROGRAM_FILE, START, Said, Seal, parse_frame};

/// How a program should end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// With status 0.
    Success,
    /// Killed, for a reason that starts with this.
    Killed(&'static str),
}

/// A program of the kernel's own, what is shown above it, and how it should end.
pub type Shown = (&'static str, &'static str, Expected);

/// The break.
pub const BRK: [Shown; 2] = [
    ("brk", "each page gets its frame when it is first used", Expected::Success),
    ("brk:eager", "each page but those of the stack gets its frame when it is reserved", Expected::Success),
];

/// Mappings.
pub const MMAP: [Shown; 6] = [
    ("mmap", "each page gets its frame when it is first used", Expected::Success),
    ("mmap:eager", "each page but those of the stack gets its frame when it is reserved", Expected::Success),
    ("write-to-read-only", "the kernel has to end it", Expected::Killed("page fault: write to")),
    ("execute-data", "the kernel has to end it", Expected::Killed("page fault: execution at")),
    ("read-reserved", "the kernel has to end it", Expected::Killed("page fault: read from")),
    ("read-unmapped", "the kernel has to end it", Expected::Killed("page fault: read from")),
];

/// How a program has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    Status(u8),
    Killed(String),
    Refused(String),
}

impl Outcome {
    fn is(&self, expected: Expected) -> bool {
        match (self, expected) {
            (Self::Status(0), Expected::Success) => true,
            (Self::Killed(reason), Expected::Killed(start)) => reason.starts_with(start),
            _ => false,
        }
    }
}

/// Runs the program in `file`. The exit code is the program's status; 1 where it was killed or not started.
pub fn run(args: &Args, file: &Path) -> Result<ExitCode> {
    let program = read(file)?;
    setup::ensure(needs(args.boot))?;
    let Kernel { elf, .. } = kernel()?;
    let ramdisk = ramdisk::with_program(&elf, &program)?;
    let machine = machine(args, &elf, ramdisk.path())?;
    let names = [if args.eager { format!("{PROGRAM_FILE}{EAGER}") } else { PROGRAM_FILE.to_owned() }];
    let mut show = Show::new(io::stdout(), &[]);
    watch(&machine, args, &names, &mut show)?;
    Ok(match show.outcomes.first() {
        Some(Outcome::Status(status)) => ExitCode::from(*status),
        Some(Outcome::Refused(reason)) => bail!("{} was not started: {reason}", file.display()),
        _ => ExitCode::FAILURE,
    })
}

/// Runs programs of the kernel's own, or those of them that are backed eagerly. The exit code is 0 where each has ended as it
/// should.
pub fn demo(args: &Args, programs: &[Shown]) -> Result<ExitCode> {
    let programs: Vec<_> = programs.iter().filter(|(name, ..)| !args.eager || name.ends_with(EAGER)).copied().collect();
    setup::ensure(needs(args.boot))?;
    let Kernel { elf, ramdisk, .. } = kernel()?;
    let machine = machine(args, &elf, &ramdisk)?;
    let names: Vec<_> = programs.iter().map(|(name, ..)| (*name).to_owned()).collect();
    let mut show = Show::new(io::stdout(), &programs);
    watch(&machine, args, &names, &mut show)?;
    let as_expected = show.outcomes.iter().zip(&programs).all(|(outcome, (.., expected))| outcome.is(*expected));
    let good = as_expected && show.outcomes.len() == programs.len() && !show.has_lost_frames;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The program in `file`, if it looks like one.
fn read(file: &Path) -> Result<Vec<u8>> {
    let shown = file.display();
    let program = fs::read(file)
        .with_context(|| format!("cannot read the program {shown}; name an ELF file that is linked statically"))?;
    ensure!(
        program.starts_with(b"\x7fELF"),
        "{shown} is not an ELF file; link the program statically for i386, as `gcc -m32 -nostdlib -static -no-pie` does"
    );
    Ok(program)
}

fn machine(args: &Args, elf: &Path, ramdisk: &Path) -> Result<Machine> {
    let Args { cpus, memory, icount, gdb, .. } = *args;
    let start = start(args.boot, elf, ramdisk)?;
    Ok(Machine { elf: elf.into(), start, cpus, memory, icount, gdb, lost_cpu: None, words: args.words() })
}

/// Boots the machine and has it run the programs, to the end.
fn watch(machine: &Machine, args: &Args, names: &[String], show: &mut Show<impl Write>) -> Result<()> {
    let line = format!("cpus={} programs={} {}", machine.cpus, names.join(","), machine.words);
    let guest = Guest::start(machine, line.trim_end())?;
    let new_deadline = || args.patience().map(|patience| Instant::now() + patience);
    let mut deadline = new_deadline();
    let mut console = Vec::new();
    let mut stopped = None;
    loop {
        match guest.next(deadline) {
            Output::Line(line) => {
                let Some(frame) = frame_in(&line) else {
                    console.push(line);
                    continue;
                };
                deadline = new_deadline();
                if let Some(headline) = show.frame(frame)? {
                    stopped = Some(headline);
                }
            }
            Output::Overdue => bail!("no program did anything for so long; --timeout SECONDS gives them more time"),
            Output::End => break,
        }
    }
    if let Some(headline) = stopped {
        bail!("the kernel stopped: {headline}\n{}", console.join("\n"));
    }
    match guest.end()? {
        End::Exit { code: Some(code), .. } if code == Exit::Success.code() && show.is_whole => Ok(()),
        End::Exit { code, said } => {
            bail!("the machine ended early ({code:?}): {}", if said.is_empty() { console.join("\n") } else { said })
        }
        _ => bail!("the machine ended early"),
    }
}

/// What is shown of programs, as they run.
struct Show<'a, W> {
    out: W,
    /// Those that have a title.
    programs: &'a [Shown],
    seal: Seal,
    /// Whether the last thing written was the end of a line.
    at_line_start: bool,
    outcomes: Vec<Outcome>,
    has_lost_frames: bool,
    is_whole: bool,
}

impl<'a, W: Write> Show<'a, W> {
    fn new(out: W, programs: &'a [Shown]) -> Self {
        Self {
            out,
            programs,
            seal: Seal::default(),
            at_line_start: true,
            outcomes: Vec::new(),
            has_lost_frames: false,
            is_whole: false,
        }
    }

    /// Takes in a frame. Gives the headline, where the kernel has stopped.
    fn frame(&mut self, frame: &str) -> Result<Option<String>> {
        let Some((kind, payload)) = parse_frame(frame) else { return Ok(None) };
        match kind {
            Kind::Whole => self.is_whole = self.seal.matches(payload),
            _ => self.seal.receive(&frame[PREFIX.len()..]),
        }
        match kind {
            Kind::Stop => return Ok(Some(payload.to_owned())),
            Kind::Program => match Said::parse(payload) {
                Some(said) => self.said(said)?,
                None => bail!("the kernel says what nobody understands: {payload}"),
            },
            _ => {}
        }
        Ok(None)
    }

    fn said(&mut self, said: Said) -> Result<()> {
        match said {
            Said::Begin(name) => {
                let title = self.programs.iter().find(|(known, ..)| *known == name).map(|(_, title, _)| *title);
                let space = if self.outcomes.is_empty() { "" } else { "\n" };
                title.map_or(Ok(()), |title| self.line(&format!("{space}{name}: {title}")))
            }
            Said::Wrote(text) => self.wrote(&unescape(text)),
            Said::Memory(Memory { program_break, mappings, resident, reserved, result, call }) => {
                if call == START {
                    self.line(&row("call", "result", "break", "mappings", "resident kB", "reserved kB"))?;
                }
                self.line(&row(call, result, program_break, mappings, resident, reserved))
            }
            Said::Status(status) => self.ended(Outcome::Status(status), &format!("exit status {status}")),
            Said::Killed(reason) => self.ended(Outcome::Killed(reason.to_owned()), &format!("killed: {reason}")),
            Said::Refused(reason) => {
                self.outcomes.push(Outcome::Refused(reason.to_owned()));
                Ok(())
            }
            Said::Frames(before, after) => {
                self.has_lost_frames |= before != after;
                self.line(&format!("free page frames: {before} before, {after} after"))
            }
        }
    }

    fn ended(&mut self, outcome: Outcome, line: &str) -> Result<()> {
        self.outcomes.push(outcome);
        self.line(line)
    }

    /// What a program has written, as it is.
    fn wrote(&mut self, text: &[u8]) -> Result<()> {
        if let Some(last) = text.last() {
            self.at_line_start = *last == b'\n';
        }
        self.out.write_all(text)?;
        Ok(self.out.flush()?)
    }

    /// A line of our own, which begins where one does.
    fn line(&mut self, line: &str) -> Result<()> {
        if !self.at_line_start {
            writeln!(self.out)?;
        }
        self.at_line_start = true;
        writeln!(self.out, "{line}")?;
        Ok(self.out.flush()?)
    }
}

fn row(call: &str, result: &str, program_break: &str, mappings: &str, resident: &str, reserved: &str) -> String {
    format!("  {call:<48} {result:>10}  {program_break:>10} {mappings:>8} {resident:>11} {reserved:>11}")
}

/// Undoes [`slice::escape_ascii`].
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let escaped = if byte == b'\\' { rest.next() } else { None };
        bytes.push(match escaped {
            None => byte,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'x') => {
                let digit = |digit: Option<u8>| char::from(digit.unwrap_or(b'0')).to_digit(16).unwrap_or(0) as u8;
                digit(rest.next()) << 4 | digit(rest.next())
            }
            Some(itself) => itself,
        });
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_through() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unescape(&all.escape_ascii().to_string()), all);
        assert_eq!(unescape("\\"), b"\\");
    }

    #[test]
    fn what_is_no_program_is_told_in_one_line() {
        for (file, part) in [("/nowhere/program", "cannot read the program /nowhere/program; name"), (file!(), "")] {
            let path = super::super::kernel_build::workspace().unwrap().join(file);
            let told = format!("{:#}", read(&path).unwrap_err());
            assert!(told.contains(part) && told.contains("static") && !told.contains('\n'), "{told}");
        }
    }

    #[test]
    fn what_is_written_and_the_table_do_not_share_lines() {
        let mut out = Vec::new();
        let mut show = Show::new(&mut out, &[]);
        let memory = "memory 0x804a000 2 4 8196 0x804a000 brk(0x0)";
        let start = "memory 0x804a000 2 4 8196 - start";
        for payload in ["begin program", start, "wrote a\\n", memory, "wrote b", memory, "status 3", "frames 5 5"] {
            show.said(Said::parse(payload).unwrap()).unwrap();
        }
        assert_eq!(show.outcomes, [Outcome::Status(3)]);
        assert!(!show.has_lost_frames);
        let shown = String::from_utf8(out).unwrap();
        let lines: Vec<_> = shown.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
        assert_eq!(lines, ["call", "start", "a", "brk(0x0)", "b", "brk(0x0)", "exit", "free"]);
    }

    #[test]
    fn a_program_that_ends_otherwise_is_told_from_one_that_does_as_it_should() {
        let killed = Outcome::Killed("page fault: write to 0x0".into());
        assert!(killed.is(Expected::Killed("page fault: write")) && !killed.is(Expected::Killed("page fault: read")));
        assert!(!killed.is(Expected::Success) && !Outcome::Status(1).is(Expected::Success));
        assert!(Outcome::Status(0).is(Expected::Success) && !Outcome::Refused("x".into()).is(Expected::Success));
    }
}
