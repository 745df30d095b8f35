//! The kernel: its tests, and the runner that reports on them.

mod report;
mod runner;
mod selection;
mod tests;

use kernel::BootInfo;
use spin::Once;

static BOOT_INFO: Once<&BootInfo> = Once::new();

/// Runs the tests that the command line asks for, and ends the machine.
pub fn main(boot_info: &'static BootInfo) -> ! {
    BOOT_INFO.call_once(|| boot_info);
    runner::run()
}

/// What the loader said about the machine.
fn boot_info() -> &'static BootInfo {
    BOOT_INFO.get().expect("main has it")
}
