//! What each CPU needs for itself to take traps.

use spin::Once;
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use crate::stack::Stack;

const STACK_SIZE: usize = 16 * 1024;

/// The traps that run on a stack of their own; the index is that in the task state segment.
const STACKS: [&str; 3] = ["double fault stack", "page fault stack", "non-maskable interrupt stack"];

/// Index of the stack for double faults.
pub(super) const DOUBLE_FAULT: u16 = 0;
/// Index of the stack for page faults.
pub(super) const PAGE_FAULT: u16 = 1;
/// Index of the stack for non-maskable interrupts.
pub(super) const NON_MASKABLE_INTERRUPT: u16 = 2;

/// The kernel's code segment.
pub(super) const CODE: SegmentSelector = SegmentSelector::new(1, PrivilegeLevel::Ring0);
const DATA: SegmentSelector = SegmentSelector::new(2, PrivilegeLevel::Ring0);
const TASK_STATE: SegmentSelector = SegmentSelector::new(3, PrivilegeLevel::Ring0);

/// Segments and stacks of one CPU.
#[derive(Debug)]
pub(super) struct Cpu {
    stacks: [Stack<STACK_SIZE>; STACKS.len()],
    task_state: Once<TaskStateSegment>,
    segments: Once<GlobalDescriptorTable>,
}

impl Cpu {
    /// A CPU that is not set up.
    pub(super) const fn new() -> Self {
        Self { stacks: [const { Stack::new() }; _], task_state: Once::new(), segments: Once::new() }
    }

    /// Sets up the CPU that this runs on, which must be the only one to use `self`.
    pub(super) fn load(&'static self) {
        let task_state = self.task_state.call_once(|| {
            let mut task_state = TaskStateSegment::new();
            // Packed, so that an iterator over references cannot be had.
            for (index, stack) in self.stacks.iter().enumerate() {
                task_state.interrupt_stack_table[index] = stack.top();
            }
            task_state
        });
        let segments = self.segments.call_once(|| {
            let mut segments = GlobalDescriptorTable::new();
            segments.append(Descriptor::kernel_code_segment());
            segments.append(Descriptor::kernel_data_segment());
            segments.append(Descriptor::tss_segment(task_state));
            segments
        });
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

    /// The name of each stack and the start of its guard page.
    pub(super) fn guards(&'static self) -> impl Iterator<Item = (&'static str, VirtAddr)> {
        STACKS.into_iter().zip(self.stacks.iter().map(Stack::guard))
    }
}
