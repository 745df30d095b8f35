//! The tests that run in the kernel.

mod arenas;
mod boot;
mod broken;
mod caches;
mod collections;
mod frames;
mod heap;
mod heaps;
mod magazines;
mod map;
mod misuse;
mod objects;
mod pressure;
mod stats;
mod support;
mod timer;
mod traps;
mod zones;
