//! Guarded objects: an access beyond one or after its free is a page fault, whose report names the object.

use alloc::vec::Vec;
use core::ptr::NonNull;

use kernel::cpus;
use kernel::heap::HEAP;
use kernel::threads;
use kslab::Cache;
use kslab::check::Checks;
use x86_64::instructions::interrupts;

use super::support::{PAGE, another, free_object, layout, merged_stats, on_each};
use crate::guest::runner::{report, test};

type Sockets = Cache<'static, kernel::cpus::Cpus>;

const SIZE: usize = 64;

fn sockets(checks: Checks) -> Sockets {
    Cache::new(HEAP.caches(), "sockets", layout(SIZE, 8)).with_checks(checks)
}

fn guarded() -> Sockets {
    sockets(Checks::GUARD | Checks::AUDIT)
}

fn allocate(cache: &Sockets) -> NonNull<u8> {
    cache.allocate().expect("memory")
}

fn read(object: NonNull<u8>, offset: isize) -> u8 {
    // SAFETY: it breaks the contract where the CPU refuses.
    unsafe { object.offset(offset).read_volatile() }
}

fn write(object: NonNull<u8>, offset: isize) {
    // SAFETY: as above, or it is in pages of the object's own.
    unsafe { object.offset(offset).write_volatile(0) }
}

/// The headline of a page fault that the allocator explains.
macro_rules! fault {
    ($access:literal $(, $line:literal)* $(,)?) => {
        concat!("page fault: ", $access, " 0x*, not mapped\nkslab: access to 0x*: " $(, $line, "\n  ")*, "now: ...")
    };
}

test!(
    row_21_a_write_one_byte_behind_a_guarded_object_is_named,
    stops_with = fault!(
        "write to",
        "1 byte behind an object",
        "kind: GUARD",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
    )
);
fn row_21_a_write_one_byte_behind_a_guarded_object_is_named() {
    let object = allocate(&guarded());
    write(object, SIZE as isize - 1);
    write(object, SIZE as isize);
}

test!(
    row_21_a_read_behind_a_guarded_block_of_two_pages_is_named,
    stops_with = fault!(
        "read from",
        "8 bytes behind an object",
        "kind: GUARD",
        "cache: size-8192",
        "object: 0x*, slot 0, 8192 bytes, 8192 requested, aligned to 1",
    )
);
fn row_21_a_read_behind_a_guarded_block_of_two_pages_is_named() {
    HEAP.set_checks("size-8192:guard").expect("rules");
    let block = HEAP.allocate(layout(8192, 1)).expect("memory");
    write(block, 0);
    write(block, 8191);
    read(block, 8192 + 7);
}

test!(
    row_21_a_write_behind_the_last_element_of_a_vector_is_named,
    stops_with = fault!(
        "write to",
        "1 byte behind an object",
        "kind: GUARD",
        "cache: size-80",
        "object: 0x*, slot 0, 80 bytes, 80 requested, aligned to 8",
        "allocated: event 1, CPU 0, by ...",
    )
);
fn row_21_a_write_behind_the_last_element_of_a_vector_is_named() {
    HEAP.set_checks("size-80:guard,audit").expect("rules");
    let mut numbers: Vec<u64> = Vec::with_capacity(10);
    numbers.resize(10, 7);
    // SAFETY: it breaks the contract where the CPU refuses.
    unsafe { numbers.as_mut_ptr().add(10).write_volatile(7) };
}

test!(
    row_19_a_write_below_the_page_of_a_guarded_object_is_named,
    stops_with = fault!(
        "write to",
        "4033 bytes before an object",
        "kind: GUARD",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
    )
);
fn row_19_a_write_below_the_page_of_a_guarded_object_is_named() {
    write(allocate(&guarded()), SIZE as isize - PAGE as isize - 1);
}

test!(
    row_19_a_write_before_a_guarded_object_in_its_page_is_found_at_its_free,
    stops_with = report!(
        "damage at 0x*: written to outside the object",
        "kind: REDZONE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "damage: at offset -1: expected 0xfe, found 0x00",
        "dump: ...",
        "allocated: event 1, CPU 0, ...",
    )
);
fn row_19_a_write_before_a_guarded_object_in_its_page_is_found_at_its_free() {
    let cache = guarded();
    let object = allocate(&cache);
    write(object, -1);
    free_object(&cache, object);
}

test!(
    row_25_a_read_of_a_guarded_object_after_its_free_is_named,
    stops_with = fault!(
        "read from",
        "read or written after it was freed",
        "kind: GUARD",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_25_a_read_of_a_guarded_object_after_its_free_is_named() {
    let cache = guarded();
    let object = allocate(&cache);
    free_object(&cache, object);
    // Others use other places.
    let _others: [_; 100] = [(); 100].map(|()| allocate(&cache));
    read(object, 5);
}

test!(
    row_25_a_read_on_a_cpu_that_knew_the_page_is_named,
    cpus = 2,
    stops_with = fault!(
        "read from",
        "read or written after it was freed",
        "kind: GUARD",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_25_a_read_on_a_cpu_that_knew_the_page_is_named() {
    let cache = guarded();
    let object = allocate(&cache);
    let other = another().expect("two CPUs");
    let read_there = || {
        let read = |address| _ = read(NonNull::new(address as *mut u8).expect("an object"), 0);
        cpus::call_on(other, read, object.as_ptr().expose_provenance()).expect("it is online");
    };
    read_there();
    free_object(&cache, object);
    read_there();
}

test!(
    row_26_a_write_to_a_guarded_object_after_its_free_is_named,
    stops_with = fault!(
        "write to",
        "read or written after it was freed",
        "kind: GUARD",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_26_a_write_to_a_guarded_object_after_its_free_is_named() {
    let cache = guarded();
    let object = allocate(&cache);
    free_object(&cache, object);
    write(object, SIZE as isize - 1);
}

test!(
    row_26_a_use_of_an_object_whose_cache_has_ended_is_named,
    stops_with = fault!(
        "read from",
        "read or written after it was freed",
        "kind: GUARD",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_26_a_use_of_an_object_whose_cache_has_ended_is_named() {
    let cache = guarded();
    let object = allocate(&cache);
    free_object(&cache, object);
    cache.destroy().expect("no object is allocated");
    read(object, 0);
}

test!(
    row_26_a_use_of_an_object_that_was_unmapped_later_is_named,
    stops_with = fault!(
        "read from",
        "read or written after it was freed",
        "kind: GUARD",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
    )
);
fn row_26_a_use_of_an_object_that_was_unmapped_later_is_named() {
    let cache = sockets(Checks::GUARD | Checks::POISON);
    let object = allocate(&cache);
    interrupts::without_interrupts(|| free_object(&cache, object));
    assert_eq!(read(object, 0), 0xef, "it waits");
    HEAP.maintain(0);
    read(object, 0);
}

test!(
    row_01_a_second_free_of_a_guarded_object_is_refused,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_01_a_second_free_of_a_guarded_object_is_refused() {
    let cache = guarded();
    let object = allocate(&cache);
    free_object(&cache, object);
    free_object(&cache, object);
}

test!(
    row_07_a_free_inside_a_guarded_object_is_refused,
    stops_with = report!(
        "bad free of 0x*: not the start of an allocation",
        "kind: BADBASE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 64 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
    )
);
fn row_07_a_free_inside_a_guarded_object_is_refused() {
    let cache = guarded();
    let object = allocate(&cache);
    // SAFETY: within the object.
    free_object(&cache, unsafe { object.add(8) });
}

test!(guarded_objects_are_allocated_and_freed_on_every_cpu_and_leave_nothing);
fn guarded_objects_are_allocated_and_freed_on_every_cpu_and_leave_nothing() {
    fn work() {
        let mut lists = Vec::new();
        for size in 1..200 {
            let list: Vec<u8> = (0..size * 7).map(|at| at as u8).collect();
            lists.push(list);
            if size % 3 == 0 {
                let list = lists.swap_remove(size % lists.len());
                assert!(list.iter().enumerate().all(|(at, byte)| *byte == at as u8));
            }
        }
    }
    HEAP.set_checks("size-3*:guard/2,redzone,poison").expect("rules");
    let settled = || {
        // Interrupts are off there: so nothing is unmapped by that.
        on_each(|_| work(), 0);
        HEAP.maintain(0);
        merged_stats().free
    };
    settled();
    let before = settled();
    let threads = cpus::online().map(|cpu| threads::spawn_on(cpu, "worker", 16 * PAGE, work).expect("memory"));
    threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join());
    assert_eq!(HEAP.check_objects(), 0);
    HEAP.set_checks("size-3*:none").expect("rules");
    let after = merged_stats().free;
    assert!(after + 8 >= before, "{before} page frames were free, {after} are");
    assert_eq!(HEAP.verify(), Ok(()));
}
