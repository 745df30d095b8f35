# What the programs share. Each is a whole ELF file, from its header on, that the assembler makes: there is nothing to link.
#
#     program NAME ... end_program NAME           i386
#     program_64 NAME ... end_program_64 NAME     x86_64, which makes the same calls by the same registers
#
# One segment, read and execute, is at 0x08048000. Code finds its data relative to itself.

.ifndef program_macros
.set program_macros, 1

.macro begin_program name
    .pushsection .rodata.programs, "a", @progbits
    .balign 16
    .global program_\name
program_\name:
.endm

.macro finish_program name
    .global program_\name\()_end
program_\name\()_end:
    .code64
    .popsection
.endm

.macro program name
    begin_program \name
    .code32
    .byte 0x7f, 'E', 'L', 'F', 1, 1, 1, 0       # 32 bits, little-endian, version 1
    .fill 8, 1, 0
    .short 2, 3                                 # executable, i386
    .long 1, 0x08048054, 52, 0, 0               # version, entry, program headers, no sections, no flags
    .short 52, 32, 1, 0, 0, 0                   # sizes of the header and of a program header, of which there is one
    .long 1, 0, 0x08048000, 0x08048000          # load, from the start of the file, to there
    .long program_\name\()_end - program_\name, program_\name\()_end - program_\name
    .long 5, 4096                               # read and execute, alignment
.endm

.macro end_program name
    finish_program \name
.endm

.macro program_64 name
    begin_program \name
    .byte 0x7f, 'E', 'L', 'F', 2, 1, 1, 0
    .fill 8, 1, 0
    .short 2, 62                                # executable, x86_64
    .long 1
    .quad 0x08048078, 64, 0
    .long 0
    .short 64, 56, 1, 0, 0, 0
    .long 1, 5
    .quad 0, 0x08048000, 0x08048000
    .quad program_\name\()_end - program_\name, program_\name\()_end - program_\name, 4096
.endm

.macro end_program_64 name
    finish_program \name
.endm

# The calls. The result is in EAX; EBX, ECX and more are changed.

.macro exit status
    movl \status, %ebx
    movl $1, %eax
    int $0x80
.endm

.macro write descriptor, address, length
    movl \length, %edx
    movl \address, %ecx
    movl \descriptor, %ebx
    movl $4, %eax
    int $0x80
.endm

.macro brk to
    movl \to, %ebx
    movl $45, %eax
    int $0x80
.endm

.macro munmap address, length
    movl \address, %ebx
    movl \length, %ecx
    movl $91, %eax
    int $0x80
.endm

.macro mmap2 address, length, protection, flags, descriptor=$-1, offset=$0
    movl \address, %ebx
    movl \length, %ecx
    movl \protection, %edx
    movl \flags, %esi
    movl \descriptor, %edi
    movl \offset, %ebp
    movl $192, %eax
    int $0x80
.endm

# The functions of a C library over the call, which tell a failure by the break that has stayed: brk(2). EBP has the
# address of errno, a word that is written only where they fail; EBX, ECX and EDX are changed.

# 0, or -1 and errno.
.macro libc_brk to
    brk \to
    cmpl %ebx, %eax
    movl $0, %eax
    je 8f
    movl $-ENOMEM, (%ebp)
    movl $-1, %eax
8:
.endm

# The previous break, or -1 and errno. The sum has to be an address of 32 bits.
.macro libc_sbrk by
    movl \by, %ecx
    brk $0
    movl %eax, %edx
    movl %ecx, %ebx
    sarl $31, %ecx                              # the upper half of what is added
    addl %eax, %ebx
    adcl $0, %ecx
    jnz 7f
    brk %ebx
    cmpl %ebx, %eax
    movl %edx, %eax
    je 8f
7:  movl $-ENOMEM, (%ebp)
    movl $-1, %eax
8:
.endm

# Ends with that status unless EAX is the value.
.macro expect value, status
    cmpl \value, %eax
    je 9f
    exit $\status
9:
.endm

# Writes a text to standard output; for 32-bit programs.
.macro say text
    calll 8f
7:  .ascii "\text"
8:  popl %ecx
    movl $(8b - 7b), %edx
    movl $1, %ebx
    movl $4, %eax
    int $0x80
.endm

# mmap2: PROT_READ, PROT_WRITE, PROT_EXEC; MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE.
.set R, 1
.set W, 2
.set X, 4
.set SHARED, 1
.set PRIVATE, 2
.set FIXED, 0x10
.set ANONYMOUS, 0x20
.set NOREPLACE, 0x100000

# Errors.
.set EPERM, -1
.set EBADF, -9
.set ENOMEM, -12
.set EFAULT, -14
.set EEXIST, -17
.set EINVAL, -22
.set ENOSYS, -38
.set EOVERFLOW, -75
.endif
