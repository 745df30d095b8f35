//! `mmap2` and `munmap`: mmap(2).

use alloc::vec::Vec;

use kernel::cpus;
use kernel::processes::{Cause, Exit, Kind, Options, Protection};

use super::{is_killed, program, programs, run, succeeds, test, watched};

test!(the_worked_example_of_mappings_runs);
/// *`mmap2(addr, len, prot, flags, fd, pgoff)`. The call to reproduce: `eax=192 ebx=0 ecx=4096 edx=7 esi=0x22 edi=-1
/// ebp=0; int 0x80`.*
fn the_worked_example_of_mappings_runs() {
    succeeds(programs::mmap());
}

program!(mapped_anew:
    "mmap2 $0, $1, $R+W, $PRIVATE+ANONYMOUS", "testl $4095, %eax", "jnz 5f",
    "movl %eax, %ebp", "cmpl $0, 4092(%ebp)", "jne 5f", "movl $-1, 4092(%ebp)",
    // Of two pages, where there is room, not over the first.
    "pushl %ebp", "mmap2 $0, $4097, $R+W, $SHARED+ANONYMOUS", "popl %ebp", "testl $4095, %eax", "jnz 5f",
    "cmpl $0, 8188(%eax)", "jne 5f", "movl $1, 8188(%eax)",
    "cmpl $-1, 4092(%ebp)", "jne 5f",
    // Near an address that is free, and one that is not.
    "pushl %ebp", "mmap2 $0x10000123, $4096, $R, $PRIVATE+ANONYMOUS", "expect $0x10000000, 1",
    "mmap2 $0x10000000, $4096, $R, $PRIVATE+ANONYMOUS", "cmpl $0x10000000, %eax", "je 5f", "testl $4095, %eax", "jnz 5f",
    "exit $0",
    "5: exit $9");
test!(a_new_mapping_is_of_whole_pages_of_zeroes);
/// *Returns a page-aligned address, length rounded up, contents zero.*
fn a_new_mapping_is_of_whole_pages_of_zeroes() {
    succeeds(mapped_anew());
    let (_, record) = watched(mapped_anew(), Options::default());
    let reserved = |index: usize| (record.memory[index].reserved - record.memory[0].reserved) >> 12;
    assert_eq!([1, 2].map(reserved), [1, 3]);
}

program!(writes_to_pages:
    "mmap2 $0, $256*4096, $R+W, $PRIVATE+ANONYMOUS",
    "movl %eax, %edi", "movl $256*1024, %ecx", "movl $-1, %eax", "rep stosl",
    "exit $0");
program!(looks_for_old_contents:
    "mmap2 $0, $256*4096, $R+W, $PRIVATE+ANONYMOUS",
    "movl %eax, %edi", "movl $256*1024, %ecx", "xorl %eax, %eax", "repe scasl", "jne 5f",
    "exit $0",
    "5: exit $1");
test!(no_program_sees_what_another_has_left_in_its_frames);
fn no_program_sees_what_another_has_left_in_its_frames() {
    for eager in [false, true] {
        assert_eq!(run(writes_to_pages()), Exit::Status(0));
        let options = Options { eager, ..Options::default() };
        assert_eq!(super::start(looks_for_old_contents(), options).wait(), Exit::Status(0));
    }
}

program!(wrong_mappings:
    "mmap2 $0, $0, $R, $PRIVATE+ANONYMOUS", "expect $EINVAL, 1",
    // Just one of the two.
    "mmap2 $0, $4096, $R, $ANONYMOUS", "expect $EINVAL, 2",
    "mmap2 $0, $4096, $R, $SHARED+PRIVATE+ANONYMOUS", "expect $EINVAL, 3",
    // Of a file: there are none.
    "mmap2 $0, $4096, $R, $PRIVATE, $3", "expect $EBADF, 4",
    // Lengths and offsets that do not fit.
    "mmap2 $0, $0xffffffff, $R, $PRIVATE+ANONYMOUS", "expect $ENOMEM, 5",
    "mmap2 $0, $0xfffff001, $R, $PRIVATE+ANONYMOUS", "expect $ENOMEM, 6",
    "mmap2 $0, $0xc0000000, $R, $PRIVATE+ANONYMOUS", "expect $ENOMEM, 7",
    "mmap2 $0, $0xb8000000, $R, $PRIVATE+ANONYMOUS", "expect $ENOMEM, 8",
    "mmap2 $0, $4096, $R, $PRIVATE+ANONYMOUS, $-1, $0xffffffff", "expect $EOVERFLOW, 9",
    "mmap2 $0x10000000, $0xfffff000, $R, $PRIVATE+ANONYMOUS+FIXED", "expect $ENOMEM, 10",
    "mmap2 $0xbffff000, $8192, $R, $PRIVATE+ANONYMOUS+FIXED", "expect $ENOMEM, 11",
    "mmap2 $0xfffff000, $4096, $R, $PRIVATE+ANONYMOUS+FIXED", "expect $ENOMEM, 12",
    // Not of a page; and the null pointer stays one.
    "mmap2 $0x10000001, $4096, $R, $PRIVATE+ANONYMOUS+FIXED", "expect $EINVAL, 13",
    "mmap2 $0x10000800, $4096, $R, $PRIVATE+ANONYMOUS+NOREPLACE", "expect $EINVAL, 14",
    "mmap2 $0, $4096, $R, $PRIVATE+ANONYMOUS+FIXED", "expect $EPERM, 15",
    "munmap $0x10000001, $4096", "expect $EINVAL, 16",
    "munmap $0x10000000, $0", "expect $EINVAL, 17",
    "munmap $0x10000000, $0xffffffff", "expect $EINVAL, 18",
    "munmap $0xfffff000, $4096", "expect $EINVAL, 19",
    "munmap $0x10000000, $0xb0001000", "expect $EINVAL, 20",
    "exit $0");
test!(mappings_that_make_no_sense_are_refused);
/// *Offset in 4096-byte units. Anonymous requires exactly one of MAP_PRIVATE / MAP_SHARED. `len == 0`: EINVAL; raw
/// errors are -1..-4095. MAP_FIXED: unaligned is EINVAL. `munmap`: unaligned address or len 0: EINVAL.*
fn mappings_that_make_no_sense_are_refused() {
    succeeds(wrong_mappings());
    let (_, record) = watched(wrong_mappings(), Options::default());
    assert!(record.memory.iter().all(|memory| *memory == record.memory[0]));
    assert!(record.calls.iter().rev().skip(1).all(|called| (-4095..=-1).contains(&called.result)));
}

program!(fills_addresses:
    "xorl %ebp, %ebp",
    "1: pushl %ebp", "mmap2 $0, $0x4000000, $0, $PRIVATE+ANONYMOUS", "popl %ebp", "incl %ebp",
    "testl $4095, %eax", "jz 1b",
    "expect $ENOMEM, 1",
    // Of 48 times 64 MiB, and a little less.
    "cmpl $45, %ebp", "jb 5f", "cmpl $49, %ebp", "jae 5f",
    "exit $0",
    "5: exit $2");
test!(where_there_are_no_addresses_there_is_no_mapping);
/// *No space: ENOMEM.*
fn where_there_are_no_addresses_there_is_no_mapping() {
    succeeds(fills_addresses());
}

program!(replaces:
    "mmap2 $0x10000000, $4*4096, $R+W, $PRIVATE+ANONYMOUS+FIXED", "expect $0x10000000, 1",
    "movl $1, 0x10000000", "movl $2, 0x10001000", "movl $3, 0x10002000", "movl $4, 0x10003000",
    // Over two of its pages, and beyond it.
    "mmap2 $0x10001000, $2*4096, $R+W, $PRIVATE+ANONYMOUS+FIXED", "expect $0x10001000, 2",
    "cmpl $1, 0x10000000", "jne 5f", "cmpl $0, 0x10001000", "jne 5f",
    "cmpl $0, 0x10002000", "jne 5f", "cmpl $4, 0x10003000", "jne 5f",
    "mmap2 $0x10003000, $2*4096, $R+W, $PRIVATE+ANONYMOUS+NOREPLACE", "expect $EEXIST, 3",
    "cmpl $4, 0x10003000", "jne 5f",
    "mmap2 $0x10004000, $4096, $R, $PRIVATE+ANONYMOUS+NOREPLACE", "expect $0x10004000, 4",
    "exit $0",
    "5: exit $9");
test!(a_fixed_mapping_takes_the_place_of_others);
/// *MAP_FIXED replaces overlaps. MAP_FIXED_NOREPLACE: EEXIST.*
fn a_fixed_mapping_takes_the_place_of_others() {
    succeeds(replaces());
}

program!(writes_only: "mmap2 $0, $4096, $W, $PRIVATE+ANONYMOUS", "movl $1, (%eax)", "movl (%eax), %eax", "exit $0");
program!(executes_only: "mmap2 $0, $4096, $X, $PRIVATE+ANONYMOUS", "movl (%eax), %ecx", "movl $1, (%eax)", "exit $0");
program!(writes_to_reserved: "mmap2 $0, $4096, $0, $PRIVATE+ANONYMOUS", "movl $1, (%eax)", "exit $0");
program!(jumps_to_reserved: "mmap2 $0, $4096, $0, $PRIVATE+ANONYMOUS", "jmpl *%eax");
program!(writes_to_used:
    // A page that has its frame already.
    "mmap2 $0, $4096, $R, $PRIVATE+ANONYMOUS", "movl (%eax), %ecx", "movl (%eax), %ecx", "movl $1, (%eax)", "exit $0");
program!(executes_used:
    "mmap2 $0, $4096, $R+W, $PRIVATE+ANONYMOUS", "movb $0xc3, (%eax)", "calll *%eax", "exit $0");

test!(what_the_protection_does_not_allow_ends_the_program);
/// *PROT_NONE reserves, and access faults. A missing WRITE or EXEC must fault (NX).*
fn what_the_protection_does_not_allow_ends_the_program() {
    succeeds(writes_only());
    for (elf, wanted, protection) in [
        (programs::read_reserved(), Protection::READ, Protection::NONE),
        (writes_to_reserved(), Protection::WRITE, Protection::NONE),
        (jumps_to_reserved(), Protection::EXECUTE, Protection::NONE),
        (programs::write_to_read_only(), Protection::WRITE, Protection::READ),
        (writes_to_used(), Protection::WRITE, Protection::READ),
        (executes_only(), Protection::WRITE, Protection::EXECUTE),
        (programs::execute_data(), Protection::EXECUTE, Protection::DATA),
        (executes_used(), Protection::EXECUTE, Protection::DATA),
    ] {
        let killed = is_killed(elf);
        let Cause::BadAccess { access, address, mapping: Some(mapping) } = killed.cause else { panic!("{killed}") };
        assert_eq!((access, mapping.protection, mapping.kind), (wanted, protection, Kind::Anonymous), "{killed}");
        assert_eq!((address, mapping.end), (mapping.start, mapping.start + 4096));
        let code = killed.code.expect("it runs where something is mapped");
        let expected = if access == Protection::EXECUTE { Kind::Anonymous } else { Kind::Segment };
        assert_eq!(code.kind, expected);
        // The report says what, where, and in which mapping.
        let report = alloc::format!("{killed}");
        let expected = alloc::format!("{address:#010x}, not allowed in {mapping}; rip {:#010x} in ", killed.rip);
        assert!(report.contains(&expected), "{report}");
    }
}

program!(unmaps_parts:
    "mmap2 $0x10000000, $6*4096, $R+W, $PRIVATE+ANONYMOUS+FIXED",
    "movl $1, 0x10000000", "movl $2, 0x10001000", "movl $3, 0x10002000", "movl $4, 0x10003000", "movl $5, 0x10004000",
    "munmap $0x10002000, $4096", "expect $0, 1",
    "munmap $0x10002000, $4096", "expect $0, 2",
    "munmap $0x10000000, $1", "expect $0, 3",
    "munmap $0x10004000, $0x10000", "expect $0, 4",
    "cmpl $2, 0x10001000", "jne 5f", "cmpl $4, 0x10003000", "jne 5f",
    "munmap $0x20000000, $0x90000000", "expect $0, 5",
    "exit $0",
    "5: exit $9");
test!(a_mapping_that_is_unmapped_in_part_is_split);
/// *`munmap(addr, len)`: 0 on success; unmapped ranges succeed; a partial unmap splits the mapping.*
fn a_mapping_that_is_unmapped_in_part_is_split() {
    // The last takes the stack with it, which is not used by then.
    succeeds(unmaps_parts());
    let (_, record) = watched(unmaps_parts(), Options::default());
    let (first, memory) = (record.memory[0], &record.memory[1..]);
    let counts: Vec<_> = memory.iter().map(|memory| memory.mappings - first.mappings).collect();
    assert_eq!(counts[..5], [1, 2, 2, 2, 2]);
    let pages = |bytes: fn(&kernel::processes::Memory) -> u64| -> Vec<_> {
        memory.iter().map(|memory| (bytes(memory) - bytes(&first)) >> 12).collect()
    };
    assert_eq!(pages(|memory| memory.reserved)[..5], [6, 5, 5, 4, 2]);
    assert_eq!(pages(|memory| memory.resident)[..5], [0, 4, 4, 3, 2]);
}

program!(reads_after_unmap:
    "mmap2 $0x10000000, $3*4096, $R+W, $PRIVATE+ANONYMOUS+FIXED",
    "movl $1, 0x10000000", "movl $2, 0x10001000", "movl $3, 0x10002000",
    "munmap $0x10001000, $4096",
    "movl 0x10000000, %eax", "movl 0x10002000, %eax",
    "movl 0x10001004, %eax",
    "exit $0");
program!(unmaps_its_code:
    "munmap $0x08048000, $4096",
    "exit $0");
// What is unmapped cannot be reached any more, nor through what the CPU has kept.
test!(memory_that_was_unmapped_is_gone);
fn memory_that_was_unmapped_is_gone() {
    let killed = is_killed(reads_after_unmap());
    let gone = |access, address| Cause::BadAccess { access, address, mapping: None };
    assert_eq!(killed.cause, gone(Protection::READ, 0x1000_1004));
    let killed = is_killed(unmaps_its_code());
    assert_eq!((killed.cause, killed.code), (gone(Protection::EXECUTE, killed.rip), None));
}

program!(maps_and_unmaps:
    "mmap2 $0, $64*4096, $R+W, $PRIVATE+ANONYMOUS",
    "movl %eax, %ebp", "movl $64, %ecx",
    "1: movl %ecx, (%eax)", "addl $4096, %eax", "decl %ecx", "jnz 1b",
    "munmap %ebp, $64*4096",
    "exit $0");
test!(the_frames_of_what_is_unmapped_are_free);
/// *Frames return to the page-frame allocator.*
fn the_frames_of_what_is_unmapped_are_free() {
    let (exit, record) = watched(maps_and_unmaps(), Options::default());
    assert_eq!(exit, Exit::Status(0));
    assert_eq!(record.free[2], record.free[1]);
    assert_eq!(record.memory[2], record.memory[0]);
}

test!(what_is_unmapped_every_cpu_forgets);
/// *Every CPU's TLB is shot down.*
fn what_is_unmapped_every_cpu_forgets() {
    let others = || (0..cpus::count()).filter(|&cpu| cpu != cpus::current());
    let before: Vec<_> = others().map(cpus::flushes).collect();
    let (exit, _) = watched(maps_and_unmaps(), Options::default());
    assert_eq!(exit, Exit::Status(0));
    let during: Vec<_> = others().map(cpus::flushes).collect();
    // One flush for the unmapping, one at the end of the process.
    assert!(before.iter().zip(&during).all(|(before, during)| during - before >= 2), "{before:?} {during:?}");
}
