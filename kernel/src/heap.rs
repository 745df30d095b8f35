//! The kernel's heap.

use crate::cpus::Cpus;
use bootloader_api::BootInfo;
use kslab::Heap;
use kslab::memory::Region;

use crate::stop::stop;
use crate::{cmdline, memory};

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
    if let Some(Err(error)) = cmdline::value("kslab.check").map(|rules| HEAP.set_checks(rules)) {
        stop(format_args!("kslab.check: {error}"), |_| Ok(()));
    }
}
