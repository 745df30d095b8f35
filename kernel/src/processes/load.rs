//! Static ELF files: i386 and x86_64.
//!
//! elf(5) of the Linux manual pages has the format, the crate `elf` reads it. What a file says is checked before it is
//! believed: no file makes the kernel stop, or maps what a program may not have.

#![forbid(unsafe_code)]

use core::fmt;
use core::ops::Range;

use elf::abi::{EI_NIDENT, EM_386, EM_X86_64, ET_EXEC, PF_R, PF_W, PF_X, PT_GNU_STACK, PT_INTERP, PT_LOAD};
use elf::endian::LittleEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParseAt;
use elf::segment::{ProgramHeader, SegmentTable};

use super::errno::Errno;
use super::mappings::{Kind, Mapping, Protection};
use super::space::{self, PAGE, STACK, Space};
use crate::threads::SpawnError;
use crate::traps::{TrapFrame, USER_CODE_32, USER_CODE_64, USER_DATA};

/// Why a program was not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadError {
    /// It is no ELF file.
    NotElf,
    /// The file is cut off, or contradicts itself.
    Damaged,
    /// It is not for i386 or x86_64 (or is of the other's class); the machine's number in the file.
    WrongMachine(u16),
    /// It is not an executable that is linked statically, to fixed addresses.
    NotStatic,
    /// It has nothing to load.
    Empty,
    /// Two of its segments have a page in common: the address.
    Overlap(u64),
    /// It wants addresses that a program may not have, those of the kernel among them.
    BadAddress(u64),
    /// There is no memory for it, or it may not have so much.
    NoMemory,
    /// The CPU runs no threads, or there is none of that number.
    NoCpu,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf => f.write_str("it is not an ELF file"),
            Self::Damaged => f.write_str("the ELF file is cut off or damaged"),
            Self::WrongMachine(machine) => {
                write!(f, "it is neither a 32-bit i386 nor a 64-bit x86_64 program (machine {machine})")
            }
            Self::NotStatic => f.write_str("it is not a static executable: link it with -static and -no-pie"),
            Self::Empty => f.write_str("it has no segment to load"),
            Self::Overlap(address) => write!(f, "two segments have the page {address:#x} in common"),
            Self::BadAddress(address) => write!(f, "a program may not have the address {address:#x}"),
            Self::NoMemory => f.write_str("there is no memory for it"),
            Self::NoCpu => f.write_str("the CPU runs no threads"),
        }
    }
}

impl core::error::Error for LoadError {}

impl From<Errno> for LoadError {
    fn from(_: Errno) -> Self {
        Self::NoMemory
    }
}

impl From<SpawnError> for LoadError {
    fn from(error: SpawnError) -> Self {
        match error {
            SpawnError::NoMemory => Self::NoMemory,
            SpawnError::NoCpu => Self::NoCpu,
        }
    }
}

/// The two kinds of program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    /// i386.
    Bits32,
    /// x86_64.
    Bits64,
}

impl Width {
    /// The addresses that its segments may have.
    fn addresses(self) -> Range<u64> {
        match self {
            Self::Bits32 => space::START..space::END,
            Self::Bits64 => space::START..crate::memory::USER_END,
        }
    }
}

/// Loads the program `elf` into a new address space, with its stack. Gives the registers that it starts with.
pub(super) fn load(elf: &[u8], space: &mut Space) -> Result<TrapFrame, LoadError> {
    let (file, width) = parse(elf)?;
    // First, so that no segment lies over it.
    let stack = make_stack(space, width, file.stack_protection())?;
    let mut end = None;
    for header in file.segments() {
        let header = header?;
        let mapping = mapping_of(&header, width)?;
        if space.is_mapped(&mapping.addresses()) {
            return Err(LoadError::Overlap(mapping.start));
        }
        space.map_new(mapping)?;
        let bytes = file.bytes_of(&header).ok_or(LoadError::Damaged)?;
        // What nobody can read need not be there.
        if mapping.protection.is_readable() {
            space.write(header.p_vaddr, bytes).map_err(|_| LoadError::NoMemory)?;
        }
        // The break is one that fits in 32 bits, whatever else there is.
        let below = if mapping.end < STACK.start { mapping.end } else { space::START };
        end = end.max(Some(below));
    }
    space.start_break(end.ok_or(LoadError::Empty)?);
    match file.entry {
        entry if width.addresses().contains(&entry) => Ok(registers(width, entry, stack)),
        entry => Err(LoadError::BadAddress(entry)),
    }
}

/// A file, of which sections are not read: what a file says of them is for linkers and debuggers, and may be gone.
struct File<'a> {
    elf: &'a [u8],
    entry: u64,
    headers: SegmentTable<'a, LittleEndian>,
}

fn parse(elf: &[u8]) -> Result<(File<'_>, Width), LoadError> {
    if !elf.starts_with(b"\x7fELF") {
        return Err(LoadError::NotElf);
    }
    let (header, headers) = read_headers(elf).ok_or(LoadError::Damaged)?;
    let width = match (header.class, header.e_machine) {
        (Class::ELF32, EM_386) => Width::Bits32,
        (Class::ELF64, EM_X86_64) => Width::Bits64,
        (_, machine) => return Err(LoadError::WrongMachine(machine)),
    };
    if header.e_type != ET_EXEC || headers.iter().any(|one| one.p_type == PT_INTERP) {
        return Err(LoadError::NotStatic);
    }
    Ok((File { elf, entry: header.e_entry, headers }, width))
}

/// The header of a file, and those of its segments.
fn read_headers(elf: &[u8]) -> Option<(FileHeader<LittleEndian>, SegmentTable<'_, LittleEndian>)> {
    let (ident, tail) = elf.split_at_checked(EI_NIDENT)?;
    let header = FileHeader::parse_tail(parse_ident(ident).ok()?, tail).ok()?;
    let size = ProgramHeader::validate_entsize(header.class, header.e_phentsize.into()).ok()?;
    let table = bytes_at(elf, header.e_phoff, size as u64 * u64::from(header.e_phnum))?;
    let headers = SegmentTable::new(header.endianness, header.class, table);
    Some((header, headers))
}

/// What the file has there.
fn bytes_at(elf: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let end = offset.checked_add(length)?;
    elf.get(usize::try_from(offset).ok()?..usize::try_from(end).ok()?)
}

impl<'a> File<'a> {
    /// The segments that are loaded and not empty.
    fn segments(&self) -> impl Iterator<Item = Result<ProgramHeader, LoadError>> + use<'a> {
        let loaded = |header: &ProgramHeader| header.p_type == PT_LOAD && (header.p_memsz > 0 || header.p_filesz > 0);
        let checked =
            |header: ProgramHeader| if header.p_filesz > header.p_memsz { Err(LoadError::Damaged) } else { Ok(header) };
        self.headers.iter().filter(loaded).map(checked)
    }

    /// What may be done with the stack: executed only where the file asks for it. A file that says nothing has no such stack,
    /// other than with Linux, where i386 programs that know of no such header may execute all that they may read.
    fn stack_protection(&self) -> Protection {
        let asked = self.headers.iter().filter(|header| header.p_type == PT_GNU_STACK).last();
        match asked {
            Some(header) if header.p_flags & PF_X != 0 => Protection::DATA.with(Protection::EXECUTE),
            _ => Protection::DATA,
        }
    }

    /// What the file has for a segment: where that is nothing, its offset means nothing.
    fn bytes_of(&self, header: &ProgramHeader) -> Option<&'a [u8]> {
        if header.p_filesz == 0 { Some(&[]) } else { bytes_at(self.elf, header.p_offset, header.p_filesz) }
    }
}

fn mapping_of(header: &ProgramHeader, width: Width) -> Result<Mapping, LoadError> {
    let start = header.p_vaddr / PAGE * PAGE;
    let end = header.p_vaddr.checked_add(header.p_memsz).and_then(|end| end.checked_next_multiple_of(PAGE));
    let allowed = width.addresses();
    let end = end.filter(|&end| start >= allowed.start && end <= allowed.end);
    let end = end.ok_or(LoadError::BadAddress(header.p_vaddr))?;
    let right = |flag, right| if header.p_flags & flag == 0 { Protection::NONE } else { right };
    let protection =
        right(PF_R, Protection::READ).with(right(PF_W, Protection::WRITE)).with(right(PF_X, Protection::EXECUTE));
    Ok(Mapping { start, end, protection, kind: Kind::Segment })
}

/// Maps the stack, and puts there what the System V ABI has a program find: no arguments but a name, no environment, and
/// the size of a page among the auxiliary values. Gives the stack pointer.
fn make_stack(space: &mut Space, width: Width, protection: Protection) -> Result<u64, LoadError> {
    const NAME: &[u8] = b"program\0";
    const AT_PAGESZ: u64 = 6;
    let Range { start, end } = STACK;
    space.map_new(Mapping { start, end, protection, kind: Kind::Stack })?;
    let name = end - NAME.len() as u64;
    let words = [1, name, 0, 0, AT_PAGESZ, PAGE, 0, 0];
    let size = if width == Width::Bits32 { 4 } else { 8 };
    let top = (name - (words.len() * size) as u64) / 16 * 16;
    let mut write = |address, bytes: &[u8]| space.write(address, bytes).map_err(|_| LoadError::NoMemory);
    write(name, NAME)?;
    for (address, word) in (top..).step_by(size).zip(words) {
        write(address, &word.to_le_bytes()[..size])?;
    }
    Ok(top)
}

fn registers(width: Width, rip: u64, rsp: u64) -> TrapFrame {
    /// The bit that is always set, and interrupts.
    const FLAGS: u64 = 0x202;
    let code = if width == Width::Bits32 { USER_CODE_32 } else { USER_CODE_64 };
    TrapFrame { rip, cs: code.0.into(), rflags: FLAGS, rsp, ss: USER_DATA.0.into(), ..TrapFrame::default() }
}
