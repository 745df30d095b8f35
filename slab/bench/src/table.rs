//! Results as tables in Markdown.

use std::fmt::Write;

use crate::measure::Measured;
use crate::peers::Role;
use crate::workloads::Workload;

/// First kslab beside the best of the others, then each workload.
pub fn of(measured: &[Measured], instructions: bool) -> String {
    let mut text = String::new();
    overview(&mut text, measured, instructions).expect("a String takes everything");
    for group in groups(measured) {
        one(&mut text, group, instructions).expect("as above");
    }
    text
}

/// The best of the published allocators at the same work.
pub fn best_peer<'a>(of: &Measured, measured: &'a [Measured]) -> Option<&'a Measured> {
    let same = |other: &&Measured| other.job.workload.name == of.job.workload.name && other.job.point == of.job.point;
    let peers = measured.iter().filter(same).filter(|other| other.job.role == Role::Peer);
    let by_median =
        |one: &&Measured, other: &&Measured| one.median().unwrap_or(0.0).total_cmp(&other.median().unwrap_or(0.0));
    let peers = peers.filter(|peer| peer.median().is_some());
    if of.job.workload.more_is_better { peers.max_by(by_median) } else { peers.min_by(by_median) }
}

/// What is measured by that of the best peer; `None` where one of them failed.
pub fn ratio(of: &Measured, measured: &[Measured]) -> Option<f64> {
    Some(of.median()? / best_peer(of, measured)?.median()?)
}

/// Workload by workload; those whose names are the same up to a hyphen, and of the same unit, are in one table.
fn groups(measured: &[Measured]) -> Vec<&[Measured]> {
    let key = |measured: &Measured| {
        let workload = measured.job.workload;
        (workload.name.split('-').next(), workload.unit, workload.axis)
    };
    measured.chunk_by(|one, next| key(one) == key(next)).collect()
}

fn unit(workload: &Workload, instructions: bool) -> String {
    let unit = if instructions { "instructions a pair" } else { workload.unit };
    let better = if workload.more_is_better { "more" } else { "less" };
    format!("{unit}; {better} is better")
}

fn overview(text: &mut String, measured: &[Measured], instructions: bool) -> std::fmt::Result {
    let subjects: Vec<_> =
        measured.iter().filter(|one| matches!(one.job.role, Role::Subject | Role::SubjectInBulk)).collect();
    if subjects.is_empty() {
        return Ok(());
    }
    writeln!(text, "| workload | kslab | best of the others | kslab to that |")?;
    writeln!(text, "|---|--:|---|--:|")?;
    for subject in subjects {
        let job = subject.job;
        let label = job.workload.axis.label(job.point);
        let separator = if label.is_empty() { "" } else { ", " };
        let bulk = job.peer.strip_prefix("kslab").unwrap_or_default();
        let best = best_peer(subject, measured)
            .map_or_else(|| "-".to_owned(), |best| format!("{} {}", best.job.peer, number(best.median())));
        let ratio = ratio(subject, measured).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let unit = unit(job.workload, instructions);
        let median = number(subject.median());
        writeln!(text, "| {}{separator}{label}{bulk} ({unit}) | {median} | {best} | {ratio} |", job.workload.name)?;
    }
    Ok(())
}

fn one(text: &mut String, group: &[Measured], instructions: bool) -> std::fmt::Result {
    let columns: Vec<&[Measured]> = group
        .chunk_by(|one, next| one.job.workload.name == next.job.workload.name && one.job.point == next.job.point)
        .collect();
    writeln!(text)?;
    let mut last = "";
    for column in &columns {
        let workload = column[0].job.workload;
        if workload.name != last {
            writeln!(text, "**{workload}** ({})  ", unit(workload, instructions))?;
            last = workload.name;
        }
    }
    write!(text, "\n| allocator |")?;
    for column in &columns {
        let job = column[0].job;
        let label = job.workload.axis.label(job.point);
        write!(text, " {} | to the best |", if label.is_empty() { job.workload.name.to_owned() } else { label })?;
    }
    writeln!(text, "\n|---|{}", "--:|--:|".repeat(columns.len()))?;
    for row in rows(columns[0]) {
        write!(text, "| {} |", row.job.peer)?;
        for column in &columns {
            let cell = column.iter().find(|cell| cell.job.peer == row.job.peer);
            let ratio = cell.and_then(|cell| ratio(cell, column));
            let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            write!(text, " {} | {ratio} |", number(cell.and_then(Measured::median)))?;
        }
        writeln!(text)?;
    }
    Ok(())
}

/// The rows of a table: what bounds them, kslab, and the others with the best first.
fn rows(column: &[Measured]) -> Vec<&Measured> {
    let mut rows: Vec<_> = column.iter().collect();
    let rank = |row: &Measured| match row.job.role {
        Role::Bound => f64::NEG_INFINITY,
        Role::Subject | Role::SubjectInBulk => f64::MIN,
        Role::Peer if row.job.workload.more_is_better => row.median().map_or(f64::INFINITY, |median| -median),
        Role::Peer => row.median().unwrap_or(f64::INFINITY),
    };
    rows.sort_by(|one, other| rank(one).total_cmp(&rank(other)));
    rows
}

/// With as many digits as mean something.
fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value >= 1000.0 => format!("{value:.0}"),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Job;
    use crate::workloads::WORKLOADS;

    fn measured(workload: &'static str, peer: &'static str, role: Role, values: &[f64]) -> Measured {
        let workload = WORKLOADS.iter().find(|known| known.name == workload).expect("a workload");
        Measured { job: Job { workload, point: 0, peer, role }, values: values.to_vec() }
    }

    #[test]
    fn the_best_peer_is_neither_kslab_nor_a_bound_nor_one_that_failed() {
        let all = [
            measured("W1", "harness alone", Role::Bound, &[1.0]),
            measured("W1", "kslab", Role::Subject, &[2.0]),
            measured("W1", "talc", Role::Peer, &[9.0, 8.0, 1.0]),
            measured("W1", "glibc", Role::Peer, &[4.0]),
            measured("W1", "rlsf", Role::Peer, &[]),
        ];
        assert_eq!(best_peer(&all[1], &all).map(|best| best.job.peer), Some("glibc"));
        assert_eq!(ratio(&all[1], &all), Some(0.5));
        assert_eq!(ratio(&all[4], &all), None);
        let table = of(&all, false);
        assert!(table.contains("| W1 (ns a pair; less is better) | 2.00 | glibc 4.00 | 0.50 |"), "{table}");
        let order: Vec<_> = ["\n| harness", "\n| kslab", "\n| glibc", "\n| talc", "\n| rlsf | - | - |"]
            .map(|row| table.find(row))
            .into();
        assert!(order.is_sorted() && order[0].is_some(), "{table}");
    }

    #[test]
    fn where_more_is_better_the_best_has_most() {
        let all = [
            measured("W5a", "kslab", Role::Subject, &[1.9]),
            measured("W5a", "talc", Role::Peer, &[0.5]),
            measured("W5a", "glibc", Role::Peer, &[2.0]),
        ];
        assert_eq!(ratio(&all[0], &all), Some(0.95));
    }
}
