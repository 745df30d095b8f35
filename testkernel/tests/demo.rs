//! The demonstration of misuse: what the README shows of it is what it prints.

use std::process::{Command, Stdio};

/// What is around the table.
const MARKERS: [&str; 2] = ["<!-- cargo run -- --demo faults --markdown -->\n", "<!-- end of the table -->\n"];

#[test]
fn the_table_in_the_readme_is_what_the_demo_prints() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_testkernel"));
    let output = command.args(["--demo", "faults", "--markdown"]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    let (_, rest) = include_str!("../../README.md").split_once(MARKERS[0]).expect("a marker before the table");
    let (table, _) = rest.split_once(MARKERS[1]).expect("a marker behind the table");
    assert!(table == printed, "README.md should have this between its markers:\n{printed}");
}
