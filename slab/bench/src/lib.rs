//! kslab beside other allocators: the same work for each, in processes of their own.
//!
//! Fair means: each is a program's static behind `GlobalAlloc`; those that are given their memory get the same, which nobody
//! has touched, and those that take it from the operating system find it in the same state, in pages of 4 KiB; those that
//! need a lock have the same, which nobody else wants; all are compiled with the same profile, and the C++ ones as their
//! crates do it; an untimed pass comes before the timed one. What the harness itself takes is a row of its own.
//!
//! It is for Linux.

mod arena;
pub mod callgrind;
mod checked;
mod cli;
mod cpu;
mod measure;
mod peers;
mod plot;
mod results;
mod run;
mod table;
mod workloads;

pub use cli::main;
