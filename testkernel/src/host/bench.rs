//! Counts of instructions, beside those of the last change.
//!
//! Under `-icount` the same kernel always takes the same instructions, so a count is exact, and one that goes up has a reason.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, Result};

use super::kernel_build::workspace;

/// A count that is more than this many hundredths of the last one is a failure.
const MOST: u64 = 105;

/// An operation, and how many instructions it takes.
pub type Count = (String, u64);

/// Those that the notes of a test say.
pub fn counts_in(notes: &[String]) -> Vec<Count> {
    notes.iter().filter_map(|note| count_in(note)).collect()
}

/// Reads `NAME = N instructions`.
pub fn count_in(note: &str) -> Option<Count> {
    let (name, count) = note.strip_suffix(" instructions")?.split_once(" = ")?;
    Some((name.to_owned(), count.parse().ok()?))
}

/// Compares the counts with those that are written down, and prints both, unless it is to be `silent`. Whether none is much
/// worse. `whole` says that all were counted. With `KSLAB_WRITE=1` in the environment these are written down.
pub fn judge(counts: &[Count], whole: bool, silent: bool) -> Result<bool> {
    let file = file()?;
    if env::var_os("KSLAB_WRITE").is_some_and(|value| value == "1") {
        let mut all = if whole { BTreeMap::new() } else { read(&file)? };
        all.extend(counts.iter().cloned());
        let lines: String = all.iter().map(|(name, count)| format!("{name},{count}\n")).collect();
        fs::write(&file, lines).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let last = read(&file)?;
    let (table, complaints) = compare(counts, &last, whole);
    if !silent {
        print!("\n{table}");
    }
    complaints.iter().for_each(|complaint| eprintln!("error: {complaint}"));
    if !complaints.is_empty() {
        eprintln!("Where that is meant, `KSLAB_WRITE=1 cargo run -- --bench` writes the new counts down.");
    }
    Ok(complaints.is_empty())
}

fn file() -> Result<PathBuf> {
    Ok(workspace()?.join("testkernel/bench.csv"))
}

fn read(file: &PathBuf) -> Result<BTreeMap<String, u64>> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let line = |line: &str| {
        let (name, count) = line.split_once(',').with_context(|| format!("{}: {line}", file.display()))?;
        Ok((name.to_owned(), count.parse().with_context(|| format!("{}: {line}", file.display()))?))
    };
    text.lines().map(line).collect()
}

fn compare(counts: &[Count], last: &BTreeMap<String, u64>, whole: bool) -> (String, Vec<String>) {
    let width = counts.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max("operation".len());
    let mut table = format!("{:width$}  instructions    last\n", "operation");
    let mut complaints = Vec::new();
    for (name, count) in counts {
        // A `String` takes everything.
        _ = match last.get(name) {
            Some(last) => writeln!(table, "{name:width$}  {count:12}  {last:6}"),
            None => writeln!(table, "{name:width$}  {count:12}     new"),
        };
        match last.get(name) {
            Some(last) if count * 100 > last * MOST => {
                complaints.push(format!("{name} takes {count} instructions and took {last}"));
            }
            Some(_) => {}
            None => complaints.push(format!("{name} was never counted before")),
        }
    }
    let lost = last.keys().filter(|name| whole && counts.iter().all(|(counted, _)| counted != *name));
    complaints.extend(lost.map(|name| format!("{name} is not counted any more")));
    (table, complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_a_name_and_a_number() {
        assert_eq!(count_in("hot_pair_64 = 52 instructions"), Some(("hot_pair_64".into(), 52)));
        for other in ["hot_pair_64 = many instructions", "hot_pair_64 = 52", "52 instructions", "half of it"] {
            assert_eq!(count_in(other), None, "{other}");
        }
    }

    #[test]
    fn more_than_five_in_a_hundred_and_names_that_come_and_go_are_told() {
        let last: BTreeMap<_, _> = [("a", 100), ("b", 100), ("gone", 7)].map(|(name, n)| (name.into(), n)).into();
        let counts = |counts: &[(&str, u64)]| counts.iter().map(|(name, n)| ((*name).into(), *n)).collect::<Vec<_>>();
        let told = |list: &[(&str, u64)], whole| compare(&counts(list), &last, whole).1;
        assert_eq!(told(&[("a", 105), ("b", 3)], false), Vec::<String>::new());
        assert_eq!(told(&[("a", 106)], false), ["a takes 106 instructions and took 100"]);
        assert_eq!(told(&[("c", 1)], false), ["c was never counted before"]);
        assert_eq!(told(&[("a", 100), ("b", 100)], true), ["gone is not counted any more"]);
        let (table, _) = compare(&counts(&[("a", 50), ("long_name", 1)]), &last, false);
        assert_eq!(
            table,
            "operation  instructions    last\na                    50     100\nlong_name             1     new\n"
        );
    }
}
