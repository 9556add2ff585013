# What runs in ring 0: the entries, the way to ring 3, and the few services that ring 3 asks for by a breakpoint.
#
# Some hosts interpret ring 0 a million times slower than they run ring 3, and do not know every instruction: so
# there is little of it, without SSE, and all tables are in the image.

# XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h): where a PVH loader enters.
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

    .section .text.ring0, "ax"

# 32-bit protected mode without paging; ebx: start information (Xen, docs/misc/pvh.pandoc).
    .code32
    .globl pvh_entry
pvh_entry:
    mov edi, 1
    mov esi, ebx
# The other processors come here from the trampoline.
enter_long_mode:
    mov eax, offset pml4
    mov cr3, eax
    mov eax, 0x620                  # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov ecx, 0xc0000080             # EFER
    mov eax, 0x100                  # LME
    xor edx, edx
    wrmsr
    lgdt [gdt_pointer]
    mov eax, 0x80000033             # PG, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                      # far jump
    .long enter_ring3
    .word 0x08

# 64-bit mode with the loader's page tables; rsi: boot_params (Linux, Documentation/arch/x86/boot.rst).
    .code64
    .globl linux64_entry
linux64_entry:
    mov edi, 2
    mov eax, offset pml4
    mov cr3, rax
    mov eax, 0x620
    mov cr4, rax
    mov eax, 0x80000033
    mov cr0, rax
    lgdt [gdt_pointer]

enter_ring3:
    mov eax, dword ptr [entry_tss]
    ltr ax
    lidt [idt_pointer]
    mov esp, offset entry_frame
    iretq

# Entry of the other processors: copied to a page below 1 MiB, where they begin in real mode.
    .code16
    .globl trampoline, trampoline_end
trampoline:
    mov ax, cs
    mov ds, ax
    # lgdt with a 32-bit base; its operand, two symbols, is beyond the assembler's syntax.
    .byte 0x66, 0x0f, 0x01, 0x16
    .word trampoline_gdt_pointer - trampoline
    mov eax, 0x11                   # ET, PE
    mov cr0, eax
    .byte 0x66, 0xea                # far jump with a 32-bit offset
    .long trampoline_32
    .word 0x30
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code32
trampoline_32:
    mov eax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, 3
    jmp enter_long_mode

# int3. eax: which service; ecx, rdi, rsi: its arguments. Changes rax, rcx, rdx.
    .code64
    .globl service
service:
    cmp eax, 4
    ja 9f
    jmp qword ptr [services + rax * 8]

# Sleeps until an interrupt, unless the counter at rdi is no longer rsi. Interrupts are off up to the hlt.
service_wait:
    cmp qword ptr [rdi], rsi
    jne 9f
    sti
    hlt
9:  iretq

service_enable_interrupts:
    or dword ptr [rsp + 16], 0x200
    iretq

service_write_msr:
    mov eax, edi
    mov rdx, rdi
    shr rdx, 32
    wrmsr
    iretq

service_triple_fault:
    lidt [no_idt]
    ud2

service_bad_mmio:
    lock cmpxchg16b [rdi]
    iretq

    .section .rodata.ring0, "a"
    .balign 8
services:
    .quad service_wait
    .quad service_enable_interrupts
    .quad service_write_msr
    .quad service_triple_fault
    .quad service_bad_mmio

    .balign 4
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 4
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
    .balign 4
no_idt:
    .word 0
    .quad 0

    .section .data.ring0, "aw"
# Selector of the TSS, and stack and start in ring 3, of the processor that enters next.
    .globl entry_tss, entry_frame, gdt, gdt_other_tss
    .balign 16
entry_frame:
    .quad start                     # rip
    .quad 0x23                      # cs
    .quad 0x002                     # rflags, interrupts off
    .quad boot_stack_end - 8        # rsp, as after a call
    .quad 0x1b                      # ss
entry_tss:
    .long 0x38

    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 08: 64-bit code
    .quad 0x00cf93000000ffff        # 10: data
    .quad 0x00cff3000000ffff        # 18: data, ring 3
    .quad 0x00affb000000ffff        # 20: 64-bit code, ring 3
    .quad 0
    .quad 0x00cf9b000000ffff        # 30: 32-bit code
    .quad tss_descriptor_low        # 38: TSS of the first processor
    .quad tss_descriptor_high
gdt_other_tss:                      # 48: TSSs of the others
    .fill 63 * 16, 1, 0
gdt_end:

# The low 4 GiB, each address onto itself in pages of 2 MiB, open to ring 3. Flags: present, writable, user,
# accessed; pages also dirty, large.
    .section .data.pages, "aw"
    .globl pml4, pdpt
    .balign 4096
pml4:
    .quad pdpt + 0x27
    .fill 511 * 8, 1, 0
pdpt:
    .quad directories + 0x27
    .quad directories + 0x1027
    .quad directories + 0x2027
    .quad directories + 0x3027
    .fill 508 * 8, 1, 0
directories:
    .set page, 0
    .rept 2048
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr

    .section .bss.stack, "aw", @nobits
    .balign 16
    .fill 65536, 1, 0
boot_stack_end:
