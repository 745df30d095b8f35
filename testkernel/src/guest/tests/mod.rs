//! The tests that run in the kernel.

mod arenas;
mod bench;
mod boot;
mod broken;
mod caches;
mod checks;
mod collections;
mod cpus;
mod device;
mod frames;
mod growth;
mod guard;
mod heap;
mod heaps;
#[cfg(debug_assertions)]
mod locks;
mod magazines;
mod map;
mod misuse;
mod objects;
mod pressure;
mod processes;
mod scaling;
mod sharing;
mod stats;
mod steps;
mod stops;
mod storm;
mod support;
mod symbols;
// A host has functions with these names already.
#[cfg(target_os = "none")]
mod systems;
mod threads;
mod timer;
mod traps;
mod zones;
