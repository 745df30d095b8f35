# The break: query, grow by 8 bytes, grow by 64 MiB, reset, exit. What the system call returns is the break.

program brk
    say "brk: query, grow by 8, grow by 67108864, reset\n"

    brk $0
    movl %eax, %esi                     # where it starts

    leal 8(%esi), %edi
    brk %edi
    expect %edi, 1
    cmpl $0, (%esi)                     # what has grown reads as zero
    jne 5f
    movl $0x12345678, 4(%esi)

    leal 8 + 67108864(%esi), %edi
    brk %edi
    expect %edi, 2
    cmpl $0x12345678, 4(%esi)
    jne 5f
    movl $1, -4(%edi)                   # the first and the last of the new bytes
    cmpl $0, 8(%esi)
    jne 5f

    brk %esi                            # and back
    expect %esi, 3
    say "brk: it is back where it started\n"
    exit $0
5:
    exit $4
end_program brk
