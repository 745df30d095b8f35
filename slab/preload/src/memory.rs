//! The heap's memory: a range of addresses, of which more and more is memory.

use core::alloc::Layout;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize};

use kslab::{Frame, Order};

use crate::{HEAP, threads};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Bytes of addresses that are asked for first; less where that cannot be had.
const RESERVED: usize = 256 << 30;
/// The first chunk, whose frame records the heap finds soonest; 256 KiB of records are written at the start of each program.
const FIRST: usize = 64 << 20;
/// The smallest of the others, and what they are multiples of.
const CHUNK: usize = 32 << 20;

static START: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
static RESERVE: AtomicUsize = AtomicUsize::new(0);
/// Bytes that are memory.
static USED: AtomicUsize = AtomicUsize::new(0);
/// How often some was added.
static ADDITIONS: AtomicUsize = AtomicUsize::new(0);
static ADDING: AtomicBool = AtomicBool::new(false);

pub(crate) fn set_up() {
    let mut bytes = RESERVED;
    while bytes >= FIRST {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new addresses, wherever the system likes.
        let start = unsafe { libc::mmap(core::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if start != libc::MAP_FAILED {
            START.store(start.cast(), Release);
            RESERVE.store(bytes, Release);
            break;
        }
        bytes /= 2;
    }
    if let Some(start) = take(FIRST) {
        // SAFETY: just made memory, for good, and nobody else's.
        _ = unsafe { HEAP.init_range(start, FIRST) };
    }
}

/// Makes so many bytes more memory; the caller is the only one.
fn take(bytes: usize) -> Option<*mut u8> {
    let (start, used) = (START.load(Acquire), USED.load(Relaxed));
    let left = RESERVE.load(Acquire) - used;
    if start.is_null() || bytes > left {
        return None;
    }
    let start = start.wrapping_add(used);
    // SAFETY: a part of what is reserved.
    let made = unsafe { libc::mprotect(start.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) } == 0;
    made.then(|| {
        USED.store(used + bytes, Relaxed);
        start
    })
}

/// To be asked before an attempt that may end in [`add`].
#[inline]
pub(crate) fn additions() -> usize {
    ADDITIONS.load(Acquire)
}

/// Adds memory for a block of `layout`, unless somebody has since there were so many `additions`. `false` where there is
/// none.
#[cold]
pub(crate) fn add(layout: Layout, additions: usize) -> bool {
    use kslab::platform::{IN_NMI, Platform};
    if threads::Threads::current_cpu() == IN_NMI {
        return false;
    }
    threads::wait_while(|| ADDING.swap(true, AcqRel));
    let added = self::additions() != additions || add_chunk(layout);
    ADDING.store(false, Release);
    added
}

fn add_chunk(layout: Layout) -> bool {
    // With its frame records, and however the chunk is aligned.
    let needed = layout.size() + layout.size() / 64 + layout.align();
    let wanted = needed.max(USED.load(Relaxed) / 4).next_multiple_of(CHUNK);
    let least = needed.next_multiple_of(CHUNK);
    let Some((start, bytes)) = [wanted, least].into_iter().find_map(|bytes| Some((take(bytes)?, bytes))) else {
        return false;
    };
    // SAFETY: just made memory, for good, and nobody else's; it was reserved together with the first.
    let added = unsafe { HEAP.add_range(start, bytes) }.is_ok();
    ADDITIONS.fetch_add(1, AcqRel);
    added
}

/// Gives the memory of large free blocks back to the system, which has it zero when it is next used. Says whether any of it was
/// there: what was given back before, or never used, is none.
pub(crate) fn give_back() -> bool {
    let mut blocks = [(Frame::default(), Order::ZERO); 64];
    let mut found = 0;
    let orders = (Order::LARGE_PAGE.get()..=Order::MAX.get()).rev().filter_map(Order::new);
    for order in orders {
        while found < blocks.len()
            && let Some(frame) = HEAP.frames().allocate(order)
        {
            blocks[found] = (frame, order);
            found += 1;
        }
    }
    let mut went_back = false;
    for (frame, order) in &blocks[..found] {
        let start = HEAP.frames().pointer(*frame);
        let was_there = is_there(start, order.bytes());
        // SAFETY: a block of our own, which need not be kept.
        let result = unsafe { libc::madvise(start.cast(), order.bytes(), libc::MADV_DONTNEED) };
        went_back |= was_there && result == 0;
        // SAFETY: allocated above, and used by nobody.
        unsafe { HEAP.frames().free(*frame, *order) };
    }
    went_back
}

/// Whether the system has memory for any page of a block, which is of whole 2 MiB.
fn is_there(start: *mut u8, bytes: usize) -> bool {
    const PART: usize = Order::LARGE_PAGE.bytes();
    (0..bytes).step_by(PART).any(|at| {
        let mut pages = [0; PART / PAGE];
        // SAFETY: reserved addresses, and a byte for each page.
        let known = unsafe { libc::mincore(start.wrapping_add(at).cast(), PART, pages.as_mut_ptr()) } == 0;
        known && pages.iter().any(|page| page & 1 != 0)
    })
}
