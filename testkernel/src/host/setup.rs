//! Finds what the launcher needs on this machine and installs what is missing.

use std::{
    env,
    fs::File,
    io::{self, BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    kernel_build::{TARGET, workspace},
    packages::{Installers, Need, PackageManager, Root},
    qemu::{Firmware, QEMU},
};

/// Where the kernel's `core` and `alloc` come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandardLibrary {
    /// Compiled, with the toolchain.
    Installed,
    /// Built from the sources in the toolchain.
    Sources,
}

/// Makes sure that everything in `needs` is there.
pub fn ensure(needs: &[Need]) -> Result<()> {
    if missing(needs).is_empty() {
        return Ok(());
    }
    // Several launchers may run at the same time: one installs, the others wait and find it done.
    let turn = File::open(workspace()?.join("Cargo.toml"))?;
    turn.lock().context("cannot wait for another launcher")?;
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)?;
    let still = self::missing(&missing);
    ensure!(still.is_empty(), "{}, or see that PATH leads to it", installers().advice(&still));
    Ok(())
}

/// Makes sure that there is a standard library for the kernel: the toolchain's own for the target, or its sources.
pub fn standard_library() -> Result<StandardLibrary> {
    if is_there(Need::Target) {
        return Ok(StandardLibrary::Installed);
    }
    let refused = match which::which("rustup") {
        Ok(_) => ensure(&[Need::Target]).err(),
        Err(_) => None,
    };
    if is_there(Need::Target) {
        return Ok(StandardLibrary::Installed);
    }
    if rustc(&["--print", "sysroot"]).is_some_and(|root| root.join("lib/rustlib/src/rust/library").is_dir()) {
        return Ok(StandardLibrary::Sources);
    }
    Err(refused.unwrap_or_else(|| anyhow::Error::msg(installers().advice(&[Need::Target]))))
}

/// The UEFI firmware of this machine.
pub fn firmware() -> Result<Firmware> {
    find_firmware().context("UEFI for QEMU (OVMF) is installed, and not where the launcher looks for it")
}

fn missing(needs: &[Need]) -> Vec<Need> {
    needs.iter().copied().filter(|&need| !is_there(need)).collect()
}

fn is_there(need: Need) -> bool {
    match need {
        Need::Target => {
            rustc(&["--print", "target-libdir", "--target", TARGET]).is_some_and(|libraries| libraries.is_dir())
        }
        Need::Qemu => which::which(QEMU).is_ok(),
        Need::Firmware => find_firmware().is_some(),
        Need::ImageTools => has_image_tools().unwrap_or(false),
    }
}

fn has_image_tools() -> Option<bool> {
    let sources = rustc(&["--print", "sysroot"])?.join("lib/rustlib/src/rust/library");
    let tools = rustc(&["--print", "target-libdir"])?.parent()?.join("bin");
    Some(sources.is_dir() && ["llvm-objcopy", "llvm-objcopy.exe"].iter().any(|tool| tools.join(tool).is_file()))
}

/// The path that the compiler in use prints.
fn rustc(args: &[&str]) -> Option<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output =
        Command::new(rustc).args(args).current_dir(workspace().ok()?).stderr(Stdio::inherit()).output().ok()?;
    let path = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    Some(path.trim_end().into())
}

/// Directories and the names of code and variables in them: Debian, Fedora, Arch, Homebrew, QEMU's own.
const FIRMWARE: [(&str, &str, &str); 9] = [
    ("/usr/share/OVMF", "OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF", "OVMF_CODE.fd", "OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf", "OVMF_CODE.fd", "OVMF_VARS.fd"),
    ("/usr/share/edk2/x64", "OVMF_CODE.4m.fd", "OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64", "OVMF_CODE.fd", "OVMF_VARS.fd"),
    ("/opt/homebrew/share/qemu", "edk2-x86_64-code.fd", "edk2-i386-vars.fd"),
    ("/home/linuxbrew/.linuxbrew/share/qemu", "edk2-x86_64-code.fd", "edk2-i386-vars.fd"),
    ("/usr/local/share/qemu", "edk2-x86_64-code.fd", "edk2-i386-vars.fd"),
    ("/usr/share/qemu", "edk2-x86_64-code.fd", "edk2-i386-vars.fd"),
];

fn find_firmware() -> Option<Firmware> {
    let known = FIRMWARE.iter().map(|(directory, code, vars)| {
        let directory = Path::new(directory);
        Firmware { code: directory.join(code), vars: directory.join(vars) }
    });
    known.into_iter().find(|firmware| firmware.code.is_file() && firmware.vars.is_file())
}

fn installers() -> Installers {
    let has = |program: &str| which::which(program).is_ok();
    let packages = PackageManager::find(has);
    let root = match packages {
        Some(PackageManager::Brew) => Root::NotNeeded,
        _ if is_root() => Root::Already,
        _ if !has("sudo") => Root::Never,
        _ if is_terminal() => Root::Sudo,
        _ => Root::SudoUnasked,
    };
    Installers { rustup: has("rustup"), packages, root }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn is_terminal() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

fn install(missing: &[Need]) -> Result<()> {
    let installers = installers();
    if env::var_os("KSLAB_NO_INSTALL").is_some_and(|value| value == "1") {
        bail!("{} (KSLAB_NO_INSTALL=1 forbids to do it from here)", installers.advice(missing));
    }
    let commands = installers.plan(missing).map_err(anyhow::Error::msg)?;
    let names: Vec<_> = missing.iter().map(|need| need.name()).collect();
    let lines: String = commands.iter().map(|command| format!("    {}\n", command.join(" "))).collect();
    // Not by `eprint!`: in a test that would be kept back, and the question must be seen.
    write!(io::stderr(), "Missing: {}. To be run:\n{lines}", names.join(" and "))?;
    if is_terminal() && !agreed()? {
        bail!("{}", installers.advice(missing));
    }
    commands.iter().try_for_each(|command| execute(command))
}

fn agreed() -> Result<bool> {
    write!(io::stderr(), "Go ahead? [y/N] ")?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

fn execute(command: &[String]) -> Result<()> {
    let [program, args @ ..] = command else { return Ok(()) };
    let line = command.join(" ");
    // Standard output is the report's alone.
    let status = Command::new(program).args(args).current_dir(workspace()?).stdout(io::stderr()).status();
    let status = status.with_context(|| format!("cannot run `{line}`"))?;
    ensure!(status.success(), "`{line}` failed ({status}): install it by hand and start again");
    Ok(())
}
