//! A kernel heap for hobby operating systems: slab caches over a buddy system of page frames.
//!
//! # What it is
//!
//! A kernel gives [`Heap::init`] the memory map that firmware left, and has `Box`, `Vec`, `Arc` and the rest, from all of
//! the machine's memory and with nothing set aside beforehand:
//!
//! ```no_run,standalone_crate
//! # #[cfg(target_arch = "x86_64")] {
//! use kslab::memory::Region;
//! use kslab::platform::X86_64;
//!
//! #[global_allocator]
//! static HEAP: kslab::Heap<X86_64> = kslab::Heap::new();
//!
//! // What the firmware or the boot loader said, in any order.
//! let map = [Region::usable(0, 0x9_fc00), Region::usable(0x10_0000, 255 << 20), Region::reserved(0x20_0000, 0x4_0000)];
//! // Where all physical memory is mapped.
//! let physical_memory = 0xffff_8000_0000_0000_usize as *mut u8;
//! // SAFETY: the map is true, the kernel's own image is reserved in it, and the mapping is there.
//! unsafe { HEAP.init(map, physical_memory) }.expect("memory for a heap");
//! # }
//! ```
//!
//! Before `init` an allocation fails; it never crashes.
//!
//! # Theory
//!
//! The design is that of two papers: J. Bonwick, *The Slab Allocator: An Object-Caching Kernel Memory Allocator* (USENIX
//! Summer 1994), and, for layers still to come, J. Bonwick and J. Adams, *Magazines and Vmem* (USENIX 2001). The buddy
//! system beneath is D. Knuth's (*The Art of Computer Programming*, vol. 1, 2.5). From the top down:
//!
//! | layer | module | what it does |
//! |---|---|---|
//! | heap | `heap` | finds the size class of a request; large ones get whole page frames |
//! | caches | `cache` | equal objects, cut from slabs; a slab is one block of page frames |
//! | page frames | `frames` | a binary buddy system, with a record for each frame that says who owns it |
//! | memory map | [`memory`] | firmware's regions, made sorted, disjoint and page-aligned |
//!
//! Beside them are [`platform`], what the kernel lends; `lock`, a spin lock that keeps interrupts off; `fault`, the report
//! of a bad free; and [`stats`], the numbers. Calls go down only.
//!
//! ## The states of an object
//!
//! A slot of a slab is *free* or *allocated*, and a bit outside the slot says which. Allocating takes the first free slot
//! of a partial slab; freeing sets the bit again. When all of a slab's slots are free, the slab goes back to the page
//! frames at once. The allocator never writes into an object, neither while it is allocated nor while it is free.
//!
//! ## The frame record
//!
//! Every page frame has a record of twelve bytes, 0.3 % of memory, in tables of their own. It makes a free safe and short:
//! from the pointer's frame to its cache in two loads, with no look at the memory that the pointer points to. It is also
//! how two buddies know each other, so that free memory is never touched.
//!
//! ## Locks
//!
//! There is a lock for each cache and one for the page frames, and they are taken in that order. Each disables interrupts
//! on its CPU while it is held, so an interrupt handler may allocate and free. No panic message, callback or formatter runs
//! under a lock. NMI handlers must not call the allocator.
//!
//! ## Bad frees
//!
//! In release builds too, a free is refused before it has changed anything if the pointer is free already, was never
//! allocated, is not the start of an allocation or not this allocator's, or if its size class is another than the
//! layout's. The report is a panic that names the pointer and the reason. Not caught are a second free after the slot has
//! been allocated anew, an alignment that leads to the same size class, and writes outside an object or after its free.
//!
//! # Limits
//!
//! - 64-bit machines, 4 KiB pages, memory below 16 TiB; all of it mapped at one offset.
//! - Requests above 2048 bytes are rounded up to whole page frames, the largest is 1 GiB.
//! - One lock a cache: it is safe on several CPUs, but does not yet scale with them.
//! - Objects are not yet constructed, memory cannot yet be added after `init`.
//!
//! # Features
//!
//! - `allocator-api2`: `&Heap` is an `Allocator` of the crate of that name, for collections in a heap of choice.
//! - `bootloader_api`: [`memory::Region`] from the memory map of the `bootloader` crate.
//! - `fault-injection`: makes chosen allocations of page frames and of objects fail, to test what a kernel does then.
//!
//! # Where `unsafe` is
//!
//! In `platform` (interrupts), `frames` (setting up the records), `cache` (slabs) and `heap` (`GlobalAlloc`). The memory
//! map, the buddy system, the records, the layout of slabs, the size classes and the statistics have none.

#![cfg_attr(not(test), no_std)]
#![deny(missing_docs)]

mod cache;
mod fault;
mod frames;
mod heap;
mod inject;
mod lock;
pub mod memory;
pub mod platform;
pub mod reclaim;
pub mod stats;
#[cfg(test)]
mod testing;
mod verify;

pub use cache::{AllocError, Cache, Caches, InUse, InitFailed, Object, ObjectBox, ObjectCache, Reserve};
pub use frames::{AddError, Frame, FrameBlock, Frames, InitError, Order, RemoveError};
pub use heap::{Heap, SIZES};
#[cfg(feature = "fault-injection")]
pub use inject::{FaultMode, Injector};
pub use lock::{IrqGuard, IrqLock};
pub use verify::Broken;

const _: () = assert!(usize::BITS == 64, "kslab is for 64-bit machines");

/// The README's code is tested with the crate's.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
