//! What a heap says of itself.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::string::{String, ToString};
use std::vec::Vec;

use super::*;
use crate::Cache;
use crate::stats::CacheStats;

#[test]
fn used_and_available_make_up_the_size_and_used_counts_whole_slabs() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let (size, before) = (heap.size(), heap.used());
    assert!(size <= 64 * 4096 && before <= 4096, "no more than the records");
    assert_eq!(heap.available(), size - before);
    let (object, run) = (heap.allocate(layout(8, 8)).unwrap(), heap.allocate(layout(9000, 8)).unwrap());
    assert_eq!((heap.used(), heap.available()), (before + 4 * 4096, size - before - 4 * 4096));
    AnyHeap::free(&heap, object, layout(8, 8));
    AnyHeap::free(&heap, run, layout(9000, 8));
    assert_eq!(heap.used(), before + 4096, "the empty slab that stays");
    assert_eq!(heap.shrink(), 1);
    assert_eq!((heap.size(), heap.used()), (size, before));
}

#[test]
fn a_walk_visits_every_block_and_nothing_else() {
    let machine = Machine::new(START, FRAMES);
    walk(&machine.heap());
    let machine = Machine::new(START, FRAMES);
    walk(&machine.heap_on::<Threads>());
}

fn walk<P: Platform>(heap: &super::super::Heap<P>) {
    let visited = || {
        let mut blocks = BTreeMap::new();
        heap.for_each_block(|block, size| assert_eq!(blocks.insert(block, size), None, "visited twice"));
        blocks
    };
    assert_eq!(visited(), BTreeMap::new());
    let sizes = [1, 8, 24, 100, 1000, 1000, 5000, 8192, 8193, 40_000];
    let mut blocks = BTreeMap::new();
    for wanted in sizes.into_iter().chain([8; 600]).map(|size| layout(size, 8)) {
        blocks.insert(heap.allocate(wanted).unwrap(), wanted);
    }
    let sizes = |blocks: &BTreeMap<_, Layout>| {
        let size = |layout: &Layout| super::super::Heap::<P>::usable_size(*layout).unwrap();
        blocks.iter().map(|(block, layout)| (*block, size(layout))).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(visited(), sizes(&blocks));
    let mut kept = BTreeMap::new();
    for (number, (block, wanted)) in blocks.into_iter().enumerate() {
        if number.is_multiple_of(3) {
            kept.insert(block, wanted);
        } else {
            AnyHeap::free(heap, block, wanted);
        }
    }
    assert_eq!(visited(), sizes(&kept), "what is free in a slab or in a magazine is not visited");
    kept.into_iter().for_each(|(block, wanted)| AnyHeap::free(heap, block, wanted));
    assert_eq!(visited(), BTreeMap::new());
}

#[test]
fn a_walk_may_free_what_it_visits() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap();
    let wanted = layout(100, 8);
    (0..200).for_each(|_| _ = heap.allocate(wanted).unwrap());
    for _ in 0..200 {
        heap.for_each_block(|block, _| AnyHeap::free(&heap, block, wanted));
    }
    assert_eq!(heap.cache_stats().map(|stats| stats.in_use).sum::<usize>(), 0);
}

#[test]
fn tables_have_a_row_for_each_cache_that_was_used() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let inodes = [(); 2].map(|()| Cache::new(heap.caches(), "inode", layout(600, 8)));
    let objects = inodes.each_ref().map(|cache| cache.allocate().unwrap());
    let block = heap.allocate(layout(60, 8)).unwrap();
    let tables = heap.tables().to_string();
    AnyHeap::free(&heap, block, layout(60, 8));
    for (cache, object) in inodes.iter().zip(objects) {
        // SAFETY: allocated from this cache above.
        unsafe { cache.free(object) };
    }
    assert!(tables.starts_with("page frames: "), "{tables}");
    let header = tables.lines().find(|line| line.starts_with("cache ")).expect("a header");
    let rows: Vec<_> = tables.lines().skip_while(|line| *line != header).skip(1).collect();
    assert_eq!(rows.len(), 3, "{tables}");
    for (row, name, size) in [(rows[0], "size-64", "64"), (rows[1], "inode", "600"), (rows[2], "inode#1", "600")] {
        assert_eq!(row.len(), header.len(), "columns are where their heads are\n{tables}");
        assert_eq!(row.split_whitespace().take(2).collect::<Vec<_>>(), [name, size]);
    }
    // object slab per-slab colours slabs in-use cached allocations failures rounds contention reaped
    let numbers: Vec<_> = rows[0].split_whitespace().skip(1).collect();
    assert_eq!(numbers, ["64", "4096", "62", "63", "1", "1", "0", "1", "0", "0", "0", "0"], "{tables}");
}

#[test]
fn every_column_of_the_table_ends_under_its_head() {
    let heads = ["object", "slab", "per slab", "colours", "slabs", "in use", "cached", "allocations", "failures"];
    let stats = Heap::new().cache_stats().next().unwrap();
    let row = CacheStats {
        object_size: 1,
        slab_size: 2,
        objects_per_slab: 3,
        colours: 4,
        slabs: 5,
        in_use: 6,
        in_magazines: 7,
        allocations: 8,
        failures: 9,
        ..stats
    };
    let (row, header) = (row.to_string(), CacheStats::HEADER);
    for (number, head) in (1..).zip(heads) {
        let end = header.find(head).unwrap() + head.len();
        let shown = row[..end].ends_with(&format!(" {number}"));
        assert!(shown, "{head} of\n{header}\n{row}");
    }
}

#[test]
fn each_cache_is_visited_with_its_counts() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "inode", layout(600, 8));
    let object = cache.allocate().unwrap();
    let mut names = Vec::new();
    heap.for_each_cache(|stats| names.push((stats.name, stats.in_use)));
    assert_eq!(names.len(), 66);
    assert_eq!((names[0], names[63]), (("size-8", 0), ("size-8192", 0)));
    assert_eq!((names[64], names[65]), (("size-page", 0), ("inode", 1)));
    // SAFETY: allocated from this cache above.
    unsafe { cache.free(object) };
    drop(cache);
    let mut caches = 0;
    heap.for_each_cache(|_| caches += 1);
    assert_eq!(caches, 65, "a cache that is gone is in no table");
}

/// Text that is written to it allocates from the heap, as a kernel's console might.
struct Allocating<'a>(&'a dyn AnyHeap);

impl Write for Allocating<'_> {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let wanted = layout(text.len(), 1);
        let block = self.0.allocate(wanted).ok_or(core::fmt::Error)?;
        self.0.free(block, wanted);
        Ok(())
    }
}

#[test]
fn printing_allocates_nothing_and_holds_no_lock() {
    let machine = Machine::new(START, FRAMES);
    let heap = machine.heap_on::<Threads>();
    let cache = Cache::new(heap.caches(), "inode", layout(600, 8));
    let object = cache.allocate().unwrap();
    let wanted = layout(100, 8);
    let block = heap.allocate(wanted).unwrap();
    let counts = || {
        let mut counts = Vec::new();
        heap.for_each_cache(|stats| counts.push(*stats));
        (counts, heap.frames().stats())
    };
    let before = counts();
    let (first, second) = (heap.tables().to_string(), heap.tables().to_string());
    assert_eq!(counts(), before);
    assert_eq!(first, second);
    write!(Allocating(&heap), "{}", heap.tables()).unwrap();
    AnyHeap::free(&heap, block, wanted);
    // SAFETY: allocated from this cache above.
    unsafe { cache.free(object) };
}

/// Refuses text after so many lines.
struct Full {
    text: String,
    lines: usize,
}

impl Write for Full {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        self.text.push_str(text);
        if self.text.lines().count() > self.lines { Err(core::fmt::Error) } else { Ok(()) }
    }
}

#[test]
fn a_writer_that_fails_ends_the_table() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let blocks = [8, 16, 24].map(|size| (heap.allocate(layout(size, 8)).unwrap(), layout(size, 8)));
    let whole = heap.tables().to_string();
    let rows = whole.lines().count();
    let mut cut = Full { text: String::new(), lines: rows - 2 };
    assert!(write!(cut, "{}", heap.tables()).is_err());
    assert!(whole.starts_with(&cut.text) && cut.text.len() < whole.len(), "{}", cut.text);
    blocks.into_iter().for_each(|(block, wanted)| AnyHeap::free(&heap, block, wanted));
}
