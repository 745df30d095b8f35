//! The heap: size classes over caches, page frames for what is larger, and `GlobalAlloc` over both.
//!
//! A free finds out from the frame record, not from the layout, what the pointer is, and refuses a layout that does not
//! fit. Locks: none of its own.

#[cfg(feature = "allocator-api2")]
mod allocator;
mod blocks;
mod classes;
mod init;
mod numbers;
#[cfg(test)]
mod tests;

use core::alloc::{GlobalAlloc, Layout};
use core::fmt;
use core::ops::Range;
use core::panic::Location;
use core::ptr::{self, NonNull};

use crate::cache::{Caches, Core, LENT, Request, USED};
use crate::check::{Allocation, BadChecks, GuardPages, Logged, Site};
use crate::fault::{Backtrace, CacheName, Caller, Fault, Handler, Report};
use crate::frames::{Frame, Frames, Order, Owner};
use crate::memory::FRAME_SIZE;
use crate::platform::{Platform, in_nmi};
use crate::reclaim::{self, Callback, Hook, TooManyCallbacks};
use crate::verify::Broken;
use classes::Block;

pub use classes::SIZES;

/// A heap over all the memory of a machine, or over a range of addresses.
///
/// A kernel has one, a `static` with `#[global_allocator]` on it, and calls [`init`](Self::init) or
/// [`init_range`](Self::init_range) early. Before that every allocation fails.
///
/// Any CPU may use it at any time, interrupt handlers too, and with some care NMI handlers: see
/// [`platform`](crate::platform). No call ever waits for anything but a short lock.
pub struct Heap<P> {
    caches: Caches<P>,
}

impl<P> Heap<P> {
    /// A heap without memory.
    #[allow(clippy::new_without_default, reason = "a heap is a static, and `Default` is not const")]
    pub const fn new() -> Self {
        Self { caches: Caches::new(Frames::new(), &classes::CACHES) }
    }

    /// The same, with zones of page frames that meet at other physical addresses than 16 MiB and 4 GiB: those of the
    /// limits that [`Frames::allocate_below`] is asked for most. They are rounded down to frames; a boundary below the
    /// first is raised to it, and two that are equal leave the zone between them empty.
    #[must_use]
    pub const fn with_zones(boundaries: [u64; 2]) -> Self {
        Self { caches: Caches::new(Frames::with_zones(boundaries), &classes::CACHES) }
    }

    /// The page frames beneath, for whoever needs whole ones: page tables, stacks, buffers.
    pub const fn frames(&self) -> &Frames<P> {
        self.caches.frames()
    }

    /// What a [`Cache`](crate::Cache) or [`ObjectCache`](crate::ObjectCache) is made with.
    pub const fn caches(&self) -> &Caches<P> {
        &self.caches
    }
}

impl<P: Platform> Heap<P> {
    /// A block for `layout`, not initialised; `None` where there is no memory for it.
    ///
    /// An empty layout gets a block too, of the smallest size; it must be freed like any other. Before it fails it has
    /// memory given back, as [`reclaim`](crate::reclaim) says, and where that is not enough a small request takes a
    /// free object of a larger class, or, up to a page, a single page frame where there are none in a row. A request for
    /// more than there is in all fails at once.
    #[inline]
    #[track_caller]
    pub fn allocate(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.allocate_for(layout, Some(Location::caller()))
    }

    #[inline]
    fn allocate_for(&self, layout: Layout, caller: Caller) -> Option<NonNull<u8>> {
        let object = self.class_of(layout).and_then(|cache| cache.allocate_at_hand(&self.caches));
        object.or_else(|| self.allocate_slowly(layout, caller))
    }

    /// The cache that serves a layout, where a look at a table says so.
    #[inline]
    fn class_of(&self, layout: Layout) -> Option<&Core<P>> {
        classes::at_once(layout).map(|class| self.caches.class(class))
    }

    #[cold]
    fn allocate_slowly(&self, layout: Layout, caller: Caller) -> Option<NonNull<u8>> {
        let request = Request { layout, caller };
        let block = Block::of(layout)?;
        let refusals = self.refusals(block);
        let allocated = match block {
            Block::Class(class) => self.caches.class(class).allocate_for(&self.caches, true, request).ok(),
            Block::Frames { count, alignment } => self.allocate_run(count, alignment),
        };
        if allocated.is_some() || self.refusals(block) != refusals {
            return allocated;
        }
        self.allocate_with_relief(request, block)
    }

    /// How many requests for such a block were refused on purpose.
    #[inline]
    fn refusals(&self, block: Block) -> u64 {
        match block {
            Block::Class(class) => self.caches.class(class).refusals(&self.caches),
            Block::Frames { .. } => self.frames().refusals(),
        }
    }

    #[cold]
    fn allocate_with_relief(&self, request: Request, block: Block) -> Option<NonNull<u8>> {
        if block.size() > self.size() {
            return None;
        }
        // Where page frames are free, but not in a row, nothing need be given up.
        if let Block::Class(class) = block
            && let Some(page) = self.allocate_page(class)
        {
            return Some(page);
        }
        let attempt = || match block {
            Block::Class(class) => self.allocate_from_class_or_larger(class, request),
            Block::Frames { count, alignment } => self.allocate_run(count, alignment),
        };
        let block_found = if in_nmi::<P>() { attempt() } else { self.caches.with_relief(block.size(), attempt) };
        if let (None, Block::Class(class)) = (block_found, block) {
            self.caches.class(class).count_failure();
        }
        block_found
    }

    /// Where a class cannot have a slab, an object of a larger class that is free anyway is better than nothing, and so is
    /// a page, where there are only single ones. Its state says for which class it is lent.
    fn allocate_from_class_or_larger(&self, class: usize, request: Request) -> Option<NonNull<u8>> {
        let own = self.caches.class(class).allocate_for(&self.caches, true, request);
        let align = request.layout.align();
        let mut larger = (class + 1..classes::COUNT).filter(|&larger| SIZES[larger].is_multiple_of(align));
        let lend = |larger| self.caches.class(larger).allocate(&self.caches, false, lent_for(class)).ok();
        own.ok().or_else(|| larger.find_map(lend)).or_else(|| self.allocate_page(class))
    }

    fn allocate_page(&self, class: usize) -> Option<NonNull<u8>> {
        self.caches.pages_for(class)?.allocate(&self.caches, true, lent_for(class)).ok()
    }

    fn allocate_run(&self, count: u32, alignment: Order) -> Option<NonNull<u8>> {
        let frame = self.caches.allocate_frames(count, alignment)?;
        NonNull::new(self.frames().pointer(frame))
    }

    /// The same, all zero.
    #[track_caller]
    pub fn allocate_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        self.allocate_zeroed_for(layout, Some(Location::caller()))
    }

    fn allocate_zeroed_for(&self, layout: Layout, caller: Caller) -> Option<NonNull<u8>> {
        let block = self.allocate_for(layout, caller)?;
        // SAFETY: the block is at least that large, and just allocated.
        unsafe { block.as_ptr().write_bytes(0, layout.size()) };
        Some(block)
    }

    /// `count` page frames in a row, the first aligned to `alignment`, all below the physical address `limit` (`u64::MAX`
    /// for any): as [`Frames::allocate_below`] has them, but before it fails memory is given back, as
    /// [`reclaim`](crate::reclaim) says. They are freed by [`Frames::free_run`].
    pub fn allocate_frames(&self, count: u32, alignment: Order, limit: u64) -> Option<Frame> {
        let refusals = self.frames().refusals();
        let attempt = || match limit {
            u64::MAX => self.caches.allocate_frames(count, alignment),
            _ => self.frames().allocate_below(count, alignment, limit),
        };
        let bytes = count as usize * FRAME_SIZE;
        attempt().or_else(|| {
            let hopeless = bytes > self.size() || self.frames().refusals() != refusals;
            if hopeless { None } else { self.caches.with_relief(bytes, attempt) }
        })
    }

    /// What makes allocations of the size class for requests of `size` bytes fail; `None` where they get page frames.
    #[cfg(feature = "fault-injection")]
    pub fn class_injector(&self, size: usize) -> Option<&crate::Injector> {
        match Block::of(Layout::from_size_align(size, 1).ok()?)? {
            Block::Class(class) => Some(self.caches.class(class).injector()),
            Block::Frames { .. } => None,
        }
    }

    /// Bytes that a block for `layout` really has, all of which its owner may use, unless it was allocated with checks:
    /// then it has just what was asked for. `None` where there can be no such block.
    pub fn usable_size(layout: Layout) -> Option<usize> {
        Block::of(layout).map(Block::size)
    }

    /// Frees a block that [`allocate`](Self::allocate) or [`reallocate`](Self::reallocate) returned.
    ///
    /// A pointer or layout that cannot be right is refused before anything has changed, and reported: see *Bad frees*
    /// in the crate's documentation.
    ///
    /// # Safety
    ///
    /// `block` came from this heap for `layout`, and nobody uses it any more.
    #[inline]
    #[track_caller]
    pub unsafe fn free(&self, block: NonNull<u8>, layout: Layout) {
        let caller = Location::caller();
        // SAFETY: passed on to the caller.
        unsafe { self.free_for(block.as_ptr(), layout, Some(caller)) };
    }

    #[inline]
    unsafe fn free_for(&self, block: *mut u8, layout: Layout, caller: Caller) {
        // SAFETY: nobody uses it any more, says the caller.
        if !self.class_of(layout).is_some_and(|cache| unsafe { cache.free_at_hand(&self.caches, block) }) {
            // SAFETY: as above.
            unsafe { self.free_slowly(block, layout, caller) };
        }
    }

    /// Frees what may be no object of the class of `layout`, though most often it is, and a magazine is to be exchanged.
    #[cold]
    unsafe fn free_slowly(&self, block: *mut u8, layout: Layout, caller: Caller) {
        // SAFETY: passed on to the caller.
        let free = |cache: &Core<P>| unsafe { cache.free(&self.caches, block, USED) }.is_ok();
        if !self.class_of(layout).is_some_and(free) {
            // SAFETY: passed on to the caller.
            let freed = unsafe { self.try_free(block, layout, caller) };
            freed.unwrap_or_else(|fault| self.caches.report(fault, block, caller));
        }
    }

    unsafe fn try_free(&self, block: *mut u8, layout: Layout, caller: Caller) -> Result<(), Fault> {
        match self.find(block, layout)? {
            // SAFETY: nobody uses it any more, says the caller.
            Found::Checked { twin } => unsafe { twin.free_checked(&self.caches, block, Some(layout), caller) },
            // SAFETY: nobody uses it any more, says the caller.
            Found::Object { cache, state, .. } => unsafe { cache.free(&self.caches, block, state) },
            Found::Frames { frame, count } => self.frames().try_shrink_run(frame, count, 0),
        }
    }

    /// Changes the size of a block to `new_size` bytes and keeps its contents, as far as they fit. The block stays
    /// where it is as long as its class or its number of frames stays the same, and when it gives up frames; else it
    /// moves.
    ///
    /// `None` where there is no memory, or no layout of that size: the block is then as it was.
    ///
    /// # Safety
    ///
    /// `block` came from this heap for `layout`. It is no longer valid once this returns another.
    #[track_caller]
    pub unsafe fn reallocate(&self, block: NonNull<u8>, layout: Layout, new_size: usize) -> Option<NonNull<u8>> {
        let new_layout = Layout::from_size_align(new_size, layout.align()).ok()?;
        // SAFETY: passed on to the caller.
        unsafe { self.resize(block, layout, new_layout, Some(Location::caller())) }
    }

    /// The same for a new layout of any alignment.
    ///
    /// # Safety
    ///
    /// As [`reallocate`](Self::reallocate) says.
    unsafe fn resize(
        &self,
        block: NonNull<u8>,
        layout: Layout,
        new_layout: Layout,
        caller: Caller,
    ) -> Option<NonNull<u8>> {
        let new = Block::of(new_layout)?;
        let found = self.find(block.as_ptr(), layout);
        match found.and_then(|found| self.resize_in_place(&found, block.as_ptr(), new, new_layout.align())) {
            Ok(true) => return Some(block),
            Ok(false) => {}
            Err(fault) => {
                self.caches.report(fault, block.as_ptr(), caller);
                return None;
            }
        }
        let moved = self.allocate_for(new_layout, caller)?;
        // SAFETY: the blocks are distinct, and both have the smaller of the two sizes.
        unsafe { ptr::copy_nonoverlapping(block.as_ptr(), moved.as_ptr(), layout.size().min(new_layout.size())) };
        // SAFETY: the caller gives the block up for the new one.
        unsafe { self.free_for(block.as_ptr(), layout, caller) };
        Some(moved)
    }

    /// Whether what was found at `block` now is what `new` and `align` ask for, without having moved.
    fn resize_in_place(&self, found: &Found<'_, P>, block: *mut u8, new: Block, align: usize) -> Result<bool, Fault> {
        if !block.addr().is_multiple_of(align) {
            return Ok(false);
        }
        match (found, new) {
            (Found::Object { class, .. }, Block::Class(wanted)) => Ok(*class == wanted),
            (&Found::Frames { frame, count: old }, Block::Frames { count, .. }) if count <= old => {
                self.frames().try_shrink_run(frame, old, count)?;
                Ok(true)
            }
            (&Found::Frames { frame, count: old }, Block::Frames { count, .. }) => {
                self.frames().try_grow_run(frame, old, count)
            }
            _ => Ok(false),
        }
    }

    /// What is at `block`, which was allocated for `layout`.
    fn find(&self, block: *mut u8, layout: Layout) -> Result<Found<'_, P>, Fault> {
        let wanted = Block::of(layout).ok_or(Fault::BadAddress)?;
        let found = self.find_any(block)?;
        let (right, allocated) = match &found {
            Found::Checked { twin } => return twin.allows_free(&self.caches, block, layout).map(|()| found),
            Found::Object { class, .. } => (wanted == Block::Class(*class), SIZES[*class]),
            Found::Frames { count, .. } => {
                let allocated = *count as usize * FRAME_SIZE;
                (wanted.size() == allocated && matches!(wanted, Block::Frames { .. }), allocated)
            }
        };
        if right { Ok(found) } else { Err(Fault::BadSize { freed: wanted.size(), allocated }) }
    }

    /// What is at `block`, by its frame's record; nothing is dereferenced before that says that it is an object. One with
    /// checks may be free.
    fn find_any(&self, block: *mut u8) -> Result<Found<'_, P>, Fault> {
        if let Some(guarded) = self.caches.guard.around(block) {
            return self.find_in_cache(block, guarded.cache);
        }
        let frame = self.frames().frame_of(block).ok_or(Fault::BadAddress)?;
        match self.frames().owner(frame) {
            Owner::Slab { cache: id, .. } => self.find_in_cache(block, id),
            Owner::Pages(_) if self.frames().pointer(frame) != block => Err(Fault::BadBase),
            Owner::Pages(count) => Ok(Found::Frames { frame, count }),
            _ => Err(self.frames().fault_at(frame)),
        }
    }

    /// The same where it is of the cache with this number: a size class, a class's twin, or another.
    fn find_in_cache(&self, block: *mut u8, id: u32) -> Result<Found<'_, P>, Fault> {
        if let Some(cache) = self.caches.class_by_id(id) {
            return match cache.state_of(&self.caches, block)? {
                USED => Ok(Found::Object { cache, state: USED, class: id as usize }),
                state @ LENT.. => Ok(Found::Object { cache, state, class: (state - LENT) as usize }),
                _ => Err(Fault::DoubleFree),
            };
        }
        let Some(twin) = self.caches.class_twin(id) else {
            let owner = self.caches.name_of(id);
            return Err(Fault::WrongCache { freed: CacheName::first("the heap"), owner });
        };
        Ok(Found::Checked { twin })
    }

    /// Gives back what the allocator holds and does not use: the magazines of this CPU and of the depots, empty slabs,
    /// and this CPU's stock of page frames. Returns the page frames that went back.
    pub fn shrink(&self) -> usize {
        self.caches.reap()
    }

    /// Does what is due, on this CPU: to be called from time to time, at best on every CPU, by a timer or an idle
    /// thread. `now` is a time in milliseconds since any moment.
    ///
    /// When memory is short, what is not used is given back. When an interval of 15 seconds is over, so are the
    /// magazines and slabs that were not needed during it, and magazines grow in caches whose CPUs wait for each other
    /// (Bonwick & Adams 2001, sections 3.4 and 3.5). Where it is never called, failing allocations do the first, and
    /// nobody the second.
    pub fn maintain(&self, now: u64) {
        reclaim::maintain(&self.caches, now);
    }

    /// Calls `callback` when memory is short, after those that were added before it; see [`reclaim`](crate::reclaim).
    ///
    /// # Errors
    ///
    /// [`TooManyCallbacks`]: there is room for [`MOST_CALLBACKS`](crate::reclaim::MOST_CALLBACKS).
    pub fn add_reclaim_callback(&self, callback: Callback) -> Result<(), TooManyCallbacks> {
        self.caches.reclaim.add_callback(callback)
    }

    /// Calls `hook` when nothing else has helped; see [`reclaim`](crate::reclaim). `None`: the allocation fails then.
    pub fn set_out_of_memory_hook(&self, hook: Option<Hook>) {
        self.caches.reclaim.set_hook(hook);
    }

    /// Asks `handler` what is done about a fault; with none, the default, the kernel stops. See [`fault`](crate::fault).
    pub fn set_fault_handler(&self, handler: Option<Handler>) {
        self.frames().faults.set_handler(handler);
    }

    /// Takes return addresses for reports from `backtrace`; with none, the default, reports have none.
    pub fn set_backtrace(&self, backtrace: Option<Backtrace>) {
        self.frames().faults.set_backtrace(backtrace);
    }

    /// Faults so far, of this heap, its caches and its page frames.
    pub fn faults(&self) -> u64 {
        self.frames().faults.seen()
    }

    /// Checks objects of caches by `rules`, from now on: `dentry:redzone,poison;size-*:audit`. Each rule is a cache's name,
    /// or how names start and a `*`, and behind a colon the words of [`check`](crate::check), or `none`. The first rule that
    /// names a cache counts; caches that none names stay as they are. Caches that are made later follow the rules too.
    ///
    /// Objects that are allocated already are not checked.
    ///
    /// # Errors
    ///
    /// [`BadChecks`] names the word that is none; nothing has changed then.
    pub fn set_checks(&self, rules: &'static str) -> Result<(), BadChecks<'static>> {
        self.caches.set_checks(rules)
    }

    /// Bytes of freed objects that wait before they may be allocated again, in caches whose checks include
    /// [`QUARANTINE`](crate::check::Checks::QUARANTINE); 256 KiB by default. Never more than 256 objects wait.
    pub fn set_quarantine(&self, bytes: usize) {
        self.caches.quarantine.set_limit(bytes);
    }

    /// Where the order of slots comes from, in caches whose checks include
    /// [`RANDOM`](crate::check::Checks::RANDOM): a number that an attacker does not know. Without it the order is the same
    /// at every boot.
    pub fn set_seed(&self, seed: u32) {
        self.caches.set_seed(seed);
    }

    /// Keeps the last `events` allocations and frees of objects with the check
    /// [`AUDIT`](crate::check::Checks::AUDIT), for [`for_each_event`](Self::for_each_event); about 100 bytes each. `false`
    /// where there is no memory for it, or where it has been called before.
    pub fn set_event_log(&self, events: usize) -> bool {
        self.caches.log.set_up(&self.caches, events)
    }

    /// Calls `visit` with the events that are kept, the last first, and with no lock held. What is just being written is left
    /// out.
    pub fn for_each_event(&self, visit: impl FnMut(&Logged)) {
        self.caches.log.for_each(&self.caches, self.frames().faults.last_event(), visit);
    }

    /// Has `pages` map guarded objects, those of caches with the check
    /// [`GUARD`](crate::check::Checks::GUARD). `false`, and nothing done, where it has been called before, there are fewer
    /// addresses than 16 KiB, or this heap is within another.
    pub fn set_guard(&self, pages: &'static dyn GuardPages) -> bool {
        self.caches.guard.set(pages)
    }

    /// What a page fault at `address` was, for its handler to say: an access beside a guarded object, or after its free.
    /// `None` where no guarded object was ever near.
    ///
    /// It may be called in any context. It allocates nothing, and waits for no lock for long: where the registry of caches
    /// is locked for good, the name of the cache is missing. The objects of a cache that has ended have none either.
    #[cold]
    pub fn explain(&self, address: usize) -> Option<Report> {
        self.caches.explain(address)
    }

    /// Calls `visit` with every object that was allocated with checks and is not free, in no order and with no lock held.
    pub fn for_each_allocation(&self, visit: impl FnMut(&Allocation)) {
        self.caches.for_each_allocation(visit);
    }

    /// Calls `visit` with each place of the program that has allocated such objects, in no order: what is there, by who has
    /// made it. Places are told apart with [`AUDIT`](crate::check::Checks::AUDIT). It takes as many passes over all objects
    /// as there are places.
    pub fn for_each_site(&self, visit: impl FnMut(&Site)) {
        self.caches.for_each_site(visit);
    }

    /// Calls `visit` with every object that was allocated with checks, is not free, and that nobody refers to: no word of
    /// `roots`, of a block or object without checks, or of an object that is referred to, points into it.
    ///
    /// The roots are the memory outside the heap where a kernel keeps pointers: its statics, the stacks, saved registers.
    /// A word that only looks like a pointer hides a leak; a pointer that is kept in disguise makes one up.
    ///
    /// # Safety
    ///
    /// 1. Nobody else uses the heap or its caches meanwhile: the other CPUs are halted.
    /// 2. The roots may be read. They and all blocks and objects without checks are initialised as far as the hardware is
    ///    concerned: that they have never been written is no harm in a kernel, but under Miri it is.
    pub unsafe fn find_leaks(&self, roots: &[Range<*const u8>], visit: impl FnMut(&Allocation)) {
        // SAFETY: passed on to the caller.
        unsafe { self.caches.find_leaks(roots, visit) };
    }

    /// Calls `visit` with each place of the program that has allocated such leaks: [`find_leaks`](Self::find_leaks) as
    /// [`for_each_site`](Self::for_each_site) has it.
    ///
    /// # Safety
    ///
    /// As [`find_leaks`](Self::find_leaks).
    pub unsafe fn find_leaks_by_site(&self, roots: &[Range<*const u8>], visit: impl FnMut(&Site)) {
        // SAFETY: passed on to the caller.
        unsafe { self.caches.find_leaks_by_site(roots, visit) };
    }

    /// Checks every object that was allocated with checks, be it allocated, free or waiting, and reports what is wrong with
    /// any. Returns how many were reported.
    pub fn check_objects(&self) -> usize {
        self.caches.check_objects()
    }

    /// A CPU leaves: gives back what its magazines hold. It may come back later.
    ///
    /// # Safety
    ///
    /// The CPU with this number uses neither this heap nor a cache of its memory meanwhile.
    pub unsafe fn retire_cpu(&self, cpu: usize) {
        // SAFETY: passed on to the caller.
        unsafe { self.caches.retire_cpu(cpu) };
    }

    /// Checks every invariant of the allocator.
    ///
    /// # Errors
    ///
    /// The first that does not hold; see [`Caches::verify`].
    pub fn verify(&self) -> Result<(), Broken> {
        self.caches.verify()
    }
}

/// What a pointer turned out to be.
enum Found<'a, P> {
    /// An object of a size class, allocated in this state for this class: of a larger one it may have been lent.
    Object { cache: &'a Core<P>, state: u8, class: usize },
    /// An object with checks.
    Checked { twin: &'a Core<P> },
    /// So many page frames.
    Frames { frame: Frame, count: u32 },
}

/// The state of an object of a larger class that is lent for `class`.
const fn lent_for(class: usize) -> u8 {
    const { assert!(classes::COUNT <= (u8::MAX - LENT) as usize) };
    LENT + class as u8
}

impl<P> fmt::Debug for Heap<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heap").finish_non_exhaustive()
    }
}

// SAFETY: blocks are disjoint, aligned and as large as their layout, and stay where they are; no method unwinds unless the
// caller has broken the contract, and then a kernel stops there.
unsafe impl<P: Platform> GlobalAlloc for Heap<P> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.allocate_for(layout, None).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.allocate_zeroed_for(layout, None).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: passed on to the caller.
        unsafe { self.free_for(block, layout, None) };
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let Some(block) = NonNull::new(block) else {
            self.caches.report(Fault::BadAddress, block, None);
            return block;
        };
        let Ok(new_layout) = Layout::from_size_align(new_size, layout.align()) else { return ptr::null_mut() };
        // SAFETY: passed on to the caller.
        unsafe { self.resize(block, layout, new_layout, None) }.map_or(ptr::null_mut(), NonNull::as_ptr)
    }
}
