//! Starting CPUs: INIT, SIPI, SIPI (Intel SDM vol. 3, 9.4), one CPU at a time, which says so when it runs.
//!
//! A CPU that is given up may come late all the same. The first thing it does is to claim the place that is waiting for a CPU,
//! if there is one; else it halts where it is, in the page where it started. So that page is never freed once a CPU was
//! given up, and serves the next.

use core::alloc::Layout;
use core::arch::naked_asm;
use core::fmt;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use core::time::Duration;

use bootloader_api::BootInfo;
use kslab::{FrameBlock, IrqLock, Order};
use x86_64::PhysAddr;
use x86_64::VirtAddr;
use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer, EferFlags};
use x86_64::structures::paging::{PageTable, PageTableFlags};

use super::offline::enter;
use super::{BLOCKS, Block, COUNT, Cpus, MAX, all, apic, block, count, madt, publish, this};
use crate::heap::HEAP;
use crate::stack::MappedStack;
use crate::{cmdline, memory, println, threads, time, traps};

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("trampoline.s"), options(att_syntax));

/// The word of the command line that names an APIC id, `lost-cpu=ID`: that CPU starts and never comes to the kernel.
const LOST_CPU: &str = "lost-cpu";

/// How long a CPU may take to reset. The manual's 10 ms are for CPUs of the last century.
const RESET: Duration = Duration::from_millis(1);

/// How long a CPU may take to come to the kernel. An emulator with fewer CPUs of its own may let it wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long one that has claimed its place may take for the rest.
const LAST_STEPS: Duration = Duration::from_secs(10);

/// Frames of a [`Trampoline`]: the code, and page tables of three levels.
const FRAMES: u32 = 4;
const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

/// Bytes in the stack that a CPU idles on, and runs interrupts on.
const STACK_SIZE: usize = 64 * 1024;

/// The stacks of a CPU that another starts.
#[derive(Debug)]
pub(super) struct Stacks {
    idle: MappedStack,
    traps: [MappedStack; traps::STACKS.len()],
}

impl Stacks {
    fn new() -> Option<Self> {
        let [first, second, third] = traps::STACKS.map(|_| MappedStack::new(traps::STACK_SIZE));
        Some(Self { idle: MappedStack::new(STACK_SIZE)?, traps: [first?, second?, third?] })
    }

    /// The name of the stack in whose guard page `address` is.
    pub(super) fn guarded_at(&self, address: VirtAddr) -> Option<&'static str> {
        let traps = self.traps.iter().zip(traps::STACKS);
        let mut all = [(&self.idle, "idle stack")].into_iter().chain(traps);
        all.find_map(|(stack, name)| stack.is_guarded_at(address).then_some(name))
    }
}

/// Why a CPU was not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotStarted {
    /// It runs already.
    Runs,
    /// [`MAX`] CPUs run.
    TooMany,
    /// Another is being started.
    Busy,
    /// There is no memory for it; it needs some below 1 MiB.
    OutOfMemory,
    /// It did not come to the kernel in time.
    Silent,
}

impl fmt::Display for NotStarted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runs => f.write_str("it runs already"),
            Self::TooMany => write!(f, "the kernel serves {MAX} CPUs"),
            Self::Busy => f.write_str("another is being started"),
            Self::OutOfMemory => f.write_str("there is no memory for it"),
            Self::Silent => f.write_str("it does not answer"),
        }
    }
}

impl core::error::Error for NotStarted {}

/// Starts every CPU that firmware lists. One that does not start is reported, and the rest go on.
pub(crate) fn start_all(boot_info: &BootInfo) {
    let listed = madt::for_each_cpu(boot_info, |id| match start(id, PATIENCE) {
        Ok(_) | Err(NotStarted::Runs) => {}
        Err(reason) => println!("The CPU with APIC id {id} was not started: {reason}"),
    });
    if let Err(error) = listed {
        println!("Only one CPU is used: {error:?}");
    }
}

/// Starts the CPU whose local APIC has this id, waits for so long that it comes to the kernel, and returns its number. It
/// then runs threads.
///
/// # Errors
///
/// See [`NotStarted`]; nothing has changed then.
pub fn start(apic_id: u32, patience: Duration) -> Result<usize, NotStarted> {
    static IS_BUSY: AtomicBool = AtomicBool::new(false);
    if IS_BUSY.swap(true, Ordering::Acquire) {
        return Err(NotStarted::Busy);
    }
    let result = start_next(apic_id, patience);
    IS_BUSY.store(false, Ordering::Release);
    result
}

fn start_next(apic_id: u32, patience: Duration) -> Result<usize, NotStarted> {
    let number = count();
    if all().take(number).any(|block| block.apic_id() == apic_id) {
        return Err(NotStarted::Runs);
    }
    if number == MAX {
        return Err(NotStarted::TooMany);
    }
    let block = new_block(number).ok_or(NotStarted::OutOfMemory)?;
    let stacks = Stacks::new().filter(|_| threads::prepare(number)).ok_or(NotStarted::OutOfMemory)?;
    for (top, stack) in block.trap_stacks.iter().zip(&stacks.traps) {
        top.store(stack.top().as_u64(), Ordering::Relaxed);
    }
    let kept = KEPT.lock().take();
    let trampoline = kept.or_else(Trampoline::new).ok_or(NotStarted::OutOfMemory)?;
    let is_lost = cmdline::value(LOST_CPU).is_some_and(|lost| lost.parse() == Ok(apic_id));
    trampoline.lead_to(block, stacks.idle.top(), is_lost);
    let outcome = trampoline.start(apic_id, block, patience);
    if outcome != Outcome::Runs || trampoline.is_kept {
        *KEPT.lock() = Some(Trampoline { is_kept: true, ..trampoline });
    }
    if outcome == Outcome::NeverCame {
        return Err(NotStarted::Silent);
    }
    // They are its own from now on, also where it has stayed on its way.
    block.stacks.call_once(|| stacks);
    if outcome == Outcome::StaysAway {
        BLOCKS[number].store(ptr::null_mut(), Ordering::Release);
        return Err(NotStarted::Silent);
    }
    COUNT.store(number + 1, Ordering::Release);
    threads::open(number);
    Ok(number)
}

/// What became of a CPU that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It runs.
    Runs,
    /// It has not claimed its place, and cannot any more.
    NeverCame,
    /// It has claimed its place, and then was not seen.
    StaysAway,
}

/// The block of the CPU that will have this number. Where no CPU claims it, it is there for the next.
fn new_block(number: usize) -> Option<&'static Block> {
    if let Some(block) = block(number) {
        return Some(block);
    }
    let memory = HEAP.allocate(Layout::new::<Block>())?.cast::<Block>();
    // SAFETY: just allocated for it, and never freed.
    let block: &Block = unsafe {
        memory.write(Block::new(number));
        memory.as_ref()
    };
    publish(block);
    Some(block)
}

/// What lies behind the code of `trampoline.s`, there one by one.
#[derive(Debug)]
#[repr(C)]
struct Parameters {
    stack: u64,
    block: u64,
    tables: u64,
    entry: u64,
    cr0: u32,
    cr3: u32,
    cr4: u32,
    efer: u32,
    far_pointer: u32,
    code_segment: u16,
    gdt_limit: u16,
    gdt: u32,
    /// 0 while a CPU is waited for. Who comes, or gives up, changes it to 1.
    claim: AtomicU16,
}

/// Memory below 1 MiB in which a CPU starts.
struct Trampoline {
    memory: FrameBlock<'static, Cpus>,
    /// Whether a CPU that was given up may be here.
    is_kept: bool,
}

/// Where a CPU that was given up may be.
static KEPT: IrqLock<Cpus, Option<Trampoline>> = IrqLock::new(None);

impl Trampoline {
    fn new() -> Option<Self> {
        let frames = HEAP.frames();
        let frame = frames.allocate_below(FRAMES, Order::ZERO, MIB)?;
        // SAFETY: just allocated.
        let memory = unsafe { FrameBlock::from_raw(frames, frame, FRAMES) };
        Some(Self { memory, is_kept: false })
    }

    /// Has the next CPU that starts here claim `block` and its stack; one that `is_lost` does not get so far.
    fn lead_to(&self, block: &'static Block, stack: VirtAddr, is_lost: bool) {
        self.write_tables();
        self.write_code(block, stack);
        if is_lost {
            // SAFETY: the first bytes of the page with the code, which is ours.
            unsafe { self.memory.pointer().cast::<[u8; 2]>().write(LOOP) };
        }
        self.claim().store(0, Ordering::SeqCst);
    }

    fn claim(&self) -> &AtomicU16 {
        let parameters: *const Parameters = self.memory.pointer().wrapping_add(code::offset_of_parameters()).cast();
        // SAFETY: `write_code` has put them there.
        unsafe { &(*parameters).claim }
    }

    fn address(&self) -> u64 {
        self.memory.frame().address()
    }

    /// Makes page tables that map the first 2 MiB at their physical addresses, and the rest as it is.
    fn write_tables(&self) {
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
        let frame = |index| PhysAddr::new(self.address() + index as u64 * PAGE as u64);
        let table = |index| {
            let table: *mut PageTable = memory::physical(frame(index).as_u64()).cast();
            // SAFETY: one of our frames, to which nothing else refers; a table is as large, and may hold anything.
            unsafe { table.as_mut_unchecked() }
        };
        let root: *const PageTable = memory::physical(Cr3::read().0.start_address().as_u64()).cast();
        // SAFETY: the table in force, mapped as all memory is. Its entries for the kernel stay as they are: all that the CPU
        // needs until it uses the table itself is mapped already.
        table(1).clone_from(unsafe { &*root });
        table(1)[0].set_addr(frame(2), flags);
        table(2).zero();
        table(2)[0].set_addr(frame(3), flags);
        table(3).zero();
        table(3)[0].set_addr(PhysAddr::zero(), flags | PageTableFlags::HUGE_PAGE);
    }

    fn write_code(&self, block: &'static Block, stack: VirtAddr) {
        let code = code::all();
        let address = self.address() as u32;
        let (tables, _) = Cr3::read();
        let parameters = Parameters {
            stack: stack.as_u64(),
            block: (&raw const *block).addr() as u64,
            tables: tables.start_address().as_u64(),
            entry: enter_kernel as *const () as u64,
            // As this CPU has them.
            cr0: Cr0::read_raw() as u32,
            cr3: address + PAGE as u32,
            cr4: Cr4::read_raw() as u32,
            efer: (Efer::read() - EferFlags::LONG_MODE_ACTIVE).bits() as u32,
            far_pointer: address + code::offset_of_64_bit_code() as u32,
            code_segment: 8,
            gdt_limit: 15,
            gdt: address + code::offset_of_gdt() as u32,
            claim: AtomicU16::new(1),
        };
        let page = self.memory.pointer();
        // SAFETY: our frame; the code is smaller than it, and ends with the parameters, 8 of its bytes aligned to 8.
        unsafe {
            page.copy_from_nonoverlapping(code.as_ptr(), code.len());
            page.add(code::offset_of_parameters()).cast::<Parameters>().write(parameters);
        }
    }

    /// Has the CPU start here, and waits until it has.
    fn start(&self, apic_id: u32, block: &Block, patience: Duration) -> Outcome {
        let page = (self.address() / PAGE as u64) as u8;
        let is_there = || block.mail.state.is_online();
        apic::send_init(apic_id);
        time::wait(RESET, || false);
        apic::send_start(apic_id, page);
        if !time::wait(Duration::from_millis(1), is_there) {
            apic::send_start(apic_id, page);
            time::wait(patience, is_there);
        }
        let has_come = self.claim().swap(1, Ordering::SeqCst) != 0;
        if has_come && (time::wait(LAST_STEPS, is_there) || !block.mail.state.abandon()) {
            return Outcome::Runs;
        }
        // It should not stay wherever it is. It may do so a while, or come later.
        apic::send_init(apic_id);
        if has_come { Outcome::StaysAway } else { Outcome::NeverCame }
    }
}

/// `jmp` to itself, in any mode.
const LOOP: [u8; 2] = [0xeb, 0xfe];

/// What the trampoline jumps to: leaves its page tables.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_kernel(_block: &'static Block, _tables: u64) -> ! {
    naked_asm!(
        "mov cr3, rsi",
        "xor ebp, ebp",
        "call {next}",
        "ud2",
        next = sym run,
    )
}

/// The first Rust code of a CPU that was started. Interrupts are off.
unsafe extern "sysv64" fn run(block: &'static Block) -> ! {
    let stacks = block.trap_stacks.each_ref().map(|top| VirtAddr::new(top.load(Ordering::Relaxed)));
    // SAFETY: the block is this CPU's, which was reset.
    unsafe { block.traps.load(stacks) };
    block.load();
    traps::load_table();
    memory::device::set_attributes();
    apic::turn_on(this());
    if block.mail.state.set_online() {
        enter(block);
        threads::idle()
    }
    // Nobody waits any more.
    loop {
        x86_64::instructions::hlt();
    }
}

#[cfg(target_os = "none")]
mod code {
    use core::slice;

    unsafe extern "C" {
        static trampoline_start: u8;
        static trampoline_64: u8;
        static trampoline_gdt: u8;
        static trampoline_parameters: u8;
        static trampoline_end: u8;
    }

    /// The code and all that lies behind it.
    pub(super) fn all() -> &'static [u8] {
        // SAFETY: all between the two symbols is in one section of read-only data.
        unsafe { slice::from_raw_parts(&raw const trampoline_start, offset(&raw const trampoline_end)) }
    }

    pub(super) fn offset_of_64_bit_code() -> usize {
        offset(&raw const trampoline_64)
    }

    pub(super) fn offset_of_gdt() -> usize {
        offset(&raw const trampoline_gdt)
    }

    pub(super) fn offset_of_parameters() -> usize {
        offset(&raw const trampoline_parameters)
    }

    fn offset(symbol: *const u8) -> usize {
        symbol.addr() - (&raw const trampoline_start).addr()
    }
}

/// A host program starts no CPUs.
#[cfg(not(target_os = "none"))]
mod code {
    pub(super) fn all() -> &'static [u8] {
        &[]
    }

    pub(super) fn offset_of_64_bit_code() -> usize {
        0
    }

    pub(super) fn offset_of_gdt() -> usize {
        0
    }

    pub(super) fn offset_of_parameters() -> usize {
        0
    }
}
