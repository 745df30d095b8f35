//! The kernel's heap.

use alloc::vec::Vec;
use core::fmt::{self, Write};
use core::ops::Range;

use bootloader_api::BootInfo;
use kslab::Heap;
use kslab::fault::{OnFault, Report};
use kslab::memory::{FRAME_SIZE, Region};
use x86_64::VirtAddr;

use crate::cpus::Cpus;
use crate::memory::GuardedObjects;
use crate::serial::Port;
use crate::stop::stop;
use crate::{backtrace, cmdline, image, memory};

/// What `Box`, `Vec` and their like allocate from; its page frames serve page tables too.
#[cfg_attr(target_os = "none", global_allocator)]
pub static HEAP: Heap<Cpus> = Heap::new();

/// Gives the heap all usable memory of the machine, and has it check what the command line says by the word
/// `kslab.check=RULES`: see [`Heap::set_checks`]. Stops the kernel if that cannot be.
///
/// # Safety
///
/// All memory that the map of `boot_info` calls usable must be unused, and mapped as [`memory::physical`] has it.
pub(crate) unsafe fn init(boot_info: &BootInfo) {
    let regions = boot_info.memory_regions.iter().copied().map(Region::from);
    // SAFETY: the caller gives the memory away, and has it mapped at this pointer.
    if let Err(error) = unsafe { HEAP.init(regions, memory::physical(0)) } {
        stop(format_args!("no heap: {error}"), |_| Ok(()));
    }
    HEAP.set_backtrace(Some(backtrace::fill_from_outside_the_allocator));
    HEAP.set_fault_handler(Some(on_fault));
    HEAP.set_guard(&GuardedObjects);
    if let Some(Err(error)) = cmdline::value("kslab.check").map(|rules| HEAP.set_checks(rules)) {
        stop(format_args!("kslab.check: {error}"), |_| Ok(()));
    }
}

/// Stops the kernel with the report, and with the names of the functions that called the allocator before.
pub fn on_fault(report: &Report) -> OnFault {
    stop(format_args!("panic: {report}"), |port| write_calls(port, report))
}

/// Where this CPU has pointers outside the heap: its variables, and the stack in use from here up. For
/// [`Heap::find_leaks`].
pub fn roots() -> Vec<Range<*const u8>> {
    let here = 0_u8;
    let stack = VirtAddr::from_ptr(&raw const here);
    let data = image::data();
    let mut roots = Vec::new();
    // Static stacks are among the variables, each above an unmapped page.
    if !data.contains(&stack) {
        roots.push(stack..memory::first_unmapped_from(stack));
    }
    let mut start = data.start;
    while start < data.end {
        let end = memory::first_unmapped_from(start).min(data.end);
        let used = if (start..end).contains(&stack) { stack } else { start };
        roots.push(used..end);
        start = end + FRAME_SIZE as u64;
    }
    roots.into_iter().map(|root| root.start.as_ptr()..root.end.as_ptr()).collect()
}

/// Writes who called the allocator before.
pub(crate) fn write_calls(port: &mut Port, report: &Report) -> fmt::Result {
    for (name, event) in [("allocated", report.allocated), ("freed", report.freed)] {
        let Some(event) = event else { continue };
        writeln!(port, "{name} by:")?;
        let calls = event.addresses.into_iter().take_while(|&address| address != 0);
        calls.map(backtrace::Call).try_for_each(|call| writeln!(port, "  at {call}"))?;
    }
    Ok(())
}
