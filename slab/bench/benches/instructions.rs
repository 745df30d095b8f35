//! How many instructions an allocation and its free take, and how many bytes an object, without checks and with each.
//!
//! `cargo bench --manifest-path slab/bench/Cargo.toml --bench instructions`. It runs itself under `valgrind`, which counts;
//! the numbers are the same at each run of one build.

use std::alloc::{GlobalAlloc, Layout};
use std::env;
use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::ptr::NonNull;

use kslab::check::GuardPages;
use kslab::memory::FRAME_SIZE;
use kslab::platform::Platform;
use kslab::{Frame, Heap};
use kslab_bench::callgrind;

/// A machine with one CPU and no interrupts: what is counted is the allocator's own.
struct OneCpu;

// SAFETY: there are no interrupt handlers, and one thread.
unsafe impl Platform for OneCpu {
    fn disable_interrupts() -> bool {
        false
    }

    fn restore_interrupts(_: bool) {}
}

static HEAP: Heap<OneCpu> = Heap::new();

/// Memory that is there all the time: what mapping costs is not counted.
struct Mapped(NonNull<u8>);

const GUARDED: usize = 24 << 20;

// SAFETY: it is only given away.
unsafe impl Sync for Mapped {}

// SAFETY: the memory is nobody else's, and stays.
unsafe impl GuardPages for Mapped {
    fn addresses(&self) -> (NonNull<u8>, usize) {
        (self.0, GUARDED)
    }

    fn map(&self, _: NonNull<u8>, _: Frame, _: usize) -> bool {
        true
    }

    fn unmap(&self, _: NonNull<u8>, _: usize) -> bool {
        true
    }
}

const MEMORY: usize = 64 << 20;
/// Pairs of the shorter of two runs, in which everything is made that is made once; and of both, the difference.
const FIRST: usize = 2_000;
const MORE: usize = 10_000;
/// Objects at once, where they are freed in the order of their allocation.
const AT_ONCE: usize = 5;
/// Objects whose bytes are counted.
const OBJECTS: usize = 1_000;

/// What is measured.
struct Workload {
    name: &'static str,
    size: usize,
    /// Freed in the order of their allocation; else each at once.
    in_order: bool,
    /// As [`Heap::set_checks`] takes them.
    checks: &'static str,
    /// The compiler knows the layout.
    known: bool,
}

const fn workload(name: &'static str, size: usize, in_order: bool, checks: &'static str) -> Workload {
    Workload { name, size, in_order, checks, known: false }
}

const WORKLOADS: [Workload; 16] = [
    workload("none: the loop alone", 0, false, ""),
    Workload { known: true, ..workload("64 bytes, known to the compiler", 64, false, "") },
    workload("64 bytes", 64, false, ""),
    workload("64 bytes, in order", 64, true, ""),
    workload("1024 bytes", 1024, false, ""),
    workload("1024 bytes, in order", 1024, true, ""),
    workload("64 bytes, redzone", 64, false, "*:redzone"),
    workload("64 bytes, poison", 64, false, "*:poison"),
    workload("64 bytes, audit", 64, false, "*:audit"),
    workload("64 bytes, quarantine", 64, false, "*:quarantine"),
    workload("64 bytes, random", 64, false, "*:random"),
    workload("64 bytes, guard", 64, false, "*:guard"),
    workload("64 bytes, zero", 64, false, "*:zero"),
    workload("64 bytes, zerofree", 64, false, "*:zerofree"),
    workload("64 bytes, all", 64, false, "*:all"),
    workload("1024 bytes, all", 1024, false, "*:all"),
];

/// Which workload a child runs, and how many pairs.
const CHILD: &str = "KSLAB_INSTRUCTIONS";

fn run(workload: &Workload, pairs: usize) {
    let layout = black_box(layout(workload));
    if workload.size == 0 {
        return (0..pairs).for_each(|pair| _ = black_box((black_box(layout), black_box(pair), black_box(layout))));
    }
    if workload.known {
        const KNOWN: Layout = Layout::new::<[u64; 8]>();
        for _ in 0..pairs {
            // SAFETY: the layout is not empty, and the block freed once.
            unsafe { HEAP.dealloc(black_box(HEAP.alloc(KNOWN)), KNOWN) };
        }
        return;
    }
    let allocate = || {
        // SAFETY: the layout is not empty.
        let block = black_box(unsafe { HEAP.alloc(black_box(layout)) });
        assert!(!block.is_null(), "memory");
        block
    };
    // SAFETY: each is allocated below with this layout, and freed once.
    let free = |block| unsafe { HEAP.dealloc(black_box(block), black_box(layout)) };
    if workload.in_order {
        for _ in 0..pairs / AT_ONCE {
            let blocks: [_; AT_ONCE] = std::array::from_fn(|_| allocate());
            blocks.into_iter().for_each(free);
        }
    } else {
        (0..pairs).for_each(|_| free(allocate()));
    }
}

fn layout(workload: &Workload) -> Layout {
    Layout::from_size_align(workload.size, 8).expect("a layout")
}

fn set_up(workload: &Workload) {
    let memory = vec![0_u64; MEMORY / 8].leak();
    // SAFETY: the memory is the heap's alone from now on.
    unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), MEMORY) }.expect("memory for a heap");
    if workload.checks.contains("guard") {
        let memory = vec![0_u8; GUARDED + FRAME_SIZE].leak().as_mut_ptr();
        let start = NonNull::new(memory.wrapping_add(memory.align_offset(FRAME_SIZE))).expect("memory");
        assert!(HEAP.set_guard(Box::leak(Box::new(Mapped(start)))));
    }
    HEAP.set_checks(workload.checks).expect("checks");
}

/// Bytes that each of many objects takes, without what only waits.
fn bytes_an_object(workload: &Workload) -> usize {
    if workload.size == 0 {
        return 0;
    }
    set_up(workload);
    let before = HEAP.used();
    let objects = (0..OBJECTS).filter(|_| HEAP.allocate(layout(workload)).is_some()).count();
    (HEAP.used() - before) / objects
}

/// Instructions that the program executed whose child runs so many pairs.
fn count(index: usize, pairs: usize) -> anyhow::Result<usize> {
    let mut program = Command::new(env::current_exe()?);
    program.env(CHILD, format!("{index} {pairs}"));
    Ok(callgrind::count(&program)?.instructions)
}

fn main() -> ExitCode {
    if let Ok(child) = env::var(CHILD) {
        let numbers: Vec<usize> = child.split(' ').filter_map(|number| number.parse().ok()).collect();
        let workload = &WORKLOADS[numbers[0]];
        if numbers[1] == 0 {
            println!("{}", bytes_an_object(workload));
        } else {
            set_up(workload);
            run(workload, numbers[1]);
        }
        return ExitCode::SUCCESS;
    }
    println!("| an allocation and its free | instructions | bytes an object |\n|---|---|---|");
    for (index, workload) in WORKLOADS.iter().enumerate() {
        let (first, all) = match (count(index, FIRST), count(index, FIRST + MORE)) {
            (Ok(first), Ok(all)) => (first, all),
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("error: {error:#}");
                return ExitCode::FAILURE;
            }
        };
        let this = env::current_exe().map(Command::new).expect("this program");
        let bytes = { this }.env(CHILD, format!("{index} 0")).output().expect("it runs again").stdout;
        println!("| {} | {} | {} |", workload.name, (all - first) / MORE, String::from_utf8_lossy(&bytes).trim());
    }
    ExitCode::SUCCESS
}
