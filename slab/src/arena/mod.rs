//! Arenas: ranges of integers, such as virtual addresses, process ids or ports.
//!
//! An [`Arena`] has *spans* of integers and hands out *segments* of them: the vmem of J. Bonwick and J. Adams,
//! *Magazines and Vmem* (USENIX 2001), section 4. What the integers mean is the user's business; an arena never
//! accesses what they may point to. It keeps a boundary tag for each segment (Knuth, *The Art of Computer Programming*,
//! vol. 1, 2.5) in page frames of its own, so that a freed segment finds its neighbours and merges with them at once.
//!
//! | call | time |
//! |---|---|
//! | [`alloc`](Arena::alloc), also with an alignment | constant; a full search only before it fails |
//! | [`free`](Arena::free) | constant on average (a hash table that grows a bucket at a time) |
//! | [`alloc_with`](Arena::alloc_with) bounds, best fit, next fit | grows with the segments that it passes over |
//! | [`add`](Arena::add), an import | grows with the spans that start behind the new one |
//!
//! [Quantum caches](Arena::with_quantum_caches) make that a matter of each CPU for the smallest segments.
//!
//! An arena with a [`Source`], which may be another arena, imports a span when nothing fits, and gives it back when it
//! is wholly free.
//!
//! # Virtual addresses
//!
//! Stacks of 28 KiB, each with a page below that is never mapped. The alignment makes the rest of the address tell a
//! fault in the guard page:
//!
//! ```
//! use kslab::arena::{Arena, ArenaError, Constraints};
//! # use kslab::{Heap, memory::Region, platform::NoInterrupts};
//! # let layout = std::alloc::Layout::from_size_align(16 * 4096, 4096).unwrap();
//! # // SAFETY: the layout is not empty.
//! # let memory = unsafe { std::alloc::alloc(layout) };
//! # let heap = Heap::<NoInterrupts>::new();
//! # // SAFETY: the memory is the heap's alone.
//! # unsafe { heap.init([Region::usable(0x10_0000, 16 * 4096)], memory.wrapping_sub(0x10_0000)) }.unwrap();
//! let addresses = Arena::new(heap.caches(), "kernel stacks", 4096);
//! addresses.add(0xffff_c000_0000_0000, 1 << 30)?;
//!
//! let guarded = Constraints { align: 32 << 10, ..Constraints::NONE };
//! let guard = addresses.alloc_with(32 << 10, &guarded)?;
//! let stack = guard + 4096..guard + (32 << 10); // to be mapped
//! assert!(guard.is_multiple_of(32 << 10));
//!
//! // Or so that it is the stack that is aligned, with any size of guard below it:
//! let aligned = Constraints { align: 32 << 10, phase: (32 << 10) - 4096, ..Constraints::NONE };
//! let other_guard = addresses.alloc_with(4096 + (32 << 10), &aligned)?;
//! assert!((other_guard + 4096).is_multiple_of(32 << 10));
//!
//! addresses.free(guard, 32 << 10)?;
//! assert_eq!(addresses.free(guard, 32 << 10), Err(ArenaError::NotAllocated { start: guard }));
//! # Ok::<(), ArenaError>(())
//! ```
//!
//! # Process ids
//!
//! Next fit takes the first free id behind the last one: an id is used again as late as possible.
//!
//! ```
//! use kslab::arena::{Arena, ArenaError, Constraints, Fit};
//! # use kslab::{Heap, memory::Region, platform::NoInterrupts};
//! # let layout = std::alloc::Layout::from_size_align(16 * 4096, 4096).unwrap();
//! # // SAFETY: the layout is not empty.
//! # let memory = unsafe { std::alloc::alloc(layout) };
//! # let heap = Heap::<NoInterrupts>::new();
//! # // SAFETY: the memory is the heap's alone.
//! # unsafe { heap.init([Region::usable(0x10_0000, 16 * 4096)], memory.wrapping_sub(0x10_0000)) }.unwrap();
//! let ids = Arena::new(heap.caches(), "process ids", 1);
//! ids.add(1, 32767)?;
//!
//! let next = Constraints { fit: Fit::Next, ..Constraints::NONE };
//! assert_eq!(ids.alloc_with(1, &next), Ok(1));
//! assert_eq!(ids.alloc_with(1, &next), Ok(2));
//! ids.free(1, 1)?;
//! assert_eq!(ids.alloc_with(1, &next), Ok(3));
//! # Ok::<(), ArenaError>(())
//! ```
//!
//! # Ports
//!
//! The same arena can serve whoever wants a certain port, or any above 49152:
//!
//! ```
//! use kslab::arena::{Arena, ArenaError, Constraints};
//! # use kslab::{Heap, memory::Region, platform::NoInterrupts};
//! # let layout = std::alloc::Layout::from_size_align(16 * 4096, 4096).unwrap();
//! # // SAFETY: the layout is not empty.
//! # let memory = unsafe { std::alloc::alloc(layout) };
//! # let heap = Heap::<NoInterrupts>::new();
//! # // SAFETY: the memory is the heap's alone.
//! # unsafe { heap.init([Region::usable(0x10_0000, 16 * 4096)], memory.wrapping_sub(0x10_0000)) }.unwrap();
//! let ports = Arena::new(heap.caches(), "ports", 1);
//! ports.add(1, 65535)?;
//!
//! let only = |port| Constraints { min: port, max: port, ..Constraints::NONE };
//! assert_eq!(ports.alloc_with(1, &only(80)), Ok(80));
//! assert_eq!(ports.alloc_with(1, &only(80)), Err(ArenaError::NoSpace));
//! assert_eq!(ports.alloc_with(1, &Constraints { min: 49152, ..Constraints::NONE }), Ok(49152));
//! # Ok::<(), ArenaError>(())
//! ```
//!
//! # Bounds
//!
//! A span may reach up to 2^64 - 1 inclusive; all spans of an arena together have at most 2^64 - 1 integers. There are
//! at most 2.5 million spans and segments. A segment is freed as a whole, with the size it was allocated with.
//!
//! # Locks
//!
//! One an arena. It is never held while a source, the page frames, a visitor or a formatter is called; pages for tags are
//! got before it is taken. So it has no place in the lock order: no other lock is taken inside it.
//!
//! # Where what is
//!
//! `tags`: the memory of the boundary tags, the only `unsafe`; `chain`, `lists`, `index`: lists of them; `segments`: spans, splits
//! and merges; `fit`, `search`: which segment; `quantum`: magazines; `source`: imports; `walk`, `stats`, `verify`:
//! questions.

#![deny(unsafe_code)]

mod chain;
mod error;
mod fit;
mod index;
mod lists;
mod quantum;
mod search;
mod segments;
mod source;
mod stats;
#[allow(unsafe_code, reason = "the mechanism")]
mod tags;
#[cfg(test)]
#[allow(unsafe_code, reason = "tests take frames and set heaps up")]
mod tests;
mod verify;
mod walk;

use core::fmt;

pub use error::ArenaError;
pub use fit::{Constraints, Fit};
pub use quantum::MOST as MOST_QUANTA;
pub use source::Source;
pub use stats::ArenaStats;
pub use verify::ArenaBroken;
pub use walk::{Segment, SegmentKind};

use crate::cache::Caches;
use crate::lock::{IrqGuard, IrqLock, Level};
use crate::platform::Platform;
use fit::Request;
use quantum::QuantumCaches;
use search::Effort;
use segments::{State, TAGS_TO_ADD, TAGS_TO_ALLOCATE};
use source::Import;
use tags::{Kind, Pages};
use walk::Cursor;

/// Ranges of integers to allocate from. See [the module](self).
///
/// It can be a `static`, and is empty until a span is [added](Self::add) or imported. Dropping it gives the memory of its
/// tags back, but what a source has lent only as far as it was free: allocated segments may still be in use.
///
/// ```
/// use kslab::arena::Arena;
/// use kslab::platform::NoInterrupts;
///
/// static HEAP: kslab::Heap<NoInterrupts> = kslab::Heap::new();
/// static ADDRESSES: Arena<NoInterrupts> = Arena::new(HEAP.caches(), "addresses", 4096);
/// static BUFFERS: Arena<NoInterrupts> = Arena::with_source(HEAP.caches(), "buffers", 4096, &ADDRESSES, 1 << 20);
///
/// assert!(BUFFERS.alloc(4096).is_err(), "nothing has been added yet");
/// ```
pub struct Arena<'a, P: Platform> {
    name: &'static str,
    quantum: u64,
    pages: Pages<'a, P>,
    import: Option<Import<'a>>,
    quantum_caches: QuantumCaches<P>,
    state: IrqLock<P, State>,
}

impl<'a, P: Platform> Arena<'a, P> {
    /// An arena without spans. All that it hands out are multiples of `quantum`, a power of two: with another one every
    /// request is refused. Its boundary tags will lie in the page frames of `caches`.
    pub const fn new(caches: &'a Caches<P>, name: &'static str, quantum: u64) -> Self {
        Self::importing(caches, name, quantum, None)
    }

    const fn importing(caches: &'a Caches<P>, name: &'static str, quantum: u64, import: Option<Import<'a>>) -> Self {
        let (pages, state) = (Pages::new(caches), IrqLock::ordered(Level::Arena, State::new()));
        Self { name, quantum, pages, import, quantum_caches: QuantumCaches::new(0), state }
    }

    /// An arena that imports spans from `source` when nothing that it has fits: `unit` integers (rounded up to the
    /// quantum) or a multiple of that at a time, or just what is needed where the source has no more.
    pub const fn with_source(
        caches: &'a Caches<P>,
        name: &'static str,
        quantum: u64,
        source: &'a dyn Source,
        unit: u64,
    ) -> Self {
        let unit = match unit.checked_next_multiple_of(quantum) {
            Some(unit) => unit,
            None => 0,
        };
        Self::importing(caches, name, quantum, Some(Import { source, unit }))
    }

    /// The same, with quantum caches for segments of 1 to `sizes` quanta, at most [`MOST_QUANTA`]: where no constraint
    /// says otherwise, each CPU keeps what it frees of these sizes in magazines, and takes it from there without a
    /// lock.
    ///
    /// The arena counts what is in magazines as allocated. A free of such a segment is not checked at once: one that is
    /// wrong shows in [`ArenaStats::refused`] only when the magazine is emptied, and the segment may have been handed out
    /// twice by then.
    #[must_use]
    pub const fn with_quantum_caches(mut self, sizes: usize) -> Self {
        self.quantum_caches.enable(sizes);
        self
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Its quantum.
    pub const fn quantum(&self) -> u64 {
        self.quantum
    }

    /// Adds the span of `size` integers from `start` on, both multiples of the quantum.
    ///
    /// # Errors
    ///
    /// [`BadQuantum`](ArenaError::BadQuantum), [`BadSpan`](ArenaError::BadSpan), [`Overlap`](ArenaError::Overlap),
    /// [`NoMemory`](ArenaError::NoMemory).
    pub fn add(&self, start: u64, size: u64) -> Result<(), ArenaError> {
        self.check_span(start, size)?;
        self.lock_with_tags(TAGS_TO_ADD).add(start, size, Kind::Span)?;
        Ok(())
    }

    /// Allocates `size` integers in a row, rounded up to the quantum, by instant fit. Returns the first.
    ///
    /// # Errors
    ///
    /// [`BadQuantum`](ArenaError::BadQuantum), [`BadSize`](ArenaError::BadSize), [`NoSpace`](ArenaError::NoSpace),
    /// [`NoMemory`](ArenaError::NoMemory), [`BadImport`](ArenaError::BadImport).
    pub fn alloc(&self, size: u64) -> Result<u64, ArenaError> {
        self.alloc_with(size, &Constraints::NONE)
    }

    /// Allocates `size` integers in a row, rounded up to the quantum, that meet `constraints`. Returns the first.
    ///
    /// What is bounded by `min`, `max` or `nocross` never makes the arena import a span: it might not help.
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc), and [`BadConstraints`](ArenaError::BadConstraints).
    pub fn alloc_with(&self, size: u64, constraints: &Constraints) -> Result<u64, ArenaError> {
        let request = Request::new(self.round(size)?, self.quantum, constraints)?;
        if *constraints == Constraints::NONE
            && let Some(start) = self.quantum_caches.take(request.size, self.quantum)
        {
            return Ok(start);
        }
        let mut result = self.allocate(&request);
        if result == Err(ArenaError::NoSpace) && self.quantum_caches.enabled() > 0 {
            self.reap();
            result = self.allocate(&request);
        }
        if result.is_err() {
            let counts = &mut self.state.lock().counts;
            counts.failures = counts.failures.wrapping_add(1);
        }
        result
    }

    /// What the arena has, then what the source lends, then what only a full search finds.
    fn allocate(&self, request: &Request) -> Result<u64, ArenaError> {
        let Some(import) = self.import.filter(|_| !request.is_bounded()) else {
            return self.lock_with_tags(TAGS_TO_ALLOCATE).allocate(request, Effort::Full);
        };
        let found = self.lock_with_tags(TAGS_TO_ALLOCATE).allocate(request, Effort::Short);
        if found != Err(ArenaError::NoSpace) {
            return found;
        }
        self.allocate_from_source(import, request).or_else(|error| {
            let found = self.lock_with_tags(TAGS_TO_ALLOCATE).allocate(request, Effort::Full);
            if found == Err(ArenaError::NoSpace) { Err(error) } else { found }
        })
    }

    /// Borrows a span, of whole units if it can be, and allocates from it.
    fn allocate_from_source(&self, import: Import<'_>, request: &Request) -> Result<u64, ArenaError> {
        let needed = request.padded;
        let units = needed.checked_next_multiple_of(import.unit).filter(|units| *units > needed);
        for size in units.into_iter().chain([needed]) {
            if let Ok(start) = import.source.lend(size, self.quantum) {
                return self
                    .allocate_from_import(start, size, request)
                    .inspect_err(|_| import.source.take_back(start, size));
            }
        }
        Err(ArenaError::NoSpace)
    }

    /// Makes what the source has lent a span and allocates from it; else nothing has changed.
    fn allocate_from_import(&self, start: u64, size: u64, request: &Request) -> Result<u64, ArenaError> {
        let bad = ArenaError::BadImport { start, size };
        self.check_span(start, size).map_err(|_| bad)?;
        let result = self.lock_with_tags(TAGS_TO_ADD + TAGS_TO_ALLOCATE).import(start, size, request);
        result.map_err(|error| if error == ArenaError::NoMemory { error } else { bad })
    }

    /// Frees the `size` integers from `start` on, which were allocated as one segment. `size` is rounded up as for the
    /// allocation.
    ///
    /// # Errors
    ///
    /// [`BadQuantum`](ArenaError::BadQuantum), [`BadSize`](ArenaError::BadSize),
    /// [`NotAllocated`](ArenaError::NotAllocated), [`WrongSize`](ArenaError::WrongSize).
    pub fn free(&self, start: u64, size: u64) -> Result<(), ArenaError> {
        let size = self.round(size)?;
        let flush = |start, size| _ = self.release(start, size);
        if self.quantum_caches.put(self.pages.caches(), (start, size), self.quantum, flush) {
            return Ok(());
        }
        self.release(start, size)
    }

    /// Really frees what this CPU's magazines and the depots of the quantum caches have, so that it can merge.
    pub fn reap(&self) {
        self.quantum_caches.drain(self.pages.caches(), self.quantum, |start, size| _ = self.release(start, size));
    }

    fn release(&self, start: u64, size: u64) -> Result<(), ArenaError> {
        let returned = self.state.lock().release(start, size)?;
        if let (Some((start, size)), Some(import)) = (returned, self.import) {
            import.source.take_back(start, size);
        }
        Ok(())
    }

    /// Whether `x` is in a span of the arena, allocated or free. The time grows with the number of spans.
    pub fn contains(&self, x: u64) -> bool {
        self.state.lock().contains(x)
    }

    /// Integers of all spans.
    pub fn size_total(&self) -> u64 {
        self.state.lock().counts.total
    }

    /// Integers that are allocated.
    pub fn size_in_use(&self) -> u64 {
        self.state.lock().counts.in_use
    }

    /// Integers that are free; no more than the largest free segment can be had at once.
    pub fn size_free(&self) -> u64 {
        let counts = self.state.lock().counts;
        counts.total - counts.in_use
    }

    /// Counts, as of one moment.
    pub fn stats(&self) -> ArenaStats {
        ArenaStats::of(self.name, self.quantum, &self.state.lock())
    }

    /// Calls `visit` with every span and its segments, in ascending order: a span first, then its segments.
    ///
    /// `visit` may use the arena. What stays as it is for as long as the walk takes is visited just once; of what comes, goes or
    /// merges meanwhile, some may be missed.
    pub fn walk(&self, mut visit: impl FnMut(Segment)) {
        let mut cursor = Cursor::START;
        loop {
            let batch = cursor.batch(&self.state.lock());
            if batch[0].is_none() {
                return;
            }
            batch.into_iter().flatten().for_each(&mut visit);
        }
    }

    /// A line for each span and each segment. Printing them allocates nothing, and no lock is held while the text is
    /// written.
    pub fn map(&self) -> impl fmt::Display {
        Map(self)
    }

    /// Checks every invariant. It holds the lock meanwhile: for tests, and for a kernel that suspects damage.
    ///
    /// # Errors
    ///
    /// The first that is broken.
    pub fn verify(&self) -> Result<(), ArenaBroken> {
        verify::verify(&self.state.lock(), self.quantum)
    }

    /// Gives up all spans and the memory of the tags: the arena is then as new, with all counts at 0.
    ///
    /// # Errors
    ///
    /// [`Busy`](ArenaError::Busy) where segments are allocated.
    pub fn destroy(&mut self) -> Result<(), ArenaError> {
        self.empty_magazines();
        let segments = self.state.lock().counts.allocated;
        if segments > 0 {
            return Err(ArenaError::Busy { segments });
        }
        self.release_pages();
        Ok(())
    }

    fn empty_magazines(&mut self) {
        let mut caches = core::mem::replace(&mut self.quantum_caches, QuantumCaches::new(0));
        caches.tear_down(self.pages.caches(), self.quantum, |start, size| _ = self.release(start, size));
        self.quantum_caches.enable(caches.enabled());
    }

    /// Makes the state as new, and gives the pages of its tags back.
    fn release_pages(&mut self) {
        let mut tags = core::mem::replace(&mut *self.state.lock(), State::new()).tags;
        while let Some(page) = tags.shrink() {
            self.pages.put(page);
        }
    }

    /// The state, with at least `count` tags at hand if there is memory for them.
    ///
    /// Whoever needs fewer can go on without, so this is no error.
    fn lock_with_tags(&self, count: u32) -> IrqGuard<'_, P, State> {
        loop {
            let state = self.state.lock();
            if state.tags.spare() >= count {
                return state;
            }
            drop(state);
            let Some(page) = self.pages.get() else { return self.state.lock() };
            let refused = self.state.lock().tags.grow(page);
            if let Err(page) = refused {
                self.pages.put(page);
                return self.state.lock();
            }
        }
    }

    /// `size` rounded up to the quantum.
    fn round(&self, size: u64) -> Result<u64, ArenaError> {
        if !self.quantum.is_power_of_two() {
            return Err(ArenaError::BadQuantum);
        }
        size.checked_next_multiple_of(self.quantum).filter(|size| *size > 0).ok_or(ArenaError::BadSize)
    }

    fn check_span(&self, start: u64, size: u64) -> Result<(), ArenaError> {
        if !self.quantum.is_power_of_two() {
            return Err(ArenaError::BadQuantum);
        }
        let whole = start.is_multiple_of(self.quantum) && size.is_multiple_of(self.quantum);
        if whole { Ok(()) } else { Err(ArenaError::BadSpan) }
    }
}

impl<P: Platform> Drop for Arena<'_, P> {
    fn drop(&mut self) {
        self.empty_magazines();
        self.release_pages();
    }
}

impl<P: Platform> fmt::Debug for Arena<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("name", &self.name).field("quantum", &self.quantum).finish_non_exhaustive()
    }
}

struct Map<'a, 'b, P: Platform>(&'a Arena<'b, P>);

impl<P: Platform> fmt::Display for Map<'_, '_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut result = Ok(());
        self.0.walk(|segment| {
            if result.is_ok() {
                result = writeln!(f, "{segment}");
            }
        });
        result
    }
}
