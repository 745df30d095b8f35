//! What a scenario is run on, and what runs it.

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::rc::Rc;
use std::string::String;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::vec::Vec;

use super::{Heap, LAYOUT};
use crate::sync::explorer::{self, Bug, Interruption, Mode};
use crate::testing::Machine;

/// Pre-emptions in one order of steps.
const PREEMPTIONS: usize = 3;
/// Steps of all CPUs together, at most.
const STEPS: usize = 20_000;
/// Of a CPU, in words.
const STACK: usize = 1 << 15;
/// Just enough for magazines.
const FRAMES: usize = 320;

pub(super) type Work<'a> = Box<dyn FnOnce() + 'a>;

/// One run of a scenario.
pub(super) struct Bench {
    mode: Mode,
    bug: Option<Bug>,
    machine: Arc<Machine>,
    /// The objects that somebody has, with the mark that is in them.
    owned: RefCell<HashMap<usize, u8>>,
    last_mark: Cell<u8>,
    /// Before which step an interruption comes, and whether it came in some run.
    step: usize,
    came: Arc<AtomicBool>,
    /// Bytes of a new heap.
    free_at_first: Arc<OnceLock<usize>>,
}

impl Bench {
    /// A heap over all of the memory. The heap of the run before is no longer used.
    pub(super) fn heap(&self) -> Box<Heap> {
        let heap = Box::new(Heap::new());
        // SAFETY: the machine outlives the scenario, and each has only one heap.
        unsafe { heap.init([self.machine.region()], self.machine.base()) }.unwrap();
        heap
    }

    /// These CPUs do this at once.
    pub(super) fn run<'a>(&self, cpus: impl IntoIterator<Item = (usize, Work<'a>)>) {
        explorer::start(self.mode, self.bug);
        let mut handles = Vec::new();
        for (number, work) in cpus {
            // SAFETY: the CPU is waited for below; where that fails nothing of the scenario goes on.
            let work = unsafe { core::mem::transmute::<Work<'a>, Work<'static>>(work) };
            handles.push(self.spawn(move || {
                explorer::be_cpu(number);
                work();
            }));
        }
        handles.into_iter().for_each(|join| join());
        explorer::stop();
    }

    fn spawn(&self, work: impl FnOnce() + 'static) -> Box<dyn FnOnce()> {
        let work = OneThread(work);
        match self.mode {
            Mode::Loom | Mode::LoomBlocking => {
                let handle = loom::thread::Builder::new().stack_size(STACK).spawn(|| work.run()).unwrap();
                Box::new(move || handle.join().unwrap())
            }
            Mode::Shuttle => {
                let handle = shuttle::thread::spawn(|| work.run());
                Box::new(move || handle.join().unwrap())
            }
            Mode::Off | Mode::Alone => {
                work.run();
                Box::new(|| ())
            }
        }
    }

    /// Does `work`, and interrupts it for `handler` before the step that is its turn in this run.
    pub(super) fn interrupt(&self, non_maskable: bool, work: impl FnOnce(), handler: impl Fn()) {
        let handler: Rc<dyn Fn() + '_> = Rc::new(handler);
        // SAFETY: it is dropped when `work` is done.
        let handler = unsafe { core::mem::transmute::<Rc<dyn Fn() + '_>, Rc<dyn Fn()>>(handler) };
        if explorer::interrupted(Interruption { step: self.step, non_maskable, handler }, work) {
            self.came.store(true, Ordering::Relaxed);
        }
    }

    /// Somebody was given this object.
    pub(super) fn given(&self, object: NonNull<u8>) {
        let mark = self.last_mark.get().wrapping_add(1);
        self.last_mark.set(mark);
        let before = self.owned.borrow_mut().insert(object.as_ptr().addr(), mark);
        assert!(before.is_none(), "an object was given to two at once");
        explorer::probe(object.as_ptr().addr());
        // SAFETY: it was just given to the caller.
        unsafe { object.write(mark) };
    }

    /// Who has this object is about to give it up.
    pub(super) fn given_up(&self, object: NonNull<u8>) {
        explorer::probe(object.as_ptr().addr());
        let mark = self.owned.borrow_mut().remove(&object.as_ptr().addr());
        // SAFETY: the caller still has it.
        assert_eq!(mark, Some(unsafe { object.read() }), "an object was written to by somebody else");
    }

    pub(super) fn is_owned(&self, object: NonNull<u8>) -> bool {
        self.owned.borrow().contains_key(&object.as_ptr().addr())
    }

    pub(super) fn allocate(&self, heap: &Heap) -> NonNull<u8> {
        let object = heap.allocate(LAYOUT).expect("memory");
        self.given(object);
        object
    }

    pub(super) fn free(&self, heap: &Heap, object: NonNull<u8>) {
        self.given_up(object);
        // SAFETY: allocated for this layout by whoever has it.
        unsafe { heap.free(object, LAYOUT) };
    }

    /// Allocates and frees an object.
    pub(super) fn pair(&self, heap: &Heap) {
        let object = self.allocate(heap);
        self.free(heap, object);
    }

    /// All is in order, and when everything has been given back, as it now has to be, as much memory is free as at first.
    pub(super) fn finish(&self, heap: Box<Heap>) {
        assert!(self.owned.borrow().is_empty());
        give_back(&heap);
        heap.verify().unwrap();
        let free = heap.frames().free_bytes();
        let at_first = *self.free_at_first.get_or_init(|| self.heap().frames().free_bytes());
        assert_eq!(free, at_first, "memory is lost");
    }
}

/// Makes every CPU give back what it keeps.
fn give_back(heap: &Heap) {
    // SAFETY: the CPUs are done.
    (0..4).for_each(|cpu| unsafe { heap.retire_cpu(cpu) });
    heap.shrink();
}

/// Work for another CPU of the same model.
pub(super) struct OneThread<F>(pub(super) F);

// SAFETY: one thread of the host runs all CPUs of a model.
unsafe impl<F> Send for OneThread<F> {}

impl<F: FnOnce()> OneThread<F> {
    pub(super) fn run(self) {
        (self.0)();
    }
}

/// What is run again and again.
#[derive(Clone)]
struct Runs {
    bug: Option<Bug>,
    step: usize,
    scenario: fn(&Bench),
    machine: Arc<Machine>,
    came: Arc<AtomicBool>,
    free_at_first: Arc<OnceLock<usize>>,
    count: Arc<AtomicUsize>,
}

impl Runs {
    fn new(bug: Option<Bug>, scenario: fn(&Bench)) -> Self {
        let machine = Arc::new(Machine::new(0, FRAMES));
        Self {
            bug,
            step: 0,
            scenario,
            machine,
            came: Arc::default(),
            free_at_first: Arc::default(),
            count: Arc::default(),
        }
    }

    fn once(&self, mode: Mode) {
        self.count.fetch_add(1, Ordering::Relaxed);
        (self.scenario)(&Bench {
            mode,
            bug: self.bug,
            machine: self.machine.clone(),
            owned: RefCell::default(),
            last_mark: Cell::new(0),
            step: self.step,
            came: self.came.clone(),
            free_at_first: self.free_at_first.clone(),
        });
    }

    fn in_every_order(&self, mode: Mode) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(PREEMPTIONS);
        builder.max_branches = STEPS;
        // Whatever the environment says.
        (builder.max_permutations, builder.max_duration, builder.checkpoint_file) = (None, None, None);
        let runs = self.clone();
        builder.check(move || {
            let runs = runs.clone();
            let whole = loom::thread::Builder::new().stack_size(STACK);
            whole.spawn(move || runs.once(mode)).unwrap().join().unwrap();
        });
    }

    fn at_random(&self, orders: usize) {
        let mut config = shuttle::Config::new();
        config.stack_size = STACK * size_of::<usize>();
        config.failure_persistence = shuttle::FailurePersistence::None;
        let scheduler = shuttle::scheduler::RandomScheduler::new_from_seed(0, orders);
        let runs = self.clone();
        shuttle::Runner::new(scheduler, config).run(move || runs.once(Mode::Shuttle));
    }

    /// Does `each` with an interruption before step 0, 1 and so on, until there is no such step.
    fn at_every_step(&mut self, each: impl Fn(&Self)) {
        loop {
            self.came.store(false, Ordering::Relaxed);
            each(self);
            if !self.came.load(Ordering::Relaxed) {
                return;
            }
            self.step += 1;
        }
    }
}

/// How a scenario is run.
#[derive(Debug, Clone, Copy)]
pub(super) enum How {
    /// By loom, in every order.
    EveryOrder,
    /// The same, where only locks matter: see [`Mode::LoomBlocking`].
    EveryOrderOfLocks,
    /// By shuttle, in so many.
    Random(usize),
    /// On one CPU, interrupted before each step in turn.
    EveryStep,
    /// By loom, in every order, one CPU being interrupted before each step in turn.
    EveryOrderAndStep,
}

fn run(how: How, bug: Option<Bug>, scenario: fn(&Bench)) -> (usize, usize) {
    let mut runs = Runs::new(bug, scenario);
    match how {
        How::EveryOrder => runs.in_every_order(Mode::Loom),
        How::EveryOrderOfLocks => runs.in_every_order(Mode::LoomBlocking),
        How::Random(orders) => runs.at_random(orders),
        How::EveryStep => runs.at_every_step(|runs| runs.once(Mode::Alone)),
        How::EveryOrderAndStep => runs.at_every_step(|runs| runs.in_every_order(Mode::Loom)),
    }
    (runs.count.load(Ordering::Relaxed), runs.step)
}

/// The scenario must go well.
pub(super) fn holds(how: How, scenario: fn(&Bench)) {
    let begun = std::time::Instant::now();
    let (count, steps) = run(how, None, scenario);
    assert!(count > 1, "there is only one order of steps");
    std::println!("{how:?}: {count} runs, {steps} steps, {:?}", begun.elapsed());
}

/// With this bug the scenario must fail.
pub(super) fn fails_with(how: How, bug: Bug, scenario: fn(&Bench)) {
    must_fail(how, Some(bug), scenario);
}

/// The scenario, which is wrong itself, must fail.
pub(super) fn must_fail(how: How, bug: Option<Bug>, scenario: fn(&Bench)) {
    let failure = catch_unwind(AssertUnwindSafe(|| run(how, bug, scenario)));
    explorer::stop();
    let failure = failure.expect_err("the model must notice that something is wrong");
    let text = failure.downcast_ref::<String>().map(String::as_str).or(failure.downcast_ref::<&str>().copied());
    assert!(!text.unwrap_or("").contains("POOL"), "{text:?}");
    std::println!("{how:?}: {text:?}");
}
