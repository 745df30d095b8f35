//! Makes BIOS and UEFI disk images of the kernel with the crate `bootloader`.
//!
//! Building that crate builds the loader's stages with a cargo of its own. It needs rustup's components `rust-src` and
//! `llvm-tools`, the environment variable `RUSTC_BOOTSTRAP=1`, and no `CARGO_TARGET_DIR`: that cargo would wait for ever
//! for the directory that the outer one has locked. The program of `testkernel` sees to all of it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use bootloader::{BootConfig, DiskImageBuilder};
use bootloader_boot_config::LevelFilter;
use clap::{Args, Parser};
use tempfile::NamedTempFile;

mod kernel;

/// Makes disk images from which the kernel boots.
#[derive(Parser)]
struct Cli {
    /// The kernel's ELF file
    #[arg(long, value_name = "ELF")]
    kernel: PathBuf,
    /// What the loader puts into memory beside the kernel
    #[arg(long, value_name = "FILE")]
    ramdisk: Option<PathBuf>,
    #[command(flatten)]
    images: Images,
}

#[derive(Args)]
#[group(required = true, multiple = true)]
struct Images {
    /// Where the image for BIOS goes
    #[arg(long, value_name = "FILE")]
    bios: Option<PathBuf>,
    /// Where the image for UEFI goes
    #[arg(long, value_name = "FILE")]
    uefi: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            eprintln!("{}", one_line(&error));
            return ExitCode::from(2);
        }
        Err(help) => help.exit(),
    };
    let Err(error) = run(&cli) else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

/// What is wrong with the command line, without the usage text that `clap` puts below it.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let message: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    format!("{}; see --help", message.join(" "))
}

fn run(cli: &Cli) -> Result<()> {
    let elf = fs::read(&cli.kernel).with_context(|| {
        format!("cannot read the kernel {}; build it first, or correct --kernel", cli.kernel.display())
    })?;
    let elf = kernel::strip(&elf).with_context(|| format!("cannot use {}", cli.kernel.display()))?;

    let dir = tempfile::tempdir().context("cannot make a temporary directory; check TMPDIR")?;
    let stripped = dir.path().join("kslab");
    fs::write(&stripped, elf).with_context(|| format!("cannot write {}", stripped.display()))?;
    let mut builder = DiskImageBuilder::new(stripped);
    builder.set_boot_config(&boot_config());
    if let Some(ramdisk) = &cli.ramdisk {
        fs::File::open(ramdisk)
            .with_context(|| format!("cannot read the ramdisk {}; correct --ramdisk", ramdisk.display()))?;
        builder.set_ramdisk(ramdisk.clone());
    }

    if let Some(path) = &cli.images.bios {
        make(path, |image| builder.create_bios_image(image))?;
    }
    if let Some(path) = &cli.images.uefi {
        make(path, |image| builder.create_uefi_image(image))?;
    }
    Ok(())
}

/// COM1 belongs to the kernel's report: the boot loader says there only why it cannot go on. The frame buffer is slow
/// to write to in an emulator.
fn boot_config() -> BootConfig {
    let mut config = BootConfig::default();
    config.log_level = LevelFilter::Warn;
    config.frame_buffer_logging = false;
    config
}

/// Puts the image that `create` makes at `path` in one step, so that a machine that runs from an older one keeps it.
fn make(path: &Path, create: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let into = || format!("cannot make the image {}", path.display());
    ensure!(!path.is_dir(), "{}: it is a directory; name a file", into());
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(into)?;
    let image = NamedTempFile::new_in(parent).with_context(into)?;
    create(image.path()).with_context(into)?;
    image.persist(path).with_context(into)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(arguments: &[&str]) -> String {
        let all = std::iter::once("kslab-image").chain(arguments.iter().copied());
        one_line(&Cli::try_parse_from(all).err().expect("a command line that is wrong"))
    }

    fn made(dir: &Path, arguments: &[&str]) -> Result<()> {
        let kernel = dir.join("kernel");
        fs::write(&kernel, kernel::tests::elf())?;
        let arguments = arguments.iter().map(|argument| argument.replace("DIR", dir.to_str().unwrap()));
        let all = ["kslab-image".to_owned(), "--kernel".to_owned(), kernel.to_str().unwrap().to_owned()];
        run(&Cli::try_parse_from(all.into_iter().chain(arguments)).unwrap())
    }

    fn contains(image: &[u8], bytes: &[u8]) -> bool {
        image.windows(bytes.len()).any(|window| window == bytes)
    }

    #[test]
    fn a_wrong_command_line_is_one_line() {
        assert_eq!(message(&["--kernel", "k", "--foo"]), "error: unexpected argument '--foo' found; see --help");
        for arguments in [&[][..], &["--kernel", "k"], &["--bios", "b"], &["--kernel", "k", "--bios"]] {
            let message = message(arguments);
            assert!(message.starts_with("error: ") && message.ends_with("; see --help"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn one_run_makes_both_images_with_the_stripped_kernel_and_the_ramdisk() {
        let dir = tempfile::tempdir().unwrap();
        let ramdisk = b"what the boot loader puts beside the kernel";
        fs::write(dir.path().join("r"), ramdisk).unwrap();
        made(dir.path(), &["--ramdisk", "DIR/r", "--bios", "DIR/new/b.img", "--uefi", "DIR/u.img"]).unwrap();
        let bios = fs::read(dir.path().join("new/b.img")).unwrap();
        let uefi = fs::read(dir.path().join("u.img")).unwrap();
        assert_eq!(bios[510..512], [0x55, 0xaa]);
        assert_eq!(&uefi[512..520], b"EFI PART");
        for image in [bios, uefi] {
            assert!(contains(&image, kernel::tests::CODE));
            assert!(contains(&image, ramdisk));
            assert!(contains(&image, b"\"log_level\": \"Warn\""));
            assert!(!contains(&image, kernel::tests::DEBUG_INFO));
        }
    }

    #[test]
    fn only_the_image_that_was_asked_for_is_made_and_it_replaces_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b.img"), "old").unwrap();
        made(dir.path(), &["--bios", "DIR/b.img"]).unwrap();
        assert_eq!(fs::read(dir.path().join("b.img")).unwrap()[510..512], [0x55, 0xaa]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "the kernel and one image");
    }

    #[test]
    fn what_cannot_be_done_is_said_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let no_kernel = Cli::try_parse_from(["kslab-image", "--kernel", "/nowhere/k", "--bios", "b"]).unwrap();
        for error in [
            run(&no_kernel).unwrap_err(),
            made(dir.path(), &["--bios", "DIR"]).unwrap_err(),
            made(dir.path(), &["--uefi", "DIR/kernel/u.img"]).unwrap_err(),
            made(dir.path(), &["--ramdisk", "/nowhere/r", "--bios", "DIR/b.img"]).unwrap_err(),
        ] {
            let message = format!("{error:#}");
            assert!(message.starts_with("cannot "), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
