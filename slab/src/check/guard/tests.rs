//! The embedder is a buffer: pages are always there, and which are mapped is written down.

use std::alloc::{alloc, dealloc};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::vec::Vec;
use std::{format, string::String};

use super::*;
use crate::check::Checks;
use crate::platform::IN_NMI;
use crate::testing::{Heap, Machine, Threads, be_cpu, full_report_of, report_of};
use crate::{AllocError, Cache, InitFailed, Object, ObjectCache};

const START: u64 = 64 << 20;
const PLACES: usize = 8;
const BYTES: usize = PLACES * STRIDE + FRAME_SIZE;

struct Pages {
    buffer: NonNull<u8>,
    /// The starts of what is mapped, with frame and pages.
    mapped: Mutex<BTreeMap<usize, (u32, usize)>>,
    refuse_map: AtomicBool,
    refuse_unmap: AtomicBool,
}

// SAFETY: it only knows where its buffer is.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

// SAFETY: the buffer is for this alone, and all of it is always there.
unsafe impl GuardPages for Pages {
    fn addresses(&self) -> (NonNull<u8>, usize) {
        (self.buffer, BYTES)
    }

    fn map(&self, start: NonNull<u8>, first: Frame, pages: usize) -> bool {
        let start = start.as_ptr().addr();
        let offset = start - self.buffer.as_ptr().addr();
        assert!(start.is_multiple_of(FRAME_SIZE) && offset % STRIDE >= FRAME_SIZE, "the first page is never mapped");
        assert_eq!((offset + pages * FRAME_SIZE) % STRIDE, 0, "up to the next that never is");
        if self.refuse_map.load(Ordering::Relaxed) {
            return false;
        }
        let mut mapped = self.mapped.lock().unwrap();
        assert!(mapped.values().all(|(frame, _)| *frame != first.number()), "a frame is mapped twice");
        assert_eq!(mapped.insert(start, (first.number(), pages)), None);
        true
    }

    fn unmap(&self, start: NonNull<u8>, pages: usize) -> bool {
        if self.refuse_unmap.load(Ordering::Relaxed) {
            return false;
        }
        let unmapped = self.mapped.lock().unwrap().remove(&start.as_ptr().addr());
        assert_eq!(unmapped.expect("it was mapped").1, pages);
        true
    }
}

impl Pages {
    fn new() -> Self {
        let buffer = NonNull::new(
            // SAFETY: the layout is not empty.
            unsafe { alloc(layout(BYTES, FRAME_SIZE)) },
        );
        let [refuse_map, refuse_unmap] = [const { AtomicBool::new(false) }; 2];
        Self { buffer: buffer.unwrap(), mapped: Mutex::default(), refuse_map, refuse_unmap }
    }

    /// For a heap that is used no longer than this.
    fn forever(&self) -> &'static Self {
        // SAFETY: each test drops it after the heap's last use.
        unsafe { NonNull::from(self).as_ref() }
    }

    /// How many pages are mapped.
    fn mapped(&self) -> usize {
        self.mapped.lock().unwrap().values().map(|(_, pages)| pages).sum()
    }

    fn has(&self, block: NonNull<u8>) -> bool {
        let start = self.buffer.as_ptr().addr();
        (start..start + BYTES).contains(&block.as_ptr().addr())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.buffer.as_ptr(), layout(BYTES, FRAME_SIZE)) };
    }
}

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// A heap whose caches follow these rules, with places for [`PLACES`] guarded objects.
fn with_rules_on<P: Platform>(rules: &'static str, test: impl FnOnce(&crate::Heap<P>, &Pages)) {
    let (machine, pages) = (Machine::new(START, 512), Pages::new());
    let heap = machine.heap_on();
    assert!(heap.set_guard(pages.forever()));
    heap.set_checks(rules).unwrap();
    test(&heap, &pages);
    heap.verify().unwrap();
}

fn with_rules(rules: &'static str, test: impl FnOnce(&Heap, &Pages)) {
    with_rules_on(rules, test);
}

#[track_caller]
fn allocate<P: Platform>(heap: &crate::Heap<P>, size: usize) -> NonNull<u8> {
    heap.allocate(layout(size, 8)).unwrap()
}

#[track_caller]
fn free<P: Platform>(heap: &crate::Heap<P>, block: NonNull<u8>, size: usize) {
    // SAFETY: the tests do not use what they have freed, or it is refused.
    unsafe { heap.free(block, layout(size, 8)) }
}

fn write(block: NonNull<u8>, offset: isize, byte: u8) {
    // SAFETY: in the pages of the block, as the tests know.
    unsafe { block.offset(offset).write(byte) }
}

/// The value of a line `  name: value` of a report.
fn line<'a>(report: &'a str, name: &str) -> Option<&'a str> {
    report.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(": "))
}

/// What is said of an access that far from a block.
fn explain<P: Platform>(heap: &crate::Heap<P>, block: NonNull<u8>, offset: isize) -> String {
    let address = block.as_ptr().wrapping_offset(offset);
    let report = format!("{}", heap.explain(address.addr()).expect("it is near an object"));
    let text = report.strip_prefix(&format!("kslab: access to {address:p}: ")).expect(&report);
    text.into()
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap()
}

#[test]
fn a_guarded_object_ends_where_its_pages_end() {
    with_rules("*:guard", |heap, pages| {
        let (sizes, alignments) = ([0, 61, 4097, 1, 7, 64, 100, 3000, 4096, 8192], [8, 4096, 1, 64]);
        let [sizes, alignments] = if cfg!(miri) { [&sizes[..3], &alignments[..2]] } else { [&sizes, &alignments[..]] };
        for &size in sizes {
            for &align in alignments {
                let wanted = layout(size, align);
                let Some(room) = room_for(wanted) else { continue };
                let block = heap.allocate(wanted).unwrap();
                assert!(pages.has(block), "{wanted:?}");
                let end = block.as_ptr().addr() + size.max(1).next_multiple_of(align);
                assert!(end.is_multiple_of(FRAME_SIZE) && block.as_ptr().addr().is_multiple_of(align), "{wanted:?}");
                assert_eq!(pages.mapped(), room.bytes() / FRAME_SIZE);
                // SAFETY: the block has so many bytes.
                unsafe { block.write_bytes(0x33, size) };
                // SAFETY: allocated above.
                let grown = unsafe { heap.reallocate(block, wanted, size + 1) }.unwrap();
                // SAFETY: it keeps its contents.
                assert!((0..size.min(1)).all(|at| unsafe { grown.add(at).read() } == 0x33));
                // SAFETY: as above.
                unsafe { heap.free(grown, layout(size + 1, align)) };
                assert_eq!(pages.mapped(), 0);
            }
        }
    });
}

#[test]
fn row_21_an_access_beyond_a_guarded_object_is_named_by_the_nearer_of_two() {
    with_rules("*:guard,audit", |heap, _| {
        let [first, second] = [allocate(heap, 61), allocate(heap, 8192)];
        let text = explain(heap, first, 64);
        assert_eq!(first_line(&text), "4 bytes behind an object");
        assert_eq!(line(&text, "kind"), Some("GUARD"));
        assert_eq!(line(&text, "cache"), Some("size-64"));
        assert_eq!(line(&text, "object"), Some(&*format!("{first:p}, slot 0, 64 bytes, 61 requested, aligned to 8")));
        assert!(line(&text, "allocated").unwrap().contains("guard/tests.rs:"), "{text}");
        assert_eq!((line(&text, "freed"), line(&text, "now")), (None, Some("CPU 0")));
        let page = FRAME_SIZE as isize;
        for (block, offset, expected) in [
            (first, 64 + 7, "11 bytes behind an object"),
            (first, 64 + page / 2 - 2, "2050 bytes behind an object"),
            (second, -1, "1 byte before an object"),
            (second, -page / 2, "2048 bytes before an object"),
            (second, 8192, "1 byte behind an object"),
            (second, 8192 + page - 1, "4096 bytes behind an object"),
            (first, 64 - page - 1, "4033 bytes before an object"),
        ] {
            let text = explain(heap, block, offset);
            assert_eq!(first_line(&text), expected);
            assert!(text.contains(&format!("object: {block:p}, ")), "{text}");
        }
        assert!(heap.explain(first.as_ptr().addr()).is_none(), "it is mapped");
        assert!(heap.explain(0).is_none() && heap.explain(usize::MAX).is_none());
        assert!(heap.explain(second.as_ptr().addr() + 20 * FRAME_SIZE).is_none(), "nobody was ever there");
        free(heap, first, 61);
        free(heap, second, 8192);
    });
}

#[test]
fn rows_25_and_26_an_access_after_the_free_is_named_as_long_as_the_place_rests() {
    with_rules("size-64:guard,audit", |heap, pages| {
        let settled = || {
            heap.shrink();
            heap.frames().free_bytes()
        };
        free(heap, allocate(heap, 64), 64);
        let before = settled();
        let block = allocate(heap, 64);
        assert_eq!(pages.mapped(), 1);
        free(heap, block, 64);
        assert_eq!((pages.mapped(), settled()), (0, before));
        for offset in [0, 63, 64 - FRAME_SIZE as isize] {
            let text = explain(heap, block, offset);
            assert_eq!(first_line(&text), "read or written after it was freed");
            assert_eq!(
                line(&text, "object"),
                Some(&*format!("{block:p}, slot 1, 64 bytes, 64 requested, aligned to 8"))
            );
            let [allocated, freed] = ["allocated", "freed"].map(|name| line(&text, name).unwrap());
            assert!(allocated.starts_with("event 3, CPU 0, ") && freed.starts_with("event 4, CPU 0, "), "{text}");
        }
        // The other six are used first, and then it is known no longer.
        for _ in 0..PLACES - 1 {
            assert_eq!(first_line(&explain(heap, block, 0)), "read or written after it was freed");
            let other = allocate(heap, 64);
            assert!(pages.has(other) && other != block);
            free(heap, other, 64);
        }
        assert_eq!(allocate(heap, 64), block);
        assert!(heap.explain(block.as_ptr().addr()).is_none());
        free(heap, block, 64);
    });
}

#[test]
fn rows_1_7_8_9_15_16_and_43_bad_frees_of_guarded_objects_are_refused() {
    with_rules("*:guard,audit", |heap, pages| {
        let cache = Cache::new(heap.caches(), "dentry", layout(61, 8));
        let [block, entry] = [allocate(heap, 61), cache.allocate().unwrap()];
        assert!(pages.has(block) && pages.has(entry));
        let at = |offset: usize| block.map_addr(|address| address.checked_add(offset).unwrap());
        let refused = |pointer: NonNull<u8>, wanted, expected: &str, row: &str| {
            // SAFETY: refused.
            let report = full_report_of(|| unsafe { heap.free(pointer, wanted) });
            assert_eq!(first_line(&report), format!("kslab: bad free of {pointer:p}: {expected}"), "{row}");
            report
        };
        let size = "wrong layout: freed as a block of 60 bytes, allocated as one of 61";
        refused(block, layout(60, 8), size, "row 15");
        let align = "wrong layout: freed as aligned to 4 bytes, allocated as aligned to 8";
        refused(block, layout(61, 4), align, "row 16");
        refused(at(8), layout(61, 8), "not the start of an allocation", "row 7");
        refused(at(3), layout(61, 8), "not the start of an allocation", "row 8");
        refused(at(5 * STRIDE), layout(61, 8), "not memory of this allocator", "nobody was there");
        refused(entry, layout(61, 8), "wrong cache: freed to the heap, allocated from dentry", "row 9");
        // SAFETY: refused.
        let report = report_of(|| unsafe { cache.free(block) });
        assert!(report.ends_with("wrong cache: freed to dentry, allocated from size-64"), "row 9: {report}");
        free(heap, block, 61);
        let twice = "double free: it is free already, or was never allocated";
        let report = refused(block, layout(61, 8), twice, "row 1");
        assert_eq!(line(&report, "kind"), Some("DUPFREE"));
        assert_eq!(line(&report, "cache"), Some("size-64"));
        assert!(line(&report, "freed").unwrap().starts_with("event 3, "), "{report}");
        // SAFETY: refused.
        let report = report_of(|| _ = unsafe { heap.reallocate(block, layout(61, 8), 70) });
        assert!(report.ends_with(twice), "row 43: {report}");
        // SAFETY: allocated above.
        unsafe { cache.free_bulk(&[entry]) };
        // SAFETY: refused.
        assert!(report_of(|| unsafe { cache.free(entry) }).ends_with(twice));
        cache.destroy().unwrap();
        assert_eq!(pages.mapped(), 0);
        assert_eq!(line(&explain(heap, entry, 0), "cache"), None, "it is no more");
    });
}

#[test]
fn rows_17_19_and_20_a_write_within_the_pages_but_not_the_object_is_found_at_the_free_and_before() {
    for (row, offset) in [(17, 61), (20, 63), (19, -1), (19, 64 - FRAME_SIZE as isize)] {
        with_rules("*:guard,audit", |heap, pages| {
            let block = allocate(heap, 61);
            write(block, offset, 0);
            let address = block.as_ptr().wrapping_offset(offset);
            let expected = format!("kslab: damage at {address:p}: written to outside the object");
            assert_eq!(report_of(|| _ = heap.check_objects()), expected, "row {row}");
            let report = full_report_of(|| free(heap, block, 61));
            assert_eq!(first_line(&report), expected, "row {row}");
            assert_eq!(line(&report, "cache"), Some("size-64"));
            assert!(line(&report, "damage").unwrap().starts_with(&format!("at offset {offset}: ")), "{report}");
            assert_eq!(heap.check_objects(), 0);
            assert_eq!(pages.mapped(), 1, "it is kept out");
        });
    }
}

#[test]
fn a_limit_counts_guarded_objects_and_those_that_wait_to_be_unmapped() {
    for rules in ["limited:guard", "limited:guard/2", "limited:guard,quarantine"] {
        with_rules(rules, |heap, pages| {
            let cache = Cache::new(heap.caches(), "limited", layout(100, 8)).with_limit(4);
            let mut objects: Vec<_> = (0..4).map(|_| cache.allocate().unwrap()).collect();
            assert_eq!(cache.allocate(), Err(AllocError::AtLimit), "{rules}");
            pages.refuse_unmap.store(true, Ordering::Relaxed);
            // SAFETY: allocated above.
            objects.drain(..2).for_each(|object| unsafe { cache.free(object) });
            pages.refuse_unmap.store(false, Ordering::Relaxed);
            objects.extend((0..2).map(|_| cache.allocate().unwrap()));
            assert_eq!(cache.allocate(), Err(AllocError::AtLimit), "{rules}");
            assert_eq!(cache.stats().unwrap().in_use, 4, "{rules}");
            // SAFETY: as above.
            objects.into_iter().for_each(|object| unsafe { cache.free(object) });
            cache.destroy().unwrap();
            assert_eq!(pages.mapped(), 0, "{rules}");
        });
    }
}

#[test]
fn what_cannot_be_unmapped_is_free_and_waits() {
    with_rules("size-64:guard,poison", |heap, pages| {
        let blocks: Vec<_> = (0..3).map(|_| allocate(heap, 64)).collect();
        pages.refuse_unmap.store(true, Ordering::Relaxed);
        blocks.iter().for_each(|block| free(heap, *block, 64));
        assert_eq!((pages.mapped(), heap.check_objects()), (3, 0));
        let report = report_of(|| free(heap, blocks[0], 64));
        assert!(report.ends_with("double free: it is free already, or was never allocated"), "{report}");
        heap.maintain(0);
        assert_eq!(pages.mapped(), 3);
        pages.refuse_unmap.store(false, Ordering::Relaxed);
        free(heap, allocate(heap, 64), 64);
        assert_eq!(pages.mapped(), 1, "a free unmaps two that wait");
        heap.maintain(0);
        assert_eq!(pages.mapped(), 0);
    });
    with_rules("size-64:guard,poison", |heap, pages| {
        let [written, waits, last] = [(); 3].map(|()| allocate(heap, 64));
        pages.refuse_unmap.store(true, Ordering::Relaxed);
        free(heap, waits, 64);
        free(heap, written, 64);
        pages.refuse_unmap.store(false, Ordering::Relaxed);
        write(written, 5, 0);
        let report = full_report_of(|| free(heap, last, 64));
        let address = written.as_ptr().wrapping_add(5);
        assert_eq!(first_line(&report), format!("kslab: damage at {address:p}: written to after it was freed"));
        assert_eq!(line(&report, "kind"), Some("MODIFIED"));
        heap.shrink();
        assert_eq!(pages.mapped(), 1, "that which was written to is kept out");
    });
}

#[test]
fn what_cannot_be_guarded_has_the_other_checks() {
    with_rules("*:guard,redzone", |heap, pages| {
        let is_checked = |wanted: Layout| {
            let block = heap.allocate(wanted).unwrap();
            assert!(!pages.has(block), "{wanted:?}");
            write(block, wanted.size() as isize, 0);
            // SAFETY: allocated above.
            let report = report_of(|| unsafe { heap.free(block, wanted) });
            assert!(report.ends_with("written to outside the object"), "{report}");
        };
        for (size, align) in [(8193, 1), (64, 8192)] {
            let large = Cache::new(heap.caches(), "large", layout(size, align));
            assert!(!pages.has(large.allocate().unwrap()));
        }
        pages.refuse_map.store(true, Ordering::Relaxed);
        is_checked(layout(64, 8));
        pages.refuse_map.store(false, Ordering::Relaxed);
        // A quarter of the places rests.
        let blocks: Vec<_> = (0..PLACES - PLACES / 4).map(|_| allocate(heap, 64)).collect();
        assert!(blocks.iter().all(|block| pages.has(*block)));
        is_checked(layout(64, 8));
        blocks.into_iter().for_each(|block| free(heap, block, 64));
        let again = allocate(heap, 64);
        assert!(pages.has(again), "there are places again");
        free(heap, again, 64);
    });
    // Without anybody to map pages.
    let machine = Machine::new(START, 512);
    let heap = machine.heap();
    heap.set_checks("*:guard").unwrap();
    free(&heap, allocate(&heap, 64), 64);
    assert!(heap.explain(0x1000).is_none());
}

#[test]
fn one_in_so_many_objects_of_a_cache_is_guarded() {
    with_rules("size-64:guard/4;size-128:guard;size-256:guard/3", |heap, pages| {
        for (size, expected) in [(64, 3), (128, 12), (256, 3)] {
            let guarded = (0..12).filter(|_| {
                let block = allocate(heap, size);
                free(heap, block, size);
                pages.has(block)
            });
            assert_eq!(guarded.count(), expected, "{size}");
        }
    });
    assert_eq!(format!("{:?}", Checks::guard_one_in(12) | Checks::POISON), "poison,guard/16");
    assert_eq!(Checks::guard_one_in(16) | Checks::guard_one_in(4), Checks::guard_one_in(4));
    assert_eq!(Checks::guard_one_in(16) | Checks::GUARD, Checks::GUARD);
    assert_eq!(Checks::guard_one_in(0), Checks::GUARD);
    assert_eq!(Checks::guard_one_in(u16::MAX), Checks::guard_one_in(1 << 15));
    for word in ["guard/", "guard/x", "guard/65536"] {
        assert_eq!(crate::check::Rules::new(std::format!("*:{word}").leak()).unwrap_err().word, word);
    }
}

#[test]
fn guarded_objects_are_in_every_list_of_objects() {
    with_rules("*:guard,audit", |heap, pages| {
        let cache = Cache::new(heap.caches(), "inode", layout(96, 8));
        let objects = [(); 3].map(|()| cache.allocate().unwrap());
        let root = allocate(heap, 16);
        assert!(objects.iter().chain([&root]).all(|object| pages.has(*object)));
        let mut seen = Vec::new();
        cache.for_each_object(|object| seen.push(object));
        seen.sort();
        let mut expected = objects.to_vec();
        expected.sort();
        assert_eq!(seen, expected);
        let mut bytes = 0;
        heap.for_each_allocation(|allocation| bytes += allocation.size);
        assert_eq!(bytes, 3 * 96 + 16);
        let mut sites = Vec::new();
        heap.for_each_site(|site| sites.push((site.objects, site.bytes)));
        sites.sort();
        // Under Miri each call has a place of its own.
        assert!(cfg!(miri) || sites == [(1, 16), (3, 288)], "{sites:?}");
        let stats = cache.stats().unwrap();
        assert_eq!((stats.in_use, stats.allocations), (3, 3));
        // One is known from the root, and knows the next.
        let point = |from: NonNull<u8>, to: NonNull<u8>| {
            // SAFETY: both have so many bytes.
            unsafe { from.cast::<*mut u8>().write(to.as_ptr()) };
        };
        point(root, objects[0]);
        point(objects[0], objects[1]);
        // SAFETY: of the cache's size, as the others that were not written to.
        objects[1..].iter().for_each(|object| unsafe { object.write_bytes(0, 96) });
        let roots = [root.as_ptr()];
        let memory = roots.as_ptr_range();
        let mut leaks = Vec::new();
        // SAFETY: nobody else uses the heap; the roots are there.
        unsafe { heap.find_leaks(&[memory.start.cast()..memory.end.cast()], |leak| leaks.push(leak.object)) };
        assert_eq!(leaks, [objects[2]]);
        let refused = cache.destroy().unwrap_err();
        assert_eq!(refused.objects, 3);
        assert_eq!(format!("{refused}").lines().count(), if cfg!(miri) { 4 } else { 2 });
        // SAFETY: allocated above.
        unsafe { refused.cache.free_bulk(&objects) };
        refused.cache.destroy().unwrap();
        free(heap, root, 16);
    });
}

static CONSTRUCTED: AtomicUsize = AtomicUsize::new(0);

struct Counted(u64);

impl Object for Counted {
    fn init() -> Result<Self, InitFailed> {
        match CONSTRUCTED.fetch_add(1, Ordering::Relaxed) {
            0 | 1 => Ok(Self(0x1234)),
            _ => Err(InitFailed),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        assert_eq!(self.0, 0x1234);
        CONSTRUCTED.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn guarded_objects_are_constructed_and_a_constructor_that_fails_gives_the_place_back() {
    with_rules("counted:guard", |heap, pages| {
        let cache = ObjectCache::<Counted, _>::new(heap.caches(), "counted");
        let [one, two] = [cache.allocate().unwrap(), cache.allocate().unwrap()];
        assert!(pages.has(NonNull::from(&*one).cast()));
        assert_eq!((one.0, two.0, pages.mapped()), (0x1234, 0x1234, 2));
        assert_eq!(cache.allocate().err(), Some(AllocError::ConstructorFailed));
        assert_eq!(pages.mapped(), 2);
        drop((one, two));
        assert_eq!((pages.mapped(), CONSTRUCTED.load(Ordering::Relaxed)), (0, 1), "all but that which failed");
        cache.destroy().unwrap();
    });
}

#[test]
fn in_an_nmi_nothing_is_mapped_or_unmapped() {
    with_rules_on::<Threads>("size-64:guard", |heap, pages| {
        let block = allocate(heap, 64);
        pages.refuse_map.store(true, Ordering::Relaxed);
        let spare = allocate(heap, 64);
        free(heap, spare, 64);
        pages.refuse_map.store(false, Ordering::Relaxed);
        be_cpu(IN_NMI);
        free(heap, block, 64);
        let other = heap.allocate(layout(64, 8)).expect("the spare one");
        let text = explain(heap, block, 64);
        be_cpu(0);
        assert_eq!(first_line(&text), "1 byte behind an object");
        assert_eq!((pages.has(other), pages.mapped()), (false, 1));
        let report = report_of(|| free(heap, block, 64));
        assert!(report.ends_with("double free: it is free already, or was never allocated"), "{report}");
        heap.maintain(0);
        assert_eq!(pages.mapped(), 0);
        free(heap, other, 64);
    });
}

#[test]
fn an_access_is_named_though_the_registry_is_locked_for_good() {
    with_rules("*:guard", |heap, _| {
        let block = allocate(heap, 64);
        let text = heap.caches().with_registry_locked(|| explain(heap, block, 64));
        assert_eq!((first_line(&text), line(&text, "cache")), ("1 byte behind an object", None));
        free(heap, block, 64);
    });
}

#[test]
fn several_cpus_allocate_and_free_guarded_objects() {
    with_rules_on::<Threads>("*:guard,redzone", |heap, pages| {
        let work = |cpu: usize| {
            be_cpu(cpu);
            let mut held = Vec::new();
            for round in 0..if cfg!(miri) { 5 } else { 1000 } {
                let size = [8, 64, 200, 5000][(round + cpu) % 4];
                let block = allocate(heap, size);
                // SAFETY: the block has so many bytes.
                unsafe { block.write_bytes(cpu as u8, size) };
                held.push((block, size));
                pages.refuse_unmap.store(round % 7 == 0, Ordering::Relaxed);
                if held.len() > round % 4 {
                    let (block, size) = held.swap_remove(round % held.len());
                    // SAFETY: as above.
                    assert!((0..size).all(|at| unsafe { block.add(at).read() } == cpu as u8));
                    free(heap, block, size);
                }
            }
            held.into_iter().for_each(|(block, size)| free(heap, block, size));
        };
        thread::scope(|scope| (1..4).for_each(|cpu| _ = scope.spawn(move || work(cpu))));
        pages.refuse_unmap.store(false, Ordering::Relaxed);
        heap.shrink();
        assert_eq!((pages.mapped(), heap.check_objects()), (0, 0));
        let blocks: Vec<_> = (0..PLACES - PLACES / 4).map(|_| allocate(heap, 8)).collect();
        assert!(blocks.iter().all(|block| pages.has(*block)), "no place was lost");
        blocks.into_iter().for_each(|block| free(heap, block, 8));
    });
}

#[test]
fn pages_are_set_once_and_not_for_a_heap_within_another() {
    with_rules("*:none", |heap, pages| {
        assert!(!heap.set_guard(pages.forever()));
        let child = heap.create_heap("process", 256 << 10).unwrap();
        assert!(!child.set_guard(pages.forever()));
    });
}
