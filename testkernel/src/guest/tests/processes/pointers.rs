//! Pointers that programs pass to calls: no such pointer makes the kernel fault, or read what is not the program's.

use kernel::processes::{Exit, Options};

use super::{program, succeeds, test, watched};

program!(bad_pointers:
    "write $1, $0, $1", "expect $EFAULT, 1",
    "write $1, $0x20000000, $1", "expect $EFAULT, 2",
    // Where the kernel is on i386, and the end of all 32-bit addresses.
    "write $1, $0xc0000000, $1", "expect $EFAULT, 3",
    "write $1, $0xfffff000, $4096", "expect $EFAULT, 4",
    "write $1, $0xffffffff, $2", "expect $EFAULT, 5",
    // Over an end: of the program's segment, of the stack, into and out of what is mapped.
    "write $1, $0x08048fff, $2", "expect $EFAULT, 6",
    "write $1, $0xbfffeffc, $5", "expect $EFAULT, 7",
    "write $1, $0xbf7fefff, $2", "expect $EFAULT, 8",
    "write $1, $0x08047fff, $2", "expect $EFAULT, 9",
    // Lengths beyond all that there is.
    "write $1, $0x08048000, $0xffffffff", "expect $EFAULT, 10",
    "write $1, $0x08048000, $0x80000000", "expect $EFAULT, 11",
    "exit $0");
test!(a_pointer_that_is_not_the_programs_is_an_error);
fn a_pointer_that_is_not_the_programs_is_an_error() {
    succeeds(bad_pointers());
    let (exit, record) = watched(bad_pointers(), Options::default());
    assert_eq!((exit, record.text.len()), (Exit::Status(0), 0));
}

program!(gaps:
    "mmap2 $0x10000000, $3*4096, $R+W, $PRIVATE+ANONYMOUS+FIXED",
    "movl $0x41414141, 0x10000ffc", "movl $0x42424242, 0x10001000", "movl $0x43434343, 0x10002000",
    // Two mappings side by side are as one; a page without rights, or without a mapping, is a gap.
    "mmap2 $0x10001000, $4096, $R, $PRIVATE+ANONYMOUS+FIXED",
    "write $1, $0x10000ffc, $4100", "expect $4100, 1",
    "mmap2 $0x10001000, $4096, $0, $PRIVATE+ANONYMOUS+FIXED",
    "write $1, $0x10000ffc, $5", "expect $EFAULT, 2",
    "write $1, $0x10000ffc, $4104", "expect $EFAULT, 3",
    "munmap $0x10001000, $4096",
    "write $1, $0x10000ffc, $4104", "expect $EFAULT, 4",
    "write $1, $0x10001fff, $2", "expect $EFAULT, 5",
    // The ends themselves.
    "write $1, $0x10000ffc, $4", "expect $4, 6",
    "write $1, $0x10002000, $4", "expect $4, 7",
    "write $1, $0xbfffeff8, $8", "expect $8, 8",
    // May be written, and so read.
    "mmap2 $0x10001000, $4096, $W, $PRIVATE+ANONYMOUS+FIXED",
    "write $1, $0x10001000, $1", "expect $1, 9",
    "exit $0");
test!(a_text_is_written_whole_or_not_at_all);
fn a_text_is_written_whole_or_not_at_all() {
    succeeds(gaps());
    let (exit, record) = watched(gaps(), Options::default());
    assert_eq!(exit, Exit::Status(0));
    let (first, rest) = record.text.split_at(4100);
    assert!(first[..4] == *b"AAAA" && first[4..].iter().all(|&byte| byte == 0));
    assert_eq!(rest, b"AAAACCCCprogram\0\0");
}

program!(pointers_of_64_bits of 64 bits:
    // Only the lower halves count: this is the header of the file, and that is nothing.
    "movq $0xffffffff08048001, %rcx", "movl $3, %edx", "movl $1, %ebx", "movl $4, %eax", "int $0x80",
    "expect $3, 1",
    "movq $0xffffffff80200000, %rcx", "movl $3, %edx", "movl $1, %ebx", "movl $4, %eax", "int $0x80",
    "cmpq $EFAULT, %rax", "jne 5f",
    "exit $0",
    "5: exit $2");
test!(a_64_bit_program_passes_32_bits_of_a_pointer);
fn a_64_bit_program_passes_32_bits_of_a_pointer() {
    let (exit, record) = watched(pointers_of_64_bits(), Options::default());
    assert_eq!((exit, &record.text[..]), (Exit::Status(0), &b"ELF"[..]));
}
