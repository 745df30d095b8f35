//! The machine: a buffer that stands for physical memory, and a thread that stands for several CPUs, one after the other.

use std::alloc::{Layout, alloc, dealloc};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use kslab::memory::{FRAME_SIZE, Region};
use kslab::platform::{IN_NMI, NO_CPU, Platform};

/// The physical address at which its memory starts.
pub(crate) const START: u64 = 64 << 20;
/// Frames that it has.
pub(crate) const FRAMES: usize = 512;
/// Bytes that it has.
pub(crate) const BYTES: usize = FRAMES * FRAME_SIZE;

/// What all memory holds before a run.
const UNUSED: u8 = 0xa5;

/// CPUs with a number.
pub(crate) const CPUS: usize = 3;

/// Of a heap whose CPUs are one thread.
pub(crate) struct Cpus;

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
    static IS_BAD: Cell<bool> = const { Cell::new(false) };
    static MACHINE: Machine = Machine::new();
}

// SAFETY: there are no interrupt handlers, and each heap is used by one thread, which changes its number between calls.
unsafe impl Platform for Cpus {
    const CPUS: usize = CPUS;

    fn current_cpu() -> usize {
        CPU.get()
    }

    fn disable_interrupts() -> bool {
        false
    }

    fn restore_interrupts(_: bool) {}
}

/// From now on the thread is one of the CPUs, one that has no number, or in an NMI.
pub(crate) fn be_cpu(choice: u8) {
    const CHOICES: [usize; CPUS + 2] = [0, 1, 2, NO_CPU, IN_NMI];
    CPU.set(CHOICES[usize::from(choice) % CHOICES.len()]);
}

pub(crate) fn in_nmi() -> bool {
    CPU.get() == IN_NMI
}

/// Runs `look` on CPU 0, where everything may be done.
pub(crate) fn on_first_cpu<R>(look: impl FnOnce() -> R) -> R {
    let cpu = CPU.replace(0);
    let result = look();
    CPU.set(cpu);
    result
}

pub(crate) type Heap = kslab::Heap<Cpus>;

/// Memory at a physical address.
pub(crate) struct Machine {
    buffer: *mut u8,
}

impl Machine {
    /// As much as any alignment that can be had.
    const LAYOUT: Layout = match Layout::from_size_align(BYTES, BYTES) {
        Ok(layout) => layout,
        Err(_) => panic!("no layout"),
    };

    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let buffer = unsafe { alloc(Self::LAYOUT) };
        assert!(!buffer.is_null());
        Self { buffer }
    }

    /// Runs `run` on CPU 0 of a machine whose memory is as always.
    pub(crate) fn with(run: impl FnOnce(&Self)) {
        CPU.set(0);
        MACHINE.with(|machine| {
            // SAFETY: no run is going on, so the memory is nobody's.
            unsafe { machine.buffer.write_bytes(UNUSED, BYTES) };
            run(machine);
        });
    }

    /// Where physical address 0 would be.
    pub(crate) fn base(&self) -> *mut u8 {
        self.buffer.wrapping_sub(START as usize)
    }

    /// The byte `offset` bytes into it.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        self.buffer.wrapping_add(offset)
    }

    /// How far into it `pointer` points; `None` where it does not.
    pub(crate) fn offset(&self, pointer: *const u8) -> Option<usize> {
        Some(pointer.addr().wrapping_sub(self.buffer.addr())).filter(|&offset| offset < BYTES)
    }

    /// The region of `count` frames from the `first`th on.
    pub(crate) fn region(first: usize, count: usize) -> Region {
        Region::usable(START + (first * FRAME_SIZE) as u64, (count * FRAME_SIZE) as u64)
    }

    /// A heap over the first `frames` frames.
    pub(crate) fn heap(&self, frames: usize) -> Heap {
        let heap = Heap::new();
        // SAFETY: the memory is nobody else's, and there for as long as the run.
        unsafe { heap.init([Self::region(0, frames.clamp(2, FRAMES))], self.base()) }.expect("memory for a heap");
        heap
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.buffer, Self::LAYOUT) };
    }
}

/// Bytes that are free when nothing is held back.
pub(crate) fn settled(heap: &Heap) -> usize {
    on_first_cpu(|| {
        // SAFETY: no other thread uses the heap.
        (0..CPUS).for_each(|cpu| unsafe { heap.retire_cpu(cpu) });
        heap.shrink();
        heap.verify().expect("a heap that is right");
        heap.available()
    })
}

/// The report that `misuse` is refused with.
pub(crate) fn report_of(misuse: impl FnOnce()) -> String {
    static HOOK: Once = Once::new();
    // libFuzzer's hook ends the process at every panic.
    HOOK.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_BAD.get() {
                hook(panic)
            }
        }));
    });
    IS_BAD.set(true);
    let stopped = catch_unwind(AssertUnwindSafe(misuse));
    IS_BAD.set(false);
    let report = stopped.expect_err("a bad free must be refused");
    report.downcast_ref::<String>().expect("a report with numbers in it").clone()
}
