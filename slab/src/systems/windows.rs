//! Windows' heaps, after the Win32 reference (`heapapi.h`).
//!
//! | call | promise |
//! |---|---|
//! | `HeapCreate(options, initial, maximum)` | sizes round up to pages; no maximum: it grows, else that is a hard cap, beside which the heap has 16 KiB and a 256th for its records, and where they take less for blocks; null and a last error where it fails |
//! | `HeapDestroy` | frees everything that is allocated from the heap; refuses the process's heap |
//! | `HeapAlloc(heap, flags, n)` | a block aligned to 16, of no bytes too; null where it fails, and no last error; on a capped heap always from 0x7FFF8 bytes on |
//! | `HeapReAlloc` | keeps the smaller of the two sizes; where it fails, the block stays as it is |
//! | `HeapFree` | nonzero where it succeeds; null is allowed |
//! | `HeapSize` | the size that was asked for, or `(SIZE_T)-1` |
//! | `HeapValidate` | one block, or with null the whole heap |
//! | `HeapWalk` | one block a call; what comes next is in the entry; in the end `ERROR_NO_MORE_ITEMS` |
//! | `GetProcessHeap` | a heap without a cap that is there from its first use on |
//!
//! Every heap is a heap within another ([`Heap::create_heap`]), so that it has its own page frames and is given back as a whole. The
//! size that was asked for is in the last word of each block.
//!
//! | flag | what it does here |
//! |---|---|
//! | [`NO_SERIALIZE`] | nothing: any CPU may use a heap at any time |
//! | [`GENERATE_EXCEPTIONS`] | calls the embedder with the exception's code; where that returns, so does the call, with null |
//! | [`ZERO_MEMORY`] | zeroes the block, or when it is resized the growth |
//! | [`REALLOC_IN_PLACE_ONLY`] | fails rather than moves |
//!
//! Flags that are given at creation apply to every call. A handle or a pointer that is none is refused, with
//! `ERROR_INVALID_HANDLE` or `ERROR_INVALID_PARAMETER`, and never dereferenced.
//!
//! Lock: that of the list of heaps; see `members`.

use core::alloc::Layout;
use core::ffi::c_void;
use core::fmt;
use core::ptr::{self, NonNull};

use super::members::{Members, commit};
use crate::Heap;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

/// A flag: the caller sees to it that calls do not overlap.
pub const NO_SERIALIZE: u32 = 1;
/// A flag: a failure is an exception.
pub const GENERATE_EXCEPTIONS: u32 = 4;
/// A flag: new bytes are zero.
pub const ZERO_MEMORY: u32 = 8;
/// A flag: the block must not move.
pub const REALLOC_IN_PLACE_ONLY: u32 = 0x10;

/// A last error: the handle is none, or that of the process's heap where that is refused.
pub const ERROR_INVALID_HANDLE: u32 = 6;
/// A last error: there is no memory.
pub const ERROR_NOT_ENOUGH_MEMORY: u32 = 8;
/// A last error: an argument is wrong.
pub const ERROR_INVALID_PARAMETER: u32 = 87;
/// A last error: the walk is over.
pub const ERROR_NO_MORE_ITEMS: u32 = 259;

/// The exception of [`GENERATE_EXCEPTIONS`] where there is no memory.
pub const STATUS_NO_MEMORY: u32 = 0xc000_0017;
/// The same where a pointer is none.
pub const STATUS_ACCESS_VIOLATION: u32 = 0xc000_0005;

/// A heap with a cap serves no request of so many bytes or more.
pub const CAPPED_LIMIT: usize = 0x7_fff8;

/// What the size of a block is when it has none.
pub const NO_SIZE: usize = usize::MAX;

/// In [`ProcessHeapEntry::flags`]: the block is allocated. There are no other entries.
pub const PROCESS_HEAP_ENTRY_BUSY: u16 = 4;

/// Every block is aligned to so many bytes.
const ALIGNMENT: usize = 16;
/// Bytes at the end of each block that hold its size.
const SIZE_WORD: usize = size_of::<usize>();

/// Bytes that a heap may have beyond its cap, for the records of its page frames and the like: one of a few pages would have
/// nothing to serve without.
const fn for_records(maximum: usize) -> usize {
    4 * FRAME_SIZE + maximum / 256
}

/// A heap's name: an address that is never dereferenced.
pub type Handle = *mut c_void;

/// `PROCESS_HEAP_ENTRY`: a block, and the state of a walk.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ProcessHeapEntry {
    /// `lpData`: where the block is; null to begin with.
    pub data: *mut c_void,
    /// `cbData`: the size that was asked for.
    pub size: u32,
    /// `cbOverhead`: what the block has beyond that, up to 255.
    pub overhead: u8,
    /// `iRegionIndex`: 0.
    pub region: u8,
    /// `wFlags`.
    pub flags: u16,
    /// `Block` and `Region`: 0.
    pub reserved: [u64; 3],
}

impl ProcessHeapEntry {
    /// To begin a walk with.
    pub const START: Self = Self { data: ptr::null_mut(), size: 0, overhead: 0, region: 0, flags: 0, reserved: [0; 3] };
}

/// Windows' heaps within a heap.
///
/// ```
/// # use kslab::{Heap, platform::NoInterrupts};
/// use kslab::systems::windows::{WindowsHeaps, ZERO_MEMORY};
///
/// static HEAP: Heap<NoInterrupts> = Heap::new();
/// static WINDOWS: WindowsHeaps<'static, NoInterrupts> =
///     WindowsHeaps::new(&HEAP, |error| eprintln!("last error: {error}"), |code| panic!("exception {code:#x}"));
/// # let mut memory = vec![0_u64; 512 * 256];
/// # // SAFETY: the buffer is nobody else's, and lives until the end.
/// # unsafe { HEAP.init_range(memory.as_mut_ptr().cast(), memory.len() * 8) }.unwrap();
///
/// let heap = WINDOWS.heap_create(0, 0, 256 << 10);
/// let block = WINDOWS.heap_alloc(heap, ZERO_MEMORY, 100);
/// assert_eq!(WINDOWS.heap_size(heap, 0, block), 100);
/// // SAFETY: nobody uses it any more.
/// assert!(unsafe { WINDOWS.heap_destroy(heap) });
/// ```
pub struct WindowsHeaps<'a, P: Platform> {
    heaps: Members<'a, P, Options>,
    set_last_error: fn(u32),
    raise: fn(u32),
}

/// How a heap was created.
struct Options {
    flags: u32,
    capped: bool,
}

type Member<'a, P> = super::members::Member<'a, P, Options>;

impl<'a, P: Platform> WindowsHeaps<'a, P> {
    /// Heaps within `parent`. `set_last_error` sets what `GetLastError` returns; `raise` is called with the code of an
    /// exception.
    pub const fn new(parent: &'a Heap<P>, set_last_error: fn(u32), raise: fn(u32)) -> Self {
        Self { heaps: Members::new(parent, "the list of Windows' heaps"), set_last_error, raise }
    }

    /// A heap with `initial` bytes from the start; null where it cannot be.
    pub fn heap_create(&self, options: u32, initial: usize, maximum: usize) -> Handle {
        match self.create(options, initial, maximum) {
            Ok(heap) => heap,
            Err(error) => self.fail(error, ptr::null_mut()),
        }
    }

    fn create(&self, options: u32, initial: usize, maximum: usize) -> Result<Handle, u32> {
        let pages = |bytes: usize| bytes.checked_next_multiple_of(FRAME_SIZE).ok_or(ERROR_NOT_ENOUGH_MEMORY);
        let (initial, maximum) = (pages(initial.max(1))?, pages(maximum)?);
        let capped = maximum > 0;
        if capped && initial > maximum {
            return Err(ERROR_INVALID_PARAMETER);
        }
        let limit = if capped { maximum.saturating_add(for_records(maximum)) } else { usize::MAX };
        let heap = self.heaps.parent().create_heap("windows heap", limit).map_err(|_| ERROR_NOT_ENOUGH_MEMORY)?;
        // Below a cap there must be room for frame records, too.
        if !commit(&heap, if capped { initial.min(maximum - maximum / 8) } else { initial }) {
            return Err(ERROR_NOT_ENOUGH_MEMORY);
        }
        let member = self.heaps.add(heap, Options { flags: options, capped }).ok_or(ERROR_NOT_ENOUGH_MEMORY)?;
        Ok(member.handle())
    }

    /// Ends a heap, and frees all that is allocated from it. `false` for what is none, and for the process's.
    ///
    /// # Safety
    ///
    /// Nobody uses the heap or anything that is allocated from it any more.
    pub unsafe fn heap_destroy(&self, heap: Handle) -> bool {
        // SAFETY: passed on to the caller.
        let destroyed = unsafe { self.heaps.destroy(heap, false) };
        if destroyed { true } else { self.fail(ERROR_INVALID_HANDLE, false) }
    }

    /// The heap that is always there; null where there is no memory for it.
    pub fn get_process_heap(&self) -> Handle {
        self.heaps.main(|| self.heap_create(0, 0, 0))
    }

    /// A block of `bytes` bytes.
    pub fn heap_alloc(&self, heap: Handle, flags: u32, bytes: usize) -> *mut c_void {
        let Some(member) = self.heaps.find(heap) else { return self.raise(flags, STATUS_ACCESS_VIOLATION) };
        let flags = flags | member.own.flags;
        match member.allocate(bytes) {
            Some(block) => {
                if flags & ZERO_MEMORY != 0 {
                    // SAFETY: just allocated, with so many bytes.
                    unsafe { block.write_bytes(0, bytes) };
                }
                block.as_ptr().cast()
            }
            None => self.raise(flags, STATUS_NO_MEMORY),
        }
    }

    /// Makes the block one of `bytes` bytes, elsewhere where it must be.
    ///
    /// # Safety
    ///
    /// The block is no longer valid where this returns another.
    pub unsafe fn heap_realloc(&self, heap: Handle, flags: u32, block: *mut c_void, bytes: usize) -> *mut c_void {
        let member = self.heaps.find(heap);
        let found = member.zip(NonNull::new(block.cast::<u8>()));
        let found = found.and_then(|(member, block)| Some((member, block, member.size_of(block.as_ptr())?)));
        let Some((member, block, old)) = found else {
            (self.set_last_error)(ERROR_INVALID_PARAMETER);
            return self.raise(flags | member.map_or(0, |member| member.own.flags), STATUS_ACCESS_VIOLATION);
        };
        let flags = flags | member.own.flags;
        // SAFETY: passed on to the caller.
        let resized = unsafe { member.resize(block, old, bytes, flags & REALLOC_IN_PLACE_ONLY != 0) };
        let Some(resized) = resized else { return self.raise(flags, STATUS_NO_MEMORY) };
        if flags & ZERO_MEMORY != 0 && bytes > old {
            // SAFETY: the growth of a block that now has so many bytes.
            unsafe { resized.add(old).write_bytes(0, bytes - old) };
        }
        resized.as_ptr().cast()
    }

    /// Frees a block; `false` for what is none.
    ///
    /// # Safety
    ///
    /// Nobody uses the block any more.
    pub unsafe fn heap_free(&self, heap: Handle, _flags: u32, block: *mut c_void) -> bool {
        let Some(member) = self.heaps.find(heap) else { return self.fail(ERROR_INVALID_HANDLE, false) };
        let Some(block) = NonNull::new(block.cast()) else { return true };
        // SAFETY: passed on to the caller.
        match unsafe { member.heap.try_free_block(block) } {
            Ok(()) => true,
            Err(_) => self.fail(ERROR_INVALID_PARAMETER, false),
        }
    }

    /// Bytes that the block was asked for with; [`NO_SIZE`] for what is none.
    pub fn heap_size(&self, heap: Handle, _flags: u32, block: *const c_void) -> usize {
        self.heaps.find(heap).and_then(|member| member.size_of(block.cast())).unwrap_or(NO_SIZE)
    }

    /// Whether the block is one and its size is as it was written; with null, whether the whole heap is as it must be.
    pub fn heap_validate(&self, heap: Handle, _flags: u32, block: *const c_void) -> bool {
        let Some(member) = self.heaps.find(heap) else { return false };
        if !block.is_null() {
            return member.size_of(block.cast()).is_some();
        }
        member.heap.verify().is_ok() && member.blocks().all(|block| member.size_of(block.as_ptr()).is_some())
    }

    /// Fills `entry` with the block behind that which it has; `false` behind the last. No call may change the heap meanwhile.
    ///
    /// As many blocks as there are may be allocated between two calls, but none of them is found for sure.
    pub fn heap_walk(&self, heap: Handle, entry: &mut ProcessHeapEntry) -> bool {
        let Some(member) = self.heaps.find(heap) else { return self.fail(ERROR_INVALID_HANDLE, false) };
        let Some(block) = member.heap.block_after(NonNull::new(entry.data.cast())) else {
            return self.fail(ERROR_NO_MORE_ITEMS, false);
        };
        let usable = member.heap.block_size(block.as_ptr()).unwrap_or(0);
        let size = member.size_of(block.as_ptr()).unwrap_or(usable);
        *entry = ProcessHeapEntry {
            data: block.as_ptr().cast(),
            size: u32::try_from(size).unwrap_or(u32::MAX),
            overhead: u8::try_from(usable - size).unwrap_or(u8::MAX),
            flags: PROCESS_HEAP_ENTRY_BUSY,
            ..ProcessHeapEntry::START
        };
        true
    }

    fn fail<T>(&self, error: u32, result: T) -> T {
        (self.set_last_error)(error);
        result
    }

    fn raise(&self, flags: u32, code: u32) -> *mut c_void {
        if flags & GENERATE_EXCEPTIONS != 0 {
            (self.raise)(code);
        }
        ptr::null_mut()
    }
}

impl<P: Platform> Member<'_, P> {
    fn layout(&self, bytes: usize) -> Option<Layout> {
        if self.own.capped && bytes >= CAPPED_LIMIT {
            return None;
        }
        Layout::from_size_align(bytes.checked_add(SIZE_WORD)?, ALIGNMENT).ok()
    }

    fn allocate(&self, bytes: usize) -> Option<NonNull<u8>> {
        let block = self.heap.allocate(self.layout(bytes)?)?;
        self.write_size(block, bytes);
        Some(block)
    }

    fn blocks(&self) -> impl Iterator<Item = NonNull<u8>> {
        core::iter::successors(self.heap.block_after(None), |block| self.heap.block_after(Some(*block)))
    }

    /// Where the size of a block is, not aligned where the block has checks.
    fn size_word(&self, block: *const u8) -> Option<(*mut usize, usize)> {
        let most = self.heap.block_size(block)?.checked_sub(SIZE_WORD)?;
        Some((block.cast_mut().wrapping_add(most).cast(), most))
    }

    /// Mixed with where it is, so that what is written over is seldom a size.
    fn write_size(&self, block: NonNull<u8>, bytes: usize) {
        if let Some((word, _)) = self.size_word(block.as_ptr()) {
            // SAFETY: the last bytes of the block, which its owner does not use.
            unsafe { word.write_unaligned(bytes ^ mix(block.addr().get())) };
        }
    }

    /// The size of a block; `None` for what is none, or whose size was written over.
    fn size_of(&self, block: *const u8) -> Option<usize> {
        let (word, most) = self.size_word(block)?;
        // SAFETY: the last bytes of a block that is allocated, which `write_size` has written.
        let bytes = unsafe { word.read_unaligned() } ^ mix(block.addr());
        (bytes <= most).then_some(bytes)
    }

    /// # Safety
    ///
    /// It is a block of `old` bytes, and what is cut off of it, or all of it where it moves, is used no more.
    unsafe fn resize(&self, block: NonNull<u8>, old: usize, bytes: usize, in_place: bool) -> Option<NonNull<u8>> {
        let layout = self.layout(bytes)?;
        // SAFETY: passed on to the caller.
        let resized = unsafe { self.heap.resize_block(block, layout) } == Ok(true);
        if resized || in_place && bytes <= old {
            self.write_size(block, bytes);
            return Some(block);
        }
        if in_place {
            return None;
        }
        let moved = self.allocate(bytes)?;
        // SAFETY: the blocks are distinct, and both have the smaller of the two sizes.
        unsafe { ptr::copy_nonoverlapping(block.as_ptr(), moved.as_ptr(), old.min(bytes)) };
        // SAFETY: the caller gives it up for the new one.
        unsafe { self.heap.free_block(block) };
        Some(moved)
    }
}

const fn mix(address: usize) -> usize {
    (address ^ 0x5bd1_e995_9d1c_a3f7).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl<P: Platform> fmt::Debug for WindowsHeaps<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WindowsHeaps").finish_non_exhaustive()
    }
}

/// Makes the functions that C calls, `HeapCreate` and the others, for a [`WindowsHeaps`] that is a `static`.
///
/// ```ignore
/// static WINDOWS: WindowsHeaps<'static, MyCpus> = WindowsHeaps::new(&HEAP, set_last_error, raise);
/// kslab::export_windows_heaps!(WINDOWS);
/// ```
#[macro_export]
macro_rules! export_windows_heaps {
    ($heaps:path) => {
        #[allow(non_snake_case, reason = "these are the names")]
        const _: () = {
            use ::core::ffi::{c_int, c_void};
            use $crate::systems::windows::{Handle, ProcessHeapEntry};

            #[unsafe(no_mangle)]
            extern "system" fn HeapCreate(options: u32, initial: usize, maximum: usize) -> Handle {
                $heaps.heap_create(options, initial, maximum)
            }
            #[unsafe(no_mangle)]
            unsafe extern "system" fn HeapDestroy(heap: Handle) -> c_int {
                // SAFETY: passed on to the caller, here and below.
                unsafe { $heaps.heap_destroy(heap) }.into()
            }
            #[unsafe(no_mangle)]
            extern "system" fn GetProcessHeap() -> Handle {
                $heaps.get_process_heap()
            }
            #[unsafe(no_mangle)]
            extern "system" fn HeapAlloc(heap: Handle, flags: u32, bytes: usize) -> *mut c_void {
                $heaps.heap_alloc(heap, flags, bytes)
            }
            #[unsafe(no_mangle)]
            unsafe extern "system" fn HeapReAlloc(
                heap: Handle,
                flags: u32,
                block: *mut c_void,
                bytes: usize,
            ) -> *mut c_void {
                // SAFETY: as above.
                unsafe { $heaps.heap_realloc(heap, flags, block, bytes) }
            }
            #[unsafe(no_mangle)]
            unsafe extern "system" fn HeapFree(heap: Handle, flags: u32, block: *mut c_void) -> c_int {
                // SAFETY: as above.
                unsafe { $heaps.heap_free(heap, flags, block) }.into()
            }
            #[unsafe(no_mangle)]
            extern "system" fn HeapSize(heap: Handle, flags: u32, block: *const c_void) -> usize {
                $heaps.heap_size(heap, flags, block)
            }
            #[unsafe(no_mangle)]
            extern "system" fn HeapValidate(heap: Handle, flags: u32, block: *const c_void) -> c_int {
                $heaps.heap_validate(heap, flags, block).into()
            }
            #[unsafe(no_mangle)]
            unsafe extern "system" fn HeapWalk(heap: Handle, entry: *mut ProcessHeapEntry) -> c_int {
                // SAFETY: the caller's own, or null.
                unsafe { entry.as_mut() }.is_some_and(|entry| $heaps.heap_walk(heap, entry)).into()
            }
        };
    };
}

#[cfg(test)]
mod tests;
