//! Ending the emulator.

use x86_64::instructions::port::Port;
use x86_64::instructions::{hlt, interrupts};

/// What a kernel that stopped for good tells QEMU, unless [`stop::on_stop`](crate::stop::on_stop) says otherwise.
pub const FAILURE: u32 = 0x11;

/// Ends QEMU with the exit code `2 * value + 1` through its device `isa-debug-exit` at port 0xf4 (4 bytes wide).
///
/// On a machine without that device the CPU halts for ever.
pub fn exit(value: u32) -> ! {
    interrupts::disable();
    // SAFETY: the port belongs to that device or to none.
    unsafe { Port::new(0xf4).write(value) };
    loop {
        hlt();
    }
}
