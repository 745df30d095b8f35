//! The program that builds the kernel, boots it in QEMU and reads its report.
//!
//! [`setup`] finds and installs what the machine lacks, [`kernel_build`] builds, [`elf`] lists the tests, [`suite`]
//! plans the boots, [`ramdisk`] makes what the kernel gets along, [`mod@qemu`] is the machine, [`report`] judges what a boot
//! says, [`lines`] adds where in the sources that is, [`show`] prints. [`demo`] shows what becomes of misuse, [`program`] has the
//! kernel run programs, and [`mod@bench`]
//! judges counts of instructions.

use std::{
    env,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;

use self::{
    cli::{Args, BootPath, Demo},
    elf::GuestTest,
    packages::Need,
    qemu::{Machine, Start},
    show::{Human, Ktap, Show},
    suite::Event,
};
use crate::protocol::When;

pub mod bench;
pub mod cli;
pub mod demo;
pub mod elf;
pub mod kernel_build;
pub mod lines;
pub mod packages;
pub mod program;
pub mod qemu;
pub mod ramdisk;
pub mod report;
pub mod setup;
pub mod show;
pub mod suite;

/// A kernel that is built, and its tests.
#[derive(Debug)]
pub struct Kernel {
    /// Its ELF file.
    pub elf: PathBuf,
    /// The ramdisk for it.
    pub ramdisk: PathBuf,
    /// All its tests, sorted by name.
    pub tests: Vec<GuestTest>,
}

/// Builds the kernel, and installs what that takes: for debugging or for release, as this program was built.
pub fn kernel() -> Result<Kernel> {
    kernel_for(!cfg!(debug_assertions))
}

fn kernel_for(release: bool) -> Result<Kernel> {
    let elf = kernel_build::kernel(setup::standard_library()?, release)?;
    let tests = elf::tests(&elf)?;
    let ramdisk = ramdisk::make(&elf)?;
    Ok(Kernel { elf, ramdisk, tests })
}

/// Makes sure that there is QEMU.
pub fn qemu() -> Result<()> {
    setup::ensure(&[Need::Qemu])
}

/// The launcher. Exit codes: 0 where every test passed, 1 where one failed or there is an error, 2 for bad arguments.
pub fn main() -> ExitCode {
    let args = match cli::parse(env::args_os()) {
        Ok(args) => args,
        Err(code) => return code,
    };
    run(&args).unwrap_or_else(|error| {
        // Who closes our output has seen enough.
        let closed = error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        if !closed {
            eprintln!("error: {error:#}");
        }
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    match args.demo {
        Some(Demo::Faults) if args.markdown => return demo::table(),
        Some(Demo::Faults) => return demo::run(args),
        Some(Demo::Brk) => return program::demo(args, &program::BRK),
        Some(Demo::Mmap) => return program::demo(args, &program::MMAP),
        None => {}
    }
    if let Some(file) = &args.program {
        return program::run(args, file);
    }
    if !args.list {
        setup::ensure(needs(args.boot))?;
    }
    // What is counted is what embedders get.
    let Kernel { elf, ramdisk, mut tests } = if args.bench { kernel_for(true)? } else { kernel()? };
    tests.retain(|test| args.selects(test));
    if tests.is_empty() {
        eprintln!("error: no test has such a name; `--list` shows them all");
        return Ok(ExitCode::from(2));
    }
    if args.list {
        return list(&tests);
    }
    let start = start(args.boot, &elf, &ramdisk)?;
    if args.gdb {
        let shown = elf.display();
        eprintln!("The machine waits. To attach: gdb {shown} -ex 'target remote :1234'");
    }
    let Args { cpus, memory, gdb, .. } = *args;
    let machine = Machine { elf, start, cpus, memory, icount: args.counts(), gdb, lost_cpu: None, words: args.words() };
    let groups = suite::groups(tests);
    let tests: Vec<_> = groups.iter().flatten().collect();
    let mut show: Box<dyn Show> = if args.ktap {
        Box::new(Ktap::new(io::stdout(), tests.len())?)
    } else {
        Box::new(Human::new(anstream::stdout(), &machine, args.boot, &tests)?)
    };
    let mut counts = Vec::new();
    suite::run(&machine, &groups, args.patience(), |event| {
        match event {
            Event::Verdict(verdict) => {
                counts.extend(bench::counts_in(&verdict.notes));
                show.verdict(verdict)?;
            }
            Event::Tables(tables) if !args.bench => show.tables(tables),
            Event::Tables(_) => {}
        }
        Ok(())
    })?;
    show.end()?;
    let good = show.failed() == 0 && (!args.bench || bench::judge(&counts, args.picks_all(), args.ktap)?);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn needs(boot: BootPath) -> &'static [Need] {
    match boot {
        BootPath::Pvh => &[Need::Qemu],
        BootPath::Bios => &[Need::Qemu, Need::ImageTools],
        BootPath::Uefi => &[Need::Qemu, Need::ImageTools, Need::Firmware],
    }
}

/// What the machine starts from, made of the kernel at `elf` and its ramdisk.
fn start(boot: BootPath, elf: &Path, ramdisk: &Path) -> Result<Start> {
    Ok(match boot {
        BootPath::Pvh => Start::Pvh { ramdisk: Some(ramdisk.into()) },
        BootPath::Bios => Start::Bios(kernel_build::image(elf, ramdisk, "bios")?),
        BootPath::Uefi => {
            let image = kernel_build::image(elf, ramdisk, "uefi")?;
            let firmware = setup::firmware()?;
            Start::Uefi { image, firmware }
        }
    })
}

fn list(tests: &[GuestTest]) -> Result<ExitCode> {
    let mut out = io::stdout().lock();
    for test in tests {
        let slow = match test.when {
            When::Ignored => " (slow)",
            When::Bench => " (--bench)",
            _ => "",
        };
        writeln!(out, "{}{slow}", test.name)?;
    }
    Ok(ExitCode::SUCCESS)
}
