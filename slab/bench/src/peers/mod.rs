//! The allocators, each as a program would have it: a static behind [`GlobalAlloc`].
//!
//! Each is a type without a value, so that calls of it are as those of a program's own `static`. Those that a program has to
//! put a lock around have [`Locked`], the same for each.

mod buddy_slab;
mod dlmalloc;
pub mod frames;
mod kslab;
mod limits;
mod locked;
mod operating_system;
mod regions;
mod slabmalloc;

use std::alloc::GlobalAlloc;

use crate::arena::Arena;
use crate::workloads::{HeapRun, heap_run};

/// An allocator of blocks.
pub trait Peer: GlobalAlloc + Copy + Default + Send + Sync + 'static {
    /// Takes the arena, before the first block is asked for; those that take their memory from the operating system leave it.
    fn set_up(arena: Arena);
}

/// What a row stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// kslab, which is compared with the others.
    Subject,
    /// kslab, with calls that the others do not have.
    SubjectInBulk,
    /// A published allocator.
    Peer,
    /// Not an allocator that anybody could use: what is spent on the harness, and the least that could be reached.
    Bound,
}

/// A row of the tables.
#[derive(Debug, Clone, Copy)]
pub struct Entry<R> {
    pub name: &'static str,
    pub role: Role,
    pub run: R,
}

/// The allocators of blocks.
pub const HEAPS: [Entry<HeapRun>; 14] = [
    heap::<limits::Nothing>("harness alone", Role::Bound),
    heap::<limits::Magazines>("bare magazines", Role::Bound),
    heap::<kslab::Kslab>("kslab", Role::Subject),
    heap::<buddy_slab::BuddySlab>("buddy-slab-allocator", Role::Peer),
    heap::<regions::BuddySystem>("buddy_system_allocator", Role::Peer),
    heap::<dlmalloc::Dlmalloc>("dlmalloc", Role::Peer),
    heap::<operating_system::Glibc>("glibc", Role::Peer),
    heap::<regions::LinkedList>("linked_list_allocator", Role::Peer),
    heap::<operating_system::Mimalloc>("mimalloc", Role::Peer),
    heap::<regions::Rlsf>("rlsf", Role::Peer),
    heap::<regions::SlabAllocator>("slab_allocator_rs", Role::Peer),
    heap::<slabmalloc::Slabmalloc>("slabmalloc", Role::Peer),
    heap::<operating_system::Snmalloc>("snmalloc-rs", Role::Peer),
    heap::<regions::Talc>("talc", Role::Peer),
];

const fn heap<A: Peer>(name: &'static str, role: Role) -> Entry<HeapRun> {
    Entry { name, role, run: heap_run::<A> }
}

/// A type without a value that passes everything on to a static.
macro_rules! peer {
    ($(#[$doc:meta])* $name:ident, $heap:expr, |$arena:pat_param| $set_up:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default)]
        pub struct $name;

        // SAFETY: what it passes on to is an allocator.
        unsafe impl std::alloc::GlobalAlloc for $name {
            #[inline]
            unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
                // SAFETY: passed on to the caller.
                unsafe { std::alloc::GlobalAlloc::alloc(&$heap, layout) }
            }

            #[inline]
            unsafe fn dealloc(&self, block: *mut u8, layout: std::alloc::Layout) {
                // SAFETY: passed on to the caller.
                unsafe { std::alloc::GlobalAlloc::dealloc(&$heap, block, layout) }
            }
        }

        impl $crate::peers::Peer for $name {
            fn set_up($arena: $crate::arena::Arena) {
                $set_up
            }
        }
    };
}
use peer;
