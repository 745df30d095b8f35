//! The table of faults in the documentation of kslab names the tests that show each row; this keeps it up to date.
//!
//! A test says by its name which rows it shows: `row_28_...`, `rows_17_to_20_...`, `rows_1_2_and_6_...`; or within it, by a
//! string that starts with `row 28`; an example in the documentation by `(row_28)`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Where the tests are.
const SOURCES: [&str; 5] = ["slab/src", "slab/fuzz/src", "slab/fuzz/tests", "testkernel/src", "testkernel/tests"];

const TABLE: &str = "slab/src/fault/rows.md";

const LAST: u32 = 116;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_table_of_faults_names_the_tests_of_each_row() {
    let tests = tests_by_row();
    let missing: Vec<_> = (1..=LAST).filter(|row| !tests.contains_key(row)).collect();
    assert_eq!(missing, [0; 0], "rows without a test");
    let path = root().join(TABLE);
    let table = fs::read_to_string(&path).expect("the table");
    let expected: String = table.lines().map(|line| with_tests(line, &tests) + "\n").collect();
    if env::var_os("KSLAB_WRITE").is_some() {
        fs::write(&path, &expected).expect("it can be written");
    } else {
        assert_eq!(table, expected, "write it anew: KSLAB_WRITE=1 cargo test -p testkernel --test rows");
    }
    let rows = table.lines().filter_map(row_of).collect::<Vec<_>>();
    assert_eq!(rows, (1..=LAST).collect::<Vec<_>>(), "each row is there, in order");
}

/// The row that a line of the table is about.
fn row_of(line: &str) -> Option<u32> {
    line.split('|').nth(1)?.trim().parse().ok()
}

/// The line with its last cell as it has to be.
fn with_tests(line: &str, tests: &BTreeMap<u32, Vec<String>>) -> String {
    let Some(row) = row_of(line) else { return line.to_owned() };
    let kept = line.trim_end_matches('|').rsplit_once('|').map_or(line, |(kept, _)| kept);
    let names = tests.get(&row).map_or(&[][..], Vec::as_slice);
    let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    format!("{kept}| {} |", names.join(", "))
}

/// The tests that show each row, in the order of the files.
fn tests_by_row() -> BTreeMap<u32, Vec<String>> {
    let mut tests: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for source in SOURCES {
        for file in files_in(&root().join(source)) {
            let text = fs::read_to_string(&file).expect("a source file");
            let module = module_of(&file);
            let mut function = "";
            for line in text.lines() {
                let name = line.trim_start().strip_prefix("fn ").and_then(|rest| rest.split(['(', '<']).next());
                function = name.unwrap_or(function);
                let rows = name.map_or_else(|| rows_of_strings(line), rows_of_name);
                let example =
                    line.trim_start().strip_prefix("///").and_then(|text| text.split_once("(row_")?.1.split_once(')'));
                let example = example.and_then(|(row, _)| row.parse().ok());
                for row in rows.into_iter().chain(example) {
                    let names = tests.entry(row).or_default();
                    let full = format!("{module}{}", if example.is_some() { "documentation" } else { function });
                    if !names.contains(&full) {
                        names.push(full);
                    }
                }
            }
        }
    }
    tests
}

/// The Rust files in a folder and those in it, in a fixed order.
fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> =
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path()).collect();
    entries.sort();
    let expand = |path: PathBuf| if path.is_dir() { files_in(&path) } else { vec![path] };
    entries.into_iter().flat_map(expand).filter(|path| path.extension().is_some_and(|kind| kind == "rs")).collect()
}

/// How the tests in a file are called: `cargo test` and `cargo run` take that.
fn module_of(file: &Path) -> String {
    let path = file.strip_prefix(root()).expect("in the repository").with_extension("");
    let parts: Vec<_> = path.iter().map(|part| part.to_str().expect("ASCII")).collect();
    let parts = match &parts[..] {
        ["testkernel", "src", "guest", "tests", rest @ ..] => rest,
        ["testkernel", "tests", ..] => &[],
        [_, "fuzz", "tests", ..] => &["fuzz"],
        [_, "src", rest @ ..] | [_, "fuzz", "src", rest @ ..] => rest,
        _ => &[],
    };
    parts.iter().filter(|part| **part != "mod").map(|part| format!("{part}::")).collect()
}

/// Of `row_28_...`, `rows_17_to_20_...`, `rows_1_2_and_6_...`.
fn rows_of_name(name: &str) -> Vec<u32> {
    let Some(rest) = name.strip_prefix("rows_").or_else(|| name.strip_prefix("row_")) else { return Vec::new() };
    rows_of_words(rest.split('_'))
}

/// Of a string that starts with `row 28` or `rows 22 to 24`.
fn rows_of_strings(line: &str) -> Vec<u32> {
    let starts = line.split('"').skip(1).step_by(2);
    let rows = starts.filter_map(|text| text.strip_prefix("rows ").or_else(|| text.strip_prefix("row ")));
    rows.flat_map(|rest| rows_of_words(rest.split([' ', ',', ':']))).collect()
}

fn rows_of_words<'a>(words: impl Iterator<Item = &'a str>) -> Vec<u32> {
    let mut rows: Vec<u32> = Vec::new();
    let mut to = false;
    for word in words {
        match word.parse() {
            Ok(row) if to => rows.extend(rows.last().map_or(row, |last| last + 1)..=row),
            Ok(row) => rows.push(row),
            Err(_) if matches!(word, "to" | "and") => {}
            Err(_) => break,
        }
        to = word == "to";
    }
    rows.retain(|row| (1..=LAST).contains(row));
    rows
}

#[test]
fn names_say_which_rows_they_show() {
    assert_eq!(rows_of_name("row_28_a_header"), [28]);
    assert_eq!(rows_of_name("rows_17_to_20_a_byte"), [17, 18, 19, 20]);
    assert_eq!(rows_of_name("rows_1_2_6_and_16_bad"), [1, 2, 6, 16]);
    assert_eq!(rows_of_name("row_45"), [45]);
    assert_eq!(rows_of_name("rows_of_name"), [0; 0]);
    assert_eq!(rows_of_strings(r#"("row 7, frames", at(1)), "row 15","#), [7, 15]);
}
