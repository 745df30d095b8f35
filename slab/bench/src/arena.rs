//! The memory that the allocators get which do not take it from the operating system themselves.

use std::ptr;

/// What every arena is aligned to: the largest block of any allocator of page frames.
const ALIGNMENT: usize = 1 << 30;

/// Memory that nobody has touched yet, for the rest of the process.
#[derive(Debug, Clone, Copy)]
pub struct Arena {
    pub start: *mut u8,
    pub bytes: usize,
}

impl Arena {
    /// Addresses only: the operating system finds memory for each page when it is first touched.
    pub fn reserve(bytes: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever there is room.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), bytes + ALIGNMENT, access, flags, -1, 0) };
        assert!(mapping != libc::MAP_FAILED, "no room for {bytes} bytes");
        let mapping = mapping.cast::<u8>();
        Self { start: mapping.wrapping_add(mapping.align_offset(ALIGNMENT)), bytes }
    }

    pub fn end(&self) -> *mut u8 {
        self.start.wrapping_add(self.bytes)
    }
}

/// Pages are 4 KiB for the whole process: whether the kernel finds large ones is no matter of the allocator.
pub fn only_small_pages() {
    // SAFETY: changes nothing but how this process gets its memory.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
}

/// Bytes of memory that this process has to itself and has written to.
pub fn touched() -> usize {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").expect("a kernel that says how much memory is used");
    let kibibytes = text.lines().find_map(|line| line.strip_prefix("Anonymous:")?.trim().strip_suffix(" kB"));
    kibibytes.and_then(|count| count.parse::<usize>().ok()).expect("a count") << 10
}
