//! The order of names as people count: `epoch2` comes before `epoch10`.

use std::cmp::Ordering;

/// Compares two names, in which runs of digits count as numbers.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let (mut first, mut second) = (a, b);
    while !first.is_empty() && !second.is_empty() {
        let ((x, rest), (y, other)) = (run(first), run(second));
        let order = match x.starts_with(digit) && y.starts_with(digit) {
            true => number(x).cmp(&number(y)),
            false => x.cmp(y),
        };
        if order.is_ne() {
            return order;
        }
        (first, second) = (rest, other);
    }
    // Names that differ only by leading zeros are two names all the same.
    first.len().cmp(&second.len()).then_with(|| a.cmp(b))
}

/// A run of digits, or of what is none, and the rest.
fn run(text: &str) -> (&str, &str) {
    let digits = text.starts_with(digit);
    text.split_at(text.find(|c| digit(c) != digits).unwrap_or(text.len()))
}

/// A number of any length: the longer one is larger.
fn number(digits: &str) -> (usize, &str) {
    let digits = digits.trim_start_matches('0');
    (digits.len(), digits)
}

fn digit(c: char) -> bool {
    c.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_count() {
        let sorted = [
            "007",
            "7",
            "8",
            "a",
            "a-1.x",
            "a-2-9.x",
            "a-2-10.x",
            "a-10.x",
            "a-99999999999999999999",
            "a-100000000000000000000",
            "b",
            "é2",
            "é10",
        ];
        for (i, a) in sorted.iter().enumerate() {
            for (k, b) in sorted.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&k), "{a} {b}");
            }
        }
    }
}
