//! The kernel: its tests, and the runner that reports on them; and programs that it runs instead.

mod program;
mod programs;
mod report;
mod runner;
mod selection;
mod tests;

use kernel::{BootInfo, cmdline};
use spin::Once;

static BOOT_INFO: Once<&BootInfo> = Once::new();

/// Runs the tests or programs that the command line asks for, and ends the machine.
pub fn main(boot_info: &'static BootInfo) -> ! {
    BOOT_INFO.call_once(|| boot_info);
    match cmdline::value("programs") {
        Some(list) => program::run(list),
        None => runner::run(),
    }
}

/// What the loader said about the machine.
fn boot_info() -> &'static BootInfo {
    BOOT_INFO.get().expect("main has it")
}
