# What a CPU runs when another starts it (Intel SDM vol. 3, 9.4.4): in real mode, from the start of a page below 1 MiB that
# this is copied to. It goes straight to 64-bit mode, on tables that map that page at its physical address, and from there
# to the kernel. `Parameters` in start.rs is what lies behind the code.

.section .rodata.trampoline, "a", @progbits
.balign 16
.code16
.global trampoline_start
trampoline_start:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    movw $1, %ax
    xchgw %ax, (trampoline_claim - trampoline_start)
    testw %ax, %ax
    jz 2f
1:  hlt                                 # too late: the place is another's, or nobody waits
    jmp 1b
2:  lgdtl (trampoline_gdt_pointer - trampoline_start)
    movl (trampoline_cr4 - trampoline_start), %eax
    movl %eax, %cr4
    movl (trampoline_cr3 - trampoline_start), %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx              # EFER
    xorl %edx, %edx
    movl (trampoline_efer - trampoline_start), %eax
    wrmsr
    movl (trampoline_cr0 - trampoline_start), %eax
    movl %eax, %cr0
    ljmpl *(trampoline_far_pointer - trampoline_start)

.code64
.global trampoline_64
trampoline_64:
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %eax, %fs
    movl %eax, %gs
    movq trampoline_stack(%rip), %rsp
    movq trampoline_block(%rip), %rdi
    movq trampoline_tables(%rip), %rsi
    jmpq *trampoline_entry(%rip)

.balign 8
.global trampoline_gdt
trampoline_gdt:
    .quad 0, 0x00af9a000000ffff         # null, 64-bit code
.global trampoline_parameters
trampoline_parameters:
trampoline_stack: .quad 0
trampoline_block: .quad 0
trampoline_tables: .quad 0
trampoline_entry: .quad 0
trampoline_cr0: .long 0
trampoline_cr3: .long 0
trampoline_cr4: .long 0
trampoline_efer: .long 0
trampoline_far_pointer:
    .long 0                             # trampoline_64
    .word 8
trampoline_gdt_pointer:
    .word 15
    .long 0                             # trampoline_gdt
trampoline_claim:
    .word 1                             # 0 while a CPU is waited for
    .word 0
.global trampoline_end
trampoline_end:
