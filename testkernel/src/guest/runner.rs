//! Runs the selected tests, one after the other.
//!
//! A test is a function without arguments that fails by panicking; [`test!`] beside it puts it into the section of the
//! ELF file that holds the list of tests. A panic or an exception ends the run: there is no unwinding.

use core::alloc::Layout;
use core::fmt::{self, Write};
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use kernel::cpus::Cpus;
use kernel::heap::HEAP;
use kernel::serial;
use kernel::{cmdline, println, qemu, stop};
use kslab::IrqLock;

use super::report::Report;
use super::selection::select;
use crate::protocol::{Exit, Test};

pub(super) static REPORT: IrqLock<Cpus, Report> = IrqLock::new(Report::new());

/// Registers the test function of that name: `test!(name)`.
///
/// - `test!(name, stops_with = "panic: ...")`: it passes only if it stops the kernel with exactly this headline;
/// - `test!(name, cpus = 2, stops_with = "...")`: the same, on a machine with so many CPUs at least;
/// - `test!(name, ignored)`: runs on request only;
/// - `test!(name, bench)`: counts instructions;
/// - `test!(name, broken)`: breaks the report on purpose.
macro_rules! test {
    ($name:ident) => { $crate::guest::runner::test!(@ $name, "", Always, 1); };
    ($name:ident, stops_with = $headline:expr) => { $crate::guest::runner::test!(@ $name, $headline, Always, 1); };
    ($name:ident, cpus = $cpus:literal, stops_with = $headline:expr) => {
        $crate::guest::runner::test!(@ $name, $headline, Always, $cpus);
    };
    ($name:ident, ignored) => { $crate::guest::runner::test!(@ $name, "", Ignored, 1); };
    ($name:ident, bench) => { $crate::guest::runner::test!(@ $name, "", Bench, 1); };
    ($name:ident, broken) => { $crate::guest::runner::test!(@ $name, "", Broken, 1); };
    (@ $name:ident, $stops_with:expr, $when:ident, $cpus:literal) => {
        const _: () = {
            #[used]
            #[cfg_attr(target_os = "none", unsafe(link_section = ".tests"))]
            static TEST: $crate::protocol::Test = $crate::protocol::Test {
                name: $crate::protocol::Text::new($crate::guest::runner::short_name(concat!(
                    module_path!(),
                    "::",
                    stringify!($name)
                ))),
                stops_with: $crate::protocol::Text::new($stops_with),
                run: $name,
                when: $crate::protocol::When::$when,
                cpus: $cpus,
            };
        };
    };
}
pub(super) use test;

/// The headline of a report of the allocator, by its lines. The last one, which says who called, is any.
macro_rules! report {
    ($first:literal $(, $line:literal)* $(,)?) => {
        concat!("panic: kslab: ", $first $(, "\n  ", $line)*, "\n  now: ...")
    };
}
pub(super) use report;

/// `path` without the path of the module that all tests are in.
pub(super) const fn short_name(path: &'static str) -> &'static str {
    const PREFIX: &str = "testkernel::guest::tests::";
    let (prefix, name) = path.split_at(PREFIX.len());
    let mut at = 0;
    while at < PREFIX.len() {
        assert!(prefix.as_bytes()[at] == PREFIX.as_bytes()[at], "tests are in testkernel::guest::tests");
        at += 1;
    }
    name
}

/// Runs what the command line asks for, and ends the machine.
pub(super) fn run() -> ! {
    stop::on_stop(on_stop);
    let tests = all();
    let selection = match select(tests, cmdline::value("tests")) {
        Ok(selection) => selection,
        Err(item) => stop::stop(format_args!("tests={item}: there are {} tests, from 0", tests.len()), |_| Ok(())),
    };
    if cmdline::value("kslab.check").is_some() {
        warm_up();
    }
    // Firmware may have left a line without its end.
    println!();
    must(REPORT.lock().open(&mut *serial::lock(), selection.clone().count()));
    for index in selection {
        must(REPORT.lock().start(&mut *serial::lock(), &tests[index]));
        (tests[index].run)();
        must(REPORT.lock().returned(&mut *serial::lock()));
    }
    let exit = REPORT.lock().close(&mut *serial::lock(), format_args!("{}", HEAP.tables()));
    qemu::exit(must(exit) as u32)
}

/// Has the heap make what it keeps for objects with checks, so that no test takes that for memory that it has lost.
fn warm_up() {
    for size in kslab::SIZES {
        let layout = Layout::from_size_align(size, 1).expect("a layout");
        if let Some(block) = HEAP.allocate(layout) {
            // SAFETY: just allocated, and not used.
            unsafe { HEAP.free(block, layout) };
        }
    }
    HEAP.shrink();
}

/// Says something about the running test, which is shown with its result. The host takes it for progress.
pub(super) fn note(note: fmt::Arguments) {
    must(REPORT.lock().note(&mut *serial::lock(), note));
}

/// What the running test has to say when the kernel stops.
static LAST_WORDS: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());

/// Has `words` written to the console if the kernel stops during `body`. It takes no lock and does not allocate.
pub(super) fn with_last_words<T>(words: fn(&mut dyn Write) -> fmt::Result, body: impl FnOnce() -> T) -> T {
    LAST_WORDS.store(words as *mut (), Ordering::Release);
    let result = body();
    LAST_WORDS.store(ptr::null_mut(), Ordering::Release);
    result
}

/// Ends the report when the kernel stops. Where it stopped in the middle of a frame the report stays cut off.
pub(super) fn on_stop(headline: fmt::Arguments) -> u32 {
    let words = LAST_WORDS.swap(ptr::null_mut(), Ordering::AcqRel);
    if !words.is_null() {
        // SAFETY: only `with_last_words` stores here, and only this type.
        let words: fn(&mut dyn Write) -> fmt::Result = unsafe { mem::transmute(words) };
        must(words(&mut serial::emergency()));
    }
    let Some(mut report) = REPORT.try_lock() else {
        return Exit::Failure as u32;
    };
    report.stopped(&mut serial::emergency(), headline).unwrap_or(Exit::Failure) as u32
}

/// The serial port reports no errors.
pub(super) fn must<T>(written: Result<T, fmt::Error>) -> T {
    written.expect("a value that is printed failed to print itself")
}

#[cfg(target_os = "none")]
fn all() -> &'static [Test] {
    use core::slice;

    unsafe extern "C" {
        static __tests_start: u8;
        static __tests_end: u8;
    }
    let (start, end): (*const Test, *const Test) = ((&raw const __tests_start).cast(), (&raw const __tests_end).cast());
    // SAFETY: the linker script puts these symbols around the section, which holds whole, aligned records of `test!` and
    // nothing else.
    unsafe { slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// A host program runs none of them.
#[cfg(not(target_os = "none"))]
fn all() -> &'static [Test] {
    &[]
}
