//! The pages of guarded objects.
//!
//! Their page tables stay, once there are any: up to 36 KiB.

use core::ptr::NonNull;

use kslab::Frame;
use kslab::check::GuardPages;
use x86_64::instructions::interrupts;
use x86_64::structures::paging::{Mapper, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

use super::{DATA, page, tables, unmap_unflushed};
use crate::cpus;
use crate::heap::HEAP;

/// Where they are, and how many addresses there are: for 1024 objects.
const START: NonNull<u8> = NonNull::new(0xffff_c000_0000_0000_usize as *mut u8).expect("not null");
const ADDRESSES: usize = (1024 * 3 + 1) * 4096;

/// Maps the objects that the check `guard` is about.
///
/// With interrupts off they are not unmapped: another CPU may then wait for a lock of the caller's with its interrupts off,
/// and would not answer.
#[derive(Debug)]
pub(crate) struct GuardedObjects;

// SAFETY: the addresses are for nothing else, as the table of addresses says; what is unmapped, every CPU has forgotten.
unsafe impl GuardPages for GuardedObjects {
    fn addresses(&self) -> (NonNull<u8>, usize) {
        (START, ADDRESSES)
    }

    fn map(&self, start: NonNull<u8>, first: Frame, pages: usize) -> bool {
        let start = VirtAddr::from_ptr(start.as_ptr());
        let first = PhysFrame::containing_address(PhysAddr::new(first.address()));
        for index in 0..pages {
            let frame = first + index as u64;
            // SAFETY: the heap has set the frame aside for its one object here.
            match unsafe { tables().lock().map_to(page(start, index), frame, DATA, &mut HEAP.frames()) } {
                Ok(flush) => flush.flush(),
                Err(_) => {
                    // Nobody knows of these pages yet, and no CPU has used them.
                    (0..index).for_each(|index| _ = unmap_unflushed(page(start, index)));
                    return false;
                }
            }
        }
        true
    }

    fn unmap(&self, start: NonNull<u8>, pages: usize) -> bool {
        if !interrupts::are_enabled() {
            return false;
        }
        let start = VirtAddr::from_ptr(start.as_ptr());
        (0..pages).for_each(|index| _ = unmap_unflushed(page(start, index)));
        cpus::tlb::flush_everywhere();
        true
    }
}
