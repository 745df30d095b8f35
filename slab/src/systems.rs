//! Memory as other systems offer it, over a [`Heap`](crate::Heap): feature `systems`.
//!
//! | module | what | after |
//! |---|---|---|
//! | [`malloc`] | C's `malloc` and its kin | malloc(3), malloc_trim(3), mallinfo(3) |
//! | [`windows`] | heaps with handles | the Win32 reference, `heapapi.h` |
//! | [`zones`] | malloc zones | macOS's `malloc/malloc.h` |
//! | [`pages`] | pages of 2 MiB | BareMetal-OS, `os/syscalls/memory.asm` |
//!
//! Each module says what the original promises. The calls are methods of a type that knows the heap, so one kernel can have
//! several of a kind. For C there are functions with the names of the originals: a macro of each module makes them, such as
//! [`export_malloc!`](crate::export_malloc), and `include/kslab.h` has their prototypes.
//!
//! What the originals keep for each thread, `errno` and the last error, is kept where the embedder says.

pub mod malloc;
mod members;
// Its byte map is the embedder's, of atomics that models do not have.
#[cfg(not(models))]
pub mod pages;
pub mod windows;
pub mod zones;

#[cfg(all(test, not(models)))]
mod tests;
