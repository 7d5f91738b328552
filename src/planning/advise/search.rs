//! The search for the profiles and the interval of one number of profiles and of kept steps.
//!
//! The error of a choice is computed with the steps that retention keeps after each snapshot of the training. It jumps
//! where another step is kept, so it has no slope to follow. Lengths are first moved with the kept steps held fixed,
//! which is smooth and cheap; then lengths and interval are moved together.

use std::cmp::Ordering;

use rayon::prelude::*;

use super::{Advice, AdviceRequest, WorstCase, rounding};
use crate::error::{Error, Result};
use crate::math::{MAX_SIGMA_REL, Profile, dense_errors, targets};
use crate::planning::forecast::Forecast;
use crate::planning::no_prediction::NoPrediction;
use crate::planning::noise::Noise;
use crate::planning::plan::{At, solve};

/// Parts of a search that are reported as they end.
pub(super) const PARTS: usize = 4;

/// Number of lengths of the range at which errors are computed.
const TARGETS: usize = 24;

/// Longest length to track, just below that of the plain mean.
const MAX_LENGTH: f64 = MAX_SIGMA_REL - 1e-4;

/// Most sources that are advised: the error of the profile is then far below that of the rounding.
const MOST_SOURCES: u64 = 128;

/// Logarithmic moves of a tracked length with the kept steps held fixed, one per round.
const STRIDES: [f64; 5] = [0.2, 0.1, 0.05, 0.025, 0.0125];

/// The moves of [`Effort::strides`].
const FINE_STRIDES: [f64; 3] = [0.04, 0.015, 0.006];

/// Numbers by which that of the snapshots is moved.
const SHIFTS: [i64; 4] = [-2, -1, 1, 2];

/// Most snapshots of the end of a training that lengths are moved for, and that are solved over all updates.
const MOST_SETS: usize = 3;

/// Search for the best choice of a number of profiles and of kept steps.
pub(super) struct Search<'a> {
    pub request: &'a AdviceRequest,
    pub profiles: usize,
    pub keep: u64,
    /// Number of updates of the training.
    updates: u64,
    targets: Vec<Profile>,
    rounding: f64,
}

/// Extent of a search.
struct Effort {
    /// Ratio of the numbers of snapshots that are tried.
    snapshots_ratio: f64,
    /// Most snapshots taken per step kept.
    most_snapshots: f64,
    /// Number of intervals that have lengths of their own.
    refined: usize,
    /// Number of choices whose lengths and interval are moved together.
    starts: usize,
    /// Logarithmic moves of a tracked length together with the interval, one per round.
    strides: &'static [f64],
}

/// A choice of lengths and interval, and its error.
#[derive(Clone, Debug)]
pub(super) struct TrackingSetup {
    lengths: Vec<f64>,
    every: u64,
    /// The worst error under dense updates.
    pub error: f64,
    /// The kept steps after the snapshots of the last tenth, the worst first.
    sets: Vec<Vec<u64>>,
}

impl<'a> Search<'a> {
    /// Creates a search; `None` if no step can be kept.
    pub(super) fn new(request: &'a AdviceRequest, profiles: usize, keep: u64) -> Option<Search<'a>> {
        let updates = request.steps.saturating_sub(request.update_after_step) / request.update_every.max(1);
        let keep = keep.min(updates).min(MOST_SOURCES / profiles as u64);
        let (from, to) = request.range;
        let targets = targets(from, to, TARGETS);
        let rounding = rounding(request.dtype);
        (keep > 0).then_some(Search { request, profiles, keep, updates, targets, rounding })
    }

    /// Returns the best choice; `None` if none can be solved for. `progress` is called after each part.
    pub(super) fn best(&self, progress: &(dyn Fn() + Sync)) -> Result<Option<Advice>> {
        let start = self.start();
        progress();
        let mut found = self.over_intervals(&start);
        progress();
        found = found.into_par_iter().take(self.effort().starts).map(|candidate| self.polish(candidate)).collect();
        found.sort_by(by_error);
        progress();
        let advice = self.exact(found);
        progress();
        advice
    }

    /// Returns the extent of the search: the more sources, the longer each error takes.
    fn effort(&self) -> Effort {
        match self.keep * self.profiles as u64 {
            ..=32 => {
                Effort { snapshots_ratio: 1.07, most_snapshots: 6.0, refined: 8, starts: 6, strides: &FINE_STRIDES }
            }
            33..=64 => {
                Effort { snapshots_ratio: 1.07, most_snapshots: 6.0, refined: 5, starts: 3, strides: &FINE_STRIDES }
            }
            _ => Effort {
                snapshots_ratio: 1.2,
                most_snapshots: 3.0,
                refined: 2,
                starts: 1,
                strides: &FINE_STRIDES[1..2],
            },
        }
    }

    /// Moves evenly spread lengths for the kept steps of about three snapshots per kept step.
    fn start(&self) -> TrackingSetup {
        let (from, to) = self.request.range;
        let share = |i: usize| (i as f64 + 0.25) / (self.profiles as f64 - 0.5);
        let spread = (0..self.profiles).map(|i| from * (to / from).powf(share(i))).collect();
        self.alternate(self.judge(spread, self.interval(3 * self.keep)), 3)
    }

    /// Returns the candidates of a range of intervals, the best of them with lengths of their own, the best first.
    fn over_intervals(&self, start: &TrackingSetup) -> Vec<TrackingSetup> {
        let Effort { snapshots_ratio, most_snapshots, refined, .. } = self.effort();
        let mut intervals = Vec::new();
        let mut snapshots = 0.7 * self.keep as f64;
        while snapshots <= most_snapshots * self.keep as f64 {
            intervals.push(self.interval(snapshots.round() as u64));
            snapshots = (snapshots * snapshots_ratio).max(snapshots + 1.0);
        }
        intervals.dedup();
        let judge = |&every: &u64| self.judge(start.lengths.clone(), every);
        let mut found: Vec<TrackingSetup> = intervals.par_iter().map(judge).collect();
        found.push(start.clone());
        found.sort_by(by_error);
        found.truncate(refined);
        found = found.into_par_iter().map(|candidate| self.alternate(candidate, 2)).collect();
        found.sort_by(by_error);
        found
    }

    /// Moves lengths with the kept steps held fixed, then keeps steps for these lengths, as long as it helps.
    fn alternate(&self, mut best: TrackingSetup, rounds: usize) -> TrackingSetup {
        for _ in 0..rounds {
            let sets = &best.sets[..best.sets.len().min(MOST_SETS)];
            let next = self.judge(self.descend(&best.lengths, sets), best.every);
            if !(next.error < 0.999 * best.error) {
                break;
            }
            best = next;
        }
        best
    }

    /// Moves each length in turn as long as that lowers the worst error over `sets`.
    fn descend(&self, lengths: &[f64], sets: &[Vec<u64>]) -> Vec<f64> {
        let mut lengths = lengths.to_vec();
        let mut least = self.worst_of(&lengths, sets);
        for stride in STRIDES {
            loop {
                let moves: Vec<Vec<f64>> = self.moves(&lengths, stride).collect();
                let judged = moves.into_par_iter().map(|moved| (self.worst_of(&moved, sets), moved));
                let Some((error, moved)) = judged.min_by(|a, b| a.0.total_cmp(&b.0)) else { break };
                if !(error < 0.999 * least) {
                    break;
                }
                (least, lengths) = (error, moved);
            }
        }
        lengths
    }

    /// Moves lengths and interval together as long as that lowers the error.
    fn polish(&self, mut best: TrackingSetup) -> TrackingSetup {
        for &stride in self.effort().strides {
            loop {
                let shifted = self.shifts(best.every).into_iter().map(|every| (best.lengths.clone(), every));
                let moved = self.moves(&best.lengths, stride).map(|lengths| (lengths, best.every));
                let tried: Vec<(Vec<f64>, u64)> = shifted.chain(moved).collect();
                let judged = tried.into_par_iter().map(|(lengths, every)| self.judge(lengths, every));
                let Some(next) = judged.min_by(by_error) else { break };
                if !(next.error < 0.995 * best.error) {
                    break;
                }
                best = next;
            }
        }
        best
    }

    /// Returns lengths of which one is longer or shorter by a factor of `stride`'s exponential.
    fn moves(&self, lengths: &[f64], stride: f64) -> impl Iterator<Item = Vec<f64>> {
        (0..2 * lengths.len()).map(move |i| {
            let mut moved = lengths.to_vec();
            let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
            moved[i / 2] = (moved[i / 2] * (sign * stride).exp()).min(MAX_LENGTH);
            moved
        })
    }

    /// Returns intervals of some more and some fewer snapshots.
    fn shifts(&self, every: u64) -> Vec<u64> {
        let count = (self.request.steps / every).max(1);
        let mut intervals: Vec<u64> = SHIFTS.iter().map(|&by| self.interval(count.saturating_add_signed(by))).collect();
        intervals.dedup();
        intervals.retain(|&interval| interval != every);
        intervals
    }

    /// Returns an interval, in whole updates, of about this number of snapshots, the last one at the training's end.
    pub(super) fn interval(&self, snapshots: u64) -> u64 {
        let update = self.request.update_every.max(1);
        let updates = self.request.steps / update;
        (updates / snapshots.clamp(1, self.updates.max(1))).max(1) * update
    }

    /// Computes the error of a choice, with lengths rounded as they are advised.
    pub(super) fn judge(&self, lengths: Vec<f64>, every: u64) -> TrackingSetup {
        let mut lengths: Vec<f64> = lengths.into_iter().map(round_length).collect();
        lengths.sort_by(f64::total_cmp);
        let mut candidate = TrackingSetup { lengths, every, error: f64::INFINITY, sets: Vec::new() };
        let Some((forecast, first)) = self.forecast(&candidate) else { return candidate };
        let snapshots = forecast.schedule.snapshots(self.request.steps);
        // The newest snapshot when the last tenth begins counts, too.
        let late = self.request.steps - self.request.steps / 10;
        let earliest = snapshots.iter().rfind(|&&step| step <= late).or(snapshots.first()).copied();
        let mut sets = Vec::new();
        forecast.retention.over_training(&forecast.tracked, first, &snapshots, forecast.keep, |kept| {
            if kept.last().copied() >= earliest {
                sets.push(kept.to_vec());
            }
        });
        let mut judged: Vec<(f64, Vec<u64>)> =
            sets.into_par_iter().map(|set| (self.error(&forecast.tracked, &set), set)).collect();
        judged.sort_by(|a, b| b.0.total_cmp(&a.0));
        candidate.error = judged.first().map_or(f64::INFINITY, |(error, _)| *error);
        candidate.sets = judged.into_iter().map(|(_, set)| set).collect();
        candidate
    }

    /// Returns the settings of a choice and its first update; `None` for an invalid schedule.
    fn forecast(&self, candidate: &TrackingSetup) -> Option<(Forecast, u64)> {
        let tracked = profiles(&candidate.lengths)?;
        let forecast = self.request.forecast(tracked, candidate.every, self.keep as usize);
        let first = forecast.schedule.updates(forecast.steps).ok()?.first()?;
        Some((forecast, first))
    }

    fn worst_of(&self, lengths: &[f64], sets: &[Vec<u64>]) -> f64 {
        let Some(tracked) = profiles(lengths) else { return f64::INFINITY };
        sets.iter().map(|set| self.error(&tracked, set)).fold(0.0, f64::max)
    }

    /// Returns the worst error over the range of a set of kept steps, under dense updates.
    fn error(&self, tracked: &[Profile], set: &[u64]) -> f64 {
        let errors = dense_errors(tracked, &self.targets, set[0], set);
        let together = errors.into_iter().map(|(error, gain)| error.hypot(gain * self.rounding));
        // NaN is the largest.
        together.fold(0.0, |worst: f64, error| if error <= worst { worst } else { error })
    }

    /// Solves over all updates for the errors of the first candidate that can be solved for.
    pub(super) fn exact(&self, candidates: Vec<TrackingSetup>) -> Result<Option<Advice>> {
        for candidate in candidates {
            match self.evaluate(&candidate) {
                Err(Error::DependentSources { .. }) => continue,
                other => return other,
            }
        }
        Ok(None)
    }

    fn evaluate(&self, candidate: &TrackingSetup) -> Result<Option<Advice>> {
        let Some((forecast, _)) = self.forecast(candidate) else { return Ok(None) };
        let history = forecast.schedule.updates(forecast.steps)?;
        let mut worst = WorstCase::default();
        for set in candidate.sets.iter().take(MOST_SETS) {
            let sources = forecast.sources_at(set);
            let unasked = Err(NoPrediction::NotAsked);
            let plans = solve(&sources, Some(&history), &self.targets, At::Latest, Noise::Off, unasked)?;
            for plan in plans {
                let length = plan.profile.as_sigma_rel().unwrap_or_default();
                worst.include(length, plan.relative_error, plan.noise_gain, self.rounding);
            }
        }
        let disk = forecast.disk(self.request.parameters, self.request.dtype);
        Ok(Some(Advice { forecast, worst, disk }))
    }
}

fn by_error(a: &TrackingSetup, b: &TrackingSetup) -> Ordering {
    a.error.total_cmp(&b.error)
}

fn profiles(lengths: &[f64]) -> Option<Vec<Profile>> {
    lengths.iter().map(|&length| Profile::sigma_rel(length).ok()).collect()
}

/// Rounds a length to four decimals, or to five below 0.01.
fn round_length(length: f64) -> f64 {
    let scale = if length < 0.01 { 1e5 } else { 1e4 };
    ((length * scale).round() / scale).min(MAX_LENGTH)
}
