//! What the kernel says about an exception that ends it.

use core::fmt::{self, Write};

use kslab::fault::Report;
use x86_64::VirtAddr;
use x86_64::registers::control::{Cr2, Cr3};
use x86_64::structures::idt::PageFaultErrorCode;

use super::{FIRST_INTERRUPT, TrapFrame, guards};
use crate::backtrace::{self, Instruction};
use crate::heap::{self, HEAP};
use crate::serial::Port;
use crate::{cpus, image, stop, threads};

const PAGE_FAULT: u64 = 14;

/// The names of Intel SDM vol. 3, table 6-1, in lower case.
const NAMES: [&str; FIRST_INTERRUPT as usize] = [
    "divide error",
    "debug exception",
    "non-maskable interrupt",
    "breakpoint",
    "overflow",
    "bound range exceeded",
    "invalid opcode",
    "device not available",
    "double fault",
    "coprocessor segment overrun",
    "invalid TSS",
    "segment not present",
    "stack segment fault",
    "general protection fault",
    "page fault",
    "reserved exception",
    "x87 floating-point error",
    "alignment check",
    "machine check",
    "SIMD floating-point error",
    "virtualization exception",
    "control protection exception",
    "reserved exception",
    "reserved exception",
    "reserved exception",
    "reserved exception",
    "reserved exception",
    "reserved exception",
    "hypervisor injection exception",
    "VMM communication exception",
    "security exception",
    "reserved exception",
];

/// The name of an exception; `None` for an interrupt.
pub(crate) fn name(vector: u64) -> Option<&'static str> {
    NAMES.get(usize::try_from(vector).ok()?).copied()
}

/// Reports the trap and ends the run.
pub(super) fn stop(frame: &TrapFrame) -> ! {
    let address = Cr2::read_raw();
    let thread = (frame.vector == PAGE_FAULT).then(|| threads::guarded_at(VirtAddr::new_truncate(address))).flatten();
    let guarded = (frame.vector == PAGE_FAULT).then(|| HEAP.explain(address as usize)).flatten();
    let headline = Headline { vector: frame.vector, error_code: frame.error_code, address, thread, guarded };
    let calls = backtrace::from_frame(frame.rbp as usize);
    stop::stop_after(calls, format_args!("{headline}"), |port| {
        guarded.map_or(Ok(()), |report| heap::write_calls(port, &report))?;
        details(frame, address, port)
    })
}

fn details(frame: &TrapFrame, address: u64, port: &mut Port) -> fmt::Result {
    let TrapFrame { vector, error_code, rip, cs, rflags, rsp, ss, .. } = frame;
    let (tables, _) = Cr3::read();
    writeln!(port, "vector {vector}, error code {error_code:#x}, CPU {}", cpus::current())?;
    writeln!(port, "cr2 {address:#018x}  cr3 {:#018x}", tables.start_address())?;
    writeln!(port, "rip {rip:#018x}  cs {cs:#x}  rflags {rflags:#x}")?;
    writeln!(port, "rsp {rsp:#018x}  ss {ss:#x}")?;
    let TrapFrame { rax, rbx, rcx, rdx, rsi, rdi, rbp, .. } = frame;
    writeln!(port, "rax {rax:#018x}  rbx {rbx:#018x}  rcx {rcx:#018x}  rdx {rdx:#018x}")?;
    let TrapFrame { r8, r9, r10, r11, r12, r13, r14, r15, .. } = frame;
    writeln!(port, "rsi {rsi:#018x}  rdi {rdi:#018x}  rbp {rbp:#018x}  r8  {r8:#018x}")?;
    writeln!(port, "r9  {r9:#018x}  r10 {r10:#018x}  r11 {r11:#018x}  r12 {r12:#018x}")?;
    writeln!(port, "r13 {r13:#018x}  r14 {r14:#018x}  r15 {r15:#018x}")?;
    writeln!(port, "  in {}", Instruction(*rip))
}

/// One line about a trap.
struct Headline {
    vector: u64,
    error_code: u64,
    /// Of a page fault.
    address: u64,
    /// The thread in whose guard page that is.
    thread: Option<&'static str>,
    /// What the heap knows of that.
    guarded: Option<Report>,
}

impl fmt::Display for Headline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match name(self.vector) {
            _ if self.vector == PAGE_FAULT => self.page_fault(f),
            Some(name) => f.write_str(name),
            None => write!(f, "unexpected interrupt {}", self.vector),
        }
    }
}

impl Headline {
    /// Names the stack that overflowed, else what was done where, and beside which object of the heap or to which.
    ///
    /// In the kernel's image, whose layout changes with every build, the segment stands for the address.
    fn page_fault(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(thread) = self.thread {
            return write!(f, "stack overflow: thread {thread}");
        }
        let address = VirtAddr::new_truncate(self.address);
        if let Some((stack, _)) = guards().find(|(_, guard)| address.align_down(4096_u64) == *guard) {
            return write!(f, "stack overflow: {stack}");
        }
        if let Some((stack, cpu)) = cpus::guarded_at(address) {
            return write!(f, "stack overflow: {stack} of CPU {cpu}");
        }
        let code = PageFaultErrorCode::from_bits_truncate(self.error_code);
        let access = match code {
            _ if code.contains(PageFaultErrorCode::INSTRUCTION_FETCH) => "execution at",
            _ if code.contains(PageFaultErrorCode::CAUSED_BY_WRITE) => "write to",
            _ => "read from",
        };
        let reason = match code {
            _ if code.contains(PageFaultErrorCode::MALFORMED_TABLE) => "malformed page table",
            _ if code.contains(PageFaultErrorCode::PROTECTION_VIOLATION) => "protected",
            _ => "not mapped",
        };
        match image::segment_at(address) {
            Some(segment) => write!(f, "page fault: {access} {segment}, {reason}")?,
            None => write!(f, "page fault: {access} {address:#x}, {reason}")?,
        }
        self.guarded.map_or(Ok(()), |report| write!(f, "\n{report}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headline(vector: u64, error_code: u64, address: u64) -> String {
        Headline { vector, error_code, address, thread: None, guarded: None }.to_string()
    }

    #[test]
    fn exceptions_and_interrupts_are_named() {
        assert_eq!(headline(0, 0, 0), "divide error");
        assert_eq!(headline(30, 0, 0), "security exception");
        assert_eq!(headline(32, 0, 0), "unexpected interrupt 32");
        assert_eq!(headline(255, 0, 0), "unexpected interrupt 255");
    }

    #[test]
    fn page_faults_say_what_was_done_where() {
        assert_eq!(headline(14, 0b10, 0x12_3000), "page fault: write to 0x123000, not mapped");
        assert_eq!(headline(14, 0b1, 0x12_3000), "page fault: read from 0x123000, protected");
        assert_eq!(headline(14, 0b1_0001, 0x8), "page fault: execution at 0x8, protected");
        assert_eq!(headline(14, 0b1001, 0x8), "page fault: read from 0x8, malformed page table");
        let in_text = image::addresses().start.as_u64() + 8;
        assert_eq!(headline(14, 0b11, in_text), "page fault: write to kernel text, protected");
    }

    #[test]
    fn a_fault_in_a_guard_page_names_the_stack() {
        for (name, guard) in guards() {
            let expected = format!("stack overflow: {name}");
            assert_eq!(headline(14, 0b10, guard.as_u64()), expected);
            assert_eq!(headline(14, 0b10, guard.as_u64() + 4095), expected);
        }
    }
}
