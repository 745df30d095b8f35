//! The kernel on the bare machine; on a host, the program that boots it.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
kernel::entry!(testkernel::guest::main);

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    testkernel::host::main()
}
