use core::alloc::Layout;
use core::ptr::NonNull;
use std::string::String;
use std::vec::Vec;
use std::{format, thread_local};

use proptest::prelude::*;

use super::*;
use crate::fault::{OnFault, Report};
use crate::memory::FRAME_SIZE;
use crate::sync::{AtomicUsize, Ordering};
use crate::testing::{Heap, Machine, check_kind, full_report_of, report_of};
use crate::{AllocError, Cache, InitFailed, Object, ObjectCache};

const START: u64 = 64 << 20;
const EVERYTHING: &str = "*:redzone,poison,audit";

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

/// A heap whose caches follow these rules.
fn with_rules(rules: &'static str, test: impl FnOnce(&Heap)) {
    let machine = Machine::new(START, 512);
    let heap = machine.heap();
    heap.set_checks(rules).unwrap();
    test(&heap);
    heap.verify().unwrap();
}

fn allocate(heap: &Heap, size: usize) -> NonNull<u8> {
    heap.allocate(layout(size, 8)).unwrap()
}

fn free(heap: &Heap, block: NonNull<u8>, size: usize) {
    // SAFETY: the tests do not use what they have freed, or it is refused.
    unsafe { heap.free(block, layout(size, 8)) }
}

fn write(block: NonNull<u8>, offset: isize, byte: u8) {
    // SAFETY: in the slot of the block, as the tests know.
    unsafe { block.offset(offset).write(byte) }
}

fn read(block: NonNull<u8>, offset: isize) -> u8 {
    // SAFETY: as above.
    unsafe { block.offset(offset).read() }
}

/// The value of a line `  name: value` of a report.
fn line<'a>(report: &'a str, name: &str) -> Option<&'a str> {
    report.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(": "))
}

thread_local! {
    static REPORTS: core::cell::RefCell<Vec<String>> = const { core::cell::RefCell::new(Vec::new()) };
}

fn keep_out(report: &Report) -> OnFault {
    let report = format!("{report}");
    check_kind(&report);
    REPORTS.with_borrow_mut(|reports| reports.push(report));
    OnFault::KeepOut
}

/// The first line of each report since this was last asked.
fn reports() -> Vec<String> {
    let reports = REPORTS.take();
    reports.iter().map(|report| report.lines().next().unwrap_or_default().into()).collect()
}

#[test]
fn rules_name_caches_by_name_or_by_start_and_the_first_counts() {
    let rules = Rules::new("dentry:redzone,poison; size-*:audit;inode:none;*:all").unwrap();
    assert_eq!(rules.checks_of("dentry"), Some(Checks::RED_ZONE | Checks::POISON));
    assert_eq!(rules.checks_of("size-64"), Some(Checks::AUDIT));
    assert_eq!(rules.checks_of("inode"), Some(Checks::NONE));
    assert_eq!(rules.checks_of("file"), Some(Checks::ALL));
    assert_eq!(Rules::new("dentry:zero").unwrap().checks_of("inode"), None);
    assert_eq!(Rules::new("").unwrap().checks_of("inode"), None);
}

#[test]
fn a_word_that_is_no_check_is_named() {
    for (rules, word) in [("*:redzone,poisn", "poisn"), ("dentry", "dentry"), ("a:audit;b:", "")] {
        assert_eq!(Rules::new(rules).unwrap_err().word, word);
    }
    let text = format!("{}", Rules::new("a:b").unwrap_err());
    assert_eq!(
        text,
        "`b` is no check; rules look like `dentry:redzone,poison;size-*:audit`, and the checks are redzone poison audit \
         quarantine random zero zerofree guard all"
    );
    assert_eq!(format!("{:?}", Checks::RED_ZONE | Checks::ZERO), "redzone,zero");
    assert_eq!(format!("{:?}", Checks::NONE), "none");
}

#[test]
fn objects_with_checks_are_blocks_like_any_other() {
    with_rules("*:all,random", |heap| {
        let mut blocks = Vec::new();
        for size in [1, 8, 13, 64, 100, 500, 1000, 4096, 8192] {
            for align in [1, 8, 64, 4096] {
                let layout = layout(size, align);
                let block = heap.allocate(layout).unwrap();
                assert!(block.as_ptr().addr().is_multiple_of(align), "{layout:?}");
                // SAFETY: the block has so many bytes.
                unsafe { block.write_bytes(blocks.len() as u8, size) };
                blocks.push((block, layout));
            }
        }
        for (index, (block, layout)) in blocks.into_iter().enumerate() {
            assert_eq!([read(block, 0), read(block, layout.size() as isize - 1)], [index as u8; 2]);
            // SAFETY: allocated above.
            let grown = unsafe { heap.reallocate(block, layout, layout.size() + 50) }.unwrap();
            assert_eq!(read(grown, layout.size() as isize - 1), index as u8);
            let grown_layout = Layout::from_size_align(layout.size() + 50, layout.align()).unwrap();
            // SAFETY: as above.
            unsafe { heap.free(grown, grown_layout) };
        }
        assert_eq!(heap.check_objects(), 0);
    });
}

#[test]
fn rows_17_to_20_a_byte_beside_an_object_is_found_at_its_free() {
    // 61 bytes in a class of 64: three bytes of slack, then the red zone of the class.
    for (row, offset) in [(17, 61), (18, 68), (18, 79), (19, -1), (19, -16), (20, 62)] {
        with_rules(EVERYTHING, |heap| {
            let block = allocate(heap, 61);
            let before = read(block, offset);
            write(block, offset, 0);
            let report = full_report_of(|| free(heap, block, 61));
            let address = block.as_ptr().wrapping_offset(offset);
            let expected = format!("kslab: damage at {address:p}: written to outside the object");
            assert_eq!(report.lines().next(), Some(&*expected), "row {row}");
            assert_eq!(line(&report, "kind"), Some("REDZONE"));
            assert_eq!(line(&report, "cache"), Some("size-64"));
            let object = format!("{block:p}, slot 0, 64 bytes, 61 requested, aligned to 8");
            assert_eq!(line(&report, "object"), Some(&*object));
            let damage = format!("at offset {offset}: expected {before:#04x}, found 0x00");
            assert_eq!(line(&report, "damage"), Some(&*damage));
            assert!(line(&report, "dump").unwrap().contains("[00]"), "{report}");
            assert!(line(&report, "allocated").unwrap().contains("check/tests.rs:"), "{report}");
            assert_eq!(line(&report, "freed"), None);
            assert!(line(&report, "now").unwrap().contains("check/tests.rs:"), "{report}");
        });
    }
}

#[test]
fn rows_22_to_24_a_write_after_the_free_is_found_at_the_next_allocation_and_before() {
    for (row, offset) in [(22, 0), (24, 7), (23, 30), (23, 63)] {
        with_rules(EVERYTHING, |heap| {
            let block = allocate(heap, 64);
            free(heap, block, 64);
            assert_eq!(heap.check_objects(), 0);
            write(block, offset, 0x55);
            let check = report_of(|| _ = heap.check_objects());
            let address = block.as_ptr().wrapping_offset(offset);
            assert_eq!(check, format!("kslab: damage at {address:p}: written to after it was freed"), "row {row}");
        });
        with_rules(EVERYTHING, |heap| {
            let block = allocate(heap, 64);
            free(heap, block, 64);
            write(block, offset, 0x55);
            let report = full_report_of(|| _ = allocate(heap, 64));
            assert_eq!(line(&report, "kind"), Some("MODIFIED"), "row {row}");
            let [allocated, freed, now] = ["allocated", "freed", "now"].map(|name| line(&report, name).unwrap());
            assert!(allocated.starts_with("event 1, CPU 0, ") && freed.starts_with("event 2, CPU 0, "), "{report}");
            assert!(now.starts_with("CPU 0, "), "{report}");
        });
    }
}

#[test]
fn row_25_what_is_read_of_memory_that_is_not_written_or_free_is_a_pattern() {
    with_rules("*:poison", |heap| {
        let block = allocate(heap, 64);
        // SAFETY: with poison a block is initialised, and what is freed stays readable.
        let word = |at: usize| unsafe { block.cast::<u64>().add(at).read() };
        assert_eq!([word(0), word(7)], [0xbadd_cafe_badd_cafe; 2]);
        free(heap, block, 64);
        assert_eq!([word(0), word(7)], [0xdead_beef_dead_beef; 2]);
    });
}

#[test]
fn row_27_a_red_zone_that_is_overwritten_while_free_is_found() {
    with_rules(EVERYTHING, |heap| {
        let block = allocate(heap, 64);
        free(heap, block, 64);
        write(block, -3, 1);
        let report = report_of(|| _ = allocate(heap, 64));
        assert!(report.ends_with(": written to outside the object"), "{report}");
    });
}

#[test]
fn row_31_with_its_tag_overwritten_too_an_object_is_still_named() {
    with_rules(EVERYTHING, |heap| {
        let block = allocate(heap, 64);
        (64..200).for_each(|offset| write(block, offset, 0x41));
        let report = full_report_of(|| free(heap, block, 64));
        assert_eq!(line(&report, "kind"), Some("BADBUFTAG"));
        assert_eq!(line(&report, "cache"), Some("size-64"));
        assert_eq!(line(&report, "object"), Some(&*format!("{block:p}, slot 0, 64 bytes")));
        assert_eq!(line(&report, "allocated"), None, "it is not known any more");
    });
}

#[test]
fn rows_1_2_6_7_8_15_and_16_bad_frees_are_refused_with_what_is_known() {
    with_rules("*:all", |heap| {
        let [block, other, third] = [(); 3].map(|()| allocate(heap, 61));
        let at = |offset: usize| block.map_addr(|address| address.checked_add(offset).unwrap());
        let refused = |pointer: NonNull<u8>, layout, expected: &str, row: &str| {
            // SAFETY: refused.
            let report = full_report_of(|| unsafe { heap.free(pointer, layout) });
            let expected = format!("kslab: bad free of {pointer:p}: {expected}");
            assert_eq!(report.lines().next(), Some(&*expected), "{row}");
            heap.verify().unwrap();
            report
        };
        let size = "wrong layout: freed as a block of 60 bytes, allocated as one of 61";
        refused(block, layout(60, 8), size, "row 15, within the class");
        let align = "wrong layout: freed as aligned to 4 bytes, allocated as aligned to 8";
        refused(block, layout(61, 4), align, "row 16, within the class");
        let far = "wrong layout: freed as a block of 1000 bytes, allocated as one of 61";
        refused(block, layout(1000, 8), far, "row 15, another class");
        refused(at(8), layout(61, 8), "not the start of an allocation", "row 7");
        refused(at(3), layout(61, 8), "not the start of an allocation", "row 8");
        free(heap, block, 61);
        free(heap, other, 61);
        let twice = "double free: it is free already, or was never allocated";
        let report = refused(block, layout(61, 8), twice, "rows 2 and 6");
        assert_eq!(line(&report, "kind"), Some("DUPFREE"));
        assert!(line(&report, "freed").unwrap().starts_with("event 4, "), "{report}");
        heap.shrink();
        refused(block, layout(61, 8), twice, "row 2, no longer in quarantine");
        // SAFETY: refused.
        let report = report_of(|| _ = unsafe { heap.reallocate(other, layout(61, 8), 70) });
        assert!(report.ends_with(twice), "row 43: {report}");
        free(heap, third, 61);
    });
}

#[test]
fn a_quarantined_object_comes_back_when_as_many_bytes_have_been_freed() {
    with_rules("size-64:quarantine,poison", |heap| {
        let first = allocate(heap, 64);
        free(heap, first, 64);
        let others: Vec<_> = (0..50).map(|_| allocate(heap, 64)).collect();
        assert!(!others.contains(&first), "it waits");
        others.into_iter().for_each(|block| free(heap, block, 64));
        write(first, 5, 1);
        heap.set_quarantine(0);
        let report = report_of(|| free(heap, allocate(heap, 64), 64));
        assert!(report.ends_with("written to after it was freed"), "found when it leaves: {report}");
    });
}

#[test]
fn at_most_256_objects_wait_and_all_go_when_memory_is_called_for() {
    with_rules("size-8:quarantine", |heap| {
        let blocks: Vec<_> = (0..300).map(|_| allocate(heap, 8)).collect();
        let frames = heap.frames().free_bytes();
        blocks.into_iter().for_each(|block| free(heap, block, 8));
        heap.shrink();
        assert!(heap.frames().free_bytes() > frames + 8 * FRAME_SIZE, "its slabs are free");
    });
}

#[test]
fn zero_on_allocate_and_zero_on_free_leave_zeros() {
    with_rules("*:zero,zerofree", |heap| {
        let block = allocate(heap, 100);
        assert!((0..100).all(|offset| read(block, offset) == 0));
        (0..100).for_each(|offset| write(block, offset, 7));
        free(heap, block, 100);
        assert!((0..100).all(|offset| read(block, offset) == 0));
    });
}

#[test]
fn zero_or_zerofree_alone_leaves_zeros_in_a_slot_that_was_used_before() {
    for rules in ["*:zero", "*:zerofree"] {
        with_rules(rules, |heap| {
            let block = allocate(heap, 100);
            (0..100).for_each(|offset| write(block, offset, 7));
            free(heap, block, 100);
            let is_zero = || (0..100).all(|offset| read(block, offset) == 0);
            assert_eq!(is_zero(), rules == "*:zerofree");
            assert_eq!(allocate(heap, 100), block);
            assert!(is_zero(), "{rules}");
            free(heap, block, 100);
        });
    }
}

#[test]
fn random_slots_come_in_another_order_for_another_seed() {
    let order = |rules, seed| {
        let machine = Machine::new(START, 512);
        let heap = machine.heap();
        heap.set_seed(seed);
        heap.set_checks(rules).unwrap();
        // All in one slab.
        let blocks: Vec<_> = (0..16).map(|_| allocate(&heap, 8)).collect();
        let order: Vec<_> = blocks.iter().map(|block| block.as_ptr().addr() % FRAME_SIZE).collect();
        heap.verify().unwrap();
        order
    };
    let plain = order("*:zero", 1);
    assert!(plain.is_sorted(), "{plain:?}");
    assert!(!order("*:random", 1).is_sorted());
    assert_eq!(order("*:random", 1), order("*:random", 1));
    assert_ne!(order("*:random", 1), order("*:random", 2));
}

#[test]
fn checks_can_be_switched_at_any_time_and_objects_of_both_kinds_stand_side_by_side() {
    let machine = Machine::new(START, 512);
    let heap = machine.heap();
    let plain = allocate(&heap, 64);
    heap.set_checks("size-64:redzone").unwrap();
    let checked = allocate(&heap, 64);
    heap.set_checks("size-64:none").unwrap();
    let plain_again = allocate(&heap, 64);
    assert_ne!(plain.as_ptr().addr() / FRAME_SIZE, checked.as_ptr().addr() / FRAME_SIZE);
    write(checked, 64, 0);
    let report = report_of(|| free(&heap, checked, 64));
    assert!(report.ends_with("written to outside the object"), "it keeps what it was allocated with");
    free(&heap, plain, 64);
    free(&heap, plain_again, 64);
    heap.verify().unwrap();
}

#[test]
fn an_embedder_may_keep_bad_objects_out_and_go_on() {
    with_rules("*:redzone,poison", |heap| {
        heap.set_fault_handler(Some(keep_out));
        let [over, after, twice] = [(); 3].map(|()| allocate(heap, 64));
        write(over, 64, 0);
        free(heap, over, 64);
        assert_eq!(
            reports(),
            [format!("kslab: damage at {:p}: written to outside the object", over.as_ptr().wrapping_add(64))]
        );
        free(heap, after, 64);
        write(after, 1, 0);
        free(heap, twice, 64);
        free(heap, twice, 64);
        assert_eq!(reports().len(), 1, "the second free");
        let more: Vec<_> = (0..200).map(|_| allocate(heap, 64)).collect();
        assert_eq!(reports().len(), 1, "what was written to");
        assert!(!more.contains(&over) && !more.contains(&after) && more.contains(&twice));
        assert_eq!(heap.faults(), 3);
        more.into_iter().for_each(|block| free(heap, block, 64));
        assert_eq!(heap.check_objects(), 0);
    });
}

#[test]
fn row_87_a_fault_of_the_handler_is_counted_and_not_reported() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    static HEAP: Heap = Heap::new();
    fn handler(report: &Report) -> OnFault {
        CALLS.fetch_add(1, Ordering::Relaxed);
        let block = NonNull::new(report.pointer.cast_mut()).unwrap();
        // SAFETY: refused.
        unsafe { HEAP.free(block, layout(64, 8)) };
        OnFault::KeepOut
    }
    let machine = Machine::new(START, 512);
    // SAFETY: the memory outlives every use of the heap.
    unsafe { HEAP.init([machine.region()], machine.base()) }.unwrap();
    HEAP.set_fault_handler(Some(handler));
    let block = allocate(&HEAP, 64);
    free(&HEAP, block, 64);
    free(&HEAP, block, 64);
    assert_eq!((CALLS.load(Ordering::Relaxed), HEAP.faults()), (1, 2));
    free(&HEAP, block, 64);
    assert_eq!((CALLS.load(Ordering::Relaxed), HEAP.faults()), (2, 4), "the next one is reported again");
}

#[test]
fn return_addresses_come_from_the_embedder() {
    with_rules("*:audit", |heap| {
        heap.set_backtrace(Some(|addresses| addresses[..2].copy_from_slice(&[0x1000, 0x2000])));
        let block = allocate(heap, 8);
        free(heap, block, 8);
        let report = full_report_of(|| free(heap, block, 8));
        for name in ["allocated", "freed", "now"] {
            assert!(line(&report, name).unwrap().ends_with(", by 0x1000 0x2000"), "{report}");
        }
    });
}

static CONSTRUCTED: AtomicUsize = AtomicUsize::new(0);

struct Counted(u64);

impl Object for Counted {
    fn init() -> Result<Self, InitFailed> {
        CONSTRUCTED.fetch_add(1, Ordering::Relaxed);
        Ok(Self(0x1234))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        assert_eq!(self.0, 0x1234);
        CONSTRUCTED.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn in_a_cache_that_constructs_each_use_has_an_object_of_its_own() {
    with_rules("counted:all", |heap| {
        let cache = ObjectCache::<Counted, _>::new(heap.caches(), "counted");
        let [one, two] = [cache.allocate().unwrap(), cache.allocate().unwrap()];
        assert_eq!((one.0, CONSTRUCTED.load(Ordering::Relaxed)), (0x1234, 2));
        drop(one);
        assert_eq!(CONSTRUCTED.load(Ordering::Relaxed), 1, "destroyed at its free");
        let two = two.into_raw();
        let refused = cache.destroy().unwrap_err();
        assert_eq!(refused.objects, 1);
        // SAFETY: allocated with the layout of the cache's objects.
        unsafe { refused.cache.free(two.cast()) };
        assert_eq!(CONSTRUCTED.load(Ordering::Relaxed), 0);
        refused.cache.destroy().unwrap();
    });
}

#[test]
fn a_cache_with_checks_leaves_nothing_behind() {
    let machine = Machine::new(START, 512);
    let heap = machine.heap();
    heap.set_checks("*:none").unwrap();
    heap.shrink();
    let before = heap.frames().free_bytes();
    for _ in 0..3 {
        // No rule names it: its own checks count.
        heap.set_checks("x:none").unwrap();
        let cache = Cache::new(heap.caches(), "inode", layout(600, 8)).with_checks(Checks::ALL);
        let objects: Vec<_> = (0..20).map(|_| cache.allocate().unwrap()).collect();
        let mut seen = 0;
        cache.for_each_object(|_| seen += 1);
        assert_eq!(seen, 20);
        let cache = cache.destroy().unwrap_err().cache;
        // SAFETY: allocated above.
        unsafe { cache.free_bulk(&objects[..10]) };
        // SAFETY: as above.
        objects[10..].iter().for_each(|object| unsafe { cache.free(*object) });
        cache.destroy().unwrap();
        heap.shrink();
        heap.verify().unwrap();
    }
    // The places of the quarantine stay.
    assert!(before - heap.frames().free_bytes() <= 2 * FRAME_SIZE);
}

#[test]
fn a_reserve_of_a_cache_with_checks_is_full_and_refilled() {
    with_rules("inode:all", |heap| {
        let cache = Cache::new(heap.caches(), "inode", layout(600, 8));
        let reserve = cache.reserve(3).unwrap();
        assert_eq!(reserve.available(), 3);
        let object = reserve.allocate().unwrap();
        // SAFETY: just allocated.
        unsafe { reserve.free(object) };
        assert_eq!(reserve.available(), 3);
        drop(reserve);
        cache.destroy().unwrap();
    });
}

#[test]
fn a_limit_counts_objects_with_checks_and_those_that_wait() {
    for rules in ["limited:redzone", "limited:quarantine,poison", "limited:all"] {
        with_rules("*:none", |heap| {
            let cache = Cache::new(heap.caches(), "limited", layout(100, 8)).with_limit(10);
            // Three without checks.
            let mut objects: Vec<_> = (0..3).map(|_| cache.allocate().unwrap()).collect();
            heap.set_checks(rules).unwrap();
            objects.extend((3..10).map(|_| cache.allocate().unwrap()));
            assert_eq!(cache.allocate(), Err(AllocError::AtLimit), "{rules}");
            assert_eq!(cache.allocate_without_growing(), Err(AllocError::AtLimit), "{rules}");
            assert_eq!(cache.allocate_bulk(&mut [core::ptr::null_mut(); 3]), 0, "{rules}");
            // SAFETY: allocated above.
            objects.drain(..5).for_each(|object| unsafe { cache.free(object) });
            let mut more = [core::ptr::null_mut(); 30];
            assert_eq!(cache.allocate_bulk(&mut more), 5, "{rules}: also where some wait");
            assert_eq!(cache.stats().unwrap().in_use, 10, "{rules}");
            heap.verify().unwrap();
            objects.extend(more.into_iter().filter_map(NonNull::new));
            // SAFETY: as above.
            unsafe { cache.free_bulk(&objects) };
            cache.destroy().unwrap();
        });
    }
}

#[test]
fn without_memory_for_checks_a_block_of_a_larger_class_or_none_is_given() {
    let machine = Machine::new(START, 64);
    let heap = machine.heap();
    let spare = allocate(&heap, 128);
    free(&heap, spare, 128);
    let mut frames = Vec::new();
    frames.extend(core::iter::from_fn(|| heap.frames().allocate(crate::Order::ZERO)));
    heap.set_checks("*:all").unwrap();
    let blocks: Vec<_> = core::iter::from_fn(|| heap.allocate(layout(64, 8))).collect();
    heap.verify().unwrap();
    blocks.into_iter().for_each(|block| free(&heap, block, 64));
    // SAFETY: allocated above.
    frames.into_iter().for_each(|frame| unsafe { heap.frames().free(frame, crate::Order::ZERO) });
    let block = allocate(&heap, 64);
    free(&heap, block, 64);
    heap.verify().unwrap();
}

#[test]
fn row_03_a_second_free_is_found_as_long_as_the_object_waits_and_not_after_its_next_allocation() {
    with_rules("*:all", |heap| {
        let block = allocate(heap, 64);
        free(heap, block, 64);
        let others: Vec<_> = (0..20).map(|_| allocate(heap, 64)).collect();
        let report = report_of(|| free(heap, block, 64));
        assert!(report.ends_with("double free: it is free already, or was never allocated"), "{report}");
        others.into_iter().for_each(|block| free(heap, block, 64));
    });
    with_rules("*:audit", |heap| {
        let block = allocate(heap, 64);
        free(heap, block, 64);
        // Allocated anew with another size, the second free of the first user does not fit.
        assert_eq!(allocate(heap, 60), block);
        let report = report_of(|| free(heap, block, 64));
        assert!(report.ends_with("freed as a block of 64 bytes, allocated as one of 60"), "{report}");
        free(heap, block, 60);
    });
}

struct Locked(bool);

impl Object for Locked {
    fn init() -> Result<Self, InitFailed> {
        Ok(Self(false))
    }

    fn is_constructed(&self) -> bool {
        !self.0
    }
}

#[test]
fn row_74_an_object_that_is_not_left_as_constructed_is_reported_and_kept_out() {
    for rules in ["locked:none", "locked:all"] {
        with_rules(rules, |heap| {
            heap.set_fault_handler(Some(keep_out));
            let cache = ObjectCache::<Locked, _>::new(heap.caches(), "locked");
            let mut object = cache.allocate().unwrap();
            let address = core::ptr::from_ref(&*object).addr();
            object.0 = true;
            drop(object);
            assert_eq!(
                reports(),
                [format!("kslab: damage at {address:#x}: not given back as its constructor left it")]
            );
            let others: Vec<_> = (0..100).map(|_| cache.allocate().unwrap()).collect();
            assert!(others.iter().all(|other| core::ptr::from_ref(&**other).addr() != address));
            drop(others);
            assert_eq!(cache.stats().unwrap().in_use, 0);
        });
    }
}

#[test]
#[cfg_attr(miri, ignore = "there each call has a place of its own")]
fn row_77_a_cache_that_is_not_destroyed_counts_its_objects_by_the_places_that_made_them() {
    with_rules("inode:audit", |heap| {
        let cache = Cache::new(heap.caches(), "inode", layout(96, 8));
        let mut objects: Vec<_> = (0..20).map(|_| cache.allocate().unwrap()).collect();
        objects.push(cache.allocate().unwrap());
        let refused = cache.destroy().unwrap_err();
        let text = format!("{refused}");
        let mut lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.remove(0), "cache inode is not destroyed: 21 of its objects are allocated");
        lines.sort_by_key(|line| line.len());
        let [one, many] = lines[..] else { panic!("{text}") };
        let last = objects[20];
        let expected = format!("  1 object, 96 bytes, such as {last:p}, allocated: event 21, CPU 0, ");
        assert!(one.starts_with(&expected) && one.contains("check/tests.rs:"), "{text}");
        assert!(many.starts_with("  20 objects, 1920 bytes, such as 0x") && many.contains("check/tests.rs:"), "{text}");
        // SAFETY: allocated above.
        unsafe { refused.cache.free_bulk(&objects) };
        refused.cache.destroy().unwrap();
    });
}

#[test]
fn what_is_allocated_is_counted_by_the_place_that_made_it() {
    with_rules("*:audit", |heap| {
        let mut blocks: Vec<_> = (0..10).map(|_| heap.allocate(layout(40, 8)).unwrap()).collect();
        blocks.extend((0..3).map(|_| heap.allocate(layout(100, 8)).unwrap()));
        let mut sites = Vec::new();
        heap.for_each_site(|site| {
            sites.push((site.objects, site.bytes, site.example.allocated.unwrap().location.unwrap()))
        });
        sites.sort_by_key(|site| site.0);
        let [few, many] = sites[..] else { panic!("{sites:?}") };
        assert_eq!((few.0, few.1, many.0, many.1), (3, 300, 10, 400));
        assert_eq!(few.2.line(), many.2.line() + 1);
        let (few, many) = (blocks.split_off(10), blocks);
        few.into_iter().for_each(|block| free(heap, block, 100));
        many.into_iter().for_each(|block| free(heap, block, 40));
        heap.for_each_site(|site| panic!("{site:?}"));
    });
}

#[test]
fn what_nobody_refers_to_is_a_leak() {
    with_rules("*:poison,audit", |heap| {
        // A list of 200, of which a root knows the last; a ring of two that nobody knows; one whose middle is known.
        let nodes: Vec<_> = (0..200).map(|_| allocate(heap, 32)).collect();
        let point = |from: NonNull<u8>, to: NonNull<u8>| {
            // SAFETY: a block of 32 bytes.
            unsafe { from.cast::<*mut u8>().write(to.as_ptr()) };
        };
        nodes.windows(2).for_each(|pair| point(pair[1], pair[0]));
        let ring = [allocate(heap, 32), allocate(heap, 32)];
        point(ring[0], ring[1]);
        point(ring[1], ring[0]);
        let inner = allocate(heap, 1000);
        let roots = [nodes[199].as_ptr(), inner.as_ptr().wrapping_add(500)];
        let memory = roots.as_ptr_range();
        let mut leaks = Vec::new();
        // SAFETY: nobody else uses the heap; the roots are there.
        unsafe { heap.find_leaks(&[memory.start.cast()..memory.end.cast()], |leak| leaks.push(leak.object)) };
        leaks.sort();
        let mut expected = ring.to_vec();
        expected.sort();
        assert_eq!(leaks, expected);
        let mut sites = Vec::new();
        // SAFETY: as above.
        unsafe {
            heap.find_leaks_by_site(&[memory.start.cast()..memory.end.cast()], |site| {
                sites.push((site.objects, site.bytes));
            });
        }
        // Under Miri each call has a place of its own.
        assert!(cfg!(miri) || sites == [(2, 64)], "{sites:?}");
        heap.verify().unwrap();
        nodes.into_iter().chain(ring).for_each(|block| free(heap, block, 32));
        free(heap, inner, 1000);
    });
}

#[test]
fn the_log_keeps_the_last_events_whatever_becomes_of_the_objects() {
    with_rules("*:audit", |heap| {
        let block = allocate(heap, 24);
        free(heap, block, 24);
        heap.for_each_event(|logged| panic!("there is no log yet: {logged}"));
        assert!(heap.set_event_log(5));
        assert!(!heap.set_event_log(5), "there is one");
        for size in [24, 24, 100, 24] {
            let block = allocate(heap, size);
            free(heap, block, size);
        }
        let mut events = Vec::new();
        heap.for_each_event(|logged| {
            events.push((logged.event.sequence, logged.cache.name, logged.freed, format!("{logged}")))
        });
        let seen: Vec<_> = events.iter().map(|(number, cache, freed, _)| (*number, *cache, *freed)).collect();
        let expected = [(10, "size-24", true), (9, "size-24", false), (8, "size-104", true), (7, "size-104", false)];
        assert_eq!(seen[..4], expected);
        assert_eq!(seen.len(), 5);
        assert!(
            events[0].3.starts_with(&format!("{:p} of size-24 freed: event 10, CPU 0, ", block.as_ptr())),
            "{events:?}"
        );
    });
}

/// What somebody does wrong in the end.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    /// Writes one byte beside an object: so far behind its end, or before its start.
    Beside(isize),
    /// Writes one of its bytes after its free.
    After(usize),
    FreesTwice,
}

fn any_wrong() -> impl Strategy<Value = Wrong> {
    prop_oneof![
        (-16..16_isize).prop_map(Wrong::Beside),
        (0..usize::MAX).prop_map(Wrong::After),
        Just(Wrong::FreesTwice),
    ]
}

/// Some allocations and frees, and then something wrong with a block of `size` bytes: the report.
fn report_after(steps: &[(usize, bool)], size: usize, wrong: Wrong, flip: u8) {
    with_rules("*:all", |heap| {
        let mut live = Vec::new();
        for (index, &(size, frees)) in steps.iter().enumerate() {
            live.push((allocate(heap, size), size));
            if frees {
                let (block, size) = live.swap_remove(index * 7 % live.len());
                free(heap, block, size);
            }
        }
        let block = allocate(heap, size);
        let flip_at = |offset: isize| write(block, offset, read(block, offset) ^ flip);
        let (offset, text, kind) = match wrong {
            Wrong::Beside(offset) => {
                let offset = if offset < 0 { offset } else { size as isize + offset };
                flip_at(offset);
                (Some(offset), "written to outside the object", "REDZONE")
            }
            Wrong::After(offset) => {
                free(heap, block, size);
                let offset = (offset % size) as isize;
                flip_at(offset);
                (Some(offset), "written to after it was freed", "MODIFIED")
            }
            Wrong::FreesTwice => {
                free(heap, block, size);
                (None, "double free: it is free already, or was never allocated", "DUPFREE")
            }
        };
        let found = offset.map(|offset| read(block, offset));
        let report = full_report_of(|| match wrong {
            Wrong::After(_) => _ = heap.check_objects(),
            _ => free(heap, block, size),
        });
        let at = block.as_ptr().wrapping_offset(offset.unwrap_or(0));
        let deed = if offset.is_some() { "damage at" } else { "bad free of" };
        assert_eq!(report.lines().next(), Some(&*format!("kslab: {deed} {at:p}: {text}")));
        assert_eq!(line(&report, "kind"), Some(kind));
        let class = crate::SIZES.into_iter().find(|class| *class >= size).unwrap();
        assert_eq!(line(&report, "cache"), Some(&*format!("size-{class}")));
        let object = line(&report, "object").unwrap();
        let known = format!(", {class} bytes, {size} requested, aligned to 8");
        assert!(object.starts_with(&format!("{block:p}, slot ")) && object.ends_with(&known), "{report}");
        let damage = offset
            .zip(found)
            .map(|(offset, found)| format!("at offset {offset}: expected {:#04x}, found {found:#04x}", found ^ flip));
        assert_eq!(line(&report, "damage"), damage.as_deref());
        let allocated = 1 + steps.iter().map(|(_, frees)| 1 + u64::from(*frees)).sum::<u64>();
        assert!(line(&report, "allocated").unwrap().starts_with(&format!("event {allocated}, CPU 0, ")), "{report}");
        let freed = matches!(wrong, Wrong::Beside(_)).then_some(()).is_none();
        assert_eq!(line(&report, "freed").is_some(), freed, "{report}");
    });
}

proptest! {
    #![proptest_config(crate::testing::cases(200, 2))]

    #[test]
    fn rows_1_6_17_to_20_and_22_to_24_after_whatever_came_before_the_report_is_exactly_right(
        steps in prop::collection::vec((1..1500_usize, any::<bool>()), 0..60),
        size in 1..1500_usize,
        wrong in any_wrong(),
        flip in 1..=u8::MAX,
    ) {
        report_after(&steps, size, wrong, flip);
    }
}
