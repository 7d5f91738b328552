//! Advice before training: the profiles to track, the spacing and the number of snapshots for a given disk.

mod search;

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::forecast::Forecast;
use crate::error::{Error, Result};
use crate::fs::start_threads;
use crate::math::{Profile, Retention, Schedule, relative_rounding};
use search::Search;

/// Bytes of an element and profile in the live state: f32 and a low-order term of 16 bits.
const LIVE_BYTES: u64 = 6;

/// Shares of the disk that advice is given for, as fractions.
const DISK_SHARES: [(u64, u64); 3] = [(1, 2), (1, 1), (2, 1)];

/// Numbers of profiles that advice is given for.
const PROFILES: [usize; 3] = [2, 3, 4];

/// Number of lengths of a range at which errors are predicted, apart from that of the largest error.
const LENGTHS: usize = 12;

/// Number of parts of the search, for its progress.
#[doc(hidden)]
pub const ADVICE_PARTS: usize = PROFILES.len() * DISK_SHARES.len() * search::PARTS;

/// Facts about a training before it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct AdviceRequest {
    /// The length of the training in steps.
    pub steps: u64,
    /// Steps between updates.
    pub update_every: u64,
    /// First step at which an update may happen.
    pub update_after_step: u64,
    /// Factor between the times of early snapshots, as in [`Schedule`]; `None` for none.
    pub snapshot_growth: Option<f64>,
    /// Averaged elements of the model.
    pub parameters: u64,
    /// The dtype of averages in snapshots.
    pub dtype: Dtype,
    /// Bytes that the run may take on disk.
    pub disk: u64,
    /// The shortest and the longest length of targets, as `sigma_rel`.
    pub range: (f64, f64),
}

/// A choice of profiles, spacing and number of snapshots.
#[derive(Clone, Debug)]
pub struct Advice {
    /// The settings for a tracker.
    pub forecast: Forecast,
    /// The errors over the last tenth of the training: the largest after any of its snapshots.
    pub worst: WorstCase,
    /// Most bytes that the run takes on disk.
    pub disk: u64,
}

/// The largest errors over a range of lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WorstCase {
    /// The largest relative error of the profile.
    pub relative_error: f64,
    /// The largest noise gain.
    pub noise_gain: f64,
    /// The largest error of profile and rounding together, which advice minimises.
    ///
    /// It is `sqrt(relative_error^2 + (noise_gain u)^2)` for snapshots of the relative rounding error `u`. This weighs
    /// the parts equally if the model's weights move by about their own size over an average. If they move less, as
    /// they do late in training, the part of rounding is larger.
    pub error: f64,
    /// The length, as `sigma_rel`, at which `error` is largest.
    pub sigma_rel: f64,
}

impl WorstCase {
    /// Raises the errors to those of a target of length `sigma_rel`, at the relative rounding error `rounding`.
    fn include(&mut self, sigma_rel: f64, relative_error: f64, noise_gain: f64, rounding: f64) {
        self.relative_error = self.relative_error.max(relative_error);
        self.noise_gain = self.noise_gain.max(noise_gain);
        let error = relative_error.hypot(noise_gain * rounding);
        if error > self.error {
            self.error = error;
            self.sigma_rel = sigma_rel;
        }
    }
}

/// Returns the relative rounding error of a snapshot's elements, as a root mean square.
#[doc(hidden)]
pub fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => relative_rounding(11),
        Dtype::BF16 => relative_rounding(8),
        Dtype::F32 => relative_rounding(24),
        _ => relative_rounding(53),
    }
}

/// An [`Advice`] as it is serialized.
#[derive(Serialize)]
struct AdviceDocument<'a> {
    tracked: &'a [Profile],
    sigma_rels: Vec<Option<f64>>,
    checkpoint_every: u64,
    max_checkpoints: usize,
    #[serde(flatten)]
    worst: WorstCase,
    disk: u64,
}

impl Advice {
    /// Returns the lengths at which its predicted errors are compared: evenly spaced in their logarithms over the range
    /// of `request`, and that of the largest error.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a range that has no such lengths.
    pub fn lengths(&self, request: &AdviceRequest) -> Result<Vec<Profile>> {
        let (from, to) = request.range;
        let at = |i: usize| from * (to / from).powf(i as f64 / (LENGTHS - 1) as f64);
        (0..LENGTHS).map(at).chain([self.worst.sigma_rel]).map(Profile::sigma_rel).collect()
    }
}

impl Serialize for Advice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Forecast { schedule, keep, tracked, .. } = &self.forecast;
        AdviceDocument {
            tracked,
            sigma_rels: tracked.iter().map(Profile::as_sigma_rel).collect(),
            checkpoint_every: schedule.checkpoint_every,
            max_checkpoints: *keep,
            worst: self.worst,
            disk: self.disk,
        }
        .serialize(serializer)
    }
}

impl Forecast {
    /// Returns the most bytes that the run takes on disk.
    ///
    /// It assumes a model of `parameters` averaged elements, compensated averages, and snapshots in `dtype`. Old files
    /// are removed only after the new ones are written. The sum therefore has the snapshots of one step more than are
    /// kept, and the live state twice.
    pub fn disk(&self, parameters: u64, dtype: Dtype) -> u64 {
        let most = match &self.retention {
            // One for each step of the list, the newest, and the one that replaces it.
            Retention::Steps(steps) => steps.len().saturating_add(2),
            _ => self.keep.saturating_add(1),
        };
        let steps = self.schedule.snapshots(self.steps).len().min(most) as u64;
        let profiles = self.tracked.len() as u64;
        let state = 2 * LIVE_BYTES;
        let stored = dtype.bitsize() as u64 / 8;
        parameters.saturating_mul(profiles).saturating_mul(steps.saturating_mul(stored).saturating_add(state))
    }
}

/// Finds the profiles, spacing and number of snapshots of the smallest worst error over the range.
///
/// Returns the best choice of two profiles for half, all and twice the disk, then of three and of four profiles for the
/// same. The error is that of profile and rounding together, the largest after any snapshot of the last tenth of the
/// training, with the snapshots that retention keeps. A choice that more disk does not change is returned once.
/// `progress` is called with the number of parts of the search, after each of them.
///
/// # Errors
/// [`Error::Setting`] for a disk that does not hold one step's snapshots of two profiles, an invalid range, or a
/// schedule that leaves no snapshot.
pub fn advise(request: &AdviceRequest, progress: &(dyn Fn(usize) + Sync)) -> Result<Vec<Advice>> {
    let (from, to) = request.range;
    Retention::Range { from, to }.check()?;
    request.schedule(1).check()?;
    if request.kept(2, request.disk) == 0 {
        let least = request.forecast(vec![Profile::gamma(0.0)?; 2], 1, 1).disk(request.parameters, request.dtype);
        let reason = format!(
            "{} bytes do not hold one step's snapshots of two profiles and the live state, which take {least} bytes: \
             give more, or store snapshots in a smaller dtype",
            request.disk
        );
        return Err(Error::Setting { option: "disk", reason });
    }
    let mut cases: Vec<(usize, u64)> = Vec::new();
    for profiles in PROFILES {
        cases.extend(DISK_SHARES.map(|(numerator, denominator)| (profiles, request.disk / denominator * numerator)));
    }
    start_threads()?;
    let best = |&(profiles, disk): &(usize, u64)| {
        let Some(search) = Search::new(request, profiles, request.kept(profiles as u64, disk)) else {
            (0..search::PARTS).for_each(|_| progress(ADVICE_PARTS));
            return Ok(None);
        };
        search.best(&|| progress(ADVICE_PARTS))
    };
    let found: Vec<Option<Advice>> = cases.par_iter().map(best).collect::<Result<_>>()?;
    let mut advice: Vec<Advice> = found.into_iter().flatten().collect();
    advice.dedup_by(|a, b| a.forecast == b.forecast);
    Ok(advice)
}

impl AdviceRequest {
    /// Returns the number of steps whose snapshots can be kept on `disk` bytes.
    fn kept(&self, profiles: u64, disk: u64) -> u64 {
        let element = self.parameters.saturating_mul(profiles).max(1);
        let state = 2 * LIVE_BYTES;
        let stored = self.dtype.bitsize() as u64 / 8;
        // One step more than is kept is on disk for a moment.
        ((disk / element).saturating_sub(state) / stored.max(1)).saturating_sub(1)
    }

    fn schedule(&self, checkpoint_every: u64) -> Schedule {
        let AdviceRequest { update_every, update_after_step, snapshot_growth, .. } = *self;
        Schedule { update_every, update_after_step, checkpoint_every, snapshot_growth }
    }

    fn forecast(&self, tracked: Vec<Profile>, checkpoint_every: u64, keep: usize) -> Forecast {
        let retention = Retention::Range { from: self.range.0, to: self.range.1 };
        Forecast { schedule: self.schedule(checkpoint_every), steps: self.steps, keep, retention, tracked }
    }
}

#[cfg(test)]
mod grid_tests;
#[cfg(test)]
mod tests;
