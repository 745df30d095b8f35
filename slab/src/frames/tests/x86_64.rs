use ::x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, PageSize, PhysFrame, Size1GiB, Size2MiB, Size4KiB,
};

use super::*;

fn take_and_free<S: PageSize>(mut frames: &Frames<NoInterrupts>) -> bool {
    let before = frames.stats();
    let page: Option<PhysFrame<S>> = frames.allocate_frame();
    let Some(page) = page else { return false };
    assert_eq!(frames.stats().free, before.free - (S::SIZE / 4096) as usize);
    // SAFETY: nobody uses the frame.
    unsafe { frames.deallocate_frame(page) };
    assert_eq!(frames.stats(), before);
    true
}

#[test]
#[cfg_attr(miri, ignore = "gigabytes")]
fn pages_of_every_size_come_and_go() {
    let machine = Machine::new(START, 3 << 18);
    let frames = all_of::<NoInterrupts>(&machine);
    assert!(
        take_and_free::<Size4KiB>(&frames) && take_and_free::<Size2MiB>(&frames) && take_and_free::<Size1GiB>(&frames)
    );
    let small = Machine::new(START, 64);
    assert!(!take_and_free::<Size2MiB>(&all_of(&small)));
}
