//! ELF files: elf(5). Those that are as linkers make them run; those that are wrong are told, and leave nothing.

use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use kernel::processes::{Exit, LoadError, Options, Process};

use super::{program, run, succeeds, test, unchanged};

const R: u32 = 4;
const W: u32 = 2;
const X: u32 = 1;

const LOAD: u32 = 1;
const INTERPRETER: u32 = 3;
const NOTE: u32 = 4;
const GNU_STACK: u32 = 0x6474_e551;

const I386: u16 = 3;
const X86_64: u16 = 62;
const EXECUTABLE: u16 = 2;

/// A program header, and what it is about.
#[derive(Clone)]
struct Segment {
    kind: u32,
    flags: u32,
    address: u64,
    bytes: Vec<u8>,
    /// Bytes in memory, besides those in the file.
    zeroes: u64,
}

impl Segment {
    fn load(flags: u32, address: u64, bytes: &[u8]) -> Self {
        Self { kind: LOAD, flags, address, bytes: bytes.into(), zeroes: 0 }
    }
}

/// A file that is put together from what it should say.
#[derive(Clone)]
struct File {
    bits: u32,
    kind: u16,
    machine: u16,
    entry: u64,
    segments: Vec<Segment>,
}

impl File {
    /// One that is right: its code at 0x08049000 ends with status 0.
    fn good() -> Self {
        let code = Segment::load(R | X, 0x0804_9000, code_of(exits()));
        Self { bits: 32, kind: EXECUTABLE, machine: I386, entry: 0x0804_9000, segments: vec![code] }
    }

    fn good_64() -> Self {
        Self { bits: 64, machine: X86_64, ..Self::good() }
    }

    /// With one more segment to load.
    fn with(mut self, segment: Segment) -> Self {
        self.segments.push(segment);
        self
    }

    /// With one more, of that address and size.
    fn with_memory_at(self, address: u64, zeroes: u64) -> Self {
        self.with(Segment { zeroes, ..Segment::load(R | W, address, &[]) })
    }

    fn word(&self, out: &mut Vec<u8>, value: u64) {
        out.extend_from_slice(&value.to_le_bytes()[..self.bits as usize / 8]);
    }

    fn bytes(&self) -> Vec<u8> {
        let wide = self.bits == 64;
        let (header_size, entry_size) = if wide { (64_u16, 56_u16) } else { (52, 32) };
        let mut out = vec![0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1, 0];
        out.resize(16, 0);
        out.extend_from_slice(&self.kind.to_le_bytes());
        out.extend_from_slice(&self.machine.to_le_bytes());
        out.extend_from_slice(&1_u32.to_le_bytes());
        [self.entry, header_size.into(), 0].into_iter().for_each(|word| self.word(&mut out, word));
        out.extend_from_slice(&0_u32.to_le_bytes());
        for half in [header_size, entry_size, self.segments.len() as u16, 0, 0, 0] {
            out.extend_from_slice(&half.to_le_bytes());
        }
        let mut offset = u64::from(header_size) + u64::from(entry_size) * self.segments.len() as u64;
        for segment in &self.segments {
            let Segment { kind, flags, address, ref bytes, zeroes } = *segment;
            let length = bytes.len() as u64;
            out.extend_from_slice(&kind.to_le_bytes());
            if wide {
                out.extend_from_slice(&flags.to_le_bytes());
            }
            for word in [offset, address, address, length, length.wrapping_add(zeroes)] {
                self.word(&mut out, word);
            }
            if !wide {
                out.extend_from_slice(&flags.to_le_bytes());
            }
            self.word(&mut out, 4096);
            offset += length;
        }
        self.segments.iter().for_each(|segment| out.extend_from_slice(&segment.bytes));
        out
    }
}

/// The code of a program of the kernel's own, without the header.
fn code_of(elf: &'static [u8]) -> &'static [u8] {
    &elf[if elf[4] == 1 { 0x54 } else { 0x78 }..]
}

program!(exits: "exit $0");

/// Why the file cannot be started. Nothing is left of the attempt.
fn refused(elf: &[u8]) -> Option<LoadError> {
    let attempt = || match Process::start(elf, Options::default()) {
        Ok(process) => {
            process.wait();
            None
        }
        Err(error) => Some(error),
    };
    let error = attempt();
    unchanged(|| assert_eq!(attempt(), error));
    error
}

program!(as_linkers_make_it:
    // Data, what follows it, a constant: at their addresses, with what the file has there.
    "cmpl $0x11223344, 0x0804bff4", "jne 5f",
    "cmpl $0x55667788, 0x0804bff8", "jne 5f",
    "cmpl $0, 0x0804bffc", "jne 5f",
    "cmpl $0, 0x0804d000", "jne 5f",
    "movl $1, 0x0804bff4", "movl $2, 0x0804dff0",
    "cmpl $0x99aabbcc, 0x0804a010", "jne 5f",
    "brk $0", "expect $0x0804f000, 1",
    "exit $0",
    "5: exit $2");
program!(writes_to_constants: "movl $1, 0x0804a010", "exit $0");
program!(runs_data: "movl $0x0804bff4, %eax", "jmpl *%eax");

/// As GNU ld has its segments: the headers, code, constants, then data that begins in the middle of a page, each on pages of
/// its own; and headers of other kinds.
fn third_party(code: &'static [u8]) -> Vec<u8> {
    let mut constants = vec![0; 16];
    constants.extend_from_slice(&0x99aa_bbcc_u32.to_le_bytes());
    let data = [0x1122_3344_u32.to_le_bytes(), 0x5566_7788_u32.to_le_bytes()].concat();
    let other = |kind| Segment { kind, ..Segment::load(R | W, 0, &[]) };
    let data = Segment { zeroes: 0x2100, ..Segment::load(R | W, 0x0804_bff4, &data) };
    let file = File { segments: Vec::new(), ..File::good() };
    file.with(Segment::load(R, 0x0804_8000, &[7; 300]))
        .with(Segment::load(R | X, 0x0804_9000, code_of(code)))
        .with(Segment::load(R, 0x0804_a000, &constants))
        .with(data)
        .with(other(NOTE))
        .with(other(GNU_STACK))
        .bytes()
}

test!(a_program_as_linkers_make_it_runs);
fn a_program_as_linkers_make_it_runs() {
    succeeds(&third_party(as_linkers_make_it()));
    succeeds(&File::good().bytes());
    for elf in [writes_to_constants(), runs_data()] {
        let exit = run(&third_party(elf));
        assert!(matches!(exit, Exit::Killed(_)), "{exit}");
    }
}

program!(calls_its_stack: "pushl $0xc3", "calll *%esp", "exit $42");
// The flags of PT_GNU_STACK; the last one counts. Without it: `rights`.
test!(a_stack_is_executable_where_the_file_says_so);
fn a_stack_is_executable_where_the_file_says_so() {
    for (bits, machine) in [(32, I386), (64, X86_64)] {
        let code = Segment::load(R | X, 0x0804_9000, code_of(calls_its_stack()));
        let with_stack = |headers: &[u32]| {
            let stack = |&flags| Segment { kind: GNU_STACK, ..Segment::load(flags, 0, &[]) };
            let segments = headers.iter().map(stack).chain([code.clone()]).collect();
            run(&File { bits, machine, segments, ..File::good() }.bytes())
        };
        assert_eq!(with_stack(&[R | W | X]), Exit::Status(42));
        assert_eq!(with_stack(&[R | W, R | W | X]), Exit::Status(42));
        for headers in [&[R | W][..], &[R | W | X, R | W], &[]] {
            let Exit::Killed(killed) = with_stack(headers) else { panic!("{headers:?}") };
            assert!(killed.to_string().contains("not allowed in stack "), "{killed}");
        }
    }
}

program!(runs_high of 64 bits: "cmpl $0x11223344, 0x0804a000", "jne 5f", "exit $0", "5: exit $1");
test!(a_64_bit_program_may_be_anywhere_below_the_kernel);
fn a_64_bit_program_may_be_anywhere_below_the_kernel() {
    const TOP: u64 = 0x7fff_ffff_e000;
    let code = Segment::load(R | X, TOP, code_of(runs_high()));
    let data = Segment::load(R, 0x0804_a000, &0x1122_3344_u32.to_le_bytes());
    let file = File { entry: TOP, segments: vec![code, data], ..File::good_64() };
    succeeds(&file.bytes());
    assert_eq!(refused(&file.with_memory_at(TOP + 4096, 1).bytes()), Some(LoadError::BadAddress(TOP + 4096)));
}

program!(uses_zeroes:
    "movl $0x0804a000, %ecx", "movl (%ecx), %ebx", "addl $7, %ebx", "movl %ebx, (%ecx)",
    "movl $1, %eax", "int $0x80");
test!(what_is_not_loaded_need_not_be_in_the_file);
fn what_is_not_loaded_need_not_be_in_the_file() {
    const SECTIONS: [u16; 3] = [40, 30, 29];
    for (bits, machine, [offset, sections, counts]) in
        [(32, I386, [0x34 + 0x20 + 4, 0x20, 0x2e]), (64, X86_64, [0x40 + 0x38 + 8, 0x28, 0x3a])]
    {
        let code = Segment::load(R | X, 0x0804_9000, code_of(uses_zeroes()));
        let file = File { bits, machine, segments: vec![code], ..File::good() }.with_memory_at(0x0804_a000, 4);
        let mut bytes = file.bytes();
        // The offset of the segment that has nothing but zeroes: behind the end, or where no file can have it.
        for behind in [0x1_0000_u32, u32::MAX - 7] {
            bytes[offset..][..4].copy_from_slice(&behind.to_le_bytes());
            assert_eq!(run(&bytes), Exit::Status(7));
        }
        // A table of sections, which is cut off, and whose entries have no size.
        bytes[sections..][..4].copy_from_slice(&0x5000_u32.to_le_bytes());
        for size in [SECTIONS[0], 0x1234] {
            let halves = [size, SECTIONS[1], SECTIONS[2]];
            bytes[counts..][..6].copy_from_slice(&halves.map(u16::to_le_bytes).concat());
            assert_eq!(run(&bytes), Exit::Status(7));
        }
    }
}

test!(a_file_that_is_cut_off_is_refused);
fn a_file_that_is_cut_off_is_refused() {
    for whole in [File::good().bytes(), File::good_64().bytes()] {
        assert_eq!(refused(&whole[..whole.len() - 1]), Some(LoadError::Damaged));
        for length in 0..whole.len() {
            let error = Process::start(&whole[..length], Options::default()).err();
            let expected = if length < 4 { LoadError::NotElf } else { LoadError::Damaged };
            let no_headers = Some(LoadError::Empty);
            assert!(error == Some(expected) || error == no_headers && length >= 52, "{length} bytes: {error:?}");
        }
    }
}

test!(a_file_of_another_kind_is_refused);
fn a_file_of_another_kind_is_refused() {
    const ARM: u16 = 40;
    const SHARED: u16 = 3;
    let good = File::good;
    assert_eq!(refused(b"#!/bin/sh\n"), Some(LoadError::NotElf));
    assert_eq!(refused(&[]), Some(LoadError::NotElf));
    // Of one class, for a machine of the other.
    let wide = File { bits: 64, ..good() };
    assert_eq!(refused(&wide.bytes()), Some(LoadError::WrongMachine(I386)));
    let narrow = File { bits: 32, ..File::good_64() };
    assert_eq!(refused(&narrow.bytes()), Some(LoadError::WrongMachine(X86_64)));
    assert_eq!(refused(&File { machine: ARM, ..good() }.bytes()), Some(LoadError::WrongMachine(ARM)));
    for kind in [0, 1, SHARED, 4, u16::MAX] {
        assert_eq!(refused(&File { kind, ..good() }.bytes()), Some(LoadError::NotStatic));
    }
    let interpreted = good().with(Segment { kind: INTERPRETER, ..Segment::load(R, 0, b"/lib/ld.so\0") });
    assert_eq!(refused(&interpreted.bytes()), Some(LoadError::NotStatic));
    let big_endian = [&good().bytes()[..5], &[2], &good().bytes()[6..]].concat();
    assert_eq!(refused(&big_endian), Some(LoadError::Damaged));
}

test!(segments_where_none_may_be_are_refused);
fn segments_where_none_may_be_are_refused() {
    let good = File::good;
    let wide = File::good_64;
    let at = |file: File, address, size| refused(&file.with_memory_at(address, size).bytes());
    // Over another, or in its pages; over the stack.
    for (address, size) in [(0x0804_9000, 1), (0x0804_9ffc, 4), (0x0804_8000, 0x3000), (0x0804_9800, 0x1000)] {
        assert_eq!(at(good(), address, size), Some(LoadError::Overlap(address / 4096 * 4096)));
    }
    assert_eq!(at(good(), 0xbfff_d000, 4096), Some(LoadError::Overlap(0xbfff_d000)));
    // Over the kernel, on i386 and here; over the null pointer; around the end of all addresses.
    for (file, address, size) in [
        (good(), 0xc000_0000, 4096),
        (good(), 0xbfff_f000, 4097),
        (good(), 0xffff_f000, 4096),
        (good(), 0xffff_ffff, u64::from(u32::MAX)),
        (good(), 0, 4096),
        (good(), 0xf000, 4096),
        (wide(), 0xffff_ffff_8020_0000, 4096),
        (wide(), 0xffff_8000_0000_0000, 4096),
        (wide(), 0x7fff_ffff_f000, 4096),
        (wide(), 0x1_0000_0000, u64::MAX),
        (wide(), u64::MAX, 1),
        (wide(), 0x1_0000_0000, u64::MAX - 0x1_0000_0000),
    ] {
        let error = at(file, address, size);
        assert_eq!(error, Some(LoadError::BadAddress(address)), "{address:#x}, {size:#x}");
    }
    // The entry.
    for (file, entry) in [(good(), 0), (good(), 0xc000_0000), (wide(), 0xffff_ffff_8020_0000), (wide(), 1 << 63)] {
        assert_eq!(refused(&File { entry, ..file }.bytes()), Some(LoadError::BadAddress(entry)));
    }
    assert_eq!(refused(&File { segments: Vec::new(), ..good() }.bytes()), Some(LoadError::Empty));
    // More in the file than in memory.
    let short = Segment { zeroes: 8_u64.wrapping_neg(), ..Segment::load(R, 0x1000_0000, &[1; 16]) };
    assert_eq!(refused(&good().with(short).bytes()), Some(LoadError::Damaged));
}

test!(no_byte_of_a_header_does_harm);
fn no_byte_of_a_header_does_harm() {
    for whole in [File::good().bytes(), File::good_64().bytes()] {
        let headers = whole.len() - code_of(exits()).len();
        for at in 0..headers {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = whole.clone();
                changed[at] = byte;
                // It may be one that is right, or one that runs into nothing.
                if let Ok(process) = Process::start(&changed, Options::default()) {
                    process.wait();
                }
            }
        }
    }
    unchanged(|| assert_eq!(run(&File::good().bytes()), Exit::Status(0)));
}
