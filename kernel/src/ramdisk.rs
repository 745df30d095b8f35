//! The ramdisk: a tar archive of files that the loader has put into memory beside the kernel.
//!
//! Its memory is reserved in the memory map, so that the heap never has it, and it is mapped at [`memory::RAMDISK`], read-only.
//! There is no lock and no allocation, and no archive, however damaged, stops the kernel.

use core::slice;

use bootloader_api::BootInfo;
use spin::Once;
use tar_no_std::TarArchiveRef;

use crate::memory;

static BYTES: Once<&[u8]> = Once::new();

/// Protects the ramdisk, if the loader has one, and has it found from now on.
///
/// # Safety
///
/// What `boot_info` says about it must be true, and nothing else refers to it.
pub(crate) unsafe fn init(boot_info: &BootInfo) {
    let Some(start) = boot_info.ramdisk_addr.into_option() else { return };
    let length = boot_info.ramdisk_len as usize;
    memory::make_read_only(start, length);
    // SAFETY: it is mapped there, as the caller says, and nobody writes to it.
    BYTES.call_once(|| unsafe { slice::from_raw_parts(start as *const u8, length) });
}

/// All of it; empty where the loader has none.
pub fn bytes() -> &'static [u8] {
    BYTES.get().unwrap_or(&&[][..])
}

/// What the file with this name holds. `None` where there is no such file, or the ramdisk is no tar archive.
pub fn file(name: &str) -> Option<&'static [u8]> {
    file_in(bytes(), name)
}

fn file_in<'a>(archive: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut entries = TarArchiveRef::new(archive).ok()?.entries();
    entries.find(|entry| entry.filename().as_str() == Ok(name)).map(|entry| entry.data())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 512;

    /// Writes `text` at `at`.
    fn put(block: &mut [u8], at: usize, text: &str) {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    }

    /// A file, as POSIX.1-1988 has it ("ustar").
    fn entry(name: &str, content: &[u8]) -> Vec<u8> {
        let mut entry = vec![0; BLOCK];
        put(&mut entry, 0, name);
        put(&mut entry, 100, "0000444");
        put(&mut entry, 124, &format!("{:011o}", content.len()));
        put(&mut entry, 148, "        0");
        put(&mut entry, 257, "ustar\x0000");
        let sum: u32 = entry.iter().map(|&byte| u32::from(byte)).sum();
        put(&mut entry, 148, &format!("{sum:06o}\0"));
        entry.extend(content);
        entry.resize(entry.len().next_multiple_of(BLOCK), 0);
        entry
    }

    fn archive() -> Vec<u8> {
        [entry("one", b"1"), entry("dir/empty", b""), entry("two", &[2; 600]), vec![0; 2 * BLOCK]].concat()
    }

    #[test]
    fn files_are_found_by_their_names() {
        let archive = archive();
        assert_eq!(file_in(&archive, "one"), Some(&b"1"[..]));
        assert_eq!(file_in(&archive, "two"), Some(&[2; 600][..]));
        assert_eq!(file_in(&archive, "dir/empty"), Some(&[][..]));
        assert_eq!(file_in(&archive, "tw"), None);
        assert_eq!(file_in(&[], "one"), None);
        assert_eq!(file("one"), None, "there is no ramdisk");
    }

    #[test]
    fn a_damaged_archive_has_no_files_or_fewer() {
        let whole = archive();
        for length in 0..whole.len() {
            assert_eq!(file_in(&whole[..length], "one"), None, "cut to {length} bytes");
        }
        for at in 0..whole.len() {
            for byte in [0, b'7', 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                let found = file_in(&damaged, "two");
                assert!(found.is_none_or(|bytes| bytes.len() == 600), "byte {at} is {byte:#x}");
            }
        }
    }
}
