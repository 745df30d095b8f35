//! The system calls: `int 0x80` with Linux's numbers and registers for i386, as syscall(2) has them. EAX is the number and
//! then the result; EBX, ECX, EDX, ESI, EDI and EBP are the arguments. 64-bit programs use the lower halves likewise.

#![forbid(unsafe_code)]

use core::fmt;

use super::Memory;
use super::errno::Errno;
use super::mappings::Protection;
use super::space::MapRequest;
use crate::traps::TrapFrame;

/// What a program asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// exit(2), 1.
    Exit {
        /// Of which the lowest byte counts.
        status: u32,
    },
    /// write(2), 4.
    Write {
        /// 1 and 2 are open.
        descriptor: u32,
        /// Where the text is.
        address: u32,
        /// Bytes of it.
        length: u32,
    },
    /// brk(2), 45.
    Brk {
        /// The new break.
        to: u32,
    },
    /// munmap(2), 91.
    Munmap {
        /// The first address.
        address: u32,
        /// Bytes.
        length: u32,
    },
    /// mmap2(2), 192.
    Mmap2(MapRequest),
    /// Anything else, by its number.
    Unknown(u32),
}

impl Call {
    /// What these registers ask for.
    pub(super) fn of(registers: &TrapFrame) -> Self {
        let TrapFrame { rax, rbx, rcx, rdx, rsi, rdi, rbp, .. } = *registers;
        let [number, ebx, ecx, edx, esi, edi, ebp] =
            [rax, rbx, rcx, rdx, rsi, rdi, rbp].map(|register| register as u32);
        match number {
            1 => Self::Exit { status: ebx },
            4 => Self::Write { descriptor: ebx, address: ecx, length: edx },
            45 => Self::Brk { to: ebx },
            91 => Self::Munmap { address: ebx, length: ecx },
            192 => Self::Mmap2(MapRequest {
                address: ebx,
                length: ecx,
                protection: edx,
                flags: esi,
                descriptor: edi as i32,
                offset: ebp,
            }),
            number => Self::Unknown(number),
        }
    }
}

impl Call {
    /// Whether it asks for memory, gives it back, or ends with all of it.
    pub fn is_about_memory(&self) -> bool {
        matches!(self, Self::Exit { .. } | Self::Brk { .. } | Self::Munmap { .. } | Self::Mmap2(_))
    }
}

/// As a line of C, with the protection and flags by their numbers.
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit { status } => write!(f, "exit({})", status.cast_signed()),
            Self::Write { descriptor, address, length } => write!(f, "write({descriptor}, {address:#x}, {length})"),
            Self::Brk { to } => write!(f, "brk({to:#x})"),
            Self::Munmap { address, length } => write!(f, "munmap({address:#x}, {length})"),
            Self::Mmap2(MapRequest { address, length, protection, flags, descriptor, offset }) => {
                let protection = Protection::from_bits(*protection);
                write!(f, "mmap2({address:#x}, {length}, {protection}, {flags:#x}, {descriptor}, {offset})")
            }
            Self::Unknown(number) => write!(f, "system call {number}"),
        }
    }
}

/// A system call that was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Called {
    /// What was asked for.
    pub call: Call,
    /// What the program gets; of `exit` nothing.
    pub result: i64,
    /// The memory of the process then.
    pub memory: Memory,
}

impl Called {
    /// The result as a number, or the error's name.
    pub fn result(&self) -> impl fmt::Display {
        let result = self.result;
        fmt::from_fn(move |f| match Errno::from_result(result) {
            Some(errno) => write!(f, "-{errno}"),
            None => write!(f, "{result:#x}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_from_the_lower_halves_of_registers() {
        let registers = |number, ebx| TrapFrame { rax: number, rbx: ebx, ..TrapFrame::default() };
        assert_eq!(Call::of(&registers(45, 0x7_0804_a000)), Call::Brk { to: 0x0804_a000 });
        assert_eq!(Call::of(&registers(1 << 32 | 1, 7)), Call::Exit { status: 7 });
        assert_eq!(Call::of(&registers(0, 0)), Call::Unknown(0));
        let frame = TrapFrame { rcx: 4096, rdx: 7, rsi: 0x22, rdi: u64::MAX, ..registers(192, 0) };
        assert_eq!(Call::of(&frame).to_string(), "mmap2(0x0, 4096, rwx, 0x22, -1, 0)");
    }

    #[test]
    fn results_are_numbers_or_errors() {
        let memory = Memory::default();
        let shown = |result| Called { call: Call::Brk { to: 0 }, result, memory }.result().to_string();
        assert_eq!(shown(0xbfff_e000), "0xbfffe000");
        assert_eq!(shown(Errno::Enomem.result()), "-ENOMEM");
        assert_eq!(shown(-75), "-EOVERFLOW");
    }
}
