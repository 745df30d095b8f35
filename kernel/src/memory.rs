//! The kernel's address space.
//!
//! | addresses | what |
//! |---|---|
//! | from [`PHYSICAL_MEMORY`] | all physical memory, and at least the first 4 GiB of physical addresses |
//! | from `0xffff_9000_0000_0000` | memory of [devices](device) |
//! | from `0xffff_a000_0000_0000` | stacks of CPUs and threads, each with a page below it that is not mapped |
//! | from `0xffff_c000_0000_0000` | objects of the heap that have pages of their own, and pages that are never mapped between them |
//! | from `0xffff_e000_0000_0000` | the [ramdisk](crate::ramdisk), read-only |
//! | from `0xffff_ffff_8000_0000` | the kernel's image |
//!
//! Below half of the address space each [process](crate::processes) has its own, on page tables that share the
//! rest with all others.
//!
//! Where the `bootloader` crate loaded the kernel, its tables map a few pages more, all below half of the address space.

pub mod device;
mod guard;
mod user;

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpus::Cpus;
use kslab::IrqLock;
use kslab::memory::FRAME_SIZE;
use spin::Once;
use x86_64::registers::control::{Cr2, Cr3};
use x86_64::structures::paging::page_table::PageTableLevel;
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::heap::HEAP;
use crate::{cpus, stop, traps};

/// Physical address 0 is mapped here.
pub const PHYSICAL_MEMORY: u64 = 0xffff_8000_0000_0000;

/// The ramdisk is mapped here, if there is one, from the start of a page on.
pub const RAMDISK: u64 = 0xffff_e000_0000_0000;

/// The address in an entry that points to another table (Intel SDM vol. 3, table 4-15).
const TABLE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

pub(crate) use guard::GuardedObjects;
pub(crate) use user::{END as USER_END, OutOfMemory, UserTables};

/// Of memory that is mapped anew.
const DATA: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE);

static TABLES: Once<IrqLock<Cpus, OffsetPageTable<'static>>> = Once::new();

/// The pointer at which the byte at the physical address `address` is mapped.
pub const fn physical(address: u64) -> *mut u8 {
    (PHYSICAL_MEMORY + address) as *mut u8
}

/// The tables in which nothing is mapped below half of the address space but what the loader has left there.
static KERNEL_TABLES: Once<PhysFrame> = Once::new();

/// The kernel's own page tables; `None` before [`init`].
pub(crate) fn kernel_tables() -> Option<PhysFrame> {
    KERNEL_TABLES.get().copied()
}

/// The entries of the root of page tables for the kernel's half of the address space.
const KERNEL_HALF: Range<usize> = 256..512;

/// Copies the kernel's half of the address space to `root`, the root of other page tables.
pub(crate) fn share_kernel(root: &mut PageTable) {
    let tables = tables().lock();
    for index in KERNEL_HALF {
        root[index] = tables.level_4_table()[index].clone();
    }
}

/// Sees to a page fault on page tables that are not the kernel's own: where the root of these has got an entry since
/// [`share_kernel`], it is copied. Whether it was; if not, the fault is one. Such entries never change.
pub(crate) fn catch_up(error_code: u64) -> bool {
    let Some(kernel) = kernel_tables() else { return false };
    let (root, _) = Cr3::read();
    let address = VirtAddr::new_truncate(Cr2::read_raw());
    let index = usize::from(address.p4_index());
    if error_code != 0 && error_code != WRITE || root == kernel || !KERNEL_HALF.contains(&index) {
        return false;
    }
    let entry = |root: PhysFrame| {
        let entry = physical(root.start_address().as_u64()).cast::<u64>().wrapping_add(index);
        // SAFETY: a table in force, or the kernel's; whoever changes an entry writes it whole.
        unsafe { AtomicU64::from_ptr(entry) }
    };
    let wanted = entry(kernel).load(Ordering::Acquire);
    let is_new = wanted != 0 && entry(root).load(Ordering::Relaxed) == 0;
    if is_new {
        entry(root).store(wanted, Ordering::Release);
    }
    is_new
}

/// The error code of a page fault by the kernel that writes where nothing is mapped; 0 is that of one that reads.
const WRITE: u64 = 2;

/// Takes over the page tables that are in force, and unmaps the guard page below every static stack.
///
/// # Safety
///
/// The page tables in force must map physical memory at [`PHYSICAL_MEMORY`], and nothing else may change them.
pub(crate) unsafe fn init() {
    TABLES.call_once(|| {
        let (root, _) = Cr3::read();
        KERNEL_TABLES.call_once(|| root);
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

/// Makes `length` bytes from `start` on, which are mapped by small pages, read-only; stops the kernel if they are not.
///
/// For start-up: no other CPU forgets what it knows about these pages.
pub(crate) fn make_read_only(start: u64, length: usize) {
    let flags = PageTableFlags::PRESENT | PageTableFlags::NO_EXECUTE;
    let end = start + length as u64;
    let [first, end] =
        [start, end.next_multiple_of(FRAME_SIZE as u64)].map(VirtAddr::new).map(Page::containing_address);
    for page in Page::<Size4KiB>::range(first, end) {
        // SAFETY: this takes a right away, which nobody has made use of.
        match unsafe { tables().lock().update_flags(page, flags) } {
            Ok(flush) => flush.flush(),
            Err(error) => stop::stop(format_args!("{page:?} was not protected: {error:?}"), |_| Ok(())),
        }
    }
}

/// The first page that is not mapped of those from that of `address` on.
pub(crate) fn first_unmapped_from(address: VirtAddr) -> VirtAddr {
    let mut page = address.align_down(FRAME_SIZE as u64);
    while is_mapped(page) {
        page += FRAME_SIZE as u64;
    }
    page
}

/// Whether the page of `address` is mapped. This takes no lock and may be called from anywhere; before [`init`] no page
/// counts as mapped. The answer may be old but for a page that the caller knows to stay.
pub(crate) fn is_mapped(address: VirtAddr) -> bool {
    if !TABLES.is_completed() {
        return false;
    }
    let mut table = Cr3::read().0.start_address();
    let mut level = PageTableLevel::Four;
    loop {
        let index = usize::from(address.page_table_index(level));
        let entry: *mut u64 = physical(table.as_u64()).cast::<u64>().wrapping_add(index);
        // SAFETY: a table in force or below it, mapped as all physical memory is. They are never freed, and whoever changes an
        // entry writes it whole.
        let entry = unsafe { AtomicU64::from_ptr(entry) }.load(Ordering::Relaxed);
        let flags = PageTableFlags::from_bits_truncate(entry);
        if !flags.contains(PageTableFlags::PRESENT) {
            return false;
        }
        match level.next_lower_level() {
            Some(lower) if !flags.contains(PageTableFlags::HUGE_PAGE) => level = lower,
            _ => return true,
        }
        table = PhysAddr::new(entry & TABLE_ADDRESS);
    }
}

/// Maps `pages` new page frames, one by one and in no order, from `start` on: writable, not executable, for the kernel
/// alone. Whether it has: where there is no memory, or a page is mapped already, nothing is mapped.
pub fn map_new(start: VirtAddr, pages: usize) -> bool {
    for done in 0..pages {
        let page = page(start, done);
        let mut frames = HEAP.frames();
        let frame: Option<PhysFrame<Size4KiB>> = frames.allocate_frame();
        // SAFETY: the frame is new, so that nothing else refers to its memory.
        let mapped = frame.map(|frame| unsafe { tables().lock().map_to(page, frame, DATA, &mut frames) });
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
            *frame = unmap_unflushed(page(start, index));
        }
        cpus::tlb::flush_everywhere();
        for frame in unmapped.into_iter().flatten() {
            // SAFETY: it was allocated for its page, which is gone.
            unsafe { HEAP.frames().deallocate_frame(frame) };
        }
    }
}

/// Unmaps a page, which CPUs may still reach, and says where it was; `None` where it was not mapped.
fn unmap_unflushed(page: Page<Size4KiB>) -> Option<PhysFrame> {
    let (frame, flush) = tables().lock().unmap(page).ok()?;
    flush.ignore();
    Some(frame)
}

fn page(start: VirtAddr, index: usize) -> Page<Size4KiB> {
    Page::containing_address(start) + index as u64
}

fn tables() -> &'static IrqLock<Cpus, OffsetPageTable<'static>> {
    TABLES.get().expect("memory::init comes first")
}
