//! Where a class has no memory, a larger one lends.

use std::format;
use std::vec::Vec;

use super::*;
use crate::testing::report_of;

/// Runs a test on heaps of which nothing is free but objects in one slab of the class of `size`.
fn on_exhausted(size: usize, test: impl Fn(&dyn AnyHeap)) {
    for frames in [16, FRAMES] {
        on_both(frames, |heap| {
            let object = heap.allocate(layout(size, 8)).unwrap();
            let taken: Vec<_> = core::iter::from_fn(|| heap.take_frame()).collect();
            assert!(taken.len() > frames / 2);
            test(heap);
            taken.into_iter().for_each(|frame| heap.free_frame(frame));
            heap.free(object, layout(size, 8));
        });
    }
}

#[test]
fn a_class_without_memory_lends_from_a_larger_one() {
    on_exhausted(500, |heap| {
        let mut lent = Vec::new();
        for (size, byte) in [8, 100, 300, 500].into_iter().cycle().zip(0..) {
            let wanted = layout(size, 8);
            let Some(block) = heap.allocate(wanted) else { break };
            fill(block, size, byte);
            lent.push((block, wanted, byte));
        }
        assert_eq!(lent.len(), 14, "a slab of the class of 512 bytes has fifteen objects, one of which is taken");
        heap.verify();
        for (block, wanted, byte) in lent {
            assert!(holds(block, wanted.size(), byte));
            heap.free(block, wanted);
        }
    });
}

#[test]
fn what_is_lent_is_aligned_as_the_request_says() {
    on_exhausted(384, |heap| {
        let wanted = layout(128, 128);
        let blocks = [(); 3].map(|()| heap.allocate(wanted).expect("384 is a multiple of 128"));
        assert!(blocks.iter().all(|&block| is_aligned(block, 128)));
        assert_eq!(heap.allocate(layout(256, 256)), None, "384 is no multiple of 256");
        blocks.into_iter().for_each(|block| heap.free(block, wanted));
    });
}

#[test]
fn row_1_what_was_lent_and_is_freed_twice_is_a_double_free_whatever_its_layout() {
    on_exhausted(500, |heap| {
        let wanted = layout(100, 8);
        let block = heap.allocate(wanted).unwrap();
        heap.free(block, wanted);
        for layout in [wanted, layout(500, 8), layout(3 * 4096, 8)] {
            let expected = "double free: it is free already, or was never allocated";
            assert!(report_of(|| heap.free(block, layout)).ends_with(expected));
            assert!(report_of(|| _ = heap.reallocate(block, layout, 8)).ends_with(expected));
            heap.verify();
        }
    });
}

#[test]
fn what_is_lent_is_freed_with_its_own_layout_only() {
    on_exhausted(500, |heap| {
        let wanted = layout(100, 8);
        let block = heap.allocate(wanted).unwrap();
        for (layout, freed) in [(layout(500, 8), 512), (layout(90, 8), 96), (layout(2000, 8), 2048)] {
            let report = report_of(|| heap.free(block, layout));
            let expected = format!("wrong layout: freed as a block of {freed} bytes, allocated as one of 104");
            assert!(report.ends_with(&expected), "{report}");
        }
        heap.free(block, wanted);
        let report = report_of(|| heap.free(block, layout(500, 8)));
        assert!(report.contains("double free"), "{report}");
    });
}

#[test]
fn what_is_lent_is_reallocated_like_any_other() {
    on_exhausted(500, |heap| {
        let block = heap.allocate(layout(100, 8)).unwrap();
        fill(block, 97, 5);
        assert_eq!(heap.reallocate(block, layout(100, 8), 97), Some(block), "the same class");
        let moved = heap.reallocate(block, layout(97, 8), 300).expect("lent as well");
        assert_ne!(moved, block);
        assert!(holds(moved, 97, 5));
        assert_eq!(heap.reallocate(moved, layout(300, 8), 600), None, "nothing so large is left");
        assert!(holds(moved, 97, 5));
        heap.free(moved, layout(300, 8));
    });
}

#[test]
fn a_page_is_lent_where_no_frames_are_in_a_row() {
    for frames in [32, FRAMES] {
        on_both(frames, |heap| {
            let before = heap.settled();
            let taken: Vec<_> = core::iter::from_fn(|| heap.take_frame()).collect();
            let (alone, rest): (Vec<_>, Vec<_>) = taken.into_iter().partition(|frame| frame.number().is_multiple_of(2));
            alone.into_iter().for_each(|frame| heap.free_frame(frame));
            assert_eq!(heap.allocate(layout(5000, 8)), None);
            let mut lent = Vec::new();
            for (size, byte) in [4096, 2000, 3500, 500].into_iter().cycle().zip(0..) {
                let wanted = layout(size, if size == 4096 { 4096 } else { 8 });
                let Some(block) = heap.allocate(wanted) else { break };
                assert!(is_aligned(block, wanted.align()));
                fill(block, size, byte);
                lent.push((block, wanted, byte));
            }
            // The headers and other metadata take some.
            assert!(lent.len() >= frames / 2 - 8, "{} of {frames}", lent.len());
            heap.verify();
            let (block, wanted, _) = lent[0];
            let report = report_of(|| heap.free(block, layout(2000, 8)));
            assert!(report.ends_with("freed as a block of 2048 bytes, allocated as one of 4096"), "{report}");
            assert_eq!(heap.reallocate(block, wanted, 4000), Some(block));
            for (block, wanted, byte) in lent {
                assert!(holds(block, wanted.size(), byte));
                heap.free(block, wanted);
            }
            rest.into_iter().for_each(|frame| heap.free_frame(frame));
            assert_eq!(heap.settled(), before);
        });
    }
}
