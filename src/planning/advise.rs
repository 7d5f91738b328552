//! Advice before training: the profiles to track, the spacing and the number of snapshots for a given disk.

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::forecast::Forecast;
use super::plan::At;
use crate::error::{Error, Result};
use crate::fs::start_threads;
use crate::math::{Chain, ChainSource, MAX_SIGMA_REL, Profile, Retention, Schedule, System, relative_rounding};

/// Number of lengths of the range at which errors are computed.
const TARGETS: usize = 24;

/// Logarithmic moves of a tracked length, one per round of the search.
const STRIDES: [f64; 5] = [0.2, 0.1, 0.05, 0.025, 0.0125];

/// Number of snapshots at which the choice of profiles matters most.
const FEW: u64 = 20;

/// Most intervals that are compared for one number of snapshots.
const MOST_SPACINGS: u64 = 10_000;

/// Snapshots taken per snapshot kept. Retention finds better steps to keep if there are more to choose from.
const TAKEN_PER_KEPT: [u64; 3] = [1, 2, 4];

/// Bytes of an element and profile in the live state: f32 and a low-order term of 16 bits.
const LIVE_BYTES: u64 = 6;

/// Shares of the disk that advice is given for, as fractions.
const DISK_SHARES: [(u64, u64); 3] = [(1, 2), (1, 1), (2, 1)];

/// Longest length to track, just below that of the plain mean.
const MAX_LENGTH: f64 = MAX_SIGMA_REL - 1e-4;

/// Most sources that are advised.
///
/// With more, the profile's error would be far below the rounding, and retention would not compute the error of each.
const MOST_SOURCES: usize = 240;

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
    /// The errors at the end of the training.
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
/// Returns the best choice of two profiles for half, all and twice the disk, then of three profiles for the same. The
/// error is that of profile and rounding together. A choice that more disk does not change is returned once.
/// `progress` is called with the number of cases, after each of them.
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
    for profiles in [2, 3] {
        cases.extend(DISK_SHARES.map(|(numerator, denominator)| (profiles, request.disk / denominator * numerator)));
    }
    let best = |&(profiles, disk): &(usize, u64)| {
        let best = request.best(profiles, disk);
        progress(cases.len());
        best
    };
    start_threads()?;
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

    /// Returns the best choice of a number of profiles; `None` if the disk does not hold one step's snapshots.
    fn best(&self, profiles: usize, disk: u64) -> Result<Option<Advice>> {
        let updates = self.steps.saturating_sub(self.update_after_step) / self.update_every.max(1);
        let keep = self.kept(profiles as u64, disk).min(updates).min((MOST_SOURCES / profiles) as u64);
        if keep == 0 {
            return Ok(None);
        }
        // The search assumes evenly spaced snapshots, not those that retention keeps: two of its results are compared.
        let mut searched = vec![self.search(profiles, keep.min(FEW))?, self.search(profiles, keep)?];
        searched.dedup();
        let mut best: Option<Advice> = None;
        for tracked in searched {
            for taken in TAKEN_PER_KEPT {
                let every = self.spacing(keep.saturating_mul(taken));
                let forecast = self.forecast(tracked.clone(), every, keep as usize);
                let advice = match self.evaluate(forecast) {
                    Ok(advice) => advice,
                    Err(Error::DependentSources { .. }) => continue,
                    Err(other) => return Err(other),
                };
                // More frequent snapshots must be clearly better.
                if best.as_ref().is_none_or(|best| advice.worst.error < 0.98 * best.worst.error) {
                    best = Some(advice);
                }
            }
        }
        Ok(best)
    }

    /// Returns an interval, in whole updates, for a number of snapshots or up to a seventh fewer.
    ///
    /// It is chosen so that the last snapshot is as close to the end of the training as possible.
    fn spacing(&self, snapshots: u64) -> u64 {
        let update = self.update_every.max(1);
        let shortest = self.steps.div_ceil(snapshots.max(1)).next_multiple_of(update).max(update);
        let longer = (shortest / 7 / update).min(MOST_SPACINGS);
        let spacings = (0..=longer).map(|i| shortest + i * update);
        spacings.min_by_key(|every| self.steps % every).unwrap_or(shortest)
    }

    /// Solves over all updates of the training for the errors of a forecast.
    fn evaluate(&self, forecast: Forecast) -> Result<Advice> {
        let lengths = self.lengths();
        let targets: Vec<Profile> = lengths.iter().map(|&length| Profile::sigma_rel(length)).collect::<Result<_>>()?;
        let mut worst = WorstCase::default();
        for (plan, length) in forecast.plans(&targets, At::Latest)?.iter().zip(lengths) {
            worst.include(length, plan.relative_error, plan.noise_gain, rounding(self.dtype));
        }
        let disk = forecast.disk(self.parameters, self.dtype);
        Ok(Advice { forecast, worst, disk })
    }

    /// Returns evenly spaced lengths of the range.
    fn lengths(&self) -> Vec<f64> {
        let (from, to) = self.range;
        let length = |i: usize| (from + (to - from) * i as f64 / (TARGETS - 1) as f64).clamp(from, to);
        (0..TARGETS).map(length).collect()
    }

    /// Searches for the lengths to track, in increasing order, with evenly spaced snapshots and dense updates.
    ///
    /// Each length is moved in turn as long as that lowers the worst error.
    fn search(&self, profiles: usize, keep: u64) -> Result<Vec<Profile>> {
        let (from, to) = self.range;
        let share = |i: usize| i as f64 / (profiles - 1) as f64;
        let mut tracked: Vec<f64> = (0..profiles).map(|i| from * (to / from).powf(share(i))).collect();
        let mut least = self.evenly_spaced_error(&tracked, keep);
        for stride in STRIDES {
            while let Some((better, error)) = self.improve(&tracked, stride, keep, least) {
                tracked = better;
                least = error;
            }
        }
        tracked.iter().map(|&length| Profile::sigma_rel(round_length(length))).collect()
    }

    /// Moves one length by `stride`, up or down, and returns the best result with its error if it is below `least`.
    fn improve(&self, tracked: &[f64], stride: f64, keep: u64, least: f64) -> Option<(Vec<f64>, f64)> {
        let mut best: Option<(Vec<f64>, f64)> = None;
        for i in 0..tracked.len() {
            for step in [stride, -stride] {
                let mut moved = tracked.to_vec();
                moved[i] = (moved[i] * step.exp()).min(MAX_LENGTH);
                let error = self.evenly_spaced_error(&moved, keep);
                if best.as_ref().is_none_or(|(_, least)| error < *least) {
                    best = Some((moved, error));
                }
            }
        }
        best.filter(|(_, error)| *error < 0.999 * least)
    }

    /// Returns the worst error with evenly spaced snapshots and dense updates; infinite if it cannot be solved.
    fn evenly_spaced_error(&self, tracked: &[f64], keep: u64) -> f64 {
        let last = self.steps.max(keep);
        let mut sources = Vec::new();
        for profile in tracked.iter().filter_map(|&length| Profile::sigma_rel(length).ok()) {
            for i in 1..=keep {
                let chain = Chain::Tracked(profile.clone());
                let step = (u128::from(last) * u128::from(i) / u128::from(keep)) as u64;
                sources.push(ChainSource { chain, step, label: String::new() });
            }
        }
        let Ok(system) = System::closed_form(last, &sources, 0.0) else { return f64::INFINITY };
        let mut worst = WorstCase::default();
        for length in self.lengths() {
            let solved = Profile::sigma_rel(length).and_then(|profile| system.solve(&profile));
            let Ok(solution) = solved else { return f64::INFINITY };
            worst.include(length, solution.relative_error, solution.noise_gain, rounding(self.dtype));
        }
        worst.error
    }
}

/// Rounds a length to three decimals, or to four below 0.01.
fn round_length(length: f64) -> f64 {
    let scale = if length < 0.01 { 1e4 } else { 1e3 };
    ((length * scale).round() / scale).min(MAX_LENGTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(disk: u64, range: (f64, f64)) -> AdviceRequest {
        AdviceRequest {
            steps: 100_000,
            update_every: 10,
            update_after_step: 0,
            snapshot_growth: Some(1.2),
            parameters: 1_000_000,
            dtype: Dtype::F16,
            disk,
            range,
        }
    }

    fn worst(forecast: &Forecast, range: (f64, f64)) -> f64 {
        let length = |i: u32| range.0 + (range.1 - range.0) * f64::from(i) / 50.0;
        let targets: Vec<Profile> = (0..=50).map(|i| Profile::sigma_rel(length(i).min(range.1)).unwrap()).collect();
        forecast.plans(&targets, At::Latest).unwrap().iter().map(|plan| plan.relative_error).fold(0.0, f64::max)
    }

    #[test]
    fn advice_fits_the_disk_and_beats_the_defaults() {
        let range = (0.05, 0.28);
        // Twenty steps of two profiles, one more while it is written, and the live state twice.
        let disk = 2 * 1_000_000 * (21 * 2 + 2 * 6);
        let request = request(disk, range);
        let all = advise(&request, &|_| ()).unwrap();
        assert_eq!(all.iter().map(|advice| advice.forecast.tracked.len()).collect::<Vec<_>>(), [2, 2, 2, 3, 3, 3]);
        for (advice, share) in all.iter().zip([0.5, 1.0, 2.0].iter().cycle()) {
            let forecast = &advice.forecast;
            assert!(advice.disk as f64 <= share * disk as f64, "{advice:?}");
            assert_eq!(advice.disk, forecast.disk(1_000_000, Dtype::F16));
            assert!(worst(forecast, range) <= 1.1 * advice.worst.relative_error, "{advice:?}");
        }
        assert_eq!(all[1].forecast.keep, 20);
        let evenly = Forecast { keep: 20, ..request.forecast(default(), 1000, 20) };
        assert!(all[1].worst.relative_error <= worst(&evenly, range), "{:?}", all[1]);
        let newest = Forecast { retention: Retention::Latest, ..evenly };
        assert!(all[1].worst.error < 0.1 * worst(&newest, range));
        // Rounding to f16 is not the main part of the error.
        assert!(all.iter().all(|advice| advice.worst.noise_gain * 2.0e-4 <= advice.worst.error), "{all:?}");
        // More disk is better, and so are three profiles here.
        let error = |i: usize| all[i].worst.error;
        assert!(error(2) < error(1) && error(1) < error(0) && error(4) < error(1), "{all:?}");
    }

    fn default() -> Vec<Profile> {
        [0.05, 0.28].map(|length| Profile::sigma_rel(length).unwrap()).to_vec()
    }

    #[test]
    fn small_disk_and_invalid_settings_are_an_error() {
        let error = |request: AdviceRequest| advise(&request, &|_| ()).unwrap_err().to_string();
        let text = error(request(1_000_000, (0.05, 0.28)));
        assert!(text.contains("1000000 bytes do not hold one step's") && text.contains("32000000 bytes"), "{text}");
        assert!(error(request(1 << 30, (0.2, 0.1))).contains("the shorter sigma_rel first"));
        let never = AdviceRequest { update_every: 0, ..request(1 << 30, (0.1, 0.2)) };
        assert!(error(never).contains("update_every"));
    }

    #[test]
    fn short_training_is_stored_at_each_update() {
        let short = AdviceRequest { steps: 50, ..request(1 << 40, (0.1, 0.2)) };
        let advice = advise(&short, &|_| ()).unwrap();
        assert!(
            advice.iter().all(|advice| advice.forecast.keep == 5 && advice.forecast.schedule.checkpoint_every == 10)
        );
    }
}
