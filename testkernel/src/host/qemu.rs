//! The machine, and QEMU as a child process that says what the machine says.

use std::{
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    thread::{self, JoinHandle},
    time::Instant,
};

use anstream::adapter::strip_str;
use anyhow::{Context, Result};

use super::{cli::Memory, report::End};

/// The program that is started.
pub const QEMU: &str = "qemu-system-x86_64";

/// What all machines share: a serial port on our standard output, the device by which the kernel ends QEMU, no restart.
/// Not an AMD, which has a reserved range below 1 TiB: the BIOS loader would spend 4 MiB on tables that map up to it.
const FIXED: &str = "-cpu max,vendor=GenuineIntel -nodefaults -display none -serial stdio -monitor none -no-reboot \
    -device isa-debug-exit,iobase=0xf4,iosize=0x04";

/// A machine that boots the test kernel.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The kernel's ELF file.
    pub elf: PathBuf,
    /// How the kernel gets into it.
    pub start: Start,
    /// Number of CPUs.
    pub cpus: u16,
    /// Size of its memory.
    pub memory: Memory,
    /// Whether its clock counts instructions, so that every run is the same.
    pub icount: bool,
    /// Whether it waits for a debugger on TCP port 1234.
    pub gdb: bool,
    /// The APIC id of a CPU that never comes to the kernel.
    pub lost_cpu: Option<u32>,
    /// Words for the kernel's command line, besides those that pick tests.
    pub words: String,
}

/// How the kernel gets into the machine.
#[derive(Debug, Clone)]
pub enum Start {
    /// QEMU loads the ELF file.
    Pvh {
        /// And this file beside it.
        ramdisk: Option<PathBuf>,
    },
    /// BIOS boots this disk image.
    Bios(PathBuf),
    /// UEFI boots a disk image.
    Uefi {
        /// The disk image.
        image: PathBuf,
        /// Where the firmware is.
        firmware: Firmware,
    },
}

/// UEFI for virtual machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firmware {
    /// The firmware itself.
    pub code: PathBuf,
    /// The variables that it starts with.
    pub vars: PathBuf,
}

impl Machine {
    /// The machine in which QEMU loads the kernel at `elf` and its ramdisk, with one CPU and 256 MiB.
    pub fn pvh(elf: &Path, ramdisk: &Path) -> Self {
        Self {
            elf: elf.into(),
            start: Start::Pvh { ramdisk: Some(ramdisk.into()) },
            cpus: 1,
            memory: Memory::DEFAULT,
            icount: false,
            gdb: false,
            lost_cpu: None,
            words: String::new(),
        }
    }

    /// What starts it, the kernel's command line being `line`.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(QEMU);
        // Without a disk the firmware need not wait for its controller: most of a boot that counts instructions.
        let board = if matches!(self.start, Start::Pvh { .. }) { "q35,sata=off" } else { "q35" };
        command.arg("-M").arg(board).args(FIXED.split_whitespace());
        command.arg("-m").arg(format!("{}M", self.memory.mib()));
        command.arg("-smp").arg(self.cpus.to_string());
        if self.icount {
            command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        } else {
            command.args(["-accel", "tcg,thread=multi"]);
        }
        if self.gdb {
            command.args(["-s", "-S"]);
        }
        self.start.add_to(&mut command, &self.elf, line);
        command
    }
}

impl Start {
    fn add_to(&self, command: &mut Command, elf: &Path, line: &str) {
        // Several machines share one image, and none changes it.
        let disk = |image: &Path| format!("format=raw,snapshot=on,file={}", option(&image.to_string_lossy()));
        // With a disk there is no command line for the kernel: it comes as a file that the machine offers.
        let file = format!("name=opt/kslab/cmdline,string={}", option(line));
        match self {
            Self::Pvh { ramdisk } => {
                if let Some(ramdisk) = ramdisk {
                    // QEMU takes a list of files here.
                    command.arg("-initrd").arg(option(&ramdisk.to_string_lossy()));
                }
                command.arg("-kernel").arg(elf).arg("-append").arg(line)
            }
            // The loader's BIOS stage hangs where there is no VGA.
            Self::Bios(image) => command.args(["-vga", "std", "-drive"]).arg(disk(image)).arg("-fw_cfg").arg(file),
            Self::Uefi { image, firmware } => {
                let code = option(&firmware.code.to_string_lossy());
                command.arg("-drive").arg(format!("if=pflash,unit=0,format=raw,readonly=on,file={code}"));
                command.arg("-drive").arg(format!("if=pflash,unit=1,{}", disk(&firmware.vars)));
                command.arg("-drive").arg(disk(image)).arg("-fw_cfg").arg(file)
            }
        };
    }
}

/// A value for QEMU's option parser, in which a single comma ends the value.
fn option(value: &str) -> String {
    value.replace(',', ",,")
}

/// A machine that runs. It ends with this value.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
}

/// What came from a machine.
#[derive(Debug)]
pub enum Output {
    /// A line, without its end and without terminal control.
    Line(String),
    /// The time is over.
    Overdue,
    /// Nothing any more.
    End,
}

/// Lines that wait to be read; a machine that says more has to wait.
const LINES_WAITING: usize = 1024;

/// Where a line that does not end is cut.
const LINE_BYTES: u64 = 64 * 1024;

impl Guest {
    /// Starts `machine`, the kernel's command line being `line`.
    pub fn start(machine: &Machine, line: &str) -> Result<Self> {
        let mut command = machine.command(line);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        let mut child = command.spawn().with_context(|| format!("cannot start {QEMU}"))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (sender, lines) = mpsc::sync_channel(LINES_WAITING);
        thread::spawn(move || stdout.map(|stdout| read_lines(BufReader::new(stdout), &sender)));
        let errors = thread::spawn(move || stderr.map(read_all).unwrap_or_default());
        Ok(Self { child, lines, errors: Some(errors) })
    }

    /// The next line; waits for it until `deadline`, or for ever.
    pub fn next(&self, deadline: Option<Instant>) -> Output {
        let line = match deadline.map(|deadline| deadline.checked_duration_since(Instant::now())) {
            // Also where there are lines: a machine that prints without end hangs too.
            Some(None) => Err(RecvTimeoutError::Timeout),
            Some(Some(time)) => self.lines.recv_timeout(time),
            None => self.lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match line {
            Ok(line) => Output::Line(line),
            Err(RecvTimeoutError::Timeout) => Output::Overdue,
            Err(RecvTimeoutError::Disconnected) => Output::End,
        }
    }

    /// Ends it. Gives the lines that were still on their way.
    pub fn kill(mut self) -> Vec<String> {
        // It fails only where the machine has ended already.
        let _ = self.child.kill();
        self.lines.iter().collect()
    }

    /// How it ended, after [`Output::End`].
    pub fn end(mut self) -> Result<End> {
        let status = self.child.wait()?;
        let said = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        Ok(End::Exit { code: status.code(), said })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(mut from: impl BufRead, to: &SyncSender<String>) {
    let mut line = Vec::new();
    while matches!(from.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line), Ok(1..)) {
        if to.send(clean(&line)).is_err() {
            return;
        }
        line.clear();
    }
}

fn clean(line: &[u8]) -> String {
    strip_str(&String::from_utf8_lossy(line)).to_string().trim_end_matches(['\r', '\n']).to_owned()
}

fn read_all(mut from: impl Read) -> String {
    let mut bytes = Vec::new();
    // What came before an error is worth showing too.
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Lets the kernel end the child if this process is killed and cannot do it.
#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    // SAFETY: this request of prctl reads two numbers and touches no memory of ours.
    let ask = || match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: between fork and exec `ask` makes a system call and reads errno; it allocates nothing, takes no lock.
    unsafe { command.pre_exec(ask) };
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(machine: &Machine, line: &str) -> String {
        let command = machine.command(line);
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    #[test]
    fn the_command_line_reaches_the_kernel_on_every_path() {
        let pvh = Machine::pvh(Path::new("/k,ernel"), Path::new("/ram,disk"));
        assert!(arguments(&pvh, "tests=1-2,4").ends_with("-initrd /ram,,disk -kernel /k,ernel -append tests=1-2,4"));
        let bare = Machine { start: Start::Pvh { ramdisk: None }, ..pvh.clone() };
        assert!(!arguments(&bare, "").contains("-initrd"));
        let bios = Machine { start: Start::Bios("/b,ios.img".into()), ..pvh };
        let end = "-vga std -drive format=raw,snapshot=on,file=/b,,ios.img \
            -fw_cfg name=opt/kslab/cmdline,string=tests=1-2,,4";
        assert!(arguments(&bios, "tests=1-2,4").ends_with(end));
        let firmware = Firmware { code: "/code".into(), vars: "/vars".into() };
        let uefi = Machine { start: Start::Uefi { image: "/uefi.img".into(), firmware }, ..bios };
        let end = "-drive if=pflash,unit=0,format=raw,readonly=on,file=/code \
            -drive if=pflash,unit=1,format=raw,snapshot=on,file=/vars \
            -drive format=raw,snapshot=on,file=/uefi.img -fw_cfg name=opt/kslab/cmdline,string=tests=7";
        assert!(arguments(&uefi, "tests=7").ends_with(end));
    }

    #[test]
    fn the_machine_is_as_asked_for() {
        let plain = Machine::pvh(Path::new("/kernel"), Path::new("/ramdisk"));
        let words = arguments(&plain, "");
        assert!(words.starts_with("-M q35,sata=off -cpu max"));
        assert!(words.contains("-m 256M -smp 1 -accel tcg,thread=multi ") && !words.contains(" -s "));
        let memory = "4G".parse().unwrap();
        let words = arguments(&Machine { cpus: 4, memory, icount: true, gdb: true, ..plain }, "");
        assert!(words.contains("-m 4096M -smp 4 -accel tcg,thread=single -icount shift=0,sleep=off -s -S"));
    }

    #[test]
    fn lines_come_without_their_ends_and_without_terminal_control() {
        let (sender, receiver) = mpsc::sync_channel(8);
        read_lines(&b"\x1bc\x1b[2J@kslab ktap x\r\n\n\xff\xfe\r\nlast"[..], &sender);
        drop(sender);
        assert_eq!(receiver.iter().collect::<Vec<_>>(), ["@kslab ktap x", "", "\u{fffd}\u{fffd}", "last"]);
    }

    #[test]
    fn a_line_without_an_end_is_cut() {
        let (sender, receiver) = mpsc::sync_channel(8);
        read_lines(&vec![b'x'; LINE_BYTES as usize + 1][..], &sender);
        drop(sender);
        assert_eq!(receiver.iter().map(|line| line.len()).collect::<Vec<_>>(), [LINE_BYTES as usize, 1]);
    }
}
