//! Makes the ramdisk, the files that the kernel gets along: a tar archive with its symbol table, and a program.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use object::{
    Endianness, LittleEndian, Object, ObjectSymbol, SymbolKind,
    build::elf::{Builder, SectionData},
    elf::{EM_X86_64, SHN_ABS, SHT_STRTAB, SHT_SYMTAB},
    read::elf::ElfFile64,
};
use tempfile::NamedTempFile;

use crate::protocol::PROGRAM_FILE;

/// The file in which the kernel looks for its symbol table.
const SYMBOLS: &str = "kernel.symbols";

/// Makes the ramdisk for the kernel at `elf`, beside it. Gives its path.
pub fn make(elf: &Path) -> Result<PathBuf> {
    let path = elf.with_extension("ramdisk");
    // In one step: a machine may start from an older one now.
    let file = write(elf, &[])?;
    file.persist(&path).with_context(|| format!("cannot make the ramdisk {}", path.display()))?;
    Ok(path)
}

/// Makes a ramdisk with a program for the kernel at `elf` to run. It is gone with the value.
pub fn with_program(elf: &Path, program: &[u8]) -> Result<NamedTempFile> {
    write(elf, &[(PROGRAM_FILE, program)])
}

/// Makes the ramdisk for the kernel at `elf`, with more files in it, in a file beside it that has no name yet.
fn write(elf: &Path, files: &[(&str, &[u8])]) -> Result<NamedTempFile> {
    let kernel = fs::read(elf).with_context(|| format!("cannot read the kernel {}", elf.display()))?;
    let symbols = symbols(&kernel).with_context(|| format!("no symbols can be read from {}", elf.display()))?;
    let archive = archive(&[&[(SYMBOLS, &symbols[..])], files].concat())?;
    let write = || {
        let file = NamedTempFile::new_in(elf.parent().unwrap_or(Path::new(".")))?;
        fs::write(&file, archive)?;
        Ok::<_, anyhow::Error>(file)
    };
    write().context("cannot make the ramdisk")
}

/// An archive of files, each a name and what it holds. It depends on nothing else.
fn archive(files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o444);
        archive.append_data(&mut header, name, *content)?;
    }
    Ok(archive.into_inner()?)
}

/// An ELF file that has the functions of the symbol table of `elf` and nothing else: firmware is slow to read a large one.
fn symbols(elf: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::new(Endianness::Little, true);
    builder.header.e_machine = EM_X86_64;
    for (name, sh_type, data) in [
        (".symtab", SHT_SYMTAB, SectionData::Symbol),
        (".strtab", SHT_STRTAB, SectionData::String),
        (".shstrtab", SHT_STRTAB, SectionData::SectionString),
    ] {
        let section = builder.sections.add();
        (section.name, section.sh_type, section.data) = (name.into(), sh_type, data);
    }
    let file = ElfFile64::<LittleEndian>::parse(elf)?;
    for function in file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
        let symbol = builder.symbols.add();
        symbol.name = function.name()?.into();
        symbol.st_info = function.elf_symbol().st_info;
        symbol.st_shndx = SHN_ABS;
        (symbol.st_value, symbol.st_size) = (function.address(), function.size());
    }
    let mut out = Vec::new();
    builder.write(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use std::{env, io::Read};

    use super::*;

    #[test]
    fn an_archive_has_what_was_put_in() {
        let archive = archive(&[("one", b"1"), ("two", &[2; 600])]).unwrap();
        let mut read = Vec::new();
        for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            read.push((entry.path().unwrap().display().to_string(), content));
        }
        assert_eq!(read, [("one".to_owned(), b"1".to_vec()), ("two".to_owned(), vec![2; 600])]);
    }

    #[test]
    fn the_symbols_of_a_program_are_its_functions() {
        // This program's own.
        let elf = fs::read(env::current_exe().unwrap()).unwrap();
        let symbols = symbols(&elf).unwrap();
        let functions = |elf: &[u8]| -> Vec<_> {
            let file = ElfFile64::<LittleEndian>::parse(elf).unwrap();
            let functions = file.symbols().filter(|symbol| symbol.kind() == SymbolKind::Text);
            functions.map(|symbol| (symbol.name().unwrap().to_owned(), symbol.address(), symbol.size())).collect()
        };
        assert_eq!(functions(&symbols), functions(&elf));
        assert!(functions(&symbols).len() > 1000 && symbols.len() < elf.len() / 4);
    }

    #[test]
    fn what_is_no_kernel_is_told() {
        assert!(symbols(b"#!/bin/sh").is_err());
        let told = format!("{:#}", make(Path::new("/nowhere/kernel")).unwrap_err());
        assert!(told.starts_with("cannot read the kernel /nowhere/kernel: "), "{told}");
    }
}
