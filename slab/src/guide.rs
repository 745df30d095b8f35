//! Walks through the crate and its kernel, for students.

#[doc = include_str!("guide/from_brk_to_slabs.md")]
pub mod from_brk_to_slabs {}
