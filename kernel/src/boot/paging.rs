//! The kernel's page tables where there is no loader to make them.

use core::ops::Range;

use x86_64::structures::paging::mapper::MapToError;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::{image, memory};

/// Hands out page frames one after the other.
#[derive(Debug)]
pub(super) struct EarlyFrames {
    next: u64,
    end: u64,
}

impl EarlyFrames {
    /// Hands out the frames from the address `start` up to the address `end`, both page-aligned.
    ///
    /// # Safety
    ///
    /// These frames must be unused, and stay so but for what gets them from here.
    pub(super) unsafe fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }

    /// The address of the next frame.
    pub(super) fn next(&self) -> u64 {
        self.next
    }
}

// SAFETY: each frame is handed out once, and the constructor's caller says that they are unused.
unsafe impl FrameAllocator<Size4KiB> for EarlyFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        if self.next >= self.end {
            return None;
        }
        let frame = PhysFrame::containing_address(PhysAddr::new(self.next));
        self.next += Size4KiB::SIZE;
        Some(frame)
    }
}

/// Makes tables that map physical memory up to the address `end` at [`memory::PHYSICAL_MEMORY`], the image at its place with
/// each segment's permissions, and the pages of the physical addresses `ramdisk` at [`memory::RAMDISK`], read-only. `None`
/// when there are too few frames.
///
/// # Safety
///
/// The tables in force must map each frame of `frames` at its physical address.
pub(super) unsafe fn build(end: u64, ramdisk: Range<u64>, frames: &mut EarlyFrames) -> Option<PhysFrame> {
    let root = frames.allocate_frame()?;
    let table: *mut PageTable = root.start_address().as_u64() as *mut PageTable;
    // SAFETY: the frame is ours, mapped at its physical address, and large and aligned enough for a table.
    unsafe { table.write(PageTable::new()) };
    // SAFETY: it was just written, and the frames of the tables below it come from `frames`, mapped likewise.
    let mut tables = unsafe { OffsetPageTable::new(&mut *table, VirtAddr::zero()) };

    map_physical_memory(&mut tables, end, frames).ok()?;
    image::segments().iter().try_for_each(|segment| map_segment(&mut tables, segment, frames)).ok()?;
    map_ramdisk(&mut tables, ramdisk, frames).ok()?;
    Some(root)
}

fn map_physical_memory(
    tables: &mut OffsetPageTable,
    end: u64,
    frames: &mut EarlyFrames,
) -> Result<(), MapToError<Size2MiB>> {
    let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::NO_EXECUTE;
    for address in (0..end).step_by(Size2MiB::SIZE as usize) {
        let page = Page::containing_address(VirtAddr::new(memory::PHYSICAL_MEMORY + address));
        let frame = PhysFrame::containing_address(PhysAddr::new(address));
        // SAFETY: these tables are not in force yet.
        unsafe { tables.map_to(page, frame, flags, frames)?.ignore() };
    }
    Ok(())
}

fn map_segment(
    tables: &mut OffsetPageTable,
    segment: &image::Segment,
    frames: &mut EarlyFrames,
) -> Result<(), MapToError<Size4KiB>> {
    let [start, end] = [segment.addresses.start, segment.addresses.end].map(Page::<Size4KiB>::containing_address);
    for page in Page::range(start, end) {
        let frame = PhysFrame::containing_address(image::physical(page.start_address()));
        // SAFETY: these tables are not in force yet.
        unsafe { tables.map_to(page, frame, segment.flags, frames)?.ignore() };
    }
    Ok(())
}

fn map_ramdisk(
    tables: &mut OffsetPageTable,
    addresses: Range<u64>,
    frames: &mut EarlyFrames,
) -> Result<(), MapToError<Size4KiB>> {
    let flags = PageTableFlags::PRESENT | PageTableFlags::NO_EXECUTE;
    let first = PhysFrame::containing_address(PhysAddr::new(addresses.start));
    let end = PhysFrame::containing_address(PhysAddr::new(addresses.end.next_multiple_of(Size4KiB::SIZE)));
    let pages = Page::containing_address(VirtAddr::new(memory::RAMDISK));
    for (index, frame) in PhysFrame::range(first, end).enumerate() {
        // SAFETY: these tables are not in force yet.
        unsafe { tables.map_to(pages + index as u64, frame, flags, frames)?.ignore() };
    }
    Ok(())
}
