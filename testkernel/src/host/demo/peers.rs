//! The program that misuses allocators: what it offers, and its runs.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::outcome::Outcome;

/// The place of kslab with checks among the allocators; before it comes kslab without.
pub const CHECKED: usize = 1;

/// The program, what it misuses, and how.
#[derive(Debug)]
pub struct Peers {
    program: PathBuf,
    /// Names, and versions of all but kslab.
    pub allocators: Vec<String>,
    /// As it lists them.
    pub misuses: Vec<Misuse>,
}

/// A misuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misuse {
    number: usize,
    /// Its rows in the table of faults.
    pub rows: String,
    /// What is done.
    pub title: String,
}

impl Peers {
    /// Asks the program, and sees that without misuse nothing is wrong.
    pub fn list(program: PathBuf) -> Result<Self> {
        let output = Command::new(&program).output().with_context(|| format!("cannot run {}", program.display()))?;
        let (allocators, mut misuses) = parse(&String::from_utf8_lossy(&output.stdout));
        ensure!(allocators.len() > CHECKED && misuses.len() > 1, "{} lists nothing", program.display());
        let none = misuses.remove(0);
        let peers = Self { program, allocators, misuses };
        for (number, name) in peers.allocators.iter().enumerate() {
            let outcome = peers.misuse(number, &none)?;
            ensure!(outcome == Outcome::Seen("not noticed".into()), "{name} without misuse: {}", outcome.text());
        }
        Ok(peers)
    }

    /// Misuses an allocator once.
    pub fn misuse(&self, allocator: usize, misuse: &Misuse) -> Result<Outcome> {
        let mut command = Command::new(&self.program);
        // It need not tell in its own words how it panics.
        command.args([allocator, misuse.number].map(|number| number.to_string())).stderr(Stdio::null());
        let output = command.stdin(Stdio::null()).output()?;
        Outcome::new(output.status, &String::from_utf8_lossy(&output.stdout))
    }
}

/// The lines `allocator NAME VERSION` and `misuse ROWS TITLE`, with tabs between.
fn parse(list: &str) -> (Vec<String>, Vec<Misuse>) {
    let (mut allocators, mut misuses) = (Vec::new(), Vec::new());
    for line in list.lines() {
        match line.split('\t').collect::<Vec<_>>()[..] {
            ["allocator", name, version] => allocators.push(format!("{name} {version}").trim_end().to_owned()),
            ["misuse", rows, title] => {
                misuses.push(Misuse { number: misuses.len(), rows: rows.into(), title: title.into() });
            }
            _ => {}
        }
    }
    (allocators, misuses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_read() {
        let (allocators, misuses) =
            parse("allocator\tkslab\t\nallocator\ttalc\t5.1.1\nmisuse\t\tnone\nmisuse\t1, 6\tdouble free\n\nwhat\n");
        assert_eq!(allocators, ["kslab", "talc 5.1.1"]);
        let misuse = |number, rows: &str, title: &str| Misuse { number, rows: rows.into(), title: title.into() };
        assert_eq!(misuses, [misuse(0, "", "none"), misuse(1, "1, 6", "double free")]);
    }
}
