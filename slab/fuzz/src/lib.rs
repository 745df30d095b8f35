//! Fuzzing of kslab: five targets, each a function of some bytes.
//!
//! | target | what it does |
//! |---|---|
//! | [`operations`] | everything that a heap and its caches do, on several CPUs and in NMIs, against a list of what is allocated |
//! | [`maps`] | any memory map, against a list of its frames |
//! | [`frames`] | page frames, against a table of them |
//! | [`layouts`] | any layout, and any other one after it |
//! | [`misuse`] | frees that cannot be right, between such as are: each must be refused, with the right report |
//!
//! `.ci/fuzz` builds them with libFuzzer, by a stable compiler, and runs them. Each has a small corpus in `corpus`, which
//! an ordinary `cargo test` runs too. To run an input that was found, without libFuzzer:
//!
//! ```text
//! cargo run --manifest-path slab/fuzz/Cargo.toml --bin maps -- FILE
//! ```
//!
//! Memory holds the same at the start of each run, and where it is does not matter, but for bad frees of pointers to
//! anywhere. So an input that fails does so again.

mod blocks;
mod frames;
mod layouts;
mod machine;
mod maps;
mod misuse;
mod operations;

pub use frames::frames;
pub use layouts::layouts;
pub use maps::maps;
pub use misuse::misuse;
pub use operations::operations;

/// The `main` of a target: libFuzzer's, or one that runs the files that it is given.
#[macro_export]
macro_rules! target {
    ($target:path) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|data: &[u8]| $target(data));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            std::env::args().skip(1).try_for_each(|file| {
                $target(&std::fs::read(file)?);
                Ok(())
            })
        }
    };
}

/// The steps that some bytes stand for.
fn decode<'a, T: arbitrary::Arbitrary<'a>>(data: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(arbitrary::Unstructured::new(data)).ok()
}

/// A size up to 64 KiB, small ones more often.
fn size(number: u16) -> usize {
    let (size, scale) = (usize::from(number & 0xfff), number >> 12);
    if scale & 8 == 0 { size >> scale } else { size << (scale - 8) >> 3 }
}
