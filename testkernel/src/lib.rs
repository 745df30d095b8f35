//! A kernel whose suite of tests runs in QEMU, and the program that builds it, boots it and reads its report.
//!
//! The package is compiled twice: for the bare machine it is the kernel ([`guest`]), for the host the program ([`host`]).

#![cfg_attr(target_os = "none", no_std)]

extern crate alloc;

#[cfg(target_arch = "x86_64")]
pub mod guest;
#[cfg(not(target_os = "none"))]
pub mod host;
pub mod protocol;
