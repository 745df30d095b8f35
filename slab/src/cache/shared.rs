//! What the caches of one allocator share: page frames, metadata, the registry, and the way out when memory is short.

mod registry;

use core::fmt;
use core::ptr::NonNull;

use super::core::Core;
use super::geometry::Geometry;
use super::layout;
use super::slabs::Slabs;
use crate::check::{BadChecks, Guard, Log, Quarantine, Rules, Waiting};
use crate::fault::{CacheName, Caller, Damage, Fault, Report};
use crate::frames::{Frame, Frames, Order, Owner};
use crate::lock::{Interrupts, IrqLock, Level};
use crate::memory::FRAME_SIZE;
use crate::platform::{Platform, in_nmi};
use crate::reclaim::{Reclaim, Relief};
use crate::source::FrameSource;
use crate::sync::Ordering::Relaxed;
use crate::sync::{AtomicU8, AtomicU32, Once};
use crate::verify::Broken;
use registry::Registry;

/// Metadata comes in blocks of 64, 128, ... 1024 bytes, each from a cache without magazines; what is larger, in frames.
const METADATA: usize = 5;
const SMALLEST_METADATA: usize = 64;

/// Bytes of the block that so many bytes of metadata take, up to 1024.
pub(super) const fn metadata_block(bytes: usize) -> usize {
    if bytes < SMALLEST_METADATA { SMALLEST_METADATA } else { bytes.next_power_of_two() }
}

/// The order of slots where the embedder has no entropy to give: the same at every boot.
const SEED: u32 = 0x2545_f491;

/// How many caches there are for the size classes of a heap.
pub(crate) const CLASSES: usize = 64;

/// Frames that a source is asked for at least: 256 KiB.
const LOAN: usize = 64;
/// Loans for one allocation; of very small ones the first may go into records.
const MOST_LOANS: usize = 8;
/// Records of frames that fit into one, and other nodes that a new range can need.
const RECORDS_IN_FRAME: usize = 256;
const TREE_NODES: usize = 3;

/// Names and sizes of the size classes.
pub(crate) type Classes = [(&'static str, usize); CLASSES];

/// Numbers of caches: the size classes have theirs from 0 on, then single pages, metadata, and those that an embedder makes.
const SINGLE_PAGES: u32 = CLASSES as u32;
const FIRST_METADATA: u32 = SINGLE_PAGES + 1;
const FIRST_REGISTERED: u32 = FIRST_METADATA + METADATA as u32;

/// The caches of one allocator and the page frames beneath them.
///
/// A [`Heap`](crate::Heap) has one; its [`caches`](crate::Heap::caches) is what a [`Cache`](crate::Cache) is made with.
pub struct Caches<P> {
    name: &'static str,
    frames: Frames<P>,
    /// Lends page frames where the heap's own are used up.
    source: Once<&'static dyn FrameSource>,
    metadata: [Slabs<P>; METADATA],
    /// Those of the heap's size classes.
    general: [Core<P>; CLASSES],
    /// Lends to classes whose slabs have several page frames, where there are only single ones.
    single_pages: Core<P>,
    registry: IrqLock<P, Registry<P>>,
    /// Freed objects with checks that wait.
    pub(crate) quarantine: Quarantine<P>,
    /// Those that have pages of their own.
    pub(crate) guard: Guard<P>,
    /// Their last allocations and frees.
    pub(crate) log: Log,
    /// From where the order of slots comes, where it is to be random.
    seed: AtomicU32,
    /// Goes up when memory is short; a CPU that sees it gives up what its magazines hold.
    reap_epoch: AtomicU32,
    pub(crate) reclaim: Reclaim<P>,
}

impl<P> Caches<P> {
    /// No memory, and the caches of the size classes.
    pub(crate) const fn new(frames: Frames<P>, classes: &Classes) -> Self {
        let mut metadata = [const { metadata_slabs(0) }; METADATA];
        let mut index = 1;
        while index < METADATA {
            metadata[index] = metadata_slabs(index);
            index += 1;
        }
        let mut general = [const { general_cache(0, "", SMALLEST_METADATA) }; CLASSES];
        let mut class = 0;
        while class < CLASSES {
            general[class] = general_cache(class, classes[class].0, classes[class].1);
            class += 1;
        }
        Self {
            name: "",
            frames,
            source: Once::new(),
            metadata,
            general,
            single_pages: single_pages(),
            registry: IrqLock::ordered(Level::Registry, Registry::new()),
            quarantine: Quarantine::new(),
            guard: Guard::new(true),
            log: Log::new(),
            seed: AtomicU32::new(SEED),
            reap_epoch: AtomicU32::new(0),
            reclaim: Reclaim::new(),
        }
    }

    /// Writes what [`new`](Self::new) returns to `this`, piece by piece, with a name.
    ///
    /// # Safety
    ///
    /// There is room for it, aligned, which nobody else uses.
    pub(crate) unsafe fn write_new(this: *mut Self, name: &'static str, classes: &Classes) {
        // SAFETY: each field is written once, in the caller's room; the pattern names all of them.
        unsafe {
            (&raw mut (*this).name).write(name);
            (&raw mut (*this).frames).write(Frames::new());
            (&raw mut (*this).source).write(Once::new());
            for index in 0..METADATA {
                (&raw mut (*this).metadata[index]).write(metadata_slabs(index));
            }
            for (class, (name, size)) in classes.iter().enumerate() {
                (&raw mut (*this).general[class]).write(general_cache(class, name, *size));
            }
            (&raw mut (*this).single_pages).write(single_pages());
            (&raw mut (*this).registry).write(IrqLock::ordered(Level::Registry, Registry::new()));
            (&raw mut (*this).quarantine).write(Quarantine::new());
            (&raw mut (*this).guard).write(Guard::new(false));
            (&raw mut (*this).log).write(Log::new());
            (&raw mut (*this).seed).write(AtomicU32::new(SEED));
            (&raw mut (*this).reap_epoch).write(AtomicU32::new(0));
            (&raw mut (*this).reclaim).write(Reclaim::new());
            #[rustfmt::skip]
            let Self {
                name: _, frames: _, source: _, metadata: _, general: _, single_pages: _, registry: _, quarantine: _, guard: _,
                log: _, seed: _, reap_epoch: _, reclaim: _,
            } = &*this;
        }
    }

    /// What the allocator is called.
    pub(crate) const fn name(&self) -> &'static str {
        self.name
    }

    /// The page frames beneath.
    pub const fn frames(&self) -> &Frames<P> {
        &self.frames
    }
}

const fn metadata_slabs<P>(index: usize) -> Slabs<P> {
    Slabs::new(FIRST_METADATA + index as u32, geometry(SMALLEST_METADATA << index), None)
}

const fn general_cache<P>(class: usize, name: &'static str, size: usize) -> Core<P> {
    Core::new(name, class as u32, geometry(size), None, true)
}

const fn single_pages<P>() -> Core<P> {
    Core::new("size-page", SINGLE_PAGES, Geometry::PAGE, None, false)
}

/// The slabs for objects of so many bytes, aligned to the largest power of two that divides it, up to a page.
const fn geometry(size: usize) -> Geometry {
    let natural = 1 << size.trailing_zeros();
    match Geometry::new(layout(size, if natural < FRAME_SIZE { natural } else { FRAME_SIZE })) {
        Some(geometry) => geometry,
        None => panic!("no slab for a size class"),
    }
}

impl<P: Platform> Caches<P> {
    /// The cache of a size class.
    #[inline]
    pub(crate) fn class(&self, class: usize) -> &Core<P> {
        // A class is less than their number, which this says to the compiler.
        &self.general[class % CLASSES]
    }

    /// The cache with this number, where it has the objects with checks of a size class.
    #[cold]
    pub(crate) fn class_twin(&self, id: u32) -> Option<&Core<P>> {
        self.general.iter().find_map(|cache| cache.twin().filter(|twin| twin.slabs.id == id))
    }

    /// The caches of the size classes, by size, and that of single pages.
    pub(crate) fn classes(&self) -> impl Iterator<Item = &Core<P>> {
        self.general.iter().chain([&self.single_pages])
    }

    /// The cache of the size class with this number, or that of single pages.
    #[inline]
    pub(crate) fn class_by_id(&self, id: u32) -> Option<&Core<P>> {
        if id == SINGLE_PAGES { Some(&self.single_pages) } else { self.general.get(id as usize) }
    }

    /// The cache of single pages, if they may serve a class where it has no memory.
    pub(crate) fn pages_for(&self, class: usize) -> Option<&Core<P>> {
        let geometry = &self.class(class).slabs.geometry;
        (geometry.frames > 1 && geometry.stride <= FRAME_SIZE).then_some(&self.single_pages)
    }

    /// A run of page frames, which the frame source lends where there is none.
    #[inline]
    pub(crate) fn allocate_frames(&self, count: u32, alignment: Order) -> Option<Frame> {
        self.frames.allocate_run(count, alignment).or_else(|| self.borrow_frames(count, alignment))
    }

    /// `count` frames in a row, each of which is freed alone, by [`Frames::free_metadata`].
    pub(crate) fn allocate_lent(&self, count: u32) -> Option<Frame> {
        let first = self.allocate_frames(count, Order::ZERO)?;
        self.frames.make_single(first, count);
        Some(first)
    }

    /// `false` where there is a source already.
    pub(crate) fn set_source(&self, source: &'static dyn FrameSource) -> bool {
        let mut set = false;
        // Others wait until it is set.
        let _interrupts = Interrupts::<P>::disable();
        self.source.call_once(|| {
            set = true;
            source
        });
        set
    }

    #[cold]
    fn borrow_frames(&self, count: u32, alignment: Order) -> Option<Frame> {
        let source = *self.source.get().filter(|_| !in_nmi::<P>())?;
        for _ in 0..MOST_LOANS {
            let (start, frames) =
                loan_sizes(count, alignment).find_map(|frames| Some((source.lend(frames)?, frames)))?;
            // SAFETY: the source lends memory that nobody else uses.
            let added =
                unsafe { self.frames.add_lent(start.as_ptr(), frames * FRAME_SIZE, || Some(source.lend(1)?.as_ptr())) };
            if !added {
                let frame = |index| start.as_ptr().wrapping_add(index * FRAME_SIZE);
                (0..frames).filter_map(|index| NonNull::new(frame(index))).for_each(|frame| source.take_back(frame));
                return None;
            }
            if let Some(frame) = self.frames.allocate_run(count, alignment) {
                return Some(frame);
            }
        }
        None
    }

    /// Gives free frames back to the source, down to `keep`.
    fn repay(&self, keep: usize) -> usize {
        let Some(source) = self.source.get() else { return 0 };
        self.frames.return_free_to(&mut |frame| _ = NonNull::new(frame).map(|frame| source.take_back(frame)), keep)
    }

    /// A block for the allocator itself, aligned to its size up to a page, which is a power of two or rounded up to one.
    /// In an NMI there is none.
    pub(crate) fn allocate_metadata(&self, bytes: usize) -> Option<NonNull<u8>> {
        if in_nmi::<P>() {
            return None;
        }
        match self.metadata_cache(bytes) {
            Some(slabs) => NonNull::new(slabs.take(self, true).ok()?.0),
            None => {
                let count = u32::try_from(bytes.div_ceil(FRAME_SIZE)).ok()?;
                let frame = self.allocate_frames(count, Order::ZERO)?;
                self.frames.make_metadata(frame, count);
                NonNull::new(self.frames.pointer(frame))
            }
        }
    }

    /// Frees a block that [`allocate_metadata`](Self::allocate_metadata) returned.
    ///
    /// # Safety
    ///
    /// It has that size, and nobody uses it any more.
    pub(crate) unsafe fn free_metadata(&self, block: *mut u8, bytes: usize) {
        match self.metadata_cache(bytes) {
            Some(slabs) => _ = slabs.put(self, [block], false).release(),
            None => {
                let Some(frame) = self.frames.frame_of(block) else { return };
                self.frames.free_metadata(frame, bytes.div_ceil(FRAME_SIZE) as u32);
            }
        }
    }

    fn metadata_cache(&self, bytes: usize) -> Option<&Slabs<P>> {
        self.metadata.iter().find(|slabs| bytes <= slabs.geometry.stride)
    }

    /// Whether so little is free that nothing should be taken that one can do without.
    pub(crate) fn memory_is_short(&self) -> bool {
        self.frames.below_low()
    }

    pub(crate) fn reap_epoch(&self) -> u32 {
        self.reap_epoch.load(Relaxed)
    }

    /// Gives back what the caches hold and do not use: the magazines of this CPU and of the depots, and all empty
    /// slabs. Other CPUs follow when they next exchange a magazine or call `maintain`. Returns the page frames that
    /// went back.
    pub(crate) fn reap(&self) -> usize {
        if in_nmi::<P>() {
            return 0;
        }
        self.reap_epoch.fetch_add(1, Relaxed);
        self.end_quarantine(None);
        self.end_guard_waits(usize::MAX);
        let mut frames = 0;
        self.for_each(|cache| frames += cache.reap(self));
        // The larger first: their slabs' headers are among the smaller.
        self.metadata.iter().rev().for_each(|slabs| frames += slabs.reap(self, true).release());
        self.frames.drain_stock();
        self.repay(0);
        frames
    }

    /// Gives up what this CPU's magazines hold where memory has been called for since it last looked.
    pub(crate) fn follow_reap(&self) {
        self.end_guard_waits(usize::MAX);
        self.for_each(|cache| cache.follow_reap(self));
    }

    /// Gives every CPU its places for magazines of the size classes, where there is enough memory to use them.
    pub(crate) fn set_up_cpus(&self) {
        self.general.iter().for_each(|cache| cache.magazines.set_up(self));
    }

    /// An interval is over for every cache.
    pub(crate) fn end_interval(&self) {
        self.for_each(|cache| cache.end_interval(self));
        for slabs in self.metadata.iter().rev() {
            slabs.end_interval(&self.frames);
            slabs.reap(self, false).release();
        }
        self.repay(LOAN);
    }

    /// Calls `attempt` until it succeeds or there is nothing left that could help it; between the attempts memory is
    /// freed.
    ///
    /// No lock is held meanwhile. In an NMI there is nothing to be done.
    pub(crate) fn with_relief<T>(&self, bytes: usize, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
        if in_nmi::<P>() {
            return None;
        }
        let Some(mut relief) = Relief::begin(self, bytes) else {
            // Some CPU, or this one further out, is at it: only what is safe to do twice at once.
            self.reap();
            return attempt();
        };
        while relief.step() {
            if let Some(done) = attempt() {
                return Some(done);
            }
        }
        None
    }

    /// A CPU leaves: gives back what its magazines hold.
    ///
    /// # Safety
    ///
    /// The CPU with this number uses no cache of this allocator meanwhile.
    pub(crate) unsafe fn retire_cpu(&self, cpu: usize) {
        // SAFETY: passed on to the caller.
        self.for_each(|cache| unsafe { cache.retire_cpu(self, cpu) });
        // SAFETY: as above.
        unsafe { self.frames.drain_stock_of(cpu) };
    }

    /// The number of the cache that the slab around `object` belongs to, or the guarded object there.
    pub(super) fn owner_of(&self, object: *const u8) -> Option<u32> {
        match self.frames.frame_of(object).map(|frame| self.frames.owner(frame)) {
            Some(Owner::Slab { cache, .. }) => Some(cache),
            _ => self.guard.around(object).map(|guarded| guarded.cache),
        }
    }

    /// Reports a fault. It returns where the embedder wants to go on.
    #[cold]
    pub(crate) fn report(&self, fault: Fault, pointer: *const u8, caller: Caller) {
        self.report_with(pointer, None, fault, caller);
    }

    /// The same with what was overwritten.
    #[cold]
    pub(super) fn report_with(&self, pointer: *const u8, damage: Option<Damage>, fault: Fault, caller: Caller) {
        let now = self.frames.faults.event::<P>(caller);
        let mut report = Report { damage, ..Report::new(fault, pointer, now) };
        let owner = self.owner_of(pointer);
        self.for_each_to_report(|cache| {
            if Some(cache.slabs.id) != owner {
                return;
            }
            report.cache = Some(cache.full_name());
            if let Some((place, tag)) = cache.place_of(self, pointer) {
                let tag = tag.unwrap_or_default();
                (report.place, report.allocated, report.freed) = (Some(place), tag.allocated, tag.freed);
            }
        });
        self.frames.faults.report::<P>(&report);
    }

    /// What is checked in which cache, from now on.
    pub(crate) fn set_checks(&self, rules: &'static str) -> Result<(), BadChecks<'static>> {
        let rules = Rules::new(rules)?;
        self.registry.lock().rules = rules;
        self.for_each(|cache| {
            if let Some(checks) = rules.checks_of(cache.name.get()).filter(|_| cache.room.is_none()) {
                cache.set_checks(checks);
            }
        });
        Ok(())
    }

    /// Where the order of slots comes from.
    pub(crate) fn set_seed(&self, seed: u32) {
        self.seed.store(seed, Relaxed);
    }

    /// A number that is not 0, another one each time.
    pub(super) fn random_seed(&self) -> u32 {
        self.seed.fetch_add(SEED, Relaxed).wrapping_mul(0x9e37_79b1).max(1)
    }

    /// Gives an object that has waited to its slab.
    pub(super) fn end_wait(&self, waiting: Waiting<P>) {
        // SAFETY: whoever took it out of the quarantine has begun a visit of its cache.
        let cache = unsafe { waiting.cache.as_ref() };
        cache.end_wait(self, waiting.slot);
        cache.end_visit();
    }

    /// Lets no object wait any longer, of this cache where there is one.
    pub(super) fn end_quarantine(&self, cache: Option<&Core<P>>) {
        while let Some(waiting) = self.quarantine.take(cache) {
            self.end_wait(waiting);
        }
    }

    /// Calls `visit` with the object with checks around an address, its bytes and its state.
    pub(crate) fn visit_checked(&self, address: usize, mut visit: impl FnMut(*const u8, usize, &AtomicU8)) {
        let base = self.frames.pointer(Frame::default());
        let pointer = base.wrapping_add(address.wrapping_sub(base.addr()));
        let Some(id) = self.owner_of(pointer) else { return };
        self.for_each(|cache| {
            if cache.slabs.id == id
                && let Some((object, size, state)) = cache.checked_around(self, pointer)
            {
                visit(object, size, state);
            }
        });
    }

    /// Checks every object with checks, and says how many were reported.
    pub(crate) fn check_objects(&self) -> usize {
        let mut found = 0;
        self.for_each(|cache| {
            if cache.room.is_some() {
                found += cache.check_objects(self);
            }
        });
        found
    }

    /// What the cache with this number is called in reports.
    #[cold]
    pub(crate) fn name_of(&self, id: u32) -> CacheName {
        let unnamed = if id < FIRST_REGISTERED { "the allocator itself" } else { "another cache" };
        self.find_name(id).unwrap_or(CacheName::first(unnamed))
    }

    /// The same, if there is such a cache.
    pub(super) fn find_name(&self, id: u32) -> Option<CacheName> {
        let mut name = None;
        self.for_each_to_report(|cache| {
            if cache.slabs.id == id {
                name = Some(cache.full_name());
            }
        });
        name
    }

    /// Checks the invariants of the page frames and of every cache.
    ///
    /// # Errors
    ///
    /// The first that does not hold. While other CPUs allocate and free, a count may be reported that was only on its
    /// way.
    pub fn verify(&self) -> Result<(), Broken> {
        self.frames.verify()?;
        let mut result = Ok(());
        self.for_each(|cache| {
            if result.is_ok() {
                result = cache.verify(self);
            }
        });
        self.metadata.iter().try_fold((), |(), slabs| slabs.verify(&self.frames)).and(result)
    }
}

/// How many frames to ask a source for, one after the other, so that a run of `count` with this alignment can surely be
/// cut from them, with room for their records.
fn loan_sizes(count: u32, alignment: Order) -> impl Iterator<Item = usize> {
    let surely = (count + alignment.frames() - 1) as usize;
    let records = surely.div_ceil(RECORDS_IN_FRAME) + TREE_NODES;
    [LOAN.max(surely + records), surely + records, surely].into_iter()
}

impl<P> fmt::Debug for Caches<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caches").finish_non_exhaustive()
    }
}
