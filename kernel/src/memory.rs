//! The kernel's address space.
//!
//! | addresses | what |
//! |---|---|
//! | from [`PHYSICAL_MEMORY`] | all physical memory, and at least the first 4 GiB of physical addresses |
//! | from `0xffff_9000_0000_0000` | registers of devices, uncached, each at its physical address plus this |
//! | from `0xffff_a000_0000_0000` | stacks of CPUs and threads, each with a page below it that is not mapped |
//! | from `0xffff_ffff_8000_0000` | the kernel's image |
//!
//! Where the `bootloader` crate loaded the kernel, its tables map a few pages more, all below half of the address space.

use crate::cpus::Cpus;
use kslab::IrqLock;
use spin::Once;
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::heap::HEAP;
use crate::{cpus, stop, traps};

/// Physical address 0 is mapped here.
pub const PHYSICAL_MEMORY: u64 = 0xffff_8000_0000_0000;

/// The registers of devices are mapped here, each at its physical address plus this.
const DEVICES: u64 = 0xffff_9000_0000_0000;

static TABLES: Once<IrqLock<Cpus, OffsetPageTable<'static>>> = Once::new();

/// The pointer at which the byte at the physical address `address` is mapped.
pub const fn physical(address: u64) -> *mut u8 {
    (PHYSICAL_MEMORY + address) as *mut u8
}

/// Takes over the page tables that are in force, and unmaps the guard page below every static stack.
///
/// # Safety
///
/// The page tables in force must map physical memory at [`PHYSICAL_MEMORY`], and nothing else may change them.
pub(crate) unsafe fn init() {
    TABLES.call_once(|| {
        let (root, _) = Cr3::read();
        let root: *mut PageTable = physical(root.start_address().as_u64()).cast();
        // SAFETY: CR3 holds the address of the table in force, and the caller gives it to us alone, with all below it.
        IrqLock::new(unsafe { OffsetPageTable::new(&mut *root, VirtAddr::new(PHYSICAL_MEMORY)) })
    });
    for (_, guard) in traps::guards() {
        let page = Page::<Size4KiB>::containing_address(guard);
        match tables().lock().unmap(page) {
            Ok((_, flush)) => flush.flush(),
            Err(error) => stop::stop(format_args!("guard page {guard:#x} was not unmapped: {error:?}"), |_| Ok(())),
        }
    }
}

/// Maps the page of device registers at the physical address `address`, uncached, and returns where.
///
/// Stops the kernel when there is no memory for a page table.
///
/// # Safety
///
/// There must be device registers at that address, and no memory.
pub(crate) unsafe fn map_device(address: PhysAddr) -> VirtAddr {
    let virtual_address = VirtAddr::new(DEVICES + address.as_u64());
    let page = Page::<Size4KiB>::containing_address(virtual_address);
    let frame = PhysFrame::containing_address(address);
    let flags = PageTableFlags::PRESENT
        | PageTableFlags::WRITABLE
        | PageTableFlags::NO_EXECUTE
        | PageTableFlags::NO_CACHE
        | PageTableFlags::WRITE_THROUGH;
    // SAFETY: the page lies where only devices are mapped, each at its own place, so it aliases no memory.
    match unsafe { tables().lock().map_to(page, frame, flags, &mut HEAP.frames()) } {
        Ok(flush) => flush.flush(),
        Err(MapToError::PageAlreadyMapped(_)) => {}
        Err(error) => stop::stop(format_args!("device at {address:#x} was not mapped: {error:?}"), |_| Ok(())),
    }
    virtual_address
}

/// Maps `pages` new page frames, one by one and in no order, from `start` on: writable, not executable, for the kernel
/// alone. Whether it has: where there is no memory, or a page is mapped already, nothing is mapped.
pub fn map_new(start: VirtAddr, pages: usize) -> bool {
    let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::NO_EXECUTE;
    for done in 0..pages {
        let page = page(start, done);
        let mut frames = HEAP.frames();
        let frame: Option<PhysFrame<Size4KiB>> = frames.allocate_frame();
        // SAFETY: the frame is new, so that nothing else refers to its memory.
        let mapped = frame.map(|frame| unsafe { tables().lock().map_to(page, frame, flags, &mut frames) });
        match (mapped, frame) {
            (Some(Ok(flush)), _) => flush.flush(),
            (_, frame) => {
                // SAFETY: it is not mapped.
                frame.into_iter().for_each(|frame| unsafe { frames.deallocate_frame(frame) });
                unmap(start, done);
                return false;
            }
        }
    }
    true
}

/// Undoes [`map_new`]: the page frames are free again, when no CPU can reach them any more. Page tables stay. Pages that
/// are not mapped are left out.
///
/// The caller holds no lock that another CPU may spin on with interrupts off: this waits for all of them.
pub fn unmap(start: VirtAddr, pages: usize) {
    const BATCH: usize = 64;
    for first in (0..pages).step_by(BATCH) {
        let batch = first..pages.min(first + BATCH);
        let mut unmapped = [None; BATCH];
        for (index, frame) in batch.zip(&mut unmapped) {
            // Flushed below, for all at once.
            *frame = tables().lock().unmap(page(start, index)).ok().map(|(frame, flush)| {
                flush.ignore();
                frame
            });
        }
        cpus::tlb::flush_everywhere();
        for frame in unmapped.into_iter().flatten() {
            // SAFETY: it was allocated for its page, which is gone.
            unsafe { HEAP.frames().deallocate_frame(frame) };
        }
    }
}

fn page(start: VirtAddr, index: usize) -> Page<Size4KiB> {
    Page::containing_address(start) + index as u64
}

fn tables() -> &'static IrqLock<Cpus, OffsetPageTable<'static>> {
    TABLES.get().expect("memory::init comes first")
}
