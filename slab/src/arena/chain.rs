//! Chains: lists of tags that are linked both ways by `after` and `before`.
//!
//! A tag is in at most one chain at a time. Whoever has the chain keeps its head; these functions say what the head is
//! afterwards. Lock: the arena's.

#![deny(unsafe_code)]

use core::iter;

use super::tags::{TagId, Tags};

/// Puts `tag` first in the chain, and is the new head.
pub(super) fn push(tags: &Tags, head: Option<TagId>, tag: TagId) -> Option<TagId> {
    tags[tag].before.set(None);
    tags[tag].after.set(head);
    if let Some(head) = head {
        tags[head].before.set(Some(tag));
    }
    Some(tag)
}

/// Puts `tag` into a chain behind `place`, which is in it.
pub(super) fn insert_behind(tags: &Tags, place: TagId, tag: TagId) {
    let after = tags[place].after.get();
    tags[tag].before.set(Some(place));
    tags[tag].after.set(after);
    tags[place].after.set(Some(tag));
    if let Some(after) = after {
        tags[after].before.set(Some(tag));
    }
}

/// Takes `tag` out of the chain, and is the new head.
pub(super) fn remove(tags: &Tags, head: Option<TagId>, tag: TagId) -> Option<TagId> {
    let (after, before) = (tags[tag].after.get(), tags[tag].before.get());
    if let Some(after) = after {
        tags[after].before.set(before);
    }
    match before {
        Some(before) => {
            tags[before].after.set(after);
            head
        }
        None => after,
    }
}

/// The tags of the chain.
pub(super) fn iterate(tags: &Tags, head: Option<TagId>) -> impl Iterator<Item = TagId> {
    iter::successors(head, |tag| tags[*tag].after.get())
}
