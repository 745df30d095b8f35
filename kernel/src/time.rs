//! Time as the CPU counts it.

use core::hint::{black_box, spin_loop};
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use x86_64::instructions::port::Port;

/// Ticks in a second; a guess until they are measured.
static FREQUENCY: AtomicU64 = AtomicU64::new(1_000_000_000);

/// The time-stamp counter, in ticks of a rate that depends on the machine (Intel SDM vol. 3, 19.17).
///
/// Under QEMU's `-icount shift=0` it counts instructions, so the same run gives the same ticks.
pub fn ticks() -> u64 {
    // SAFETY: every x86_64 CPU has the instruction, and ring 0 may always use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Sets how many ticks there are in a second.
pub(crate) fn set_frequency(frequency: u64) {
    FREQUENCY.store(frequency, Ordering::Relaxed);
}

/// Spins until `done`, but no longer than `patience`. Whether it is done.
pub fn wait(patience: Duration, done: impl Fn() -> bool) -> bool {
    let patience = patience.as_nanos() * u128::from(FREQUENCY.load(Ordering::Relaxed)) / 1_000_000_000;
    let start = ticks();
    loop {
        if done() {
            return true;
        }
        if u128::from(ticks().wrapping_sub(start)) >= patience {
            return done();
        }
        rest();
    }
}

/// Passes some 100 ns. An emulator leaves its fast path at each look at a clock, and lets another CPU go on at each
/// `spin_loop`.
fn rest() {
    for turn in 0..64 {
        black_box(turn);
    }
    spin_loop();
}

/// Spins for so many microseconds, 50,000 at most, by the clock of a PC that always has the same rate: channel 2 of the
/// timer 8254, at 1.193182 MHz. Calls `start` just before they begin. Whether that worked: a machine may not have one.
pub(crate) fn reference(microseconds: u32, start: impl FnOnce()) -> bool {
    const GATE: u8 = 1;
    const SPEAKER: u8 = 2;
    const OUTPUT: u8 = 0x20;
    // Far more than there is time for.
    const READS: u32 = 1_000_000;
    let [low, high] = ((microseconds * 1193 / 1000).min(0xffff) as u16).to_le_bytes();
    let (mut control, mut channel) = (Port::<u8>::new(0x61), Port::<u8>::new(0x42));
    // SAFETY: the ports belong to that timer and the speaker, and nothing else in the kernel uses them.
    unsafe {
        let others = control.read() & !(GATE | SPEAKER);
        control.write(others | GATE);
        // Channel 2, both bytes, mode 0: it counts from the second byte on, and the output goes up at the end.
        Port::<u8>::new(0x43).write(0b1011_0000);
        channel.write(low);
        start();
        channel.write(high);
        let has_ended = (0..READS).any(|_| {
            rest();
            control.read() & OUTPUT != 0
        });
        control.write(others);
        has_ended
    }
}
