//! buddy-slab-allocator, with a slab allocator for each thread, as its documentation sets it up for several CPUs.

use std::panic::Location;
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};

use ax_sync::interface::{AcquireResult, ContextState, LockMetadata, SpinOps};
use buddy_slab_allocator::interface::BuddySlabIf;
use buddy_slab_allocator::{GlobalAllocator, PerCpuSlab, SlabPoolTrait, StaticSlabPool};

use super::peer;
use crate::cpu::{self, CPUS};

const PAGE: usize = 4096;

static HEAP: GlobalAllocator<PAGE> = GlobalAllocator::new();

static SLABS: StaticSlabPool<PAGE, CPUS> = StaticSlabPool::new(
    [
        PerCpuSlab::new(0),
        PerCpuSlab::new(1),
        PerCpuSlab::new(2),
        PerCpuSlab::new(3),
        PerCpuSlab::new(4),
        PerCpuSlab::new(5),
        PerCpuSlab::new(6),
        PerCpuSlab::new(7),
    ],
    cpu::current,
);

peer!(BuddySlab, HEAP, |arena| {
    // SAFETY: the arena is nobody else's, and stays.
    let region = unsafe { slice::from_raw_parts_mut(arena.start, arena.bytes) };
    // SAFETY: as above.
    unsafe { HEAP.init(region) }.expect("enough memory");
});

struct Program;

#[ax_crate_interface::impl_interface]
impl BuddySlabIf for Program {
    fn virt_to_phys(address: usize) -> usize {
        address
    }

    fn slab_pool() -> &'static dyn SlabPoolTrait {
        &SLABS
    }
}

/// The lock that it wants from the kernel: what the others have, and no more.
struct Spin;

#[ax_crate_interface::impl_interface]
impl SpinOps for Spin {
    fn acquire(
        locked: &AtomicBool,
        metadata: &LockMetadata,
        lock_addr: usize,
        context: u8,
        subclass: u32,
        caller: &'static Location<'static>,
    ) -> ContextState {
        let _ = (metadata, lock_addr, context, subclass, caller);
        while locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while locked.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        }
        ContextState::new(0, 0)
    }

    fn try_acquire(
        locked: &AtomicBool,
        metadata: &LockMetadata,
        lock_addr: usize,
        context: u8,
        subclass: u32,
        caller: &'static Location<'static>,
    ) -> AcquireResult {
        let _ = (metadata, lock_addr, context, subclass, caller);
        let acquired = locked.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        AcquireResult::new(acquired, ContextState::new(0, 0))
    }

    fn release(locked: &AtomicBool, lock_addr: usize, context: u8, context_state: ContextState) {
        let _ = (lock_addr, context, context_state);
        locked.store(false, Ordering::Release);
    }

    fn force_release(locked: &AtomicBool, lock_addr: usize, context: u8) {
        let _ = (lock_addr, context);
        locked.store(false, Ordering::Release);
    }

    fn is_locked(locked: &AtomicBool) -> bool {
        locked.load(Ordering::Relaxed)
    }
}
