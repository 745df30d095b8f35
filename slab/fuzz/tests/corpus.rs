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
fn rows_63_and_71_operations_with_failures() {
    run("operations", kslab_fuzz::operations);
}

#[test]
fn rows_46_to_48_50_and_53_memory_maps() {
    run("maps", kslab_fuzz::maps);
}

#[test]
fn row_62_frames_across_holes() {
    run("frames", kslab_fuzz::frames);
}

#[test]
fn rows_32_34_35_37_38_and_40_to_42_layouts() {
    run("layouts", kslab_fuzz::layouts);
}

#[test]
fn rows_1_2_7_to_9_11_12_14_to_16_43_60_and_61_misuse() {
    run("misuse", kslab_fuzz::misuse);
}
