//! Time as the CPU counts it.

/// The time-stamp counter, in ticks of a rate that depends on the machine (Intel SDM vol. 3, 19.17).
///
/// Under QEMU's `-icount shift=0` it counts instructions, so the same run gives the same ticks.
pub fn ticks() -> u64 {
    // SAFETY: every x86_64 CPU has the instruction, and ring 0 may always use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
