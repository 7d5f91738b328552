//! Everything that an import of averages will write.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::clock::UpdateClock;
use super::found::{FoundSeries, FoundSet};
use super::{AverageDecay, ImportAverages, copied, steps};
use crate::checkpoint::{CheckpointOptions, CheckpointSeries, OpenedCheckpoints, open_series};
use crate::error::{Error, Result, escape_controls, shown};
use crate::math::{Chain, History, Profile};
use crate::snapshot::SnapshotId;

/// Run that an import of averages writes.
#[derive(Debug)]
pub(super) struct AveragesPlan {
    pub source: PathBuf,
    /// Checkpoints of each average, by its index in the run.
    pub opened: Vec<OpenedCheckpoints>,
    pub profiles: Vec<Profile>,
    pub chains: Vec<Chain>,
    /// In order of their steps.
    pub snapshots: Vec<PlannedAverage>,
    /// Updates of the run; `None` if only profiles are known.
    pub history: Option<History>,
    /// Floating-point tensors that are not averages.
    pub copied: BTreeSet<String>,
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
}

/// Checkpoint that becomes a snapshot.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlannedAverage {
    pub id: SnapshotId,
    /// Index among the checkpoints of its series.
    pub checkpoint: usize,
}

impl AveragesPlan {
    /// Opens all checkpoints and checks them against each other and the options.
    ///
    /// # Errors
    /// As [`ImportAverages::open`].
    pub(super) fn new(import: &ImportAverages, source: &Path, found: FoundSet) -> Result<AveragesPlan> {
        let FoundSet { series, clock, mut notes, mut warnings, counts } = found;
        let options = CheckpointOptions {
            copy: import.copy.clone(),
            leave_out: [&import.leave_out[..], &counts].concat(),
            other_names: counts,
            ignore_config: import.ignore_config.clone(),
            ..Default::default()
        };
        let sources: Vec<CheckpointSeries> = series.iter().map(|one| one.source.clone()).collect();
        let opened = open_series(&sources, &options)?;
        if let (Some(first), Some(None)) = (opened.first(), sources.first().map(|source| source.steps.as_ref())) {
            steps::check_no_epochs(first.paths().zip(first.steps.iter().copied()))?;
        }
        notes.extend(opened.iter().flat_map(|checkpoints| checkpoints.notes.iter().cloned()));
        let (profiles, chains) = chains(&series, clock)?;
        let snapshots = snapshots(&series, &opened, clock)?;
        let history = clock.map(|clock| history(&series, &opened, clock)).transpose()?;
        let copied = copied::find(&opened)?;
        warnings.extend(copied.warning());
        let escape = |texts: Vec<String>| texts.iter().map(|text| escape_controls(text, &[])).collect();
        Ok(AveragesPlan {
            source: source.to_owned(),
            profiles,
            chains,
            snapshots,
            history,
            copied: copied.names,
            notes: escape(notes),
            warnings: escape(warnings),
            opened,
        })
    }

    /// Returns the bytes of all tensors of all snapshots.
    pub(super) fn bytes(&self) -> u64 {
        let of_one = |opened: &OpenedCheckpoints| {
            let tensors = opened.series_tensors();
            let bits = tensors.iter().map(|tensor| tensor.dtype.bitsize() * tensor.shape.iter().product::<usize>());
            bits.map(|bits| bits as u64 / 8).sum::<u64>() * opened.steps.len() as u64
        };
        self.opened.iter().map(of_one).sum()
    }
}

/// Returns the profile and the chain of each series.
///
/// # Errors
/// [`Error::Setting`] for two averages of one decay, and for decays whose first updates differ.
fn chains(series: &[FoundSeries], clock: Option<UpdateClock>) -> Result<(Vec<Profile>, Vec<Chain>)> {
    let mut profiles = Vec::with_capacity(series.len());
    let mut chains: Vec<Chain> = Vec::with_capacity(series.len());
    for one in series {
        let (profile, chain) = match (&one.decay, clock) {
            (Some(AverageDecay::Ema(decay)), Some(clock)) => {
                let chain = clock.chain(*decay);
                (chain.profile()?, Chain::Ema(chain))
            }
            (Some(AverageDecay::Power(profile)), _) => (profile.clone(), Chain::Tracked(profile.clone())),
            (Some(AverageDecay::Ema(_)) | None, _) => (Profile::raw(), Chain::Tracked(Profile::raw())),
        };
        if chains.contains(&chain) {
            let reason = format!("{profile} is given for two averages: they would be the same");
            return Err(Error::Setting { option: "beta", reason });
        }
        profiles.push(profile);
        chains.push(chain);
    }
    let has = |is: fn(&FoundSeries) -> bool| series.iter().any(is);
    let both = has(is_ema) && has(is_power);
    if both && clock.is_some_and(|clock| clock.start == 0 && clock.every > 1) {
        let reason = "an EMA began with the initial weights and a power function with the first update: give the step \
                      before the one whose weights both copied";
        return Err(Error::Setting { option: "update_after_step", reason: reason.into() });
    }
    Ok((profiles, chains))
}

fn is_ema(series: &FoundSeries) -> bool {
    matches!(series.decay, Some(AverageDecay::Ema(_)))
}

fn is_power(series: &FoundSeries) -> bool {
    matches!(series.decay, Some(AverageDecay::Power(_)))
}

fn is_raw(series: &FoundSeries) -> bool {
    series.decay.is_none()
}

/// Returns the snapshots in order of their steps.
///
/// An average is stored at its last update. With raw weights beside it, it is stored at their step.
///
/// # Errors
/// [`Error::Unexpected`] for a checkpoint before the first update, and for two with the same last update.
fn snapshots(
    series: &[FoundSeries],
    opened: &[OpenedCheckpoints],
    clock: Option<UpdateClock>,
) -> Result<Vec<PlannedAverage>> {
    let with_raw = series.iter().any(is_raw);
    let mut snapshots: BTreeMap<(u64, usize), PlannedAverage> = BTreeMap::new();
    for (index, checkpoints) in opened.iter().enumerate() {
        for (i, &step) in checkpoints.steps.iter().enumerate() {
            let path = checkpoints.path(i);
            let last = match clock {
                Some(clock) => clock.last_update(step).ok_or_else(|| clock.too_early(path, step))?,
                None => step,
            };
            if with_raw && last != step && is_power(&series[index]) {
                let why = format!(
                    "its last update is at {last}, and raw weights of step {step} cannot join a power function between \
                     its updates: leave --raw (`raw`) out"
                );
                return Err(Error::unexpected(path, why));
            }
            let step = if with_raw { step } else { last };
            let planned = PlannedAverage { id: SnapshotId { index, step }, checkpoint: i };
            if let Some(other) = snapshots.insert((step, index), planned) {
                let other = shown(checkpoints.path(other.checkpoint));
                let why =
                    format!("its last update is at {last}, as that of {other}: move one of them out of the folder");
                return Err(Error::unexpected(path, why));
            }
        }
    }
    Ok(snapshots.into_values().collect())
}

/// Returns the updates of the run: those of the averages, and the steps of raw weights.
fn history(series: &[FoundSeries], opened: &[OpenedCheckpoints], clock: UpdateClock) -> Result<History> {
    let last_step = opened.iter().flat_map(|checkpoints| checkpoints.steps.last()).max().copied().unwrap_or(0);
    let last = clock.last_update(last_step).unwrap_or(last_step);
    let raw = series.iter().zip(opened).find(|(one, _)| is_raw(one));
    let steps = raw.map(|(_, checkpoints)| checkpoints.steps.as_slice()).unwrap_or_default();
    clock.history(last, series.iter().any(is_ema), steps)
}
