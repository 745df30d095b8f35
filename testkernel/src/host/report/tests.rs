use super::*;
use crate::protocol::When;

fn test(name: &str) -> GuestTest {
    GuestTest { name: name.into(), number: 0, stops_with: None, when: When::Always, cpus: 1 }
}

fn stopping(name: &str, headline: &str) -> GuestTest {
    GuestTest { stops_with: Some(headline.into()), ..test(name) }
}

/// Writes a report as the kernel does.
struct Kernel {
    seal: Seal,
    lines: Vec<String>,
}

impl Kernel {
    fn plan(tests: usize) -> Self {
        let kernel = Self { seal: Seal::default(), lines: Vec::new() };
        kernel.ktap("KTAP version 1").ktap(&format!("1..{tests}"))
    }

    fn frame(mut self, kind: Kind, payload: &str) -> Self {
        let mut line = String::new();
        self.seal.write(&mut line, kind, format_args!("{payload}")).unwrap();
        self.lines.push(line.trim_end().to_owned());
        self
    }

    fn ktap(self, line: &str) -> Self {
        self.frame(Kind::Ktap, line)
    }

    fn start(self, name: &str) -> Self {
        self.frame(Kind::Start, name)
    }

    fn pass(self, number: usize, name: &str) -> Self {
        self.start(name).ktap(&format!("# {name}: 7 ticks")).ktap(&format!("ok {number} {name}"))
    }

    fn console(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }

    fn totals(self, pass: usize, fail: usize) -> Self {
        self.ktap(&format!("# Totals: pass:{pass} fail:{fail} xfail:0 xpass:0 skip:0 error:0"))
    }

    fn whole(mut self) -> Self {
        let mut line = String::new();
        self.seal.finish(&mut line).unwrap();
        self.lines.push(line.trim_end().to_owned());
        self
    }
}

fn exit(code: i32) -> End {
    End::Exit { code: Some(code), said: String::new() }
}

/// All verdicts of a boot.
fn verdicts(tests: &[GuestTest], kernel: Kernel, end: &End) -> Vec<Verdict> {
    let mut report = Report::new(tests);
    let mut verdicts: Vec<_> = kernel.lines.iter().filter_map(|line| report.line(line)).collect();
    verdicts.extend(report.end(end).verdicts);
    verdicts
}

/// Each test with the reason of its failure, empty where it passed.
fn reasons(tests: &[GuestTest], kernel: Kernel, end: &End) -> Vec<(String, String)> {
    let reason = |verdict: Verdict| (verdict.test, verdict.failure.map(|failure| failure.reason).unwrap_or_default());
    verdicts(tests, kernel, end).into_iter().map(reason).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|&(test, reason)| (test.to_owned(), reason.to_owned())).collect()
}

fn two() -> [GuestTest; 2] {
    [test("a::x"), test("b::y")]
}

fn both_pass() -> Kernel {
    Kernel::plan(2).pass(1, "a::x").pass(2, "b::y")
}

#[test]
fn a_whole_report_passes() {
    let kernel = both_pass().totals(2, 0).frame(Kind::Table, "order 0").whole();
    let tests = two();
    let mut report = Report::new(&tests);
    let streamed: Vec<_> = kernel.lines.iter().filter_map(|line| report.line(line)).collect();
    let ended = report.end(&exit(33));
    let passed = |test: &str| Verdict { test: test.into(), ticks: Some(7), notes: Vec::new(), failure: None };
    assert_eq!(streamed, [passed("a::x")]);
    assert_eq!(ended, Ended { verdicts: vec![passed("b::y")], tables: vec!["order 0".into()] });
}

#[test]
fn what_a_test_says_about_itself_comes_with_its_verdict() {
    let kernel = Kernel::plan(1).start("a::x").ktap("# a::x: half of it").ktap("# b::y: not mine");
    let kernel = kernel.ktap("# a::x: 7 ticks").ktap("ok 1 a::x").totals(1, 0).whole();
    assert_eq!(verdicts(&[test("a::x")], kernel, &exit(33))[0].notes, ["half of it"]);
}

#[test]
fn firmware_and_console_text_is_no_report() {
    let kernel = Kernel::plan(2).console("SeaBIOS").console("ok 1 a::x").pass(1, "a::x").console("@kslab").console("");
    let kernel = kernel.pass(2, "b::y").totals(2, 0).whole().console("bye");
    assert_eq!(reasons(&two(), kernel, &exit(33)), pairs(&[("a::x", ""), ("b::y", "")]));
}

#[test]
fn a_frame_may_follow_a_line_that_was_left_open() {
    let mut kernel = Kernel::plan(1).start("a::x").ktap("not ok 1 a::x").totals(0, 1).whole();
    kernel.lines[3].insert_str(0, "@kslab 3 objects: ");
    let failed = verdicts(&[test("a::x")], kernel, &exit(35)).remove(0);
    let failure = Failure { reason: "failed without a reason".into(), console: vec!["@kslab 3 objects: ".into()] };
    assert_eq!(failed.failure, Some(failure));
}

#[test]
fn row_114_what_is_wrong_with_a_boot_fails_its_last_test() {
    let wrong_sum = |kernel: Kernel| {
        let lines = kernel.seal.lines;
        kernel.console(&format!("@kslab whole {lines} 00000000"))
    };
    let whole = || both_pass().totals(2, 0).whole();
    let reset = "the machine was reset: probably a triple fault";
    let damaged = "the report is damaged: its version, plan or totals are missing or wrong";
    for (kernel, end, reason) in [
        (wrong_sum(both_pass().totals(2, 0)), exit(33), "the report is damaged: its checksum is wrong"),
        (both_pass().totals(2, 0), exit(33), "the report is cut off: its last line is missing"),
        (both_pass(), exit(0), reset),
        (whole(), exit(0), reset),
        (whole(), exit(35), "the exit code is 35 and not 33"),
        (whole(), exit(1), "QEMU ended with code 1: "),
        (whole(), End::Exit { code: None, said: String::new() }, "QEMU was killed by a signal"),
        (both_pass(), End::NoProgress(Duration::from_secs(5)), "no progress for 5 s"),
        (both_pass().totals(1, 0).whole(), exit(33), damaged),
        (both_pass().whole(), exit(33), damaged),
        (whole().ktap("# x"), exit(33), "the report is damaged: there are frames after the last one"),
        (both_pass().ktap("ok 2 b::y"), exit(33), "the report is damaged: the result `2 b::y` is out of turn"),
        (both_pass().ktap("ok 1 a::x"), exit(33), "the report is damaged: the result `1 a::x` is out of turn"),
        (both_pass().pass(3, "c::z"), exit(33), "the report is damaged: `c::z` started out of turn"),
        (both_pass().ktap("hello"), exit(33), "the report is damaged: `hello` is no line of KTAP"),
        (both_pass().ktap("1..2"), exit(33), "the report is damaged: its plan is 1..2, and 2 tests were selected"),
    ] {
        assert_eq!(reasons(&two(), kernel, &end), pairs(&[("a::x", ""), ("b::y", reason)]));
    }
}

#[test]
fn row_114_a_lost_line_is_seen_by_the_checksum() {
    let kernel = both_pass().totals(2, 0).whole();
    for lost in 0..kernel.lines.len() {
        let tests = two();
        let mut report = Report::new(&tests);
        let lines = kernel.lines.iter().enumerate().filter(|&(at, _)| at != lost);
        let mut verdicts: Vec<_> = lines.filter_map(|(_, line)| report.line(line)).collect();
        verdicts.extend(report.end(&exit(33)).verdicts);
        assert!(verdicts.iter().any(|verdict| verdict.failure.is_some()), "without {}", kernel.lines[lost]);
    }
}

#[test]
fn a_test_without_a_result_fails_and_the_next_one_goes_on() {
    let kernel = Kernel::plan(2).start("a::x").pass(2, "b::y").totals(1, 0).whole();
    let missing = "the report has no result for this test";
    assert_eq!(reasons(&two(), kernel, &exit(33)), pairs(&[("a::x", missing), ("b::y", "")]));
    let kernel = Kernel::plan(2).pass(1, "a::x").start("b::y").totals(1, 0).whole();
    assert_eq!(reasons(&two(), kernel, &exit(33)), pairs(&[("a::x", ""), ("b::y", missing)]));
}

#[test]
fn a_stop_fails_the_running_test_and_leaves_the_rest() {
    let kernel = Kernel::plan(2).start("a::x").console("STOP: panic: no").frame(Kind::Stop, "panic: no");
    let kernel = kernel.ktap("# a::x: panic: no").ktap("not ok 1 a::x").totals(0, 1).whole();
    let failure = Failure { reason: "panic: no".into(), console: vec!["STOP: panic: no".into()] };
    let failed = Verdict { test: "a::x".into(), ticks: None, notes: Vec::new(), failure: Some(failure) };
    assert_eq!(verdicts(&two(), kernel, &exit(35)), [failed]);
}

#[test]
fn a_boot_without_a_test_fails_all_of_them() {
    let both = |reason: &str| pairs(&[("a::x", reason), ("b::y", reason)]);
    let empty = || Kernel { seal: Seal::default(), lines: Vec::new() };
    let end = End::Exit { code: Some(1), said: "no such file\n".into() };
    assert_eq!(reasons(&two(), empty(), &end), both("QEMU ended with code 1: no such file"));
    assert_eq!(reasons(&two(), empty(), &End::Error("cannot start QEMU".into())), both("cannot start QEMU"));
    let plan = "the report is damaged: its plan is 1..3, and 2 tests were selected";
    assert_eq!(reasons(&two(), Kernel::plan(3).pass(1, "a::x"), &exit(33)), both(plan));
    let early = "the kernel ended before it started `a::x`";
    assert_eq!(reasons(&two(), Kernel::plan(2).totals(0, 0).whole(), &exit(33)), both(early));
    let turn = "the report is damaged: `b::y` started out of turn";
    assert_eq!(reasons(&two(), Kernel::plan(2).pass(1, "b::y"), &exit(33)), both(turn));
    let verdicts = verdicts(&two(), empty().console("no memory map"), &exit(35));
    assert_eq!(verdicts[1].failure.as_ref().unwrap().console, ["no memory map"]);
}

#[test]
fn an_early_end_is_no_success() {
    let kernel = Kernel::plan(2).pass(1, "a::x").totals(1, 0).whole();
    let reason = "the kernel ended before it started `b::y`";
    assert_eq!(reasons(&two(), kernel, &exit(33)), pairs(&[("a::x", reason)]));
}

#[test]
fn an_expected_stop_passes_and_only_exactly_that() {
    let must = stopping("a::x", "panic: one\ntwo");
    let boot = |stop: &str, result: &str, code| {
        let failed = result.starts_with("not ok");
        let kernel = Kernel::plan(1).start("a::x");
        let kernel = if stop.is_empty() { kernel } else { kernel.frame(Kind::Stop, stop) };
        let kernel = kernel.ktap(result).totals(usize::from(!failed), usize::from(failed)).whole();
        reasons(std::slice::from_ref(&must), kernel, &exit(code)).remove(0).1
    };
    assert_eq!(boot("panic: one\ntwo", "ok 1 a::x", 33), "");
    assert_eq!(boot("panic: one\ntwo", "ok 1 a::x", 35), "the exit code is 35 and not 33");
    let other = r"stopped with `panic: one` instead of `panic: one\ntwo`";
    assert_eq!(boot("panic: one", "ok 1 a::x", 33), other);
    assert_eq!(boot("panic: one", "not ok 1 a::x", 35), other);
    let returned = r"returned, and had to stop with `panic: one\ntwo`";
    assert_eq!(boot("", "ok 1 a::x", 33), returned);
    assert_eq!(boot("", "not ok 1 a::x", 35), returned);
    assert_eq!(boot("panic: one\ntwo", "not ok 1 a::x", 35), "failed without a reason");
}

#[test]
fn a_star_in_an_expected_stop_stands_for_an_address() {
    let must = stopping("a::x", "page fault at 0x*\tmore");
    let boot = |stop: &str| {
        let kernel = Kernel::plan(1).start("a::x").frame(Kind::Stop, stop).ktap("ok 1 a::x").totals(1, 0).whole();
        reasons(std::slice::from_ref(&must), kernel, &exit(33)).remove(0).1
    };
    assert_eq!(boot("page fault at 0x1f00\tmore"), "");
    assert_ne!(boot("page fault at 0xyz\tmore"), "");
    assert_ne!(boot("page fault at 0x1f00"), "");
}

#[test]
fn an_unexpected_stop_does_not_pass() {
    let kernel = Kernel::plan(1).start("a::x").frame(Kind::Stop, "panic: no").ktap("ok 1 a::x").totals(1, 0).whole();
    let reason = "stopped with `panic: no`, and yet its result is ok";
    assert_eq!(reasons(&[test("a::x")], kernel, &exit(33)), pairs(&[("a::x", reason)]));
}

#[test]
fn only_the_last_lines_of_the_console_are_kept() {
    let tests = [test("a::x")];
    let mut report = Report::new(&tests);
    for line in 0..=CONSOLE_LINES {
        report.line(&line.to_string());
    }
    let ended = report.end(&exit(0));
    let console = &ended.verdicts[0].failure.as_ref().unwrap().console;
    assert_eq!((console.len(), console[0].as_str()), (CONSOLE_LINES, "1"));
}
