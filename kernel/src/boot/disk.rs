//! The way in from a BIOS or UEFI disk image: the `bootloader` crate loads the kernel and calls [`start_from_disk`].
//!
//! Such an image has no command line, so that comes from QEMU's fw_cfg device.

use core::arch::naked_asm;

use bootloader_api::config::{Mapping, Mappings};
use bootloader_api::{BootInfo, BootloaderConfig};
use qemu_fw_cfg::FwCfg;
use spin::Once;

use super::{BOOT_STACK_SIZE, STACK};
use crate::memory;
use crate::stop::stop;

/// The fw_cfg file that holds the command line.
pub const COMMAND_LINE_FILE: &str = "opt/kslab/cmdline";

/// Bytes that a command line may have.
const MAX_LINE: usize = 4096;

const CONFIG: BootloaderConfig = {
    let mut mappings = Mappings::new_default();
    mappings.physical_memory = Some(Mapping::FixedAddress(memory::PHYSICAL_MEMORY));
    mappings.ramdisk_memory = Mapping::FixedAddress(memory::RAMDISK);
    let mut config = BootloaderConfig::new_default();
    config.mappings = mappings;
    // Left for our own before the first call.
    config.kernel_stack_size = 4096;
    config
};

/// Where the loader looks for its configuration.
#[used]
#[cfg_attr(target_os = "none", unsafe(link_section = ".bootloader-config"))]
static SERIALIZED_CONFIG: [u8; BootloaderConfig::SERIALIZED_LEN] = CONFIG.serialize();

/// The entry point of the ELF file: changes to the boot stack, where [`bootloader_api::entry_point!`] would stay on the
/// loader's.
///
/// # Safety
///
/// Only for the loader to call, with the address of its [`BootInfo`] in RDI.
#[unsafe(naked)]
#[cfg_attr(target_os = "none", unsafe(export_name = "_start"))]
pub unsafe extern "sysv64" fn start_from_disk() -> ! {
    naked_asm!(
        "lea rsp, [rip + {stack} + {top}]",
        "xor ebp, ebp",
        "call {next}",
        "ud2",
        stack = sym STACK,
        top = const crate::stack::GUARD + BOOT_STACK_SIZE,
        next = sym on_boot_stack,
    )
}

unsafe extern "sysv64" fn on_boot_stack(boot_info: &'static mut BootInfo) -> ! {
    super::start();
    // SAFETY: the loader calls us once, with interrupts off and physical memory mapped as the configuration asks; its
    // memory map says which memory is unused.
    unsafe { super::enter(boot_info, command_line()) }
}

/// The command line from fw_cfg; empty on a machine that has none.
fn command_line() -> &'static [u8] {
    static LINE: Once<[u8; MAX_LINE]> = Once::new();

    // SAFETY: reads ports that belong to this device or to none, and nothing else in the kernel uses it.
    let Ok(mut fw_cfg) = (unsafe { FwCfg::new_for_x86() }) else {
        return &[];
    };
    let Some(file) = fw_cfg.find_file(COMMAND_LINE_FILE) else {
        return &[];
    };
    if file.size() > MAX_LINE {
        stop(format_args!("{COMMAND_LINE_FILE} has {} bytes, more than {MAX_LINE}", file.size()), |_| Ok(()));
    }
    let line = LINE.call_once(|| {
        let mut line = [0; MAX_LINE];
        fw_cfg.read_file_to_buffer(&file, &mut line);
        line
    });
    &line[..file.size()]
}
