//! Adds file and line to the calls in the kernel's reports, from the debug information of its ELF file.
//!
//! The kernel writes `  at ADDRESS FUNCTION+OFFSET` for an address to return to, and `  in` for an instruction.

use std::{fs, ops::Range, path::Path};

use addr2line::{
    Context,
    gimli::{Dwarf, EndianSlice, LittleEndian as Little},
};
use anyhow::Result;
use object::{LittleEndian, Object, ObjectSection, SectionKind, read::elf::ElfFile64};

use super::kernel_build;

/// Adds to each line that names a place in the kernel at `elf` where in the sources that is. Where nothing is known about it, the
/// line stays as it is.
pub fn add(elf: &Path, lines: &mut [String]) {
    if lines.iter().all(|line| address_in(line).is_none()) {
        return;
    }
    let Ok(data) = fs::read(elf) else { return };
    let Ok(kernel) = Kernel::new(&data) else { return };
    for line in lines {
        let places = address_in(line).map(|address| kernel.places(address)).unwrap_or_default();
        if let Some((first, rest)) = places.split_first() {
            let rest: String = rest.iter().map(|place| format!(", inlined at {place}")).collect();
            *line += &format!(" ({first}{rest})");
        }
    }
}

/// What is known about the code.
struct Kernel<'a> {
    sources: Context<EndianSlice<'a, Little>>,
    /// Where it is. What was left out of the file has debug information too, with addresses around 0.
    code: Vec<Range<u64>>,
}

impl<'a> Kernel<'a> {
    fn new(elf: &'a [u8]) -> Result<Self> {
        let file = ElfFile64::<LittleEndian>::parse(elf)?;
        let section = |name| file.section_by_name(name).map_or(Ok(&[][..]), |section| section.data());
        let dwarf = Dwarf::load(|id| section(id.name()).map(|data| EndianSlice::new(data, Little)))?;
        let code = file.sections().filter(|section| section.kind() == SectionKind::Text);
        let code = code.map(|section| section.address()..section.address() + section.size()).collect();
        Ok(Self { sources: Context::from_dwarf(dwarf)?, code })
    }

    /// The place in the sources, and those that it is inlined at, from the inside out.
    fn places(&self, address: u64) -> Vec<String> {
        let mut places = Vec::new();
        if !self.code.iter().any(|code| code.contains(&address)) {
            return places;
        }
        let Ok(mut frames) = self.sources.find_frames(address).skip_all_loads() else { return places };
        while let Ok(Some(frame)) = frames.next() {
            let location = frame.location.and_then(|location| Some((location.file?, location.line?)));
            places.extend(location.map(|(file, line)| format!("{}:{line}", short(file))));
        }
        places
    }
}

/// The address of an instruction of the place that `line` is about.
fn address_in(line: &str) -> Option<u64> {
    let mut words = line.split_ascii_whitespace();
    // What a call returns to may belong to the next line.
    let back = match words.next()? {
        "at" => 1,
        "in" => 0,
        _ => return None,
    };
    u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?.checked_sub(back)
}

/// The path without what depends on this machine.
fn short(path: &str) -> &str {
    let workspace = kernel_build::workspace().ok().and_then(Path::to_str);
    if let Some(own) = workspace.and_then(|root| path.strip_prefix(root)) {
        return own.trim_start_matches('/');
    }
    // /rustc/COMMIT/library/..., ~/.rustup/.../library/..., ~/.cargo/registry/src/INDEX/CRATE/...
    let library = path.find("/library/").map(|at| &path[at + 1..]).filter(|_| path.contains("rust"));
    let package = || path.split_once("/registry/src/")?.1.split_once('/').map(|(_, package)| package);
    library.or_else(package).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn lines_about_places_are_known() {
        assert_eq!(address_in("  at 0xffffffff80012345 a::b+0x1a"), Some(0xffff_ffff_8001_2344));
        assert_eq!(address_in("  in 0xffffffff80012345"), Some(0xffff_ffff_8001_2345));
        for line in ["", "at src/lib.rs:1:2", "at 0x", "at 0xg", "at 0x0", "rip 0x10", "STOP: panic: at 0x10", "at"] {
            assert_eq!(address_in(line), None, "{line}");
        }
    }

    #[test]
    fn a_place_in_this_program_gets_its_file_and_line() {
        // Debug information has addresses before the program was moved to where it runs.
        let elf = env::current_exe().unwrap();
        let data = fs::read(&elf).unwrap();
        let file = ElfFile64::<LittleEndian>::parse(&data[..]).unwrap();
        let symbols = file.symbol_map();
        let own = symbols.symbols().iter().find(|symbol| symbol.name().contains("kernel_build9workspace")).unwrap();
        let mut lines = [format!("  in {:#x} own", own.address()), "other".into(), "  at 0x1 nowhere".into()];
        add(&elf, &mut lines);
        assert!(
            lines[0].starts_with("  in 0x") && lines[0].contains(" own (testkernel/src/host/kernel_build.rs:"),
            "{lines:?}"
        );
        assert_eq!(lines[1..], ["other", "  at 0x1 nowhere"]);
    }

    #[test]
    fn without_an_elf_file_lines_stay() {
        let mut lines = ["  at 0x10 a+0x1".to_owned()];
        add(Path::new("/nowhere"), &mut lines);
        add(Path::new(file!()), &mut lines);
        assert_eq!(lines, ["  at 0x10 a+0x1"]);
    }

    #[test]
    fn paths_say_nothing_about_the_machine() {
        let own = kernel_build::workspace().unwrap().join("slab/src/lib.rs");
        for (path, shown) in [
            (own.to_str().unwrap(), "slab/src/lib.rs"),
            ("/rustc/0123abcd/library/core/src/panicking.rs", "library/core/src/panicking.rs"),
            (
                "/r/.rustup/toolchains/stable/lib/rustlib/src/rust/library/alloc/src/vec/mod.rs",
                "library/alloc/src/vec/mod.rs",
            ),
            ("/r/.cargo/registry/src/index.crates.io-1949/spin-0.12.3/src/once.rs", "spin-0.12.3/src/once.rs"),
            ("/other/library/x.c", "/other/library/x.c"),
        ] {
            assert_eq!(short(path), shown);
        }
    }
}
