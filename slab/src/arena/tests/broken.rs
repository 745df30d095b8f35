//! The self-check finds each kind of damage.

use super::*;
use crate::arena::tags::TagId;

/// An arena of a span from 16 to 111 with an allocated segment of 32, a free one of 16, an allocated one of 32, and a
/// free one; and an empty span from 1024 on.
fn damaged(damage: impl FnOnce(&mut State)) -> Result<(), ArenaBroken> {
    let mut result = Ok(());
    with_caches(|caches| {
        let arena = TestArena::new(caches, "test", 16);
        arena.add(16, 96).unwrap();
        arena.add(1024, 1024).unwrap();
        for (min, size) in [(16, 32), (48, 16), (64, 32)] {
            assert_eq!(arena.alloc_with(size, &Constraints { min, fit: Fit::Next, ..Constraints::NONE }), Ok(min));
        }
        arena.free(48, 16).unwrap();
        assert_eq!(arena.verify(), Ok(()));
        damage(&mut arena.state.lock());
        result = arena.verify();
    });
    result
}

fn at(state: &State, start: u64) -> TagId {
    state.list(state.first).find(|tag| state.tags[*tag].start.get() == start && !state.tags[*tag].is_span()).unwrap()
}

#[test]
fn damage_to_the_list_of_addresses() {
    let broken = damaged(|state| state.tags[at(state, 64)].previous.set(None));
    assert_eq!(broken, Err(ArenaBroken::List { start: 64 }));
    let broken = damaged(|state| state.tags[at(state, 64)].next.set(state.first));
    assert_eq!(broken, Err(ArenaBroken::List { start: 16 }), "a ring");
    let broken = damaged(|state| state.tags[at(state, 64)].set_kind(Kind::Unused));
    assert_eq!(broken, Err(ArenaBroken::List { start: 64 }));
    let broken = damaged(|state| state.tail = None);
    assert_eq!(broken, Err(ArenaBroken::List { start: 1024 }));
}

#[test]
fn damage_to_spans_and_segments() {
    let broken = damaged(|state| state.tags[state.first.unwrap()].after.set(None));
    assert_eq!(broken, Err(ArenaBroken::Spans { start: 1024 }));
    let broken = damaged(|state| state.tags[at(state, 16)].size.set(16));
    assert_eq!(broken, Err(ArenaBroken::Cover { start: 16 }));
    let broken = damaged(|state| state.tags[at(state, 16)].size.set(31));
    assert_eq!(broken, Err(ArenaBroken::Quantum { start: 16 }));
    let broken = damaged(|state| state.tags[at(state, 16)].set_kind(Kind::Free));
    assert_eq!(broken, Err(ArenaBroken::Unmerged { start: 48 }));
    let broken = damaged(|state| state.tags[state.last_span.unwrap()].set_kind(Kind::Imported));
    assert_eq!(broken, Err(ArenaBroken::NotReturned { start: 1024 }));
}

#[test]
fn damage_to_the_free_lists() {
    let broken = damaged(|state| state.free.remove(&state.tags, at(state, 48)));
    assert_eq!(broken, Err(ArenaBroken::FreeSegments { listed: 2, free: 3 }));
    let broken = damaged(|state| {
        state.tags[at(state, 48)].before.set(state.first);
        state.tags[at(state, 96)].before.set(state.first);
    });
    assert_eq!(broken, Err(ArenaBroken::FreeList { list: 4 }));
    // An allocated one among them.
    let broken = damaged(|state| {
        let tag = at(state, 64);
        state.index.remove(&state.tags, tag);
        state.free.insert(&state.tags, tag);
    });
    assert_eq!(broken, Err(ArenaBroken::FreeList { list: 5 }));
    let broken = damaged(|state| state.tags[at(state, 48)].after.set(Some(at(state, 48))));
    assert_eq!(broken, Err(ArenaBroken::FreeList { list: 4 }), "a ring");
}

#[test]
fn damage_to_the_index() {
    let broken = damaged(|state| state.index.remove(&state.tags, at(state, 16)));
    assert_eq!(broken, Err(ArenaBroken::Index { indexed: 1, allocated: 2 }));
    let mut bucket = 0;
    let broken = damaged(|state| {
        let tag = at(state, 16);
        bucket = state.index.bucket(16);
        state.tags[tag].before.set(Some(tag));
    });
    assert_eq!(broken, Err(ArenaBroken::Bucket { bucket }));
}

#[test]
fn damage_to_the_spare_tags_and_the_sums() {
    let broken = damaged(|state| {
        state.tags.take().unwrap();
    });
    assert!(matches!(broken, Err(ArenaBroken::Tags { .. })), "{broken:?}");
    let broken = damaged(|state| {
        let tag = state.tags.take().unwrap();
        state.tags.put(tag);
        state.tags[tag].set_kind(Kind::Free);
    });
    assert!(matches!(broken, Err(ArenaBroken::Tags { .. })), "{broken:?}");
    let broken = damaged(|state| state.counts.total += 16);
    assert_eq!(broken, Err(ArenaBroken::Totals { total: 1120, in_use: 64 }));
    let broken = damaged(|state| state.counts.in_use -= 16);
    assert_eq!(broken, Err(ArenaBroken::Totals { total: 1120, in_use: 64 }));
}

#[test]
fn damage_to_the_rotor() {
    let broken = damaged(|state| state.rotor = TagId::at(80));
    assert_eq!(broken, Err(ArenaBroken::Rotor));
    let broken = damaged(|state| state.floor = 32);
    assert_eq!(broken, Err(ArenaBroken::Rotor));
}

#[test]
fn what_is_broken_is_said() {
    let broken = ArenaBroken::Unmerged { start: 16 };
    assert_eq!(broken.to_string(), "the free segment at 0x10 has a free neighbour before it");
}
