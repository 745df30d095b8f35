//! The tables that firmware leaves in memory: ACPI.

use core::ptr::NonNull;

use acpi::{AcpiError, AcpiHandler, AcpiTables, HpetInfo, PhysicalMapping};
use bootloader_api::BootInfo;

use crate::memory;

/// Finds tables where all physical memory is mapped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapped;

impl AcpiHandler for Mapped {
    unsafe fn map_physical_region<T>(&self, address: usize, size: usize) -> PhysicalMapping<Self, T> {
        let start = memory::physical(address as u64).cast();
        // SAFETY: all physical memory is mapped there for ever, and no such address is 0.
        unsafe { PhysicalMapping::new(address, NonNull::new_unchecked(start), size, size, *self) }
    }

    fn unmap_physical_region<T>(_: &PhysicalMapping<Self, T>) {}
}

/// The tables.
pub(crate) fn tables(boot_info: &BootInfo) -> Result<AcpiTables<Mapped>, AcpiError> {
    let rsdp = boot_info.rsdp_addr.into_option().ok_or(AcpiError::NoValidRsdp)?;
    // SAFETY: the loader has found it there.
    unsafe { AcpiTables::from_rsdp(Mapped, rsdp as usize) }
}

/// The physical address of the registers of the HPET, a timer; `None` where firmware lists none.
pub fn hpet(boot_info: &BootInfo) -> Option<u64> {
    let hpet = HpetInfo::new(&tables(boot_info).ok()?).ok()?;
    Some(hpet.base_address as u64)
}
