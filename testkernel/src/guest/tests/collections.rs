//! What programs do with a heap: the collections of `alloc`, under load.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BinaryHeap, VecDeque};
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cmp::Reverse;

use super::support::unchanged;
use crate::guest::runner::test;

test!(boxes_keep_their_values);
fn boxes_keep_their_values() {
    unchanged(|| {
        let boxes: Vec<_> = (0..10_000_u64).map(|value| Box::new(value * value)).collect();
        assert!(boxes.iter().zip(0..).all(|(found, value): (_, u64)| **found == value * value));
    });
}

test!(one_box_lives_through_100_000_others);
fn one_box_lives_through_100_000_others() {
    unchanged(|| {
        let long_lived = Box::new(0x1234_5678_9abc_def0_u64);
        for value in 0..100_000_u64 {
            assert_eq!(*core::hint::black_box(Box::new(value)), value);
        }
        assert_eq!(*long_lived, 0x1234_5678_9abc_def0);
    });
}

test!(a_vec_grows_through_every_class_to_many_frames);
fn a_vec_grows_through_every_class_to_many_frames() {
    unchanged(|| {
        let mut numbers = Vec::new();
        numbers.extend(0..300_000_u32);
        assert!(numbers.iter().zip(0..).all(|(&found, number)| found == number));
        numbers.truncate(10);
        numbers.shrink_to_fit();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
    });
}

test!(a_vec_of_4_mib_is_one_block);
fn a_vec_of_4_mib_is_one_block() {
    unchanged(|| {
        let mut bytes = alloc::vec![0_u8; 4 << 20];
        bytes.iter_mut().step_by(4096).for_each(|byte| *byte = 7);
        assert_eq!(bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>(), 7 * 1024);
    });
}

test!(a_b_tree_agrees_with_a_sorted_list);
fn a_b_tree_agrees_with_a_sorted_list() {
    unchanged(|| {
        let mut random = fastrand::Rng::with_seed(4);
        let (mut tree, mut list) = (BTreeMap::new(), Vec::new());
        for turn in 0..3000_u32 {
            let key = random.u32(0..1000);
            let place = list.binary_search_by_key(&key, |&(key, _)| key);
            if random.bool() {
                let old = match place {
                    Ok(at) => Some(core::mem::replace(&mut list[at], (key, turn)).1),
                    Err(at) => {
                        list.insert(at, (key, turn));
                        None
                    }
                };
                assert_eq!(tree.insert(key, turn), old);
            } else {
                assert_eq!(tree.remove(&key), place.ok().map(|at| list.remove(at).1));
            }
        }
        assert!(tree.into_iter().eq(list));
    });
}

test!(an_arc_drops_its_value_with_the_last_owner);
fn an_arc_drops_its_value_with_the_last_owner() {
    unchanged(|| {
        let first = Arc::new(String::from("shared"));
        let owners: Vec<_> = (0..1000).map(|_| Arc::clone(&first)).collect();
        let weak = Arc::downgrade(&first);
        assert_eq!(Arc::strong_count(&first), 1001);
        drop(first);
        assert_eq!(weak.upgrade().as_deref().map(String::as_str), Some("shared"));
        drop(owners);
        assert!(weak.upgrade().is_none());
    });
}

test!(a_list_of_rcs_is_freed_link_by_link);
fn a_list_of_rcs_is_freed_link_by_link() {
    struct Link {
        number: u32,
        next: Option<Rc<Link>>,
    }

    unchanged(|| {
        let mut head = None;
        for number in 0..1000 {
            head = Some(Rc::new(Link { number, next: head }));
        }
        for number in (0..1000).rev() {
            let link = head.take().expect("a thousand links");
            assert_eq!(link.number, number);
            head = link.next.clone();
        }
        assert!(head.is_none());
    });
}

test!(strings_are_built_and_joined);
fn strings_are_built_and_joined() {
    unchanged(|| {
        let words: Vec<String> = (0..1000).map(|number| format!("{number:04}")).collect();
        let text = words.join(" ");
        assert_eq!(text.len(), 4999);
        assert!(text.split(' ').zip(0..).all(|(word, number)| word.parse() == Ok(number)));
    });
}

test!(a_deque_turns_around);
fn a_deque_turns_around() {
    unchanged(|| {
        let mut deque: VecDeque<usize> = (0..100).collect();
        for next in 100..20_000 {
            assert_eq!(deque.pop_front(), Some(next - 100));
            deque.push_back(next);
            if next % 1000 == 0 {
                deque.shrink_to_fit();
            }
        }
        assert!(deque.into_iter().eq(19_900..20_000));
    });
}

test!(a_binary_heap_sorts);
fn a_binary_heap_sorts() {
    unchanged(|| {
        let mut random = fastrand::Rng::with_seed(5);
        let mut heap: BinaryHeap<_> = (0..5000).map(|_| Reverse(Box::new(random.u32(..)))).collect();
        let sorted: Vec<_> = core::iter::from_fn(|| heap.pop()).map(|Reverse(value)| *value).collect();
        assert_eq!(sorted.len(), 5000);
        assert!(sorted.is_sorted());
    });
}

test!(nested_collections_are_freed_whole);
fn nested_collections_are_freed_whole() {
    unchanged(|| {
        let mut directory: BTreeMap<String, Vec<Box<[u8]>>> = BTreeMap::new();
        for file in 0..500_usize {
            let block = alloc::vec![file as u8; file * 3].into_boxed_slice();
            directory.entry(format!("folder {}", file % 17)).or_default().push(block);
        }
        assert_eq!(directory.len(), 17);
        let bytes: usize = directory.values().flatten().map(|block| block.len()).sum();
        assert_eq!(bytes, 3 * (499 * 500 / 2));
    });
}
