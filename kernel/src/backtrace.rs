//! The calls that are under way, by their frame pointers.
//!
//! `.cargo/config.toml` has every function keep one: where RBP points, the caller's RBP is saved, and above it the address to
//! return to. Only memory that stacks are in, and that is mapped, is read, and only upwards without a gap; an unmapped
//! page ends every stack. So nothing that RBP may hold makes this fault, and a walk never goes on into another stack.
//! There is no lock and no allocation.

use core::arch::asm;
use core::fmt;
use core::ptr;

use x86_64::VirtAddr;

use crate::{image, memory, stack, symbols};

/// Calls that a report shows, the innermost.
pub const SHOWN: usize = 16;

const PAGE: usize = 4096;

/// Bytes of a frame that are read.
const FRAME: usize = 16;

/// The addresses to return to, from the innermost call on. Where the kernel was entered it ends; and where it meets
/// something else than a frame. Where a trap was taken in the kernel, it goes on with the address of the instruction that
/// was interrupted, and 1; a function that had no frame yet, or no more, hides who called it.
#[derive(Debug, Clone)]
pub struct Backtrace {
    /// The address of the next frame: above the last one.
    frame: Option<usize>,
    /// All pages from the first frame's up to this address may be read; 0 before the first frame.
    checked: usize,
    rules: &'static Rules,
}

/// What memory holds, by the addresses of its pages.
#[derive(Debug)]
struct Rules {
    is_stack: fn(usize) -> bool,
    is_code: fn(usize) -> bool,
}

static KERNEL: Rules = Rules {
    is_stack: |page| {
        let address = VirtAddr::new_truncate(page as u64);
        address.as_u64() == page as u64 && stack::may_be_at(address) && memory::is_mapped(address)
    },
    is_code: |address| image::is_code(VirtAddr::new_truncate(address as u64)),
};

/// The calls that are under way: first the function that calls this, then its caller.
///
/// Each is the address to return to, as [`Call`] shows it.
#[inline(never)]
pub fn backtrace() -> Backtrace {
    callers()
}

/// Fills `addresses` from the start with what [`backtrace`] gives. How many there are.
#[inline(never)]
pub fn fill(addresses: &mut [usize]) -> usize {
    addresses.iter_mut().zip(callers()).map(|(place, address)| *place = address).count()
}

/// The same from where the allocator was called: without the calls within it, and within the libraries through which it was.
/// For the allocator's events: see [`kslab::fault::Backtrace`].
#[inline(never)]
pub(crate) fn fill_from_outside_the_allocator(addresses: &mut [usize]) {
    let inside = |&address: &usize| image::is_allocator(VirtAddr::new_truncate(address as u64));
    addresses.iter_mut().zip(callers().skip_while(inside)).for_each(|(place, address)| *place = address);
}

/// The callers of the function that this is inlined into, which must not be inlined itself.
#[inline(always)]
pub(crate) fn callers() -> Backtrace {
    let frame: usize;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) frame, options(nomem, nostack, preserves_flags)) };
    from_frame(frame)
}

/// The callers of the function whose frame is at `frame`, which may be anything.
pub(crate) fn from_frame(frame: usize) -> Backtrace {
    Backtrace { frame: Some(frame), checked: 0, rules: &KERNEL }
}

impl Iterator for Backtrace {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let frame = self.frame.take()?;
        if !self.may_read(frame) {
            return None;
        }
        // SAFETY: the memory is mapped and holds a stack: the one in use, or one that lies still. Nobody frees its memory.
        let [next, address] = unsafe { ptr::with_exposed_provenance::<[usize; 2]>(frame).read_volatile() };
        self.frame = Some(next).filter(|&next| next > frame);
        Some(address).filter(|&address| (self.rules.is_code)(address))
    }
}

impl Backtrace {
    /// Whether there is a frame's memory at `frame`, and no gap between the last one and it.
    fn may_read(&mut self, frame: usize) -> bool {
        let Some(end) = frame.checked_add(FRAME) else { return false };
        if !frame.is_multiple_of(size_of::<usize>()) {
            return false;
        }
        let first = if self.checked == 0 { frame / PAGE * PAGE } else { self.checked };
        for page in (first..end).step_by(PAGE) {
            if !(self.rules.is_stack)(page) {
                return false;
            }
            self.checked = page + PAGE;
        }
        true
    }
}

/// A line for each call, up to [`SHOWN`].
impl fmt::Display for Backtrace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.clone().take(SHOWN).try_for_each(|address| writeln!(f, "  at {}", Call(address)))
    }
}

/// A call, by the address to return to. It shows as that address, and the function that makes the call if it has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call(pub usize);

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)?;
        // A function may end with a call that does not return: what is behind it is another.
        let symbol = self.0.checked_sub(1).and_then(|inside| symbols::find(inside as u64));
        symbol.map_or(Ok(()), |symbol| write!(f, " {}", symbols::Symbol { offset: symbol.offset + 1, ..symbol }))
    }
}

/// An instruction, by its address. It shows as that, and the function that it is in if that has a name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Instruction(pub(crate) u64);

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)?;
        symbols::find(self.0).map_or(Ok(()), |symbol| write!(f, " {symbol}"))
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// Three pages; the last one is not to be read.
    #[repr(align(4096))]
    struct Pages([AtomicUsize; 3 * WORDS]);

    const WORDS: usize = PAGE / size_of::<usize>();
    const CODE: usize = 0x1000;

    macro_rules! walk {
        ($start:expr, $($at:expr => [$next:expr, $address:expr]),*) => {{
            static PAGES: Pages = Pages([const { AtomicUsize::new(0) }; 3 * WORDS]);
            fn address_of(word: usize) -> usize {
                PAGES.0.as_ptr().expose_provenance() + word * size_of::<usize>()
            }
            static RULES: Rules = Rules {
                is_stack: |page| (address_of(0)..address_of(2 * WORDS)).contains(&page),
                is_code: |address| (CODE..2 * CODE).contains(&address),
            };
            $(
                PAGES.0[$at].store($next(&address_of), Relaxed);
                PAGES.0[$at + 1].store($address, Relaxed);
            )*
            Backtrace { frame: Some($start(&address_of)), checked: 0, rules: &RULES }.collect::<Vec<_>>()
        }};
    }

    type AddressOf<'a> = &'a dyn Fn(usize) -> usize;

    fn to(word: usize) -> impl Fn(AddressOf) -> usize {
        move |address_of| address_of(word)
    }

    fn wild(address: usize) -> impl Fn(AddressOf) -> usize {
        move |_| address
    }

    #[test]
    fn frames_are_followed_to_the_entry() {
        let calls =
            walk!(to(2), 2 => [to(10), CODE], 10 => [to(WORDS + 4), CODE + 1], WORDS + 4 => [wild(0), CODE + 2]);
        assert_eq!(calls, [CODE, CODE + 1, CODE + 2]);
    }

    #[test]
    fn a_frame_may_cross_pages_but_not_leave_the_stack() {
        assert_eq!(walk!(to(WORDS - 1), WORDS - 1 => [wild(0), CODE]), [CODE]);
        assert_eq!(walk!(to(2 * WORDS - 1), 2 * WORDS - 1 => [wild(0), CODE]), []);
        assert_eq!(walk!(to(4), 4 => [to(2 * WORDS), CODE], 2 * WORDS => [wild(0), CODE]), [CODE]);
    }

    #[test]
    fn nothing_that_a_frame_pointer_holds_makes_it_fault_or_go_on_for_ever() {
        for address in [0, 1, 8, PAGE, usize::MAX, usize::MAX - 7, usize::MAX - 15, 1 << 63] {
            assert_eq!(walk!(wild(address),), [], "{address:#x}");
            let calls = walk!(to(2), 2 => [wild(address), CODE]);
            assert_eq!(calls, [CODE], "{address:#x}");
        }
        let misaligned = |address_of: AddressOf| address_of(20) + 4;
        assert_eq!(walk!(to(2), 2 => [misaligned, CODE], 20 => [wild(0), CODE]), [CODE]);
        let [itself, below] = [walk!(to(9), 9 => [to(9), CODE]), walk!(to(9), 9 => [to(3), CODE], 3 => [to(9), CODE])];
        assert_eq!([itself, below], [[CODE], [CODE]]);
    }

    #[test]
    fn what_is_no_code_ends_it() {
        assert_eq!(walk!(to(2), 2 => [to(4), CODE], 4 => [to(6), 7], 6 => [wild(0), CODE]), [CODE]);
    }

    #[test]
    fn a_call_without_a_name_is_an_address() {
        assert_eq!(Call(0xffff_ffff_8001_2345).to_string(), "0xffffffff80012345");
        assert_eq!(Call(0).to_string(), "0x0000000000000000");
        assert_eq!(Instruction(u64::MAX).to_string(), "0xffffffffffffffff");
    }
}
