//! The timer that each CPU has, in its local APIC.

use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use core::time::Duration;

use x86_64::instructions::interrupts::without_interrupts;

use crate::cpus::{apic, this};
use crate::threads::preemption;
use crate::time;
use crate::traps::{TrapFrame, set_interrupt_handler};

/// Counts of the timer's clock in a second. All CPUs of a machine have the same.
static FREQUENCY: AtomicU32 = AtomicU32::new(1_000_000_000);

/// How long each measurement takes, in microseconds, and how many there are.
const WINDOW: u32 = 1000;
const WINDOWS: usize = 10;

/// Measures the timer's clock, and that of [`time`], against one whose rate is known.
pub(crate) fn init() {
    set_interrupt_handler(apic::TIMER_VECTOR, on_timer);
    // In an emulator a CPU may stand still for a while, which makes a window seem longer; the shortest is the right one.
    let windows = (0..WINDOWS).filter_map(|_| measure());
    let shortest =
        windows.reduce(|(counts, ticks), (more_counts, more_ticks)| (counts.min(more_counts), ticks.min(more_ticks)));
    if let Some((counts, ticks)) = shortest {
        let a_second = |count: u64| count * 1_000_000 / u64::from(WINDOW);
        FREQUENCY.store(a_second(counts.into()).min(u32::MAX.into()) as u32, Ordering::Relaxed);
        time::set_frequency(a_second(ticks));
    }
}

/// Counts of the timer, and ticks of the CPU, in a window; `None` where there is nothing to measure with.
fn measure() -> Option<(u32, u64)> {
    let mut start = 0;
    let has_passed = time::reference(WINDOW, || {
        // Without an interrupt: it never gets to 0.
        set_period(u32::MAX);
        start = time::ticks();
    });
    let ticks = time::ticks() - start;
    // SAFETY: the register may be read at any time.
    let left = apic::with(|apic| unsafe { apic.timer_current() })?;
    set_period(0);
    has_passed.then_some((u32::MAX - left, ticks))
}

/// How many counts of the timer are `time`, at least 1.
pub fn counts(time: Duration) -> u32 {
    let counts = time.as_nanos() * u128::from(FREQUENCY.load(Ordering::Relaxed)) / 1_000_000_000;
    counts.clamp(1, u32::MAX.into()) as u32
}

/// How long a thread runs before another has its turn, unless a [tick](start) comes more often.
const TURN: Duration = Duration::from_millis(10);

/// What a CPU has its timer interrupt it for.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// What calls, and how often: 0 for never.
    tick: AtomicPtr<()>,
    period: AtomicU32,
    /// Whether turns of threads end.
    turns: AtomicBool,
}

impl Wanted {
    /// Nothing.
    pub(crate) const fn new() -> Self {
        Self { tick: AtomicPtr::new(ptr::null_mut()), period: AtomicU32::new(0), turns: AtomicBool::new(false) }
    }

    /// Counts between two interrupts; 0 for none.
    fn period(&self) -> u32 {
        match self.period.load(Ordering::Relaxed) {
            0 if self.turns.load(Ordering::Relaxed) => counts(TURN),
            period => period,
        }
    }
}

/// Calls `tick` on this CPU from its timer's interrupt every `period` [counts], until [`stop()`].
///
/// `tick` runs with interrupts off, on the stack that was in use. A `period` of 0 never ends: no tick comes. The turn of a
/// [thread](crate::threads) ends with a tick, too.
pub fn start(period: u32, tick: fn()) {
    want(period, tick as *mut ());
}

/// Stops the calls that [`start`] began on this CPU; none comes after this returns.
pub fn stop() {
    want(0, ptr::null_mut());
}

fn want(period: u32, tick: *mut ()) {
    without_interrupts(|| {
        let wanted = &this().timer;
        wanted.tick.store(tick, Ordering::Relaxed);
        wanted.period.store(period, Ordering::Relaxed);
        set_period(wanted.period());
    });
}

/// Has turns of threads end on this CPU, or not.
pub(crate) fn end_turns(turns: bool) {
    without_interrupts(|| {
        let wanted = &this().timer;
        let before = wanted.period();
        wanted.turns.store(turns, Ordering::Relaxed);
        // Setting it starts the time to the next interrupt afresh.
        if wanted.period() != before {
            set_period(wanted.period());
        }
    });
}

fn set_period(period: u32) {
    // SAFETY: the registers are mapped, and the timer's vector has a handler.
    apic::with(|apic| unsafe { apic.set_timer_initial(period) });
}

fn on_timer(_: &mut TrapFrame) {
    // First: another thread may go on after this.
    apic::end_of_interrupt();
    let tick = this().timer.tick.load(Ordering::Relaxed);
    if !tick.is_null() {
        // SAFETY: only `start` stores here, and only this type.
        let tick: fn() = unsafe { mem::transmute(tick) };
        tick();
    }
    preemption::end_turn();
}
