//! Several CPUs: what each has for itself, what they do for each other, and the heap on all of them.
//!
//! On a machine with one CPU most of these test little.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::hint::{black_box, spin_loop};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;

use kernel::cpus::{self, Cpus, MAX, NotOnline, NotStarted};
use kernel::heap::HEAP;
use kernel::{cmdline, memory, time, timer, traps};
use kslab::Heap;
use kslab::platform::{IN_NMI, Platform};
use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts;

use super::support::{
    Cache, PAGE, another, counts, frames, free, free_objects, layout, new_cache, objects, on_each, order, unchanged,
    verify,
};
use crate::guest::runner::test;

test!(all_cpus_report_with_their_own_numbers_and_stacks);
fn all_cpus_report_with_their_own_numbers_and_stacks() {
    static STACKS: [AtomicUsize; MAX] = [const { AtomicUsize::new(0) }; MAX];
    on_each(
        |_| {
            let here = 0_u8;
            STACKS[cpus::current()].store((&raw const *black_box(&here)).addr(), Ordering::Relaxed);
        },
        0,
    );
    let stacks: Vec<_> = STACKS[..cpus::count()].iter().map(|stack| stack.load(Ordering::Relaxed)).collect();
    assert!(stacks.iter().all(|&stack| stack != 0), "a CPU did not report: {stacks:x?}");
    for (cpu, stack) in stacks.iter().enumerate() {
        let near = |other: &usize| stack.abs_diff(*other) < 64 * 1024;
        assert!(!stacks[..cpu].iter().any(near), "CPU {cpu} shares a stack: {stacks:x?}");
    }
    assert_eq!(cpus::online().collect::<Vec<_>>(), (0..cpus::count()).collect::<Vec<_>>());
    // The host knows how many there are.
    if let Some(expected) = cmdline::value("cpus").and_then(|value| value.parse::<usize>().ok()) {
        assert_eq!(cpus::count(), expected.min(MAX));
    }
}

test!(a_cpu_keeps_its_block_while_others_work);
fn a_cpu_keeps_its_block_while_others_work() {
    static WRONG: AtomicUsize = AtomicUsize::new(0);
    for cpu in cpus::online() {
        for _ in 0..100 {
            let check = |expected| {
                if cpus::current() != expected {
                    WRONG.fetch_add(1, Ordering::Relaxed);
                }
            };
            assert_eq!(cpus::call_on(cpu, check, cpu), Ok(()));
        }
    }
    assert_eq!(WRONG.load(Ordering::Relaxed), 0, "a call ran on another CPU");
    assert_eq!(cpus::current(), 0);
}

test!(calls_run_with_interrupts_off_and_are_over_when_they_return);
fn calls_run_with_interrupts_off_and_are_over_when_they_return() {
    static DONE: AtomicUsize = AtomicUsize::new(0);
    on_each(
        |_| {
            assert!(!interrupts::are_enabled());
            time::wait(Duration::from_micros(100), || false);
            DONE.fetch_add(1, Ordering::Relaxed);
        },
        0,
    );
    assert_eq!(DONE.load(Ordering::Relaxed), cpus::count());
    assert_eq!(cpus::call_on_others(|more| _ = DONE.fetch_add(more, Ordering::Relaxed), 10), cpus::count() - 1);
    assert_eq!(DONE.load(Ordering::Relaxed), cpus::count() + 10 * (cpus::count() - 1));
    assert!(interrupts::are_enabled());
}

test!(a_cpu_that_is_not_there_is_an_error);
fn a_cpu_that_is_not_there_is_an_error() {
    for number in [cpus::count(), MAX, usize::MAX] {
        assert_eq!(cpus::call_on(number, |_| panic!("nobody should run this"), 0), Err(NotOnline(number)));
        assert_eq!(cpus::offline(number), Err(NotOnline(number)));
        assert_eq!(cpus::send_nmi(number), Err(NotOnline(number)));
        assert!(!cpus::is_online(number) && !cpus::bring_online(number));
    }
    assert_eq!(cpus::offline(0), Err(NotOnline(0)), "the boot CPU cannot leave");
}

test!(cpus_that_call_each_other_at_once_do_not_wait_for_ever);
fn cpus_that_call_each_other_at_once_do_not_wait_for_ever() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    /// In an interrupt, and so with interrupts off; every CPU calls every other one at the same time.
    fn call_all(_: usize) {
        cpus::call_on_others(|_| _ = CALLS.fetch_add(1, Ordering::Relaxed), 0);
    }
    let others = cpus::count() - 1;
    // The calls grow with the square of the CPUs.
    let rounds = 1 + 200 / cpus::count().pow(2);
    for _ in 0..rounds {
        cpus::call_on_others(call_all, 0);
    }
    assert_eq!(CALLS.load(Ordering::Relaxed), rounds * others * others);
}

/// An address for pages that tests map.
const WINDOW: u64 = 0xffff_a800_0000_0000;

test!(a_page_that_is_mapped_anew_is_new_on_every_cpu);
fn a_page_that_is_mapped_anew_is_new_on_every_cpu() {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let page = VirtAddr::new(WINDOW);
    let word = page.as_mut_ptr::<u64>();
    for round in 1..=50_u64 {
        assert!(memory::map_new(page, 1), "no memory");
        // SAFETY: just mapped.
        unsafe { word.write_volatile(round) };
        SEEN.store(0, Ordering::Relaxed);
        // SAFETY: mapped until the call is over.
        let look = |word: usize| _ = SEEN.fetch_add(unsafe { (word as *const u64).read_volatile() }, Ordering::Relaxed);
        on_each(look, word.addr());
        assert_eq!(SEEN.load(Ordering::Relaxed), round * cpus::count() as u64, "a CPU sees an old page");
        memory::unmap(page, 1);
        // So that the next page gets another frame.
        let frame = frames().allocate(order(0)).expect("memory");
        assert!(memory::map_new(page, 1), "no memory");
        memory::unmap(page, 1);
        free(frame, order(0));
    }
}

test!(cpus_that_unmap_at_once_do_not_wait_for_ever);
fn cpus_that_unmap_at_once_do_not_wait_for_ever() {
    static FAILED: AtomicUsize = AtomicUsize::new(0);
    fn map_and_unmap(_: usize) {
        let page = VirtAddr::new(WINDOW) + cpus::current() as u64 * 16 * PAGE as u64;
        for _ in 0..8 {
            if !memory::map_new(page, 3) {
                FAILED.fetch_add(1, Ordering::Relaxed);
            }
            memory::unmap(page, 3);
        }
    }
    // The page tables stay, so they are there before the count.
    on_each(map_and_unmap, 0);
    unchanged(|| cpus::call_on_others(map_and_unmap, 0));
    assert_eq!(FAILED.load(Ordering::Relaxed), 0);
}

test!(every_cpu_has_a_timer);
fn every_cpu_has_a_timer() {
    static TICKS: [AtomicUsize; MAX] = [const { AtomicUsize::new(0) }; MAX];
    let ticks = || (0..cpus::count()).map(|cpu| TICKS[cpu].load(Ordering::Relaxed)).collect::<Vec<_>>();
    let start = |period| timer::start(period as u32, || _ = TICKS[cpus::current()].fetch_add(1, Ordering::Relaxed));
    on_each(start, timer::counts(Duration::from_micros(200)) as usize);
    while ticks().into_iter().any(|ticks| ticks < 10) {
        spin_loop();
    }
    on_each(|_| timer::stop(), 0);
    let stopped = ticks();
    time::wait(Duration::from_millis(2), || false);
    assert_eq!(ticks(), stopped, "a timer went on");
}

test!(the_rate_of_the_timer_was_measured);
fn the_rate_of_the_timer_was_measured() {
    // QEMU's has a billion counts in a second.
    let counts = timer::counts(Duration::from_secs(1));
    assert!((900_000_000..1_100_000_000).contains(&counts), "{counts} counts in a second");
    // By the other clock that was measured no more interrupts come than there is time for.
    static TICKS: AtomicUsize = AtomicUsize::new(0);
    let fair = (0..20).any(|_| {
        TICKS.store(0, Ordering::Relaxed);
        timer::start(timer::counts(Duration::from_millis(1)), || _ = TICKS.fetch_add(1, Ordering::Relaxed));
        time::wait(Duration::from_millis(10), || false);
        timer::stop();
        // In an emulator the CPU may stand still, so that the wait is longer, and some interrupts are left out.
        (1..=11).contains(&TICKS.load(Ordering::Relaxed))
    });
    assert!(fair, "{} interrupts in 10 ms, one each ms", TICKS.load(Ordering::Relaxed));
}

test!(row_93_what_one_cpu_allocates_another_frees);
fn row_93_what_one_cpu_allocates_another_frees() {
    static BLOCK: AtomicPtr<[u8; 100]> = AtomicPtr::new(ptr::null_mut());
    unchanged(|| {
        for _ in 0..50 {
            on_each(
                |_| {
                    let fresh = Box::into_raw(Box::new([cpus::current() as u8; 100]));
                    let last = BLOCK.swap(fresh, Ordering::AcqRel);
                    if !last.is_null() {
                        // SAFETY: it came from `into_raw`, and was taken out.
                        drop(unsafe { Box::from_raw(last) });
                    }
                },
                0,
            );
        }
        // SAFETY: as above.
        drop(unsafe { Box::from_raw(BLOCK.swap(ptr::null_mut(), Ordering::AcqRel)) });
    });
}

test!(row_97_an_offline_cpu_keeps_nothing);
fn row_97_an_offline_cpu_keeps_nothing() {
    // The calls can take no more than a number with them.
    static CACHE: Once<Cache> = Once::new();
    let Some(cpu) = another() else { return };
    let cache = CACHE.call_once(|| new_cache("kept", 64, 8));
    let fill = |_| _ = CACHE.get().map(|cache| free_objects(cache, objects(cache, 100)));
    let kept = || counts(cache).in_magazines;
    for _ in 0..20 {
        HEAP.shrink();
        assert_eq!(cpus::call_on(cpu, fill, 0), Ok(()));
        assert!(kept() >= 90, "the CPU keeps {} objects of 100", kept());
        assert_eq!(cpus::offline(cpu), Ok(()));
        assert!(!cpus::is_online(cpu) && !cpus::online().any(|online| online == cpu));
        HEAP.shrink();
        assert_eq!((kept(), counts(cache).in_use), (0, 0), "the CPU has left and keeps objects");
        verify();
        assert_eq!(cpus::call_on(cpu, |_| panic!("it is offline"), 0), Err(NotOnline(cpu)));
        assert_eq!(cpus::offline(cpu), Err(NotOnline(cpu)), "it has left already");
        assert!(cpus::bring_online(cpu) && cpus::is_online(cpu));
        assert!(!cpus::bring_online(cpu), "it is back already");
    }
    HEAP.shrink();
}

test!(all_other_cpus_leave_and_come_back);
fn all_other_cpus_leave_and_come_back() {
    static ALIVE: AtomicUsize = AtomicUsize::new(0);
    let page = VirtAddr::new(WINDOW);
    // Page tables stay.
    assert!(memory::map_new(page, 1));
    memory::unmap(page, 1);
    unchanged(|| {
        let others: Vec<_> = cpus::online().filter(|&cpu| cpu != cpus::current()).collect();
        for _ in 0..3 {
            others.iter().for_each(|&cpu| assert_eq!(cpus::offline(cpu), Ok(())));
            assert_eq!(cpus::online().count(), 1);
            // A page is unmapped meanwhile: they are not waited for, and see the new state afterwards.
            assert!(memory::map_new(page, 1));
            memory::unmap(page, 1);
            others.iter().for_each(|&cpu| assert!(cpus::bring_online(cpu)));
            ALIVE.store(0, Ordering::Relaxed);
            on_each(
                |_| {
                    drop(black_box(Box::new([1_u8; 300])));
                    ALIVE.fetch_add(1, Ordering::Relaxed);
                },
                0,
            );
            assert_eq!(ALIVE.load(Ordering::Relaxed), cpus::count());
        }
    });
}

/// A heap with room for two CPUs, on a CPU with a higher number.
struct Beyond;

// SAFETY: as `Cpus`, on one CPU.
unsafe impl Platform for Beyond {
    const CPUS: usize = 2;

    fn current_cpu() -> usize {
        2
    }

    fn disable_interrupts() -> bool {
        Cpus::disable_interrupts()
    }

    fn restore_interrupts(were_enabled: bool) {
        Cpus::restore_interrupts(were_enabled);
    }
}

test!(row_98_a_cpu_with_a_number_above_the_maximum_is_served);
fn row_98_a_cpu_with_a_number_above_the_maximum_is_served() {
    const PAGES: u32 = 600;
    unchanged(|| {
        let memory = frames().block_run(PAGES, order(0)).expect("memory");
        let heap = Box::new(const { Heap::<Beyond>::new() });
        // SAFETY: the memory is this heap's alone, for as long as there is the heap.
        assert_eq!(unsafe { heap.init_range(memory.pointer(), PAGES as usize * PAGE) }, Ok(()));
        let block = layout(64, 8);
        for _ in 0..3 {
            let blocks: Vec<_> = (0..200).map(|_| heap.allocate(block).expect("memory")).collect();
            // SAFETY: allocated above.
            blocks.into_iter().for_each(|start| unsafe { heap.free(start, block) });
        }
        let cached: usize = heap.cache_stats().map(|cache| cache.in_magazines + cache.in_use).sum();
        assert_eq!(cached, 0, "something is kept for a CPU that has no place");
        assert_eq!(heap.verify(), Ok(()));
        drop(heap);
    });
}

test!(row_99_the_heap_serves_a_cpu_that_has_no_number_yet);
fn row_99_the_heap_serves_a_cpu_that_has_no_number_yet() {
    unchanged(|| {
        let cache = new_cache("early", 64, 8);
        // Freed without a number, they are kept for nobody; a block that one side allocates the other frees.
        let before = cpus::without_number(|| objects(&cache, 50));
        free_objects(&cache, before);
        assert!(counts(&cache).in_magazines > 0);
        HEAP.shrink();
        let after = objects(&cache, 50);
        let kept = counts(&cache).in_magazines;
        cpus::without_number(|| free_objects(&cache, after));
        assert_eq!((counts(&cache).in_magazines, counts(&cache).in_use), (kept, 0));
        let blocks: Vec<NonNull<u8>> = cpus::without_number(|| {
            (4..18).map(|shift| HEAP.allocate(layout(1 << shift, 8)).expect("memory")).collect()
        });
        for (shift, block) in (4..18).zip(blocks) {
            // SAFETY: allocated above for this layout.
            unsafe { HEAP.free(block, layout(1 << shift, 8)) };
        }
        verify();
    });
}

test!(a_cpu_that_does_not_answer_is_given_up);
fn a_cpu_that_does_not_answer_is_given_up() {
    /// No machine that the tests run on has a CPU with this APIC id.
    const NOBODY: u32 = 0xfd;
    let before = cpus::count();
    let patience = Duration::from_millis(5);
    assert_eq!(cpus::start(0, patience), Err(NotStarted::Runs));
    let refused = if before == MAX { NotStarted::TooMany } else { NotStarted::Silent };
    assert_eq!(cpus::start(NOBODY, patience), Err(refused));
    // What was made ready for it, the next finds.
    unchanged(|| assert_eq!(cpus::start(NOBODY, patience), Err(refused)));
    assert_eq!((cpus::count(), cpus::online().count()), (before, before));
    assert_eq!(cpus::call_on_others(|_| (), 0), cpus::count() - 1);
}

test!(an_nmi_reaches_every_cpu_whatever_it_does);
fn an_nmi_reaches_every_cpu_whatever_it_does() {
    static SEEN: [AtomicUsize; MAX] = [const { AtomicUsize::new(0) }; MAX];
    static DEPTH_IS_RIGHT: AtomicBool = AtomicBool::new(true);
    traps::set_nmi_handler(Some(|_| {
        if Cpus::current_cpu() != IN_NMI {
            DEPTH_IS_RIGHT.store(false, Ordering::Relaxed);
        }
        SEEN[cpus::current()].fetch_add(1, Ordering::Relaxed);
    }));
    for cpu in cpus::online() {
        assert_eq!(cpus::send_nmi(cpu), Ok(()));
        assert!(time::wait(Duration::from_secs(5), || SEEN[cpu].load(Ordering::Relaxed) == 1), "CPU {cpu} sees none");
    }
    let mut number = 0;
    interrupts::without_interrupts(|| {
        assert_eq!(cpus::send_nmi(cpus::current()), Ok(()));
        time::wait(Duration::from_secs(5), || SEEN[cpus::current()].load(Ordering::Relaxed) == 2);
        number = Cpus::current_cpu();
    });
    traps::set_nmi_handler(None);
    assert!(DEPTH_IS_RIGHT.load(Ordering::Relaxed), "the heap takes a handler for ordinary code");
    assert_eq!((number, SEEN[cpus::current()].load(Ordering::Relaxed)), (cpus::current(), 2));
}
