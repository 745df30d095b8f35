//! What happens when memory is short: reclaim callbacks and the out-of-memory hook.
//!
//! *Caches with constructors, objects kept constructed across free and allocate, per-CPU magazines, reclaim*: the last.

use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::mem;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::Relaxed};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::memory;
use kslab::reclaim::{Callback, Decision, Hook, MOST_CALLBACKS, MOST_RETRIES, TooManyCallbacks};
use kslab::{Frame, IrqLock, Order};
use spin::Once;
use x86_64::instructions::interrupts;

use super::support::{
    Block, Cache, PAGE, cache, counts, end_interval, frames, free, free_object, give_back, layout, new_cache, take_all,
    unchanged, verify,
};
use crate::guest::runner::test;

/// What the reclaim callbacks do, in the order of their registration: they cannot be removed again.
static CALLBACKS: IrqLock<Cpus, [Option<Callback>; 3]> = IrqLock::new([None; 3]);

/// Who has been called since [`with`] began: a decimal digit each, 1 to 3 the callbacks, 9 the hook.
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Blocks of the heap that a callback or hook can free.
static HOARD: IrqLock<Cpus, Vec<Vec<u8>>> = IrqLock::new(Vec::new());

fn callback<const NUMBER: usize>(wanted: usize) -> usize {
    let callback = CALLBACKS.lock()[NUMBER];
    callback.map_or(0, |callback| {
        called(NUMBER + 1);
        callback(wanted)
    })
}

fn called(digit: usize) {
    CALLS.store(CALLS.load(Relaxed) * 10 + digit, Relaxed);
}

/// Runs `body` with these callbacks and this hook, in a hoard of 20 blocks of three pages.
fn with(callbacks: [Option<Callback>; 3], hook: Option<Hook>, body: impl FnOnce()) {
    static REGISTERED: Once<()> = Once::new();
    REGISTERED.call_once(|| {
        for callback in [callback::<0>, callback::<1>, callback::<2>] {
            HEAP.add_reclaim_callback(callback).expect("room for three callbacks");
        }
    });
    unchanged(|| {
        let hoard = (0..20).map(|_| alloc::vec![1_u8; 3 * PAGE]).collect();
        *HOARD.lock() = hoard;
        CALLS.store(0, Relaxed);
        *CALLBACKS.lock() = callbacks;
        HEAP.set_out_of_memory_hook(hook);
        body();
        HEAP.set_out_of_memory_hook(None);
        *CALLBACKS.lock() = [None; 3];
        free_hoard();
    });
}

/// Returns how many bytes it freed.
fn free_hoard() -> usize {
    let hoard = mem::take(&mut *HOARD.lock());
    hoard.iter().map(Vec::len).sum()
}

fn nothing(_: usize) -> usize {
    0
}

fn block() -> Option<Block> {
    Block::new(layout(3 * PAGE, 8), 7)
}

test!(row_67_a_reclaim_callback_frees_what_the_allocation_needs);
fn row_67_a_reclaim_callback_frees_what_the_allocation_needs() {
    fn free(wanted: usize) -> usize {
        assert_eq!(wanted, 3 * PAGE);
        free_hoard()
    }
    with([None, Some(free), Some(nothing)], None, || {
        let all = take_all();
        assert!(block().is_some());
        assert_eq!(CALLS.load(Relaxed), 2, "those after the one that helped are not called");
        give_back(all);
    });
}

test!(callbacks_are_called_in_the_order_of_their_registration_and_then_the_hook);
fn callbacks_are_called_in_the_order_of_their_registration_and_then_the_hook() {
    fn fail(wanted: usize) -> Decision {
        assert_eq!(wanted, 3 * PAGE);
        called(9);
        Decision::Fail
    }
    with([Some(nothing); 3], Some(fail), || {
        let all = take_all();
        assert!(block().is_none());
        assert_eq!(CALLS.load(Relaxed), 1239);
        give_back(all);
        assert!(block().is_some());
        assert_eq!(CALLS.load(Relaxed), 1239, "nobody is called while there is memory");
    });
}

test!(row_88_a_callback_allocates_and_starts_nothing_over);
fn row_88_a_callback_allocates_and_starts_nothing_over() {
    fn allocate(_: usize) -> usize {
        for _ in 0..3 {
            assert!(block().is_none(), "there is no memory");
        }
        free_hoard();
        assert!(block().is_some(), "there is now");
        0
    }
    with([Some(allocate), None, None], None, || {
        let all = take_all();
        assert!(block().is_some());
        assert_eq!(CALLS.load(Relaxed), 1);
        give_back(all);
    });
}

test!(row_89_a_callback_frees_into_the_cache_that_is_allocated_from);
fn row_89_a_callback_frees_into_the_cache_that_is_allocated_from() {
    const HELD: usize = 6;
    static CACHE: Cache = Cache::new(HEAP.caches(), "reclaimed", layout(700, 8));
    static LIVE: [AtomicPtr<u8>; HELD] = [const { AtomicPtr::new(ptr::null_mut()) }; HELD];

    fn free(_: usize) -> usize {
        let live = LIVE.iter().map(|place| place.swap(ptr::null_mut(), Relaxed));
        live.filter_map(NonNull::new).map(|object| free_object(&CACHE, object)).count() * 700
    }
    free_object(&CACHE, CACHE.allocate().expect("memory"));
    with([Some(free), None, None], None, || {
        LIVE.iter().for_each(|place| place.store(CACHE.allocate().expect("memory").as_ptr(), Relaxed));
        let mut others = Vec::with_capacity(100);
        let all = take_all();
        others.extend(core::iter::from_fn(|| CACHE.allocate_without_growing().ok()));
        others.push(CACHE.allocate().expect("what the callback frees"));
        assert_eq!(CALLS.load(Relaxed), 1);
        let before = others.len();
        others.extend(core::iter::from_fn(|| CACHE.allocate_without_growing().ok()));
        assert_eq!(others.len(), before + HELD - 1);
        others.into_iter().for_each(|object| free_object(&CACHE, object));
        give_back(all);
    });
}

test!(a_hook_gives_memory_back_and_has_the_allocation_tried_again);
fn a_hook_gives_memory_back_and_has_the_allocation_tried_again() {
    fn third_time(_: usize) -> Decision {
        called(9);
        if CALLS.load(Relaxed) == 999 {
            free_hoard();
        }
        Decision::Retry
    }
    with([None; 3], Some(third_time), || {
        let all = take_all();
        assert!(block().is_some());
        assert_eq!(CALLS.load(Relaxed), 999);
        give_back(all);
    });
}

test!(a_hook_that_gives_up_is_asked_once_for_each_allocation);
fn a_hook_that_gives_up_is_asked_once_for_each_allocation() {
    fn fail(_: usize) -> Decision {
        called(9);
        Decision::Fail
    }
    with([None; 3], Some(fail), || {
        let all = take_all();
        for asked in [9, 99, 999] {
            assert!(block().is_none());
            assert_eq!(CALLS.load(Relaxed), asked);
        }
        assert!(Vec::<u8>::new().try_reserve_exact(3 * PAGE).is_err());
        give_back(all);
    });
}

test!(row_68_a_hook_that_allocates_and_never_gives_up_is_bounded);
fn row_68_a_hook_that_allocates_and_never_gives_up_is_bounded() {
    static ASKED: AtomicUsize = AtomicUsize::new(0);

    fn insist(_: usize) -> Decision {
        ASKED.fetch_add(1, Relaxed);
        assert!(block().is_none());
        Decision::Retry
    }
    with([None; 3], Some(insist), || {
        ASKED.store(0, Relaxed);
        let all = take_all();
        assert!(block().is_none());
        assert_eq!(ASKED.load(Relaxed), MOST_RETRIES);
        give_back(all);
    });
}

test!(what_can_never_be_had_fails_without_asking_anybody);
fn what_can_never_be_had_fails_without_asking_anybody() {
    fn fail(_: usize) -> Decision {
        called(9);
        Decision::Fail
    }
    with([Some(nothing); 3], Some(fail), || {
        for size in [frames().total_bytes() + PAGE, (1 << 30) + 1, 1 << 45, isize::MAX as usize] {
            assert_eq!(HEAP.allocate(layout(size, 1)), None, "{size} bytes");
        }
        assert_eq!(HEAP.allocate(layout(8, 1 << 31)), None);
        assert_eq!(CALLS.load(Relaxed), 0);
    });
}

test!(callbacks_and_hook_run_with_no_lock_held_and_interrupts_on);
fn callbacks_and_hook_run_with_no_lock_held_and_interrupts_on() {
    /// Takes a look at everything that is behind a lock.
    fn look() {
        struct Nowhere;
        impl Write for Nowhere {
            fn write_str(&mut self, _: &str) -> fmt::Result {
                Ok(())
            }
        }
        assert!(interrupts::are_enabled());
        verify();
        write!(Nowhere, "{}", HEAP.tables()).expect("nothing fails there");
        HEAP.shrink();
        let frame = HEAP.frames().allocate(Order::ZERO);
        assert_eq!(frame, None);
    }
    fn callback(_: usize) -> usize {
        look();
        0
    }
    fn hook(_: usize) -> Decision {
        called(9);
        look();
        Decision::Fail
    }
    with([Some(callback), None, None], Some(hook), || {
        let all = take_all();
        assert!(block().is_none());
        assert_eq!(CALLS.load(Relaxed), 19);
        give_back(all);
    });
}

test!(maintain_calls_the_callbacks_below_the_low_watermark_before_anything_fails);
fn maintain_calls_the_callbacks_below_the_low_watermark_before_anything_fails() {
    fn free(_: usize) -> usize {
        free_hoard()
    }
    fn fail(_: usize) -> Decision {
        called(9);
        Decision::Fail
    }
    with([Some(free), Some(nothing), None], Some(fail), || {
        end_interval();
        assert!(!frames().below_low());
        assert_eq!(CALLS.load(Relaxed), 0);
        let all = take_all();
        assert!(frames().below_low());
        end_interval();
        assert!(CALLS.load(Relaxed) == 1 || CALLS.load(Relaxed) == 12, "{}", CALLS.load(Relaxed));
        assert!(frames().stats().free >= 60, "the hoard");
        give_back(all);
        assert!(!frames().below_high());
    });
}

test!(idle_slabs_make_way_for_a_device_that_needs_memory_below_16_mib);
fn idle_slabs_make_way_for_a_device_that_needs_memory_below_16_mib() {
    const LIMIT: u64 = 16 << 20;
    let take = |frames: &mut Vec<Frame>| {
        frames.extend(core::iter::from_fn(|| self::frames().allocate_below(1, Order::ZERO, LIMIT)));
    };
    unchanged(|| {
        let cache = new_cache("low", 4000, 8);
        let mut low = Vec::with_capacity(300);
        let mut all = take_all();
        // The only frames that are free, and more than the zone's reserve: the slab comes from there.
        let (frame, order) = all
            .iter()
            .copied()
            .rfind(|(frame, order)| {
                let end = frame.address() + (order.bytes() as u64);
                end <= LIMIT && (6..=8).contains(&order.get())
            })
            .expect("a block below 16 MiB");
        all.retain(|block| *block != (frame, order));
        free(frame, order);
        let object = cache.allocate().expect("memory below 16 MiB");
        assert!((object.addr().get() as u64) < memory::PHYSICAL_MEMORY + LIMIT);
        free_object(&cache, object);
        take(&mut low);
        assert_eq!(frames().allocate_below(1, Order::ZERO, LIMIT), None);
        let found = HEAP.allocate_frames(1, Order::ZERO, LIMIT).expect("the frames of the slab");
        assert_eq!(counts(&cache).slabs, 0);
        low.push(found);
        give_back(low.into_iter().map(|frame| (frame, Order::ZERO)).chain(all).collect());
    });
}

test!(a_class_without_memory_lends_from_a_larger_one);
fn a_class_without_memory_lends_from_a_larger_one() {
    unchanged(|| {
        // Three slots of its slab are free.
        let kept = Block::new(layout(1000, 8), 1).expect("memory");
        let mut lent = Vec::with_capacity(100);
        let before = cache(704).slabs;
        let all = take_all();
        lent.extend(core::iter::from_fn(|| Block::new(layout(700, 8), 2)));
        assert!(lent.len() >= 3, "{}", lent.len());
        assert_eq!(cache(704).slabs, before);
        assert!(lent.iter().all(Block::is_intact) && kept.is_intact());
        verify();
        drop(lent);
        give_back(all);
    });
}

test!(there_is_room_for_so_many_callbacks_and_no_more);
fn there_is_room_for_so_many_callbacks_and_no_more() {
    unchanged(|| {
        let heap = HEAP.create_heap("callbacks", 1 << 20).expect("memory");
        for _ in 0..MOST_CALLBACKS {
            heap.add_reclaim_callback(nothing).expect("room");
        }
        assert_eq!(heap.add_reclaim_callback(nothing), Err(TooManyCallbacks));
    });
}
