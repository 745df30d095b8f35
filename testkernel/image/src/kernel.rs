//! The kernel's ELF file as it goes into an image.

use anyhow::{Context, Result, ensure};
use object::{
    build::elf::{Builder, SectionData},
    elf::EM_X86_64,
};

/// Where the boot loader looks for its configuration.
const CONFIG_SECTION: &[u8] = b".bootloader-config";

/// The kernel without symbols and debug information: a BIOS needs about half a second in an emulator to read a megabyte,
/// and the boot loader keeps the whole file in memory.
pub(crate) fn strip(elf: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(elf).context("it is not a readable ELF file; is it the kernel?")?;
    ensure!(
        builder.header.e_machine == EM_X86_64,
        "it is not for x86_64; build the kernel with --target x86_64-unknown-none"
    );
    ensure!(
        builder.sections.iter().any(|section| &*section.name == CONFIG_SECTION),
        "it has no section .bootloader-config, so no disk can boot it; is it the kernel?"
    );

    for section in &mut builder.sections {
        section.delete = !section.is_alloc() && !matches!(section.data, SectionData::SectionString);
    }
    for symbol in &mut builder.symbols {
        symbol.delete = true;
    }
    let mut out = Vec::new();
    builder.write(&mut out).context("it cannot be stripped")?;
    Ok(out)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use object::{
        Endianness,
        elf::{EM_AARCH64, Machine, PF_R, PF_X, SHF_ALLOC, SHT_PROGBITS, SHT_STRTAB, SectionFlags},
    };

    /// What the loaded sections hold.
    pub(crate) const CODE: &[u8] = b"what the boot loader loads";
    /// What the section of debug information holds.
    pub(crate) const DEBUG_INFO: &[u8] = b"what a debugger reads";

    /// A kernel that only serves to be put into images.
    pub(crate) fn elf() -> Vec<u8> {
        build(EM_X86_64, &[".text", ".bootloader-config"])
    }

    fn build(machine: Machine, loaded: &[&'static str]) -> Vec<u8> {
        let mut builder = Builder::new(Endianness::Little, true);
        builder.header.e_machine = machine;
        builder.header.e_phoff = 64;
        let segment = builder.segments.add_load_segment(PF_R | PF_X, 0x1000);
        segment.p_offset = 0x1000;
        for name in loaded {
            let section = builder.sections.add();
            section.name = (*name).into();
            section.sh_type = SHT_PROGBITS;
            section.sh_flags = SHF_ALLOC;
            section.sh_addralign = 16;
            section.sh_size = CODE.len() as u64;
            section.data = SectionData::Data(CODE.into());
            segment.append_section(section);
        }
        for (name, sh_type, data) in [
            (".debug_info", SHT_PROGBITS, SectionData::Data(DEBUG_INFO.into())),
            (".shstrtab", SHT_STRTAB, SectionData::SectionString),
        ] {
            let section = builder.sections.add();
            section.name = name.into();
            section.sh_type = sh_type;
            section.sh_flags = SectionFlags(0);
            section.sh_addralign = 1;
            section.data = data;
        }
        let mut out = Vec::new();
        builder.write(&mut out).unwrap();
        out
    }

    #[test]
    fn what_is_loaded_stays_where_it_was_and_the_rest_goes() {
        let elf = elf();
        let stripped = strip(&elf).unwrap();
        let names = |elf: &[u8]| -> Vec<_> {
            Builder::read(elf).unwrap().sections.iter().map(|section| section.name.to_string()).collect()
        };
        assert_eq!(names(&elf), [".text", ".bootloader-config", ".debug_info", ".shstrtab"]);
        assert_eq!(names(&stripped), [".text", ".bootloader-config", ".shstrtab"]);
        let loaded = 0x1000..0x1000 + 2 * CODE.len();
        assert_eq!(elf[loaded.clone()], stripped[loaded]);
        let segments = 64..64 + 56;
        assert_eq!(elf[segments.clone()], stripped[segments]);
    }

    #[test]
    fn what_no_disk_can_boot_is_refused() {
        for (elf, reason) in [
            (b"#!/bin/sh".to_vec(), "ELF"),
            (elf()[..200].to_vec(), "ELF"),
            (build(EM_AARCH64, &[".text", ".bootloader-config"]), "x86_64"),
            (build(EM_X86_64, &[".text"]), ".bootloader-config"),
        ] {
            let message = format!("{:#}", strip(&elf).unwrap_err());
            assert!(message.contains(reason), "{message}");
        }
    }
}
