//! Natural order of names: `epoch2` comes before `epoch10`.

use std::cmp::Ordering;

/// Compares two names; runs of digits compare as numbers.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let mut rest_a = a;
    let mut rest_b = b;
    while !rest_a.is_empty() && !rest_b.is_empty() {
        let (run_a, after_a) = split_run(rest_a);
        let (run_b, after_b) = split_run(rest_b);
        let order = if run_a.starts_with(is_digit) && run_b.starts_with(is_digit) {
            number_key(run_a).cmp(&number_key(run_b))
        } else {
            run_a.cmp(run_b)
        };
        if order.is_ne() {
            return order;
        }
        rest_a = after_a;
        rest_b = after_b;
    }
    // Names that differ only by leading zeros are different names.
    rest_a.len().cmp(&rest_b.len()).then_with(|| a.cmp(b))
}

/// Splits a text after its first run of digits, or of other characters.
fn split_run(text: &str) -> (&str, &str) {
    let digits = text.starts_with(is_digit);
    text.split_at(text.find(|c| is_digit(c) != digits).unwrap_or(text.len()))
}

/// Returns a sort key of a number of any length: without leading zeros, the longer one is larger.
fn number_key(digits: &str) -> (usize, &str) {
    let digits = digits.trim_start_matches('0');
    (digits.len(), digits)
}

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_compare_by_value() {
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
