//! The room of an object with checks: what is beside it in its slot.
//!
//! ```text
//! | red zone | object, as many bytes as were asked for | red zone | tag |
//! | left     | size                                              |
//! ```
//!
//! Bytes of the patterns follow the address, so that a word that is read at an aligned address is the pattern.
//!
//! Invariant: a slot is written here only by who has taken it from its slab, and not handed it out yet, or has claimed it
//! from its user.

use core::alloc::Layout;
use core::ops::Range;
use core::panic::Location;

use super::Checks;
use crate::fault::{ADDRESSES, Damage, Event};
use crate::memory::FRAME_SIZE;
use crate::sync::Ordering::{AcqRel, Acquire, Relaxed, Release};
use crate::sync::{AtomicPtr, AtomicUsize};

/// Red zones: `0xfeedface`.
const RED: u32 = 0xfeed_face;
/// Memory that nobody has written yet: `0xbaddcafe`.
const RAW: u32 = 0xbadd_cafe;
/// Memory that was freed: `0xdeadbeef`.
const FREED: u32 = 0xdead_beef;

/// The smallest red zone on the left, and on the right behind the largest object.
const LEFT: usize = 16;
const RIGHT: usize = 16;

/// Bytes that red zones and tag take beside an object; its alignment may take more.
pub const ROOM: usize = LEFT + RIGHT + size_of::<Kept>();

/// How the slots of a cache are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Bytes before the object.
    pub(crate) left: usize,
    /// Bytes that the largest object has.
    pub(crate) size: usize,
    /// Bytes behind it.
    right: usize,
}

/// What is known of the slot's last user.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tag {
    /// Size and alignment that were asked for, in bytes.
    pub(crate) requested: (usize, usize),
    /// Those in force when it was written last.
    pub(crate) checks: Checks,
    /// Nobody has it.
    pub(crate) is_free: bool,
    /// Known with [`Checks::AUDIT`].
    pub(crate) allocated: Option<Event>,
    pub(crate) freed: Option<Event>,
}

/// A tag in memory. Its fields are atomic, so that a report may look at the tag of a slot which is somebody else's; the
/// seal says whether it saw all of one.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Kept {
    /// Of everything below, and where it is.
    seal: AtomicUsize,
    size: AtomicUsize,
    align: AtomicUsize,
    /// And above the checks, whether it is free.
    checks: AtomicUsize,
    events: [KeptEvent; 2],
}

#[derive(Debug)]
#[repr(C)]
pub(super) struct KeptEvent {
    /// 0 where there is none.
    sequence: AtomicUsize,
    cpu: AtomicUsize,
    location: AtomicPtr<Location<'static>>,
    addresses: [AtomicUsize; ADDRESSES],
}

const IS_FREE: usize = 1 << 16;

impl Kept {
    /// No tag.
    pub(super) const fn none() -> Self {
        let [size, align, checks] = [const { AtomicUsize::new(0) }; 3];
        Self { seal: AtomicUsize::new(0), size, align, checks, events: [const { KeptEvent::none() }; 2] }
    }

    fn write(&self, tag: &Tag) {
        let (size, align) = tag.requested;
        self.size.store(size, Relaxed);
        self.align.store(align, Relaxed);
        self.checks.store(usize::from(tag.checks.bits()) | if tag.is_free { IS_FREE } else { 0 }, Relaxed);
        self.events[0].write(tag.allocated);
        self.events[1].write(tag.freed);
        self.seal.store(self.compute_seal(), Relaxed);
    }

    /// `None` where it is not as it was written.
    pub(super) fn read(&self) -> Option<Tag> {
        let read = || {
            let checks = self.checks.load(Relaxed);
            Tag {
                requested: (self.size.load(Relaxed), self.align.load(Relaxed)),
                checks: Checks::from_bits(checks as u16),
                is_free: checks & IS_FREE != 0,
                // SAFETY: only used below where the seal is right.
                allocated: unsafe { self.events[0].read() },
                // SAFETY: as above.
                freed: unsafe { self.events[1].read() },
            }
        };
        (self.seal.load(Relaxed) == self.compute_seal()).then(read)
    }

    fn compute_seal(&self) -> usize {
        let own = [core::ptr::from_ref(self).addr(), self.size.load(Relaxed), self.align.load(Relaxed)];
        let words = own.into_iter().chain([self.checks.load(Relaxed)]);
        let words = words.chain(self.events[0].words()).chain(self.events[1].words());
        // FNV-1a by words: against accidents, not against an attacker, who could compute it too.
        words.fold(0xcbf2_9ce4_8422_2325, |seal: usize, word| {
            (seal ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(17)
        })
    }
}

impl KeptEvent {
    /// No event.
    pub(super) const fn none() -> Self {
        Self {
            sequence: AtomicUsize::new(0),
            cpu: AtomicUsize::new(0),
            location: AtomicPtr::new(core::ptr::null_mut()),
            addresses: [const { AtomicUsize::new(0) }; ADDRESSES],
        }
    }

    /// The number of the event.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence.load(Acquire) as u64
    }

    /// Another event will be written.
    pub(super) fn begin(&self) {
        self.sequence.swap(0, AcqRel);
    }

    pub(super) fn write(&self, event: Option<Event>) {
        let event = event.unwrap_or_default();
        self.cpu.store(event.cpu, Relaxed);
        let location =
            event.location.map_or(core::ptr::null_mut(), |location| core::ptr::from_ref(location).cast_mut());
        self.location.store(location, Relaxed);
        self.addresses.iter().zip(event.addresses).for_each(|(kept, address)| kept.store(address, Relaxed));
        self.sequence.store(event.sequence as usize, Release);
    }

    /// # Safety
    ///
    /// [`write`](Self::write) has written it, and nobody has since.
    pub(super) unsafe fn read(&self) -> Option<Event> {
        let sequence = self.sequence();
        // SAFETY: null, or from a reference, says the caller.
        let location = unsafe { self.location.load(Acquire).as_ref() };
        let addresses = self.addresses.each_ref().map(|address| address.load(Acquire));
        (sequence > 0).then(|| Event { sequence, cpu: self.cpu.load(Acquire), location, addresses })
    }

    fn words(&self) -> impl Iterator<Item = usize> {
        let own = [self.sequence.load(Relaxed), self.cpu.load(Relaxed), self.location.load(Relaxed).addr()];
        own.into_iter().chain(self.addresses.iter().map(|address| address.load(Relaxed)))
    }
}

impl Room {
    /// The room for objects of this layout, and the layout of their slots.
    pub(crate) fn of(object: Layout) -> Option<(Self, Layout)> {
        let left = LEFT.max(object.align());
        let size = object.size().checked_next_multiple_of(align_of::<Kept>())?;
        let slot =
            Layout::from_size_align(left + size + RIGHT + size_of::<Kept>(), object.align().max(align_of::<Kept>()));
        Some((Self { left, size, right: RIGHT }, slot.ok()?))
    }

    /// The room of an object of this layout at the end of as few pages as hold it, whose tag is elsewhere.
    pub(super) fn at_the_end_of_pages(object: Layout) -> Option<Self> {
        let size = object.size().max(1).checked_next_multiple_of(object.align())?;
        Some(Self { left: size.checked_next_multiple_of(FRAME_SIZE)? - size, size, right: 0 })
    }

    /// Bytes of the slot, less its tag.
    pub(super) fn bytes(self) -> usize {
        self.left + self.size + self.right
    }

    /// The slot whose object is at `object`.
    pub(crate) fn slot_of(self, object: *mut u8) -> *mut u8 {
        object.wrapping_sub(self.left)
    }

    /// The slot at `slot`, to look at and to write.
    ///
    /// # Safety
    ///
    /// It is one of a cache with this room, and not freed as long as this is used. To look at its bytes or change them, it
    /// must be the caller's alone, but for what the user of a dangling pointer writes; its tag may be read by anybody.
    pub(crate) unsafe fn slot(self, slot: *mut u8) -> Slot {
        Slot { room: self, start: slot, kept: slot.wrapping_add(self.bytes()).cast() }
    }

    /// The same with a tag that is not behind the slot.
    ///
    /// # Safety
    ///
    /// As [`slot`](Self::slot); and the tag is there as long as this is used.
    pub(super) unsafe fn slot_with(self, slot: *mut u8, tag: &Kept) -> Slot {
        Slot { room: self, start: slot, kept: tag }
    }
}

/// A slot that the caller has for itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    room: Room,
    start: *mut u8,
    kept: *const Kept,
}

impl Slot {
    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    pub(crate) fn object(&self) -> *mut u8 {
        self.start.wrapping_add(self.room.left)
    }

    /// Bytes that the largest object in it has.
    pub(crate) fn size(&self) -> usize {
        self.room.size
    }

    /// Those of the slot, less its tag.
    pub(crate) fn addresses(&self) -> Range<usize> {
        self.start.addr()..self.start.addr() + self.room.bytes()
    }

    fn kept(&self) -> &Kept {
        // SAFETY: the tag is in the slot, aligned, or elsewhere: who made this says that it is there. All its fields are
        // atomic, and take any value.
        unsafe { &*self.kept }
    }

    pub(crate) fn write_tag(&self, tag: &Tag) {
        self.kept().write(tag);
    }

    /// The tag, if it is as it was written.
    pub(crate) fn tag(&self) -> Option<Tag> {
        self.kept().read()
    }

    /// Whether it is still divided so: a guarded object's is for each anew. Whoever has claimed it asks before it is used.
    pub(crate) fn is_current(&self) -> bool {
        let room_now = || {
            let (size, align) = self.tag()?.requested;
            Room::at_the_end_of_pages(Layout::from_size_align(size, align).ok()?)
        };
        self.room.right > 0 || room_now() == Some(self.room)
    }

    /// Fills a slot that has never been used, so that all of it is initialised.
    pub(crate) fn initialise(&self) {
        self.fill(self.start, self.room.bytes() + size_of::<Kept>(), 0);
    }

    /// Fills an object that has never been used.
    pub(super) fn initialise_object(&self) {
        self.fill(self.object(), self.room.size, 0);
    }

    /// Makes the room around an object of `size` bytes red.
    pub(crate) fn paint_red_zones(&self, size: usize) {
        self.fill(self.start, self.room.left, RED);
        self.fill(self.object().wrapping_add(size), self.room.size + self.room.right - size, RED);
    }

    /// Fills an object of `size` bytes that is being allocated.
    pub(crate) fn fill_new(&self, size: usize, checks: Checks) {
        if checks.contains(Checks::ZERO) {
            self.fill(self.object(), size, 0);
        } else if checks.contains(Checks::POISON) {
            self.fill(self.object(), size, RAW);
        }
    }

    /// Fills an object that is being freed.
    pub(crate) fn fill_freed(&self, checks: Checks) {
        if let Some(pattern) = free_pattern(checks) {
            self.fill(self.object(), self.room.size, pattern);
        }
    }

    /// What was overwritten beside an object that was allocated with `size` bytes.
    pub(crate) fn damage_beside(&self, size: usize) -> Option<Damage> {
        let left = self.find_damage(-(self.room.left as isize), self.room.left, RED);
        left.or_else(|| self.find_damage(size as isize, self.room.size + self.room.right - size, RED))
    }

    /// The same for one that was freed.
    pub(crate) fn damage_beside_free(&self) -> Option<Damage> {
        self.damage_beside(self.room.size)
    }

    /// What was overwritten of an object since it was freed with these checks.
    pub(crate) fn damage_while_free(&self, checks: Checks) -> Option<Damage> {
        self.find_damage(0, self.room.size, free_pattern(checks)?)
    }

    fn fill(&self, start: *mut u8, bytes: usize, pattern: u32) {
        let block = block_at(start.addr(), pattern);
        for offset in (0..bytes).step_by(BLOCK) {
            // SAFETY: the callers name parts of the slot, which is ours.
            unsafe { start.add(offset).copy_from_nonoverlapping(block.as_ptr(), BLOCK.min(bytes - offset)) };
        }
    }

    /// The first of `bytes` bytes from `offset` on that is not as the pattern has it.
    fn find_damage(&self, offset: isize, bytes: usize, pattern: u32) -> Option<Damage> {
        let start = self.object().wrapping_offset(offset);
        // SAFETY: a part of the slot, which is initialised, and which nobody writes but the user of a dangling pointer.
        let found = unsafe { core::slice::from_raw_parts(start, bytes) };
        let expected = block_at(start.addr(), pattern);
        let block = found.chunks(BLOCK).position(|block| *block != expected[..block.len()])? * BLOCK;
        let at = block + found[block..].iter().zip(expected).position(|(byte, expected)| *byte != expected)?;
        Some(Damage::new(found, offset, at, expected[at - block]))
    }
}

/// What fills an object that is free; `None` where it stays as it is.
fn free_pattern(checks: Checks) -> Option<u32> {
    if checks.contains(Checks::ZERO_FREED) {
        return Some(0);
    }
    checks.contains(Checks::POISON).then_some(FREED)
}

/// So many bytes are written and compared at a time, a multiple of the pattern's four.
const BLOCK: usize = 64;

/// The bytes of the pattern from an address on.
fn block_at(address: usize, pattern: u32) -> [u8; BLOCK] {
    let bytes = pattern.to_le_bytes();
    core::array::from_fn(|index| bytes[(address + index) % 4])
}
