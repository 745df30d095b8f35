//! The corpus of each target, without libFuzzer.

use std::path::Path;

fn run(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let files: Vec<_> = corpus.read_dir().expect("a corpus").map(|file| file.expect("a file").path()).collect();
    assert!(files.len() >= 10, "{} files in {}", files.len(), corpus.display());
    for file in files {
        // Shown where it fails.
        println!("{}", file.display());
        run(&std::fs::read(&file).expect("a file"));
    }
}

#[test]
fn operations() {
    run("operations", kslab_fuzz::operations);
}

#[test]
fn maps() {
    run("maps", kslab_fuzz::maps);
}

#[test]
fn frames() {
    run("frames", kslab_fuzz::frames);
}

#[test]
fn layouts() {
    run("layouts", kslab_fuzz::layouts);
}

#[test]
fn misuse() {
    run("misuse", kslab_fuzz::misuse);
}
