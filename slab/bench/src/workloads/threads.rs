//! W5: threads.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rtrb::{Consumer, Producer, RingBuffer, chunks::ChunkError};

use super::blocks::{allocate, free};
use super::pair::{LAYOUT, Pair};
use crate::cpu;
use crate::peers::Peer;
use crate::run::Mode;

/// Pairs of each thread.
const PAIRS: usize = 200_000;
/// Blocks that are handed over.
const BLOCKS: usize = 200_000;
/// Blocks that are handed over at a time.
const CHUNK: usize = 64;

/// Of so many rounds the fastest counts: in the others, threads waited for a CPU that something else had.
const ROUNDS: usize = 20;
/// No round starts after this.
const TIME: Duration = Duration::from_millis(300);

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
    for _ in 1..ROUNDS {
        if mode == Mode::Check || start.elapsed() >= TIME {
            break;
        }
        fastest = fastest.min(round());
    }
    fastest.as_secs_f64()
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

/// Million blocks a second from one thread to another.
pub fn handover<A: Peer>(mode: Mode) -> f64 {
    let blocks = if mode == Mode::Check { 10_000 } else { BLOCKS } / CHUNK * CHUNK;
    blocks as f64 / fastest(mode, || hand_over::<A>(blocks)) / 1e6
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
