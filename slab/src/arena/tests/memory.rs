//! The memory of the tags.

use super::*;
use crate::arena::tags::{TAGS_PER_PAGE, TagId, Tags};
use crate::frames::{Frame, Order};

/// All frames but `spared`, so that there is no memory for tags.
fn take_all(caches: &Caches<NoInterrupts>, spared: usize) -> Vec<Frame> {
    let mut taken: Vec<_> = core::iter::from_fn(|| caches.frames().allocate(Order::ZERO)).collect();
    for _ in 0..spared {
        give_back(caches, taken.pop());
    }
    taken
}

fn give_back(caches: &Caches<NoInterrupts>, taken: impl IntoIterator<Item = Frame>) {
    for frame in taken {
        // SAFETY: the tests do not access what they take.
        unsafe { caches.frames().free(frame, Order::ZERO) };
    }
}

#[test]
fn without_memory_for_tags_nothing_changes() {
    with_caches(|caches| {
        let taken = take_all(caches, 0);
        let arena = TestArena::new(caches, "test", 1);
        assert_eq!(arena.add(0, 10_000), Err(ArenaError::NoMemory));
        assert_eq!((arena.size_total(), segments(&arena).len()), (0, 0));
        give_back(caches, taken);
        arena.add(0, 10_000).unwrap();
    });
}

#[test]
fn when_tags_run_out_exact_fits_and_frees_still_work() {
    with_caches(|caches| {
        let taken = take_all(caches, 1);
        let arena = TestArena::new(caches, "test", 1);
        arena.add(0, 10_000).unwrap();
        let mut starts = Vec::new();
        let error = loop {
            match arena.alloc(3) {
                Ok(start) => starts.push(start),
                Err(error) => break error,
            }
        };
        assert_eq!(error, ArenaError::NoMemory);
        assert_eq!(starts.len(), TAGS_PER_PAGE - 2, "a span, a free rest, and one tag each");
        let before = segments(&arena);
        let middle = Constraints { min: 5000, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(3, &middle), Err(ArenaError::NoMemory));
        assert_eq!(arena.add(20_000, 10), Err(ArenaError::NoMemory));
        assert_eq!((segments(&arena), arena.verify()), (before, Ok(())));
        let rest = arena.size_free();
        assert_eq!(arena.alloc(rest), Ok(10_000 - rest), "it takes no further tag");
        arena.free(10_000 - rest, rest).unwrap();
        for (index, start) in starts.into_iter().enumerate() {
            arena.free(start, 3).unwrap();
            if !cfg!(miri) || index % 25 == 0 {
                assert_eq!(arena.verify(), Ok(()));
            }
        }
        assert_eq!(arena.stats().free_segments, 1);
        give_back(caches, taken);
    });
}

#[test]
fn a_split_in_two_needs_two_tags_or_none_is_taken() {
    with_caches(|caches| {
        let taken = take_all(caches, 1);
        let arena = TestArena::new(caches, "test", 1);
        arena.add(0, 10_000).unwrap();
        // One tag is left.
        for _ in 0..TAGS_PER_PAGE - 3 {
            arena.alloc(1).unwrap();
        }
        let before = segments(&arena);
        let middle = Constraints { min: 5000, ..Constraints::NONE };
        assert_eq!(arena.alloc_with(3, &middle), Err(ArenaError::NoMemory));
        assert_eq!(arena.add(20_000, 10), Err(ArenaError::NoMemory));
        assert_eq!((segments(&arena), arena.verify()), (before, Ok(())));
        arena.alloc(1).unwrap();
        give_back(caches, taken);
    });
}

#[test]
fn the_arena_grows_through_a_directory_and_gives_all_pages_back() {
    with_caches(|caches| {
        grow_table(caches, 20);
        if cfg!(miri) {
            return;
        }
        let arena = TestArena::new(caches, "test", 1);
        arena.add(0, 10_000).unwrap();
        let starts: Vec<_> = (0..2400).map(|_| arena.alloc(4).unwrap()).collect();
        assert!(arena.stats().tags > 2400);
        assert_eq!(arena.verify(), Ok(()));
        for start in starts.iter().step_by(2).chain(starts.iter().skip(1).step_by(2)) {
            arena.free(*start, 4).unwrap();
        }
        assert_eq!(arena.verify(), Ok(()));
        assert_eq!(arena.stats().free_segments, 1);
    });
}

/// Makes a table of `pages` pages, directories too, and gives them back.
fn grow_table(caches: &Caches<NoInterrupts>, pages: usize) {
    let source = Pages::new(caches);
    let mut tags = Tags::new();
    for _ in 0..pages {
        tags.grow(source.get().unwrap()).unwrap();
    }
    assert_eq!(tags.count() as usize, (pages - 1) * TAGS_PER_PAGE, "one page is a directory");
    let taken: Vec<_> = core::iter::from_fn(|| tags.take()).collect();
    assert_eq!(taken.len(), tags.count() as usize);
    assert!(taken.iter().enumerate().all(|(index, tag)| tag.index() as usize == index));
    let some = || taken.iter().step_by(if cfg!(miri) { 97 } else { 1 });
    some().for_each(|tag| tags[*tag].start.set(u64::from(tag.index())));
    assert!(some().all(|tag| tags[*tag].start.get() == u64::from(tag.index())));
    some().for_each(|tag| tags.put(*tag));
    assert_eq!(tags.take(), some().next_back().copied(), "the last one that became spare");
    let mut given_back = 0;
    while let Some(page) = tags.shrink() {
        source.put(page);
        given_back += 1;
    }
    assert_eq!((given_back, tags.count()), (pages, 0));
}

#[test]
fn a_directory_without_a_leaf_goes_back_too() {
    with_caches(|caches| grow_table(caches, 17));
}

#[test]
#[cfg_attr(miri, ignore = "a hundred MiB of tags")]
fn a_full_table_gives_the_page_back() {
    let machine = Machine::new(START, 26_000);
    let heap = machine.heap();
    let (source, before) = (Pages::new(heap.caches()), heap.frames().stats());
    let mut tags = Tags::new();
    let refused = loop {
        if let Err(page) = tags.grow(source.get().unwrap()) {
            break page;
        }
    };
    source.put(refused);
    assert_eq!(tags.count() as usize, (16 + 48 * 512) * TAGS_PER_PAGE);
    assert!(tags.count() > 2_500_000);
    let last = TagId::at(tags.count() - 1).unwrap();
    tags[last].start.set(7);
    assert_eq!(tags[last].start.get(), 7);
    while let Some(page) = tags.shrink() {
        source.put(page);
    }
    assert_eq!(heap.frames().stats(), before);
}

#[test]
#[should_panic = "a tag of this arena"]
fn a_tag_that_is_not_in_the_table_is_not_accessed() {
    let tags = Tags::new();
    tags[TagId::at(0).unwrap()].start.set(1);
}
