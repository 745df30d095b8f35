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
//! Before `init` an allocation fails; it never crashes. Kernels differ, and so there are other ways in:
//!
//! | what the kernel has | call |
//! |---|---|
//! | the firmware's memory map, all of it mapped at one offset | [`Heap::init`] |
//! | the same, and a part that it keeps for itself | [`Heap::init`], with that part as [`memory::Region::reserved`] |
//! | a range of virtual addresses and no more, one page or many | [`Heap::init_range`] |
//! | more memory, later, adjacent or not | [`Heap::add`], [`Heap::add_range`] |
//! | an allocator of page frames of its own, which keeps the map | [`Heap::set_source`] |
//! | a heap already, and wants another with a limit, for a process | [`Heap::create_heap`] |
//!
//! # What there is
//!
//! - [`Heap`]: `GlobalAlloc`, and `allocator-api2` by feature, over 64 size classes and whole page frames; and blocks that are known
//!   [by their pointer alone](Heap::block_size), for a `free` that is told no layout, as [other systems](#features) have it.
//! - [`ObjectCache`] and [`Cache`]: caches of objects that stay constructed while they are free, with limits and [`Reserve`]s.
//! - [`Frames`]: page frames, single ones, runs and blocks of up to 1 GiB, from zones that devices can reach.
//! - [`Arena`]: ranges of integers, such as virtual addresses, process ids or ports.
//! - [`reclaim`]: what is done when memory is short, and the callbacks by which a kernel takes part in it.
//! - [`stats`] and [`Heap::verify`]: what is where, and whether everything is as it must be.
//! - [`guide`]: for students, from a program's first `brk` down to slabs and page frames.
//!
//! # Theory
//!
//! The design is that of two papers: J. Bonwick, *The Slab Allocator: An Object-Caching Kernel Memory Allocator*
//! (USENIX Summer 1994), and J. Bonwick and J. Adams, *Magazines and Vmem: Extending the Slab Allocator to Many CPUs
//! and Arbitrary Resources* (USENIX 2001). The buddy system beneath is D. Knuth's (*The Art of Computer Programming*,
//! vol. 1, 2.5), made lazy as T. P. Lee and R. E. Barkley did (*A Watermark-Based Lazy Buddy System for Kernel Memory
//! Allocation*, USENIX Summer 1989). From the top down:
//!
//! | layer | module | what it does |
//! |---|---|---|
//! | heap | `heap` | finds the size class of a request; large ones get whole page frames |
//! | magazines | `cache::magazines` | for each CPU a few free objects of each cache, and a depot where CPUs exchange them |
//! | slabs | `cache::slabs` | equal objects, cut from slabs; a slab is a run of page frames |
//! | page frames | `frames` | three zones, each a binary buddy system, with a record for each frame that says who owns it |
//! | memory map | [`memory`] | firmware's regions, made sorted, disjoint and page-aligned |
//!
//! Beside them are `arena`; [`reclaim`]; [`platform`], what the kernel lends; `lock`, a spin lock that keeps interrupts
//! off;
//! [`fault`], the report of a bad free; and [`stats`], the numbers. Calls go down only.
//!
//! ## An allocation's way
//!
//! A request of up to 8 KiB goes to the cache of its class. If the CPU's *loaded* magazine has a round, that is the
//! object: a few instructions with interrupts off, and no lock. If not, the *previous* magazine is tried, and then a
//! full one is fetched from the depot. Only if there is none does the slab layer take an object from the fullest slab
//! that has one, with some more for half of the magazine, and only if there is none does it make a slab. A free goes the
//! same way back.
//!
//! How many rounds a magazine has depends on the object's size and grows where CPUs meet at a depot or give it much. What was not
//! needed during an interval, full magazines and empty slabs, goes back to the page frames when the kernel calls
//! [`Heap::maintain`]; when memory is short everything of that kind does, by itself.
//!
//! ## The states of an object
//!
//! | state | who has it |
//! |---|---|
//! | raw | its slab; it was never allocated |
//! | free | its slab; it is constructed, if the cache constructs |
//! | cached | a magazine; constructed |
//! | deferred | nobody; it was freed in an NMI, and its slab takes it back later |
//! | used | whoever allocated it |
//! | lent | the same, for a smaller size class that had no memory |
//! | audited | the same, while it is checked |
//! | quarantined | nobody; it was freed with checks, and waits |
//! | kept | nobody, for good: something wrote over it |
//!
//! A byte outside the object says which, and is set and tested at each step. Without checks the allocator never writes into
//! an object, neither while it is used nor while it is free: what a constructor or a user leaves there stays.
//!
//! In a release build an allocation and its free take 38 instructions where the compiler knows the layout and 64 where it does
//! not, 10 and 11 of them for the refusal of bad frees; where what was allocated last is not freed first, 97 and 33, and in
//! another than the largest range of memory more.
//! `cargo bench --manifest-path slab/bench/Cargo.toml --bench instructions` counts them, through `GlobalAlloc` and with no
//! interrupts to disable, and its loop in: 4 instructions, or 16. The share is what they are more than without those lines.
//!
//! ## Worst cases
//!
//! No allocation or free takes longer because there are more objects, slabs, caches or page frames. Longest are, while memory is
//! not short:
//!
//! | operation | what bounds it | instructions |
//! |---|---|---|
//! | an object from a magazine, and back | nothing is repeated | 60 |
//! | an object from a slab | 16 objects at most are taken with one hold of a lock | 640 |
//! | the same, from a new slab | its page frames, 1024 at most, each of whose records is written | 3,700 |
//! | a free that needs an empty magazine | whose memory may be a new slab | 4,000 |
//! | the same, where the depot is full | 127 objects at most go back, 32 with each hold of a lock; the slabs that are empty then leave, and each CPU is told | 8,000 |
//! | a block of page frames, and back | 18 orders at most to cut or to merge; as many records are written as it has frames | 77 to 490 |
//!
//! `cargo run -- --bench` counts them in the kernel of the tests, which is built with link-time optimisation: without it `alloc` and
//! `dealloc` are not inlined, and the first line has 112. See `the_slow_path` and `page_frames`; `what_is_alive_costs_nothing`
//! compares them with those among 200,000 objects and 50 caches. Where memory is short, an allocation asks others to give back what
//! they have, before it fails. And what gives back or looks at all that there is takes as long as that is: [`Heap::maintain`],
//! [`Heap::shrink`], [`Heap::verify`], tables, walks, the end of a cache or heap, and a CPU's first exchange of a magazine after another
//! CPU has called for memory.
//!
//! ## The frame record
//!
//! Every page frame has a record of sixteen bytes, 0.39 % of memory, in tables of their own. It makes a free safe and
//! short: from the pointer's frame to its cache in a few loads, with no look at the memory that the pointer points to.
//! It is also how two buddies know each other, so that free memory is never touched. The largest range of the first
//! memory map has its records in one table; for all other memory they are in a radix tree of page frames, so a hole in
//! the map costs nothing.
//!
//! ## Locks
//!
//! A CPU's magazines and its stock of page frames have no lock: only that CPU touches them, with interrupts off. There
//! is a lock for the registry of caches, for each depot, each slab list, each arena and each zone of page frames, and
//! they are taken in that order. Each disables interrupts on its CPU while it is held, so an interrupt handler may
//! allocate and free. No panic message, constructor, callback or formatter runs under a lock. Debug builds check the
//! order, and report a lock that is taken twice or held too long, with its name.
//!
//! An NMI handler may allocate and free as well: it never waits for a lock, gets only what can be had at once, and what it
//! frees is taken in later. [`platform`] says how, and why what a CPU has for itself needs no lock.
//!
//! Reports take no lock that can be held for good: those of bad frees take none, or say *another cache* instead of its
//! name, and counts show as 0 where their lock cannot be had. Nothing of that allocates.
//!
//! ## Bad frees
//!
//! In release builds too, a free is refused before it has changed anything if the pointer is free already, was never
//! allocated, is not the start of an allocation or not this allocator's, belongs to another cache, or if its size class
//! is another than the layout's. The [report](fault) names pointer, cache, object, slot and caller, and the kernel stops
//! with it, or goes on if its [handler](Heap::set_fault_handler) says so. Not caught are a second free after the slot has
//! been allocated anew, a size or an alignment that leads to the same size class, and writes outside an object or after its
//! free: those are for the [checks](check), which are switched on cache by cache at run time.
//!
//! What something wrote over of the allocator's own data, a slab's header, a magazine, a link of free page frames, is
//! reported when it is come upon, before a link of it is followed.
//!
//! # Limits
//!
//! - 64-bit machines, 4 KiB pages, memory below 16 TiB, all of it mapped at one offset; or ranges of virtual addresses that
//!   lie within 8 TiB of the first.
//! - A block of the heap has at most 1 GiB, an object of a cache at most 4 MiB.
//! - A free looks at the state of its object and changes it with interrupts off, but by no locked instruction, which would
//!   cost more than all else. Of two CPUs that free one object within the same few instructions both may succeed. Then the
//!   second is reported when it hands the object out or gives it to its slab; in between the object can have two owners.
//! - A bad free reads the record of a page frame while other CPUs may change it. If in those few instructions the frame becomes
//!   part of a slab of just the cache that is named, the record's old content may be taken for where that slab's header and
//!   first slot are.
//! - Release builds believe what a magazine or a stock of page frames holds, as far as its count is plausible. Builds with
//!   debug assertions find each round that something has written over; a cache with checks has no magazines in use.
//! - The depot of a cache may hold full magazines of a 32nd of memory until [`Heap::maintain`] is called or memory is short.
//! - A heap with less than 1 MiB, or 64 KiB a CPU, has no magazines: what they hold would be missed.
//! - Magazines of other CPUs are given up when those CPUs next free something or call [`Heap::maintain`], not at once: an
//!   idle CPU should call it now and then, or be made to by an out-of-memory hook. How much that can be is bounded by two
//!   magazines a CPU and cache.
//! - It uses at most 8 KiB of stack below its caller, callbacks, constructors and reports not counted.
//! - Checks are of objects up to 8 KiB of a heap and of those of caches; runs of page frames have none. Pages of their own
//!   have objects up to 8 KiB, as many at a time as the kernel has set addresses aside for.
//! - What one CPU allocates and another frees goes around by the depots and slabs; it never adds up.
//! - The states of a slab's objects lie side by side. CPUs take new objects from different slabs as long as there is
//!   memory for that, but those whose numbers differ by a multiple of 8, and CPUs that free each other's objects, can write
//!   to one cache line.
//!
//! # Features
//!
//! None is on by default.
//!
//! - `allocator-api2`: `Box<T, &Heap>`, `Vec<T, &Heap>` and the like, on stable Rust.
//! - `bootloader_api`: [`memory::Region`] from the memory map of the `bootloader` crate.
//! - `x86_64`: `FrameAllocator` and `FrameDeallocator` of the `x86_64` crate for `&Frames`.
//! - `fault-injection`: makes chosen requests fail, for tests of what a kernel does then.
//! - `systems`: C's `malloc`, Windows' heaps, macOS's zones and BareMetal's pages over a heap; see `systems`.
//!
//! # Where `unsafe` is
//!
//! | module | for |
//! |---|---|
//! | `platform` | switching interrupts |
//! | `frames::{init, records, stock, lend, regions, block, allocate}` | records in the memory that they describe; the contracts of free and add |
//! | `cache::{slab, slabs, magazine, magazines, shared}` | headers, states and rounds in metadata |
//! | `cache::{core, public, typed, reserve}` | constructors, and objects as types |
//! | `cache::{checked, guarded}`, `check::{guard, room, quarantine}` | red zones, patterns and tags in slots |
//! | `fault` | the handler's address |
//! | `heap`, `source` | `GlobalAlloc`, blocks by their pointer, and heaps within heaps |
//! | `systems` | the contracts of free, and handles |
//! | `arena::tags` | boundary tags in page frames |
//!
//! All else denies it: the memory map, orders and zones, the buddy system, the layout of slabs, the sizes of classes
//! and magazines, what is done under pressure, the policy of arenas, and the statistics.

#![cfg_attr(not(test), no_std)]
#![deny(missing_docs)]

pub mod arena;
mod cache;
pub mod check;
pub mod fault;
mod frames;
pub mod guide;
mod heap;
mod inject;
mod lock;
pub mod memory;
#[cfg(all(test, models))]
mod models;
pub mod platform;
pub mod reclaim;
mod source;
pub mod stats;
mod sync;
#[cfg(feature = "systems")]
pub mod systems;
#[cfg(test)]
mod testing;
mod verify;

pub use arena::Arena;
pub use cache::{AllocError, Cache, Caches, InUse, InitFailed, Object, ObjectBox, ObjectCache, Reserve};
pub use frames::{AddError, Frame, FrameBlock, Frames, InitError, Order, RemoveError};
pub use heap::{Heap, SIZES};
#[cfg(feature = "fault-injection")]
pub use inject::{FaultMode, Injector};
pub use lock::{IrqGuard, IrqLock};
pub use source::{ChildHeap, FrameSource};
pub use verify::Broken;

const _: () = assert!(usize::BITS == 64, "kslab is for 64-bit machines");

/// The README's code is tested with the crate's.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
