//! The kernel's image in memory, as the linker script `kernel.ld` lays it out.

use core::fmt;
use core::ops::Range;

use x86_64::structures::paging::PageTableFlags;
use x86_64::{PhysAddr, VirtAddr};

/// The physical address of a byte of the image is its virtual address without this, where QEMU loads it directly.
pub(crate) const BASE: u64 = 0xffff_ffff_8000_0000;

/// A run of pages of the image with equal permissions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// What it holds.
    pub(crate) name: &'static str,
    /// The virtual addresses; both ends are page-aligned.
    pub(crate) addresses: Range<VirtAddr>,
    /// How its pages are mapped.
    pub(crate) flags: PageTableFlags,
}

impl fmt::Display for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}", self.name)
    }
}

/// The segments in ascending order; the next begins where one ends.
pub(crate) fn segments() -> [Segment; 3] {
    let [text, rodata, data, end] = linker::bounds();
    let segment = |name, start, end, flags| Segment { name, addresses: start..end, flags };
    let read = PageTableFlags::PRESENT;
    [
        segment("text", text, rodata, read),
        segment("rodata", rodata, data, read | PageTableFlags::NO_EXECUTE),
        segment("data", data, end, read | PageTableFlags::NO_EXECUTE | PageTableFlags::WRITABLE),
    ]
}

/// The segment that `address` is in.
pub(crate) fn segment_at(address: VirtAddr) -> Option<Segment> {
    segments().into_iter().find(|segment| segment.addresses.contains(&address))
}

/// Whether `address` is in the code.
pub(crate) fn is_code(address: VirtAddr) -> bool {
    let [text, ..] = segments();
    text.addresses.contains(&address)
}

/// Whether `address` is in the code of the allocator, or of the libraries through which others call it.
pub(crate) fn is_allocator(address: VirtAddr) -> bool {
    linker::allocator().contains(&address)
}

/// Whether `address` is in the memory of variables.
pub(crate) fn is_data(address: VirtAddr) -> bool {
    data().contains(&address)
}

/// The memory of variables.
pub(crate) fn data() -> Range<VirtAddr> {
    let [.., data] = segments();
    data.addresses
}

/// The virtual addresses of the whole image.
pub(crate) fn addresses() -> Range<VirtAddr> {
    let [start, _, _, end] = linker::bounds();
    start..end
}

/// The physical address of `address`, one of the image, where QEMU loaded it directly.
pub(crate) fn physical(address: VirtAddr) -> PhysAddr {
    PhysAddr::new(address.as_u64() - BASE)
}

#[cfg(target_os = "none")]
mod linker {
    use core::ops::Range;

    use x86_64::VirtAddr;

    unsafe extern "C" {
        static __allocator_start: u8;
        static __allocator_end: u8;
        static __text_start: u8;
        static __rodata_start: u8;
        static __data_start: u8;
        static __image_end: u8;
    }

    pub(super) fn bounds() -> [VirtAddr; 4] {
        [&raw const __text_start, &raw const __rodata_start, &raw const __data_start, &raw const __image_end]
            .map(VirtAddr::from_ptr)
    }

    pub(super) fn allocator() -> Range<VirtAddr> {
        VirtAddr::from_ptr(&raw const __allocator_start)..VirtAddr::from_ptr(&raw const __allocator_end)
    }
}

/// A host program has no such image; these are pages of one for unit tests.
#[cfg(not(target_os = "none"))]
mod linker {
    use core::ops::Range;

    use x86_64::VirtAddr;

    use super::BASE;

    pub(super) fn bounds() -> [VirtAddr; 4] {
        [0x20_0000, 0x20_4000, 0x20_6000, 0x20_9000].map(|offset| VirtAddr::new(BASE + offset))
    }

    pub(super) fn allocator() -> Range<VirtAddr> {
        let [text, ..] = bounds();
        text..text + 0x2000
    }
}
