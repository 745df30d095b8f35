//! Blocks above the heap's largest, 1 GiB: each is mapped by itself, in a table of few places.

use core::alloc::Layout;
use core::ffi::c_void;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::memory::PAGE;

/// So many at a time.
const PLACES: usize = 64;

/// Where a block is, 0 for none and [`BUSY`] while that changes, and its bytes.
static PLACE: [(AtomicUsize, AtomicUsize); PLACES] = [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; PLACES];
const BUSY: usize = 1;

/// There was one: before that, nobody looks.
static EVER: AtomicUsize = AtomicUsize::new(0);

/// A block, all zero.
#[cold]
pub(crate) fn map(layout: Layout) -> Option<*mut c_void> {
    if layout.align() > PAGE {
        return None;
    }
    let bytes = layout.size().checked_next_multiple_of(PAGE)?;
    let claim = |place: &&(AtomicUsize, _)| place.0.compare_exchange(0, BUSY, AcqRel, Relaxed).is_ok();
    let (address, size) = PLACE.iter().find(claim)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new addresses, wherever the system likes.
    let block = unsafe { libc::mmap(core::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if block == libc::MAP_FAILED {
        address.store(0, Release);
        return None;
    }
    EVER.store(1, Release);
    size.store(bytes, Relaxed);
    address.store(block.addr(), Release);
    Some(block)
}

fn place(block: *const c_void) -> Option<&'static (AtomicUsize, AtomicUsize)> {
    if EVER.load(Acquire) == 0 || block.addr() <= BUSY {
        return None;
    }
    PLACE.iter().find(|place| place.0.load(Acquire) == block.addr())
}

/// Bytes of a block, if it is one of these.
#[inline]
pub(crate) fn size(block: *const c_void) -> Option<usize> {
    place(block).map(|place| place.1.load(Relaxed))
}

/// Frees a block, if it is one of these.
#[inline]
pub(crate) fn unmap(block: *mut c_void) -> bool {
    let Some((address, size)) = place(block) else { return false };
    let bytes = size.load(Relaxed);
    let claimed = address.compare_exchange(block.addr(), BUSY, AcqRel, Relaxed).is_ok();
    if claimed {
        // SAFETY: mapped with so many bytes, and only one takes it out of the table.
        unsafe { libc::munmap(block, bytes) };
        address.store(0, Release);
    }
    claimed
}
