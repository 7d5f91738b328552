//! Lists and ranges on the command line: `0.05,0.06,...,0.28`, `5000,20%` and `0.05..0.28`.

use std::str::FromStr;

use posthoc_ema::{Retention, Window};

/// Most numbers of a list, so that a slip such as `1,2,...,1e9` does not fill the memory.
const MAX_LENGTH: usize = 10_000;

/// A list of numbers, with `...` expanded.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers(pub Vec<f64>);

/// A list of windows in steps or in percent.
#[derive(Clone, Debug)]
pub struct Windows(pub Vec<Window>);

/// A number of elements or bytes, optionally with a unit: `1.3B`, `500M`, `40GB`, `64GiB`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Count(pub u64);

/// Units and their factors.
const UNITS: [(&str, f64); 13] = [
    ("", 1.0),
    ("K", 1e3),
    ("M", 1e6),
    ("B", 1e9),
    ("T", 1e12),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KIB", 1024.0),
    ("MIB", 1048576.0),
    ("GIB", 1073741824.0),
    ("TIB", 1099511627776.0),
];

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = text[digits.len()..].to_ascii_uppercase();
        let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("`{unit}` is not a unit: K, M, B and T count elements, KB to TB and KiB to TiB bytes"));
        };
        let value = number(digits)? * factor;
        if !(1.0..1e18).contains(&value) {
            return Err(format!("{text} is not a number of elements or bytes from 1 to 1e18"));
        }
        Ok(Count(value.round() as u64))
    }
}

/// A rule for the snapshots that are kept: `latest`, a range of lengths to serve, or a list of steps.
#[derive(Clone, Debug)]
pub struct RetentionArg(pub Retention);

impl FromStr for RetentionArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "latest" {
            return Ok(RetentionArg(Retention::Latest));
        }
        if let Some(steps) = steps(text) {
            return Ok(RetentionArg(Retention::Steps(steps)));
        }
        let how = "write it as FROM..TO, such as 0.05..0.28, as a list of steps, or as `latest`";
        let (from, to) = text.split_once("..").filter(|(_, to)| !to.starts_with('.')).ok_or(how)?;
        let retention = Retention::Range { from: number(from)?, to: number(to)? };
        retention.check().map_err(|error| error.to_string())?;
        Ok(RetentionArg(retention))
    }
}

/// Parses a list of whole numbers above 0.
fn steps(text: &str) -> Option<Vec<u64>> {
    let whole = |value: &f64| *value >= 1.0 && value.fract() == 0.0 && *value < 2f64.powi(53);
    let numbers = text.parse::<Numbers>().ok()?.0;
    numbers.iter().all(whole).then(|| numbers.iter().map(|&value| value as u64).collect())
}

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut values: Vec<f64> = Vec::new();
        let mut items = text.split(',').map(str::trim);
        while let Some(item) = items.next() {
            if item == "..." {
                let last = items.next().ok_or("`...` needs a last number after it")?;
                extend(&mut values, number(last)?)?;
            } else {
                values.push(number(item)?);
            }
        }
        Ok(Numbers(values))
    }
}

impl FromStr for Windows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(|item| window(item.trim())).collect::<Result<_, _>>().map(Windows)
    }
}

/// Parses a window: a number of steps, or a share of the time in percent.
pub fn window(text: &str) -> Result<Window, String> {
    match text.strip_suffix('%') {
        Some(percent) => Ok(Window::Fraction(number(percent)? / 100.0)),
        None => Ok(Window::Steps(number(text)?)),
    }
}

fn number(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) => Ok(value),
        Err(_) if text.is_empty() => Err("a number is missing".into()),
        Err(_) => Err(format!("`{text}` is not a number")),
    }
}

/// Continues a list to `last` by the difference of its last two values.
fn extend(values: &mut Vec<f64>, last: f64) -> Result<(), String> {
    let &[.., before, first] = values.as_slice() else {
        return Err("`...` needs two numbers before it, whose difference is the step".into());
    };
    let step = first - before;
    let count = (last - first) / step;
    let whole = count.round();
    if !(whole >= 1.0 && (count - whole).abs() < 1e-6 * whole) {
        return Err(format!("steps of {} from {first} do not reach {last}", round(step)));
    }
    if values.len() as f64 + whole > MAX_LENGTH as f64 {
        return Err(format!("more than {MAX_LENGTH} numbers"));
    }
    values.extend((1..whole as usize).map(|i| round(first + i as f64 * step)));
    values.push(last);
    Ok(())
}

/// Rounds to twelve significant digits, as a person would have written the number.
fn round(value: f64) -> f64 {
    format!("{value:.11e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<f64> {
        text.parse::<Numbers>().unwrap().0
    }

    #[test]
    fn dots_expand_to_an_evenly_spaced_rest() {
        assert_eq!(parse("0.1"), [0.1]);
        assert_eq!(parse("0.05, 0.06, ..., 0.1"), [0.05, 0.06, 0.07, 0.08, 0.09, 0.1]);
        assert_eq!(parse("0.01,0.05,0.06,...,0.08,0.2"), [0.01, 0.05, 0.06, 0.07, 0.08, 0.2]);
        assert_eq!(parse("3,2,...,0"), [3.0, 2.0, 1.0, 0.0]);
        assert_eq!(parse("0.05,0.06,...,0.28").len(), 24);
        // Each has the bits of the typed number.
        assert!(
            parse("0.01,0.02,...,0.28")
                .iter()
                .enumerate()
                .all(|(i, &v)| v == format!("0.{:02}", i + 1).parse::<f64>().unwrap())
        );
    }

    #[test]
    fn malformed_lists_report_their_reason() {
        for (text, part) in [
            ("", "missing"),
            ("0.1,", "missing"),
            ("a", "`a` is not a number"),
            ("0.1,...,0.2", "two numbers before"),
            ("0.1,0.2,...", "a last number"),
            ("0.1,0.2,...,0.25", "do not reach"),
            ("0.1,0.2,...,0.0", "do not reach"),
            ("1,1,...,2", "do not reach"),
            ("1,2,...,1e9", "more than 10000"),
            ("1,2,...,NaN", "do not reach"),
        ] {
            let error = text.parse::<Numbers>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn counts_parse_with_units() {
        for (text, value) in [
            ("7B", 7_000_000_000),
            ("1.3b", 1_300_000_000),
            ("500M", 500_000_000),
            ("40GB", 40_000_000_000),
            ("2GiB", 1 << 31),
            ("12", 12),
        ] {
            assert_eq!(text.parse(), Ok(Count(value)), "{text}");
        }
        for (text, part) in
            [("7G", "not a unit"), ("GB", "missing"), ("-3M", "from 1 to"), ("0", "from 1 to"), ("NaN", "not a unit")]
        {
            assert!(text.parse::<Count>().unwrap_err().contains(part), "{text}");
        }
    }

    #[test]
    fn retention_is_latest_a_range_or_steps() {
        assert_eq!("latest".parse::<RetentionArg>().unwrap().0, Retention::Latest);
        assert_eq!("0.05..0.2".parse::<RetentionArg>().unwrap().0, Retention::Range { from: 0.05, to: 0.2 });
        assert_eq!(
            "1000,2000,...,4000".parse::<RetentionArg>().unwrap().0,
            Retention::Steps(vec![1000, 2000, 3000, 4000])
        );
        for (text, part) in [
            ("newest", "FROM..TO"),
            ("0.1,0.2", "FROM..TO"),
            ("0.1..", "missing"),
            ("0.2..0.1", "the shorter sigma_rel first"),
        ] {
            assert!(text.parse::<RetentionArg>().unwrap_err().contains(part), "{text}");
        }
    }

    #[test]
    fn windows_parse_steps_and_percent() {
        let windows = "5000,20%".parse::<Windows>().unwrap().0;
        assert_eq!(windows, [Window::Steps(5000.0), Window::Fraction(0.2)]);
        assert!("x%".parse::<Windows>().is_err());
    }
}
