//! A machine for tests on the host: a buffer that stands for physical memory.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;

use proptest::test_runner::{Config as ProptestConfig, RngSeed};

use crate::memory::{FRAME_SIZE, Region};
use crate::platform::{NoInterrupts, Platform};

/// A heap without anything per CPU.
pub(crate) type Heap = crate::Heap<NoInterrupts>;

/// Threads of a test as CPUs: 0 to 3, or any other number for one that has nothing of its own.
#[derive(Debug)]
pub(crate) struct Threads;

std::thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// From now on this thread is that CPU. A test is CPU 0 at first; each thread that it starts must take another number.
pub(crate) fn be_cpu(number: usize) {
    CPU.set(number);
}

// SAFETY: there are no interrupt handlers, and the threads that use one heap have different numbers.
unsafe impl Platform for Threads {
    const CPUS: usize = 4;

    fn current_cpu() -> usize {
        CPU.get()
    }

    fn disable_interrupts() -> bool {
        false
    }

    fn restore_interrupts(_: bool) {}
}

/// As much as any alignment that a test asks for.
const ALIGN: usize = 4 << 20;

/// Memory at a physical address of choice. It must outlive every heap over it.
#[derive(Debug)]
pub(crate) struct Machine {
    start: u64,
    buffer: *mut u8,
    layout: Layout,
}

impl Machine {
    /// `frames` page frames from the physical address `start`, a multiple of 4 MiB.
    pub(crate) fn new(start: u64, frames: usize) -> Self {
        assert!(start.is_multiple_of(ALIGN as u64));
        let layout = Layout::from_size_align(frames * FRAME_SIZE, ALIGN).unwrap();
        // SAFETY: the layout is not empty.
        let buffer = unsafe { alloc(layout) };
        assert!(!buffer.is_null());
        Self { start, buffer, layout }
    }

    /// Where physical address 0 would be.
    pub(crate) fn base(&self) -> *mut u8 {
        self.buffer.wrapping_sub(self.start as usize)
    }

    /// The byte `offset` bytes into it.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.layout.size());
        self.buffer.wrapping_add(offset)
    }

    /// All of it, usable.
    pub(crate) fn region(&self) -> Region {
        Region::usable(self.start, self.layout.size() as u64)
    }

    /// The region of `frames` frames from the `first`th on.
    pub(crate) fn usable(&self, first: usize, frames: usize) -> Region {
        assert!((first + frames) * FRAME_SIZE <= self.layout.size());
        Region::usable(self.start + (first * FRAME_SIZE) as u64, (frames * FRAME_SIZE) as u64)
    }

    /// A heap over all of it.
    pub(crate) fn heap(&self) -> Heap {
        self.heap_on()
    }

    /// The same, for CPUs.
    pub(crate) fn heap_on<P: Platform>(&self) -> crate::Heap<P> {
        let heap = crate::Heap::new();
        // SAFETY: the memory is this machine's, which the test keeps longer than the heap.
        unsafe { heap.init([self.region()], self.base()) }.unwrap();
        heap
    }
}

// SAFETY: it only knows where the memory is.
unsafe impl Send for Machine {}
// SAFETY: as above.
unsafe impl Sync for Machine {}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.buffer, self.layout) };
    }
}

/// So many cases of a property; under Miri, where each takes seconds, a few that are the same every time.
pub(crate) fn cases(cases: u32, under_miri: u32) -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    if cfg!(miri) { ProptestConfig { cases: under_miri, rng_seed: RngSeed::Fixed(1), ..config } } else { config }
}

/// The first line of the report that `misuse` must stop with.
pub(crate) fn report_of(misuse: impl FnOnce()) -> String {
    let mut report = full_report_of(misuse);
    report.truncate(report.find('\n').unwrap_or(report.len()));
    report
}

/// The report that `misuse` must stop with. Its kind is that which goes with its text.
pub(crate) fn full_report_of(misuse: impl FnOnce()) -> String {
    let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(misuse));
    let report = stopped.expect_err("must be refused");
    let report = report.downcast_ref::<String>().expect("a formatted report").clone();
    check_kind(&report);
    report
}

/// How the texts of faults start, and the kinds that go with them.
const KINDS: [(&str, &str); 12] = [
    ("double free: ", "DUPFREE"),
    ("not the start of an allocation", "BADBASE"),
    ("not memory of this allocator", "BADADDR"),
    ("wrong layout: ", "BADSIZE"),
    ("wrong size: ", "BADSIZE"),
    ("wrong cache: ", "BADCACHE"),
    ("written to outside the object", "REDZONE"),
    ("written to after it was freed", "MODIFIED"),
    ("not given back as its constructor left it", "BADSTATE"),
    ("what is known of its allocation was overwritten", "BADBUFTAG"),
    ("not a free object, but in a magazine", "BADBUFCTL"),
    ("the allocator's own data was overwritten", "BADBUFCTL"),
];

/// Checks that the second line of a report says the kind that goes with the first. What locks report has none.
#[track_caller]
pub(crate) fn check_kind(report: &str) {
    let report = report.strip_prefix("kslab: ").filter(|report| !report.starts_with("lock"));
    let Some((report, (_, text))) = report.and_then(|report| Some((report, report.split_once(": ")?))) else { return };
    let (_, kind) = KINDS.iter().find(|(start, _)| text.starts_with(start)).expect("a text that is known");
    let second = report.lines().nth(1).expect("a second line");
    assert_eq!(second.trim_start().strip_prefix("kind: "), Some(*kind), "{report}");
}
