//! Compares kslab with other allocators: `cargo bench --manifest-path slab/bench/Cargo.toml --bench compare -- --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    kslab_bench::main()
}
