//! What each CPU needs for itself to take traps.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem;

use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::structures::gdt::{Descriptor, DescriptorFlags, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use crate::stack::Stack;

/// Bytes in each of them.
pub(crate) const STACK_SIZE: usize = 16 * 1024;

/// The traps that run on a stack of their own; the index is that in the task state segment.
pub(crate) const STACKS: [&str; 3] = ["double fault stack", "page fault stack", "non-maskable interrupt stack"];

/// Index of the stack for double faults.
pub(super) const DOUBLE_FAULT: u16 = 0;
/// Index of the stack for page faults.
pub(super) const PAGE_FAULT: u16 = 1;
/// Index of the stack for non-maskable interrupts.
pub(super) const NON_MASKABLE_INTERRUPT: u16 = 2;

/// The kernel's code segment.
pub(super) const CODE: SegmentSelector = SegmentSelector::new(1, PrivilegeLevel::Ring0);
const DATA: SegmentSelector = SegmentSelector::new(2, PrivilegeLevel::Ring0);
/// The code of a 32-bit program in ring 3.
pub(crate) const USER_CODE_32: SegmentSelector = SegmentSelector::new(3, PrivilegeLevel::Ring3);
/// What programs in ring 3 have as their data, and stack.
pub(crate) const USER_DATA: SegmentSelector = SegmentSelector::new(4, PrivilegeLevel::Ring3);
/// The code of a 64-bit program in ring 3.
pub(crate) const USER_CODE_64: SegmentSelector = SegmentSelector::new(5, PrivilegeLevel::Ring3);
const TASK_STATE: SegmentSelector = SegmentSelector::new(6, PrivilegeLevel::Ring0);

static BOOT_STACKS: [Stack<STACK_SIZE>; STACKS.len()] = [const { Stack::new() }; _];

/// The segments of one CPU.
pub(crate) struct Cpu {
    task_state: UnsafeCell<TaskStateSegment>,
    segments: UnsafeCell<GlobalDescriptorTable>,
}

// SAFETY: only the CPU that loads them uses them.
unsafe impl Sync for Cpu {}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cpu")
    }
}

impl Cpu {
    /// Where in this the CPU finds the stack for traps from ring 3.
    pub(crate) const KERNEL_STACK: usize =
        mem::offset_of!(Self, task_state) + mem::offset_of!(TaskStateSegment, privilege_stack_table);

    /// A CPU that is not set up.
    pub(crate) const fn new() -> Self {
        let (task_state, segments) = (TaskStateSegment::new(), GlobalDescriptorTable::new());
        Self { task_state: UnsafeCell::new(task_state), segments: UnsafeCell::new(segments) }
    }

    /// Sets up the boot CPU.
    ///
    /// # Safety
    ///
    /// As for [`load`](Self::load).
    pub(crate) unsafe fn load_on_boot_cpu(&'static self) {
        // SAFETY: passed on to the caller.
        unsafe { self.load(BOOT_STACKS.each_ref().map(Stack::top)) };
    }

    /// Sets up the CPU that this runs on, with the tops of its stacks in the order of [`STACKS`]. It forgets where its GS
    /// base points.
    ///
    /// # Safety
    ///
    /// No other CPU uses `self`, now or later, and this one runs it once after each reset.
    pub(crate) unsafe fn load(&'static self, stacks: [VirtAddr; STACKS.len()]) {
        let mut task_state = TaskStateSegment::new();
        // Packed, so that a slice of it cannot be had.
        for (index, stack) in stacks.into_iter().enumerate() {
            task_state.interrupt_stack_table[index] = stack;
        }
        // SAFETY: nothing refers to it yet, says the caller.
        unsafe { self.task_state.get().write(task_state) };
        let mut segments = GlobalDescriptorTable::new();
        segments.append(Descriptor::kernel_code_segment());
        segments.append(Descriptor::kernel_data_segment());
        segments.append(Descriptor::UserSegment(DescriptorFlags::USER_CODE32.bits()));
        segments.append(Descriptor::user_data_segment());
        segments.append(Descriptor::user_code_segment());
        // SAFETY: it was just written, and stays.
        segments.append(Descriptor::tss_segment(unsafe { &*self.task_state.get() }));
        // SAFETY: as above.
        let segments = unsafe {
            self.segments.get().write(segments);
            &*self.segments.get()
        };
        segments.load();
        // SAFETY: the table just loaded has its segments in the order of the selectors above, and lives for ever.
        unsafe {
            CS::set_reg(CODE);
            SS::set_reg(DATA);
            DS::set_reg(SegmentSelector::NULL);
            ES::set_reg(SegmentSelector::NULL);
            FS::set_reg(SegmentSelector::NULL);
            GS::set_reg(SegmentSelector::NULL);
            load_tss(TASK_STATE);
        }
    }
}

/// The name of each of these stacks of the boot CPU, and the start of its guard page.
pub(super) fn boot_guards() -> impl Iterator<Item = (&'static str, VirtAddr)> {
    STACKS.into_iter().zip(BOOT_STACKS.iter().map(Stack::guard))
}
