//! The break: brk(2).

use alloc::vec::Vec;

use kernel::processes::{Call, Exit, Options};

use super::super::support::frames;
use super::{program, programs, run, succeeds, test, unchanged, watched};

program!(break_returns:
    "brk $0", "movl %eax, %ebp",
    "brk $0", "expect %ebp, 1",
    "leal 100(%ebp), %edi", "brk %edi", "expect %edi, 2",
    "brk $0", "expect %edi, 3",
    // Below the start: what stays is the current one.
    "leal -1(%ebp), %esi", "brk %esi", "expect %edi, 4",
    "brk $1", "expect %edi, 5",
    // Above all that a program can have.
    "brk $0xffffffff", "expect %edi, 6",
    "brk $0xc0000001", "expect %edi, 7",
    "brk $0", "expect %edi, 8",
    "movl $1, 99(%ebp)",
    "exit $0");
test!(the_call_returns_the_break_that_is_in_force);
/// *Raw `brk(addr)`: success returns the new break; failure returns the current break, unchanged. `brk(0)` queries.
/// Below the start: failure, nothing changed.*
fn the_call_returns_the_break_that_is_in_force() {
    succeeds(break_returns());
}

program!(break_wrappers:
    "jmp 1f",
    // What they have returned is ECX, and errno is ESI from then on.
    "2: cmpl %ecx, %eax", "jne 5f", "cmpl %esi, (%ebp)", "jne 5f", "movl $0x55, (%ebp)", "ret",
    "5: exit %edi",
    "1: pushl $0x55", "movl %esp, %ebp",
    "libc_sbrk $0", "pushl %eax",
    // It succeeds, and errno is as it was.
    "movl $0x55, %esi",
    "movl $1, %edi", "libc_sbrk $4096", "movl -4(%ebp), %ecx", "calll 2b",
    "movl $2, %edi", "libc_sbrk $0", "movl -4(%ebp), %ecx", "addl $4096, %ecx", "calll 2b",
    "movl $3, %edi", "libc_sbrk $-4096", "movl -4(%ebp), %ecx", "addl $4096, %ecx", "calll 2b",
    "movl $4, %edi", "libc_sbrk $0", "movl -4(%ebp), %ecx", "calll 2b",
    "movl $5, %edi", "libc_brk -4(%ebp)", "xorl %ecx, %ecx", "calll 2b",
    // It fails: above what a program can have, in the stack, below the start, and beyond 32 bits.
    "movl $12, %esi",
    "movl $6, %edi", "libc_brk $0xd0000000", "movl $-1, %ecx", "calll 2b",
    "movl $7, %edi", "libc_brk %esp", "movl $-1, %ecx", "calll 2b",
    "movl $8, %edi", "libc_sbrk $-4096", "movl $-1, %ecx", "calll 2b",
    "movl $9, %edi", "libc_sbrk $0x80000000", "movl $-1, %ecx", "calll 2b",
    "movl $10, %edi", "libc_brk $4096", "movl $-1, %ecx", "calll 2b",
    // Nothing has changed.
    "movl $0x55, %esi", "movl $11, %edi", "libc_sbrk $0", "movl -4(%ebp), %ecx", "calll 2b",
    "exit $0");
test!(brk_and_sbrk_of_a_library_come_of_it);
/// *Wrapper: 0, or -1 with ENOMEM. `sbrk(n)` returns the previous break, or -1 with ENOMEM; `sbrk(0)` queries.*
fn brk_and_sbrk_of_a_library_come_of_it() {
    succeeds(break_wrappers());
}

program!(breaks_high:
    "pushl $0x55", "movl %esp, %ebp",
    "libc_brk $0xa0000000", "expect $0, 1", "cmpl $0x55, (%ebp)", "jne 5f",
    // Above what a program can have; then the sum is a break that could be, but for the carry.
    "libc_sbrk $0x30000000", "expect $-1, 2", "cmpl $12, (%ebp)", "jne 5f", "movl $0x55, (%ebp)",
    "libc_sbrk $0x70000000", "expect $-1, 3", "cmpl $12, (%ebp)", "jne 5f",
    "libc_sbrk $0", "expect $0xa0000000, 4",
    "exit $0",
    "5: exit $5");
test!(sbrk_beyond_the_end_of_addresses_fails);
fn sbrk_beyond_the_end_of_addresses_fails() {
    assert_eq!(run(breaks_high()), Exit::Status(0));
}

program!(break_in_bytes:
    "brk $0", "movl %eax, %ebp",
    "leal 5(%ebp), %edi", "brk %edi", "expect %edi, 1",
    "movl $-1, (%ebp)", "movl $-1, 4000(%ebp)",
    // Smaller by some bytes: those that stay are kept, those that come back are zero.
    "leal 2(%ebp), %edi", "brk %edi", "expect %edi, 2",
    "leal 9000(%ebp), %edi", "brk %edi", "expect %edi, 3",
    "cmpw $-1, (%ebp)", "jne 5f",
    "cmpw $0, 2(%ebp)", "jne 5f",
    "cmpl $0, 4000(%ebp)", "jne 5f",
    "cmpl $0, 8996(%ebp)", "jne 5f",
    "movl $-1, 8191(%ebp)",
    // A page less, and again.
    "leal 4097(%ebp), %edi", "brk %edi", "expect %edi, 4",
    "leal 12288(%ebp), %edi", "brk %edi", "expect %edi, 5",
    "cmpl $0, 8188(%ebp)", "jne 5f",
    "cmpl $0, 8192(%ebp)", "jne 5f",
    "exit $0",
    "5: exit $9");
test!(the_break_counts_bytes_and_what_has_grown_is_zero);
/// *The break is byte-granular. Grown memory reads as zero.*
fn the_break_counts_bytes_and_what_has_grown_is_zero() {
    succeeds(break_in_bytes());
}

program!(break_frees_pages:
    "brk $0", "movl %eax, %ebp",
    "leal 10*4096(%ebp), %edi", "brk %edi",
    "movl $10, %ecx", "movl %ebp, %eax",
    "1: movl %ecx, (%eax)", "addl $4096, %eax", "decl %ecx", "jnz 1b",
    "leal 4*4096+1(%ebp), %edi", "brk %edi",
    "leal 4*4096(%ebp), %edi", "brk %edi",
    "brk %ebp",
    "exit $0");
test!(a_break_that_shrinks_frees_whole_pages_and_the_reset_all);
/// *Its backing is page-granular. Shrinking frees whole pages; resetting to the initial break restores the free-frame
/// count exactly.*
fn a_break_that_shrinks_frees_whole_pages_and_the_reset_all() {
    let (exit, record) = watched(break_frees_pages(), Options::default());
    assert_eq!(exit, Exit::Status(0));
    let resident = |index: usize| (record.memory[index].resident - record.memory[1].resident) >> 12;
    let reserved = |index: usize| (record.memory[index].reserved - record.memory[1].reserved) >> 12;
    // After: the query, +10 pages (none used yet), 4 pages and a byte, 4 pages, the reset.
    assert_eq!([1, 2, 3, 4, 5].map(reserved), [0, 10, 5, 4, 0]);
    assert_eq!([1, 2, 3, 4, 5].map(resident), [0, 0, 5, 4, 0]);
    assert_eq!(record.free[5], record.free[1], "frames are missing: one is 4096");
    assert_eq!(record.free[4], record.free[3] + 4096);
}

program!(break_collides:
    "brk $0", "movl %eax, %ebp",
    "leal 4096(%ebp), %edi", "brk %edi", "expect %edi, 1",
    "movl $7, (%ebp)",
    "pushl %ebp", "leal 3*4096(%ebp), %eax",
    "mmap2 %eax, $4096, $R+W, $PRIVATE+ANONYMOUS+FIXED", "popl %ebp",
    "leal 3*4096(%ebp), %esi", "expect %esi, 2", "movl $8, (%esi)",
    "leal 4096(%ebp), %edi",
    "leal 3*4096+1(%ebp), %esi", "brk %esi", "expect %edi, 3",
    "leal 20*4096(%ebp), %esi", "brk %esi", "expect %edi, 4",
    "leal 3*4096(%ebp), %esi", "brk %esi", "expect %esi, 5",
    "cmpl $7, (%ebp)", "jne 5f",
    "cmpl $8, 3*4096(%ebp)", "jne 5f",
    // Into the stack.
    "brk $0xbffff000", "expect %esi, 6",
    "movl %ebp, %edi", "leal 3*4096(%ebp), %eax", "munmap %eax, $4096", "expect $0, 7",
    "leal 4*4096(%edi), %esi", "brk %esi", "expect %esi, 8",
    "cmpl $0, 3*4096(%edi)", "jne 5f",
    "exit $0",
    "5: exit $9");
test!(a_break_that_meets_a_mapping_stays);
/// *Colliding with another mapping: failure, nothing changed.*
fn a_break_that_meets_a_mapping_stays() {
    succeeds(break_collides());
}

program!(break_to_limit:
    "brk $0", "movl %eax, %ebp",
    "leal 16*4096(%ebp), %edi", "brk %edi", "expect %edi, 1",
    "leal 16*4096+1(%ebp), %esi", "brk %esi", "expect %edi, 2",
    "mmap2 $0, $4096, $R, $PRIVATE+ANONYMOUS", "expect $ENOMEM, 3",
    "brk $0", "movl %eax, %ebp", "subl $4096, %ebp", "brk %ebp",
    "mmap2 $0, $4096, $R, $PRIVATE+ANONYMOUS", "testl $4095, %eax", "jnz 5f",
    "exit $0",
    "5: exit $4");
test!(a_break_above_the_limit_stays);
/// *Above the limit: failure, nothing changed.*
fn a_break_above_the_limit_stays() {
    // What the program starts with, and 16 pages.
    let (_, record) = watched(break_to_limit(), Options::default());
    let limit = record.memory[0].reserved + 16 * 4096;
    for eager in [false, true] {
        let (exit, _) = watched(break_to_limit(), Options { limit, eager, ..Options::default() });
        assert_eq!(exit, Exit::Status(0));
    }
}

test!(the_worked_example_of_the_break_runs);
/// *Query the break, grow by 8 bytes, grow by another 67,108,864 bytes, reset, exit with status 0. The kernel reports
/// resident and reserved memory at each step; after the reset it is back where it started.*
fn the_worked_example_of_the_break_runs() {
    const LARGE: u64 = 64 << 20;
    for eager in [false, true] {
        let run = || watched(programs::brk(), Options { eager, ..Options::default() });
        let (exit, record) = run();
        if eager && frames().free_bytes() < LARGE as usize + (16 << 20) {
            // A small machine: the call that should have grown it so far has failed.
            assert_eq!(exit, Exit::Status(2));
            continue;
        }
        assert_eq!(exit, Exit::Status(0));
        let is_break = |call: &Call| matches!(call, Call::Brk { .. });
        let steps = record.calls.iter().zip(&record.memory[1..]).filter(|(called, _)| is_break(&called.call));
        let [query, small, large, reset] = steps.map(|(_, memory)| *memory).collect::<Vec<_>>()[..] else {
            panic!("it calls brk four times");
        };
        assert_eq!(small.program_break, query.program_break + 8);
        assert_eq!(large.program_break, query.program_break + 8 + LARGE);
        assert_eq!(small.reserved, query.reserved + 4096);
        assert_eq!(large.reserved, query.reserved + 4096 + LARGE);
        if eager {
            let grown =
                [small, large].map(|memory| (memory.resident - query.resident, memory.reserved - query.reserved));
            assert!(grown.iter().all(|(resident, reserved)| resident == reserved), "{grown:?}");
        } else {
            // The page of the 8 bytes, which were written to by then.
            assert_eq!((large.resident, small.resident), (query.resident + 4096, query.resident));
        }
        assert_eq!(reset, query, "it is back where it started");
        unchanged(run);
    }
}
