//! What is told about a vCPU that cannot go on: registers, the bytes at RIP, and a plain sentence.

use std::fmt;

use devices::GuestRam;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

/// Longest x86 instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;

/// State of a vCPU at its end.
#[derive(Debug)]
pub struct Diagnosis {
    sentence: String,
    registers: Option<(kvm_regs, kvm_sregs)>,
    code: Option<Vec<u8>>,
}

impl Diagnosis {
    /// Looks at `vcpu`, which stopped because of what `sentence` says.
    #[must_use]
    pub fn take(vcpu: &VcpuFd, memory: &GuestRam, sentence: String) -> Self {
        let registers = vcpu.get_regs().ok().zip(vcpu.get_sregs().ok());
        let code = registers.and_then(|(regs, sregs)| code_at(vcpu, memory, &regs, &sregs));
        Self { sentence, registers, code }
    }
}

/// Reads what lies at CS:RIP, byte by byte across page borders, as far as it is mapped.
fn code_at(vcpu: &VcpuFd, memory: &GuestRam, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<Vec<u8>> {
    // In long mode the base of CS does not count.
    let base = if sregs.cs.l == 1 { 0 } else { sregs.cs.base };
    let start = base.wrapping_add(regs.rip);
    let mut code = Vec::with_capacity(MAX_INSTRUCTION);
    for offset in 0..MAX_INSTRUCTION as u64 {
        let translation = vcpu.translate_gva(start.wrapping_add(offset)).ok()?;
        if translation.valid == 0 {
            break;
        }
        let Ok(byte) = memory.read_obj::<u8>(GuestAddress(translation.physical_address)) else { break };
        code.push(byte);
    }
    (!code.is_empty()).then_some(code)
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)?;
        if let Some((r, s)) = &self.registers {
            let general = [
                [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
                [("rsi", r.rsi), ("rdi", r.rdi), ("rbp", r.rbp), ("rsp", r.rsp)],
                [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
                [("r12", r.r12), ("r13", r.r13), ("r14", r.r14), ("r15", r.r15)],
                [("rip", r.rip), ("flg", r.rflags), ("cr0", s.cr0), ("cr2", s.cr2)],
                [("cr3", s.cr3), ("cr4", s.cr4), ("efe", s.efer), ("apc", s.apic_base)],
            ];
            for row in general {
                write!(f, "\n ")?;
                for (name, value) in row {
                    write!(f, " {name} {value:016x}")?;
                }
            }
            write!(f, "\n  cs {:04x} base {:x} dpl {}", s.cs.selector, s.cs.base, s.cs.dpl)?;
            write!(f, "  ss {:04x}  ds {:04x}  tr {:04x}", s.ss.selector, s.ds.selector, s.tr.selector)?;
            write!(f, "  gdt {:x}+{:x}  idt {:x}+{:x}", s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit)?;
        }
        match &self.code {
            Some(code) => {
                write!(f, "\n  bytes at rip:")?;
                code.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            None => write!(f, "\n  nothing is mapped at rip"),
        }
    }
}
