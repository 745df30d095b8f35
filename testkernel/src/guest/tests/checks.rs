//! Objects with checks: what is written beside them or after their free stops the kernel with a report that names them.

use alloc::vec::Vec;
use core::alloc::Layout;
use core::hint::black_box;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use kernel::heap::{self, HEAP};
use kernel::{cmdline, symbols, threads};
use kslab::check::{Allocation, Checks};
use kslab::fault::{Event, OnFault, Report};
use kslab::{Cache, Order};
use x86_64::instructions::interrupts;

use super::support::{PAGE, another, frames, free_object, layout, on_each};
use crate::guest::runner::{note, report, test};

type Sockets = Cache<'static, kernel::cpus::Cpus>;

/// Objects of 61 bytes: three bytes of slack, before the red zone proper.
const SIZE: usize = 61;

fn sockets(checks: Checks) -> Sockets {
    Cache::new(HEAP.caches(), "sockets", layout(SIZE, 8)).with_checks(checks)
}

fn everything() -> Sockets {
    sockets(Checks::RED_ZONE | Checks::POISON | Checks::AUDIT)
}

fn write(object: NonNull<u8>, offset: isize) {
    // SAFETY: it breaks the contract, but stays within the slab, and the allocator must notice.
    unsafe { object.offset(offset).write(0) };
}

/// The object and its free after a write at `offset`.
fn write_and_free(offset: isize) {
    let cache = everything();
    let object = cache.allocate().expect("memory");
    write(object, offset);
    free_object(&cache, object);
}

/// A write at `offset` after the free, and the next allocation.
fn free_and_write(offset: isize) {
    let cache = everything();
    let object = cache.allocate().expect("memory");
    free_object(&cache, object);
    write(object, offset);
    let _next = cache.allocate();
}

test!(
    row_17_an_overflow_by_one_byte_is_found_at_the_free,
    stops_with = report!(
        "damage at 0x*: written to outside the object",
        "kind: REDZONE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "damage: at offset 61: expected 0xfa, found 0x00",
        "dump: ...",
        "allocated: event 1, CPU 0, ...",
    )
);
fn row_17_an_overflow_by_one_byte_is_found_at_the_free() {
    write_and_free(61);
}

test!(
    row_18_an_overflow_over_the_neighbour_is_found_at_the_free,
    stops_with = report!(
        "damage at 0x*: written to outside the object",
        "kind: REDZONE",
        "cache: sockets",
        "object: 0x*, slot 1, 64 bytes, 61 requested, aligned to 8",
        "damage: at offset -16: expected 0xce, found 0x00",
        "dump: ...",
        "allocated: event 2, CPU 0, ...",
    )
);
fn row_18_an_overflow_over_the_neighbour_is_found_at_the_free() {
    let cache = everything();
    let [first, second] = [(); 2].map(|()| cache.allocate().expect("memory"));
    let distance = second.as_ptr().addr() - first.as_ptr().addr();
    (0..8).for_each(|byte| write(first, distance as isize - 16 + byte));
    free_object(&cache, second);
}

test!(
    row_19_an_underflow_by_one_byte_is_found_at_the_free,
    stops_with = report!(
        "damage at 0x*: written to outside the object",
        "kind: REDZONE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "damage: at offset -1: expected 0xfe, found 0x00",
        "dump: ...",
        "allocated: event 1, CPU 0, ...",
    )
);
fn row_19_an_underflow_by_one_byte_is_found_at_the_free() {
    write_and_free(-1);
}

test!(
    row_20_a_write_into_the_slack_of_a_size_class_is_found_at_the_free,
    stops_with = report!(
        "damage at 0x*: written to outside the object",
        "kind: REDZONE",
        "cache: size-112",
        "object: 0x*, slot 0, 112 bytes, 105 requested, aligned to 1",
        "damage: at offset 110: expected 0xed, found 0x00",
        "dump: ...",
        "allocated: ...",
    )
);
fn row_20_a_write_into_the_slack_of_a_size_class_is_found_at_the_free() {
    HEAP.set_checks("size-112:redzone,audit").expect("rules");
    let block = HEAP.allocate(layout(105, 1)).expect("memory");
    write(block, 110);
    // SAFETY: allocated above.
    unsafe { HEAP.free(block, layout(105, 1)) };
}

test!(
    row_22_a_write_to_the_first_word_after_the_free_is_found_at_the_next_allocation,
    stops_with = report!(
        "damage at 0x*: written to after it was freed",
        "kind: MODIFIED",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "damage: at offset 0: expected 0xef, found 0x00",
        "dump: ...",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_22_a_write_to_the_first_word_after_the_free_is_found_at_the_next_allocation() {
    free_and_write(0);
}

test!(
    row_23_a_write_to_a_middle_byte_after_the_free_is_found_at_the_next_allocation,
    stops_with = report!(
        "damage at 0x*: written to after it was freed",
        "kind: MODIFIED",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "damage: at offset 33: expected 0xbe, found 0x00",
        "dump: ...",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_23_a_write_to_a_middle_byte_after_the_free_is_found_at_the_next_allocation() {
    free_and_write(33);
}

test!(
    row_24_a_write_where_others_keep_a_link_is_found_before_anything_follows_it,
    stops_with = report!(
        "damage at 0x*: written to after it was freed",
        "kind: MODIFIED",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "damage: at offset 0: expected 0xef, found 0x00",
        "dump: ...",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_24_a_write_where_others_keep_a_link_is_found_before_anything_follows_it() {
    let cache = everything();
    let object = cache.allocate().expect("memory");
    free_object(&cache, object);
    (0..8).for_each(|byte| write(object, byte));
    HEAP.check_objects();
}

test!(row_25_what_is_read_after_the_free_is_the_pattern);
fn row_25_what_is_read_after_the_free_is_the_pattern() {
    let cache = sockets(Checks::POISON);
    let object = cache.allocate().expect("memory");
    // SAFETY: with poison it is initialised, and its slab stays.
    let first = || unsafe { object.cast::<u64>().read_volatile() };
    assert_eq!(first(), 0xbadd_cafe_badd_cafe);
    free_object(&cache, object);
    assert_eq!(first(), 0xdead_beef_dead_beef);
    cache.destroy().expect("no object is allocated");
}

test!(
    row_31_an_object_whose_tag_is_overwritten_too_is_named,
    stops_with = report!(
        "damage at 0x*: what is known of its allocation was overwritten",
        "kind: BADBUFTAG",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes",
    )
);
fn row_31_an_object_whose_tag_is_overwritten_too_is_named() {
    let cache = everything();
    let object = cache.allocate().expect("memory");
    (61..160).for_each(|offset| write(object, offset));
    free_object(&cache, object);
}

test!(
    row_06_a_second_free_while_the_object_waits_is_refused,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 0, ...",
    )
);
fn row_06_a_second_free_while_the_object_waits_is_refused() {
    let cache = sockets(Checks::ALL);
    let object = cache.allocate().expect("memory");
    free_object(&cache, object);
    free_object(&cache, object);
}

test!(
    row_04_the_report_of_a_second_free_says_on_which_cpus_it_was_freed,
    cpus = 2,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: sockets",
        "object: 0x*, slot 0, 64 bytes, 61 requested, aligned to 8",
        "allocated: event 1, CPU 0, ...",
        "freed: event 2, CPU 1, ...",
    )
);
fn row_04_the_report_of_a_second_free_says_on_which_cpus_it_was_freed() {
    static SOCKETS: Sockets = Cache::new(HEAP.caches(), "sockets", layout(SIZE, 8)).with_checks(Checks::ALL);
    let object = SOCKETS.allocate().expect("memory");
    let free = |address| free_object(&SOCKETS, NonNull::new(address as *mut u8).expect("an object"));
    let other = another().expect("two CPUs");
    kernel::cpus::call_on(other, free, object.as_ptr().expose_provenance()).expect("it is online");
    free_object(&SOCKETS, object);
}

/// A free, with another layout, of a block of 105 bytes whose class has red zones.
fn allocate_and_free_as(other: Layout) {
    HEAP.set_checks("size-112:redzone").expect("rules");
    let block = HEAP.allocate(layout(105, 1)).expect("memory");
    // SAFETY: refused.
    unsafe { HEAP.free(block, other) };
}

test!(
    row_15_a_size_of_the_same_class_is_refused_where_it_is_known,
    stops_with = report!(
        "bad free of 0x*: wrong layout: freed as a block of 106 bytes, allocated as one of 105",
        "kind: BADSIZE",
        "cache: size-112",
        "object: 0x*, slot 0, 112 bytes, 105 requested, aligned to 1",
    )
);
fn row_15_a_size_of_the_same_class_is_refused_where_it_is_known() {
    allocate_and_free_as(layout(106, 1));
}

test!(
    row_16_an_alignment_of_the_same_class_is_refused_where_it_is_known,
    stops_with = report!(
        "bad free of 0x*: wrong layout: freed as aligned to 2 bytes, allocated as aligned to 1",
        "kind: BADSIZE",
        "cache: size-112",
        "object: 0x*, slot 0, 112 bytes, 105 requested, aligned to 1",
    )
);
fn row_16_an_alignment_of_the_same_class_is_refused_where_it_is_known() {
    allocate_and_free_as(layout(105, 2));
}

/// Counts nothing itself: the heap does.
fn go_on(_: &Report) -> OnFault {
    OnFault::KeepOut
}

test!(a_kernel_may_keep_bad_objects_out_of_circulation_and_go_on);
fn a_kernel_may_keep_bad_objects_out_of_circulation_and_go_on() {
    let cache = everything();
    let before = HEAP.faults();
    HEAP.set_fault_handler(Some(go_on));
    let [over, twice] = [(); 2].map(|()| cache.allocate().expect("memory"));
    write(over, 64);
    free_object(&cache, over);
    free_object(&cache, twice);
    free_object(&cache, twice);
    let frame = frames().allocate(Order::ZERO).expect("a frame");
    // SAFETY: allocated above; the second free is refused.
    (0..2).for_each(|_| unsafe { frames().free(frame, Order::ZERO) });
    HEAP.set_fault_handler(Some(kernel::heap::on_fault));
    assert_eq!(HEAP.faults() - before, 3);
    let more: [_; 50] = [(); 50].map(|()| cache.allocate().expect("memory"));
    assert!(!more.contains(&over) && more.contains(&twice));
    more.into_iter().for_each(|object| free_object(&cache, object));
    HEAP.verify().expect("all is in order");
}

test!(checks_hold_on_every_cpu);
fn checks_hold_on_every_cpu() {
    static SOCKETS: Sockets = Cache::new(HEAP.caches(), "checked", layout(SIZE, 8)).with_checks(Checks::ALL);
    on_each(
        |_| {
            let objects: [_; 100] = [(); 100].map(|()| SOCKETS.allocate().expect("memory"));
            // SAFETY: objects of so many bytes.
            objects.iter().for_each(|object| unsafe { object.write_bytes(0x11, SIZE) });
            objects.into_iter().for_each(|object| free_object(&SOCKETS, object));
        },
        0,
    );
    assert_eq!(HEAP.check_objects(), 0);
}

test!(row_115_without_entropy_the_order_of_slots_is_the_documented_one_and_with_it_another);
fn row_115_without_entropy_the_order_of_slots_is_the_documented_one_and_with_it_another() {
    let order = |seed: Option<u32>| {
        if let Some(seed) = seed {
            HEAP.set_seed(seed);
        }
        let cache = sockets(Checks::RANDOM);
        let objects: [_; 12] = [(); 12].map(|()| cache.allocate().expect("memory"));
        let first = objects.iter().map(|object| object.as_ptr().addr()).min().unwrap_or_default();
        let order = objects.map(|object| object.as_ptr().addr() - first);
        objects.into_iter().for_each(|object| free_object(&cache, object));
        cache.destroy().expect("no object is allocated");
        order
    };
    assert!(!order(None).is_sorted(), "random without any entropy");
    let [one, again, other] = [Some(1), Some(1), Some(2)].map(order);
    assert_eq!(one, again, "the same for the same number");
    assert_ne!(one, other);
}

test!(
    row_77_a_cache_that_is_ended_with_live_objects_says_who_has_made_them,
    stops_with = "panic: called `Result::unwrap()` on an `Err` value: cache sockets is not destroyed: 3 of its objects are \
                  allocated\n  3 objects, 183 bytes, such as 0x*, allocated: event ..."
);
fn row_77_a_cache_that_is_ended_with_live_objects_says_who_has_made_them() {
    let cache = sockets(Checks::AUDIT);
    // One call, which the compiler does not repeat.
    for _ in 0..black_box(3) {
        cache.allocate().expect("memory");
    }
    cache.destroy().unwrap();
}

#[inline(never)]
fn makes_a_ledger() -> Vec<u8> {
    black_box(Vec::with_capacity(1234))
}

#[inline(never)]
fn makes_an_index() -> Vec<u8> {
    black_box((0..=200).collect())
}

/// Whether a function of this name is among the calls that have led to an event.
fn names(event: Option<Event>, function: &str) -> bool {
    let addresses = event.map(|event| event.addresses).unwrap_or_default();
    let mut calls = addresses.iter().take_while(|&&address| address != 0);
    calls.any(|&address| symbols::find(address as u64 - 1).is_some_and(|symbol| symbol.mangled.contains(function)))
}

test!(two_functions_that_make_a_vec_are_two_places_and_both_are_named);
fn two_functions_that_make_a_vec_are_two_places_and_both_are_named() {
    HEAP.set_checks("size-*:audit").expect("rules");
    let made = [makes_a_ledger(), makes_an_index()];
    HEAP.set_checks("size-*:none").expect("rules");
    for (function, bytes) in [("makes_a_ledger", 1234), ("makes_an_index", 201)] {
        let mut found = [(0, 0); 2];
        HEAP.for_each_site(|site| {
            if names(site.example.allocated, function) {
                found = [(site.objects, site.bytes), found[0]];
            }
        });
        assert_eq!(found, [(1, bytes), (0, 0)], "{function}");
    }
    drop(made);
    HEAP.set_checks(cmdline::value("kslab.check").unwrap_or("")).expect("rules");
}

static KEPT: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

#[inline(never)]
fn keeps_a_parcel(parcels: &Sockets) {
    KEPT.store(parcels.allocate().expect("memory").as_ptr(), Relaxed);
}

/// The address in disguise, which is no reference to it.
#[inline(never)]
fn loses_a_parcel(parcels: &Sockets) -> usize {
    !parcels.allocate().expect("memory").as_ptr().expose_provenance()
}

/// Writes over what calls have left below the stack in use.
#[inline(never)]
fn clear_the_stack() {
    black_box([0_u8; 16 << 10]);
}

test!(what_no_variable_and_no_stack_refers_to_is_a_leak);
fn what_no_variable_and_no_stack_refers_to_is_a_leak() {
    const SIZE: usize = 200;
    let parcels = Cache::new(HEAP.caches(), "parcels", layout(SIZE, 8)).with_checks(Checks::AUDIT);
    keeps_a_parcel(&parcels);
    let on_the_stack = black_box([parcels.allocate().expect("memory")]);
    let lost = loses_a_parcel(&parcels);
    clear_the_stack();
    let roots = heap::roots();
    let (mut leaks, mut places) = ([0; 4], [(0, false); 4]);
    let mut count = 0;
    interrupts::without_interrupts(|| {
        let found = |leak: &Allocation| {
            if leak.size == SIZE {
                leaks[count % 4] = !leak.object.addr().get();
                count += 1;
            }
        };
        // SAFETY: nobody uses the heap meanwhile: this CPU is here, and others have nothing to do.
        unsafe { HEAP.find_leaks(&roots, found) };
        let mut next = places.iter_mut();
        // SAFETY: as above.
        unsafe {
            HEAP.find_leaks_by_site(&roots, |site| {
                if site.example.size == SIZE
                    && let Some(place) = next.next()
                {
                    *place = (site.objects, names(site.example.allocated, "loses_a_parcel"));
                }
            });
        }
    });
    assert_eq!((count, leaks[0]), (1, lost), "just the one that was lost");
    assert_eq!(places, [(1, true), (0, false), (0, false), (0, false)], "and who has lost it");
    let lost = core::ptr::with_exposed_provenance_mut(!lost);
    let [mine] = black_box(on_the_stack);
    let others =
        [KEPT.swap(core::ptr::null_mut(), Relaxed), lost].map(|object| NonNull::new(object).expect("an object"));
    [mine].into_iter().chain(others).for_each(|object| free_object(&parcels, object));
    parcels.destroy().expect("no object is allocated");
}

/// Bytes of stack that the allocator may use below its caller: what the crate's documentation says.
const DEPTH: usize = 8 << 10;

/// How deep the stack is used by `work`, with interrupts off.
#[inline(never)]
fn depth_of(work: fn()) -> usize {
    const PAINT: u8 = 0xa5;
    const PAINTED: usize = 48 << 10;
    // Below the frame of whoever paints and looks.
    const SKIPPED: usize = 1 << 10;
    interrupts::without_interrupts(|| {
        let here = 0_u8;
        let top = (&raw const here).cast_mut().wrapping_sub(SKIPPED);
        let byte = |below: usize| top.wrapping_sub(below);
        // SAFETY: on this thread's stack, which has more than that, below everything that is in use.
        (1..PAINTED).for_each(|below| unsafe { byte(below).write_volatile(PAINT) });
        work();
        // SAFETY: as above.
        let used = (1..PAINTED).rev().find(|&below| unsafe { byte(below).read_volatile() } != PAINT);
        used.map_or(0, |below| below + SKIPPED)
    })
}

test!(row_106_the_allocator_uses_no_more_stack_than_it_says);
fn row_106_the_allocator_uses_no_more_stack_than_it_says() {
    fn all_of_it() {
        for checks in [Checks::NONE, Checks::ALL] {
            // A cache is made, slabs too; magazines are exchanged; all is given back.
            let cache = sockets(checks);
            let objects: [_; 40] = [(); 40].map(|()| cache.allocate().expect("memory"));
            objects.into_iter().for_each(|object| free_object(&cache, object));
            cache.shrink();
            cache.destroy().expect("no object is allocated");
        }
        let block = HEAP.allocate(layout(100, 8)).expect("memory");
        // SAFETY: allocated above, and each time with the layout said.
        unsafe {
            let block = HEAP.reallocate(block, layout(100, 8), 20_000).expect("memory");
            let block = HEAP.reallocate(block, layout(20_000, 8), 40_000).expect("memory");
            HEAP.free(block, layout(40_000, 8));
        }
        HEAP.maintain(0);
        HEAP.shrink();
    }
    let depth = threads::spawn("depth", 16 * PAGE, || depth_of(all_of_it)).expect("memory for a thread").join();
    note(format_args!("{depth} bytes of stack"));
    assert!(depth <= DEPTH, "{depth} bytes of stack");
}
