//! Snapshots of EDM2: `network-snapshot-0001000-0.050.pkl`, whose name has thousands of images and `sigma_rel`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::found::{FoundSeries, FoundSet, check_replaced};
use super::{AverageDecay, ImportAverages};
use crate::checkpoint::CheckpointSeries;
use crate::error::{Error, Result};
use crate::math::Profile;

/// Entry of the pickle that holds the average.
const KEY: &str = "ema";

/// Finds the snapshots in a folder; `None` without any.
///
/// Their updates are as dense as batches, so they have no history, and time is in thousands of images.
///
/// # Errors
/// [`Error::Io`]; [`Error::Setting`] for options that the names replace; [`Error::Parameter`] for a `sigma_rel` out of
/// range.
pub(super) fn find(import: &ImportAverages, dir: &Path) -> Result<Option<FoundSet>> {
    let mut groups: BTreeMap<String, Vec<(u64, PathBuf)>> = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        if let Some((time, length)) = name.to_str().and_then(parse) {
            groups.entry(length.to_owned()).or_default().push((time, dir.join(&name)));
        }
    }
    if groups.is_empty() {
        return Ok(None);
    }
    check_replaced(import, "the names of EDM2's snapshots have their times and lengths: leave it out")?;
    let mut series = Vec::with_capacity(groups.len());
    for (length, mut files) in groups {
        files.sort();
        let profile = Profile::sigma_rel(length.parse().unwrap_or(f64::NAN))?;
        let (steps, paths) = files.into_iter().unzip();
        let source = CheckpointSeries { paths, key: Some(KEY.to_owned()), steps: Some(steps) };
        series.push(FoundSeries { source, decay: Some(AverageDecay::Power(profile)) });
    }
    let notes = vec!["EDM2's snapshots: steps are thousands of images, and lengths those of the names".to_owned()];
    Ok(Some(FoundSet { series, notes, ..Default::default() }))
}

/// Returns the time and the text of `sigma_rel` in a name.
fn parse(name: &str) -> Option<(u64, &str)> {
    let (time, length) = name.strip_prefix("network-snapshot-")?.strip_suffix(".pkl")?.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_length = length.split_once('.').is_some_and(|(whole, rest)| is_number(whole) && is_number(rest));
    (is_number(time) && is_length).then_some(())?;
    Some((time.parse().ok()?, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_time_and_length() {
        for (name, expected) in [
            ("network-snapshot-0001000-0.050.pkl", Some((1000, "0.050"))),
            ("network-snapshot-2147483-0.100.pkl", Some((2_147_483, "0.100"))),
            ("network-snapshot-0001000.pkl", None),
            ("network-snapshot--0.050.pkl", None),
            ("network-snapshot-0001000-0.050-1.pkl", None),
            ("training-state-0001000.pt", None),
        ] {
            assert_eq!(parse(name), expected, "{name}");
        }
    }
}
