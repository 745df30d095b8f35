//! The list of tests, read from the kernel's ELF file.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use object::{LittleEndian, Object, ObjectSection, ObjectSegment, read::elf::ElfFile64};

use crate::protocol::{TESTS_SECTION, Test, When};

/// A test of the kernel, as the host knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestTest {
    /// Module path and function name.
    pub name: String,
    /// By which the kernel's command line picks it.
    pub number: usize,
    /// The headline of the report with which it must stop the kernel.
    pub stops_with: Option<String>,
    /// When it runs.
    pub when: When,
    /// CPUs that its machine must have.
    pub cpus: u16,
}

impl GuestTest {
    /// Whether it runs in every run of the suite and returns.
    pub fn is_ordinary(&self) -> bool {
        self.when == When::Always && self.stops_with.is_none()
    }
}

/// Words of eight bytes in the record of a test.
const WORDS: usize = 7;
const _: () = assert!(cfg!(not(target_pointer_width = "64")) || size_of::<Test>() == WORDS * 8);

/// The tests of the kernel at `elf`, sorted by name.
pub fn tests(elf: &Path) -> Result<Vec<GuestTest>> {
    let data = fs::read(elf).with_context(|| format!("cannot read the kernel {}", elf.display()))?;
    parse(&data).with_context(|| format!("the list of tests in {} is damaged", elf.display()))
}

fn parse(data: &[u8]) -> Result<Vec<GuestTest>> {
    let file = ElfFile64::<LittleEndian>::parse(data)?;
    let section = file.section_by_name(TESTS_SECTION).with_context(|| format!("no section {TESTS_SECTION}"))?;
    let bytes_at = |address, len| file.segments().find_map(|segment| segment.data_range(address, len).ok().flatten());
    records(section.data()?, bytes_at)
}

/// Reads the records in `section`; `bytes_at` gives what the kernel sees at an address.
fn records<'a>(section: &[u8], bytes_at: impl Fn(u64, u64) -> Option<&'a [u8]>) -> Result<Vec<GuestTest>> {
    let (words, odd) = section.as_chunks::<8>();
    let words: Vec<_> = words.iter().map(|&word| u64::from_le_bytes(word)).collect();
    let (records, rest) = words.as_chunks::<WORDS>();
    ensure!(odd.is_empty() && rest.is_empty(), "{} bytes are no whole number of records", section.len());

    let text = |number, address, len| {
        let bytes = if len == 0 { Some(&[][..]) } else { bytes_at(address, len) };
        let bytes =
            bytes.with_context(|| format!("test {number} names {len} bytes at {address:#x}, outside the file"))?;
        std::str::from_utf8(bytes).with_context(|| format!("a text of test {number} is not UTF-8"))
    };
    let mut tests = Vec::new();
    for (number, &[name, name_len, report, report_len, _run, when, cpus]) in records.iter().enumerate() {
        let name = text(number, name, name_len)?.to_owned();
        ensure!(!name.is_empty(), "test {number} has no name");
        let stops_with = Some(text(number, report, report_len)?.to_owned()).filter(|report| !report.is_empty());
        let Some(when) =
            [When::Always, When::Ignored, When::Broken, When::Bench].into_iter().find(|&known| known as u64 == when)
        else {
            bail!("test {name} is of kind {when}, which is unknown");
        };
        let cpus = u16::try_from(cpus).with_context(|| format!("test {name} wants {cpus} CPUs"))?;
        tests.push(GuestTest { name, number, stops_with, when, cpus });
    }
    tests.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tests.windows(2).find(|pair| pair[0].name == pair[1].name) {
        bail!("two tests are called {}", pair[0].name);
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: &[u8] = b"b::twopanic: noa::one\xff";
    const BASE: u64 = 0xffff_ffff_8020_0000;

    fn bytes_at(address: u64, len: u64) -> Option<&'static [u8]> {
        let start = usize::try_from(address.checked_sub(BASE)?).ok()?;
        TEXTS.get(start..start.checked_add(usize::try_from(len).ok()?)?)
    }

    fn read(words: &[u64]) -> Result<Vec<GuestTest>> {
        let section: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        records(&section, bytes_at)
    }

    #[test]
    fn records_are_read_and_sorted_by_name() {
        let tests = read(&[BASE, 6, BASE + 6, 9, 0x1000, 0, 2, BASE + 15, 6, 1, 0, 0x2000, 1, 1]).unwrap();
        let one = GuestTest { name: "a::one".into(), number: 1, stops_with: None, when: When::Ignored, cpus: 1 };
        let stops_with = Some("panic: no".into());
        let two = GuestTest { name: "b::two".into(), number: 0, stops_with, when: When::Always, cpus: 2 };
        assert_eq!(tests, [one, two]);
        assert_eq!(read(&[]).unwrap(), []);
    }

    #[test]
    fn damaged_records_are_told() {
        let one = [BASE, 6, 1, 0, 0, 0, 1];
        for (words, part) in [
            (&one[..6], "no whole number of records"),
            (&[BASE - 1, 6, 1, 0, 0, 0, 1], "outside the file"),
            (&[BASE, u64::MAX, 1, 0, 0, 0, 1], "outside the file"),
            (&[BASE + 20, 2, 1, 0, 0, 0, 1], "not UTF-8"),
            (&[BASE, 0, 1, 0, 0, 0, 1], "no name"),
            (&[BASE, 6, 1, 0, 0, 4, 1], "kind 4"),
            (&[BASE, 6, 1, 0, 0, 0, 1 << 16], "wants 65536 CPUs"),
            (&[one, one].concat(), "two tests are called b::two"),
        ] {
            let told = read(words).unwrap_err().to_string();
            assert!(told.contains(part), "{told}");
        }
        assert!(records(&[0; 55], bytes_at).is_err());
    }

    #[test]
    fn what_is_no_kernel_is_told() {
        assert!(parse(b"#!/bin/sh").is_err());
        assert!(parse(&[]).is_err());
    }
}
