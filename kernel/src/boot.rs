//! From the loader to the program's main function.

pub mod disk;
mod paging;
pub mod pvh;

use bootloader_api::BootInfo;
use x86_64::instructions::interrupts;
use x86_64::registers::control::{Cr0, Cr0Flags};

use crate::stack::Stack;
use crate::{cmdline, cpus, heap, memory, ramdisk, serial, threads, timer, traps};

/// What the kernel runs on from the first instruction of Rust code on.
pub(crate) static STACK: Stack<BOOT_STACK_SIZE> = Stack::new();

const BOOT_STACK_SIZE: usize = 128 * 1024;

/// Defines the function that the kernel runs when the machine is up: `fn(&'static BootInfo) -> !`.
///
/// Interrupts are on when it starts.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        #[unsafe(export_name = "kernel_main")]
        fn kernel_main(boot_info: &'static $crate::BootInfo) -> ! {
            let main: fn(&'static $crate::BootInfo) -> ! = $main;
            main(boot_info)
        }
    };
}

#[cfg(target_os = "none")]
unsafe extern "Rust" {
    /// What [`entry!`] defines.
    safe fn kernel_main(boot_info: &'static BootInfo) -> !;
}

#[cfg(not(target_os = "none"))]
fn kernel_main(_: &'static BootInfo) -> ! {
    unreachable!("a host program never boots")
}

/// What both ways in do first: from here on the kernel can say what went wrong.
fn start() {
    cpus::start_boot_cpu();
    traps::load_table();
    serial::init();
    memory::device::set_attributes();
    // SAFETY: this takes rights away from the kernel only: it can then not write to its read-only pages.
    unsafe { Cr0::update(|flags| flags.insert(Cr0Flags::WRITE_PROTECT)) };
    threads::user::prepare_cpu();
}

/// Brings up the machine from what the loader says about it, then runs the program's main function.
///
/// `line` is the command line.
///
/// # Safety
///
/// Runs once, with interrupts off, after [`start`], on page tables that map all physical memory at
/// [`memory::PHYSICAL_MEMORY`]. `boot_info` must be true: memory that it calls usable is unused, and a ramdisk is mapped and
/// not usable.
unsafe fn enter(boot_info: &'static BootInfo, line: &'static [u8]) -> ! {
    cmdline::init(line);
    // SAFETY: the tables map physical memory where they should, and the loader is done with them.
    unsafe { memory::init() };
    // SAFETY: the loader has put it where it says, for us alone.
    unsafe { ramdisk::init(boot_info) };
    // SAFETY: usable memory is unused and mapped, as the caller promises.
    unsafe { heap::init(boot_info) };
    cpus::this().lend_number();
    memory::device::init(boot_info);
    cpus::apic::init();
    timer::init();
    threads::init();
    interrupts::enable();
    cpus::start_all(boot_info);
    kernel_main(boot_info)
}
