//! Averages in the entries of training checkpoints, or in files of their own.

use std::path::{Path, PathBuf};

use super::clock::UpdateClock;
use super::found::{FoundSeries, FoundSet, check_replaced};
use super::recorded_decay::RecordedDecay;
use super::{AverageDecay, ImportAverages, lightning, steps};
use crate::checkpoint::{CheckpointSeries, file_name, is_pytorch_file, list_checkpoints};
use crate::error::{Error, Result, listed};
use crate::pytorch::{Checkpoint, is_average};

/// Layout of a training checkpoint that holds an average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TrainerLayout {
    /// timm's `CheckpointSaver`.
    Timm,
    /// torchvision's reference trainings: `model_ema` counts its updates.
    Torchvision,
    /// Lightning's `WeightAveraging`: `state_dict` is the average.
    Lightning,
    /// ultralytics' trainer: `ema` is a pickled module, and `updates` its count.
    Ultralytics,
}

impl TrainerLayout {
    /// Returns the layout of a checkpoint, by the keys of its entries.
    fn detect(values: &Checkpoint) -> Option<TrainerLayout> {
        let models = values.models();
        let has = |keys: &[&str]| keys.iter().all(|key| models.contains(key));
        if has(&["state_dict", "current_model_state"]) {
            Some(TrainerLayout::Lightning)
        } else if has(&["state_dict_ema"]) {
            Some(TrainerLayout::Timm)
        } else if has(&["model_ema"]) && values.int(&COUNT_OF_TORCHVISION).is_some() {
            Some(TrainerLayout::Torchvision)
        } else if has(&["ema"]) && values.int(&["updates"]).is_some() {
            Some(TrainerLayout::Ultralytics)
        } else {
            None
        }
    }

    fn name(self) -> &'static str {
        match self {
            TrainerLayout::Timm => "timm",
            TrainerLayout::Torchvision => "torchvision",
            TrainerLayout::Lightning => "Lightning",
            TrainerLayout::Ultralytics => "ultralytics",
        }
    }

    fn average(self) -> &'static str {
        match self {
            TrainerLayout::Timm => "state_dict_ema",
            TrainerLayout::Torchvision => "model_ema",
            TrainerLayout::Lightning => "state_dict",
            TrainerLayout::Ultralytics => "ema",
        }
    }

    fn raw(self) -> &'static str {
        match self {
            TrainerLayout::Timm => "state_dict",
            TrainerLayout::Lightning => "current_model_state",
            TrainerLayout::Torchvision | TrainerLayout::Ultralytics => "model",
        }
    }

    /// Returns the step of the copy of the weights.
    fn start(self, after: Option<u64>, every: u64) -> u64 {
        match (self, after) {
            // The initial weights, which the first updates forget.
            (TrainerLayout::Ultralytics, None) => 0,
            // The index of a step counts from 0, and updates are at its multiples.
            (TrainerLayout::Lightning, Some(after)) => after.div_ceil(every).saturating_mul(every).saturating_add(1),
            (_, after) => after.unwrap_or(0).saturating_add(1),
        }
    }

    /// Returns the options of a training with the defaults of the tool.
    fn example(layout: Option<TrainerLayout>) -> &'static str {
        match layout {
            Some(TrainerLayout::Timm) => {
                "--beta 0.9998 for --model-ema-decay 0.9998, with --ramp for --model-ema-warmup"
            }
            Some(TrainerLayout::Torchvision) => "--beta 0.9998 for its `model_ema.decay`",
            Some(TrainerLayout::Lightning) => "--beta 0.999, the default of EMAWeightAveraging",
            Some(TrainerLayout::Ultralytics) => "--beta 0.9999 --ramp exponential:2000, the constants of its ModelEMA",
            None => "--beta 0.9999",
        }
    }
}

/// Keys of the count of updates in torchvision's checkpoints.
const COUNT_OF_TORCHVISION: [&str; 2] = ["model_ema", "n_averaged"];

/// AverageEntries of the checkpoints that are averages, and that of raw weights.
struct AverageEntries {
    averages: Vec<Option<String>>,
    raw: Option<String>,
    layout: Option<TrainerLayout>,
}

/// Finds the averages in the files of a folder.
///
/// # Errors
/// As [`ImportAverages::open`].
pub(super) fn find(import: &ImportAverages, dir: &Path) -> Result<FoundSet> {
    let (mut paths, mut warnings) = list_checkpoints(dir)?;
    let first = paths.first().filter(|path| is_pytorch_file(path));
    let first = first.map(|path| Checkpoint::open_values(path)).transpose()?;
    let entries = entries(import, first.as_ref())?;
    let mut counts = Vec::new();
    if entries.layout == Some(TrainerLayout::Torchvision) {
        check_counted(import)?;
        warnings.extend(leave_out_copies(&mut paths)?);
        counts.push(COUNT_OF_TORCHVISION[1].to_owned());
    }
    let every = match (import.update_every, entries.layout) {
        (Some(every), _) => every,
        (None, Some(_)) => 1,
        (None, None) => {
            let mut reason =
                "the files do not record it: give the steps between the updates of the average, such as 1".to_owned();
            if import.decays.is_empty() {
                reason +=
                    ", and the decay of an update, such as --beta 0.9999 (`beta`), if they do not record that either";
            }
            return Err(Error::Setting { option: "update_every", reason });
        }
    };
    let mut notes = entries.notes();
    let decays = decays(import, &entries, &paths, &mut notes)?;
    let after = import.update_after_step;
    let start = match entries.layout {
        Some(layout) => layout.start(after, every),
        None => after.map_or(0, |after| after.saturating_add(1)),
    };
    let clock = UpdateClock { start, every };
    if entries.layout == Some(TrainerLayout::Lightning) {
        lightning::check_counts(&paths, clock)?;
    }
    let steps = match (&import.steps, entries.layout) {
        (Some(steps), _) => Some(steps.clone()),
        (None, Some(TrainerLayout::Ultralytics)) => steps::numbers(&paths, &["updates"])?,
        (None, Some(TrainerLayout::Torchvision)) => steps::numbers(&paths, &COUNT_OF_TORCHVISION)?,
        (None, _) => None,
    };
    let series = entries.series(&decays, &paths, steps.as_deref());
    Ok(FoundSet { series, clock: Some(clock), notes, warnings, counts })
}

/// Checks that no option is given that torchvision's counts of updates replace.
///
/// # Errors
/// [`Error::Setting`].
fn check_counted(import: &ImportAverages) -> Result<()> {
    let of_time = ImportAverages {
        update_every: import.update_every,
        update_after_step: import.update_after_step,
        steps: import.steps.clone(),
        ..Default::default()
    };
    check_replaced(&of_time, "torchvision's files count the updates of the average, which are the steps: leave it out")
}

/// Leaves out checkpoints of torchvision's warm-up, in which the average is a copy. Returns a note on them.
///
/// # Errors
/// [`Error::Unexpected`] if no other is left.
fn leave_out_copies(paths: &mut Vec<PathBuf>) -> Result<Option<String>> {
    let Some(counted) = steps::numbers(paths, &COUNT_OF_TORCHVISION)? else { return Ok(None) };
    let mut counted = counted.into_iter();
    let (copies, others) = paths.drain(..).partition(|_| counted.next() == Some(0));
    *paths = others;
    let copies: Vec<PathBuf> = copies;
    let saved = "saved in the warm-up, in which the average is a copy";
    match (paths.is_empty(), copies.as_slice()) {
        (true, [first, ..]) => {
            Err(Error::unexpected(first, format!("{saved}, as all others here: name a folder with later checkpoints")))
        }
        (_, []) => Ok(None),
        _ => {
            let names: Vec<String> = copies.iter().map(|path| file_name(path)).collect();
            Ok(Some(format!("left out, {saved}: {}", listed(&names))))
        }
    }
}

/// Chooses the entries, by the options or by what tools write.
///
/// # Errors
/// [`Error::Setting`] if the average is not the only choice.
fn entries(import: &ImportAverages, first: Option<&Checkpoint>) -> Result<AverageEntries> {
    let layout = first.and_then(TrainerLayout::detect);
    if !import.keys.is_empty() {
        // The layout's rules hold for its own average only.
        let layout = layout.filter(|layout| import.keys == [layout.average()]);
        let averages = import.keys.iter().cloned().map(Some).collect();
        return Ok(AverageEntries { averages, raw: import.raw.clone(), layout });
    }
    if let (Some(layout), Some(values)) = (layout, first) {
        let raw = values.models().contains(&layout.raw()).then(|| layout.raw().to_owned());
        let raw = import.raw.clone().or(raw);
        return Ok(AverageEntries { averages: vec![Some(layout.average().to_owned())], raw, layout: Some(layout) });
    }
    let models = first.map(Checkpoint::models).unwrap_or_default();
    let averages: Vec<&str> = models.iter().copied().filter(|key| is_average(key)).collect();
    let key = match (models.as_slice(), averages.as_slice()) {
        (_, [average]) => Some((*average).to_owned()),
        ([] | [_], _) => None,
        _ => {
            let reason = format!("{} hold weights: name those that are averages", listed(&models));
            return Err(Error::Setting { option: "key", reason });
        }
    };
    Ok(AverageEntries { averages: vec![key], raw: import.raw.clone(), layout: None })
}

/// Returns the decay of each average: those of the options, or the one that the files record.
///
/// # Errors
/// [`Error::Setting`] if there is not one for each.
fn decays(
    import: &ImportAverages,
    entries: &AverageEntries,
    paths: &[PathBuf],
    notes: &mut Vec<String>,
) -> Result<Vec<AverageDecay>> {
    let averages = entries.averages.len();
    let given = import.decays.len();
    if averages == given {
        return Ok(import.decays.clone());
    }
    let mut why_none = "the files do not record the decay of the average".to_owned();
    if given == 0 && averages == 1 && entries.layout != Some(TrainerLayout::Ultralytics) {
        let recorded = match RecordedDecay::read(paths)? {
            RecordedDecay::Missing => RecordedDecay::of_names(paths),
            recorded => recorded,
        };
        match recorded {
            RecordedDecay::Known(decay, note) => {
                notes.push(note);
                return Ok(vec![AverageDecay::Ema(decay)]);
            }
            RecordedDecay::Unclear(why) => why_none = why,
            RecordedDecay::Missing => {}
        }
    }
    let reason = match given {
        0 => format!("{why_none}: give that of the training, such as {}", TrainerLayout::example(entries.layout)),
        _ => {
            format!("{given} decays are given for {averages} averages: name the averages with --key, in the same order")
        }
    };
    Err(Error::Setting { option: "beta", reason })
}

impl AverageEntries {
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(layout) = self.layout {
            notes.push(format!("checkpoints of {}: `{}` is the average", layout.name(), layout.average()));
            if layout == TrainerLayout::Torchvision {
                notes.push("steps are the updates of the average since the warm-up of the learning rate".to_owned());
            }
        } else if let [Some(key)] = self.averages.as_slice() {
            notes.push(format!("`{key}` is the average"));
        }
        notes
            .extend(self.raw.iter().map(|raw| format!("`{raw}` are the raw weights, each an average of its own step")));
        notes
    }

    fn series(self, decays: &[AverageDecay], paths: &[PathBuf], steps: Option<&[u64]>) -> Vec<FoundSeries> {
        let source = |key| CheckpointSeries { paths: paths.to_vec(), key, steps: steps.map(<[u64]>::to_vec) };
        let averages = self.averages.into_iter().zip(decays);
        let averages = averages.map(|(key, decay)| FoundSeries { source: source(key), decay: Some(decay.clone()) });
        let raw = self.raw.map(|key| FoundSeries { source: source(Some(key)), decay: None });
        averages.chain(raw).collect()
    }
}
