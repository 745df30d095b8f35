//! The table of misuses and allocators, in Markdown that can be read as it is.

use super::{Outcome, Row};

/// The table: a line for each misuse, a column for each of `allocators`.
pub fn of(allocators: &[String], rows: &[Row]) -> String {
    let line = |first: &str, rest: Vec<String>| [vec![first.to_owned()], rest].concat();
    let mut lines = vec![line("", allocators.to_vec())];
    lines.extend(
        rows.iter().map(|(misuse, outcomes)| line(&misuse.title, outcomes.iter().map(Outcome::brief).collect())),
    );
    render(&lines)
}

/// The cells in columns, the first line as the head.
fn render(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let cells = |column| lines.iter().filter_map(move |line| line.get(column));
    let widths: Vec<_> = (0..columns).map(|column| cells(column).map(|cell| cell.chars().count()).max()).collect();
    let width = |column: usize| widths[column].unwrap_or(0);
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        let cells = line.iter().enumerate().map(|(column, cell)| format!(" {cell:0$} |", width(column)));
        text += &format!("|{}\n", cells.collect::<String>());
        if number == 0 {
            let rules = (0..columns).map(|column| format!("{}|", "-".repeat(width(column) + 2)));
            text += &format!("|{}\n", rules.collect::<String>());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let lines = [["", "talc 5.1.1"], ["double free", "hang"]];
        let lines = lines.map(|line| line.map(str::to_owned).to_vec());
        let expected = "|             | talc 5.1.1 |\n|-------------|------------|\n| double free | hang       |\n";
        assert_eq!(render(&lines), expected);
    }
}
