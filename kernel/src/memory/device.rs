//! Memory of devices: registers and framebuffers, at addresses of their own.
//!
//! It is never executable and never written to by the kernel itself, and its page frames are not the allocator's: what is RAM by
//! the boot loader's memory map is refused. Addresses come from an arena; their page tables stay.
//!
//! How a CPU keeps what it reads and writes there is said by two bits of each page, which choose an entry of the page attribute
//! table (PAT, Intel SDM vol. 3, 12.12). `set_attributes` writes that table, the same on each CPU, before the CPU can use such
//! a page. No two mappings of a page frame differ in it, as 12.12.4 asks. The CPU's range registers (MTRRs), which firmware has
//! set, make the page frames of devices uncached where all physical memory is mapped.
//!
//! Lock: one around the list of mappings, in which no other is taken. A mapping is in the list before the first of its pages is
//! mapped, and until every CPU has forgotten the last one.

use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;

use bootloader_api::BootInfo;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use kslab::IrqLock;
use kslab::arena::Arena;
use kslab::memory::FRAME_SIZE;
use raw_cpuid::CpuId;
use spin::Once;
use x86_64::instructions::tlb;
use x86_64::registers::model_specific::Msr;
use x86_64::structures::paging::{Mapper, PageTableFlags, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

use super::{DATA, page, tables, unmap_unflushed};
use crate::cpus::{self, Cpus};
use crate::heap::HEAP;
use crate::stop;

/// Where devices are mapped, and how many addresses there are.
const START: u64 = 0xffff_9000_0000_0000;
const ADDRESSES: u64 = 16 << 40;

/// How many mappings there can be.
pub const MOST: usize = 256;

const PAGE: u64 = FRAME_SIZE as u64;

/// The register that holds the page attribute table.
const PAT: u32 = 0x277;
/// Its entries, a byte each, the first lowest: write-back 6, write-combining 1, uncached unless a range register says
/// otherwise 7, uncached 0. The second, which a page has by its write-through bit, is 4 after reset.
const ENTRIES: u64 = 0x0007_0106_0007_0106;

/// What a CPU may do with reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attribute {
    /// Each is one of its own, in the order of the program: for registers.
    Uncached,
    /// Writes may wait and go together: for framebuffers.
    WriteCombining,
}

impl Attribute {
    fn flags(self) -> PageTableFlags {
        match self {
            Self::Uncached => PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH,
            Self::WriteCombining => PageTableFlags::WRITE_THROUGH,
        }
    }
}

/// Why device memory is not mapped, or not unmapped. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The length is 0.
    Empty,
    /// The CPU has no physical addresses that high.
    TooHigh,
    /// It is RAM, says the boot loader.
    IsRam,
    /// A part of it is mapped with another attribute.
    OtherAttribute,
    /// There are [`MOST`] mappings.
    TooMany,
    /// There is no memory for page tables, or there are no addresses.
    NoMemory,
    /// No mapping starts there.
    NotMapped,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "no bytes",
            Self::TooHigh => "above the CPU's physical addresses",
            Self::IsRam => "RAM, and no device",
            Self::OtherAttribute => "mapped with another attribute",
            Self::TooMany => "too many mappings",
            Self::NoMemory => "no memory for page tables",
            Self::NotMapped => "not mapped",
        })
    }
}

impl core::error::Error for Error {}

static ARENA: Arena<Cpus> = Arena::new(HEAP.caches(), "devices", PAGE);
static MAPPINGS: IrqLock<Cpus, Mappings> = IrqLock::new(Mappings::new());
static BOOT_MAP: Once<&[MemoryRegion]> = Once::new();

/// Writes the page attribute table of the CPU that this runs on, which has not used any entry that changes.
pub(crate) fn set_attributes() {
    // SAFETY: every x86-64 CPU has the register. The entries that page tables have used so far, for memory and for uncached
    // pages, stay as they are after reset.
    unsafe { Msr::new(PAT).write(ENTRIES) };
    tlb::flush_all();
}

/// Gets the addresses ready, and has the RAM in `boot_info` refused. Stops the kernel where there is no memory for that.
pub(crate) fn init(boot_info: &'static BootInfo) {
    BOOT_MAP.call_once(|| &boot_info.memory_regions);
    if let Err(error) = ARENA.add(START, ADDRESSES) {
        stop::stop(format_args!("no addresses for devices: {error}"), |_| Ok(()));
    }
}

/// Maps `length` bytes of a device at the physical address `physical`, and returns where that byte is. The pointer has the
/// same offset in its page.
///
/// What is mapped stays so until [`unmap`]. One page frame may be mapped more than once, with the same attribute each time.
///
/// # Errors
///
/// All of [`Error`] but the last.
pub fn map(physical: u64, length: usize, attribute: Attribute) -> Result<NonNull<u8>, Error> {
    let frames = frames_of(physical, length, physical_width())?;
    if is_ram(&frames, BOOT_MAP.get().ok_or(Error::NoMemory)?) {
        return Err(Error::IsRam);
    }
    let place = MAPPINGS.lock().add(frames.clone(), attribute)?;
    match map_frames(&frames, attribute) {
        Ok(start) => {
            MAPPINGS.lock().set_start(place, start);
            let pointer = (start + physical % PAGE) as *mut u8;
            Ok(NonNull::new(pointer).expect("the addresses of devices are not 0"))
        }
        Err(error) => {
            MAPPINGS.lock().remove(place);
            Err(error)
        }
    }
}

/// Unmaps what [`map`] has mapped at `pointer`: the addresses are free again when no CPU can use them any more. The device is
/// not touched.
///
/// The caller holds no lock that another CPU may spin on with interrupts off: this waits for all of them.
///
/// # Errors
///
/// [`NotMapped`](Error::NotMapped).
///
/// # Safety
///
/// Nobody uses the pointer, or one made from it, any more.
pub unsafe fn unmap(pointer: NonNull<u8>) -> Result<(), Error> {
    let start = pointer.addr().get() as u64 / PAGE * PAGE;
    let (place, frames) = MAPPINGS.lock().let_go(start).ok_or(Error::NotMapped)?;
    give_back(start, &frames, count(&frames));
    MAPPINGS.lock().remove(place);
    Ok(())
}

/// Maps these page frames somewhere.
fn map_frames(frames: &Range<u64>, attribute: Attribute) -> Result<u64, Error> {
    let start = ARENA.alloc(frames.end - frames.start).map_err(|_| Error::NoMemory)?;
    let first = PhysFrame::containing_address(PhysAddr::new(frames.start));
    for index in 0..count(frames) {
        let (page, frame) = (page(VirtAddr::new(start), index), first + index as u64);
        // SAFETY: the page is for this alone, and what it maps is no memory that Rust code has.
        match unsafe { tables().lock().map_to(page, frame, DATA | attribute.flags(), &mut HEAP.frames()) } {
            Ok(flush) => flush.flush(),
            Err(_) => {
                give_back(start, frames, index);
                return Err(Error::NoMemory);
            }
        }
    }
    Ok(start)
}

/// Unmaps the first `mapped` pages, and frees the addresses of all.
fn give_back(start: u64, frames: &Range<u64>, mapped: usize) {
    (0..mapped).for_each(|index| _ = unmap_unflushed(page(VirtAddr::new(start), index)));
    cpus::tlb::flush_everywhere();
    let freed = ARENA.free(start, frames.end - frames.start);
    debug_assert!(freed.is_ok(), "they were allocated as one");
}

/// How many bits a physical address has.
fn physical_width() -> u8 {
    CpuId::new().get_processor_capacity_feature_info().map_or(36, |info| info.physical_address_bits())
}

/// The whole page frames that these bytes are in, as addresses.
fn frames_of(physical: u64, length: usize, width: u8) -> Result<Range<u64>, Error> {
    if length == 0 {
        return Err(Error::Empty);
    }
    let end = physical.checked_add(length as u64).filter(|&end| end <= 1 << width).ok_or(Error::TooHigh)?;
    Ok(physical / PAGE * PAGE..end.next_multiple_of(PAGE))
}

fn count(frames: &Range<u64>) -> usize {
    ((frames.end - frames.start) / PAGE) as usize
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Whether any of these page frames is RAM that the kernel or its heap may have.
fn is_ram(frames: &Range<u64>, map: &[MemoryRegion]) -> bool {
    let is_ram =
        |region: &&MemoryRegion| matches!(region.kind, MemoryRegionKind::Usable | MemoryRegionKind::Bootloader);
    map.iter().filter(is_ram).any(|region| overlap(frames, &(region.start..region.end)))
}

/// The list of mappings.
struct Mappings([Option<Mapping>; MOST]);

#[derive(Debug, Clone)]
struct Mapping {
    frames: Range<u64>,
    attribute: Attribute,
    /// The address of its first page; 0 while pages are being mapped or unmapped.
    start: u64,
}

impl Mappings {
    const fn new() -> Self {
        Self([const { None }; MOST])
    }

    /// Adds a mapping whose pages are not mapped yet; returns its place.
    fn add(&mut self, frames: Range<u64>, attribute: Attribute) -> Result<usize, Error> {
        let differs = |mapping: &Mapping| mapping.attribute != attribute && overlap(&mapping.frames, &frames);
        if self.0.iter().flatten().any(differs) {
            return Err(Error::OtherAttribute);
        }
        let place = self.0.iter().position(Option::is_none).ok_or(Error::TooMany)?;
        self.0[place] = Some(Mapping { frames, attribute, start: 0 });
        Ok(place)
    }

    fn set_start(&mut self, place: usize, start: u64) {
        self.0[place].iter_mut().for_each(|mapping| mapping.start = start);
    }

    /// The place of the mapping that starts there, and its page frames. It does not start there any more.
    fn let_go(&mut self, start: u64) -> Option<(usize, Range<u64>)> {
        let starts = |mapping: &Option<Mapping>| mapping.as_ref().is_some_and(|mapping| mapping.start == start);
        let place = self.0.iter().position(starts).filter(|_| start != 0)?;
        let mapping = self.0[place].as_mut()?;
        mapping.start = 0;
        Some((place, mapping.frames.clone()))
    }

    fn remove(&mut self, place: usize) {
        self.0[place] = None;
    }
}

#[cfg(test)]
mod tests {
    use super::Attribute::{Uncached, WriteCombining};
    use super::*;

    #[test]
    fn the_bytes_of_a_device_are_in_whole_page_frames() {
        assert_eq!(frames_of(0xfee0_0020, 4, 40), Ok(0xfee0_0000..0xfee0_1000));
        assert_eq!(frames_of(0xfee0_0fff, 2, 40), Ok(0xfee0_0000..0xfee0_2000));
        assert_eq!(frames_of(0xfee0_0000, 4096, 40), Ok(0xfee0_0000..0xfee0_1000));
        assert_eq!(frames_of(0, 1, 40), Ok(0..0x1000));
    }

    #[test]
    fn no_bytes_and_bytes_beyond_physical_memory_are_refused() {
        assert_eq!(frames_of(0xfee0_0000, 0, 40), Err(Error::Empty));
        assert_eq!(frames_of((1 << 40) - 1, 1, 40), Ok((1 << 40) - PAGE..1 << 40));
        assert_eq!(frames_of((1 << 40) - 1, 2, 40), Err(Error::TooHigh));
        assert_eq!(frames_of(1 << 40, 1, 40), Err(Error::TooHigh));
        assert_eq!(frames_of(u64::MAX, 1, 52), Err(Error::TooHigh));
        assert_eq!(frames_of(u64::MAX - 1, usize::MAX, 52), Err(Error::TooHigh));
        assert_eq!(frames_of(1, usize::MAX, 52), Err(Error::TooHigh));
    }

    #[test]
    fn ram_is_refused_by_any_byte_and_firmware_is_not() {
        let region = |start, end, kind| MemoryRegion { start, end, kind };
        let map = [
            region(0x10_0000, 0x20_0000, MemoryRegionKind::Usable),
            region(0x20_0000, 0x30_0000, MemoryRegionKind::Bootloader),
            region(0x30_0000, 0x40_0000, MemoryRegionKind::UnknownBios(2)),
        ];
        for frames in [0xf_f000..0x10_1000, 0x1f_f000..0x20_1000, 0x2f_f000..0x30_0000, 0..1 << 40] {
            assert!(is_ram(&frames, &map), "{frames:x?}");
        }
        for frames in [0..0x10_0000, 0x30_0000..0x40_0000, 0x40_0000..1 << 40] {
            assert!(!is_ram(&frames, &map), "{frames:x?}");
        }
    }

    #[test]
    fn a_page_frame_has_one_attribute_until_its_last_mapping_is_gone() {
        let mut mappings = Mappings::new();
        let first = mappings.add(0..0x4000, Uncached).expect("room");
        let second = mappings.add(0x3000..0x6000, Uncached).expect("the same attribute");
        assert_eq!(mappings.add(0x3000..0x4000, WriteCombining), Err(Error::OtherAttribute));
        mappings.remove(first);
        assert_eq!(mappings.add(0..0x4000, WriteCombining), Err(Error::OtherAttribute));
        assert!(mappings.add(0..0x3000, WriteCombining).is_ok());
        mappings.set_start(second, 0x10_0000);
        assert_eq!(mappings.let_go(0x10_0000), Some((second, 0x3000..0x6000)));
        assert_eq!(mappings.add(0x5000..0x6000, WriteCombining), Err(Error::OtherAttribute), "pages are mapped still");
        mappings.remove(second);
        assert!(mappings.add(0x5000..0x6000, WriteCombining).is_ok());
    }

    #[test]
    fn a_mapping_is_let_go_once_and_by_its_start_only() {
        let mut mappings = Mappings::new();
        let place = mappings.add(0..0x4000, Uncached).expect("room");
        assert_eq!(mappings.let_go(0), None, "its pages are being mapped");
        mappings.set_start(place, 0x10_0000);
        assert_eq!((mappings.let_go(0x10_1000), mappings.let_go(0)), (None, None));
        assert!(mappings.let_go(0x10_0000).is_some());
        assert_eq!((mappings.let_go(0x10_0000), mappings.let_go(0)), (None, None));
    }

    #[test]
    fn there_is_room_for_so_many_mappings() {
        let mut mappings = Mappings::new();
        (0..MOST).for_each(|place| assert_eq!(mappings.add(0..PAGE, Uncached), Ok(place)));
        assert_eq!(mappings.add(0..PAGE, Uncached), Err(Error::TooMany));
        mappings.remove(7);
        assert_eq!(mappings.add(0..PAGE, Uncached), Ok(7));
    }
}
