//! Names of functions, from the symbol table of the kernel's ELF file, which is in the [ramdisk].
//!
//! There is no lock and no allocation, and no table, however damaged, stops the kernel: this serves reports that end it.

use core::fmt::{self, Write};

use elf::ElfBytes;
use elf::abi::STT_FUNC;
use elf::endian::LittleEndian;
use elf::string_table::StringTable;
use elf::symbol::SymbolTable;

use crate::ramdisk;

/// The file of the ramdisk that holds an ELF file with the kernel's symbol table. Nothing else of it is read.
pub const FILE: &str = "kernel.symbols";

/// Where a name is cut, in bytes.
const MAX_NAME: usize = 240;

/// A place in a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// As the ELF file has it.
    pub mangled: &'a str,
    /// Bytes from the function's first instruction to the place.
    pub offset: u64,
}

/// A table of the functions in an ELF file.
#[derive(Debug)]
pub struct Table<'a> {
    symbols: SymbolTable<'a, LittleEndian>,
    names: StringTable<'a>,
}

/// The function that `address` is in. `None` where it is in none, or there is no table.
pub fn find(address: u64) -> Option<Symbol<'static>> {
    Table::new(ramdisk::file(FILE)?)?.find(address)
}

impl<'a> Table<'a> {
    /// The table of the ELF file `elf`, if that is one and has one.
    pub fn new(elf: &'a [u8]) -> Option<Self> {
        let (symbols, names) = ElfBytes::<LittleEndian>::minimal_parse(elf).ok()?.symbol_table().ok()??;
        Some(Self { symbols, names })
    }

    /// The function that `address` is in.
    pub fn find(&self, address: u64) -> Option<Symbol<'a>> {
        let offset = |start: u64, size: u64| address.checked_sub(start).filter(|&offset| offset < size);
        let functions = self.symbols.iter().filter(|symbol| symbol.st_symtype() == STT_FUNC);
        let mut found = functions.filter_map(|symbol| Some((offset(symbol.st_value, symbol.st_size)?, symbol.st_name)));
        let (offset, name) = found.next()?;
        Some(Symbol { mangled: self.names.get(name as usize).ok()?, offset })
    }
}

impl Symbol<'_> {
    /// The function's path, without the compiler's hash, cut where it is very long.
    pub fn name(&self) -> impl fmt::Display + use<'_> {
        fmt::from_fn(|f| {
            let mut out = Cut { out: f, left: MAX_NAME };
            match write!(out, "{:#}", rustc_demangle::demangle(self.mangled)) {
                Err(_) if out.left == 0 => f.write_str("..."),
                result => result,
            }
        })
    }
}

impl fmt::Display for Symbol<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.name(), self.offset)
    }
}

/// Passes on so many bytes, and fails at the first character that does not fit.
struct Cut<'a, 'b> {
    out: &'a mut fmt::Formatter<'b>,
    left: usize,
}

impl Write for Cut<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() <= self.left {
            self.left -= text.len();
            return self.out.write_str(text);
        }
        let end = text.floor_char_boundary(self.left);
        self.left = 0;
        self.out.write_str(&text[..end])?;
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: usize = 64;
    const SYMBOLS: [(&str, u8, u64, u64); 4] = [
        ("data", 1, 0x1000, 0x1000),
        ("_ZN4heap4Heap4free17h0123456789abcdefE", STT_FUNC, 0x1000, 0x20),
        ("start", STT_FUNC, 0x1020, 0x10),
        ("no_size", STT_FUNC, 0x2000, 0),
    ];

    /// An ELF file with a symbol table: header, three section headers, symbols, their names.
    fn file() -> Vec<u8> {
        let (mut names, mut symbols) = (vec![0], vec![0; 24]);
        for (name, kind, value, size) in SYMBOLS {
            symbols.extend((names.len() as u32).to_le_bytes());
            symbols.extend([kind, 0, 1, 0]);
            symbols.extend([value, size].map(u64::to_le_bytes).concat());
            names.extend(name.bytes().chain([0]));
        }
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
        file.extend(1_u32.to_le_bytes());
        file.extend([0, 0, HEADER as u64].map(u64::to_le_bytes).concat());
        file.extend(0_u32.to_le_bytes());
        file.extend([HEADER as u16, 0, 0, HEADER as u16, 3, 0].map(u16::to_le_bytes).concat());
        let start = HEADER * 4;
        let sections = [(0, 0, 0, 0), (2, start, symbols.len(), 2), (3, start + symbols.len(), names.len(), 0)];
        for (kind, offset, size, link) in sections {
            file.extend([0_u32, kind].map(u32::to_le_bytes).concat());
            file.extend([0, 0, offset as u64, size as u64].map(u64::to_le_bytes).concat());
            file.extend([link as u32, 1].map(u32::to_le_bytes).concat());
            file.extend([8_u64, 24].map(u64::to_le_bytes).concat());
        }
        [file, symbols, names].concat()
    }

    fn describe(address: u64) -> String {
        let file = file();
        Table::new(&file).unwrap().find(address).map_or("none".into(), |symbol| symbol.to_string())
    }

    #[test]
    fn an_address_belongs_to_the_function_around_it() {
        assert_eq!(describe(0x1000), "heap::Heap::free+0x0");
        assert_eq!(describe(0x101f), "heap::Heap::free+0x1f");
        assert_eq!(describe(0x1020), "start+0x0");
        for address in [0, 0xfff, 0x1030, 0x2000, u64::MAX] {
            assert_eq!(describe(address), "none", "{address:#x}");
        }
        assert_eq!(find(0x1000), None, "there is no ramdisk");
    }

    #[test]
    fn a_long_name_is_cut() {
        let shown = |name: &str| Symbol { mangled: name, offset: 0 }.name().to_string();
        assert_eq!(shown(&"x".repeat(MAX_NAME)), "x".repeat(MAX_NAME));
        assert_eq!(shown(&"x".repeat(MAX_NAME + 1)), "x".repeat(MAX_NAME) + "...");
        assert_eq!(shown(&"é".repeat(MAX_NAME)), "é".repeat(MAX_NAME / 2) + "...");
        // In the newer scheme a short name can stand for a very long one.
        let mut name = "_RIC1aj".to_owned();
        name.extend(["B3_"; 4]);
        assert!(shown(&(name + "E")).len() <= MAX_NAME + 3);
    }

    #[test]
    fn a_damaged_table_names_something_or_nothing() {
        let whole = file();
        let look = |file: &[u8]| {
            let table = Table::new(file)?;
            (0x0fff..0x1031).for_each(|address| _ = table.find(address).map(|symbol| symbol.to_string()));
            Some(())
        };
        assert_eq!(look(&whole), Some(()));
        for length in 0..whole.len() {
            assert_eq!(look(&whole[..length]), None, "cut to {length} bytes");
        }
        for at in 0..whole.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                look(&damaged);
            }
        }
    }
}
