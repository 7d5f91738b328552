//! The option `--part`: the share of one process in a synthesis of several.

use clap::Args;
use indicatif::ProgressBar;
use posthoc_ema::{OutputPart, PartOutcome};
use serde_json::{Value, json};

use super::output::byte_bar;

/// Share of one process.
#[derive(Args)]
pub struct PartArgs {
    /// Write only part K of N, counted from 1: N processes, on any machines that share the file system, write the
    /// averages together. Each takes its share of the bytes; they need not run at the same time, and one that failed is
    /// run again. The averages appear when the last part is written
    #[arg(long, value_name = "K/N")]
    pub part: Option<OutputPart>,
}

/// Returns a bar of the bytes that a process reads, of all bytes or of those of its part.
pub fn part_bar(bytes: u64, message: &'static str, part: Option<OutputPart>) -> ProgressBar {
    match part {
        Some(part) => byte_bar(part.bytes_to_read(bytes), format!("{message} part {part}")),
        None => byte_bar(bytes, message),
    }
}

/// Says how far the averages are after a part.
pub fn describe(part: OutputPart, outcome: &PartOutcome) -> String {
    let own = match outcome.device {
        None if outcome.missing.is_empty() => {
            return format!(
                "an average with this profile and step, newer than its sources, is there already, so part {part} wrote \
                 nothing: remove the average to write it again"
            );
        }
        Some(_) => format!("part {part} is written"),
        None => format!("part {part} was written before, so nothing was written now"),
    };
    match outcome.missing.as_slice() {
        [] => format!("{own}; all {} parts are written: complete", part.count()),
        [_] => format!("{own}; part {} is missing, with which the averages appear", ranges(&outcome.missing)),
        missing => format!(
            "{own}; {} parts are missing, with the last of which the averages appear: {}",
            missing.len(),
            ranges(missing)
        ),
    }
}

/// Returns the document's entry about a part.
pub fn part_json(part: OutputPart, outcome: &PartOutcome) -> Value {
    json!({
        "number": part.number(),
        "count": part.count(),
        "written_before": outcome.device.is_none(),
        "missing": outcome.missing,
        "complete": outcome.missing.is_empty(),
    })
}

/// Formats increasing numbers as `1, 3-16`.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        run => run.iter().map(usize::to_string).collect(),
    });
    runs.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_parts_are_listed_in_ranges() {
        for (numbers, expected) in [(&[1usize][..], "1"), (&[1, 3, 4, 5, 9, 10], "1, 3-5, 9-10"), (&[], "")] {
            assert_eq!(ranges(numbers), expected);
        }
    }
}
