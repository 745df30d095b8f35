//! Programs in ring 3, from the command line: what they write, their tables of memory, and the exit codes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A static program for i386, as an ELF file: the code at 0x08048054, in one segment.
fn program(name: &str, code: &[u8]) -> PathBuf {
    let size = (0x54 + code.len()) as u32;
    let mut elf = b"\x7fELF\x01\x01\x01".to_vec();
    elf.resize(16, 0);
    [2_u16, 3].iter().for_each(|half| elf.extend(half.to_le_bytes()));
    [1_u32, 0x0804_8054, 52, 0, 0].iter().for_each(|word| elf.extend(word.to_le_bytes()));
    [52_u16, 32, 1, 0, 0, 0].iter().for_each(|half| elf.extend(half.to_le_bytes()));
    [1_u32, 0, 0x0804_8000, 0x0804_8000, size, size, 5, 4096].iter().for_each(|word| elf.extend(word.to_le_bytes()));
    elf.extend(code);
    file(name, &elf)
}

fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, content).unwrap();
    path
}

fn launcher(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_testkernel")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn run(program: &Path, more: &[&str]) -> Output {
    launcher(&[&["--program", program.to_str().unwrap()], more].concat())
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The words of the lines that begin with `start`.
fn rows<'a>(text: &'a str, start: &str) -> Vec<Vec<&'a str>> {
    text.lines()
        .filter(|line| line.trim_start().starts_with(start))
        .map(|line| line.split_whitespace().collect())
        .collect()
}

/// Writes six bytes, and exits with status 3.
fn writes(name: &str) -> PathBuf {
    let writes_and_exits = [
        b"\xb8\x04\0\0\0\xbb\x01\0\0\0\xb9\x76\x80\x04\x08\xba\x06\0\0\0\xcd\x80".as_slice(), // write(1, ..., 6)
        b"\xb8\x01\0\0\0\xbb\x03\0\0\0\xcd\x80",                                              // exit(3)
        b"@\xff \\n\n",
    ];
    program(name, &writes_and_exits.concat())
}

/// Whether that is what came of the one above.
fn has_written(output: &Output) {
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(output.stdout.windows(6).any(|bytes| bytes == b"@\xff \\n\n"), "every byte comes through: {output:?}");
    let text = stdout(output);
    assert!(text.contains("\nexit status 3\n"), "{text}");
    let [start] = &rows(&text, "start")[..] else { panic!("{text}") };
    assert_eq!(start[1..], ["-", "0x8049000", "2", "8", "8196"]);
    let [frames] = &rows(&text, "free page frames:")[..] else { panic!("{text}") };
    assert_eq!(frames[3], frames[5], "all frames are back");
}

#[test]
fn a_program_from_a_file_says_what_it_says_and_its_status_is_ours() {
    let program = writes("writes");
    for more in [&["--memory", "32M"][..], &["--eager", "--cpus", "4"]] {
        has_written(&run(&program, more));
    }
}

// The program is in the ramdisk of the image then.
#[test]
#[ignore = "slow"]
fn a_program_from_a_file_runs_from_disk_images_too() {
    let program = writes("writes-from-disk");
    for boot in ["bios", "uefi"] {
        has_written(&run(&program, &["--boot", boot]));
    }
}

#[test]
fn a_program_that_is_killed_is_reported_and_the_exit_code_says_so() {
    let output = run(&program("writes-to-null", b"\xa3\0\0\0\0"), &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = "killed: page fault: write to 0x00000000, not mapped; \
        rip 0x08048054 in segment 0x08048000-0x08049000 r-x\n";
    assert!(stdout(&output).contains(report), "{output:?}");
}

#[test]
fn what_cannot_be_run_is_told_in_one_line() {
    let shared = {
        let mut elf = fs::read(program("shared", b"")).unwrap();
        elf[16] = 3;
        file("shared", &elf)
    };
    for (file, told) in [
        (PathBuf::from("/nowhere/program"), "cannot read the program /nowhere/program; name an ELF file"),
        (file("script", b"#!/bin/sh\n"), "is not an ELF file; link the program statically for i386"),
        (shared, "it is not a static executable: link it with -static and -no-pie"),
    ] {
        let output = run(&file, &[]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(matches!(errors[..], [error] if error.contains(told)), "{stderr}");
        assert!(stderr.trim_end().ends_with(errors[0]), "{stderr}");
    }
}

#[test]
fn the_break_is_seen_to_grow_by_64_mib_and_to_be_reset() {
    let output = launcher(&["--demo", "brk"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = stdout(&output);
    // Result, break, mappings, resident and reserved KiB: lazily, then eagerly.
    let calls: Vec<_> = rows(&text, "brk(").into_iter().map(|row| row[1..].join(" ")).collect();
    let expected = [
        "0x8049000 0x8049000 2 8 8196",
        "0x8049008 0x8049008 3 8 8200",
        "0xc049008 0xc049008 3 12 73736",
        "0x8049000 0x8049000 2 8 8196",
        "0x8049000 0x8049000 2 8 8196",
        "0x8049008 0x8049008 3 12 8200",
        "0xc049008 0xc049008 3 65548 73736",
        "0x8049000 0x8049000 2 8 8196",
    ];
    assert_eq!(calls, expected, "{text}");
    assert_eq!(rows(&text, "exit status 0").len(), 2, "{text}");
}

#[test]
fn a_demo_shows_the_eager_run_alone() {
    for (demo, calls) in [("brk", "brk("), ("mmap", "mmap2(")] {
        let output = launcher(&["--demo", demo, "--eager"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let text = stdout(&output);
        assert!(text.starts_with(&format!("{demo}:eager: ")), "{text}");
        assert_eq!((rows(&text, "start").len(), rows(&text, "exit status 0").len()), (1, 1), "{text}");
        assert!(!rows(&text, calls).is_empty() && !text.contains("killed"), "{text}");
    }
}

#[test]
fn the_mappings_are_seen_to_come_and_go_and_to_be_protected() {
    let output = launcher(&["--demo", "mmap"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = stdout(&output);
    assert_eq!(rows(&text, "exit status 0").len(), 2, "{text}");
    let killed: Vec<_> = rows(&text, "killed: page fault:").into_iter().map(|row| row[3..5].join(" ")).collect();
    assert_eq!(killed, ["write to", "execution at", "read from", "read from"], "{text}");
    assert!(rows(&text, "free page frames:").iter().all(|row| row[3] == row[5]), "{text}");
}
