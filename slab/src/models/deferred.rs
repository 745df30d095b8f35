//! The stack of what was freed in NMIs: pushes, and another CPU that takes all of it.

use super::*;
use crate::frames::{Deferred, Frame, unlink};
use crate::sync::AtomicU32;
use crate::sync::Ordering::Relaxed;

const FRAMES: usize = 3;

/// A stack, the links of a few frames (0: on no list), and for each frame what was put there before it was pushed.
struct Stack {
    stack: Deferred,
    links: [AtomicU32; FRAMES],
    contents: [AtomicU32; FRAMES],
}

impl Stack {
    fn new() -> Self {
        Self {
            stack: Deferred::new(),
            links: [const { AtomicU32::new(0) }; FRAMES],
            contents: [const { AtomicU32::new(0) }; FRAMES],
        }
    }

    /// Frame 0 is never handed out.
    fn frame(index: usize) -> Frame {
        Frame::new(index as u32 + 1)
    }

    fn index(frame: Frame) -> usize {
        frame.number() as usize - 1
    }

    fn push(&self, index: usize) {
        explorer::probe(index + 1);
        self.stack.push(Self::frame(index), &self.links[index]);
    }

    /// Takes all there is, and says which frames that were.
    fn take(&self) -> Vec<usize> {
        let mut taken = Vec::new();
        let mut next = self.stack.take_all();
        while let Some(frame) = next {
            let index = Self::index(frame);
            explorer::probe(index + 1);
            taken.push(index);
            assert!(taken.len() <= FRAMES, "the list has no end");
            next = unlink(&self.links[index]);
        }
        taken
    }

    /// Puts something there, and sees to it that it will be looked for.
    fn put_once(&self, index: usize, what: u32) {
        self.contents[index].fetch_add(what, Relaxed);
        self.stack.push_once(Self::frame(index), &self.links[index]);
    }

    /// Takes what is there, of all frames, and again what has come meanwhile, as the slab layer does.
    fn take_contents(&self) -> u32 {
        let mut sum = 0;
        let mut next = self.stack.take_all();
        while let Some(frame) = next {
            let index = Self::index(frame);
            sum += self.contents[index].swap(0, Relaxed);
            next = unlink(&self.links[index]);
            if self.contents[index].load(Relaxed) != 0 {
                self.stack.push_once(frame, &self.links[index]);
            }
        }
        sum
    }
}

/// Two push, and a third takes; what has been taken is pushed again.
fn push_push_and_take(bench: &Bench) {
    let stack = Stack::new();
    stack.push(2);
    let taken = Cell::new(0);
    bench.run([
        (0, Box::new(|| stack.push(0)) as Work<'_>),
        (1, Box::new(|| stack.push(1))),
        (
            2,
            Box::new(|| {
                let found = stack.take();
                taken.set(found.len());
                // A frame that comes back: whoever was about to push sees a stack that looks as before (row 100).
                found.iter().for_each(|index| stack.push(*index));
            }),
        ),
    ]);
    let mut rest = stack.take();
    rest.sort_unstable();
    assert_eq!(rest, [0, 1, 2], "{} were taken on the way", taken.get());
}

/// One pushes, while another takes and pushes one frame four times: so often that a tag of two bits would be as before.
fn push_and_take_again_and_again(bench: &Bench) {
    let stack = Stack::new();
    stack.push(1);
    bench.run([
        (0, Box::new(|| stack.push(0)) as Work<'_>),
        (
            1,
            Box::new(|| {
                (0..4).flat_map(|_| stack.take()).filter(|index| *index == 1).for_each(|index| stack.push(index));
            }),
        ),
    ]);
    // Frame 0 is there, or was taken.
    let rest = stack.take();
    assert!(rest == [1] || rest == [0, 1] || rest == [1, 0], "{rest:?}");
}

/// Two put into one frame, while a third takes what is there.
fn put_put_and_take(bench: &Bench) {
    let stack = Stack::new();
    let taken = Cell::new(0);
    bench.run([
        (0, Box::new(|| stack.put_once(0, 1)) as Work<'_>),
        (1, Box::new(|| stack.put_once(0, 10))),
        (2, Box::new(|| taken.set(stack.take_contents()))),
    ]);
    // Nobody comes to the frame any more but by the list.
    assert_eq!(taken.get() + stack.take_contents(), 11, "what was freed is forgotten");
}

/// An NMI frees an object of a slab, which is listed already, while another CPU takes that slab in: the NMI relies on it
/// to look again.
fn an_nmi_frees_into_a_listed_slab(bench: &Bench) {
    an_nmi_frees_while_another_cpu_takes_in(bench, false);
}

/// The same, and the slab is empty then and leaves its cache.
fn an_nmi_frees_into_a_listed_slab_that_leaves(bench: &Bench) {
    an_nmi_frees_while_another_cpu_takes_in(bench, true);
}

fn an_nmi_frees_while_another_cpu_takes_in(bench: &Bench, and_gives_back: bool) {
    let heap = bench.heap();
    explorer::be_cpu(9);
    let objects = take(&heap, 2);
    explorer::be_cpu(crate::platform::IN_NMI);
    give(&heap, [objects[0]]);
    explorer::be_cpu(0);
    bench.given(objects[1]);
    let slabs = &heap.caches().class(class()).slabs;
    let take_in = || match and_gives_back {
        true => _ = slabs.reap(heap.caches(), true).release(),
        false => slabs.take_in_deferred(heap.caches()),
    };
    bench.run([
        (crate::platform::IN_NMI, Box::new(|| bench.free(&heap, objects[1])) as Work<'_>),
        (10, Box::new(take_in)),
    ]);
    assert!(slabs.numbers().slabs > 0 || slabs.has_none_deferred(), "a slab that went back is on the list");
    bench.finish(heap);
}

#[test]
fn row_100_what_is_pushed_is_taken_once_though_frames_come_back() {
    holds(EveryOrder, push_push_and_take);
}

#[test]
fn row_100_it_takes_an_atomic_exchange() {
    fails_with(EveryOrder, Bug::TornExchange, push_push_and_take);
}

#[test]
fn row_101_a_frame_that_comes_back_again_and_again_is_no_different() {
    holds(EveryOrder, push_and_take_again_and_again);
}

#[test]
fn row_101_it_takes_an_atomic_exchange() {
    fails_with(EveryOrder, Bug::TornExchange, push_and_take_again_and_again);
}

#[test]
fn row_102_the_stack_without_its_orderings_is_noticed() {
    fails_with(EveryOrder, Bug::WeakAtomics, push_push_and_take);
}

#[test]
fn what_is_freed_into_a_listed_slab_is_not_forgotten() {
    holds(EveryOrder, put_put_and_take);
}

#[test]
fn row_102_without_its_orderings_it_is_forgotten() {
    fails_with(EveryOrder, Bug::WeakAtomics, put_put_and_take);
}

#[test]
fn row_83_an_nmi_frees_into_a_slab_while_another_cpu_takes_it_in() {
    holds(EveryOrder, an_nmi_frees_into_a_listed_slab);
}

#[test]
fn row_83_that_takes_atomic_exchanges() {
    fails_with(EveryOrder, Bug::TornExchange, an_nmi_frees_into_a_listed_slab);
}

#[test]
fn row_83_an_nmi_frees_into_a_slab_that_another_cpu_takes_in_and_gives_back() {
    holds(EveryOrder, an_nmi_frees_into_a_listed_slab_that_leaves);
}
