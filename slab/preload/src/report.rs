//! What is done about a bad free: its report goes to standard error, and the program ends.

use core::fmt::{self, Write};

use kslab::fault::{OnFault, Report};

/// Text without an allocation; what is too long is cut.
struct Text {
    bytes: [u8; 2048],
    length: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = &mut self.bytes[self.length..];
        let written = text.len().min(rest.len());
        rest[..written].copy_from_slice(&text.as_bytes()[..written]);
        self.length += written;
        Ok(())
    }
}

/// The heap's fault handler.
pub(crate) fn stop(report: &Report) -> OnFault {
    let mut text = Text { bytes: [0; 2048], length: 0 };
    _ = writeln!(text, "{report}");
    // SAFETY: the text is there, and so long; nothing is done about an error.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.bytes.as_ptr().cast(), text.length);
        libc::abort()
    }
}
