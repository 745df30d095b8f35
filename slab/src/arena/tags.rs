//! Boundary tags: a record for each span and each segment of an arena, in page frames.
//!
//! The only module of the arenas with `unsafe` in it, and the only one that takes page frames. A tag is named by a
//! number, a [`TagId`], and reached through a table of pages; so the modules above have no pointers. The first pages
//! are in the table itself, later ones in pages that are directories.
//!
//! Lock: [`Tags`] belongs to its arena's lock. [`Pages`] takes the lock of the page frames, and is never called while
//! an arena's lock is held.
//!
//! Invariants:
//! 1. A [`Page`] is one whole page frame, mapped, and whoever has the `Page` is the only one to use it. It was all
//!    zeros when it was got, which is a leaf of unused tags as well as an empty directory.
//! 2. The table has the first `leaves` leaves, and the directories that these need, perhaps with one more. Each pointer
//!    to them was a `Page`, which the table now has; all other pointers are null.

use crate::sync::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use core::num::NonZeroU32;
use core::ops::Index;
use core::ptr::{self, NonNull};

use crate::cache::Caches;
use crate::frames::Order;
use crate::memory::FRAME_SIZE;
use crate::platform::Platform;

/// Leaves that need no directory: enough for 1632 tags.
const DIRECT: usize = 16;

/// Directories that the table has room for.
const DIRECTORIES: usize = 48;

/// Leaves that a directory has room for.
const FANOUT: usize = FRAME_SIZE / size_of::<Leaf>();

/// Tags in a page.
pub(super) const TAGS_PER_PAGE: usize = FRAME_SIZE / size_of::<Tag>();

/// The name of a tag: its place in the table, plus one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TagId(NonZeroU32);

impl TagId {
    /// The `index`th tag of the table.
    pub(super) fn at(index: u32) -> Option<Self> {
        NonZeroU32::new(index.wrapping_add(1)).map(Self)
    }

    pub(super) fn index(self) -> u32 {
        self.0.get() - 1
    }
}

/// What a tag stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Nothing: it is among the spare tags.
    Unused = 0,
    /// A span that was added.
    Span = 1,
    /// A span that the source lends.
    Imported = 2,
    /// A segment that is free.
    Free = 3,
    /// A segment that is allocated.
    Allocated = 4,
}

/// A boundary tag.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Tag {
    pub(super) start: Number,
    /// Never 0 while the tag is in use.
    pub(super) size: Number,
    /// The neighbours in the order of addresses. Of a spare tag: the next one.
    pub(super) next: Link,
    pub(super) previous: Link,
    /// The neighbours in the chain that the tag is in: of spans, of free segments of a size, or of a bucket.
    pub(super) after: Link,
    pub(super) before: Link,
    /// Not of this tag: the head of a bucket of the hash table that has the same index as the tag.
    pub(super) bucket: Link,
    kind: AtomicU32,
}

const _: () = assert!(size_of::<Tag>() == 40 && align_of::<Tag>() == 8);

impl Tag {
    pub(super) fn kind(&self) -> Kind {
        match self.kind.load(Ordering::Relaxed) {
            1 => Kind::Span,
            2 => Kind::Imported,
            3 => Kind::Free,
            4 => Kind::Allocated,
            _ => Kind::Unused,
        }
    }

    pub(super) fn set_kind(&self, kind: Kind) {
        self.kind.store(kind as u32, Ordering::Relaxed);
    }

    pub(super) fn is_span(&self) -> bool {
        matches!(self.kind(), Kind::Span | Kind::Imported)
    }

    /// The last integer of the span or segment.
    pub(super) fn last(&self) -> u64 {
        self.start.get().wrapping_add(self.size.get()).wrapping_sub(1)
    }
}

/// A number in a tag.
#[derive(Debug, Default)]
pub(super) struct Number(AtomicU64);

impl Number {
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// A tag, or none, in a tag. Zero is none.
#[derive(Debug, Default)]
pub(super) struct Link(AtomicU32);

impl Link {
    pub(super) fn get(&self) -> Option<TagId> {
        NonZeroU32::new(self.0.load(Ordering::Relaxed)).map(TagId)
    }

    pub(super) fn set(&self, tag: Option<TagId>) {
        self.0.store(tag.map_or(0, |tag| tag.0.get()), Ordering::Relaxed);
    }
}

/// Where the table has a leaf: a page of [`TAGS_PER_PAGE`] tags. A directory is a page of [`FANOUT`] of these.
type Leaf = AtomicPtr<Tag>;

/// A page for tags: see invariant 1.
#[derive(Debug)]
pub(super) struct Page(NonNull<u8>);

/// Where the pages for tags come from.
#[derive(Debug)]
pub(super) struct Pages<'a, P>(&'a Caches<P>);

impl<'a, P: Platform> Pages<'a, P> {
    pub(super) const fn new(caches: &'a Caches<P>) -> Self {
        Self(caches)
    }

    /// What the pages are taken from.
    pub(super) const fn caches(&self) -> &'a Caches<P> {
        self.0
    }

    /// A page, all zeros.
    pub(super) fn get(&self) -> Option<Page> {
        let frame = self.0.allocate_frames(1, Order::ZERO)?;
        let page = NonNull::new(self.0.frames().pointer(frame))?;
        // SAFETY: a page frame that was just allocated is mapped there, and nobody else uses it.
        unsafe { page.write_bytes(0, FRAME_SIZE) };
        Some(Page(page))
    }

    /// Gives a page back that [`get`](Self::get) returned.
    pub(super) fn put(&self, page: Page) {
        let frames = self.0.frames();
        let Some(frame) = frames.frame_of(page.0.as_ptr()) else { return };
        // SAFETY: `get` allocated it as one frame, and by invariant 1 only the giver used it.
        unsafe { frames.free(frame, Order::ZERO) };
    }
}

/// All tags of an arena: those in use, and spare ones.
#[derive(Debug)]
pub(super) struct Tags {
    direct: [Leaf; DIRECT],
    directories: [AtomicPtr<Leaf>; DIRECTORIES],
    leaves: usize,
    /// Tags that have ever been in use: those with an index below this.
    touched: u32,
    in_use: u32,
    /// The first of the spare tags that have been in use before.
    spare: Option<TagId>,
    /// How often a tag has become spare. As long as it stays the same, a tag in use stays what it is.
    released: u64,
}

impl Tags {
    pub(super) const fn new() -> Self {
        Self {
            direct: [const { AtomicPtr::new(ptr::null_mut()) }; DIRECT],
            directories: [const { AtomicPtr::new(ptr::null_mut()) }; DIRECTORIES],
            leaves: 0,
            touched: 0,
            in_use: 0,
            spare: None,
            released: 0,
        }
    }

    /// Tags in use and spare ones.
    pub(super) fn count(&self) -> u32 {
        (self.leaves * TAGS_PER_PAGE) as u32
    }

    pub(super) fn in_use(&self) -> u32 {
        self.in_use
    }

    /// Tags at hand.
    pub(super) fn spare(&self) -> u32 {
        self.count() - self.in_use
    }

    pub(super) fn released(&self) -> u64 {
        self.released
    }

    /// A spare tag, now in use: whoever takes it says what it stands for.
    pub(super) fn take(&mut self) -> Option<TagId> {
        let tag = match self.spare {
            Some(tag) => {
                self.spare = self[tag].next.get();
                tag
            }
            None if self.touched < self.count() => {
                self.touched += 1;
                TagId::at(self.touched - 1)?
            }
            None => return None,
        };
        self.in_use += 1;
        Some(tag)
    }

    /// Makes a tag spare that is in use and in no list.
    pub(super) fn put(&mut self, tag: TagId) {
        self[tag].set_kind(Kind::Unused);
        self[tag].next.set(self.spare);
        self.spare = Some(tag);
        self.in_use -= 1;
        self.released = self.released.wrapping_add(1);
    }

    /// The next of the spare tags that have been in use, after `tag` or from the first.
    pub(super) fn next_spare(&self, tag: Option<TagId>) -> Option<TagId> {
        tag.map_or(self.spare, |tag| self[tag].next.get())
    }

    /// Spare tags that have never been in use.
    pub(super) fn untouched(&self) -> u32 {
        self.count() - self.touched
    }

    /// Makes `page` part of the table: a page of tags, or the directory that the next page of tags needs. A full table
    /// gives it back.
    pub(super) fn grow(&mut self, page: Page) -> Result<(), Page> {
        if let Some(leaf) = self.slot(self.leaves) {
            leaf.store(page.0.as_ptr().cast(), Ordering::Relaxed);
            self.leaves += 1;
            return Ok(());
        }
        let Some(directory) = self.directory_of(self.leaves) else { return Err(page) };
        directory.store(page.0.as_ptr().cast(), Ordering::Relaxed);
        Ok(())
    }

    /// Takes the last page out of the table again, and makes all tags spare that are left. `None` once it is empty.
    pub(super) fn shrink(&mut self) -> Option<Page> {
        (self.touched, self.in_use, self.spare) = (0, 0, None);
        self.released = self.released.wrapping_add(1);
        let unneeded = self.leaves.checked_sub(DIRECT).is_some_and(|far| far.is_multiple_of(FANOUT));
        if let Some(directory) = self.directory_of(self.leaves).filter(|_| unneeded) {
            let page = directory.swap(ptr::null_mut(), Ordering::Relaxed);
            if let Some(page) = NonNull::new(page.cast()) {
                return Some(Page(page));
            }
        }
        let leaf = self.slot(self.leaves.checked_sub(1)?)?.swap(ptr::null_mut(), Ordering::Relaxed);
        self.leaves -= 1;
        NonNull::new(leaf.cast()).map(Page)
    }

    /// Where the table has the `leaf`th leaf; `None` where its directory is missing.
    fn slot(&self, leaf: usize) -> Option<&Leaf> {
        let Some(far) = leaf.checked_sub(DIRECT) else { return self.direct.get(leaf) };
        let directory = NonNull::new(self.directory_of(leaf)?.load(Ordering::Relaxed))?;
        // SAFETY: by invariants 1 and 2 it is a page of so many leaves that lives as long as it is in the table, which
        // only `shrink` changes, and that borrows the table mutably.
        Some(unsafe { directory.add(far % FANOUT).as_ref() })
    }

    /// Where the table has the directory of the `leaf`th leaf; `None` where it needs none, or there is no room.
    fn directory_of(&self, leaf: usize) -> Option<&AtomicPtr<Leaf>> {
        self.directories.get(leaf.checked_sub(DIRECT)? / FANOUT)
    }
}

impl Index<TagId> for Tags {
    type Output = Tag;

    fn index(&self, tag: TagId) -> &Tag {
        let index = tag.index() as usize;
        let leaf = self.slot(index / TAGS_PER_PAGE).and_then(|leaf| NonNull::new(leaf.load(Ordering::Relaxed)));
        let leaf = leaf.expect("a tag of this arena");
        // SAFETY: by invariants 1 and 2 it is a page of so many tags that lives as long as it is in the table, which
        // only `shrink` changes, and that borrows the table mutably. All of the tag's fields are atomic.
        unsafe { leaf.add(index % TAGS_PER_PAGE).as_ref() }
    }
}
