//! The header for C, beside the functions that there are.

use std::collections::BTreeMap;
use std::string::{String, ToString};
use std::vec::Vec;

use super::{malloc, windows, zones};

const HEADER: &str = include_str!("../../include/kslab.h");
const EXPORTS: [&str; 4] =
    [include_str!("malloc.rs"), include_str!("windows.rs"), include_str!("zones/export.rs"), include_str!("pages.rs")];

/// The name of a function and how many arguments it has, from text that goes on behind its name with them.
fn signature(text: &str) -> (String, usize) {
    let (before, rest) = text.split_once('(').expect("arguments");
    let name = before.rsplit(|character: char| !character.is_alphanumeric() && character != '_').next();
    let (mut depth, mut arguments, mut is_empty) = (0, 0, true);
    for character in rest.chars() {
        match character {
            '(' => depth += 1,
            ')' if depth == 0 => break,
            ')' => depth -= 1,
            ',' if depth == 0 => (arguments, is_empty) = (arguments + 1, true),
            _ => is_empty &= character.is_whitespace(),
        }
    }
    (name.expect("a name").to_string(), arguments + usize::from(!is_empty && !rest.starts_with("void)")))
}

/// The functions that the macros make for C.
fn exported() -> BTreeMap<String, usize> {
    let starts = EXPORTS.iter().flat_map(|text| text.split("#[unsafe(no_mangle)]").skip(1));
    starts.map(|text| signature(text.split_once(" fn ").expect("a function").1)).collect()
}

/// The functions that the header declares.
fn declared() -> BTreeMap<String, usize> {
    let lines = HEADER.lines().filter(|line| line.ends_with(");") && !line.starts_with([' ', '#']));
    lines.filter(|line| !line.starts_with("typedef")).map(signature).collect()
}

#[test]
fn the_header_declares_the_functions_that_there_are() {
    let exported = exported();
    assert_eq!(declared(), exported);
    assert_eq!(
        ["malloc_trim", "mallinfo2", "HeapReAlloc", "malloc_zone_enumerate"].map(|name| exported[name]),
        [1, 0, 4, 4]
    );
    assert_eq!(exported.len(), 13 + 9 + 27 + 3);
}

#[test]
fn the_header_has_the_numbers_that_there_are() {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let defined = |line: &'static str| {
        let (name, text) = line.strip_prefix("#define ")?.split_once(' ')?;
        Some((name, number(text).expect("a number")))
    };
    let mut found: Vec<_> = HEADER.lines().filter_map(defined).collect();
    found.sort_unstable();
    let mut expected = [
        ("HEAP_NO_SERIALIZE", windows::NO_SERIALIZE),
        ("HEAP_GENERATE_EXCEPTIONS", windows::GENERATE_EXCEPTIONS),
        ("HEAP_ZERO_MEMORY", windows::ZERO_MEMORY),
        ("HEAP_REALLOC_IN_PLACE_ONLY", windows::REALLOC_IN_PLACE_ONLY),
        ("PROCESS_HEAP_ENTRY_BUSY", windows::PROCESS_HEAP_ENTRY_BUSY.into()),
        ("ERROR_INVALID_HANDLE", windows::ERROR_INVALID_HANDLE),
        ("ERROR_NOT_ENOUGH_MEMORY", windows::ERROR_NOT_ENOUGH_MEMORY),
        ("ERROR_INVALID_PARAMETER", windows::ERROR_INVALID_PARAMETER),
        ("ERROR_NO_MORE_ITEMS", windows::ERROR_NO_MORE_ITEMS),
        ("STATUS_ACCESS_VIOLATION", windows::STATUS_ACCESS_VIOLATION),
        ("STATUS_NO_MEMORY", windows::STATUS_NO_MEMORY),
        ("MALLOC_PTR_IN_USE_RANGE_TYPE", zones::PTR_IN_USE_RANGE_TYPE),
        ("MALLOC_PTR_REGION_RANGE_TYPE", zones::PTR_REGION_RANGE_TYPE),
        ("MALLOC_ADMIN_REGION_RANGE_TYPE", zones::ADMIN_REGION_RANGE_TYPE),
    ];
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn structures_have_the_sizes_of_those_in_the_header() {
    // `size_t` and pointers have 8 bytes, what is smaller is padded before them.
    assert_eq!(size_of::<malloc::Mallinfo2>(), 10 * 8);
    assert_eq!(size_of::<windows::ProcessHeapEntry>(), 8 + 4 + 1 + 1 + 2 + 24);
    assert_eq!((size_of::<zones::Statistics>(), size_of::<zones::Range>()), (4 * 8, 2 * 8));
}
