//! *Mapping device memory* of the systems, sentence by sentence, on the local APIC, the HPET and the firmware's ROM.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use bootloader_api::info::MemoryRegionKind;
use kernel::heap::HEAP;
use kernel::memory::device::{self, Attribute, Error};
use kernel::{cpus, firmware, memory};
use x86_64::VirtAddr;
use x86_64::registers::control::Cr3;
use x86_64::registers::model_specific::{ApicBase, ApicBaseFlags, Msr};
use x86_64::structures::paging::page_table::PageTableLevel;
use x86_64::structures::paging::{PageTable, PageTableFlags};

use super::support::{PAGE, give_back, on_each, take_all, unchanged};
use crate::guest::boot_info;
use crate::guest::runner::{note, test};

use Attribute::{Uncached, WriteCombining};

/// The last 16 bytes below 4 GiB, where a CPU starts after reset.
const RESET_VECTOR: u64 = 0xffff_fff0;

/// Where addresses for devices start; the local APIC's are the first page.
const SECOND_PAGE: usize = 0xffff_9000_0000_1000;

/// Registers of the HPET (IA-PC HPET specification 1.0a, 2.3.3).
const CAPABILITIES: usize = 0;
const CONFIGURATION: usize = 0x10;
const COUNTER: usize = 0xf0;

fn hpet() -> u64 {
    firmware::hpet(boot_info()).expect("the machine has an HPET")
}

fn lapic() -> u64 {
    ApicBase::read().0.start_address().as_u64()
}

/// How many bits a physical address has (Intel SDM vol. 3, 4.1.4).
fn physical_width() -> u32 {
    core::arch::x86_64::__cpuid(0x8000_0008).eax & 0xff
}

fn map(physical: u64, length: usize, attribute: Attribute) -> NonNull<u8> {
    device::map(physical, length, attribute).expect("a device")
}

fn unmap(device: NonNull<u8>) {
    // SAFETY: no test uses what it has unmapped.
    assert_eq!(unsafe { device::unmap(device) }, Ok(()));
}

fn read<T: Copy>(device: NonNull<u8>, offset: usize) -> T {
    // SAFETY: the tests read registers that are there, and have no effect.
    unsafe { device.as_ptr().add(offset).cast::<T>().read_volatile() }
}

fn write<T: Copy>(device: NonNull<u8>, offset: usize, value: T) {
    // SAFETY: the tests write registers that are there, and put back what was in them.
    unsafe { device.as_ptr().add(offset).cast::<T>().write_volatile(value) }
}

/// The entry of the page at `address`: the physical address, and the flags; `None` where it is not mapped.
fn entry(address: NonNull<u8>) -> Option<(u64, PageTableFlags)> {
    let address = VirtAddr::from_ptr(address.as_ptr());
    let (mut table, mut level) = (Cr3::read().0.start_address(), PageTableLevel::Four);
    loop {
        let entries: *const PageTable = memory::physical(table.as_u64()).cast();
        // SAFETY: a table in force, mapped as all physical memory is; nothing changes it now.
        let entry = &unsafe { &*entries }[address.page_table_index(level)];
        let is_present = entry.flags().contains(PageTableFlags::PRESENT);
        match level.next_lower_level() {
            _ if !is_present => return None,
            None => return Some((entry.addr().as_u64(), entry.flags())),
            Some(lower) => (table, level) = (entry.addr(), lower),
        }
    }
}

test!(the_virtual_address_keeps_the_offset_in_the_page);
/// *`map(phys, len, attr)` gives a virtual address that keeps the sub-page offset.*
fn the_virtual_address_keeps_the_offset_in_the_page() {
    for (physical, length) in [(hpet(), 1), (hpet() + 0xf0, 8), (RESET_VECTOR, 16), (RESET_VECTOR - PAGE as u64, 17)] {
        let device = map(physical, length, Uncached);
        assert_eq!(device.addr().get() % PAGE, physical as usize % PAGE);
        let last = device.map_addr(|address| address.checked_add(length - 1).expect("the addresses are not the last"));
        let frame = |byte: u64| byte / PAGE as u64 * PAGE as u64;
        assert_eq!(entry(device).expect("mapped").0, frame(physical));
        assert_eq!(entry(last).expect("mapped").0, frame(physical + length as u64 - 1));
        unmap(device);
    }
}

test!(registers_are_uncached_and_a_framebuffer_is_write_combining_and_neither_is_executable);
/// *Uncached (write-combining for a framebuffer); never executable.*
fn registers_are_uncached_and_a_framebuffer_is_write_combining_and_neither_is_executable() {
    let of_caching = PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH | PageTableFlags::HUGE_PAGE;
    let uncached = PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH;
    for (attribute, expected) in [(Uncached, uncached), (WriteCombining, PageTableFlags::WRITE_THROUGH)] {
        let device = map(RESET_VECTOR, 16, attribute);
        let (_, flags) = entry(device).expect("mapped");
        assert_eq!(flags & of_caching, expected, "{attribute:?}");
        assert!(flags.contains(PageTableFlags::NO_EXECUTE | PageTableFlags::WRITABLE));
        assert!(!flags.contains(PageTableFlags::USER_ACCESSIBLE));
        unmap(device);
    }
}

test!(the_page_attribute_table_is_the_same_on_every_cpu);
/// *Uncached (write-combining for a framebuffer)*, on whatever CPU: *a conflicting cache attribute is an error.*
fn the_page_attribute_table_is_the_same_on_every_cpu() {
    on_each(
        |_| {
            // SAFETY: every x86-64 CPU has the register IA32_PAT.
            let table = unsafe { Msr::new(0x277).read() }.to_le_bytes();
            // By the bits of `entry` above: write-back, write-combining, and the last of four is uncached.
            assert_eq!((table[0], table[1], table[3]), (6, 1, 0), "on CPU {}", cpus::current());
        },
        0,
    );
}

test!(code_on_a_device_does_not_run, stops_with = "page fault: execution at 0xffff900000001ff0, protected");
/// *Never executable.*
fn code_on_a_device_does_not_run() {
    let device = map(RESET_VECTOR, 16, Uncached);
    assert_eq!(device.addr().get(), SECOND_PAGE + 0xff0);
    // SAFETY: the page is not executable, so none of its code runs.
    let code: fn() = unsafe { core::mem::transmute(device.as_ptr()) };
    code();
}

test!(mapping_and_unmapping_write_nothing);
/// *Never zeroed or poisoned.*
fn mapping_and_unmapping_write_nothing() {
    let rom = || {
        let bytes: *const [u8; 16] = memory::physical(RESET_VECTOR).cast();
        // SAFETY: the firmware's ROM, where all physical addresses are mapped.
        unsafe { bytes.read_volatile() }
    };
    let before = rom();
    assert!(before.iter().any(|&byte| byte != 0 && byte != before[15]), "code for a CPU that was reset");
    for attribute in [Uncached, WriteCombining] {
        let device = map(RESET_VECTOR, 16, attribute);
        assert_eq!(read::<[u8; 16]>(device, 0), before);
        unmap(device);
        assert_eq!(rom(), before);
    }
    let device = map(hpet(), 1024, Uncached);
    let settings = || [CAPABILITIES, CONFIGURATION, 0x100, 0x120, 0x140].map(|offset| read::<u64>(device, offset));
    let before = settings();
    unmap(map(hpet(), 1024, Uncached));
    assert_eq!(settings(), before);
    unmap(device);
}

test!(the_frame_allocator_never_hands_a_device_out);
/// *Never handed out by the frame allocator.*
fn the_frame_allocator_never_hands_a_device_out() {
    let devices = [(hpet(), 1024), (lapic(), PAGE), (RESET_VECTOR, 16)];
    let mapped = devices.map(|(physical, length)| (physical, map(physical, length, Uncached)));
    let all = take_all();
    let has = |address: u64| {
        let frames =
            |&(frame, order): &(kslab::Frame, kslab::Order)| frame.address()..frame.address() + order.bytes() as u64;
        all.iter().any(|block| frames(block).contains(&address))
    };
    let handed_out = devices.map(|(physical, _)| has(physical));
    give_back(all);
    assert_eq!(handed_out, [false; 3]);
    for (_, device) in mapped {
        assert_eq!(HEAP.block_size(device.as_ptr()), None);
        unmap(device);
    }
    // Nor does it know them once they are unmapped.
    for (physical, _) in devices {
        let frame = kslab::Frame::containing(physical).expect("below 16 TiB");
        assert!(!HEAP.frames().allocate_at(frame, 1));
    }
}

test!(what_overlaps_usable_ram_is_an_error);
/// *Overlap with usable RAM is an error.*
fn what_overlaps_usable_ram_is_an_error() {
    let mut found = 0;
    for region in boot_info().memory_regions.iter().filter(|region| region.kind == MemoryRegionKind::Usable) {
        for attribute in [Uncached, WriteCombining] {
            for (first, length) in [(region.start, 1), (region.end - 1, 1), (region.end - 1, PAGE)] {
                assert_eq!(device::map(first, length, attribute), Err(Error::IsRam), "{first:#x}, {length} bytes");
            }
            assert_eq!(device::map(region.start.saturating_sub(1), 2, attribute), Err(Error::IsRam));
        }
        found += 1;
    }
    assert!(found > 0);
    assert_eq!(device::map(0, 4 << 30, Uncached), Err(Error::IsRam), "among other things");
}

test!(what_is_mapped_with_another_attribute_is_an_error);
/// *A conflicting cache attribute is an error.*
fn what_is_mapped_with_another_attribute_is_an_error() {
    assert_eq!(device::map(lapic(), 4, WriteCombining), Err(Error::OtherAttribute), "the kernel's own mapping");
    let framebuffer = map(RESET_VECTOR - 2 * PAGE as u64, 2 * PAGE, WriteCombining);
    assert_eq!(device::map(RESET_VECTOR, 16, Uncached), Err(Error::OtherAttribute));
    let again = map(RESET_VECTOR, 16, WriteCombining);
    unmap(framebuffer);
    assert_eq!(device::map(RESET_VECTOR, 16, Uncached), Err(Error::OtherAttribute), "one of the two is there still");
    unmap(again);
    unmap(map(RESET_VECTOR, 16, Uncached));
}

test!(a_length_of_0_or_beyond_physical_memory_is_an_error);
fn a_length_of_0_or_beyond_physical_memory_is_an_error() {
    unchanged(|| {
        assert_eq!(device::map(hpet(), 0, Uncached), Err(Error::Empty));
        let width = physical_width();
        for (first, length) in [(1 << width, 1), ((1 << width) - 1, 2), (u64::MAX, 1), (hpet(), usize::MAX)] {
            assert_eq!(device::map(first, length, Uncached), Err(Error::TooHigh), "{first:#x}, {length:#x} bytes");
        }
    });
}

test!(unmapping_frees_the_addresses_only);
/// *Unmapping frees the address range only.*
fn unmapping_frees_the_addresses_only() {
    let mut places = [None; 2];
    for place in &mut places {
        unchanged(|| {
            let device = map(hpet(), 1024, Uncached);
            *place = Some(device);
            unmap(device);
        });
        let device = place.expect("mapped");
        assert_eq!(entry(device), None);
        // SAFETY: it is refused.
        assert_eq!(unsafe { device::unmap(device) }, Err(Error::NotMapped));
    }
    assert_eq!(places[0], places[1], "the addresses are there to be used again");
    // SAFETY: it is refused, inside the kernel's own mapping and elsewhere.
    let refused = |address| unsafe { device::unmap(NonNull::new(address).expect("not null")) };
    assert_eq!(refused((SECOND_PAGE + 0x10_0000) as *mut u8), Err(Error::NotMapped));
    assert_eq!(refused((&raw const places).cast_mut().cast()), Err(Error::NotMapped));
}

test!(a_device_that_was_unmapped_cannot_be_read, stops_with = "page fault: read from 0xffff9000000010f0, not mapped");
fn a_device_that_was_unmapped_cannot_be_read() {
    let device = map(hpet(), 1024, Uncached);
    assert_eq!(device.addr().get(), SECOND_PAGE);
    read::<u64>(device, COUNTER);
    unmap(device);
    read::<u64>(device, COUNTER);
}

test!(unmapping_reaches_every_cpu);
fn unmapping_reaches_every_cpu() {
    /// What the function below reads from.
    static DEVICE: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
    fn read_first(expected: usize) {
        let device = NonNull::new(DEVICE.load(Relaxed)).expect("set below");
        assert_eq!(read::<u32>(device, 0) as usize, expected, "CPU {} reads another device", cpus::current());
    }
    for _ in 0..8 {
        let mut places = [core::ptr::null_mut(); 2];
        for (place, physical) in places.iter_mut().zip([hpet(), RESET_VECTOR / PAGE as u64 * PAGE as u64]) {
            let device = map(physical, PAGE, Uncached);
            *place = device.as_ptr();
            DEVICE.store(device.as_ptr(), Relaxed);
            let first: *const u32 = memory::physical(physical).cast();
            // SAFETY: all physical addresses are mapped.
            on_each(read_first, unsafe { first.read_volatile() } as usize);
            unmap(device);
        }
        assert_eq!(places[0], places[1], "the second is where the first was");
    }
}

test!(without_memory_for_page_tables_nothing_is_mapped);
fn without_memory_for_page_tables_nothing_is_mapped() {
    // More than the tables that are there can map.
    let large = || device::map((1 << physical_width()) - (4 << 20), 4 << 20, Uncached);
    let all = take_all();
    let refused = large();
    give_back(all);
    assert_eq!(refused, Err(Error::NoMemory));
    unmap(large().expect("memory"));
    unchanged(|| unmap(large().expect("memory")));
}

test!(the_local_apic_says_the_number_of_the_cpu_that_reads_it);
/// *Shown on the LAPIC.*
fn the_local_apic_says_the_number_of_the_cpu_that_reads_it() {
    if ApicBase::read().1.contains(ApicBaseFlags::X2APIC_ENABLE) {
        return note(format_args!("the registers are not in memory here"));
    }
    static LAPIC: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
    let device = map(lapic() + 0x20, 4, Uncached);
    LAPIC.store(device.as_ptr(), Relaxed);
    let compare = |_| {
        let device = NonNull::new(LAPIC.load(Relaxed)).expect("set above");
        // The initial APIC id (Intel SDM vol. 2, CPUID).
        let expected = core::arch::x86_64::__cpuid(1).ebx >> 24;
        assert_eq!(read::<u32>(device, 0) >> 24, expected, "on CPU {}", cpus::current());
    };
    on_each(compare, 0);
    unmap(device);
}

test!(the_hpet_counts_up);
/// *Shown on the HPET.*
fn the_hpet_counts_up() {
    let device = map(hpet(), 1024, Uncached);
    let period = read::<u64>(device, CAPABILITIES) >> 32;
    assert!((1..=100_000_000).contains(&period), "femtoseconds a count: {period}");
    let before: u64 = read(device, CONFIGURATION);
    write(device, CONFIGURATION, before | 1);
    let mut counts = [0_u64; 4];
    for count in &mut counts {
        *count = read(device, COUNTER);
        while read::<u64>(device, COUNTER) == *count {
            core::hint::spin_loop();
        }
    }
    assert!(counts.is_sorted_by(|one, next| one < next), "{counts:?}");
    write(device, CONFIGURATION, before);
    assert_eq!(read::<u64>(device, CONFIGURATION), before);
    unmap(device);
}
