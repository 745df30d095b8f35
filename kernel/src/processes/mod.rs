//! Processes: programs in ring 3, each in an address space of its own.
//!
//! A program is a static ELF file, 64-bit, or for i386 in compatibility mode. It runs as a [thread](crate::threads) of the
//! kernel, so it is pre-empted, runs on any CPU, and may use SSE. It knows five calls of Linux, by `int 0x80`; an error is
//! -1 to -4095:
//!
//! | call, manual page | promise |
//! |---|---|
//! | 1 `exit(status)`, exit(2) | ends the process with the lowest byte of the status; all its page frames are free then |
//! | 4 `write(fd, text, n)`, write(2) | to 1 and 2; `n`, all of it written; EBADF, EFAULT |
//! | 45 `brk(address)`, brk(2) | the new break, else the one that stays: where it would be below its start, above 3 GiB or over a mapping, or there is no memory; 0 queries. It counts bytes, and is backed by whole pages: what has grown reads as zero, what has shrunk gives whole pages back |
//! | 91 `munmap(address, length)`, mmap(2) | 0, also where nothing is mapped; the length rounds up to pages; a mapping that is unmapped in part is cut, or split in two. Its page frames are free, and no CPU reaches them. EINVAL: not the address of a page, no length, or beyond 3 GiB; ENOMEM: too many mappings |
//! | 192 `mmap2(address, length, rights, flags, fd, pages)`, mmap2(2) | the address of a page, near the one that is asked for or the highest that is free; the length rounds up to pages, which read as zero. The offset counts pages of 4096 bytes |
//!
//! | `mmap2` | promise |
//! |---|---|
//! | rights | what they do not have faults; none: the addresses are reserved, and any access faults |
//! | MAP_ANONYMOUS | has to be: EBADF without, as there are no files; and just one of MAP_PRIVATE and MAP_SHARED: EINVAL |
//! | MAP_FIXED | at that address, in place of what is there; EINVAL: not of a page; EPERM: in the first 64 KiB; ENOMEM: beyond 3 GiB. Where memory is missing that has to be there at once, what was there is gone |
//! | MAP_FIXED_NOREPLACE | as that, but EEXIST where something is there |
//! | other errors | EINVAL: no length; ENOMEM: no addresses, memory or room for one more; EOVERFLOW: the offset and the length do not fit |
//!
//! Every other number gives -ENOSYS. `brk` and `sbrk` as a C library has them are a few instructions around call 45: 0, or the
//! break that was before; -1 with ENOMEM in errno where they fail. They are `libc_brk` and `libc_sbrk` in the test kernel's
//! `programs/macros.s`.
//!
//! ```text
//! 0x00010000  lowest address
//!             segments of the program, then what lies below the break, which grows up
//!             what mmap2 has mapped, from the highest free address down
//! 0xbf7ff000  stack, 8 MiB
//! 0xc0000000  end of what calls map, and of a 32-bit program; segments of a 64-bit one may be above, up to 128 TiB
//! ```
//!
//! The stack can be executed where a header PT_GNU_STACK of the file asks for it; where there is none it cannot.
//!
//! Memory is *reserved* when it is mapped, and *resident* when it has a page frame: from the first use of each page on, or,
//! but for the stack, at once where [`Options::eager`] says so. A process that does what it may not is ended, and it alone; so is one for which
//! there is no memory. When it has ended all its frames are free, those of its page tables too.
//!
//! | module | what it is |
//! |---|---|
//! | `load` | ELF files |
//! | `space` | an address space, and the calls that change it |
//! | `mappings` | which addresses are mapped |
//! | `calls`, `errno` | the registers of system calls |
//! | `run` | what happens from the first instruction to the last |
//!
//! There is no lock but for the numbers of [`Process::memory`]: all else belongs to the thread of the process.

mod calls;
mod errno;
mod load;
mod mappings;
mod run;
mod space;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;

use kslab::IrqLock;

pub use calls::{Call, Called};
pub use errno::Errno;
pub use load::LoadError;
pub use mappings::{Kind, Mapping, Protection};
pub use run::{Cause, Exit, Killed};
pub use space::MapRequest;

use crate::cpus::Cpus;
use crate::serial;
use crate::threads::{self, JoinHandle, Thread};
use space::Space;

/// Bytes of the stack on which a process is served in the kernel.
const STACK_SIZE: usize = 64 * 1024;

/// What a process has of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// The break, an address.
    pub program_break: u64,
    /// How many mappings there are; neighbours that are alike count as one.
    pub mappings: usize,
    /// Bytes in pages that have a frame.
    pub resident: u64,
    /// Bytes in all mappings.
    pub reserved: u64,
}

/// Who wants to know what a process does. All is called on the thread of the process, with no lock held.
pub trait Watch: Send {
    /// It is about to start, with this memory.
    fn started(&mut self, memory: &Memory) {
        let _ = memory;
    }

    /// It has written `text`, or a part of it, to 1 or 2. Unless told otherwise that goes to the console.
    fn wrote(&mut self, descriptor: u32, text: &[u8]) {
        let _ = descriptor;
        serial::lock().write(text);
    }

    /// A system call was served.
    fn called(&mut self, called: &Called) {
        let _ = called;
    }
}

/// Wants to know nothing.
struct Nobody;

impl Watch for Nobody {}

/// How a process is started.
pub struct Options {
    /// The name of its thread.
    pub name: &'static str,
    /// The number of the CPU that it starts on; `None` for that of the caller.
    pub cpu: Option<usize>,
    /// Whether all memory but the stack has its page frames from the moment on at which it is mapped. Where there are none
    /// then, the call fails.
    pub eager: bool,
    /// Bytes that it may have mapped at a time, its segments and stack included: as RLIMIT_AS of setrlimit(2).
    pub limit: u64,
    /// Who wants to know what it does.
    pub watch: Box<dyn Watch>,
}

impl Default for Options {
    fn default() -> Self {
        Self { name: "process", cpu: None, eager: false, limit: u64::MAX, watch: Box::new(Nobody) }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, cpu, eager, limit, .. } = self;
        let mut all = f.debug_struct("Options");
        all.field("name", name).field("cpu", cpu).field("eager", eager).field("limit", limit).finish_non_exhaustive()
    }
}

/// A process. Dropping this leaves it to itself.
#[derive(Debug)]
pub struct Process {
    handle: JoinHandle<Exit>,
    memory: Arc<IrqLock<Cpus, Memory>>,
}

impl Process {
    /// Starts the program `elf`, which is copied.
    ///
    /// # Errors
    ///
    /// See [`LoadError`]; nothing has changed then.
    pub fn start(elf: &[u8], options: Options) -> Result<Self, LoadError> {
        let Options { name, cpu, eager, limit, mut watch } = options;
        let mut space = Space::new(eager, limit)?;
        let registers = load::load(elf, &mut space)?;
        let memory = Arc::new(IrqLock::new(space.memory()));
        let published = memory.clone();
        let body = move || {
            let exit = run::run(&mut space, registers, &mut *watch, |memory| *published.lock() = memory);
            drop(space);
            *published.lock() = Memory::default();
            exit
        };
        let handle = match cpu {
            Some(cpu) => threads::spawn_on(cpu, name, STACK_SIZE, body)?,
            None => threads::spawn(name, STACK_SIZE, body)?,
        };
        Ok(Self { handle, memory })
    }

    /// What it has of memory now; nothing when it has ended.
    pub fn memory(&self) -> Memory {
        *self.memory.lock()
    }

    /// Its thread.
    pub fn thread(&self) -> &Thread {
        self.handle.thread()
    }

    /// Whether it has ended, so that [`wait`](Self::wait) returns at once.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits until it has ended, while other threads run. All its memory is free then.
    ///
    /// # Panics
    ///
    /// As [`threads::yield_now`].
    pub fn wait(self) -> Exit {
        self.handle.join()
    }
}
