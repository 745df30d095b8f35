//! The bullets of *BareMetal-OS pages of 2 MiB*, one after the other.

use std::vec::Vec;

use super::*;
use crate::testing::{Machine, Threads, be_cpu};

const START: u64 = 64 << 20;
const PAGE: usize = 2 << 20;
/// So many pages of memory; one is not whole, since it has the frame records.
const PAGES: usize = 8;

fn map<const BYTES: usize>() -> [AtomicU8; BYTES] {
    [const { AtomicU8::new(NONE) }; BYTES]
}

fn release<P: Platform>(pages: &Pages<'_, P>, address: *mut u8, count: usize) -> usize {
    // SAFETY: no test uses what it has released.
    unsafe { pages.os_mem_release(address, count) }
}

fn bytes<P: Platform>(pages: &Pages<'_, P>) -> Vec<u8> {
    pages.os_mem_get_free();
    pages.map().iter().map(|byte| byte.load(Relaxed)).collect()
}

#[test]
fn allocate_searches_from_the_top_down() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap();
    let map = map::<{ PAGES + 3 }>();
    let pages = Pages::new(&heap, START, &map);
    // The records are at the end.
    let expected = [(1, 6), (2, 4), (1, 3), (3, 0)];
    for (count, first) in expected {
        let address = pages.os_mem_allocate(count);
        assert_eq!(address, machine.at(first * PAGE), "{count}");
        assert!(address.addr().is_multiple_of(PAGE));
        // SAFETY: the last byte of the last of them.
        unsafe { address.add(count * PAGE - 1).write(1) };
    }
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn allocate_finds_pages_in_a_row_or_fails_with_0() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap();
    let map = map::<PAGES>();
    let pages = Pages::new(&heap, START, &map);
    let all: Vec<_> = (0..7).map(|_| pages.os_mem_allocate(1)).collect();
    assert!(pages.os_mem_allocate(1).is_null());
    // Free are the numbers 5, 3 and 2.
    for index in [1, 3, 4] {
        assert_eq!(release(&pages, all[index], 1), 1);
    }
    assert!(pages.os_mem_allocate(3).is_null() && pages.os_mem_allocate(usize::MAX).is_null());
    assert_eq!(pages.os_mem_get_free(), 3);
    assert_eq!(pages.os_mem_allocate(2), machine.at(2 * PAGE));
    assert_eq!(pages.os_mem_allocate(1), machine.at(5 * PAGE));
}

#[test]
fn allocate_of_no_pages_fails() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap();
    let map = map::<PAGES>();
    let pages = Pages::new(&heap, START, &map);
    assert!(pages.os_mem_allocate(0).is_null());
    assert_eq!(pages.os_mem_get_free(), 7);
}

#[test]
fn release_returns_the_pages_freed_which_need_not_be_those_of_one_allocation() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap_on::<Threads>();
    heap.shrink();
    let before = heap.available();
    let map = map::<PAGES>();
    let pages = Pages::new(&heap, START, &map);
    let two = pages.os_mem_allocate(2);
    let four = pages.os_mem_allocate(4);
    assert_eq!(four.addr() + 4 * PAGE, two.addr());
    assert_eq!(release(&pages, four.wrapping_add(PAGE), 4), 4, "three of the four and one of the two");
    assert_eq!(release(&pages, four, 1) + release(&pages, two.wrapping_add(PAGE), 1), 2);
    assert_eq!(heap.available(), before);
    assert_eq!(heap.verify(), Ok(()));
}

#[test]
fn get_free_counts_the_free_pages_of_the_frames() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap();
    let map = map::<PAGES>();
    let pages = Pages::new(&heap, START, &map);
    assert_eq!(pages.os_mem_get_free(), 7);
    let three = pages.os_mem_allocate(3);
    assert_eq!(pages.os_mem_get_free(), 4);
    // The rest of the kernel takes a page too, whole or in part.
    let frame = heap.frames().allocate(Order::LARGE_PAGE).unwrap();
    assert_eq!(pages.os_mem_get_free(), 3);
    // SAFETY: allocated above, and used by nobody.
    unsafe { heap.frames().free(frame, Order::LARGE_PAGE) };
    assert_eq!(release(&pages, three, 3), 3);
    assert_eq!(pages.os_mem_get_free(), 7);
    let in_part = heap.frames().frame_of(machine.at(2 * PAGE + 4096)).unwrap();
    assert!(heap.frames().allocate_at(in_part, 1));
    assert_eq!(pages.os_mem_get_free(), 6);
    assert_eq!(pages.os_mem_allocate(4), machine.at(3 * PAGE));
    assert!(pages.os_mem_allocate(3).is_null());
}

#[test]
fn the_byte_map_has_1_for_free_pages_and_2_for_used_ones() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap();
    let map = map::<{ PAGES + 2 }>();
    // From a page before the memory to one behind it.
    let pages = Pages::new(&heap, START - 1, &map);
    assert_eq!(bytes(&pages), [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    let two = pages.os_mem_allocate(2);
    assert_eq!(bytes(&pages), [0, 1, 1, 1, 1, 1, 2, 2, 0, 0]);
    let kernels = heap.frames().frame_of(machine.at(PAGE)).unwrap();
    assert!(heap.frames().allocate_at(kernels, 600));
    assert_eq!(bytes(&pages), [0, 1, 0, 0, 1, 1, 2, 2, 0, 0]);
    assert_eq!(release(&pages, two, 1), 1);
    assert_eq!(bytes(&pages), [0, 1, 0, 0, 1, 1, 1, 2, 0, 0]);
}

#[test]
fn a_bad_release_is_rejected_and_changes_nothing() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap();
    let map = map::<PAGES>();
    let pages = Pages::new(&heap, START, &map);
    let two = pages.os_mem_allocate(2);
    let kernels = heap.frames().allocate(Order::LARGE_PAGE).unwrap();
    let before = (pages.os_mem_get_free(), heap.available());
    let bad = [
        (ptr::null_mut(), 1),
        (two, 3),
        (two, 0),
        (two, usize::MAX),
        (two.wrapping_sub(PAGE), 2),
        (two.wrapping_sub(PAGE), 1),
        (two.wrapping_add(4096), 1),
        (two.wrapping_add(1), 1),
        (heap.frames().pointer(kernels), 1),
        (machine.at(PAGES * PAGE), 1),
        (ptr::without_provenance_mut(usize::MAX), 1),
        (ptr::without_provenance_mut(0x20_0000), 1),
    ];
    for (address, count) in bad {
        assert_eq!(release(&pages, address, count), 0, "{address:p} {count}");
    }
    assert_eq!((pages.os_mem_get_free(), heap.available(), heap.faults()), (before.0, before.1, 0));
    assert_eq!(release(&pages, two, 2), 2);
    assert_eq!(release(&pages, two, 2), 0, "once");
    assert_eq!(release(&pages, two, 1), 0);
}

#[test]
fn cpus_allocate_and_release_at_once_and_never_the_same_pages() {
    let machine = Machine::new(START, PAGES * 512);
    let heap = machine.heap_on::<Threads>();
    let map = map::<PAGES>();
    let pages = &Pages::new(&heap, START, &map);
    let rounds = if cfg!(miri) { 3 } else { 500 };
    std::thread::scope(|scope| {
        for cpu in 0..4 {
            scope.spawn(move || {
                be_cpu(cpu);
                for round in 0..rounds {
                    let count = 1 + (round + cpu) % 3;
                    let address = pages.os_mem_allocate(count);
                    if address.is_null() {
                        continue;
                    }
                    for page in 0..count {
                        let word = address.wrapping_add(page * PAGE).cast::<usize>();
                        // SAFETY: pages of our own.
                        unsafe { word.write(cpu) };
                        std::thread::yield_now();
                        // SAFETY: as above.
                        assert_eq!(unsafe { word.read() }, cpu);
                    }
                    assert_eq!(release(pages, address, count), count);
                }
            });
        }
    });
    assert_eq!(pages.os_mem_get_free(), 7);
    assert_eq!(heap.verify(), Ok(()));
}
