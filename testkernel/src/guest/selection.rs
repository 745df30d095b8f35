//! Which tests run: the word `tests=` of the kernel's command line.

use core::ops::Range;

use crate::protocol::Test;

/// The indexes of the tests that `wanted`, the value of `tests=`, picks, in its order; without it every ordinary test.
///
/// An item with a number that no test has is the error.
pub(super) fn select<'a>(
    tests: &'a [Test],
    wanted: Option<&'a str>,
) -> Result<impl Iterator<Item = usize> + Clone + use<'a>, &'a str> {
    let items = move || wanted.into_iter().flat_map(|wanted| wanted.split(',')).filter(|item| !item.is_empty());
    if let Some(unknown) = items().find(|item| numbers(item).is_some_and(|range| range.end > tests.len())) {
        return Err(unknown);
    }
    let everything = wanted.is_none().then_some("");
    Ok(everything.into_iter().chain(items()).flat_map(move |item| {
        let range = numbers(item);
        let text = if range.is_none() { 0..tests.len() } else { 0..0 };
        let named = text.filter(move |&index| tests[index].is_ordinary() && tests[index].name.get().contains(item));
        range.into_iter().flatten().chain(named)
    }))
}

/// Reads `7` or `0-5`.
fn numbers(item: &str) -> Option<Range<usize>> {
    let (first, last) = item.split_once('-').unwrap_or((item, item));
    let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
    Some(first..last.checked_add(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Text, When};

    const fn test(name: &'static str, stops_with: &'static str, when: When) -> Test {
        Test { name: Text::new(name), stops_with: Text::new(stops_with), run: || {}, when, cpus: 1 }
    }

    fn selected(wanted: Option<&'static str>) -> Result<Vec<usize>, &'static str> {
        static TESTS: [Test; 5] = [
            test("a::one", "", When::Always),
            test("a::two", "panic: x", When::Always),
            test("b::one", "", When::Always),
            test("b::slow", "", When::Ignored),
            test("broken::one", "", When::Broken),
        ];
        select(&TESTS, wanted).map(Iterator::collect)
    }

    #[test]
    fn without_a_word_every_ordinary_test_runs() {
        assert_eq!(selected(None), Ok(vec![0, 2]));
    }

    #[test]
    fn numbers_and_ranges_pick_any_test_in_their_order() {
        assert_eq!(selected(Some("4,0-2,3")), Ok(vec![4, 0, 1, 2, 3]));
    }

    #[test]
    fn a_text_picks_ordinary_tests_only() {
        assert_eq!(selected(Some("one")), Ok(vec![0, 2]));
        assert_eq!(selected(Some("b::,a::")), Ok(vec![2, 0]));
        assert_eq!(selected(Some("nothing")), Ok(vec![]));
        assert_eq!(selected(Some("")), Ok(vec![]));
    }

    #[test]
    fn a_number_that_no_test_has_is_named() {
        assert_eq!(selected(Some("0,5")), Err("5"));
        assert_eq!(selected(Some("3-7,0")), Err("3-7"));
    }
}
