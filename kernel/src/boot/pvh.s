# The PVH entry (Xen's "x86/HVM direct boot ABI"): 32-bit protected mode, paging off, EBX = address of hvm_start_info.
# It turns on 64-bit mode with the tables below, which map the first GiB of physical memory at 0 and at BASE.

.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18                          # bytes in the name, bytes in the value, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_entry - {base}

.section .text.pvh_entry, "ax", @progbits
.code32
.global pvh_entry
pvh_entry:
    cld
    movl $({stack} + {top} - {base}), %esp
    movl %cr4, %eax
    orl $0x20, %eax                     # PAE
    movl %eax, %cr4
    movl $(early_tables - {base}), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER
    rdmsr
    orl $0x900, %eax                    # long mode, no-execute bits
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax               # paging
    movl %eax, %cr0
    lgdt early_gdt_pointer - {base}
    pushl $8
    pushl $(pvh_entry_64 - {base})
    lret

.code64
pvh_entry_64:
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %eax, %fs
    movl %eax, %gs
    movq $({stack} + {top}), %rsp
    xorl %ebp, %ebp
    movl %ebx, %edi
    movq ${next}, %rax
    callq *%rax
    ud2

.section .data.pvh_entry, "aw", @progbits
.balign 8
early_gdt:
    .quad 0, 0x00af9a000000ffff         # null, 64-bit code
early_gdt_pointer:
    .word 15
    .long early_gdt - {base}

.balign 4096
early_tables:
    .quad early_level_3 - {base} + 3    # present, writable
    .fill 510, 8, 0
    .quad early_level_3 - {base} + 3
early_level_3:
    .quad early_level_2 - {base} + 3
    .fill 509, 8, 0
    .quad early_level_2 - {base} + 3
    .quad 0
early_level_2:
    .set early_page, 0x83               # present, writable, 2 MiB
    .rept 512
    .quad early_page
    .set early_page, early_page + 0x200000
    .endr
