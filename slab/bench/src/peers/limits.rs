//! Two that nobody can use: what the harness itself takes, and the least that an allocator of Bonwick's kind can take.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr;

use kslab::SIZES;
use spin::Mutex;

use super::Peer;
use crate::arena::Arena;

/// Every block is the same memory, in each thread: what is measured is the harness.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nothing;

thread_local! {
    static CELL: UnsafeCell<[u64; 1024]> = const { UnsafeCell::new([0; 1024]) };
}

// SAFETY: none that anybody may keep something in; the harness does not.
unsafe impl GlobalAlloc for Nothing {
    #[inline]
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        CELL.with(UnsafeCell::get).cast()
    }

    #[inline]
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

impl Peer for Nothing {
    fn set_up(_: Arena) {}
}

/// Two magazines of pointers a class in each thread, a depot a class that all share, and no checks of any kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct Magazines;

const ROUNDS: usize = 64;

type Magazine = [*mut u8; ROUNDS];

/// The two magazines of a class: one array, of which the depot gets and gives one half.
struct Loaded {
    count: usize,
    rounds: [*mut u8; 2 * ROUNDS],
}

/// The full magazines of a class.
struct Depot(Vec<Magazine>);

// SAFETY: the memory is the process's.
unsafe impl Send for Depot {}

/// The part of the arena that no object was cut from yet.
struct Uncut(Arena);

// SAFETY: as above.
unsafe impl Send for Uncut {}

thread_local! {
    static LOADED: UnsafeCell<[Loaded; SIZES.len()]> = const {
        UnsafeCell::new([const { Loaded { count: 0, rounds: [ptr::null_mut(); 2 * ROUNDS] } }; SIZES.len()])
    };
}

static DEPOTS: [Mutex<Depot>; SIZES.len()] = [const { Mutex::new(Depot(Vec::new())) }; SIZES.len()];
static UNCUT: Mutex<Uncut> = Mutex::new(Uncut(Arena { start: ptr::null_mut(), bytes: 0 }));

const LARGEST: usize = SIZES[SIZES.len() - 1];

/// The class of each size, by eights.
static CLASSES: [u8; LARGEST / 8 + 1] = {
    let mut classes = [0; LARGEST / 8 + 1];
    let (mut eights, mut class) = (0, 0);
    while eights < classes.len() {
        if SIZES[class] < eights * 8 {
            class += 1;
        }
        classes[eights] = class as u8;
        eights += 1;
    }
    classes
};

#[inline]
fn class_of(layout: Layout) -> usize {
    CLASSES[layout.size().div_ceil(8)] as usize
}

#[inline]
fn with_loaded<T>(class: usize, change: impl FnOnce(&mut Loaded) -> T) -> T {
    // SAFETY: it is this thread's, and nothing within calls back.
    LOADED.with(|loaded| change(unsafe { &mut (*loaded.get())[class] }))
}

/// One magazine from the depot, or cut from the arena.
#[cold]
#[inline(never)]
fn exchange_for_full(class: usize, loaded: &mut Loaded) -> *mut u8 {
    let full = DEPOTS[class].lock().0.pop().or_else(|| cut(SIZES[class]));
    let Some(full) = full else { return ptr::null_mut() };
    loaded.rounds[..ROUNDS].copy_from_slice(&full);
    loaded.count = ROUNDS - 1;
    full[ROUNDS - 1]
}

#[cold]
#[inline(never)]
fn exchange_for_empty(class: usize, loaded: &mut Loaded, block: *mut u8) {
    let mut full = [ptr::null_mut(); ROUNDS];
    full.copy_from_slice(&loaded.rounds[..ROUNDS]);
    DEPOTS[class].lock().0.push(full);
    loaded.rounds.copy_within(ROUNDS.., 0);
    loaded.rounds[ROUNDS] = block;
    loaded.count = ROUNDS + 1;
}

fn cut(size: usize) -> Option<Magazine> {
    let arena = &mut UNCUT.lock().0;
    let alignment = 1 << size.trailing_zeros();
    let padding = arena.start.align_offset(alignment);
    let bytes = padding + ROUNDS * size;
    if arena.bytes < bytes {
        return None;
    }
    let first = arena.start.wrapping_add(padding);
    *arena = Arena { start: arena.start.wrapping_add(bytes), bytes: arena.bytes - bytes };
    Some(std::array::from_fn(|number| first.wrapping_add((ROUNDS - 1 - number) * size)))
}

// SAFETY: objects are disjoint, as large and as aligned as their class, and in one place at a time.
unsafe impl GlobalAlloc for Magazines {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = class_of(layout);
        with_loaded(class, |loaded| {
            if loaded.count == 0 {
                return exchange_for_full(class, loaded);
            }
            loaded.count -= 1;
            // SAFETY: no more than there is room for.
            unsafe { *loaded.rounds.get_unchecked(loaded.count) }
        })
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let class = class_of(layout);
        with_loaded(class, |loaded| {
            if loaded.count == 2 * ROUNDS {
                return exchange_for_empty(class, loaded, block);
            }
            // SAFETY: there is room for one more.
            unsafe { *loaded.rounds.get_unchecked_mut(loaded.count) = block };
            loaded.count += 1;
        });
    }
}

impl Peer for Magazines {
    fn set_up(arena: Arena) {
        UNCUT.lock().0 = arena;
    }
}
