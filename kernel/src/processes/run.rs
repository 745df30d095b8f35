//! What a process does from its first instruction to its end.

use core::fmt;
use core::ops::ControlFlow::{self, Break, Continue};

use x86_64::structures::idt::PageFaultErrorCode;

use super::calls::{Call, Called};
use super::errno::Errno;
use super::mappings::{Mapping, Protection};
use super::space::{Refused, Space};
use super::{Memory, Watch};
use crate::threads::user::{self, Trap};
use crate::traps::{self, TrapFrame};

/// How a process has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It has called `exit`. The status is from 0 to 255, as a parent gets it from wait(2).
    Status(i32),
    /// It has done what it may not.
    Killed(Killed),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exit status {status}"),
            Self::Killed(killed) => write!(f, "killed: {killed}"),
        }
    }
}

/// What a process has done that it may not, where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Killed {
    /// What it was.
    pub cause: Cause,
    /// The address of the instruction.
    pub rip: u64,
    /// The mapping that the instruction is in.
    pub code: Option<Mapping>,
}

/// What a process has done that it may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// It has used memory that is not its, or not in this way.
    BadAccess {
        /// READ, WRITE or EXECUTE.
        access: Protection,
        /// Where.
        address: u64,
        /// What is mapped there, and does not allow it.
        mapping: Option<Mapping>,
    },
    /// It has used memory for the first time for which there is no page frame.
    OutOfMemory {
        /// Where.
        address: u64,
        /// What is mapped there.
        mapping: Mapping,
    },
    /// It has caused another exception: the number.
    Exception(u8),
}

/// One line.
impl fmt::Display for Killed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::BadAccess { access, address, mapping } => {
                let access = match *access {
                    Protection::WRITE => "write to",
                    Protection::EXECUTE => "execution at",
                    _ => "read from",
                };
                write!(f, "page fault: {access} {address:#010x}, ")?;
                match mapping {
                    Some(mapping) => write!(f, "not allowed in {mapping}")?,
                    None => write!(f, "not mapped")?,
                }
            }
            Cause::OutOfMemory { address, mapping } => write!(f, "out of memory: {address:#010x} in {mapping}")?,
            Cause::Exception(vector) => f.write_str(traps::name((*vector).into()).unwrap_or("unknown exception"))?,
        }
        write!(f, "; rip {:#010x}", self.rip)?;
        self.code.map_or(Ok(()), |mapping| write!(f, " in {mapping}"))
    }
}

/// Bytes that `write` copies at a time.
const CHUNK: usize = 512;

/// Runs the program in `space` from `registers` on, to its end. `publish` is told the memory whenever it may have changed.
pub(super) fn run(space: &mut Space, registers: TrapFrame, watch: &mut dyn Watch, publish: impl Fn(Memory)) -> Exit {
    watch.started(&space.memory());
    let root = space.tables().root();
    let body = |mode: &mut user::UserMode| {
        *mode.registers() = registers;
        loop {
            // SAFETY: the registers are those of a new program, or those that it was interrupted with: its selectors are of ring 3,
            // interrupts are on, and it has come from an address below those that are not canonical, or starts there.
            let trap = unsafe { mode.run() };
            let outcome = serve(space, mode.registers(), trap, watch);
            publish(space.memory());
            if let Break(exit) = outcome {
                return exit;
            }
        }
    };
    // SAFETY: the tables share the kernel's half, and live in `space`, which outlives this.
    unsafe { user::with_tables(root, body) }
}

/// Sees to what the program was left for.
fn serve(space: &mut Space, registers: &mut TrapFrame, trap: Trap, watch: &mut dyn Watch) -> ControlFlow<Exit> {
    let cause = match trap.vector {
        traps::SYSTEM_CALL => match serve_call(space, registers, watch) {
            Ok(flow) => return flow,
            Err(cause) => cause,
        },
        traps::PAGE_FAULT => match serve_fault(space, trap) {
            Ok(()) => return Continue(()),
            Err(cause) => cause,
        },
        vector => Cause::Exception(vector),
    };
    let rip = registers.rip;
    Break(Exit::Killed(Killed { cause, rip, code: space.mapping_at(rip) }))
}

fn serve_fault(space: &mut Space, trap: Trap) -> Result<(), Cause> {
    let code = PageFaultErrorCode::from_bits_truncate(trap.error_code);
    let access = match code {
        _ if code.contains(PageFaultErrorCode::INSTRUCTION_FETCH) => Protection::EXECUTE,
        _ if code.contains(PageFaultErrorCode::CAUSED_BY_WRITE) => Protection::WRITE,
        _ => Protection::READ,
    };
    let address = trap.address;
    // A page that is mapped allows what its mapping does.
    if code.contains(PageFaultErrorCode::PROTECTION_VIOLATION) {
        return Err(Cause::BadAccess { access, address, mapping: space.mapping_at(address) });
    }
    space.touch(address, access).map_err(|refused| cause_of(refused, address, access))
}

fn cause_of(refused: Refused, address: u64, access: Protection) -> Cause {
    match refused {
        Refused::NotMapped => Cause::BadAccess { access, address, mapping: None },
        Refused::Protected(mapping) => Cause::BadAccess { access, address, mapping: Some(mapping) },
        Refused::OutOfMemory(mapping) => Cause::OutOfMemory { address, mapping },
    }
}

/// Serves a system call. The error is what the program is ended for.
fn serve_call(space: &mut Space, registers: &mut TrapFrame, watch: &mut dyn Watch) -> Result<ControlFlow<Exit>, Cause> {
    let call = Call::of(registers);
    let result = match call {
        Call::Exit { status } => {
            watch.called(&Called { call, result: 0, memory: space.memory() });
            return Ok(Break(Exit::Status((status & 0xff) as i32)));
        }
        Call::Write { descriptor, address, length } => write(space, descriptor, address, length, watch)?,
        Call::Brk { to } => Ok(space.brk(to)),
        Call::Munmap { address, length } => space.munmap(address, length).map(|()| 0),
        Call::Mmap2(request) => space.mmap(&request),
        Call::Unknown(_) => Err(Errno::Enosys),
    };
    let result = result.map_or_else(Errno::result, |value| value as i64);
    registers.rax = result as u64;
    watch.called(&Called { call, result, memory: space.memory() });
    Ok(Continue(()))
}

/// `write`: all of the text, or none where a part of it is not the program's.
fn write(
    space: &mut Space,
    descriptor: u32,
    address: u32,
    length: u32,
    watch: &mut dyn Watch,
) -> Result<Result<u64, Errno>, Cause> {
    /// What Linux writes at once: MAX_RW_COUNT.
    const MOST: u64 = 0x7fff_f000;
    if !matches!(descriptor, 1 | 2) {
        return Ok(Err(Errno::Ebadf));
    }
    let (start, length) = (u64::from(address), u64::from(length).min(MOST));
    if !space.may_read(start..start + length) {
        return Ok(Err(Errno::Efault));
    }
    let mut buffer = [0; CHUNK];
    for at in (start..start + length).step_by(CHUNK) {
        let part = &mut buffer[..(start + length - at).min(CHUNK as u64) as usize];
        space.read(at, part).map_err(|refused| cause_of(refused, at, Protection::READ))?;
        watch.wrote(descriptor, part);
    }
    Ok(Ok(length))
}
