//! The CPUs that firmware lists: the ACPI table MADT.

use acpi::AcpiError;
use acpi::madt::{Madt, MadtEntry};
use bootloader_api::BootInfo;

use crate::firmware;

/// A CPU that may be started.
const ENABLED: u32 = 1;

/// Calls `visit` with the APIC id of each CPU that firmware says can be used, this one included.
pub(super) fn for_each_cpu(boot_info: &BootInfo, mut visit: impl FnMut(u32)) -> Result<(), AcpiError> {
    let madt = firmware::tables(boot_info)?.find_table::<Madt>()?;
    for entry in madt.get().entries() {
        let (id, flags) = match entry {
            MadtEntry::LocalApic(entry) => (entry.apic_id.into(), entry.flags),
            MadtEntry::LocalX2Apic(entry) => (entry.x2apic_id, entry.flags),
            _ => continue,
        };
        if flags & ENABLED != 0 {
            visit(id);
        }
    }
    Ok(())
}
