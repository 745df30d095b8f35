//! The end of a run that went wrong: one report, then the machine ends.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use core::time::Duration;

use spin::Once;
use x86_64::instructions::{hlt, interrupts};

use crate::backtrace::{self, Backtrace};
use crate::serial::{self, Port};
use crate::{cpus, qemu, time};

/// What the program does about a stop: it gets the headline and answers with what to [exit](qemu::exit) with.
///
/// It runs with interrupts off, wherever the kernel happened to be: it must take no lock that may be held, and not
/// allocate.
pub type Hook = fn(fmt::Arguments) -> u32;

static HOOK: Once<Hook> = Once::new();

/// The CPU that reports.
static REPORTER: AtomicUsize = AtomicUsize::new(NOBODY);
const NOBODY: usize = usize::MAX;

/// How many reports the reporter has begun.
static REPORTS: AtomicU32 = AtomicU32::new(0);

/// How long the other CPUs may take to halt.
const PATIENCE: Duration = Duration::from_secs(10);

/// Has `hook` called when the kernel stops. Only the first call counts.
pub fn on_stop(hook: Hook) {
    HOOK.call_once(|| hook);
}

/// Reports that the kernel cannot go on, then ends the machine.
///
/// All other CPUs are halted first, by a non-maskable interrupt, so that there is one report and it is whole: where two
/// stop at once, one reports.
///
/// The report goes to the serial port without a lock: `headline` on a line of its own, then what `details` writes, then a
/// line for each [call](crate::backtrace::Call) that led here. If something goes wrong in here, that is not reported in
/// full again: the run ends with the headline `report during a report`.
#[inline(never)]
pub fn stop(headline: fmt::Arguments, details: impl FnOnce(&mut Port) -> fmt::Result) -> ! {
    stop_after(backtrace::callers(), headline, details)
}

/// The same where other calls than our callers led here.
pub(crate) fn stop_after(
    calls: Backtrace,
    headline: fmt::Arguments,
    details: impl FnOnce(&mut Port) -> fmt::Result,
) -> ! {
    interrupts::disable();
    be_the_reporter();
    let mut port = serial::emergency();
    let headline = match REPORTS.fetch_add(1, Ordering::Relaxed) {
        0 => {
            halt_others();
            let _ = writeln!(port, "\nSTOP: {headline}").and_then(|()| details(&mut port));
            let _ = write!(port, "{calls}");
            let _ = cpus::others()
                .filter(|other| !other.has_stopped())
                .try_for_each(|other| writeln!(port, "CPU {} did not halt", other.number()));
            headline
        }
        1 => {
            let _ = writeln!(port, "\nSTOP: report during a report");
            format_args!("report during a report")
        }
        _ => qemu::exit(qemu::FAILURE),
    };
    qemu::exit(HOOK.get().map_or(qemu::FAILURE, |hook| hook(headline)))
}

/// Returns on the one CPU that reports.
fn be_the_reporter() {
    let this = cpus::current();
    match REPORTER.compare_exchange(NOBODY, this, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(reporter) if reporter == this => {}
        Err(_) => halt(),
    }
}

fn halt_others() {
    cpus::apic::send_nmi_to_others_in_emergency();
    time::wait(PATIENCE, || cpus::others().all(|other| other.has_stopped()));
}

/// Halts this CPU for good if another reports that the kernel stops. For the handler of non-maskable interrupts.
pub(crate) fn halt_if_another_stops() {
    let reporter = REPORTER.load(Ordering::Acquire);
    if reporter != NOBODY && reporter != cpus::current() {
        halt();
    }
}

fn halt() -> ! {
    cpus::this().set_stopped();
    loop {
        interrupts::disable();
        hlt();
    }
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    stop_after(backtrace::callers(), format_args!("panic: {}", info.message()), |port| match info.location() {
        Some(location) => writeln!(port, "at {location}"),
        None => Ok(()),
    })
}
