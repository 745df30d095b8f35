//! The report of a fault: one format, which people read and programs parse.
//!
//! The first line says what is wrong and where, each other line one thing more as `  name: value`, and those that nothing
//! is known of are left out:
//!
//! ```text
//! kslab: damage at 0xffff80000041c930: written to outside the object
//!   kind: REDZONE
//!   cache: dentry
//!   object: 0xffff80000041c900, slot 7, 48 bytes, 44 requested, aligned to 8
//!   damage: at offset 44: expected 0xce, found 0x00
//!   dump: 0xffff80000041c920: 00 00 00 00 00 00 00 00 00 00 00 00[00]fa ed fe
//!   allocated: event 12, CPU 0, src/dentry.rs:10:5, by 0xffffffff80012345 0xffffffff80012399
//!   freed: event 15, CPU 1
//!   now: event 17, CPU 0, src/dentry.rs:31:5
//! ```
//!
//! An offset is counted from the object's first byte; a negative one is before it.

use core::fmt;
use core::panic::Location;

use super::{CacheName, Fault};

/// Return addresses that an event keeps.
pub(crate) const ADDRESSES: usize = 6;

/// Bytes in the dump of a [`Damage`], at most.
const DUMP: usize = 32;

/// The source line that called the allocator, where it is known: not of calls by way of `GlobalAlloc`.
pub(crate) type Caller = Option<&'static Location<'static>>;

/// What was found, and all that is known of it.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Report {
    /// What is wrong.
    pub fault: Fault,
    /// What was given back, or the first byte that was overwritten, or what was to be read or written.
    pub pointer: *const u8,
    /// The cache that it is from, where it is in a slab.
    pub cache: Option<CacheName>,
    /// The object that it is in, where there is one.
    pub place: Option<Place>,
    /// What was overwritten.
    pub damage: Option<Damage>,
    /// Its last allocation; known of objects with checks only.
    pub allocated: Option<Event>,
    /// Its last free; known of objects with checks only.
    pub freed: Option<Event>,
    /// The call that found the fault.
    pub now: Event,
}

/// An object of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// Its first byte.
    pub object: *const u8,
    /// Its number in its slab.
    pub slot: usize,
    /// Bytes that it has.
    pub size: usize,
    /// Size and alignment that were asked for, in bytes; known of objects with checks only.
    pub requested: Option<(usize, usize)>,
}

/// What was overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// Where the first wrong byte is, from the start of the object.
    pub offset: isize,
    /// What it should be.
    pub expected: u8,
    /// What it was.
    pub found: u8,
    /// What is around it.
    dump: [u8; DUMP],
    dumped: usize,
    /// Where the dump starts.
    start: usize,
    /// Where in the dump the wrong byte is.
    at: usize,
}

/// A call of the allocator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Event {
    /// Events of one heap are numbered, from 1 on; 0 where nothing counts them.
    pub sequence: u64,
    /// The number of the CPU.
    pub cpu: usize,
    /// The source line, where it is known: not of calls by way of `GlobalAlloc`.
    pub location: Option<&'static Location<'static>>,
    /// Return addresses, the innermost first; 0 from where on there are no more.
    pub addresses: [usize; ADDRESSES],
}

impl Report {
    /// Of which nothing more is known.
    pub(crate) const fn new(fault: Fault, pointer: *const u8, now: Event) -> Self {
        Self { fault, pointer, cache: None, place: None, damage: None, allocated: None, freed: None, now }
    }
}

impl Damage {
    /// The damage at `bytes[at]`, where `bytes` start `start` bytes after the start of the object.
    pub(crate) fn new(bytes: &[u8], start: isize, at: usize, expected: u8) -> Self {
        let from = at.saturating_sub(DUMP / 2) & !7;
        let dumped = DUMP.min(bytes.len() - from);
        let mut dump = [0; DUMP];
        dump[..dumped].copy_from_slice(&bytes[from..from + dumped]);
        let offset = start + at as isize;
        Self { offset, expected, found: bytes[at], dump, dumped, start: bytes[from..].as_ptr().addr(), at: at - from }
    }

    /// The bytes around the first wrong one, which may be others by now.
    pub fn dump(&self) -> &[u8] {
        &self.dump[..self.dumped]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kslab: {} {:p}: {}\n  kind: {}", self.fault.deed(), self.pointer, self.fault, self.fault.kind())?;
        if let Some(cache) = self.cache {
            write!(f, "\n  cache: {cache}")?;
        }
        if let Some(place) = self.place {
            write!(f, "\n  object: {:p}, slot {}, {} bytes", place.object, place.slot, place.size)?;
            if let Some((size, align)) = place.requested {
                write!(f, ", {size} requested, aligned to {align}")?;
            }
        }
        if let Some(damage) = &self.damage {
            let Damage { offset, expected, found, .. } = damage;
            write!(f, "\n  damage: at offset {offset}: expected {expected:#04x}, found {found:#04x}")?;
            write!(f, "\n  dump: {:#x}:", damage.start)?;
            for (index, byte) in damage.dump().iter().enumerate() {
                let before = match index.checked_sub(damage.at) {
                    Some(0) => '[',
                    Some(1) => ']',
                    _ => ' ',
                };
                write!(f, "{before}{byte:02x}")?;
            }
            f.write_str(if damage.at + 1 == damage.dumped { "]" } else { "" })?;
        }
        for (name, event) in [("allocated", self.allocated), ("freed", self.freed), ("now", Some(self.now))] {
            if let Some(event) = event {
                write!(f, "\n  {name}: {event}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.sequence > 0 {
            write!(f, "event {}, ", self.sequence)?;
        }
        match self.cpu {
            crate::platform::IN_NMI => f.write_str("in an NMI")?,
            crate::platform::NO_CPU => f.write_str("a CPU without a number")?,
            cpu => write!(f, "CPU {cpu}")?,
        }
        if let Some(location) = self.location {
            write!(f, ", {location}")?;
        }
        let addresses = self.addresses.iter().take_while(|&&address| address != 0);
        for (index, address) in addresses.enumerate() {
            write!(f, "{}{address:#x}", if index == 0 { ", by " } else { " " })?;
        }
        Ok(())
    }
}
