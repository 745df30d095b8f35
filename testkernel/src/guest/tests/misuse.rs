//! Bad frees of objects of caches: each stops the kernel with a report that says what is wrong.

use core::hint::spin_loop;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use kernel::heap::HEAP;
use kernel::{cpus, threads};
use kslab::fault::OnFault;
use kslab::{ChildHeap, Order};

use super::support::{Cache, PAGE, another, frames, free_object, layout, new_cache, objects, shrink_everywhere};
use crate::guest::runner::{report, test};

/// A cache with live objects in it.
fn sockets() -> (Cache, NonNull<u8>) {
    let cache = new_cache("sockets", 200, 8);
    let object = objects(&cache, 10)[5];
    (cache, object)
}

fn free_to_heap(block: NonNull<u8>, size: usize) {
    // SAFETY: it breaks the contract, which the heap must notice; nothing is used afterwards.
    unsafe { HEAP.free(block, layout(size, 8)) }
}

test!(
    row_01_an_object_freed_twice_is_refused,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: sockets",
        "object: 0x*, slot 5, 200 bytes"
    )
);
fn row_01_an_object_freed_twice_is_refused() {
    let (cache, object) = sockets();
    free_object(&cache, object);
    free_object(&cache, object);
}

test!(
    row_02_an_object_freed_twice_with_others_between_is_refused,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: sockets",
        "object: 0x*, slot 18, 200 bytes"
    )
);
fn row_02_an_object_freed_twice_with_others_between_is_refused() {
    let cache = new_cache("sockets", 200, 8);
    let held = objects(&cache, 100);
    held[..99].iter().for_each(|object| free_object(&cache, *object));
    // Through magazines and back to the slab, which its last object keeps.
    cache.shrink();
    free_object(&cache, held[98]);
}

test!(
    row_04_an_object_freed_again_on_another_cpu_is_refused,
    cpus = 2,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: size-208",
        "object: 0x*, slot 0, 208 bytes"
    )
);
fn row_04_an_object_freed_again_on_another_cpu_is_refused() {
    let block = HEAP.allocate(layout(200, 8)).expect("memory");
    free_to_heap(block, 200);
    let free_again = |address| free_to_heap(NonNull::new(address as *mut u8).expect("a block"), 200);
    cpus::call_on(another().expect("two CPUs"), free_again, block.as_ptr().expose_provenance()).expect("it is online");
}

test!(row_05_of_two_cpus_that_free_one_object_at_once_one_is_reported);
fn row_05_of_two_cpus_that_free_one_object_at_once_one_is_reported() {
    let Some(other) = another() else { return };
    const ROUNDS: usize = 200;
    static READY: AtomicUsize = AtomicUsize::new(0);
    /// At each turn on both CPUs at once.
    fn free_all(blocks: &[usize]) {
        for (turn, &block) in (1..).zip(blocks) {
            READY.fetch_add(1, Ordering::SeqCst);
            while READY.load(Ordering::SeqCst) < 2 * turn {
                spin_loop();
            }
            free_to_heap(NonNull::new(block as *mut u8).expect("a block"), 200);
        }
    }
    let blocks = [(); ROUNDS].map(|()| HEAP.allocate(layout(200, 8)).expect("memory").as_ptr().expose_provenance());
    let before = HEAP.faults();
    HEAP.set_fault_handler(Some(|_| OnFault::KeepOut));
    let thread = threads::spawn_on(other, "frees", 4 * PAGE, move || free_all(&blocks));
    free_all(&blocks);
    thread.expect("memory for a thread").join();
    // Where both were served, it is seen when the object goes back to its slab the second time.
    shrink_everywhere();
    HEAP.set_fault_handler(Some(kernel::heap::on_fault));
    assert_eq!(HEAP.faults() - before, ROUNDS as u64);
    HEAP.verify().expect("nothing else is wrong");
}

test!(
    row_07_a_free_inside_an_object_of_a_cache_is_refused,
    stops_with = report!(
        "bad free of 0x*: not the start of an allocation",
        "kind: BADBASE",
        "cache: sockets",
        "object: 0x*, slot 5, 200 bytes"
    )
);
fn row_07_a_free_inside_an_object_of_a_cache_is_refused() {
    let (cache, object) = sockets();
    // SAFETY: still inside the object.
    free_object(&cache, unsafe { object.add(8) });
}

test!(
    row_08_a_misaligned_free_is_refused,
    stops_with = report!(
        "bad free of 0x*: not the start of an allocation",
        "kind: BADBASE",
        "cache: sockets",
        "object: 0x*, slot 5, 200 bytes"
    )
);
fn row_08_a_misaligned_free_is_refused() {
    let (cache, object) = sockets();
    // SAFETY: still inside the object.
    free_object(&cache, unsafe { object.add(1) });
}

test!(
    row_09_a_free_to_another_cache_names_both,
    stops_with = report!(
        "bad free of 0x*: wrong cache: freed to pipes, allocated from sockets",
        "kind: BADCACHE",
        "cache: sockets",
        "object: 0x*, slot 5, 200 bytes"
    )
);
fn row_09_a_free_to_another_cache_names_both() {
    let (_sockets, object) = sockets();
    let pipes = new_cache("pipes", 200, 8);
    let _pipe = objects(&pipes, 1);
    free_object(&pipes, object);
}

test!(
    row_09_an_object_of_a_cache_freed_to_the_heap_names_the_cache,
    stops_with = report!(
        "bad free of 0x*: wrong cache: freed to the heap, allocated from sockets",
        "kind: BADCACHE",
        "cache: sockets",
        "object: 0x*, slot 5, 200 bytes"
    )
);
fn row_09_an_object_of_a_cache_freed_to_the_heap_names_the_cache() {
    let (_sockets, object) = sockets();
    free_to_heap(object, 200);
}

test!(
    row_09_a_block_of_the_heap_freed_to_a_cache_names_its_class,
    stops_with = report!(
        "bad free of 0x*: wrong cache: freed to sockets, allocated from size-208",
        "kind: BADCACHE",
        "cache: size-208",
        "object: 0x*, slot 0, 208 bytes"
    )
);
fn row_09_a_block_of_the_heap_freed_to_a_cache_names_its_class() {
    let (sockets, _object) = sockets();
    free_object(&sockets, HEAP.allocate(layout(200, 8)).expect("memory"));
}

test!(
    row_09_a_bulk_free_with_an_object_of_another_cache_names_both,
    stops_with = report!(
        "bad free of 0x*: wrong cache: freed to pipes, allocated from sockets",
        "kind: BADCACHE",
        "cache: sockets",
        "object: 0x*, slot 5, 200 bytes"
    )
);
fn row_09_a_bulk_free_with_an_object_of_another_cache_names_both() {
    let (_sockets, object) = sockets();
    let pipes = new_cache("pipes", 64, 8);
    let mut mixed = objects(&pipes, 50);
    mixed[40] = object;
    // SAFETY: it breaks the contract, which the cache must notice.
    unsafe { pipes.free_bulk(&mixed) };
}

test!(
    row_10_a_slot_that_was_never_allocated_is_refused,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: sockets",
        "object: 0x*, slot 19, 200 bytes"
    )
);
fn row_10_a_slot_that_was_never_allocated_is_refused() {
    let cache = new_cache("sockets", 200, 8);
    let first = objects(&cache, 1)[0];
    let last = cache.stats().expect("counts").objects_per_slab - 1;
    // SAFETY: the last slot of the first object's slab.
    free_object(&cache, unsafe { first.add(200 * last) });
}

test!(
    row_13_a_free_of_a_slabs_header_is_refused,
    stops_with = report!("bad free of 0x*: not the start of an allocation", "kind: BADBASE", "cache: sockets")
);
fn row_13_a_free_of_a_slabs_header_is_refused() {
    let (cache, object) = sockets();
    let page = object.as_ptr().map_addr(|address| address & !(PAGE - 1));
    // The first slab of a cache starts with its header.
    free_object(&cache, NonNull::new(page.wrapping_add(16)).expect("a page"));
}

test!(
    row_14_an_object_of_a_slab_that_went_back_is_refused,
    stops_with = report!("bad free of 0x*: double free: it is free already, or was never allocated", "kind: DUPFREE")
);
fn row_14_an_object_of_a_slab_that_went_back_is_refused() {
    let cache = new_cache("sockets", 200, 8);
    let objects = objects(&cache, 10);
    objects.iter().for_each(|object| free_object(&cache, *object));
    HEAP.shrink();
    free_object(&cache, objects[5]);
}

test!(
    page_frames_are_no_object_of_a_cache,
    stops_with = report!("bad free of 0x*: not the start of an allocation", "kind: BADBASE")
);
fn page_frames_are_no_object_of_a_cache() {
    let (cache, _object) = sockets();
    let frame = frames().allocate(Order::ZERO).expect("memory");
    free_object(&cache, NonNull::new(frames().pointer(frame)).expect("an address"));
}

test!(
    an_object_in_a_reserve_is_no_longer_its_users,
    stops_with = report!(
        "bad free of 0x*: double free: it is free already, or was never allocated",
        "kind: DUPFREE",
        "cache: reserved",
        "object: 0x*, slot 2, 200 bytes"
    )
);
fn an_object_in_a_reserve_is_no_longer_its_users() {
    let cache = new_cache("reserved", 200, 8);
    let reserve = cache.reserve(3).expect("memory");
    let held = [(); 4].map(|()| cache.allocate().expect("memory"));
    let all = super::support::take_all();
    while cache.allocate().is_ok() {}
    let object = reserve.allocate().expect("a reserve");
    // SAFETY: it is no longer used.
    unsafe { reserve.free(object) };
    core::hint::black_box((held, all));
    // SAFETY: it breaks the contract, which the cache must notice.
    unsafe { reserve.free(object) };
}

test!(
    a_single_frame_freed_twice_is_refused_though_it_is_in_stock,
    stops_with = report!("bad free of 0x*: double free: it is free already, or was never allocated", "kind: DUPFREE")
);
fn a_single_frame_freed_twice_is_refused_though_it_is_in_stock() {
    let frame = frames().allocate(Order::ZERO).expect("memory");
    super::support::free(frame, Order::ZERO);
    assert!(frames().stats().stocked > 0);
    super::support::free(frame, Order::ZERO);
}

test!(
    a_block_of_a_heap_within_the_heap_is_not_the_heaps,
    stops_with = report!("bad free of 0x*: not memory of this allocator", "kind: BADADDR")
);
fn a_block_of_a_heap_within_the_heap_is_not_the_heaps() {
    let child: ChildHeap<'_, _> = HEAP.create_heap("child", 1 << 20).expect("memory");
    // A page that the child has borrowed.
    let block = child.allocate(layout(PAGE, PAGE)).expect("memory");
    free_to_heap(block, PAGE);
}
