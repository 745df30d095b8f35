//! The tests that run in the kernel.

mod boot;
mod broken;
mod collections;
mod frames;
mod heap;
mod map;
mod support;
mod timer;
mod traps;
