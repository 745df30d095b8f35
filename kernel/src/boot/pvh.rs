//! The way in without firmware or disk: QEMU's `-kernel`, by Xen's "x86/HVM direct boot ABI" (PVH).
//!
//! `pvh.s` gets the CPU into 64-bit mode; the rest makes what the `bootloader` crate makes on the other way: page tables
//! and a [`BootInfo`], from the start info structure (Xen's `xen/include/public/arch-x86/hvm/start_info.h`).

use core::ffi::CStr;
use core::ops::Range;
use core::slice;

use bootloader_api::BootInfo;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind, MemoryRegions};
use kslab::memory::{Region, UsableFrames};
use spin::Once;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::{PageSize, PhysFrame, Size2MiB, Size4KiB};

use super::paging::{self, EarlyFrames};
use crate::stop::stop;
use crate::{image, memory};

#[cfg(target_os = "none")]
core::arch::global_asm!(
    include_str!("pvh.s"),
    base = const image::BASE,
    stack = sym super::STACK,
    top = const crate::stack::GUARD + super::BOOT_STACK_SIZE,
    next = sym start_from_pvh,
    options(att_syntax),
);

const MAGIC: u32 = 0x336e_c578;

const GIB: u64 = 1 << 30;

/// What the tables of `pvh.s` map, each byte at its physical address.
const EARLY_END: u64 = GIB;

/// Entries that the memory map may have, our own among them.
const MAX_REGIONS: usize = 256;

/// Page tables needed besides one for each GiB of physical memory and one for each 2 MiB of the ramdisk.
const MORE_TABLES: u64 = 32;

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    // From version 1 on.
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Module {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}

impl Module {
    fn addresses(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.size)
    }
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

impl MapEntry {
    fn kind(&self) -> MemoryRegionKind {
        match self.kind {
            1 => MemoryRegionKind::Usable,
            other => MemoryRegionKind::UnknownBios(other),
        }
    }
}

/// Continues after `pvh.s`, on the boot stack.
///
/// # Safety
///
/// Only for `pvh.s` to call, once, with the address of the start info structure.
pub unsafe extern "sysv64" fn start_from_pvh(address: u64) -> ! {
    super::start();
    // SAFETY: QEMU put the structure there, and it is copied at once.
    let info = unsafe { early::<StartInfo>(address, 1) }[0];
    if info.magic != MAGIC || info.version < 1 {
        stop(format_args!("PVH start info has magic {:#x}, version {}", info.magic, info.version), |_| Ok(()));
    }
    // SAFETY: these are what QEMU put where; the early tables are in force until `replace_tables`.
    let (line_length, modules) = unsafe { (line_length(info.command_line), early(info.module_list, info.modules)) };
    let ramdisk = modules.first().copied().filter(|module: &Module| module.size > 0);
    let mut regions = Regions::take();
    regions.reserve(address, size_of::<StartInfo>() as u64);
    regions.reserve(info.command_line, line_length as u64 + 1);
    // SAFETY: as above.
    unsafe { add_memory_map(&mut regions, &info) };
    add_modules(&mut regions, &info, modules);
    replace_tables(&mut regions, ramdisk.map_or(0..0, |module| module.addresses()));

    let boot_info = BOOT_INFO.call_once(|| boot_info(&info, ramdisk, regions));
    // SAFETY: the line was found there, and its memory is reserved.
    let line = unsafe { slice::from_raw_parts(memory::physical(info.command_line), line_length) };
    // SAFETY: this runs once, with interrupts off as the ABI says; the new tables map physical memory, and all of it that is
    // in use was reserved.
    unsafe { super::enter(boot_info, line) }
}

/// Adds what QEMU says about memory, and the kernel itself.
///
/// # Safety
///
/// As for [`early`].
unsafe fn add_memory_map(regions: &mut Regions, info: &StartInfo) {
    // SAFETY: as the caller says.
    let map: &[MapEntry] = unsafe { early(info.memory_map, info.memory_map_entries) };
    for entry in map {
        regions.add(entry.address, entry.size, entry.kind());
    }
    regions.reserve(info.memory_map, size_of_val(map) as u64);
    let image = image_frames();
    regions.reserve(image.start, image.end - image.start);
}

fn add_modules(regions: &mut Regions, info: &StartInfo, modules: &[Module]) {
    regions.reserve(info.module_list, size_of_val(modules) as u64);
    for module in modules {
        regions.reserve(module.address, module.size);
    }
}

/// The physical addresses of the image.
fn image_frames() -> Range<u64> {
    let image = image::addresses();
    image::physical(image.start).as_u64()..image::physical(image.end).as_u64()
}

/// What the `bootloader` crate would say.
fn boot_info(info: &StartInfo, ramdisk: Option<Module>, regions: Regions) -> BootInfo {
    let image = image_frames();
    let mut boot_info = BootInfo::new(regions.finish());
    boot_info.physical_memory_offset = Some(memory::PHYSICAL_MEMORY).into();
    boot_info.rsdp_addr = (info.rsdp != 0).then_some(info.rsdp).into();
    let ramdisk_page = |module: Module| memory::RAMDISK + module.address % Size4KiB::SIZE;
    boot_info.ramdisk_addr = ramdisk.map(ramdisk_page).into();
    boot_info.ramdisk_len = ramdisk.map_or(0, |module| module.size);
    boot_info.kernel_addr = image.start;
    boot_info.kernel_len = image.end - image.start;
    boot_info.kernel_image_offset = image::addresses().start.as_u64();
    boot_info
}

static BOOT_INFO: Once<BootInfo> = Once::new();

/// The memory map that is passed on.
#[derive(Debug)]
struct Regions {
    all: &'static mut [MemoryRegion],
    count: usize,
}

impl Regions {
    /// The one map there is, empty.
    fn take() -> Self {
        static mut REGIONS: [MemoryRegion; MAX_REGIONS] = [MemoryRegion::empty(); MAX_REGIONS];
        let all = &raw mut REGIONS;
        // SAFETY: only `start_from_pvh` calls this, which runs once.
        let all = unsafe { &mut *all };
        Self { all, count: 0 }
    }

    fn add(&mut self, start: u64, size: u64, kind: MemoryRegionKind) {
        let Some(entry) = self.all.get_mut(self.count) else {
            stop(format_args!("the memory map has more than {MAX_REGIONS} entries"), |_| Ok(()));
        };
        *entry = MemoryRegion { start, end: start.saturating_add(size), kind };
        self.count += 1;
    }

    /// Reserved memory wins over usable, so this may overlap what is there.
    fn reserve(&mut self, start: u64, size: u64) {
        self.add(start, size, MemoryRegionKind::Bootloader);
    }

    fn entries(&self) -> &[MemoryRegion] {
        &self.all[..self.count]
    }

    fn finish(self) -> MemoryRegions {
        MemoryRegions::from(&mut self.all[..self.count])
    }
}

/// Makes the kernel's own page tables, in the first memory after the image with room for them, and puts them in force.
/// Adds them to `regions`. `ramdisk` is the physical addresses of the ramdisk.
fn replace_tables(regions: &mut Regions, ramdisk: Range<u64>) {
    let image_end = image_frames().end;
    let usable = regions.entries().iter().filter(|region| region.kind == MemoryRegionKind::Usable);
    let end = usable.map(|region| region.end).fold(4 * GIB, u64::max).next_multiple_of(Size2MiB::SIZE);
    let for_ramdisk = (ramdisk.end - ramdisk.start).div_ceil(Size2MiB::SIZE);
    let size = (end.div_ceil(GIB) + for_ramdisk + MORE_TABLES) * Size4KiB::SIZE;
    let free = UsableFrames::new(regions.entries().iter().copied().map(Region::from))
        .map(|range| range.start.address().max(image_end)..range.end.address().min(EARLY_END))
        .find(|range| range.start.saturating_add(size) <= range.end);
    let Some(start) = free.map(|range| range.start) else {
        stop(format_args!("no {} KiB for page tables between {image_end:#x} and 1 GiB", size / 1024), |_| Ok(()));
    };
    // SAFETY: the memory map calls this usable, all that is in use was reserved in it, and so will this be.
    let mut frames = unsafe { EarlyFrames::new(start, start + size) };
    // SAFETY: the frames lie below the first GiB, which the early tables map.
    let Some(root) = (unsafe { paging::build(end, ramdisk, &mut frames) }) else {
        stop(format_args!("{} KiB are too little for page tables", size / 1024), |_| Ok(()));
    };
    regions.reserve(start, frames.next() - start);
    put_in_force(root);
}

fn put_in_force(root: PhysFrame) {
    // SAFETY: the new tables map the image, with code, data and this stack in it, just as the early ones do.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
}

/// `count` values of `T` at the physical address `address`; stops the kernel if they are not below 1 GiB.
///
/// # Safety
///
/// The values must be there, and the result must not be used when the early tables are no longer in force.
unsafe fn early<'a, T>(address: u64, count: u32) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    let end = address.checked_add(u64::from(count) * size_of::<T>() as u64);
    let values = address as *const T;
    if values.is_null() || !values.is_aligned() || end.is_none_or(|end| end > EARLY_END) {
        stop(format_args!("PVH start info is not below 1 GiB, or not aligned: {address:#x}"), |_| Ok(()));
    }
    // SAFETY: the early tables map the first GiB at its physical addresses, and the caller says that the values are there.
    unsafe { slice::from_raw_parts(values, count as usize) }
}

/// Bytes in the zero-terminated string at the physical address `address`; none at address 0.
///
/// # Safety
///
/// As for [`early`].
unsafe fn line_length(address: u64) -> usize {
    if address == 0 {
        return 0;
    }
    // SAFETY: as the caller says; the first byte is checked to be in reach, and the end is not far from it.
    unsafe { CStr::from_ptr(early::<i8>(address, 1).as_ptr()).count_bytes() }
}
