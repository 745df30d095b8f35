//! What allocators do when they are misused: one misuse of one allocator, in this process, which may not survive it.
//!
//! Without arguments it lists the allocators and the misuses; with the number of one and of the other it goes ahead and
//! prints what it observed: `silent: ...` or `not noticed`, or the text of the panic, with which it ends then.

mod misuses;
mod run;
mod subjects;

use std::{
    env,
    io::{self, Write},
    panic::{self, PanicHookInfo},
    process::{self, ExitCode},
};

use crate::{
    misuses::misuses,
    run::Run,
    subjects::{Buddy, Kslab, LinkedList, Rlsf, Subject, Talc},
};

/// An allocator, and how it is misused.
struct Entry {
    name: &'static str,
    krate: Option<&'static str>,
    misuse: fn(usize),
}

const ALLOCATORS: [Entry; 6] = [
    entry::<Kslab<false>>(),
    entry::<Kslab<true>>(),
    entry::<LinkedList>(),
    entry::<Buddy>(),
    entry::<Talc>(),
    entry::<Rlsf>(),
];

const fn entry<S: Subject>() -> Entry {
    Entry { name: S::NAME, krate: S::CRATE, misuse: misuse::<S> }
}

fn main() -> ExitCode {
    let numbers: Option<Vec<usize>> = env::args().skip(1).map(|word| word.parse().ok()).collect();
    match numbers.as_deref() {
        Some([]) => list(),
        Some(&[allocator, number]) if allocator < ALLOCATORS.len() && number < misuses::<LinkedList>().len() => {
            panic::set_hook(Box::new(say));
            limit();
            (ALLOCATORS[allocator].misuse)(number);
        }
        _ => {
            eprintln!("error: the arguments are the number of an allocator and of a misuse");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// One line each: allocators with their versions, then misuses with their rows.
fn list() {
    for Entry { name, krate, .. } in ALLOCATORS {
        println!("allocator\t{name}\t{}", krate.map_or("", version));
    }
    for misuse in misuses::<LinkedList>() {
        println!("misuse\t{}\t{}", misuse.rows, misuse.title);
    }
}

/// The version that this program is built with.
fn version(krate: &str) -> &'static str {
    let mut lines = include_str!("../Cargo.lock").lines();
    let named = |line: &str| line.strip_prefix("name = ").is_some_and(|name| name.trim_matches('"') == krate);
    let version = lines.find(|line| named(line)).and_then(|_| lines.next()?.strip_prefix("version = "));
    version.expect("a version of each crate").trim_matches('"')
}

fn misuse<S: Subject>(number: usize) {
    let mut run = Run::<S>::new();
    (misuses::<S>()[number].commit)(&mut run);
    run.go_on();
}

/// The only thing done in a panic: the allocator may be locked.
fn say(panic: &PanicHookInfo<'_>) {
    println!("panic: {}", panic.payload_as_str().unwrap_or("without a text"));
    // Nobody to tell it to.
    let _ = io::stdout().flush();
    process::exit(1);
}

/// A second of the CPU's time, which a hang uses up however busy the machine is, and no core files.
fn limit() {
    for (resource, rlim_cur, rlim_max) in [(libc::RLIMIT_CPU, 1, 2), (libc::RLIMIT_CORE, 0, 0)] {
        let limit = libc::rlimit { rlim_cur, rlim_max };
        // SAFETY: it reads the limit, which is there.
        unsafe { libc::setrlimit(resource, &raw const limit) };
    }
}
