//! The kernel's heap.

use crate::cpus::Cpus;
use bootloader_api::BootInfo;
use kslab::Heap;
use kslab::memory::Region;

use crate::memory;
use crate::stop::stop;

/// What `Box`, `Vec` and their like allocate from; its page frames serve page tables too.
#[cfg_attr(target_os = "none", global_allocator)]
pub static HEAP: Heap<Cpus> = Heap::new();

/// Gives the heap all usable memory of the machine; stops the kernel if that cannot be.
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
}
