//! Part of a synthesis that several processes share without communication.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Most parts of a synthesis.
const MAX_PARTS: usize = 100_000;

/// Alignment of the cuts between parts in a data section: no two processes write to one page of a file.
pub(super) const PAGE: usize = 4096;

/// Part `number` of `count`, counted from 1: the share of one process in a synthesis of several.
///
/// ```
/// use posthoc_ema::OutputPart;
///
/// let part: OutputPart = "2/4".parse()?;
/// assert_eq!((part.number(), part.count()), (2, 4));
/// assert!("0/4".parse::<OutputPart>().is_err());
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OutputPart {
    number: usize,
    count: usize,
}

impl OutputPart {
    /// Returns part `number` of `count`.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `1 <= number <= count <= 100,000`.
    pub fn new(number: usize, count: usize) -> Result<OutputPart> {
        let refuse = |why: &str| {
            let reason = format!("{number}/{count}: {why}");
            Err(Error::Setting { option: "part", reason })
        };
        match (number, count) {
            (_, 0) => refuse("0 parts write nothing: write K/N with N the number of processes"),
            (0, _) => refuse("parts are counted from 1: add 1 to a rank that is counted from 0"),
            _ if number > count => refuse("this part is beyond the last one: K is at most N"),
            _ if count > MAX_PARTS => refuse("there are at most 100000 parts"),
            _ => Ok(OutputPart { number, count }),
        }
    }

    /// Number of this part, counted from 1.
    pub fn number(self) -> usize {
        self.number
    }

    /// Number of all parts.
    pub fn count(self) -> usize {
        self.count
    }

    /// Returns this part's share of some bytes. The shares of all parts cover them without overlap.
    pub(crate) fn share(self, bytes: usize) -> Range<usize> {
        let cut = |parts: usize| {
            if parts == self.count {
                return bytes;
            }
            let cut = bytes as u128 * parts as u128 / self.count as u128;
            cut as usize / PAGE * PAGE
        };
        cut(self.number - 1)..cut(self.number)
    }

    /// Returns about this part's share of a number of bytes to read.
    pub fn bytes_to_read(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.count as u64)
    }
}

impl fmt::Display for OutputPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.count)
    }
}

impl FromStr for OutputPart {
    type Err = Error;

    /// Parses `K/N`.
    ///
    /// # Errors
    /// As [`OutputPart::new`].
    fn from_str(text: &str) -> Result<OutputPart> {
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        let numbers = text.split_once('/').and_then(|(number, count)| Some((digits(number)?, digits(count)?)));
        let Some((number, count)) = numbers else {
            let reason = format!("`{text}` is not a part: write K/N, such as 1/4 for the first of four");
            return Err(Error::Setting { option: "part", reason });
        };
        OutputPart::new(number, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_all_bytes_once() {
        for bytes in [0, 1, 4095, 4096, 4097, 12_288, 1_000_000, usize::MAX / 2] {
            for count in [1, 2, 3, 7, 100] {
                let mut end = 0;
                for number in 1..=count {
                    let share = OutputPart::new(number, count).unwrap().share(bytes);
                    assert!(share.start == end && share.end >= end, "{number}/{count} of {bytes}: {share:?}");
                    assert!(share.end == bytes || share.end.is_multiple_of(PAGE));
                    assert!(share.len() <= bytes / count + PAGE + 1, "{number}/{count} of {bytes}: {share:?}");
                    end = share.end;
                }
                assert_eq!(end, bytes);
            }
        }
    }

    #[test]
    fn parts_that_do_not_exist_are_refused() {
        for (text, expected) in [
            ("0/4", "counted from 1: add 1"),
            ("5/4", "beyond the last one: K is at most N"),
            ("1/0", "0 parts write nothing"),
            ("1/100001", "at most 100000"),
            ("x", "write K/N, such as 1/4"),
            ("", "write K/N"),
            ("1", "write K/N"),
            ("+1/4", "write K/N"),
            ("1/4/2", "write K/N"),
            ("-1/4", "write K/N"),
            ("1/99999999999999999999999", "write K/N"),
        ] {
            let error = text.parse::<OutputPart>().unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("part"), "{text}: {error}");
        }
    }
}
