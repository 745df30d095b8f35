//! W5: threads.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rtrb::{Consumer, Producer, RingBuffer, chunks::ChunkError};

use super::blocks::{allocate, free};
use super::pair::{LAYOUT, Pair};
use crate::cpu;
use crate::peers::Peer;
use crate::run::{Mode, median};

/// Pairs of each thread.
const PAIRS: usize = 200_000;
/// Blocks that are handed over.
const BLOCKS: usize = 500_000;
/// Blocks that are handed over at a time.
const CHUNK: usize = 64;

/// How many times as much two threads do as one.
pub fn speedup<A: Peer>(mode: Mode) -> f64 {
    let rounds = rounds(mode);
    median((0..rounds).map(|_| 2.0 * pairs::<A>(1, mode).as_secs_f64() / pairs::<A>(2, mode).as_secs_f64()).collect())
}

/// Pairs a microsecond of so many threads.
pub fn throughput<A: Peer>(threads: usize, mode: Mode) -> f64 {
    let each = || (threads * pairs_each(mode)) as f64 / pairs::<A>(threads, mode).as_secs_f64() / 1e6;
    median((0..rounds(mode)).map(|_| each()).collect())
}

fn rounds(mode: Mode) -> usize {
    if matches!(mode, Mode::Time(_)) { 5 } else { 1 }
}

fn pairs_each(mode: Mode) -> usize {
    if mode == Mode::Check { 10_000 } else { PAIRS }
}

/// How long so many threads take to do all pairs each: from when the first starts until the last is done.
fn pairs<A: Peer>(threads: usize, mode: Mode) -> Duration {
    let barrier = Barrier::new(threads);
    let work = |number| {
        cpu::enter(number);
        let pair = Pair(A::default());
        pair.pairs(1000);
        barrier.wait();
        let start = Instant::now();
        pair.pairs(pairs_each(mode));
        (start, Instant::now())
    };
    let times: Vec<_> = thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..threads).map(|number| scope.spawn(move || work(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let start = times.iter().map(|(start, _)| *start).min();
    let end = times.iter().map(|(_, end)| *end).max();
    end.zip(start).map_or(Duration::ZERO, |(end, start)| end - start)
}

/// A block on its way.
struct Block(*mut u8);

// SAFETY: whoever has it owns the block.
unsafe impl Send for Block {}

/// Blocks a microsecond from one thread to another.
pub fn handover<A: Peer>(mode: Mode) -> f64 {
    let blocks = if mode == Mode::Check { 10_000 } else { BLOCKS } / CHUNK * CHUNK;
    let rounds = if matches!(mode, Mode::Time(_)) { 3 } else { 1 };
    median((0..rounds).map(|_| blocks as f64 / hand_over::<A>(blocks).as_secs_f64() / 1e6).collect())
}

fn hand_over<A: Peer>(blocks: usize) -> Duration {
    let (sender, receiver) = RingBuffer::new(16 * CHUNK);
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            cpu::enter(0);
            send::<A>(sender, blocks);
        });
        scope.spawn(move || {
            cpu::enter(1);
            receive::<A>(receiver, blocks);
        });
    });
    start.elapsed()
}

fn send<A: Peer>(mut sender: Producer<Block>, blocks: usize) {
    for _ in 0..blocks / CHUNK {
        let chunk = loop {
            match sender.write_chunk_uninit(CHUNK) {
                Ok(chunk) => break chunk,
                Err(ChunkError::TooFewSlots(_)) => wait(),
            }
        };
        chunk.fill_from_iter((0..CHUNK).map(|_| Block(allocate(&A::default(), LAYOUT))));
    }
}

fn receive<A: Peer>(mut receiver: Consumer<Block>, blocks: usize) {
    for _ in 0..blocks / CHUNK {
        let chunk = loop {
            match receiver.read_chunk(CHUNK) {
                Ok(chunk) => break chunk,
                Err(ChunkError::TooFewSlots(_)) => wait(),
            }
        };
        chunk.into_iter().for_each(|block| free(&A::default(), block.0, LAYOUT));
    }
}

/// For the other thread, which may want this CPU.
fn wait() {
    for _ in 0..64 {
        std::hint::spin_loop();
    }
    thread::yield_now();
}
