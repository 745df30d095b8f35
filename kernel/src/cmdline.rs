//! The kernel's command line: words of the form `key=value`, separated by spaces.

use spin::Once;

use crate::stop::stop;

static LINE: Once<&str> = Once::new();

/// Keeps `line`, which must be UTF-8; stops the kernel if it is not.
pub(crate) fn init(line: &'static [u8]) {
    match core::str::from_utf8(line) {
        Ok(line) => LINE.call_once(|| line),
        Err(error) => stop(format_args!("the kernel's command line is not UTF-8 ({error})"), |_| Ok(())),
    };
}

/// The whole command line; empty before the kernel has read it.
pub fn line() -> &'static str {
    LINE.get().unwrap_or(&"")
}

/// The value of the first word `key=value`.
pub fn value(key: &str) -> Option<&'static str> {
    value_in(line(), key)
}

fn value_in<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::value_in;

    #[test]
    fn the_first_word_with_the_key_counts() {
        let line = "tests=1,2  other tests=3 empty= eq=a=b";
        assert_eq!(value_in(line, "tests"), Some("1,2"));
        assert_eq!(value_in(line, "empty"), Some(""));
        assert_eq!(value_in(line, "eq"), Some("a=b"));
        assert_eq!(value_in(line, "other"), None);
        assert_eq!(value_in(line, "test"), None);
        assert_eq!(value_in("", "tests"), None);
    }
}
