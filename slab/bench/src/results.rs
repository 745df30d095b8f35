//! Results as CSV: every value, and what the table has.

use std::fs;
use std::path::Path;

use crate::measure::Measured;
use crate::table::ratio;

/// Writes `NAME.csv`, with each value, and `NAME-medians.csv` into the directory.
pub fn write(directory: &Path, name: &str, measured: &[Measured]) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    let mut values = csv::Writer::from_path(directory.join(format!("{name}.csv")))?;
    values.write_record(["workload", "at", "unit", "allocator", "round", "value"])?;
    let mut medians = csv::Writer::from_path(directory.join(format!("{name}-medians.csv")))?;
    medians.write_record(["workload", "at", "unit", "allocator", "median", "to the best peer"])?;
    for measured_job in measured {
        let job = measured_job.job;
        let point = job.point.to_string();
        let of = [job.workload.name, &point, job.workload.unit, job.peer];
        for (round, value) in measured_job.values.iter().enumerate() {
            values.write_record(of.iter().copied().chain([&*round.to_string(), &*value.to_string()]))?;
        }
        let number = |value: Option<f64>| value.map(|value| format!("{value:.4}")).unwrap_or_default();
        let (median, ratio) = (number(measured_job.median()), number(ratio(measured_job, measured)));
        medians.write_record(of.iter().copied().chain([&*median, &*ratio]))?;
    }
    values.flush()?;
    Ok(medians.flush()?)
}
