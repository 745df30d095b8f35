//! Allocators that take their memory from the operating system, page by page as the arena does.

use super::peer;

peer!(
    /// What `malloc` is in most programs on Linux.
    Glibc, std::alloc::System, |_| {}
);

peer!(Mimalloc, mimalloc::MiMalloc, |_| {});

peer!(Snmalloc, snmalloc_rs::SnMalloc, |_| {});
