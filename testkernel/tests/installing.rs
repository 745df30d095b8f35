//! The launcher on machines that lack something: PATH leads to what a test has put there, and nowhere else.
#![cfg(unix)]

use std::{
    fs::{self, File, Permissions},
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

/// A machine with the programs that a test puts there.
struct Host {
    programs: PathBuf,
}

impl Host {
    fn new(name: &str) -> Self {
        let programs = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&programs);
        fs::create_dir_all(&programs).unwrap();
        for tool in ["env", "ln", "mkdir", "mv", "rustc", "sleep"] {
            symlink(which::which(tool).unwrap(), programs.join(tool)).unwrap();
        }
        Self { programs }
    }

    /// A machine on which there is nothing to compile any more.
    fn with_a_kernel(name: &str) -> Self {
        testkernel::host::kernel().unwrap();
        Self::new(name)
    }

    /// Puts a script there, in place of a link to the machine's own program.
    fn program(&self, name: &str, script: &str) {
        let path = self.programs.join(name);
        let _ = fs::remove_file(&path);
        // A new file: nothing is ever written through a link.
        let mut file = File::create_new(&path).unwrap();
        write!(file, "#!/bin/sh\n{script}\n").unwrap();
        file.set_permissions(Permissions::from_mode(0o755)).unwrap();
    }

    /// Puts a compiler there whose libraries for the target are in `libraries` and whose sources are nowhere.
    fn compiler(&self, libraries: &Path) {
        let rustc = which::which("rustc").unwrap();
        let (libraries, rustc) = (libraries.display(), rustc.display());
        self.program(
            "rustc",
            &format!(
                "case $* in '--print sysroot') echo /nowhere;; \
                '--print target-libdir --target x86_64-unknown-none') echo {libraries};; *) exec {rustc} \"$@\";; esac"
            ),
        );
    }

    fn launcher(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_testkernel"));
        command
            .args(args.split_whitespace())
            .env("PATH", &self.programs)
            .env_remove("KSLAB_NO_INSTALL")
            .env_remove("RUSTC")
            .stdin(Stdio::null());
        command
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn where_it_may_not_install_one_line_says_what_is_missing() {
    let host = Host::new("forbidden");
    host.program("apt-get", "exit 1");
    host.program("id", "echo 1000");
    let output = host.launcher("").env("KSLAB_NO_INSTALL", "1").output().unwrap();
    let told = stderr(&output);
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    for part in ["error: QEMU", "apt-get install", "qemu-system-x86", "KSLAB_NO_INSTALL"] {
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn where_there_is_nothing_to_install_with_one_line_says_so() {
    let output = Host::new("bare").launcher("").output().unwrap();
    let told = stderr(&output);
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    assert!(told.contains("QEMU") && told.contains("https://www.qemu.org"), "{told}");
}

#[test]
fn what_is_missing_is_installed_and_used() {
    let host = Host::with_a_kernel("installing");
    let qemu = host.programs.join("qemu-system-x86_64");
    host.program("id", "echo 0");
    host.program("fake", "echo no machine today >&2; exit 7");
    let install = format!("echo \"$DEBIAN_FRONTEND $*\"; case $1 in install) ln -s fake {};; esac", qemu.display());
    host.program("apt-get", &install);
    let output = host.launcher("--ktap").output().unwrap();
    let (report, told) = (String::from_utf8_lossy(&output.stdout), stderr(&output));
    assert!(told.contains("    env DEBIAN_FRONTEND=noninteractive apt-get update\n"), "{told}");
    assert!(told.contains("\nnoninteractive update\nnoninteractive install --yes"), "{told}");
    assert!(report.starts_with("KTAP version 1\n"), "{report}");
    assert!(report.contains(": QEMU ended with code 7: no machine today\nnot ok 1 "), "{report}");
    assert_eq!(output.status.code(), Some(1), "{told}");
}

#[test]
fn an_install_that_fails_is_told() {
    let host = Host::new("failing");
    host.program("id", "echo 0");
    host.program("apt-get", "exit 100");
    let told = stderr(&host.launcher("").output().unwrap());
    assert!(told.contains("error: `env DEBIAN_FRONTEND=noninteractive apt-get update` failed"), "{told}");
}

#[test]
fn a_missing_target_is_installed_by_rustup() {
    let host = Host::with_a_kernel("target");
    let libraries = host.programs.join("libraries");
    host.compiler(&libraries);
    host.program("rustup", &format!("echo \"rustup $*\"; mkdir {}", libraries.display()));
    let output = host.launcher("--list").output().unwrap();
    let told = stderr(&output);
    assert!(told.contains("\nrustup target add x86_64-unknown-none\n"), "{told}");
    assert_eq!(output.status.code(), Some(0), "{told}");
}

#[test]
fn without_target_rustup_and_sources_one_line_says_what_to_install() {
    let host = Host::new("distribution");
    host.compiler(Path::new("/nowhere"));
    let output = host.launcher("--list").output().unwrap();
    let told = stderr(&output);
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{told}");
    assert!(told.contains("https://rustup.rs") && told.contains("rust-src"), "{told}");
}

/// Also where it did not end the line.
#[test]
fn what_a_machine_said_before_it_hung_is_shown() {
    let host = Host::with_a_kernel("silent");
    host.program("qemu-system-x86_64", "printf 'one\\r\\ntwo'; exec sleep 100");
    let output = host.launcher("--timeout 1 traps::a_stack_overflow").output().unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    assert!(report.contains(": no progress for 1 s\n  | one\n  | two\n"), "{report}");
}

#[test]
fn a_machine_that_prints_without_end_hangs_too() {
    let host = Host::with_a_kernel("talking");
    host.program("qemu-system-x86_64", "while :; do echo and so on; done");
    let output = host.launcher("--timeout 1 --ktap traps::a_stack_overflow").output().unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    assert!(report.contains(": no progress for 1 s\nnot ok 1 "), "{report}");
}

/// The machine must not go on when the launcher is killed and so cannot end it.
#[test]
#[cfg(target_os = "linux")]
fn the_machine_ends_with_the_launcher() {
    let host = Host::with_a_kernel("killed");
    let number = host.programs.join("number");
    host.program("qemu-system-x86_64", &format!("echo $$ > {}.new\nmv {0}.new {0}\nexec sleep 100", number.display()));
    let mut launcher = host.launcher("--ktap").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let machine = wait_until(|| fs::read_to_string(&number).ok());
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let status = PathBuf::from("/proc").join(machine.trim()).join("stat");
    wait_until(|| fs::read_to_string(&status).map_or(true, |stat| stat.contains(") Z ")).then_some(()));
}

/// Asks until there is an answer, or a minute has passed.
#[cfg(target_os = "linux")]
fn wait_until<T>(ask: impl Fn() -> Option<T>) -> T {
    for _ in 0..6000 {
        if let Some(answer) = ask() {
            return answer;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("what the test waits for does not come");
}
