//! Builds the kernel, disk images of it, and the program that misuses allocators.

use std::{
    env,
    io::{self, BufRead, BufReader, IsTerminal, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anstream::adapter::strip_str;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::setup::StandardLibrary;

/// The target that the kernel is compiled for.
pub const TARGET: &str = "x86_64-unknown-none";

/// The root of the workspace that this program was built in.
pub fn workspace() -> Result<&'static Path> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().filter(|root| root.join("Cargo.toml").is_file());
    root.context(concat!(
        "the workspace is no longer around ",
        env!("CARGO_MANIFEST_DIR"),
        ", where this program was built: start it with `cargo run` in the workspace"
    ))
}

/// Builds the kernel, for debugging or for release. Gives its ELF file.
pub fn kernel(library: StandardLibrary, release: bool) -> Result<PathBuf> {
    let mut command = cargo()?;
    command.args(["build", "--package", "testkernel", "--bin", "testkernel", "--target", TARGET]);
    command.arg("--message-format=json-render-diagnostics");
    if release {
        command.arg("--release");
    }
    if library == StandardLibrary::Sources {
        command.args(["-Zbuild-std=core,alloc,compiler_builtins", "-Zbuild-std-features=compiler-builtins-mem"]);
        // The sources belong to this very compiler, so what they ask of a nightly one is in it.
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    let messages = output(command).context("cannot build the kernel")?;
    messages.lines().find_map(executable).context("cargo built no kernel")
}

/// The program that a message of cargo's says it has built.
fn executable(message: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    message["executable"].as_str().map(PathBuf::from)
}

/// Makes a disk image of the kernel at `elf` and its ramdisk for `firmware`, which is `bios` or `uefi`. Gives its path.
pub fn image(elf: &Path, ramdisk: &Path, firmware: &str) -> Result<PathBuf> {
    // TARGET-DIRECTORY/x86_64-unknown-none/PROFILE/testkernel
    let target = elf.ancestors().nth(3).context("the kernel is not in a target directory")?;
    let directory = target.join("image");
    let image = directory.join(firmware).with_extension("img");
    if !directory.exists() {
        eprintln!("The first disk image takes minutes: its loader has to be built.");
    }
    let mut command = cargo()?;
    command.args("run --locked --release --manifest-path testkernel/image/Cargo.toml".split(' '));
    command.arg("--target-dir").arg(&directory);
    command.arg("--").arg("--kernel").arg(elf).arg("--ramdisk").arg(ramdisk).arg(format!("--{firmware}")).arg(&image);
    // The loader uses nightly features. It is built by cargos in this cargo, which must not wait for its directory.
    command.env("RUSTC_BOOTSTRAP", "1").env_remove("CARGO_TARGET_DIR").env_remove("CARGO_BUILD_TARGET_DIR");
    output(command).context("cannot make the disk image")?;
    Ok(image)
}

/// Builds the program that misuses allocators, as a reader would who depends on them. Gives its path.
pub fn peers() -> Result<PathBuf> {
    // TARGET-DIRECTORY/PROFILE/testkernel
    let launcher = env::current_exe()?;
    let target = launcher.ancestors().nth(2).context("this program is not in a target directory")?;
    let mut command = cargo()?;
    command.args("build --locked --release --manifest-path testkernel/peers/Cargo.toml".split(' '));
    command.arg("--message-format=json-render-diagnostics").arg("--target-dir").arg(target.join("peers"));
    let messages = output(command).context("cannot build the program that misuses allocators")?;
    messages.lines().find_map(executable).context("cargo built no program that misuses allocators")
}

/// Cargo in the workspace, free of settings that are meant for the host.
fn cargo() -> Result<Command> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()?);
    // Flags from the environment would replace those that .cargo/config.toml has for the kernel.
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        command.env_remove(variable);
    }
    if io::stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    Ok(command)
}

/// What cargo prints on its standard output. Its progress is passed on, but not that it has finished.
fn output(mut command: Command) -> Result<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stderr = child.stderr.take();
    let progress = thread::spawn(move || stderr.map(pass_on));
    let output = child.wait_with_output()?;
    // A thread that has panicked has said so.
    let _ = progress.join();
    ensure!(output.status.success(), "cargo failed ({})", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn pass_on(progress: impl Read) {
    for line in BufReader::new(progress).lines().map_while(Result::ok) {
        if !["Finished `", "Running `"].iter().any(|word| strip_str(&line).to_string().trim_start().starts_with(word)) {
            eprintln!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_found_in_what_cargo_says() {
        let other = r#"{"reason":"compiler-artifact","target":{"name":"kslab"},"executable":null}"#;
        let kernel = r#"{"reason":"compiler-artifact","target":{"name":"testkernel"},"executable":"/t/testkernel"}"#;
        assert_eq!(executable(other), None);
        assert_eq!(executable(kernel), Some("/t/testkernel".into()));
        assert_eq!(executable("warning"), None);
    }
}
