//! Locks that are misused: debug builds stop with a report that names them, where release builds would spin for ever.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use kernel::cpus::Cpus;
use kernel::traps::{self, TrapFrame};
use kernel::{memory, threads};
use kslab::IrqLock;
use x86_64::VirtAddr;

use super::support::{Cache, Heap, PAGE, another, layout};
use crate::guest::runner::test;

static LOCK: IrqLock<Cpus, ()> = IrqLock::named("test", ());

test!(row_90_a_lock_taken_twice_on_one_cpu_is_named, stops_with = "panic: kslab: lock taken twice on CPU 0: test");
fn row_90_a_lock_taken_twice_on_one_cpu_is_named() {
    let _held = LOCK.lock();
    drop(LOCK.lock());
}

test!(
    row_92_a_lock_that_is_never_released_is_named_with_its_holder,
    cpus = 2,
    stops_with = "panic: kslab: lock held too long by CPU 1: test"
);
fn row_92_a_lock_that_is_never_released_is_named_with_its_holder() {
    static HELD: AtomicBool = AtomicBool::new(false);
    let other = another().expect("two CPUs");
    let hold = || {
        let _held = LOCK.lock();
        HELD.store(true, Ordering::Release);
        loop {
            spin_loop();
        }
    };
    let _forever = threads::spawn_on(other, "holds", 4 * PAGE, hold);
    while !HELD.load(Ordering::Acquire) {
        spin_loop();
    }
    drop(LOCK.lock());
}

/// A heap whose pages can vanish.
static LAZY: Heap = Heap::new();
static OBJECTS: Cache = Cache::new(LAZY.caches(), "lazy", layout(64, 8)).without_magazines();

/// Has the allocator use memory that is not mapped while it holds the lock of a slab list, as it could be where a kernel
/// maps the heap's pages only when they are used. Then `handler` is called.
fn fault_with_a_slab_list_locked(handler: fn(&mut TrapFrame)) {
    const PAGES: usize = 64;
    let start = VirtAddr::new(0xffff_b100_0000_0000);
    assert!(memory::map_new(start, PAGES));
    // SAFETY: the pages are mapped, and nobody else's.
    assert_eq!(unsafe { LAZY.init_range(start.as_mut_ptr(), PAGES * PAGE) }, Ok(()));
    let object = OBJECTS.allocate().expect("memory");
    // The header of the object's slab is in its page.
    memory::unmap(VirtAddr::from_ptr(object.as_ptr()).align_down(PAGE as u64), 1);
    traps::set_page_fault_handler(Some(handler));
    _ = OBJECTS.allocate();
}

test!(
    row_84_a_page_fault_in_the_allocator_whose_handler_allocates_is_named,
    stops_with = "panic: kslab: lock taken twice on CPU 0: slab list"
);
fn row_84_a_page_fault_in_the_allocator_whose_handler_allocates_is_named() {
    fault_with_a_slab_list_locked(|_| _ = OBJECTS.allocate());
}

test!(
    row_91_locks_taken_out_of_order_are_named,
    stops_with = "panic: kslab: locks out of order on CPU 0: reclaim callbacks, with slab list held"
);
fn row_91_locks_taken_out_of_order_are_named() {
    fault_with_a_slab_list_locked(|_| _ = LAZY.add_reclaim_callback(|_| 0));
}
