//! The launcher itself: its arguments, its reports, and kernels that are broken on purpose.

use std::process::{Command, Stdio};

/// What the launcher did.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn launch(args: &str) -> Ran {
    // The launcher has no terminal here, so it would not ask before it installs.
    testkernel::host::qemu().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_testkernel"));
    let output = command.args(args.split_whitespace()).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// The results in a report, which must be KTAP version 1 to the letter: name, whether it passed, what is said about it.
#[track_caller]
fn ktap(report: &str) -> Vec<(&str, bool, Vec<&str>)> {
    let mut lines = report.lines();
    assert_eq!(lines.next(), Some("KTAP version 1"));
    let plan: usize = lines.next().and_then(|line| line.strip_prefix("1..")).unwrap().parse().unwrap();
    let (mut results, mut notes, mut totals) = (Vec::new(), Vec::new(), None);
    for line in lines {
        assert_eq!(totals, None, "`{line}` comes after the totals");
        if let Some(rest) = line.strip_prefix("# Totals: ") {
            totals = Some(rest);
            continue;
        }
        if let Some(note) = line.strip_prefix("# ") {
            notes.push(note);
            continue;
        }
        let (passed, rest) = match line.strip_prefix("not ok ") {
            Some(rest) => (false, rest),
            None => (true, line.strip_prefix("ok ").unwrap_or_else(|| panic!("`{line}` is no KTAP"))),
        };
        let (number, name) = rest.split_once(' ').unwrap();
        assert_eq!(number, (results.len() + 1).to_string());
        let own = |note: &str| note.strip_prefix(name).is_some_and(|note| note.starts_with(": "));
        assert!(notes.iter().all(|note| own(note)), "{notes:?} are not about {name}");
        results.push((name, passed, notes.drain(..).map(|note| &note[name.len() + 2..]).collect()));
    }
    let passed = results.iter().filter(|(_, passed, _)| *passed).count();
    let failed = results.len() - passed;
    let expected = format!("pass:{passed} fail:{failed} xfail:0 xpass:0 skip:0 error:0");
    assert_eq!((results.len(), totals, notes.len()), (plan, Some(expected.as_str()), 0));
    results
}

/// Runs one broken test by itself: it must fail with a reason that contains `reason`.
#[track_caller]
fn fails(test: &str, reason: &str) {
    // Longer than a busy machine takes to boot.
    fails_within(60, test, reason);
}

#[track_caller]
fn fails_within(seconds: u32, test: &str, reason: &str) {
    let ran = launch(&format!("{test} --broken --ktap --timeout {seconds}"));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    match ktap(&ran.stdout).as_slice() {
        [(name, false, notes)] => assert!(*name == test && notes.concat().contains(reason), "{ran:?}"),
        _ => panic!("{ran:?}"),
    }
}

#[test]
fn a_hang_is_ended_and_named() {
    fails_within(5, "broken::hangs", "no progress for 5 s");
}

#[test]
fn a_triple_fault_is_a_failure() {
    fails("broken::triple_faults", "the machine was reset");
}

#[test]
fn a_report_that_is_cut_off_is_a_failure() {
    fails("broken::cuts_the_report_off", "the report is cut off");
}

#[test]
fn a_wrong_checksum_is_a_failure() {
    fails("broken::seals_with_a_wrong_checksum", "its checksum is wrong");
}

#[test]
fn a_test_missing_from_the_report_is_a_failure() {
    fails("broken::leaves_its_result_out", "the report has no result for this test");
}

#[test]
fn failures_do_not_hide_the_rest() {
    let ran = launch("broken::fails broken::triple broken::leaves traps::an_interrupt --broken --ktap");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let results = ktap(&ran.stdout);
    let (broken, rest): (Vec<_>, Vec<_>) = results.iter().partition(|(name, ..)| name.starts_with("broken::"));
    assert!(broken.len() == 3 && broken.iter().all(|(_, passed, _)| !passed), "{ran:?}");
    assert!(!rest.is_empty() && rest.iter().all(|(_, passed, _)| *passed), "{ran:?}");
}

#[test]
fn people_see_which_test_failed_and_why() {
    let ran = launch("broken::fails --broken");
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("\nFAIL broken::fails panic: "), "{ran:?}");
    assert!(ran.stdout.contains("  | STOP: panic: "), "{ran:?}");
    assert!(ran.stdout.contains("0 passed, 1 failed in "), "{ran:?}");
    assert!(!ran.stdout.contains('\x1b'), "{ran:?}");
}

#[test]
fn people_see_the_calls_that_led_to_a_failure() {
    /// Whether the console has such a line: `place` is where, `function` has its path.
    fn shows(ran: &Ran, place: &str, function: &str, source: &str) -> bool {
        let (start, name) =
            (format!("  |   {place} 0xffffffff8"), format!(" testkernel::guest::tests::broken::{function}+0x"));
        ran.stdout.lines().any(|line| line.starts_with(&start) && line.contains(&name) && line.contains(source))
    }
    let ran = launch("broken::fails broken::faults --broken");
    let source = "(testkernel/src/guest/tests/broken.rs:";
    assert!(shows(&ran, "at", "fails", source), "{ran:?}");
    assert!(shows(&ran, "in", "read_nowhere", source), "{ran:?}");
    assert!(shows(&ran, "at", "faults", source), "{ran:?}");
}

#[test]
fn people_see_who_allocated_and_who_freed_what_is_freed_twice() {
    let ran = launch("broken::frees_twice --broken");
    let (_, report) = ran.stdout.split_once("  | STOP: panic: kslab: bad free of 0x").expect(&ran.stdout);
    let (_, allocated) = report.split_once("  | allocated by:\n").expect(report);
    let (allocated, freed) = allocated.split_once("  | freed by:\n").expect(report);
    for (calls, function) in [(allocated, "makes_a_box"), (freed, "frees_a_box")] {
        let first = calls.lines().next().expect("a call");
        assert!(first.starts_with("  |   at 0xffffffff8"), "{first}");
        let caller = calls.lines().take(2).find(|line| line.contains(&format!("::broken::{function}+0x")));
        let caller = caller.expect(calls);
        assert!(caller.contains("testkernel/src/guest/tests/broken.rs:"), "{caller}");
    }
}

#[test]
fn rules_for_checks_reach_the_kernel_and_what_is_none_is_named() {
    let ran = launch("collections:: --check size-64:redzone;*:audit --ktap");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ktap(&ran.stdout).iter().all(|(_, passed, _)| *passed), "{ran:?}");
    let ran = launch("collections::boxes --check size-64:redzne --ktap");
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{ran:?}");
    let expected = "`redzne` is no check; rules look like `dentry:redzone,poison;size-*:audit`, and the checks \
                    are redzone poison audit ";
    assert!(ran.stderr.contains(expected), "{ran:?}");
}

#[test]
fn counting_instructions_gives_the_same_report_again() {
    // A test that waits for long takes longest where instructions are counted.
    let args = "--icount --ktap --timeout 300";
    let first = launch(args);
    assert_eq!(first.code, Some(0), "{first:?}");
    assert!(ktap(&first.stdout).iter().any(|(.., notes)| notes.iter().any(|note| note.ends_with(" ticks"))));
    assert_eq!(launch(args).stdout, first.stdout);
}

#[test]
fn the_list_has_names_and_nothing_else() {
    let ran = launch("--list");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let names: Vec<_> =
        ran.stdout.lines().map(|line| line.trim_end_matches(" (slow)").trim_end_matches(" (--bench)")).collect();
    assert!(names.len() >= 40 && names.is_sorted(), "{ran:?}");
    assert!(names.iter().all(|name| name.contains("::") && !name.contains([' ', '\x1b'])), "{ran:?}");
    assert!(!names.iter().any(|name| name.starts_with("broken::")), "{ran:?}");
    let part = launch("--list traps::");
    assert!(part.stdout.lines().all(|line| line.contains("traps::")) && !part.stdout.is_empty(), "{part:?}");
}

#[test]
fn bad_arguments_are_told_in_one_line() {
    for args in [
        "--cpus 0",
        "--cpus 256",
        "--memory 1M",
        "--memory lots",
        "--boot tape",
        "--timeout 0",
        "--what",
        "--demo heap",
        "--markdown",
        "--check redzone",
        "no::such",
    ] {
        let ran = launch(args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{args}: {ran:?}");
        assert_eq!(ran.stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{args}: {ran:?}");
    }
    assert_eq!(launch("--cpus 0").stderr.lines().count(), 1);
}

#[test]
fn help_names_every_option() {
    let ran = launch("--help");
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let mut options = "list cpus memory boot icount timeout ktap gdb ignored include-ignored demo markdown".split(' ');
    assert!(options.all(|option| ran.stdout.contains(&format!("--{option}"))), "{ran:?}");
    assert!(ran.stdout.contains("cargo run -- ") && !ran.stdout.contains("broken"), "{ran:?}");
}

#[test]
fn the_commands_of_the_guide_and_of_the_systems_name_tests() {
    let guide = include_str!("../../slab/src/guide/from_brk_to_slabs.md");
    let readme = include_str!("../../README.md");
    let (_, table) = readme.split_once("## Other systems' memory").expect("the table of systems");
    let commands = guide.split('`').chain(table.split('`')).filter_map(|code| code.strip_prefix("cargo run -- "));
    let of_tests: Vec<_> = commands.filter(|command| !command.starts_with("--")).collect();
    assert!(of_tests.len() >= 12, "{of_tests:?}");
    for command in of_tests {
        let names = command.split(" --").next().expect("the first part");
        for name in names.split(' ') {
            let ran = launch(&format!("--list {name}"));
            assert!(ran.code == Some(0) && ran.stdout.contains(name), "{command}: {ran:?}");
        }
    }
}
