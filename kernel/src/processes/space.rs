//! The address space of a process: what is mapped, its pages, and the calls that change it.
//!
//! The thread of the process is the only one that has it, so there is no lock. A page gets its frame, zeroed, when it is
//! first used, or at once where memory is backed eagerly and it is not the stack's; it lies in a mapping as long as it has one.
//!
//! What the calls owe is in brk(2) and mmap(2) of the Linux manual pages. Of the two, [`brk`](Space::brk) is here as the system
//! call is, which returns the break: -1 and ENOMEM come from the C library.

#![forbid(unsafe_code)]

use core::ops::Range;

use kslab::memory::FRAME_SIZE;
use x86_64::structures::paging::PageTableFlags;

use super::Memory;
use super::errno::Errno;
use super::mappings::{Kind, Mapping, Mappings, Protection, TooMany};
use crate::memory::{OutOfMemory, UserTables};

pub(super) const PAGE: u64 = FRAME_SIZE as u64;

/// The lowest address that can be mapped, so that a null pointer faults; Linux' default of vm.mmap_min_addr.
pub(super) const START: u64 = 0x1_0000;

/// Addresses from here on are not those of a 32-bit program, and no call maps them: as on i386.
pub(super) const END: u64 = 0xc000_0000;

/// The stack, of 8 MiB: Linux' default of RLIMIT_STACK. Its pages get their frames when they are first used, always.
pub(super) const STACK: Range<u64> = END - PAGE - (8 << 20)..END - PAGE;

/// What no call maps unless it is told to: a stack that overflows faults.
const GUARD: u64 = 64 << 10;

/// The address space of a process.
#[derive(Debug)]
pub(super) struct Space {
    tables: UserTables,
    mappings: Mappings,
    /// Of what lies below the break.
    addresses: Range<u64>,
    eager: bool,
    /// Bytes that may be mapped.
    limit: u64,
}

/// What `mmap2` is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRequest {
    /// Where, or near which address.
    pub address: u32,
    /// Bytes.
    pub length: u32,
    /// The bits of [`Protection`].
    pub protection: u32,
    /// The flags of mmap(2), whose numbers are here: [`MapRequest::ANONYMOUS`] and the others.
    pub flags: u32,
    /// A file.
    pub descriptor: i32,
    /// Pages from its start on.
    pub offset: u32,
}

impl MapRequest {
    /// MAP_SHARED: processes that have the mapping share it. Here none has a child, so that it is as the other.
    pub const SHARED: u32 = 1;
    /// MAP_PRIVATE.
    pub const PRIVATE: u32 = 2;
    /// The bits of which just one of the two has to be set.
    const TYPE: u32 = 0xf;
    /// MAP_FIXED: at that address, in place of what is there.
    pub const FIXED: u32 = 0x10;
    /// MAP_ANONYMOUS: of no file.
    pub const ANONYMOUS: u32 = 0x20;
    /// MAP_FIXED_NOREPLACE: at that address, or not at all.
    pub const FIXED_NOREPLACE: u32 = 0x10_0000;

    /// Its length in whole pages.
    ///
    /// # Errors
    ///
    /// As do_mmap() of Linux has them before it looks at the address.
    fn pages(&self) -> Result<u64, Errno> {
        if self.flags & Self::ANONYMOUS == 0 {
            return Err(Errno::Ebadf);
        }
        let length = u64::from(self.length).next_multiple_of(PAGE);
        match length {
            0 => Err(Errno::Einval),
            _ if length > u64::from(u32::MAX) => Err(Errno::Enomem),
            _ if u64::from(self.offset) + length / PAGE > u64::from(u32::MAX) => Err(Errno::Eoverflow),
            _ if length > END => Err(Errno::Enomem),
            _ => Ok(length),
        }
    }

    fn is_fixed(&self) -> bool {
        self.flags & (Self::FIXED | Self::FIXED_NOREPLACE) != 0
    }
}

/// Why memory of a process cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Nothing is mapped there.
    NotMapped,
    /// The mapping does not allow it.
    Protected(Mapping),
    /// There is no page frame for it.
    OutOfMemory(Mapping),
}

impl From<TooMany> for Errno {
    fn from(_: TooMany) -> Self {
        Self::Enomem
    }
}

impl From<OutOfMemory> for Errno {
    fn from(_: OutOfMemory) -> Self {
        Self::Enomem
    }
}

impl Space {
    /// One in which nothing is mapped, and `limit` bytes may be.
    pub(super) fn new(eager: bool, limit: u64) -> Result<Self, Errno> {
        let mappings = Mappings::new()?;
        Ok(Self { tables: UserTables::new()?, mappings, addresses: START..START, eager, limit })
    }

    /// The page tables.
    pub(super) fn tables(&self) -> &UserTables {
        &self.tables
    }

    /// Has the break start, and be, at `address`.
    pub(super) fn start_break(&mut self, address: u64) {
        self.addresses = address..address;
    }

    /// What it comes to.
    pub(super) fn memory(&self) -> Memory {
        Memory {
            program_break: self.addresses.end,
            mappings: self.mappings.count(),
            resident: self.tables.resident() as u64 * PAGE,
            reserved: self.mappings.bytes(),
        }
    }

    /// The mapping that `address` is in.
    pub(super) fn mapping_at(&self, address: u64) -> Option<Mapping> {
        self.mappings.at(address).copied()
    }

    /// Whether something is mapped there.
    pub(super) fn is_mapped(&self, addresses: &Range<u64>) -> bool {
        !self.mappings.in_range(addresses).is_empty()
    }

    /// Maps addresses that are free. Where that cannot be, nothing has changed.
    pub(super) fn map_new(&mut self, mapping: Mapping) -> Result<(), Errno> {
        let addresses = mapping.addresses();
        if self.mappings.bytes() + (mapping.end - mapping.start) > self.limit {
            return Err(Errno::Enomem);
        }
        self.mappings.insert(mapping)?;
        if !self.eager || !mapping.protection.is_readable() || mapping.kind == Kind::Stack {
            return Ok(());
        }
        let mut pages = addresses.clone().step_by(FRAME_SIZE);
        let mapped = pages.try_for_each(|page| self.tables.map(page, flags(mapping.protection)));
        if mapped.is_err() {
            self.remove(addresses)?;
        }
        Ok(mapped?)
    }

    /// Has nothing be mapped at these addresses, both page-aligned.
    fn remove(&mut self, addresses: Range<u64>) -> Result<(), TooMany> {
        self.mappings.remove(&addresses)?;
        self.tables.unmap(addresses);
        Ok(())
    }

    /// `brk(to)`: the new break, or the one that stays where `to` cannot be it.
    pub(super) fn brk(&mut self, to: u32) -> u64 {
        let to = u64::from(to);
        let now = self.addresses.end;
        if to < self.addresses.start || to > END {
            return now;
        }
        let [old, new] = [now, to].map(|address| address.next_multiple_of(PAGE));
        let changed = if new > old { self.grow_break(old..new) } else { self.remove(new..old).map_err(Errno::from) };
        if changed.is_ok() {
            // What the program has left behind the break in its last page.
            self.zero_break(now..to.min(old));
            self.addresses.end = to;
        }
        self.addresses.end
    }

    fn grow_break(&mut self, addresses: Range<u64>) -> Result<(), Errno> {
        if self.is_mapped(&addresses) {
            return Err(Errno::Enomem);
        }
        let Range { start, end } = addresses;
        self.map_new(Mapping { start, end, protection: Protection::DATA, kind: Kind::Break })
    }

    /// Writes zeroes to bytes of a page below the break, if it has a frame.
    fn zero_break(&mut self, bytes: Range<u64>) {
        let is_ours = self.mapping_at(bytes.start).is_some_and(|mapping| mapping.kind == Kind::Break);
        if is_ours && !bytes.is_empty() {
            self.tables.fill(bytes, 0);
        }
    }

    /// `mmap2`: the address.
    pub(super) fn mmap(&mut self, request: &MapRequest) -> Result<u64, Errno> {
        let length = request.pages()?;
        let start = if request.is_fixed() { self.fixed(request, length)? } else { self.find(request, length)? };
        if ![MapRequest::SHARED, MapRequest::PRIVATE].contains(&(request.flags & MapRequest::TYPE)) {
            return Err(Errno::Einval);
        }
        let end = start + length;
        if self.mappings.bytes() - self.mappings.bytes_in(&(start..end)) + length > self.limit {
            return Err(Errno::Enomem);
        }
        self.mappings.make_room()?;
        self.remove(start..end)?;
        let protection = Protection::from_bits(request.protection);
        self.map_new(Mapping { start, end, protection, kind: Kind::Anonymous })?;
        Ok(start)
    }

    /// The address that has to be.
    fn fixed(&self, request: &MapRequest, length: u64) -> Result<u64, Errno> {
        let start = u64::from(request.address);
        match start {
            _ if start > END - length => Err(Errno::Enomem),
            _ if !start.is_multiple_of(PAGE) => Err(Errno::Einval),
            _ if start < START => Err(Errno::Eperm),
            _ if request.flags & MapRequest::FIXED_NOREPLACE != 0 && self.is_mapped(&(start..start + length)) => {
                Err(Errno::Eexist)
            }
            _ => Ok(start),
        }
    }

    /// The page of the address that is asked for, where that is free, or else the highest.
    fn find(&self, request: &MapRequest, length: u64) -> Result<u64, Errno> {
        let wanted = u64::from(request.address) / PAGE * PAGE;
        if wanted >= START && wanted <= END - length && !self.is_mapped(&(wanted..wanted + length)) {
            return Ok(wanted);
        }
        self.mappings.highest_gap(length, START..STACK.start - GUARD).ok_or(Errno::Enomem)
    }

    /// `munmap(address, length)`.
    pub(super) fn munmap(&mut self, address: u32, length: u32) -> Result<(), Errno> {
        let (start, length) = (u64::from(address), u64::from(length).next_multiple_of(PAGE));
        if !start.is_multiple_of(PAGE) || length == 0 || start > END || length > END - start {
            return Err(Errno::Einval);
        }
        Ok(self.remove(start..start + length)?)
    }

    /// Sees that the page of `address` has a frame, for such an access.
    pub(super) fn touch(&mut self, address: u64, access: Protection) -> Result<(), Refused> {
        let mapping = self.mapping_at(address).ok_or(Refused::NotMapped)?;
        let Mapping { protection, .. } = mapping;
        if !protection.is_readable() || access != Protection::READ && !protection.allows(access) {
            return Err(Refused::Protected(mapping));
        }
        let page = address / PAGE * PAGE;
        self.tables.map(page, flags(protection)).map_err(|_| Refused::OutOfMemory(mapping))
    }

    /// Whether the program may read all of these addresses.
    pub(super) fn may_read(&self, addresses: Range<u64>) -> bool {
        let mut next = addresses.start;
        for mapping in self.mappings.in_range(&addresses) {
            if mapping.start > next || !mapping.protection.is_readable() {
                return false;
            }
            next = mapping.end;
        }
        next >= addresses.end
    }

    /// Copies what the program has at `address`.
    pub(super) fn read(&mut self, address: u64, to: &mut [u8]) -> Result<(), Refused> {
        for (address, part) in parts(address, to.len()) {
            self.touch(address, Protection::READ)?;
            self.tables.read(address, &mut to[part]);
        }
        Ok(())
    }

    /// Copies to the program's memory, which need not be writable for the program.
    pub(super) fn write(&mut self, address: u64, from: &[u8]) -> Result<(), Refused> {
        for (address, part) in parts(address, from.len()) {
            self.touch(address, Protection::READ)?;
            self.tables.write(address, &from[part]);
        }
        Ok(())
    }
}

/// The runs of `length` bytes from `address` on that are in one page each: where, and which of the bytes.
fn parts(address: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = address + done as u64;
        let part = done..length.min(done + (PAGE - at % PAGE) as usize);
        done = part.end;
        (!part.is_empty()).then_some((at, part))
    })
}

/// How a page is mapped.
fn flags(protection: Protection) -> PageTableFlags {
    let write = if protection.allows(Protection::WRITE) { PageTableFlags::WRITABLE } else { PageTableFlags::empty() };
    let execute =
        if protection.allows(Protection::EXECUTE) { PageTableFlags::empty() } else { PageTableFlags::NO_EXECUTE };
    write | execute
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_divided_by_pages() {
        let divided = |address, length| parts(address, length).collect::<Vec<_>>();
        assert_eq!(divided(0x1000, 0), []);
        assert_eq!(divided(0x1ffe, 2), [(0x1ffe, 0..2)]);
        assert_eq!(divided(0x1ffe, 0x1003), [(0x1ffe, 0..2), (0x2000, 2..0x1002), (0x3000, 0x1002..0x1003)]);
    }

    #[test]
    fn lengths_and_offsets_that_do_not_fit_are_refused() {
        let pages = |length, offset| {
            let (address, protection, descriptor) = (0, 3, -1);
            MapRequest { address, length, protection, flags: MapRequest::ANONYMOUS, descriptor, offset }.pages()
        };
        assert_eq!(pages(1, 0), Ok(0x1000));
        assert_eq!(pages(0x1001, 0), Ok(0x2000));
        assert_eq!(pages(0, 0), Err(Errno::Einval));
        assert_eq!(pages(0xffff_f001, 0), Err(Errno::Enomem));
        assert_eq!(pages(0xc000_0001, 0), Err(Errno::Enomem));
        assert_eq!(pages(0x1000, u32::MAX - 1), Ok(0x1000));
        assert_eq!(pages(0x1000, u32::MAX), Err(Errno::Eoverflow));
    }
}
