//! Runs programs in ring 3, one after the other, and says what each does with memory.
//!
//! What they write goes into frames, escaped: nothing that a program writes is taken for the kernel's.

use alloc::boxed::Box;
use core::fmt;

use kernel::heap::HEAP;
use kernel::processes::{Called, Exit as End, LoadError, Memory, Options, Process, Watch};
use kernel::{cpus, println, qemu, ramdisk, serial, stop, threads};

use super::programs;
use super::runner::{REPORT, must, on_stop};
use crate::protocol::{EAGER, Exit, PROGRAM_FILE, START};

/// Runs what `list`, the value of `programs=`, names, and ends the machine.
pub(super) fn run(list: &str) -> ! {
    stop::on_stop(on_stop);
    // Firmware may have left a line without its end.
    println!();
    // Page tables for the stacks of threads stay, once there are any.
    let warm = threads::spawn("warm", 64 << 10, || ()).expect("memory for a thread");
    warm.join();
    list.split(',').for_each(run_one);
    let seal = REPORT.lock().seal;
    must(seal.finish(&mut *serial::lock()));
    qemu::exit(Exit::Success as u32)
}

fn run_one(item: &str) {
    let name = item.strip_suffix(EAGER).unwrap_or(item);
    let eager = name != item;
    say(format_args!("begin {item}"));
    let elf = if name == PROGRAM_FILE { ramdisk::file(PROGRAM_FILE) } else { programs::named(name) };
    let Some(elf) = elf else { return say(format_args!("refused there is no program {name}")) };
    let before = free_frames();
    match start(elf, eager) {
        Ok(process) => match process.wait() {
            End::Status(status) => say(format_args!("status {status}")),
            End::Killed(killed) => say(format_args!("killed {killed}")),
        },
        Err(error) => say(format_args!("refused {error}")),
    }
    say(format_args!("frames {before} {}", free_frames()));
}

fn start(elf: &[u8], eager: bool) -> Result<Process, LoadError> {
    Process::start(elf, Options { name: "program", eager, watch: Box::new(Shown), ..Options::default() })
}

/// Says what a program does.
struct Shown;

impl Watch for Shown {
    fn started(&mut self, memory: &Memory) {
        say_memory(memory, format_args!("-"), format_args!("{START}"));
    }

    fn wrote(&mut self, _: u32, text: &[u8]) {
        say(format_args!("wrote {}", text.escape_ascii()));
    }

    fn called(&mut self, called: &Called) {
        if called.call.is_about_memory() {
            say_memory(&called.memory, format_args!("{}", called.result()), format_args!("{}", called.call));
        }
    }
}

fn say_memory(memory: &Memory, result: fmt::Arguments, call: fmt::Arguments) {
    let Memory { program_break, mappings, resident, reserved } = memory;
    let [resident, reserved] = [resident, reserved].map(|bytes| bytes >> 10);
    say(format_args!("memory {program_break:#x} {mappings} {resident} {reserved} {result} {call}"));
}

fn say(said: fmt::Arguments) {
    must(REPORT.lock().program(&mut *serial::lock(), said));
}

/// Page frames that are free when every CPU has given back what it keeps, and does not use.
fn free_frames() -> usize {
    for cpu in cpus::online() {
        cpus::call_on(cpu, |_| _ = HEAP.shrink(), 0).expect("it is online");
    }
    HEAP.frames().free_bytes() / kslab::memory::FRAME_SIZE
}
