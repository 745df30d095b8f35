//! How a workload is run, once the allocator is there.

use std::time::{Duration, Instant};

use crate::checked;

/// A workload in pieces of some microseconds, of which as many as one likes are run one after the other.
pub trait Batch {
    /// Operations of a batch: pairs of an allocation and a free, as a rule.
    const OPERATIONS: usize;

    /// Makes what is there all the time.
    fn start(&mut self) {}

    /// How many batches at least come before one is like another.
    fn warm_up(&self) -> usize {
        1
    }

    /// Before each batch; not measured.
    fn prepare(&mut self) {}

    fn run(&mut self);

    /// After each batch; not measured.
    fn undo(&mut self) {}

    /// Frees all.
    fn finish(&mut self) {}
}

/// What is wanted of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nanoseconds an operation, from batches in so much time.
    Time(Duration),
    /// The operations of a batch; so many batches are run, for somebody who counts from outside.
    Count(usize),
    /// Nothing; some batches are run, of which every block is looked at.
    Check,
}

/// Warming up ends after this, however slow the allocator.
const LONGEST_WARM_UP: Duration = Duration::from_secs(1);

impl Mode {
    /// What is wanted.
    pub fn run<B: Batch>(self, mut batch: B) -> f64 {
        batch.start();
        match self {
            Self::Time(time) => {
                warm_up(&mut batch, time / 4, LONGEST_WARM_UP);
                median_time(&mut batch, time) / B::OPERATIONS as f64
            }
            Self::Count(batches) => {
                warm_up(&mut batch, Duration::ZERO, Duration::MAX);
                (0..batches).for_each(|_| _ = once(&mut batch));
                B::OPERATIONS as f64
            }
            Self::Check => {
                (0..3).for_each(|_| _ = once(&mut batch));
                batch.finish();
                assert_eq!(checked::live(), 0, "something is left");
                0.0
            }
        }
    }
}

fn warm_up(batch: &mut impl Batch, shortest: Duration, longest: Duration) {
    let start = Instant::now();
    let mut batches = 0;
    while start.elapsed() < longest && (batches < batch.warm_up() || start.elapsed() < shortest) {
        once(batch);
        batches += 1;
    }
}

/// Nanoseconds of the median batch of those in so much time.
fn median_time(batch: &mut impl Batch, time: Duration) -> f64 {
    let start = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || start.elapsed() < time {
        times.push(once(batch).as_secs_f64() * 1e9);
    }
    median(times)
}

fn once(batch: &mut impl Batch) -> Duration {
    batch.prepare();
    let start = Instant::now();
    batch.run();
    let taken = start.elapsed();
    batch.undo();
    taken
}

/// The value in the middle; the mean of the two of an even count.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
    (low + high) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_value_in_the_middle() {
        assert_eq!(median(vec![3.0]), 3.0);
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 100.0, 2.0]), 3.0);
    }

    #[derive(Default)]
    struct Steps(Vec<&'static str>);

    impl Batch for &mut Steps {
        const OPERATIONS: usize = 1;

        fn start(&mut self) {
            self.0.push("start");
        }

        fn prepare(&mut self) {
            self.0.push("prepare");
        }

        fn run(&mut self) {
            self.0.push("run");
        }

        fn undo(&mut self) {
            self.0.push("undo");
        }

        fn finish(&mut self) {
            self.0.push("finish");
        }
    }

    #[test]
    fn a_counted_run_has_one_batch_before_those_that_are_counted() {
        let mut steps = Steps::default();
        Mode::Count(2).run(&mut steps);
        assert_eq!(steps.0[0], "start");
        assert_eq!(steps.0[1..], ["prepare", "run", "undo"].repeat(3));
    }

    #[test]
    fn a_timed_run_measures_at_least_one_batch() {
        let mut steps = Steps::default();
        assert!(Mode::Time(Duration::ZERO).run(&mut steps) >= 0.0);
        assert_eq!(steps.0[1..], ["prepare", "run", "undo"].repeat(2));
    }
}
