//! A minimal x86_64 kernel, as a library: it brings up a machine, and kslab as its heap, for the program that uses it.
//!
//! The program names its main function with [`entry!`]. One ELF file starts two ways that end alike:
//!
//! 1. QEMU loads it directly (`-kernel`, the PVH entry in [`boot::pvh`]);
//! 2. the `bootloader` crate loads it from a BIOS or UEFI disk image ([`boot::disk`]).
//!
//! When main starts, the heap serves allocations, exceptions are reported, interrupts are on, and all [CPUs](cpus) run. All that goes wrong for
//! good (a panic, an exception) ends in [`stop::stop`], with the [calls](mod@backtrace) that led there.
//!
//! The crate also compiles for an x86_64 host, for tools and unit tests. There it never runs.

#![cfg(target_arch = "x86_64")]
#![cfg_attr(not(test), no_std)]
#![warn(missing_docs)]

extern crate alloc;

pub mod backtrace;
pub mod boot;
pub mod cmdline;
pub mod cpus;
pub mod firmware;
pub mod heap;
mod image;
pub mod memory;
pub mod processes;
pub mod qemu;
pub mod ramdisk;
pub mod serial;
mod stack;
pub mod stop;
pub mod symbols;
pub mod threads;
pub mod time;
pub mod timer;
pub mod traps;

pub use backtrace::backtrace;
pub use bootloader_api::BootInfo;
