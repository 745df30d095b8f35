//! What a thread does in a storm.

use core::array;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use fastrand::Rng;
use kernel::cpus::{self, Cpus};
use kernel::heap::HEAP;
use kernel::threads;
use kslab::IrqLock;

use super::super::support::{Cache, end_interval, new_cache};
use super::block::{BULK, Block, What, Wrong};
use super::shadow::Entry;
use super::{EXCHANGED, Storm};

/// Blocks that a worker holds, at most.
pub(super) const HELD: usize = 64;

/// Why a storm ends early.
#[derive(Debug)]
#[expect(dead_code, reason = "they are printed")]
pub(super) enum Problem {
    /// A block is not as it should be.
    Block(Block, Wrong),
    /// There is no memory for such a block.
    NoMemory(What),
    /// The entry of this number is somebody else's.
    NotMine(usize),
    /// A cache whose objects are all free says that so many are not.
    InUse(usize),
}

/// What is kept of a worker from one round to the next.
#[derive(Debug)]
pub(super) struct Worker {
    number: usize,
    rng: AtomicU64,
    step: AtomicU64,
    /// Allocations, frees, changes of size and hand-overs.
    operations: AtomicU64,
    /// The numbers of its entries.
    held: [AtomicUsize; HELD],
}

impl Worker {
    /// One that holds the entries from `first` on.
    pub(super) fn new(number: usize, seed: u64, first: usize) -> Self {
        // Neighbouring seeds give numbers that look alike.
        let rng = Rng::with_seed(seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).u64(..);
        let held = array::from_fn(|index| AtomicUsize::new(first + index));
        Self { number, rng: AtomicU64::new(rng), step: AtomicU64::new(0), operations: AtomicU64::new(0), held }
    }

    pub(super) fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    pub(super) fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    fn count(&self, operations: usize) {
        self.operations.fetch_add(operations as u64, Ordering::Relaxed);
    }

    /// Takes steps until it has done so many operations in all.
    pub(super) fn work(&self, storm: &Storm, operations: u64) {
        let mut rng = Rng::with_seed(self.rng.load(Ordering::Relaxed));
        while self.operations() < operations {
            let step = self.step.fetch_add(1, Ordering::Relaxed);
            let done = self.turn(storm, &mut rng).and_then(|()| self.seldom(storm, &mut rng));
            if let Err(problem) = done {
                panic!("storm of seed {}: worker {}, step {step}: {problem:x?}", storm.seed, self.number);
            }
        }
        self.rng.store(rng.get_seed(), Ordering::Relaxed);
    }

    /// Allocates, frees, changes or hands over one block.
    ///
    /// What it does depends on nothing but the random numbers: only full entries are handed over, for full ones.
    fn turn(&self, storm: &Storm, rng: &mut Rng) -> Result<(), Problem> {
        let held = &self.held[rng.usize(..HELD)];
        let (action, what, slot) = (rng.u32(..256), What::random(rng), rng.usize(..storm.exchange.len()));
        self.count(1);
        let number = held.load(Ordering::Relaxed);
        let entry = &storm.entries[number];
        if !entry.is_of(self.number) {
            return Err(Problem::NotMine(number));
        }
        let Some(block) = entry.get() else {
            entry.put(storm.allocate(what, action.is_multiple_of(4), self.tag())?);
            return Ok(());
        };
        match action {
            0..32 => held.store(self.exchange(storm, slot, number)?, Ordering::Relaxed),
            32..64 => entry.put(self.replace(storm, block, what)?),
            64..72 => block.check().map_err(|wrong| Problem::Block(block, wrong))?,
            _ => {
                _ = entry.take();
                storm.free(block)?;
            }
        }
        Ok(())
    }

    /// What the contents of the next block are made of.
    fn tag(&self) -> u64 {
        (self.number as u64) << 40 | self.step()
    }

    /// Leaves an entry for others and takes theirs.
    fn exchange(&self, storm: &Storm, slot: usize, number: usize) -> Result<usize, Problem> {
        if !storm.entries[number].passes(self.number, EXCHANGED) {
            return Err(Problem::NotMine(number));
        }
        let taken = storm.exchange[slot].swap(number, Ordering::AcqRel);
        if storm.entries[taken].passes(EXCHANGED, self.number) { Ok(taken) } else { Err(Problem::NotMine(taken)) }
    }

    /// Another block instead of this one: the same with another size where both are of the heap.
    fn replace(&self, storm: &Storm, block: Block, what: What) -> Result<Block, Problem> {
        let (What::Heap { size, align }, What::Heap { size: wanted, .. }) = (block.what, what) else {
            storm.free(block)?;
            return storm.allocate(what, false, self.tag());
        };
        storm.disown(block)?;
        let layout = block.what.heap_layout().expect("a block of the heap");
        // SAFETY: the block is this worker's, and was allocated with this layout.
        let resized = unsafe { HEAP.reallocate(block.start, layout, wanted as usize) };
        let start = resized.ok_or(Problem::NoMemory(what))?;
        let kept = Block { start, what: What::Heap { size: size.min(wanted), align }, ..block };
        kept.check().map_err(|wrong| Problem::Block(kept, wrong))?;
        storm.adopt(start, What::Heap { size: wanted, align }, self.tag())
    }

    /// Now and then something else.
    fn seldom(&self, storm: &Storm, rng: &mut Rng) -> Result<(), Problem> {
        let (action, cpu) = (rng.u32(..4096), rng.usize(..cpus::count()));
        match action {
            0..64 => return self.use_bulk(storm, rng, cpu),
            64..80 => return self.use_phoenix(storm, rng, cpu),
            80..120 => _ = threads::migrate_to(cpu),
            120..128 => threads::yield_now(),
            128..132 => storm.caches.shrink(rng),
            132 => _ = HEAP.shrink(),
            133 => end_interval(),
            134..142 if storm.nmis => _ = cpus::send_nmi(cpu),
            _ => {}
        }
        Ok(())
    }

    /// Objects come and go in bulk, perhaps on different CPUs.
    fn use_bulk(&self, storm: &Storm, rng: &mut Rng, cpu: usize) -> Result<(), Problem> {
        let mut objects = [ptr::null_mut(); 48];
        let objects = &mut objects[..rng.usize(1..=48)];
        if storm.caches.bulk().allocate_bulk(objects) < objects.len() {
            return Err(Problem::NoMemory(BULK));
        }
        let objects = &*objects;
        self.count(2 * objects.len());
        let adopt = |object: &*mut u8| storm.adopt(NonNull::new(*object).expect("an object"), BULK, self.tag());
        let mut blocks = [None; 48];
        for (place, object) in blocks.iter_mut().zip(objects) {
            *place = Some(adopt(object)?);
        }
        if rng.bool() {
            threads::migrate_to(cpu);
        }
        blocks.into_iter().flatten().try_for_each(|block| storm.disown(block))?;
        let mut freed = [NonNull::dangling(); 48];
        freed.iter_mut().zip(blocks.into_iter().flatten()).for_each(|(place, block)| *place = block.start);
        // SAFETY: allocated above.
        unsafe { storm.caches.bulk().free_bulk(&freed[..objects.len()]) };
        Ok(())
    }

    /// Takes one of the caches that are made anew again and again, and uses it alone, on two CPUs. Then it ends, with free
    /// objects in the magazines of all who have used it, or goes on to the next worker.
    fn use_phoenix(&self, storm: &Storm, rng: &mut Rng, cpu: usize) -> Result<(), Problem> {
        let phoenix = &storm.phoenixes[rng.usize(..storm.phoenixes.len())];
        let (count, ends) = (rng.usize(1..48), rng.bool());
        // Whether another worker has it is chance, and must not change what comes after.
        self.count(2 * count);
        let Some(cache) = phoenix.take() else { return Ok(()) };
        let mut blocks = [None; 48];
        for place in &mut blocks[..count] {
            let object = cache.allocate().map_err(|_| Problem::NoMemory(phoenix.what()))?;
            *place = Some(storm.adopt(object, phoenix.what(), self.tag())?);
        }
        threads::migrate_to(cpu);
        for block in blocks.into_iter().flatten() {
            storm.disown(block)?;
            // SAFETY: allocated above.
            unsafe { cache.free(block.start) };
        }
        if ends {
            cache.destroy().map_err(|refused| Problem::InUse(refused.objects))?;
            phoenix.put(phoenix.make());
        } else {
            phoenix.put(cache);
        }
        Ok(())
    }
}

/// A cache that is made anew again and again. One worker has it at a time.
#[derive(Debug)]
pub(super) struct Phoenix {
    size: u32,
    cache: IrqLock<Cpus, Option<Cache>>,
}

impl Phoenix {
    /// One of objects of `size` bytes.
    pub(super) fn new(size: u32) -> Self {
        let phoenix = Self { size, cache: IrqLock::new(None) };
        phoenix.put(phoenix.make());
        phoenix
    }

    fn make(&self) -> Cache {
        new_cache("phoenix", self.size as usize, 8)
    }

    fn take(&self) -> Option<Cache> {
        self.cache.lock().take()
    }

    fn put(&self, cache: Cache) {
        let before = self.cache.lock().replace(cache);
        assert!(before.is_none(), "a phoenix was two");
    }

    /// Its objects are filled like blocks of this kind: their size is one of the heap's.
    fn what(&self) -> What {
        What::Heap { size: self.size, align: 3 }
    }
}

/// What an interrupt handler of one CPU has allocated.
#[derive(Debug)]
pub(super) struct Handler {
    turn: AtomicUsize,
    kept: [Entry; KEPT],
}

/// Blocks that a handler keeps at a time.
const KEPT: usize = 16;

impl Handler {
    pub(super) const fn new() -> Self {
        Self { turn: AtomicUsize::new(0), kept: [const { Entry::new(0) }; KEPT] }
    }

    /// The blocks that it keeps.
    pub(super) fn kept(&self) -> &[Entry] {
        &self.kept
    }

    pub(super) fn turns(&self) -> usize {
        self.turn.load(Ordering::Relaxed)
    }

    /// Frees its oldest block and allocates another. Where that one `may_fail`, there may be none.
    pub(super) fn turn(&self, storm: &Storm, owner: usize, may_fail: bool) {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut rng = Rng::with_seed(storm.seed ^ (owner as u64) << 40 ^ turn as u64);
        let entry = &self.kept[turn % KEPT];
        let freed = entry.take().map_or(Ok(()), |block| storm.free(block));
        let allocated = freed.and_then(|()| storm.allocate(What::random(&mut rng), false, tag(owner, turn)));
        match allocated {
            Ok(block) => entry.put(block),
            Err(Problem::NoMemory(_)) if may_fail => {}
            Err(problem) => panic!("storm of seed {}: handler {owner:#x}, turn {turn}: {problem:x?}", storm.seed),
        }
    }
}

fn tag(owner: usize, turn: usize) -> u64 {
    (owner as u64) << 40 | turn as u64
}
