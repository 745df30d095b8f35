//! W5: threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rtrb::{Consumer, Producer, RingBuffer, chunks::ChunkError};

use super::blocks::{allocate, free};
use super::pair::{LAYOUT, Pair};
use crate::cpu;
use crate::peers::Peer;
use crate::run::Mode;

/// Pairs of each thread.
const PAIRS: usize = 100_000;
/// Blocks that are handed over.
const BLOCKS: usize = 50_000;
/// Blocks that are handed over at a time.
const CHUNK: usize = 64;

/// No round starts after this. The fastest one counts: in the others, threads waited for a CPU that something else had.
const TIME: Duration = Duration::from_millis(200);

/// How many times as much two threads do as one.
pub fn speedup<A: Peer>(mode: Mode) -> f64 {
    2.0 * fastest(mode, || pairs::<A>(1, mode)) / fastest(mode, || pairs::<A>(2, mode))
}

/// Million pairs a second of so many threads.
pub fn throughput<A: Peer>(threads: usize, mode: Mode) -> f64 {
    (threads * pairs_each(mode)) as f64 / fastest(mode, || pairs::<A>(threads, mode)) / 1e6
}

/// Seconds of the fastest round.
fn fastest(mode: Mode, mut round: impl FnMut() -> Duration) -> f64 {
    let start = Instant::now();
    let mut fastest = round();
    while mode != Mode::Check && start.elapsed() < TIME {
        fastest = fastest.min(round());
    }
    fastest.as_secs_f64()
}

fn pairs_each(mode: Mode) -> usize {
    if mode == Mode::Check { 10_000 } else { PAIRS }
}

/// How long so many threads take to do all pairs each.
fn pairs<A: Peer>(threads: usize, mode: Mode) -> Duration {
    let work = move |start: &Start| {
        let pair = Pair(A::default());
        pair.pairs(1000);
        let started = start.wait();
        pair.pairs(pairs_each(mode));
        started
    };
    together((0..threads).map(|_| Box::new(work) as Work).collect())
}

/// What a thread does. It waits for the others when it is ready, and says when it went on.
type Work = Box<dyn FnOnce(&Start) -> Instant + Send>;

/// From when the first goes on until the last is done.
fn together(works: Vec<Work>) -> Duration {
    let start = &Start { threads: works.len(), ready: AtomicUsize::new(0) };
    let times: Vec<_> = thread::scope(|scope| {
        let begin = |(number, work): (usize, Work)| {
            scope.spawn(move || {
                cpu::pin(number);
                cpu::enter(number);
                (work(start), Instant::now())
            })
        };
        let threads: Vec<_> = works.into_iter().enumerate().map(begin).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let started = times.iter().map(|(started, _)| *started).min();
    let done = times.iter().map(|(_, done)| *done).max();
    done.zip(started).map_or(Duration::ZERO, |(done, started)| done - started)
}

/// Where threads wait for each other, each on its CPU: waking one takes as long as a round.
struct Start {
    threads: usize,
    ready: AtomicUsize,
}

impl Start {
    fn wait(&self) -> Instant {
        self.ready.fetch_add(1, Ordering::AcqRel);
        while self.ready.load(Ordering::Acquire) < self.threads {
            std::hint::spin_loop();
        }
        Instant::now()
    }
}

/// A block on its way.
struct Block(*mut u8);

// SAFETY: whoever has it owns the block.
unsafe impl Send for Block {}

/// Million blocks a second from one thread to another.
pub fn handover<A: Peer>(mode: Mode) -> f64 {
    let blocks = if mode == Mode::Check { 10_000 } else { BLOCKS } / CHUNK * CHUNK;
    blocks as f64 / fastest(mode, || hand_over::<A>(blocks)) / 1e6
}

fn hand_over<A: Peer>(blocks: usize) -> Duration {
    let (sender, receiver) = RingBuffer::new(16 * CHUNK);
    let send = Box::new(move |start: &Start| {
        let started = start.wait();
        send::<A>(sender, blocks);
        started
    });
    let receive = Box::new(move |start: &Start| {
        let started = start.wait();
        receive::<A>(receiver, blocks);
        started
    });
    together(vec![send, receive])
}

fn send<A: Peer>(mut sender: Producer<Block>, blocks: usize) {
    let mut turns = 0;
    for _ in 0..blocks / CHUNK {
        let chunk = loop {
            match sender.write_chunk_uninit(CHUNK) {
                Ok(chunk) => break chunk,
                Err(ChunkError::TooFewSlots(_)) => wait(&mut turns),
            }
        };
        chunk.fill_from_iter((0..CHUNK).map(|_| Block(allocate(&A::default(), LAYOUT))));
    }
}

fn receive<A: Peer>(mut receiver: Consumer<Block>, blocks: usize) {
    let mut turns = 0;
    for _ in 0..blocks / CHUNK {
        let chunk = loop {
            match receiver.read_chunk(CHUNK) {
                Ok(chunk) => break chunk,
                Err(ChunkError::TooFewSlots(_)) => wait(&mut turns),
            }
        };
        chunk.into_iter().for_each(|block| free(&A::default(), block.0, LAYOUT));
    }
}

/// For the other thread; it may want this CPU, where there is only one.
fn wait(turns: &mut u32) {
    *turns += 1;
    if turns.is_multiple_of(10_000) {
        thread::yield_now();
    }
    std::hint::spin_loop();
}
