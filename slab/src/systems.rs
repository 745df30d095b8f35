//! Memory as other systems offer it, over a [`Heap`](crate::Heap): feature `systems`.
//!
//! | module | what | after |
//! |---|---|---|
//! | [`malloc`] | C's `malloc` and its kin | malloc(3), malloc_trim(3), mallinfo(3) |
//!
//! Each module says what the original promises. The calls have its names, and are methods of a type that knows the heap, so
//! that one kernel can have several of a kind; `slab/include/kslab.h` has the prototypes for C, and a macro of each module
//! makes the functions: [`export_malloc!`](crate::export_malloc) and so on.
//!
//! What the originals keep for each thread, `errno` and the last error, is kept where the embedder says.

pub mod malloc;
mod members;
pub mod pages;
pub mod windows;
pub mod zones;
