//! macOS's malloc zones: `malloc/malloc.h`, malloc_zone_malloc(3).

use alloc::vec;
use alloc::vec::Vec;
use core::ffi::{CStr, c_uint, c_void};
use core::hint::black_box;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use kernel::threads;
use kslab::systems::zones::{
    ADMIN_REGION_RANGE_TYPE, Handle, PTR_IN_USE_RANGE_TYPE, PTR_REGION_RANGE_TYPE, Range, Statistics,
};

use super::super::support::{PAGE, frames, give_back, shrink_everywhere, take_all, unchanged};
use super::{PRINTED, c, fill, holds, on_four_threads};
use crate::guest::runner::test;

fn destroy(zone: Handle) {
    // SAFETY: no test uses what it has destroyed.
    unsafe { c::malloc_destroy_zone(zone) };
}

fn malloc(zone: Handle, size: usize) -> *mut c_void {
    c::malloc_zone_malloc(zone, size)
}

fn free(zone: Handle, block: *mut c_void) {
    // SAFETY: no test uses what it has freed.
    unsafe { c::malloc_zone_free(zone, block) };
}

fn realloc(zone: Handle, block: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: no test uses a block that has moved.
    unsafe { c::malloc_zone_realloc(zone, block, size) }
}

fn set_name(zone: Handle, name: &CStr) {
    // SAFETY: a string.
    unsafe { c::malloc_set_zone_name(zone, name.as_ptr()) };
}

fn name<'a>(zone: Handle) -> Option<&'a CStr> {
    let name = c::malloc_get_zone_name(zone);
    // SAFETY: null, or the zone's copy, which no test uses when the zone has another.
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })
}

fn statistics(zone: Handle) -> Statistics {
    let mut statistics = Statistics::default();
    // SAFETY: a place of our own.
    unsafe { c::malloc_zone_statistics(zone, &raw mut statistics) };
    statistics
}

/// Two zones for `body`, which are destroyed with all that was allocated from them.
fn with_zones(body: impl FnOnce([Handle; 2])) {
    unchanged(|| {
        let zones = [c::malloc_create_zone(0, 0), c::malloc_create_zone(0, 0)];
        assert!(zones.iter().all(|zone| !zone.is_null()));
        body(zones);
        zones.into_iter().for_each(destroy);
    });
}

test!(a_zone_is_destroyed_with_all_it_has_and_found_while_it_is_registered_and_has_a_name);
/// *`malloc_create_zone`, `malloc_destroy_zone` (with everything it allocated), register / unregister, names.*
fn a_zone_is_destroyed_with_all_it_has_and_found_while_it_is_registered_and_has_a_name() {
    with_zones(|[zone, other]| {
        let before = frames().free_bytes();
        let large = c::malloc_create_zone(1 << 20, 0);
        assert!(before - frames().free_bytes() >= 1 << 20, "it has its start size from the start");
        let blocks: Vec<_> = (0..200).map(|index| malloc(large, index * 50)).collect();
        assert!(blocks.iter().all(|&block| c::malloc_zone_from_ptr(block) == large));
        destroy(large);
        assert!(blocks.iter().all(|&block| c::malloc_zone_from_ptr(block).is_null()), "they went with it");
        let block = malloc(zone, 100);
        c::malloc_zone_unregister(zone);
        assert!(c::malloc_zone_from_ptr(block).is_null());
        c::malloc_zone_register(zone);
        assert_eq!(c::malloc_zone_from_ptr(block), zone);
        // It keeps a copy.
        let mut text = *b"network\0";
        set_name(zone, CStr::from_bytes_with_nul(&text).expect("a string"));
        text.fill(b'X');
        black_box(&text);
        assert_eq!((name(zone), name(other)), (Some(c"network"), None));
        set_name(zone, c"a name that is longer than the other one");
        assert_eq!(name(zone), Some(c"a name that is longer than the other one"));
    });
    let default = c::malloc_default_zone();
    destroy(default);
    assert_eq!(c::malloc_default_zone(), default, "it stays");
    let all = take_all();
    let without_memory = c::malloc_create_zone(1 << 20, 0);
    give_back(all);
    assert!(without_memory.is_null());
}

test!(a_zone_has_malloc_calloc_valloc_free_realloc_and_memalign);
/// *Per zone: malloc, calloc, valloc (page-aligned, zeroed), free, realloc, memalign.*
fn a_zone_has_malloc_calloc_valloc_free_realloc_and_memalign() {
    with_zones(|[zone, _]| {
        let dirty = [100, 5000, 30_000].map(|size| (malloc(zone, size), size));
        for (block, size) in dirty {
            assert!(block.addr().is_multiple_of(16));
            fill(block, size, 0xff);
        }
        dirty.into_iter().for_each(|(block, _)| free(zone, block));
        for size in [100, 5000, 30_000] {
            let [zeroed, page] = [c::malloc_zone_calloc(zone, size / 10, 10), c::malloc_zone_valloc(zone, size)];
            assert!(holds(zeroed, size, 0) && holds(page, size, 0) && page.addr().is_multiple_of(PAGE), "{size}");
        }
        assert!(c::malloc_zone_calloc(zone, usize::MAX, 2).is_null());
        let mut block = realloc(zone, ptr::null_mut(), 20);
        fill(block, 20, 4);
        for size in [200, 20_000, 3000, 20] {
            block = realloc(zone, block, size);
            assert!(holds(block, 20, 4), "{size}");
        }
        let all = take_all();
        let grown = realloc(zone, block, 1 << 20);
        give_back(all);
        assert!(grown.is_null() && holds(block, 20, 4));
        for alignment in [8, 64, 4096, 1 << 16] {
            let block = c::malloc_zone_memalign(zone, alignment, 10);
            assert!(!block.is_null() && block.addr().is_multiple_of(alignment), "{alignment}");
        }
        assert!([0, 4, 24].iter().all(|&alignment| c::malloc_zone_memalign(zone, alignment, 8).is_null()));
        free(zone, ptr::null_mut());
        let none = ptr::without_provenance_mut(0x1000);
        assert!(malloc(none, 8).is_null() && c::malloc_zone_valloc(ptr::null_mut(), 8).is_null(), "no zones");
    });
}

test!(the_zone_and_the_size_of_a_pointer_are_found_and_a_batch_may_be_short);
/// *`malloc_zone_from_ptr`: the owning zone or NULL. `size(zone, p)`: 0 when not in the zone, fast when negative.
/// `malloc_good_size(n)` >= n. `batch_malloc` returns how many (may be short); `batch_free`.*
fn the_zone_and_the_size_of_a_pointer_are_found_and_a_batch_may_be_short() {
    with_zones(|[zone, other]| {
        for size in [1, 16, 17, 1000, 8192, 9000, 100_000] {
            let good = c::malloc_good_size(size);
            assert!(good >= size && c::malloc_good_size(good) == good, "{size}");
            let block = malloc(zone, size);
            assert_eq!((c::malloc_zone_size(zone, block), c::malloc_size(block)), (good, good));
            assert_eq!((c::malloc_zone_from_ptr(block), c::malloc_zone_size(other, block)), (zone, 0));
            let inside = block.wrapping_byte_add(8);
            assert_eq!((c::malloc_zone_from_ptr(inside), c::malloc_zone_size(zone, inside)), (ptr::null_mut(), 0));
        }
        // The kernel's own, its stack, and no memory.
        let kernels = vec![0_u64; 100];
        let none = [kernels.as_ptr().cast(), (&raw const kernels).cast(), ptr::null(), ptr::without_provenance(!7)];
        assert!(none.iter().all(|&none| c::malloc_zone_from_ptr(none).is_null() && c::malloc_size(none) == 0));
        let mut blocks = vec![ptr::null_mut(); 300];
        // SAFETY: room for so many.
        let count = |size, count| unsafe { c::malloc_zone_batch_malloc(zone, size, blocks.as_mut_ptr(), count) };
        let mut count = count;
        assert_eq!(count(200, 300), 300);
        // SAFETY: they are not used any more.
        unsafe { c::malloc_zone_batch_free(zone, blocks.as_mut_ptr(), 300) };
        assert!(blocks.iter().all(|&block| c::malloc_size(block) == 0), "all are free");
        let all = take_all();
        // SAFETY: as above.
        let short = unsafe { c::malloc_zone_batch_malloc(zone, 20_000, blocks.as_mut_ptr(), 300) };
        give_back(all);
        assert!(short < 300, "{short}");
        // SAFETY: the first ones were written.
        unsafe { c::malloc_zone_batch_free(zone, blocks.as_mut_ptr(), short) };
    });
}

test!(check_of_null_checks_all_zones_and_statistics_of_null_sum_them);
/// *`malloc_zone_check(NULL)` checks all. `statistics`: blocks_in_use, size_in_use, max_size_in_use, size_allocated; NULL
/// sums.*
fn check_of_null_checks_all_zones_and_statistics_of_null_sum_them() {
    c::malloc_default_zone();
    with_zones(|[zone, other]| {
        let before = statistics(ptr::null_mut());
        let blocks: Vec<_> = (0..10).map(|_| malloc(zone, 1000)).collect();
        let large = malloc(other, 50_000);
        let (size, large_size) = (c::malloc_size(blocks[0]), c::malloc_size(large));
        let now = statistics(zone);
        assert_eq!((now.blocks_in_use, now.size_in_use, now.max_size_in_use), (10, 10 * size, 10 * size));
        assert!(now.size_allocated >= now.size_in_use);
        let sum = statistics(ptr::null_mut());
        assert_eq!(sum.blocks_in_use, before.blocks_in_use + 11);
        assert_eq!(sum.size_in_use, before.size_in_use + 10 * size + large_size);
        assert!(sum.size_allocated >= now.size_allocated + statistics(other).size_allocated);
        blocks.into_iter().for_each(|block| free(zone, block));
        let now = statistics(zone);
        assert_eq!((now.blocks_in_use, now.size_in_use, now.max_size_in_use), (0, 0, 10 * size));
        assert_eq!((c::malloc_zone_check(zone), c::malloc_zone_check(ptr::null_mut())), (1, 1));
        assert_eq!(c::malloc_zone_check(ptr::without_provenance_mut(0x1000)), 0);
    });
}

test!(pressure_relief_returns_the_bytes_that_went_back);
/// *`pressure_relief(zone, goal)` returns the bytes released; goal 0 is as much as possible; NULL is all zones.*
fn pressure_relief_returns_the_bytes_that_went_back() {
    with_zones(|zones| {
        let fill_and_free = |zone: Handle| {
            let blocks: Vec<_> = (0..300).map(|_| malloc(zone, 1000)).collect();
            blocks.into_iter().for_each(|block| free(zone, block));
        };
        let relieve = |zone, goal| {
            shrink_everywhere();
            let before = frames().free_bytes();
            let released = c::malloc_zone_pressure_relief(zone, goal);
            assert_eq!(frames().free_bytes() - before, released, "it is in the kernel's page frames");
            released
        };
        zones.into_iter().for_each(fill_and_free);
        let one = relieve(zones[0], 0);
        assert!(one >= 200_000, "{one}");
        assert_eq!(relieve(zones[0], 0), 0, "all of it went back");
        fill_and_free(zones[0]);
        // With a goal it is enough when one zone has met it.
        let first = relieve(ptr::null_mut(), 1);
        let rest = relieve(ptr::null_mut(), 0);
        assert!(first >= 200_000 && rest >= 200_000, "{first}, {rest}");
        assert_eq!(relieve(ptr::null_mut(), 0), 0);
    });
}

/// Ranges that the enumerator has shown.
type Shown = Vec<(c_uint, Range)>;

extern "C" fn record(context: *mut c_void, kind: c_uint, ranges: *const Range, count: c_uint) {
    // SAFETY: the context of the test below, and as many ranges as it is told.
    let (shown, ranges) = unsafe { (&mut *context.cast::<Shown>(), slice::from_raw_parts(ranges, count as usize)) };
    shown.extend(ranges.iter().map(|&range| (kind, range)));
}

test!(the_enumerator_shows_blocks_and_regions_by_its_mask_and_zones_are_printed);
/// *An enumerator with a type mask (in use = 1, region = 2, admin = 4) and a recorder callback; print.*
fn the_enumerator_shows_blocks_and_regions_by_its_mask_and_zones_are_printed() {
    assert_eq!((PTR_IN_USE_RANGE_TYPE, PTR_REGION_RANGE_TYPE, ADMIN_REGION_RANGE_TYPE), (1, 2, 4));
    with_zones(|[zone, other]| {
        let enumerate = |mask| {
            let mut shown = Shown::new();
            // SAFETY: the context is what the recorder takes it for.
            assert_ne!(unsafe { c::malloc_zone_enumerate(zone, (&raw mut shown).cast(), mask, record) }, 0);
            assert!(shown.iter().all(|(kind, _)| kind & mask == *kind && kind.count_ones() == 1));
            shown
        };
        let mut blocks: Vec<_> = (0..100).map(|index| malloc(zone, 10 + index * 100)).collect();
        assert!(!malloc(other, 100).is_null());
        free(zone, blocks.remove(50));
        let mut expected: Vec<_> = blocks.iter().map(|&block| (block.addr(), c::malloc_size(block))).collect();
        expected.sort_unstable();
        let mut in_use: Vec<_> = enumerate(1).iter().map(|(_, range)| (range.address, range.size)).collect();
        in_use.sort_unstable();
        assert_eq!(in_use, expected);
        let all = enumerate(7);
        let ranges = |kind| all.iter().filter(move |shown| shown.0 == kind).map(|shown| shown.1);
        assert_eq!(ranges(1).count(), expected.len());
        for block in ranges(1) {
            let has = |region: Range| {
                region.address <= block.address && block.address + block.size <= region.address + region.size
            };
            assert!(ranges(2).any(has) && !ranges(4).any(has), "{block:x?}");
        }
        let pages: usize = ranges(2).chain(ranges(4)).map(|range| range.size).sum();
        assert_eq!(pages, statistics(zone).size_allocated);
        assert!(enumerate(0).is_empty());
        let printed = |verbose| {
            PRINTED.store(0, Ordering::Relaxed);
            c::malloc_zone_print(zone, verbose);
            PRINTED.load(Ordering::Relaxed)
        };
        let (short, long) = (printed(0), printed(1));
        assert!((40..200).contains(&short) && long > 100 * 10, "{short} and {long} characters");
    });
}

test!(a_zone_that_is_locked_by_force_serves_nobody_until_it_is_unlocked);
/// *force lock / unlock*
fn a_zone_that_is_locked_by_force_serves_nobody_until_it_is_unlocked() {
    static ZONE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    static STARTED: AtomicUsize = AtomicUsize::new(0);
    static SERVED: AtomicBool = AtomicBool::new(false);
    let spawn = |body: fn()| threads::spawn("waits", 32 << 10, body).expect("memory");
    // The page tables of its stack stay.
    spawn(|| ()).join();
    with_zones(|[zone, other]| {
        ZONE.store(zone, Ordering::Release);
        STARTED.store(0, Ordering::Relaxed);
        SERVED.store(false, Ordering::Relaxed);
        c::malloc_zone_force_lock(zone);
        assert_eq!((c::malloc_zone_locked(zone), c::malloc_zone_locked(other)), (1, 0));
        let body = || {
            STARTED.fetch_add(1, Ordering::Relaxed);
            let zone = ZONE.load(Ordering::Acquire);
            // This waits while another thread has the zone locked, and spins: the timer takes its turn from it.
            let block = malloc(zone, 100);
            SERVED.store(true, Ordering::Relaxed);
            free(zone, block);
        };
        kernel::timer::start(50_000, || {});
        let waiting = spawn(body);
        while STARTED.load(Ordering::Relaxed) == 0 {
            threads::yield_now();
        }
        for _ in 0..3 {
            threads::yield_now();
            assert!(!SERVED.load(Ordering::Relaxed), "the zone is locked");
            assert!(!malloc(other, 100).is_null(), "the other zone is not");
        }
        c::malloc_zone_force_unlock(zone);
        waiting.join();
        kernel::timer::stop();
        assert!(SERVED.load(Ordering::Relaxed));
        assert_eq!(c::malloc_zone_locked(zone), 0);
    });
}

test!(zones_serve_four_threads_that_make_and_destroy_them);
/// *`malloc_create_zone`, `malloc_destroy_zone`*, and all that a zone does, where four CPUs do it at once.
fn zones_serve_four_threads_that_make_and_destroy_them() {
    static SHARED: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    fn work(thread: usize) -> bool {
        let shared = SHARED.load(Ordering::Acquire);
        (0..25).all(|round| {
            let own = c::malloc_create_zone(0, 0);
            let sizes = (0..30).map(|index| 1 + (index * 97 + round * 13 + thread) % 6000);
            let blocks: Vec<_> = sizes.map(|size| ([malloc(own, size), malloc(shared, size)], size)).collect();
            blocks.iter().for_each(|(pair, size)| pair.iter().for_each(|&block| fill(block, *size, thread as u8)));
            let found = blocks.iter().all(|&([mine, ours], size)| {
                let zones = (c::malloc_zone_from_ptr(mine), c::malloc_zone_from_ptr(ours));
                zones == (own, shared) && holds(mine, size, thread as u8) && holds(ours, size, thread as u8)
            });
            blocks.iter().for_each(|([_, ours], _)| free(shared, *ours));
            let whole = c::malloc_zone_check(own) == 1;
            destroy(own);
            found && whole
        })
    }
    let storm = |[shared, _]: [Handle; 2]| {
        SHARED.store(shared, Ordering::Release);
        assert_eq!(on_four_threads(work), [true; 4]);
        let counts = statistics(shared);
        assert_eq!((counts.blocks_in_use, counts.size_in_use), (0, 0));
        assert_eq!(c::malloc_zone_check(ptr::null_mut()), 1);
    };
    // The page tables of the stacks stay.
    on_four_threads(|_| ());
    with_zones(storm);
    with_zones(storm);
}
