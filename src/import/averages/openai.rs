//! Averages of OpenAI's diffusion trainings: `ema_0.9999_010000.pt`, whose name has decay and step, and the raw weights
//! `model010000.pt` beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::clock::UpdateClock;
use super::found::{FoundSeries, FoundSet, check_replaced};
use super::{AverageDecay, ImportAverages};
use crate::checkpoint::CheckpointSeries;
use crate::error::{Error, Result, listed};
use crate::math::EmaDecay;

/// Files with their steps.
type SteppedFiles = Vec<(u64, PathBuf)>;

/// Finds the averages in a folder; `None` without any.
///
/// Their updates follow each step of the optimizer, and begin with the initial weights (`improved-diffusion`,
/// `guided-diffusion` and `consistency_models`, `train_util.py`).
///
/// # Errors
/// [`Error::Io`]; [`Error::Setting`] for options that the names replace; [`Error::Unexpected`] for decays out of range.
pub(super) fn find(import: &ImportAverages, dir: &Path) -> Result<Option<FoundSet>> {
    let mut averages: BTreeMap<String, SteppedFiles> = BTreeMap::new();
    let mut raw: SteppedFiles = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some((decay, step)) = parse_average(name) {
            averages.entry(decay.to_owned()).or_default().push((step, dir.join(name)));
        }
        raw.extend(parse_raw(name).map(|step| (step, dir.join(name))));
    }
    if averages.is_empty() {
        return Ok(None);
    }
    check_replaced(import, "the names of these averages have their steps and decays: leave it out")?;
    let mut notes = Vec::new();
    let mut series = Vec::new();
    for (text, files) in averages {
        let decay = EmaDecay::constant(text.parse().unwrap_or(f64::NAN));
        decay.check().map_err(|why| Error::unexpected(&files[0].1, format!("the decay in its name: {why}")))?;
        notes.push(format!("the decay {text} is that in the names of {}", listed(&[format!("ema_{text}_*.pt")])));
        series.push(FoundSeries { source: source(files), decay: Some(AverageDecay::Ema(decay)) });
    }
    if !raw.is_empty() {
        notes.push("`model*.pt` are the raw weights, each an average of its own step".to_owned());
        series.push(FoundSeries { source: source(raw), decay: None });
    }
    notes.push("steps in the names count from 0, so the first is step 1".to_owned());
    let clock = Some(UpdateClock { start: 0, every: 1 });
    Ok(Some(FoundSet { series, clock, notes, ..Default::default() }))
}

fn source(mut files: SteppedFiles) -> CheckpointSeries {
    files.sort();
    let (steps, paths) = files.into_iter().unzip();
    CheckpointSeries { paths, key: None, steps: Some(steps) }
}

/// Returns the text of the decay, and the step, in the name of an average.
fn parse_average(name: &str) -> Option<(&str, u64)> {
    let (decay, step) = name.strip_prefix("ema_")?.strip_suffix(".pt")?.split_once('_')?;
    let (whole, rest) = decay.split_once('.')?;
    (is_number(whole) && is_number(rest)).then_some(())?;
    Some((decay, parse_step(step)?))
}

/// Returns the step in the name of raw weights.
fn parse_raw(name: &str) -> Option<u64> {
    parse_step(name.strip_prefix("model")?.strip_suffix(".pt")?)
}

/// Returns the number of steps of the optimizer before a file with this number was saved. The loop saves before it
/// counts.
fn parse_step(text: &str) -> Option<u64> {
    is_number(text).then(|| text.parse::<u64>().ok()?.checked_add(1)).flatten()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_decay_and_step() {
        for (name, expected) in [
            ("ema_0.9999_010000.pt", Some(("0.9999", 10_001))),
            ("ema_0.99_000000.pt", Some(("0.99", 1))),
            ("ema_0.9999_2000000.pt", Some(("0.9999", 2_000_001))),
            ("ema_0.9999.pt", None),
            ("ema_1_010000.pt", None),
            ("ema_0.9999_best.pt", None),
            ("model010000.pt", None),
        ] {
            assert_eq!(parse_average(name), expected, "{name}");
        }
        assert_eq!(
            (parse_raw("model010000.pt"), parse_raw("model_ema.pt"), parse_raw("model.pt")),
            (Some(10_001), None, None)
        );
    }
}
