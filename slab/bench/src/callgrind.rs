//! Instructions, as `valgrind` counts them: the same at each run of one build.

use std::process::Command;

use anyhow::{Context, bail};

/// What a program did.
#[derive(Debug)]
pub struct Counted {
    pub instructions: usize,
    /// What it printed.
    pub output: String,
}

/// Runs `program`, and counts.
pub fn count(program: &Command) -> anyhow::Result<Counted> {
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    valgrind.arg(program.get_program()).args(program.get_args());
    for (name, value) in program.get_envs() {
        valgrind.env(name, value.context("a variable with a value")?);
    }
    let output =
        valgrind.output().context("there is no valgrind: install it (apt-get install valgrind) and try again")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}: {}", output.status, own_words(&text));
    }
    let instructions = collected(&text).context("valgrind does not say how many instructions it counted")?;
    Ok(Counted { instructions, output: String::from_utf8_lossy(&output.stdout).into_owned() })
}

/// The last line that is the program's, not valgrind's.
fn own_words(text: &str) -> &str {
    text.lines().rfind(|line| !line.is_empty() && !line.starts_with("==")).unwrap_or_default()
}

fn collected(text: &str) -> Option<usize> {
    let count = text.lines().find_map(|line| line.split_once("Collected : "))?.1;
    count.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_valgrind_says() {
        assert_eq!(collected("==1== \n==1== Collected : 123456\n==1==\n"), Some(123_456));
        assert_eq!(collected("==1== Events    : Ir\n"), None);
        assert_eq!(own_words("==1== \nno memory\n==1== killed\n\n"), "no memory");
    }
}
