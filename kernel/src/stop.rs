//! The end of a run that went wrong: one report, then the machine ends.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, Ordering};

use spin::Once;
use x86_64::instructions::interrupts;

use crate::qemu;
use crate::serial::{self, Port};

/// What the program does about a stop: it gets the headline and answers with what to [exit](qemu::exit) with.
///
/// It runs with interrupts off, wherever the kernel happened to be: it must take no lock that may be held, and not
/// allocate.
pub type Hook = fn(fmt::Arguments) -> u32;

static HOOK: Once<Hook> = Once::new();

/// How many reports have begun.
static REPORTS: AtomicU32 = AtomicU32::new(0);

/// Has `hook` called when the kernel stops. Only the first call counts.
pub fn on_stop(hook: Hook) {
    HOOK.call_once(|| hook);
}

/// Reports that the kernel cannot go on, then ends the machine.
///
/// The report goes to the serial port without a lock: `headline` on a line of its own, then what `details` writes. If
/// something goes wrong in here, that is not reported in full again: the run ends with the headline `report during a
/// report`.
pub fn stop(headline: fmt::Arguments, details: impl FnOnce(&mut Port) -> fmt::Result) -> ! {
    interrupts::disable();
    let mut port = serial::emergency();
    let headline = match REPORTS.fetch_add(1, Ordering::Relaxed) {
        0 => {
            let _ = writeln!(port, "\nSTOP: {headline}").and_then(|()| details(&mut port));
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

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    stop(format_args!("panic: {}", info.message()), |port| match info.location() {
        Some(location) => writeln!(port, "at {location}"),
        None => Ok(()),
    })
}
