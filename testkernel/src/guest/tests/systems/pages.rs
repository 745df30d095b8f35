//! BareMetal-OS's pages of 2 MiB: `os/syscalls/memory.asm`.

use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::Ordering::Relaxed;

use kernel::memory;
use kslab::Order;
use kslab::systems::pages::{FREE, NONE, USED};

use super::super::support::{Block, PAGE, layout, unchanged};
use super::{MAP, c, fill, holds, on_four_threads};
use crate::guest::runner::test;

const LARGE: usize = 2 << 20;

fn release(address: *mut c_void, pages: usize) -> usize {
    // SAFETY: no test uses what it has released.
    unsafe { c::os_mem_release(address, pages) }
}

/// The number of the page there.
fn index_of(address: *mut c_void) -> usize {
    let physical = address.addr() - memory::physical(0).addr();
    assert!(physical.is_multiple_of(LARGE), "{address:p}");
    physical / LARGE
}

/// The map as it is now.
fn map() -> [u8; MAP.len()] {
    c::os_mem_get_free();
    MAP.each_ref().map(|byte| byte.load(Relaxed))
}

/// The highest `pages` free pages in a row, as the map has them.
fn highest(map: &[u8], pages: usize) -> Option<usize> {
    (0..=map.len() - pages).rev().find(|&first| map[first..first + pages].iter().all(|&byte| byte == FREE))
}

test!(pages_are_searched_from_the_top_down_and_are_in_a_row);
/// *`os_mem_allocate(n)`: n contiguous 2 MiB pages, searched from the top down; 0 on failure; n = 0 fails.*
fn pages_are_searched_from_the_top_down_and_are_in_a_row() {
    unchanged(|| {
        for count in [1, 2, 3] {
            let first = highest(&map(), count).expect("pages");
            let pages = c::os_mem_allocate(count);
            assert_eq!(index_of(pages), first, "the highest {count}");
            fill(pages, count * LARGE, count as u8);
            assert!(map()[first..first + count].iter().all(|&byte| byte == USED));
            assert!(holds(pages, count * LARGE, count as u8));
            assert_eq!(release(pages, count), count);
        }
        // A page in the middle of the highest three that is used by somebody else: the search goes on below it.
        let three = c::os_mem_allocate(3);
        let middle = three.wrapping_byte_add(LARGE);
        assert_eq!((release(three, 1), release(middle.wrapping_byte_add(LARGE), 1)), (1, 1));
        let highest_two = highest(&map(), 2).expect("pages");
        let two = c::os_mem_allocate(2);
        assert_eq!(index_of(two), highest_two, "around the used page {middle:p}");
        assert_eq!((release(two, 2), release(middle, 1)), (2, 1));
        for too_many in [0, MAP.len() + 1, usize::MAX, c::os_mem_get_free() + 1] {
            assert!(c::os_mem_allocate(too_many).is_null(), "{too_many}");
        }
    });
}

test!(released_pages_are_counted_and_mapped_and_bad_releases_are_rejected);
/// *`os_mem_release(addr, n)` returns the pages freed; `os_mem_get_free` the free pages; a byte map, one byte a page (1 free,
/// 2 used). The original validates nothing: keep the interface and reject bad releases.*
fn released_pages_are_counted_and_mapped_and_bad_releases_are_rejected() {
    unchanged(|| {
        let before = map();
        let free = before.iter().filter(|&&byte| byte == FREE).count();
        assert!(before.iter().all(|&byte| byte == FREE || byte == NONE));
        assert_eq!(c::os_mem_get_free(), free);
        let pages = c::os_mem_allocate(3);
        assert_eq!(c::os_mem_get_free(), free - 3);
        let now = map();
        let first = index_of(pages);
        for (index, (&now, &before)) in now.iter().zip(&before).enumerate() {
            assert_eq!(now, if (first..first + 3).contains(&index) { USED } else { before }, "page {index}");
        }
        // A page of the heap's own, and addresses of no page.
        let block = Block::new(layout(LARGE, LARGE), 5).expect("memory");
        let own = block.start.as_ptr().cast();
        let inside = pages.wrapping_byte_add(PAGE);
        for (address, count) in
            [(own, 1), (inside, 1), (pages, 4), (pages, 0), (pages, usize::MAX), (ptr::null_mut(), 1)]
        {
            assert_eq!(release(address, count), 0, "{address:p} {count}");
        }
        assert!(block.is_intact());
        drop(block);
        assert_eq!(c::os_mem_get_free(), free - 3);
        // Not as they were allocated, as the original has it.
        assert_eq!((release(pages.wrapping_byte_add(LARGE), 2), release(pages, 1)), (2, 1));
        assert_eq!(release(pages, 1), 0, "twice");
        assert_eq!(c::os_mem_get_free(), free);
    });
}

test!(four_threads_never_get_the_same_page);
/// *`os_mem_allocate(n)`: n contiguous 2 MiB pages*, where four CPUs ask at once.
fn four_threads_never_get_the_same_page() {
    fn work(thread: usize) -> usize {
        let mut served = 0;
        for round in 0..20 {
            let pages = c::os_mem_allocate(1 + (thread + round) % 2);
            if pages.is_null() {
                continue;
            }
            // A byte at each end is enough to see another owner.
            let ends = [0, LARGE - 1].map(|at| pages.wrapping_byte_add(at));
            ends.iter().for_each(|&end| fill(end, 1, thread as u8));
            kernel::threads::yield_now();
            assert!(ends.iter().all(|&end| holds(end, 1, thread as u8)), "a page has two owners");
            served += release(pages, 1 + (thread + round) % 2);
        }
        served
    }
    assert_eq!(Order::LARGE_PAGE.bytes(), LARGE);
    let storm = || assert!(on_four_threads(work).into_iter().all(|served| served > 0));
    storm();
    unchanged(storm);
}
