//! What the way in leaves to the kernel.

use core::ops::Range;

use kernel::{memory, ramdisk};
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::page_table::PageTableLevel;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

use super::support::{PAGE, give_back, take_all};
use crate::guest::boot_info;
use crate::guest::runner::test;

/// The kernel's image is in the last 2 GiB of the address space.
const IMAGE: u64 = 0xffff_ffff_8000_0000;

/// Calls `visit` with the physical address of every page table in force, and of every small page mapped in `wanted`.
fn walk(table: PhysFrame, level: PageTableLevel, first: u64, wanted: &[Range<u64>], visit: &mut dyn FnMut(u64)) {
    visit(table.start_address().as_u64());
    let entries: *const PageTable = memory::physical(table.start_address().as_u64()).cast();
    // SAFETY: a table in force, mapped as all physical memory is; nothing changes it now.
    let entries = unsafe { &*entries };
    for (index, entry) in
        entries.iter().enumerate().filter(|(_, entry)| entry.flags().contains(PageTableFlags::PRESENT))
    {
        let size = level.entry_address_space_alignment();
        // Sign-extended from 48 bits.
        let address = ((first + index as u64 * size) << 16) as i64 >> 16;
        match level.next_lower_level() {
            None if wanted.iter().any(|range| range.contains(&(address as u64))) => visit(entry.addr().as_u64()),
            Some(lower) if !entry.flags().contains(PageTableFlags::HUGE_PAGE) => {
                walk(PhysFrame::containing_address(entry.addr()), lower, address as u64, wanted, visit);
            }
            _ => {}
        }
    }
}

fn pages_of<T: ?Sized>(value: &T) -> Range<u64> {
    let start = (&raw const *value).addr();
    (start / PAGE * PAGE) as u64..(start + size_of_val(value)) as u64
}

test!(row_54_what_is_in_use_is_never_handed_out);
fn row_54_what_is_in_use_is_never_handed_out() {
    let info = boot_info();
    assert!(!ramdisk::bytes().is_empty());
    let wanted = [IMAGE..u64::MAX, pages_of(info), pages_of(&*info.memory_regions), pages_of(ramdisk::bytes())];
    let blocks = take_all();
    let (mut visited, mut handed_out) = (0, None);
    walk(Cr3::read().0, PageTableLevel::Four, 0, &wanted, &mut |address| {
        visited += 1;
        let inside = |&(frame, order): &(kslab::Frame, kslab::Order)| {
            (frame.address()..frame.address() + order.bytes() as u64).contains(&address)
        };
        handed_out = handed_out.or(blocks.iter().find(|block| inside(block)).map(|_| address));
    });
    give_back(blocks);
    assert_eq!(
        handed_out, None,
        "the frame at this address holds a page table, the image, the ramdisk or the boot information"
    );
    assert!(visited > 50, "only {visited} frames of tables and image were found");
}
