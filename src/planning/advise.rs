//! Advice before training: which profiles to track, how often to store them and how many to keep, for the disk there is.

use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::forecast::Forecast;
use super::plan::At;
use crate::error::{Error, Result};
use crate::math::{Chain, ChainSource, MAX_SIGMA_REL, Profile, Retention, Schedule, System, relative_rounding};

/// Lengths of the range at which errors are looked at.
const TARGETS: usize = 24;

/// How far a tracked length moves in the search, as logarithms, one round after the other.
const STRIDES: [f64; 5] = [0.2, 0.1, 0.05, 0.025, 0.0125];

/// A number of snapshots at which the choice of profiles counts most.
const FEW: u64 = 20;

/// Intervals that are compared for one number of snapshots.
const MOST_SPACINGS: u64 = 10_000;

/// How many snapshots are taken for each that is kept: the more there are to choose from, the better those that are kept lie.
const CHOICE: [u64; 3] = [1, 2, 4];

/// What is known of a training before it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct AdviceRequest {
    /// The length of the training in steps.
    pub steps: u64,
    /// Steps between updates.
    pub update_every: u64,
    /// No update before this step.
    pub update_after_step: u64,
    /// Averaged elements of the model.
    pub parameters: u64,
    /// The dtype of averages in snapshots.
    pub dtype: Dtype,
    /// What the run may take on disk, in bytes.
    pub disk: u64,
    /// The shortest and the longest length that will be asked for, as `sigma_rel`.
    pub range: (f64, f64),
}

/// A choice of profiles, spacing and number of snapshots.
#[derive(Clone, Debug)]
pub struct Advice {
    /// What to give a tracker.
    pub forecast: Forecast,
    /// What it misses at the end of the training.
    pub worst: WorstCase,
    /// What the run takes on disk at most, in bytes.
    pub disk: u64,
}

/// The largest errors over a range of lengths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WorstCase {
    /// Of the profile: the relative error.
    pub relative_error: f64,
    /// The noise gain.
    pub noise_gain: f64,
    /// Of the profile and of rounding together, `sqrt(relative_error^2 + (noise_gain u)^2)` for snapshots of the relative rounding
    /// error `u`: what is made small. The two are alike where the weights move about as much over an average as they are large;
    /// weights that move less, as they do late in training, make rounding count for more.
    pub error: f64,
    /// The length, as `sigma_rel`, at which that is largest.
    pub sigma_rel: f64,
}

impl WorstCase {
    /// Over lengths with their relative errors and noise gains.
    fn over(each: impl Iterator<Item = (f64, f64, f64)>, rounding: f64) -> WorstCase {
        each.fold(WorstCase::default(), |worst, (sigma_rel, relative_error, noise_gain)| {
            let error = relative_error.hypot(noise_gain * rounding);
            let most = if error > worst.error { (error, sigma_rel) } else { (worst.error, worst.sigma_rel) };
            WorstCase {
                relative_error: worst.relative_error.max(relative_error),
                noise_gain: worst.noise_gain.max(noise_gain),
                error: most.0,
                sigma_rel: most.1,
            }
        })
    }
}

/// The relative rounding error of a snapshot's elements, as a root mean square.
#[doc(hidden)]
pub fn rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => relative_rounding(11),
        Dtype::BF16 => relative_rounding(8),
        Dtype::F32 => relative_rounding(24),
        _ => relative_rounding(53),
    }
}

/// An [`Advice`] as a document.
#[derive(Serialize)]
struct Document<'a> {
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
        Document {
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
    /// The bytes that the run takes on disk at most, for a model of so many averaged elements, compensated averages, and
    /// snapshots in one dtype: a step's snapshots more than are kept, and the live state twice, because nothing old is removed
    /// before what is new is there.
    pub fn disk(&self, parameters: u64, dtype: Dtype) -> u64 {
        let most = match &self.retention {
            // One for each of the list and the newest, which the next one replaces.
            Retention::Steps(steps) => steps.len().saturating_add(2),
            _ => self.keep.saturating_add(1),
        };
        let steps = self.schedule.snapshots(self.steps).len().min(most) as u64;
        let profiles = self.tracked.len() as u64;
        let (state, stored) = (2 * LIVE, dtype.bitsize() as u64 / 8);
        parameters.saturating_mul(profiles).saturating_mul(steps.saturating_mul(stored).saturating_add(state))
    }
}

/// Bytes of an element and profile in the live state: f32 and a bf16 low-order term.
const LIVE: u64 = 6;

/// For two and for three profiles, and for half, all and twice the disk, in this order: the choice with the smallest worst error
/// over the range, of the profile and of rounding together; once where more disk makes no difference. `progress` is told of each that is done, and how many there are.
///
/// # Errors
/// [`Error::Setting`] for a disk that does not hold one step's snapshots of two profiles, a range that makes no sense, or a
/// schedule that leaves no snapshot.
pub fn advise(wish: &AdviceRequest, progress: &(dyn Fn(usize) + Sync)) -> Result<Vec<Advice>> {
    let (from, to) = wish.range;
    Retention::Range { from, to }.check()?;
    wish.schedule(1).check()?;
    let cases: Vec<(usize, u64)> = [2, 3].iter().flat_map(|&p| BUDGETS.map(|(n, d)| (p, wish.disk / d * n))).collect();
    if wish.kept(2, wish.disk) == 0 {
        let least = wish.forecast(vec![Profile::gamma(0.0)?; 2], 1, 1).disk(wish.parameters, wish.dtype);
        let reason = format!(
            "{} bytes do not hold one step's snapshots of two profiles and the live state, which take {least}: give more, or \
             store snapshots in a smaller dtype",
            wish.disk
        );
        return Err(Error::Setting { option: "disk", reason });
    }
    let advice = |&(profiles, disk): &(usize, u64)| {
        let best = wish.best(profiles, disk);
        progress(BUDGETS.len() * 2);
        best
    };
    let found: Vec<Option<Advice>> = cases.par_iter().map(advice).collect::<Result<_>>()?;
    let mut advice: Vec<Advice> = found.into_iter().flatten().collect();
    // More disk than the most snapshots take changes nothing.
    advice.dedup_by(|a, b| a.forecast == b.forecast);
    Ok(advice)
}

/// Shares of the disk that are looked at, as fractions.
const BUDGETS: [(u64, u64); 3] = [(1, 2), (1, 1), (2, 1)];

impl AdviceRequest {
    /// How many steps' snapshots fit.
    fn kept(&self, profiles: u64, disk: u64) -> u64 {
        let element = self.parameters.saturating_mul(profiles).max(1);
        let (state, stored) = (2 * LIVE, self.dtype.bitsize() as u64 / 8);
        // One step more than is kept lies there for a moment.
        ((disk / element).saturating_sub(state) / stored.max(1)).saturating_sub(1)
    }

    fn schedule(&self, checkpoint_every: u64) -> Schedule {
        Schedule { update_every: self.update_every, update_after_step: self.update_after_step, checkpoint_every }
    }

    fn forecast(&self, tracked: Vec<Profile>, checkpoint_every: u64, keep: usize) -> Forecast {
        let retention = Retention::Range { from: self.range.0, to: self.range.1 };
        Forecast { schedule: self.schedule(checkpoint_every), steps: self.steps, keep, retention, tracked }
    }

    /// The best choice of so many profiles; none where the disk holds none.
    fn best(&self, profiles: usize, disk: u64) -> Result<Option<Advice>> {
        let updates = self.steps.saturating_sub(self.update_after_step) / self.update_every.max(1);
        let keep = self.kept(profiles as u64, disk).min(updates).min((MOST_SOURCES / profiles) as u64);
        if keep == 0 {
            return Ok(None);
        }
        // Errors with evenly spaced snapshots are not those with the ones that retention keeps: two searches are judged.
        let searched = [keep.min(FEW), keep].map(|keep| self.search(profiles, keep));
        let mut searched: Vec<Vec<Profile>> = searched.into_iter().collect::<Result<_>>()?;
        searched.dedup();
        let mut best: Option<Advice> = None;
        for (tracked, choice) in searched.iter().flat_map(|tracked| CHOICE.map(|choice| (tracked, choice))) {
            let every = self.spacing(keep.saturating_mul(choice));
            let forecast = self.forecast(tracked.clone(), every, keep as usize);
            let advice = match self.judge(forecast) {
                Ok(advice) => advice,
                // What cannot be solved is no candidate.
                Err(Error::DependentSources { .. }) => continue,
                Err(other) => return Err(other),
            };
            // What is stored more often has to be clearly better.
            if best.as_ref().is_none_or(|best| advice.worst.error < 0.98 * best.worst.error) {
                best = Some(advice);
            }
        }
        Ok(best)
    }

    /// An interval that makes so many snapshots, or up to a seventh fewer, in whole updates, of which the last lies as near to the end
    /// of the training as can be.
    fn spacing(&self, snapshots: u64) -> u64 {
        let update = self.update_every.max(1);
        let shortest = self.steps.div_ceil(snapshots.max(1)).next_multiple_of(update).max(update);
        let longer = (shortest / 7 / update).min(MOST_SPACINGS);
        let spacings = (0..=longer).map(|i| shortest + i * update);
        spacings.min_by_key(|every| self.steps % every).unwrap_or(shortest)
    }

    /// Errors from the solve over all updates of the training.
    fn judge(&self, forecast: Forecast) -> Result<Advice> {
        let lengths = self.lengths();
        let targets: Vec<Profile> = lengths.iter().map(|&length| Profile::sigma_rel(length)).collect::<Result<_>>()?;
        let plans = forecast.plans(&targets, At::Latest)?;
        let each = plans.iter().zip(&lengths).map(|(plan, &length)| (length, plan.relative_error, plan.noise_gain));
        let worst = WorstCase::over(each, rounding(self.dtype));
        let disk = forecast.disk(self.parameters, self.dtype);
        Ok(Advice { forecast, worst, disk })
    }

    fn lengths(&self) -> Vec<f64> {
        let (from, to) = self.range;
        let length = |i: usize| (from + (to - from) * i as f64 / (TARGETS - 1) as f64).clamp(from, to);
        (0..TARGETS).map(length).collect()
    }

    /// Lengths to track, from the shortest to the longest: each is moved in turn as long as that makes the worst error smaller,
    /// with evenly spaced snapshots and dense updates.
    fn search(&self, profiles: usize, keep: u64) -> Result<Vec<Profile>> {
        let (from, to) = self.range;
        let share = |i: usize| i as f64 / (profiles - 1) as f64;
        let mut tracked: Vec<f64> = (0..profiles).map(|i| from * (to / from).powf(share(i))).collect();
        let mut least = self.worst_evenly(&tracked, keep);
        for stride in STRIDES {
            while let Some((better, error)) = self.improved(&tracked, stride, keep, least) {
                (tracked, least) = (better, error);
            }
        }
        tracked.iter().map(|&length| Profile::sigma_rel(rounded(length))).collect()
    }

    /// The best of the neighbours in which one length is moved, where there is one that is better.
    fn improved(&self, tracked: &[f64], stride: f64, keep: u64, least: f64) -> Option<(Vec<f64>, f64)> {
        let moved = |(i, by): (usize, f64)| {
            let mut moved = tracked.to_vec();
            moved[i] = (moved[i] * by.exp()).min(LONGEST);
            let error = self.worst_evenly(&moved, keep);
            (moved, error)
        };
        let moves = (0..tracked.len()).flat_map(|i| [(i, stride), (i, -stride)]);
        let best = moves.map(moved).min_by(|a, b| a.1.total_cmp(&b.1));
        best.filter(|(_, error)| *error < 0.999 * least)
    }

    /// The worst error with evenly spaced snapshots; infinite where it cannot be solved.
    fn worst_evenly(&self, tracked: &[f64], keep: u64) -> f64 {
        let last = self.steps.max(keep);
        let profiles = tracked.iter().filter_map(|&length| Profile::sigma_rel(length).ok());
        let source = |profile: &Profile, step| ChainSource {
            chain: Chain::Tracked(profile.clone()),
            step,
            label: String::new(),
        };
        let steps = |i: u64| (u128::from(last) * u128::from(i) / u128::from(keep)) as u64;
        let steps: Vec<u64> = (1..=keep).map(steps).collect();
        let sources: Vec<ChainSource> = profiles
            .flat_map(|profile| steps.iter().map(move |&step| source(&profile, step)).collect::<Vec<_>>())
            .collect();
        let solve = |system: &System, length: f64| {
            let solution = system.solve(&Profile::sigma_rel(length).ok()?).ok()?;
            Some((length, solution.relative_error, solution.noise_gain))
        };
        let each = System::closed_form(last, &sources, 0.0).ok().and_then(|system| {
            self.lengths().into_iter().map(|length| solve(&system, length)).collect::<Option<Vec<_>>>()
        });
        let worst = each.map(|each| WorstCase::over(each.into_iter(), rounding(self.dtype)).error);
        worst.filter(|worst| worst.is_finite()).unwrap_or(f64::INFINITY)
    }
}

/// The longest length that is tried, just below that of the plain mean.
const LONGEST: f64 = MAX_SIGMA_REL - 1e-4;

/// More snapshots are never advised: the profile is then off by far less than what they are rounded by, and retention would no
/// longer look at each.
const MOST_SOURCES: usize = 240;

/// A length as a person would give it: to three decimals, or two digits below 0.01.
fn rounded(length: f64) -> f64 {
    let digits = if length < 0.01 { 1e4 } else { 1e3 };
    ((length * digits).round() / digits).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(disk: u64, range: (f64, f64)) -> AdviceRequest {
        AdviceRequest {
            steps: 100_000,
            update_every: 10,
            update_after_step: 0,
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
    fn advice_fits_the_disk_and_beats_what_would_be_done_without_it() {
        let range = (0.05, 0.28);
        // Twenty steps of two profiles, one more while it is written, and the live state twice.
        let disk = 2 * 1_000_000 * (21 * 2 + 2 * 6);
        let wish = wish(disk, range);
        let all = advise(&wish, &|_| ()).unwrap();
        assert_eq!(all.iter().map(|advice| advice.forecast.tracked.len()).collect::<Vec<_>>(), [2, 2, 2, 3, 3, 3]);
        for (advice, share) in all.iter().zip([0.5, 1.0, 2.0].iter().cycle()) {
            let forecast = &advice.forecast;
            assert!(advice.disk as f64 <= share * disk as f64, "{advice:?}");
            assert_eq!(advice.disk, forecast.disk(1_000_000, Dtype::F16));
            assert!(worst(forecast, range) <= 1.1 * advice.worst.relative_error, "{advice:?}");
        }
        assert_eq!(all[1].forecast.keep, 20);
        let evenly = Forecast { keep: 20, ..wish.forecast(default(), 1000, 20) };
        assert!(all[1].worst.relative_error <= worst(&evenly, range), "{:?}", all[1]);
        let newest = Forecast { retention: Retention::Latest, ..evenly };
        assert!(all[1].worst.error < 0.1 * worst(&newest, range));
        // A noise gain with which rounding to f16 would drown everything is not advised.
        assert!(all.iter().all(|advice| advice.worst.noise_gain * 2.0e-4 <= advice.worst.error), "{all:?}");
        // More disk is better, and so are three profiles here.
        let error = |i: usize| all[i].worst.error;
        assert!(error(2) < error(1) && error(1) < error(0) && error(4) < error(1), "{all:?}");
    }

    fn default() -> Vec<Profile> {
        [0.05, 0.28].map(|length| Profile::sigma_rel(length).unwrap()).to_vec()
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = |wish: AdviceRequest| advise(&wish, &|_| ()).unwrap_err().to_string();
        let text = refused(wish(1_000_000, (0.05, 0.28)));
        assert!(text.contains("1000000 bytes do not hold one step's") && text.contains("32000000"), "{text}");
        assert!(refused(wish(1 << 30, (0.2, 0.1))).contains("the shorter sigma_rel first"));
        let never = AdviceRequest { update_every: 0, ..wish(1 << 30, (0.1, 0.2)) };
        assert!(refused(never).contains("update_every"));
    }

    #[test]
    fn a_short_training_is_stored_at_each_update() {
        let short = AdviceRequest { steps: 50, ..wish(1 << 40, (0.1, 0.2)) };
        let advice = advise(&short, &|_| ()).unwrap();
        assert!(
            advice.iter().all(|advice| advice.forecast.keep == 5 && advice.forecast.schedule.checkpoint_every == 10)
        );
    }
}
