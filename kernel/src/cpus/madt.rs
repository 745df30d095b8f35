//! The CPUs that firmware lists: the ACPI table MADT.

use core::ptr::NonNull;

use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiError, AcpiHandler, AcpiTables, PhysicalMapping};
use bootloader_api::BootInfo;

use crate::memory;

/// A CPU that may be started.
const ENABLED: u32 = 1;

/// Finds tables where all physical memory is mapped.
#[derive(Debug, Clone, Copy)]
struct Mapped;

impl AcpiHandler for Mapped {
    unsafe fn map_physical_region<T>(&self, address: usize, size: usize) -> PhysicalMapping<Self, T> {
        let start = memory::physical(address as u64).cast();
        // SAFETY: all physical memory is mapped there for ever, and no such address is 0.
        unsafe { PhysicalMapping::new(address, NonNull::new_unchecked(start), size, size, *self) }
    }

    fn unmap_physical_region<T>(_: &PhysicalMapping<Self, T>) {}
}

/// Calls `visit` with the APIC id of each CPU that firmware says can be used, this one included.
pub(super) fn for_each_cpu(boot_info: &BootInfo, mut visit: impl FnMut(u32)) -> Result<(), AcpiError> {
    let rsdp = boot_info.rsdp_addr.into_option().ok_or(AcpiError::NoValidRsdp)?;
    // SAFETY: the loader has found it there.
    let tables = unsafe { AcpiTables::from_rsdp(Mapped, rsdp as usize) }?;
    let madt = tables.find_table::<Madt>()?;
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
