# mmap2 and munmap. The first call is the one of the note: 4096 bytes, read, write and execute, private and anonymous.

program mmap
    say "mmap: a page of all rights; code that is written there runs\n"
    movl $192, %eax
    movl $0, %ebx
    movl $4096, %ecx
    movl $7, %edx
    movl $0x22, %esi
    movl $-1, %edi
    movl $0, %ebp
    int $0x80
    testl $0xfff, %eax                  # an address of a page, not an error
    jnz 5f
    cmpl $0, (%eax)
    jne 5f
    movl %eax, %ebp
    movl $0x00002ab8, (%eax)            # movl $42, %eax
    movw $0xc300, 4(%eax)               # ret
    calll *%eax
    expect $42, 1
    munmap %ebp, $4096
    expect $0, 2

    say "mmap: a hole in the middle of three pages, which is filled again\n"
    mmap2 $0, $3*4096, $R+W, $PRIVATE+ANONYMOUS
    movl %eax, %ebp
    movl $1, (%ebp)
    movl $2, 4096(%ebp)
    movl $3, 2*4096(%ebp)
    leal 4096(%ebp), %eax
    munmap %eax, $4096
    expect $0, 3
    pushl %ebp
    leal 4096(%ebp), %ebp
    movl %ebp, %ebx
    movl $4096, %ecx
    movl $(R+W), %edx
    movl $(PRIVATE+ANONYMOUS+NOREPLACE), %esi
    movl $-1, %edi
    movl $0, %ebp
    movl $192, %eax
    int $0x80
    popl %ebp
    leal 4096(%ebp), %ebx
    expect %ebx, 4
    cmpl $0, 4096(%ebp)                 # new memory, between what has stayed
    jne 5f
    cmpl $1, (%ebp)
    jne 5f
    cmpl $3, 2*4096(%ebp)
    jne 5f

    say "mmap: MAP_FIXED_NOREPLACE refuses, MAP_FIXED replaces\n"
    pushl %ebp
    mmap2 %ebp, $4096, $R+W, $PRIVATE+ANONYMOUS+NOREPLACE
    expect $EEXIST, 6
    popl %ebp
    pushl %ebp
    mmap2 %ebp, $4096, $R, $PRIVATE+ANONYMOUS+FIXED
    popl %ebp
    expect %ebp, 7
    cmpl $0, (%ebp)
    jne 5f
    munmap %ebp, $3*4096
    expect $0, 8
    say "mmap: all is unmapped\n"
    exit $0
5:
    exit $9
end_program mmap

# These four end where the protection says.

program write_to_read_only
    say "a write to a page that may only be read\n"
    mmap2 $0, $4096, $R, $PRIVATE+ANONYMOUS
    movl (%eax), %ecx
    movl $1, (%eax)
    exit $0
end_program write_to_read_only

program execute_data
    say "a jump to a page that may be read and written\n"
    mmap2 $0, $4096, $R+W, $PRIVATE+ANONYMOUS
    movb $0xc3, (%eax)
    calll *%eax
    exit $0
end_program execute_data

program read_reserved
    say "a read from a page of PROT_NONE\n"
    mmap2 $0, $4096, $0, $PRIVATE+ANONYMOUS
    movl (%eax), %eax
    exit $0
end_program read_reserved

program read_unmapped
    say "a read from a page that was unmapped\n"
    mmap2 $0, $4096, $R+W, $PRIVATE+ANONYMOUS
    movl %eax, %ebp
    movl $1, (%ebp)
    munmap %ebp, $4096
    movl (%ebp), %eax
    exit $0
end_program read_unmapped
