//! Programs for processes, in assembly: each is a whole ELF file, in the kernel's read-only data.
//!
//! The assembler of the Rust toolchain makes them, of any target for x86_64: `.code32` has it encode for i386.

/// The program of that name, from the assembly that follows, which begins with `program NAME` and ends with `end_program
/// NAME`; see `programs/macros.s`.
macro_rules! program {
    ($name:ident: $($line:expr),+ $(,)?) => {
        $crate::guest::programs::program!(@assemble
            concat!("program ", stringify!($name)), $($line,)+ concat!("end_program ", stringify!($name)));
        $crate::guest::programs::program!(@find $name);
    };
    ($name:ident of 64 bits: $($line:expr),+ $(,)?) => {
        $crate::guest::programs::program!(@assemble
            concat!("program_64 ", stringify!($name)), $($line,)+ concat!("end_program_64 ", stringify!($name)));
        $crate::guest::programs::program!(@find $name);
    };
    (@assemble $($line:expr),+) => {
        #[cfg(target_os = "none")]
        core::arch::global_asm!(
            // Wherever this is used.
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/src/guest/programs/macros.s")),
            $($line,)+
            options(att_syntax, raw)
        );
    };
    (@find $name:ident) => {
        /// The program of that name.
        #[cfg(target_os = "none")]
        pub(in crate::guest) fn $name() -> &'static [u8] {
            use core::slice;

            unsafe extern "C" {
                #[link_name = concat!("program_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("program_", stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: the assembly above puts the symbols around bytes of one section of read-only data.
            unsafe { slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }

        /// A host program has none.
        #[cfg(not(target_os = "none"))]
        pub(in crate::guest) fn $name() -> &'static [u8] {
            &[]
        }
    };
}
pub(super) use program;

#[cfg(target_os = "none")]
core::arch::global_asm!(
    include_str!("programs/macros.s"),
    include_str!("programs/brk.s"),
    include_str!("programs/mmap.s"),
    options(att_syntax, raw)
);
program!(@find brk);
program!(@find mmap);
program!(@find write_to_read_only);
program!(@find execute_data);
program!(@find read_reserved);
program!(@find read_unmapped);

/// A program that is named on the command line.
pub(super) fn named(name: &str) -> Option<&'static [u8]> {
    Some(match name {
        "brk" => brk(),
        "mmap" => mmap(),
        "write-to-read-only" => write_to_read_only(),
        "execute-data" => execute_data(),
        "read-reserved" => read_reserved(),
        "read-unmapped" => read_unmapped(),
        _ => return None,
    })
}
