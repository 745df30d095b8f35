//! The page tables of one address space, and the page frames that are mapped there.
//!
//! Whoever has a value of this type is the only one who changes these tables. The memory of ring 3 is reached where all
//! physical memory is mapped, never at its own addresses: nothing that a process does makes the kernel fault.

use core::fmt;
use core::ops::Range;

use kslab::memory::FRAME_SIZE;
use kslab::{Frame, Order};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

use super::{PHYSICAL_MEMORY, physical, share_kernel};
use crate::cpus;
use crate::heap::HEAP;

const PAGE: u64 = FRAME_SIZE as u64;

/// Addresses from here on are not those of an address space.
pub(crate) const END: u64 = 0x7fff_ffff_f000;

/// There is no page frame to be had, but for those that the kernel keeps for itself: fewer than the low watermark are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfMemory;

/// The page tables of an address space. Dropping it frees them, and all that is mapped by them.
pub(crate) struct UserTables {
    root: PhysFrame,
    tables: OffsetPageTable<'static>,
    resident: usize,
}

impl UserTables {
    /// Tables that map the kernel's half alone.
    pub(crate) fn new() -> Result<Self, OutOfMemory> {
        let root = Frames.allocate_frame().ok_or(OutOfMemory)?;
        let table: *mut PageTable = physical(root.start_address().as_u64()).cast();
        // SAFETY: the frame is new and as large as a table, which may hold anything.
        let table = unsafe { &mut *table };
        table.zero();
        share_kernel(table);
        // SAFETY: all physical memory is mapped there.
        let tables = unsafe { OffsetPageTable::new(table, VirtAddr::new(PHYSICAL_MEMORY)) };
        Ok(Self { root, tables, resident: 0 })
    }

    /// What CR3 has to hold.
    pub(crate) fn root(&self) -> PhysFrame {
        self.root
    }

    /// Pages that are mapped.
    pub(crate) fn resident(&self) -> usize {
        self.resident
    }

    /// Maps a new page frame, zeroed, at the page `page`, unless something is mapped there. `flags` are those besides the ones
    /// that all have.
    pub(crate) fn map(&mut self, page: u64, flags: PageTableFlags) -> Result<(), OutOfMemory> {
        debug_assert!(page < END && page.is_multiple_of(PAGE), "a page of ring 3");
        if self.pointer(page).is_some() {
            return Ok(());
        }
        let frame = Frames.allocate_frame().ok_or(OutOfMemory)?;
        // SAFETY: a new page frame, mapped as all memory is.
        unsafe { physical(frame.start_address().as_u64()).write_bytes(0, FRAME_SIZE) };
        let page = Page::<Size4KiB>::containing_address(VirtAddr::new(page));
        let all = PageTableFlags::PRESENT | PageTableFlags::USER_ACCESSIBLE;
        let parents = all | PageTableFlags::WRITABLE;
        // SAFETY: the frame is new, so that nothing else refers to its memory.
        match unsafe { self.tables.map_to_with_table_flags(page, frame, all | flags, parents, &mut Frames) } {
            Ok(flush) => flush.flush(),
            Err(_) => {
                // SAFETY: it is not mapped.
                unsafe { HEAP.frames().free(kslab_frame(frame), Order::ZERO) };
                return Err(OutOfMemory);
            }
        }
        self.resident += 1;
        Ok(())
    }

    /// Where the kernel finds the byte that is mapped at `address`; `None` where nothing is.
    pub(crate) fn pointer(&self, address: u64) -> Option<*mut u8> {
        let address = VirtAddr::try_new(address).ok().filter(|address| address.as_u64() < END)?;
        self.tables.translate_addr(address).map(|address| physical(address.as_u64()))
    }

    /// Copies `to.len()` bytes from `address` on, all in one page that is mapped.
    pub(crate) fn read(&self, address: u64, to: &mut [u8]) {
        let from = self.bytes(address, to.len());
        // SAFETY: bytes of a frame that is mapped here, to which no reference is ever made.
        unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
    }

    /// Copies `from` to `address`, all in one page that is mapped.
    pub(crate) fn write(&mut self, address: u64, from: &[u8]) {
        let to = self.bytes(address, from.len());
        // SAFETY: as above.
        unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    }

    /// Writes `byte` to all of these addresses, which are in one page; nothing, where that is not mapped.
    pub(crate) fn fill(&mut self, addresses: Range<u64>, byte: u8) {
        let length = (addresses.end - addresses.start) as usize;
        if self.pointer(addresses.start).is_some() {
            // SAFETY: as above.
            unsafe { self.bytes(addresses.start, length).write_bytes(byte, length) };
        }
    }

    /// # Panics
    ///
    /// If they are not all in one page that is mapped.
    fn bytes(&self, address: u64, length: usize) -> *mut u8 {
        assert!(address % PAGE + length as u64 <= PAGE, "bytes of one page");
        self.pointer(address).expect("a page that is mapped")
    }

    /// Unmaps all pages from one address up to another, both page-aligned, and frees their frames when no CPU can reach
    /// them any more; so it does with page tables that are not needed any more.
    ///
    /// The caller holds no lock that another CPU may spin on with interrupts off: this waits for all of them.
    pub(crate) fn unmap(&mut self, addresses: Range<u64>) {
        debug_assert!(addresses.end <= END, "addresses of ring 3");
        if addresses.is_empty() {
            return;
        }
        let mut freed = Freed { frames: [Frame::default(); _], count: 0, pages: 0 };
        clear(self.tables.level_4_table_mut(), 4, 0, &addresses, &mut freed);
        freed.free();
        self.resident -= freed.pages;
    }
}

impl Drop for UserTables {
    fn drop(&mut self) {
        self.unmap(0..END);
        // SAFETY: no thread has these tables any more, and each CPU loads others when it goes on with another thread.
        unsafe { HEAP.frames().free(kslab_frame(self.root), Order::ZERO) };
    }
}

impl fmt::Debug for UserTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserTables").field("root", &self.root).field("resident", &self.resident).finish()
    }
}

/// Takes out of `table`, whose entries are of tables of `level` - 1 (of pages, at level 1) and whose first one is for the
/// address `base`, all that is for `addresses`.
fn clear(table: &mut PageTable, level: u32, base: u64, addresses: &Range<u64>, freed: &mut Freed) {
    let span = PAGE << (9 * (level - 1));
    let index = |address: u64| ((address.saturating_sub(base) / span) as usize).min(511);
    for at in index(addresses.start)..=index(addresses.end - 1) {
        let entry = &mut table[at];
        if entry.is_unused() {
            continue;
        }
        let below = entry.addr();
        if level > 1 {
            let lower: *mut PageTable = physical(below.as_u64()).cast();
            // SAFETY: a table of ours, mapped as all memory is, to which nothing else has a reference.
            let lower = unsafe { &mut *lower };
            clear(lower, level - 1, base + at as u64 * span, addresses, freed);
            if lower.iter().any(|entry| !entry.is_unused()) {
                continue;
            }
        } else {
            freed.pages += 1;
        }
        entry.set_unused();
        freed.push(below);
    }
}

/// Frames that are out of the tables, and that a CPU may still reach.
struct Freed {
    frames: [Frame; 512],
    count: usize,
    /// Pages among all of them.
    pages: usize,
}

impl Freed {
    fn push(&mut self, address: PhysAddr) {
        self.frames[self.count] = kslab_frame(PhysFrame::containing_address(address));
        self.count += 1;
        if self.count == self.frames.len() {
            self.free();
        }
    }

    fn free(&mut self) {
        if self.count == 0 {
            return;
        }
        cpus::tlb::flush_everywhere();
        // SAFETY: they were allocated one by one, and nothing reaches them any more.
        unsafe { HEAP.frames().free_bulk(&self.frames[..self.count]) };
        self.count = 0;
    }
}

/// Page frames for ring 3 and its tables.
struct Frames;

// SAFETY: a block of order 0 is a page frame that nobody else has.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        if HEAP.frames().below_low() && (HEAP.shrink() == 0 || HEAP.frames().below_low()) {
            return None;
        }
        let frame = HEAP.allocate_frames(1, Order::ZERO, u64::MAX)?;
        Some(PhysFrame::containing_address(PhysAddr::new(frame.address())))
    }
}

fn kslab_frame(frame: PhysFrame) -> Frame {
    // What no frame number reaches was not allocated; frame 0 is refused as such.
    Frame::containing(frame.start_address().as_u64()).unwrap_or_default()
}
