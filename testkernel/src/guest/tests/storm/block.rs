//! The kinds of blocks that a storm allocates: how each is allocated, filled, checked and freed.

use core::alloc::Layout;
use core::mem::MaybeUninit;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use fastrand::Rng;
use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::memory;
use kslab::{Frame, InitFailed, Object, ObjectCache};

use super::super::support::{Cache, Heap, PAGE, frames, layout, new_cache, order};
use super::shadow::Map;

/// A block, as its owner knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub(super) start: NonNull<u8>,
    pub(super) what: What,
    /// Its owner and number, of which its contents are made.
    pub(super) tag: u64,
}

/// What a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// A block of the heap, aligned to this power of two.
    Heap { size: u32, align: u8 },
    /// Page frames of this order.
    Frames(u8),
    /// An object of the cache with this number.
    Object(u8),
    /// An object that stays constructed.
    Typed,
}

impl What {
    /// A kind at random; small blocks are frequent, large ones rare.
    pub(super) fn random(rng: &mut Rng) -> Self {
        match rng.u32(..16) {
            0 => Self::Frames(rng.u8(..32).saturating_sub(28)),
            1..4 => Self::Object(rng.u8(..32).checked_sub(29).map_or(rng.u8(..3), |_| 3)),
            4 => Self::Typed,
            _ => Self::random_heap(rng),
        }
    }

    /// A block of the heap of any size up to 64 KiB, of each magnitude as often.
    pub(super) fn random_heap(rng: &mut Rng) -> Self {
        let magnitude = if rng.u32(..128) == 0 { rng.u32(12..16) } else { rng.u32(..12) };
        let size = (1 << magnitude) + rng.u32(..1 << magnitude);
        let align = if rng.u32(..8) == 0 { rng.u8(..8) } else { 3 };
        Self::Heap { size, align }
    }

    pub(super) fn to_word(self) -> u64 {
        let (kind, size, align) = match self {
            Self::Heap { size, align } => (0, size, align),
            Self::Frames(order) => (1, 0, order),
            Self::Object(cache) => (2, 0, cache),
            Self::Typed => (3, 0, 0),
        };
        kind << 40 | u64::from(align) << 32 | u64::from(size)
    }

    pub(super) fn from_word(word: u64) -> Self {
        let (size, small) = (word as u32, (word >> 32) as u8);
        match word >> 40 {
            0 => Self::Heap { size, align: small },
            1 => Self::Frames(small),
            2 => Self::Object(small),
            _ => Self::Typed,
        }
    }

    /// Its layout, if it is a block of the heap.
    pub(super) fn heap_layout(self) -> Option<Layout> {
        match self {
            Self::Heap { size, align } => Some(layout(size as usize, 1 << align)),
            _ => None,
        }
    }

    /// Bytes that nobody else may have.
    fn room(self) -> usize {
        match self {
            Self::Heap { .. } => self.heap_layout().and_then(Heap::usable_size).expect("a size of a block"),
            Self::Frames(order) => PAGE << order,
            Self::Object(cache) => SIZES[usize::from(cache)],
            Self::Typed => size_of::<Typed>(),
        }
    }

    /// The part of it that is filled.
    fn filled(self) -> (usize, usize) {
        match self {
            Self::Heap { size, .. } => (0, size as usize),
            Self::Typed => (size_of::<u64>(), size_of::<Typed>()),
            _ => (0, self.room()),
        }
    }
}

/// What is wrong with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    /// A part of it belongs to somebody else.
    Shared,
    /// A part of it belongs to nobody.
    Released,
    /// It was to be all zero.
    NotZero,
    /// It is not aligned.
    Misaligned,
    /// At this byte it is not as its owner has left it.
    Changed(usize),
    /// A free object is not as its last user has left it.
    NotConstructed,
}

impl Block {
    /// Takes a new block into the map and fills it.
    pub(super) fn adopt(start: NonNull<u8>, what: What, tag: u64, map: &Map) -> Result<Self, Wrong> {
        let block = Self { start, what, tag };
        if let Some(layout) = what.heap_layout()
            && !start.addr().get().is_multiple_of(layout.align())
        {
            return Err(Wrong::Misaligned);
        }
        if !map.claim(start, what.room()) {
            return Err(Wrong::Shared);
        }
        block.fill();
        Ok(block)
    }

    /// Checks it whole and takes it out of the map, so that it can be freed.
    pub(super) fn disown(&self, map: &Map) -> Result<(), Wrong> {
        self.check()?;
        if map.release(self.start, self.what.room()) { Ok(()) } else { Err(Wrong::Released) }
    }

    /// Whether its contents are its owner's.
    pub(super) fn check(&self) -> Result<(), Wrong> {
        self.check_up_to(usize::MAX)
    }

    /// The same for the first `bytes` bytes.
    pub(super) fn check_up_to(&self, bytes: usize) -> Result<(), Wrong> {
        let (from, to) = self.what.filled();
        let (words, rest) = self.bytes(from, to.min(bytes)).as_chunks::<8>();
        let mut wanted = self.tag;
        for (index, word) in words.iter().enumerate() {
            if u64::from_ne_bytes(*word) != wanted {
                return Err(Wrong::Changed(from + 8 * index));
            }
            wanted = next(wanted);
        }
        if wanted.to_ne_bytes().starts_with(rest) { Ok(()) } else { Err(Wrong::Changed(from + 8 * words.len())) }
    }

    /// Whether it is all zero.
    pub(super) fn is_zero(start: NonNull<u8>, size: usize) -> bool {
        // SAFETY: a block of that size that was allocated as zeros.
        let bytes = unsafe { core::slice::from_raw_parts(start.as_ptr(), size) };
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().all(|word| *word == [0; 8]) && rest.iter().all(|byte| *byte == 0)
    }

    fn fill(&self) {
        let (from, to) = self.what.filled();
        // SAFETY: the block is the caller's, and that large.
        let bytes: &mut [MaybeUninit<u8>] =
            unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr().add(from).cast(), to - from) };
        let (words, rest) = bytes.as_chunks_mut::<8>();
        let mut word = self.tag;
        for place in words {
            *place = word.to_ne_bytes().map(MaybeUninit::new);
            word = next(word);
        }
        rest.iter_mut().zip(word.to_ne_bytes()).for_each(|(place, byte)| _ = place.write(byte));
    }

    fn bytes(&self, from: usize, to: usize) -> &[u8] {
        // SAFETY: `fill` has written these bytes of the block, which is its owner's.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr().add(from), to.saturating_sub(from)) }
    }
}

/// The word of a block's contents that follows on this one.
fn next(word: u64) -> u64 {
    word.wrapping_add(1 << 56 | 1)
}

/// The caches of a storm.
pub(super) struct Caches {
    caches: [Cache; CACHES],
    typed: ObjectCache<'static, Typed, Cpus>,
}

const CACHES: usize = 4;
/// Bytes of their objects: in a slab of one page; two to a cache line; without magazines; with the header off the slab.
const SIZES: [usize; CACHES] = [24, 64, 200, 9000];

/// The cache that is used in bulk.
pub(super) const BULK: What = What::Object(0);

impl Caches {
    pub(super) fn new() -> Self {
        let [small, line, plain, large] = SIZES.map(|size| new_cache("storm", size, 8));
        let caches = [small, line.cache_line_aligned(), plain.without_magazines(), large];
        Self { caches, typed: ObjectCache::new(HEAP.caches(), "storm-typed") }
    }

    /// That of the objects that are used in bulk.
    pub(super) fn bulk(&self) -> &Cache {
        &self.caches[0]
    }

    /// One of them at random gives back what it does not use.
    pub(super) fn shrink(&self, rng: &mut Rng) {
        match self.caches.get(rng.usize(..=CACHES)) {
            Some(cache) => cache.shrink(),
            None => self.typed.shrink(),
        };
    }

    /// Objects that are allocated, by the caches' own count.
    pub(super) fn in_use(&self) -> usize {
        let stats = self.caches.iter().map(Cache::stats).chain([self.typed.stats()]);
        stats.flatten().map(|stats| stats.in_use).sum()
    }

    /// Allocates; `None` where there is no memory.
    pub(super) fn allocate(&self, what: What) -> Option<Result<NonNull<u8>, Wrong>> {
        Some(Ok(match what {
            What::Heap { .. } => HEAP.allocate(what.heap_layout()?)?,
            What::Frames(number) => NonNull::new(frames().pointer(frames().allocate(order(number.into()))?))?,
            What::Object(cache) => self.caches[usize::from(cache)].allocate().ok()?,
            What::Typed => {
                let object = self.typed.allocate().ok()?;
                let constructed = object.is_idle();
                let object = object.into_raw();
                if !constructed {
                    return Some(Err(Wrong::NotConstructed));
                }
                object.cast()
            }
        }))
    }

    /// Frees a block that was disowned.
    ///
    /// # Safety
    ///
    /// It came from [`allocate`](Self::allocate), and nobody uses it.
    pub(super) unsafe fn free(&self, block: Block) {
        // SAFETY: passed on to the caller.
        unsafe {
            match block.what {
                What::Heap { .. } => HEAP.free(block.start, block.what.heap_layout().expect("a block of the heap")),
                What::Frames(number) => {
                    let address = block.start.addr().get() - memory::physical(0).addr();
                    let frame = Frame::containing(address as u64).expect("a page frame");
                    frames().free(frame, order(number.into()));
                }
                What::Object(cache) => self.caches[usize::from(cache)].free(block.start),
                What::Typed => drop(self.typed.from_raw(block.start.cast())),
            }
        }
    }
}

/// An object that is worth keeping constructed.
#[repr(C)]
pub(super) struct Typed {
    constructed: u64,
    words: [u64; 14],
}

const CONSTRUCTED: u64 = 0x636f_6e73_7472_7563;
const IDLE: u64 = 0x6964_6c65_6964_6c65;

/// Objects that are constructed.
pub(super) static TYPED: AtomicUsize = AtomicUsize::new(0);

impl Typed {
    fn is_idle(&self) -> bool {
        self.constructed == CONSTRUCTED && self.words == [IDLE; 14]
    }
}

impl Object for Typed {
    fn init() -> Result<Self, InitFailed> {
        TYPED.fetch_add(1, Relaxed);
        Ok(Self { constructed: CONSTRUCTED, words: [IDLE; 14] })
    }

    fn recycle(&mut self) {
        self.words = [IDLE; 14];
    }
}

impl Drop for Typed {
    fn drop(&mut self) {
        assert!(self.is_idle(), "an object that is destroyed is not as its last user has left it");
        TYPED.fetch_sub(1, Relaxed);
    }
}
