//! macOS's malloc zones, after `malloc/malloc.h` and the manual page malloc_zone_malloc(3).
//!
//! | call | promise |
//! |---|---|
//! | `malloc_create_zone`, `malloc_destroy_zone` | a zone of its own memory; it goes with everything that was allocated from it |
//! | `malloc_zone_register`, `malloc_zone_unregister` | whether a zone is among those that are asked for a pointer, and counted where all are |
//! | `malloc_set_zone_name`, `malloc_get_zone_name` | a name, which is copied |
//! | `malloc_zone_malloc`, `calloc`, `valloc`, `free`, `realloc`, `memalign` | as C has them, aligned to 16; `valloc`: at a page, and zero |
//! | `malloc_zone_from_ptr` | the registered zone that a block is of, or null |
//! | `size(zone, p)` | the bytes of a block of this zone, else 0, and that as soon |
//! | `malloc_good_size(n)` | the bytes that a block of `n` has |
//! | `malloc_zone_batch_malloc`, `malloc_zone_batch_free` | many at once; it says how many |
//! | `malloc_zone_check` | whether a zone is as it must be; with null, whether all are |
//! | `malloc_zone_statistics` | [`Statistics`]; with null, the sum |
//! | `malloc_zone_pressure_relief(zone, goal)` | bytes that went back to the parent heap; 0 is as many as can be, null is all zones |
//! | the enumerator, `print`, `force_lock` and `force_unlock` | the functions of `malloc_introspection_t`, here with names of their own |
//!
//! Every zone is a heap within another ([`Heap::create_heap`]). C code does not call through a zone's table, since a zone has none,
//! but by name. A zone that is none, a null one among them where that does not mean all, is refused: null, 0 or `false`. A pointer that is
//! no block of its zone is refused and reported as the heap does it.
//!
//! Lock: that of the list of zones; see `members`. A zone that was locked by `force_lock` serves nobody until it is unlocked: whoever
//! holds it, and interrupt handlers on that CPU, must not use the zone.

mod export;

use core::alloc::Layout;
use core::ffi::{CStr, c_char, c_void};
use core::fmt;
use core::ptr::{self, NonNull};

use super::members::{self, Members};
use crate::Heap;
use crate::frames::{Frame, Owner};
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;
use crate::sync::Ordering::{Acquire, Relaxed, Release, SeqCst};
use crate::sync::{AtomicBool, AtomicPtr, AtomicUsize, spin_loop};

/// Blocks that are allocated: a bit of the enumerator's mask, and a kind of range.
pub const PTR_IN_USE_RANGE_TYPE: u32 = 1;
/// The page frames that blocks are in, allocated or not.
pub const PTR_REGION_RANGE_TYPE: u32 = 2;
/// Those that the zone needs for itself.
pub const ADMIN_REGION_RANGE_TYPE: u32 = 4;

/// Every block is aligned to so many bytes.
const ALIGNMENT: usize = 16;

/// Ranges that the recorder is called with at a time, at most.
const BATCH: usize = 32;

/// `malloc_zone_t *`: an address that is never dereferenced.
pub type Handle = *mut c_void;

/// `malloc_statistics_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Blocks that are allocated.
    pub blocks_in_use: u32,
    /// Their bytes.
    pub size_in_use: usize,
    /// The most that these have been.
    pub max_size_in_use: usize,
    /// Bytes that the zone has of its parent heap.
    pub size_allocated: usize,
}

/// `vm_range_t`: so many bytes from an address on.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Range {
    /// Where it starts.
    pub address: usize,
    /// Its bytes.
    pub size: usize,
}

/// macOS's malloc zones within a heap.
///
/// ```
/// # use kslab::{Heap, platform::NoInterrupts};
/// use kslab::systems::zones::Zones;
///
/// static HEAP: Heap<NoInterrupts> = Heap::new();
/// static ZONES: Zones<'static, NoInterrupts> = Zones::new(&HEAP, |text| print!("{text}"));
/// # let mut memory = vec![0_u64; 512 * 256];
/// # // SAFETY: the buffer is nobody else's, and lives until the end.
/// # unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), memory.len() * 8) }.unwrap();
///
/// let zone = ZONES.create_zone(0);
/// let block = ZONES.malloc(zone, 100);
/// assert_eq!(ZONES.zone_from_ptr(block), zone);
/// assert!(ZONES.size(zone, block) >= 100);
/// // SAFETY: nobody uses it any more.
/// unsafe { ZONES.destroy_zone(zone) };
/// assert!(ZONES.zone_from_ptr(block).is_null());
/// ```
pub struct Zones<'a, P: Platform> {
    zones: Members<'a, P, Own>,
    write: fn(fmt::Arguments<'_>),
}

/// What a zone has besides its heap.
struct Own {
    is_registered: AtomicBool,
    /// Null, or a string in the parent heap.
    name: AtomicPtr<c_char>,
    blocks: AtomicUsize,
    bytes: AtomicUsize,
    most: AtomicUsize,
    is_locked: AtomicBool,
    /// Calls that are under way.
    inside: AtomicUsize,
}

type Zone<'a, P> = members::Member<'a, P, Own>;

/// A call of a zone that is under way until this is dropped.
struct Call<'z>(&'z AtomicUsize);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Release);
    }
}

impl<'a, P: Platform> Zones<'a, P> {
    /// Zones within `parent`. `write` is where [`print`](Self::print) prints.
    pub const fn new(parent: &'a Heap<P>, write: fn(fmt::Arguments<'_>)) -> Self {
        Self { zones: Members::new(parent, "the list of zones"), write }
    }

    /// A registered zone with `start_size` bytes from the start; null where there is no memory.
    pub fn create_zone(&self, start_size: usize) -> Handle {
        let own = Own {
            is_registered: AtomicBool::new(true),
            name: AtomicPtr::new(ptr::null_mut()),
            blocks: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            is_locked: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
        };
        let heap = self.zones.parent().create_heap("zone", usize::MAX).ok();
        let heap = heap.filter(|heap| start_size == 0 || members::commit(heap, start_size));
        heap.and_then(|heap| self.zones.add(heap, own)).map_or(ptr::null_mut(), |zone| zone.handle())
    }

    /// Ends a zone, and frees all that is allocated from it. The default zone stays.
    ///
    /// # Safety
    ///
    /// Nobody uses the zone or anything that is allocated from it any more.
    pub unsafe fn destroy_zone(&self, zone: Handle) {
        if let Some(zone) = self.zones.find(zone).filter(|zone| zone.handle() != self.zones.main(ptr::null_mut)) {
            self.rename(zone, ptr::null_mut());
        }
        // SAFETY: passed on to the caller.
        unsafe { self.zones.destroy(zone, false) };
    }

    /// The zone that is always there; null where there is no memory for it.
    pub fn default_zone(&self) -> Handle {
        self.zones.main(|| self.create_zone(0))
    }

    /// A zone is asked for pointers from now on.
    pub fn zone_register(&self, zone: Handle) {
        self.set_registered(zone, true);
    }

    /// A zone is not asked for pointers any more, and not counted where all are.
    pub fn zone_unregister(&self, zone: Handle) {
        self.set_registered(zone, false);
    }

    fn set_registered(&self, zone: Handle, is_registered: bool) {
        if let Some(zone) = self.zones.find(zone) {
            zone.own.is_registered.store(is_registered, Relaxed);
        }
    }

    /// Names a zone by a copy of `name`; where there is no memory for that, it has none.
    pub fn set_zone_name(&self, zone: Handle, name: Option<&CStr>) {
        let Some(zone) = self.zones.find(zone) else { return };
        let copy = |name: &CStr| {
            let bytes = name.to_bytes_with_nul();
            let block = self.zones.parent().allocate(Layout::for_value(bytes))?;
            // SAFETY: just allocated, for so many bytes.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), block.as_ptr(), bytes.len()) };
            Some(block.as_ptr().cast())
        };
        self.rename(zone, name.and_then(copy).unwrap_or(ptr::null_mut()));
    }

    fn rename(&self, zone: &Zone<'a, P>, name: *mut c_char) {
        if let Some(old) = NonNull::new(zone.own.name.swap(name, SeqCst)) {
            // SAFETY: a copy of ours, which whoever asked for the name no longer uses.
            unsafe { self.zones.parent().free_block(old.cast()) };
        }
    }

    /// The name of a zone, until it gets another one or is destroyed.
    pub fn zone_name(&self, zone: Handle) -> Option<&CStr> {
        self.zones.find(zone)?.name()
    }

    /// A block of `size` bytes.
    pub fn malloc(&self, zone: Handle, size: usize) -> *mut c_void {
        self.allocate(zone, size, ALIGNMENT, false)
    }

    /// A block of `count` times `size` bytes, all zero; null where the product overflows.
    pub fn calloc(&self, zone: Handle, count: usize, size: usize) -> *mut c_void {
        count.checked_mul(size).map_or(ptr::null_mut(), |bytes| self.allocate(zone, bytes, ALIGNMENT, true))
    }

    /// A block of `size` bytes that starts at a page, all zero.
    pub fn valloc(&self, zone: Handle, size: usize) -> *mut c_void {
        self.allocate(zone, size, FRAME_SIZE, true)
    }

    /// A block of `size` bytes, aligned to `alignment`; null where that is no power of two, or less than a pointer has.
    pub fn memalign(&self, zone: Handle, alignment: usize, size: usize) -> *mut c_void {
        if !alignment.is_power_of_two() || alignment < size_of::<*mut c_void>() {
            return ptr::null_mut();
        }
        self.allocate(zone, size, alignment.max(ALIGNMENT), false)
    }

    fn allocate(&self, zone: Handle, size: usize, alignment: usize, zeroed: bool) -> *mut c_void {
        let layout = Layout::from_size_align(size, alignment).ok();
        let found = self.zones.find(zone).zip(layout);
        found
            .and_then(|(zone, layout)| zone.allocate(layout, zeroed))
            .map_or(ptr::null_mut(), |block| block.as_ptr().cast())
    }

    /// Frees a block; null is nothing.
    ///
    /// # Safety
    ///
    /// Nobody uses it any more.
    pub unsafe fn free(&self, zone: Handle, block: *mut c_void) {
        if let Some((zone, block)) = self.zones.find(zone).zip(NonNull::new(block.cast())) {
            // SAFETY: passed on to the caller.
            unsafe { zone.free(block) };
        }
    }

    /// Changes the size of a block, which may move. Null is `malloc`; a block of no bytes is one of the smallest. Where it
    /// fails, the block stays as it is.
    ///
    /// # Safety
    ///
    /// The block is no longer valid where this returns another.
    pub unsafe fn realloc(&self, zone: Handle, block: *mut c_void, size: usize) -> *mut c_void {
        let Some(old) = NonNull::new(block.cast()) else { return self.malloc(zone, size) };
        let found = self.zones.find(zone).zip(Layout::from_size_align(size, ALIGNMENT).ok());
        // SAFETY: passed on to the caller.
        let new = found.and_then(|(zone, layout)| unsafe { zone.reallocate(old, layout) });
        new.map_or(ptr::null_mut(), |block| block.as_ptr().cast())
    }

    /// Fills the front of `results` with blocks of `size` bytes, and says with how many: fewer where memory ran out.
    pub fn batch_malloc(&self, zone: Handle, size: usize, results: &mut [*mut c_void]) -> usize {
        let made = results.iter_mut().map_while(|result| {
            let block = self.malloc(zone, size);
            (!block.is_null()).then(|| *result = block)
        });
        made.count()
    }

    /// Frees blocks of one zone. Null ones are nothing.
    ///
    /// # Safety
    ///
    /// Nobody uses them any more.
    pub unsafe fn batch_free(&self, zone: Handle, blocks: &[*mut c_void]) {
        // SAFETY: passed on to the caller.
        blocks.iter().for_each(|block| unsafe { self.free(zone, *block) });
    }

    /// The registered zone that `block` is of, or null.
    pub fn zone_from_ptr(&self, block: *const c_void) -> Handle {
        let mut owner = ptr::null_mut();
        self.visit_registered(|zone| {
            if zone.heap.block_size(block.cast()).is_some() {
                owner = zone.handle();
            }
            owner.is_null()
        });
        owner
    }

    /// Bytes of a block of this zone; 0 for everything else.
    pub fn size(&self, zone: Handle, block: *const c_void) -> usize {
        self.zones.find(zone).and_then(|zone| zone.heap.block_size(block.cast())).unwrap_or(0)
    }

    /// Bytes that a block has that is asked for with `size`: the least where nothing is wasted.
    pub fn good_size(size: usize) -> usize {
        let layout = Layout::from_size_align(size, ALIGNMENT).ok();
        layout.and_then(Heap::<P>::usable_size).unwrap_or(size)
    }

    /// Whether a zone, or with null every registered one, is as it must be.
    pub fn zone_check(&self, zone: Handle) -> bool {
        if !zone.is_null() {
            return self.zones.find(zone).is_some_and(|zone| zone.heap.verify().is_ok());
        }
        let mut right = true;
        self.visit_registered(|zone| {
            right = zone.heap.verify().is_ok();
            right
        });
        right
    }

    /// Counts of a zone, or with null the sums over the registered ones.
    pub fn zone_statistics(&self, zone: Handle) -> Statistics {
        if !zone.is_null() {
            return self.zones.find(zone).map_or(Statistics::default(), Zone::statistics);
        }
        let mut sum = Statistics::default();
        self.visit_registered(|zone| {
            let zone = zone.statistics();
            sum.blocks_in_use += zone.blocks_in_use;
            sum.size_in_use += zone.size_in_use;
            sum.max_size_in_use += zone.max_size_in_use;
            sum.size_allocated += zone.size_allocated;
            true
        });
        sum
    }

    /// Gives back what a zone, or with null the registered ones one after the other, does not use, until that is `goal` bytes;
    /// all of it where that is 0. Returns how many bytes that were, which can be more.
    pub fn zone_pressure_relief(&self, zone: Handle, goal: usize) -> usize {
        let relieve = |zone: &Zone<'_, P>| {
            let before = zone.heap.size();
            zone.heap.shrink();
            before.saturating_sub(zone.heap.size())
        };
        if !zone.is_null() {
            return self.zones.find(zone).map_or(0, relieve);
        }
        let mut released = 0;
        self.visit_registered(|zone| {
            released += relieve(zone);
            goal == 0 || released < goal
        });
        released
    }

    /// Calls `recorder` with ranges of a zone, a few at a time, and their kind: of those kinds that `mask` has. With no lock held;
    /// what is allocated or freed meanwhile may be left out, so the zone is best [locked](Self::force_lock). `false` where there is
    /// no such zone.
    pub fn enumerate(&self, zone: Handle, mask: u32, mut recorder: impl FnMut(u32, &[Range])) -> bool {
        let Some(zone) = self.zones.find(zone) else { return false };
        if mask & ADMIN_REGION_RANGE_TYPE != 0 {
            zone.record(ADMIN_REGION_RANGE_TYPE, &mut recorder, |add| zone.for_each_region(true, add));
        }
        if mask & PTR_REGION_RANGE_TYPE != 0 {
            zone.record(PTR_REGION_RANGE_TYPE, &mut recorder, |add| zone.for_each_region(false, add));
        }
        if mask & PTR_IN_USE_RANGE_TYPE != 0 {
            zone.record(PTR_IN_USE_RANGE_TYPE, &mut recorder, |add| zone.for_each_block(add));
        }
        true
    }

    /// Prints a zone's name and counts and, where it is to be verbose, its tables and blocks. With null, all registered ones.
    pub fn print(&self, zone: Handle, verbose: bool) {
        if !zone.is_null() {
            self.zones.find(zone).into_iter().for_each(|zone| zone.print(self.write, verbose));
            return;
        }
        self.visit_registered(|zone| {
            zone.print(self.write, verbose);
            true
        });
    }

    /// Waits until no call of the zone is under way, and lets none begin until it is unlocked.
    pub fn force_lock(&self, zone: Handle) {
        let Some(zone) = self.zones.find(zone) else { return };
        while zone.own.is_locked.swap(true, SeqCst) {
            spin_loop();
        }
        while zone.own.inside.load(SeqCst) > 0 {
            spin_loop();
        }
    }

    /// Ends what [`force_lock`](Self::force_lock) has begun.
    pub fn force_unlock(&self, zone: Handle) {
        if let Some(zone) = self.zones.find(zone) {
            zone.own.is_locked.store(false, SeqCst);
        }
    }

    /// Whether the zone is locked.
    pub fn zone_locked(&self, zone: Handle) -> bool {
        self.zones.find(zone).is_some_and(|zone| zone.own.is_locked.load(SeqCst))
    }

    fn visit_registered(&self, mut visit: impl FnMut(&Zone<'a, P>) -> bool) {
        self.zones.visit(|zone| !zone.own.is_registered.load(Relaxed) || visit(zone));
    }
}

impl<P: Platform> Zone<'_, P> {
    fn name(&self) -> Option<&CStr> {
        let name = self.own.name.load(Acquire);
        // SAFETY: null, or a copy of a string that stays, as `zone_name` says.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })
    }

    fn enter(&self) -> Call<'_> {
        loop {
            self.own.inside.fetch_add(1, SeqCst);
            let call = Call(&self.own.inside);
            if !self.own.is_locked.load(SeqCst) {
                return call;
            }
            drop(call);
            while self.own.is_locked.load(SeqCst) {
                spin_loop();
            }
        }
    }

    fn count_in(&self, block: NonNull<u8>) {
        let bytes = self.heap.block_size(block.as_ptr()).unwrap_or(0);
        self.own.blocks.fetch_add(1, Relaxed);
        let in_use = self.own.bytes.fetch_add(bytes, Relaxed) + bytes;
        self.own.most.fetch_max(in_use, Relaxed);
    }

    fn count_out(&self, bytes: usize) {
        self.own.blocks.fetch_sub(1, Relaxed);
        self.own.bytes.fetch_sub(bytes, Relaxed);
    }

    fn allocate(&self, layout: Layout, zeroed: bool) -> Option<NonNull<u8>> {
        let _call = self.enter();
        let block = if zeroed { self.heap.allocate_zeroed(layout) } else { self.heap.allocate(layout) }?;
        self.count_in(block);
        Some(block)
    }

    /// # Safety
    ///
    /// Nobody uses the block any more.
    unsafe fn free(&self, block: NonNull<u8>) {
        let _call = self.enter();
        let bytes = self.heap.block_size(block.as_ptr()).unwrap_or(0);
        // SAFETY: passed on to the caller.
        match unsafe { self.heap.try_free_block(block) } {
            Ok(()) => self.count_out(bytes),
            Err(fault) => self.heap.caches().report(fault, block.as_ptr(), None),
        }
    }

    /// # Safety
    ///
    /// The block is no longer valid where this returns another.
    unsafe fn reallocate(&self, block: NonNull<u8>, layout: Layout) -> Option<NonNull<u8>> {
        let _call = self.enter();
        let bytes = self.heap.block_size(block.as_ptr());
        // SAFETY: passed on to the caller.
        let new = unsafe { self.heap.reallocate_block(block, layout) }?;
        self.count_out(bytes.unwrap_or(0));
        self.count_in(new);
        Some(new)
    }

    fn statistics(&self) -> Statistics {
        Statistics {
            blocks_in_use: self.own.blocks.load(Relaxed) as u32,
            size_in_use: self.own.bytes.load(Relaxed),
            max_size_in_use: self.own.most.load(Relaxed),
            size_allocated: self.heap.size(),
        }
    }

    fn print(&self, write: fn(fmt::Arguments<'_>), verbose: bool) {
        let Statistics { blocks_in_use, size_in_use, max_size_in_use, size_allocated } = self.statistics();
        let name = self.name().and_then(|name| name.to_str().ok()).unwrap_or("without a name");
        write(format_args!(
            "zone {name} at {:p}: {blocks_in_use} blocks, {size_in_use} bytes in use, {max_size_in_use} at most, {size_allocated} \
             allocated\n",
            self.handle()
        ));
        if verbose {
            write(format_args!("{}", self.heap.tables()));
            self.for_each_block(&mut |block| write(format_args!("{:#x}: {} bytes\n", block.address, block.size)));
        }
    }

    fn for_each_block(&self, visit: &mut dyn FnMut(Range)) {
        let mut next = self.heap.block_after(None);
        while let Some(block) = next {
            if let Some(size) = self.heap.block_size(block.as_ptr()) {
                visit(Range { address: block.addr().get(), size });
            }
            next = self.heap.block_after(Some(block));
        }
    }

    /// Page frames in a row that the zone has for blocks, or for itself.
    fn for_each_region(&self, admin: bool, visit: &mut dyn FnMut(Range)) {
        let frames = self.heap.frames();
        let mut range = Range::default();
        // Frames that belong to metadata which has begun.
        let mut metadata = 0;
        for (frame, owner) in frames.owners_from(Frame::default()) {
            metadata = match owner {
                Owner::Metadata(count) => count,
                Owner::Inner => metadata,
                _ => 0,
            };
            let is_admin = metadata > 0 || owner == Owner::Records;
            metadata = metadata.saturating_sub(1);
            if is_admin != admin {
                continue;
            }
            let address = frames.pointer(frame).addr();
            if range.address + range.size != address {
                if range.size > 0 {
                    visit(range);
                }
                range = Range { address, size: 0 };
            }
            range.size += FRAME_SIZE;
        }
        if range.size > 0 {
            visit(range);
        }
    }

    /// Hands what `all` finds to the recorder, many at a time.
    fn record(&self, kind: u32, recorder: &mut dyn FnMut(u32, &[Range]), all: impl FnOnce(&mut dyn FnMut(Range))) {
        let mut batch = [Range::default(); BATCH];
        let mut filled = 0;
        all(&mut |range| {
            batch[filled] = range;
            filled += 1;
            if filled == BATCH {
                recorder(kind, &batch);
                filled = 0;
            }
        });
        if filled > 0 {
            recorder(kind, &batch[..filled]);
        }
    }
}

impl<P: Platform> Drop for Zones<'_, P> {
    fn drop(&mut self) {
        self.zones.visit(|zone| {
            self.rename(zone, ptr::null_mut());
            true
        });
    }
}

impl<P: Platform> fmt::Debug for Zones<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Zones").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
