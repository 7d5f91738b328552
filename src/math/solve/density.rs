//! Densities of a target and of its blend over the time of training, for plots.

use super::{ChainSource, Updates, power_function};
use crate::error::{Error, Result};
use crate::math::{History, Profile};

/// Number of equal spans that the time is cut into without a history of updates.
const SPANS: usize = 2000;

/// Densities of a target and of its blend: piecewise constant, in shares per unit of time.
///
/// `sum_i target_i (times_i - times_{i-1})` is 1; so is the same sum of the blend.
#[derive(Clone, Debug, PartialEq)]
pub struct Densities {
    /// The end of each span; the first begins at 0.
    pub times: Vec<f64>,
    /// The target's share per unit of time on each span.
    pub target: Vec<f64>,
    /// The blend's share per unit of time on each span; it may be negative.
    pub blend: Vec<f64>,
}

impl Densities {
    /// Computes the densities of `profile` at time `at`, and of the sources blended with `weights`.
    ///
    /// There is one span per interval between updates. Without a history, updates are taken as dense and spans are
    /// equal.
    ///
    /// # Errors
    /// [`Error::History`] if there was no update at a source's step, or if a source without a history is not a tracked
    /// power function; [`Error::Parameter`] for a window longer than the time; [`Error::Count`] unless there is one
    /// weight per source.
    pub fn new(
        history: Option<&History>,
        at: u64,
        sources: &[ChainSource],
        weights: &[f64],
        profile: &Profile,
    ) -> Result<Densities> {
        profile.check_at(at as f64)?;
        if weights.len() != sources.len() {
            let found = weights.len();
            return Err(Error::Count { items: "weights", found, owners: "snapshots", expected: sources.len() });
        }
        match history {
            Some(history) => Ok(over_updates(&Updates::new(history, at, sources)?, at, weights, profile)),
            None => over_equal_spans(at, sources, weights, profile),
        }
    }

    /// Returns the blend's density less the target's.
    pub fn difference(&self) -> Vec<f64> {
        self.blend.iter().zip(&self.target).map(|(blend, target)| blend - target).collect()
    }

    /// Returns the means over at most `spans` equal spans, which keep all areas.
    ///
    /// Densities of no more spans than that are returned unchanged.
    pub fn thinned(&self, spans: usize) -> Densities {
        let Some(&last) = self.times.last().filter(|_| spans > 0 && self.times.len() > spans) else {
            return self.clone();
        };
        let times = equal_spans(last, spans);
        let mean = |density: &[f64]| means(&times, &self.times, density);
        Densities { target: mean(&self.target), blend: mean(&self.blend), times }
    }
}

fn over_updates(updates: &Updates, at: u64, weights: &[f64], profile: &Profile) -> Densities {
    let mut blend = vec![0.0; updates.times.len()];
    for (chain, decays) in updates.decays.iter().enumerate() {
        updates.add_blend(&mut blend, weights, chain, decays);
    }
    let per_time =
        |shares: Vec<f64>| -> Vec<f64> { shares.iter().zip(&updates.intervals).map(|(s, delta)| s / delta).collect() };
    Densities {
        times: updates.times.iter().map(|&time| time as f64).collect(),
        target: per_time(updates.target(profile, at)),
        blend: per_time(blend),
    }
}

fn over_equal_spans(at: u64, sources: &[ChainSource], weights: &[f64], profile: &Profile) -> Result<Densities> {
    let powers: Vec<(f64, f64)> = sources.iter().map(power_function).collect::<Result<_>>()?;
    let profiles: Vec<Profile> = powers.iter().map(|&(gamma, _)| Profile::gamma(gamma)).collect::<Result<_>>()?;
    let blended = |time: f64| -> f64 {
        let shares = profiles.iter().zip(&powers).map(|(profile, &(_, step))| profile.cumulative(time, step));
        shares.zip(weights).map(|(share, weight)| share * weight).sum()
    };
    let times = equal_spans(at as f64, SPANS);
    Ok(Densities {
        target: slopes(&times, |time| profile.cumulative(time, at as f64)),
        blend: slopes(&times, blended),
        times,
    })
}

/// Returns the ends of `n` equal spans from 0 to `last`.
fn equal_spans(last: f64, n: usize) -> Vec<f64> {
    (1..=n).map(|i| if i == n { last } else { last * i as f64 / n as f64 }).collect()
}

/// Returns the slope of a cumulative share on each span, per unit of time.
fn slopes(times: &[f64], share: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut previous_time = 0.0;
    let mut previous_share = share(0.0);
    let mut slopes = Vec::with_capacity(times.len());
    for &time in times {
        let share = share(time);
        slopes.push((share - previous_share) / (time - previous_time));
        previous_time = time;
        previous_share = share;
    }
    slopes
}

/// Averages a density with spans ending at `times` over the spans ending at `ends`.
fn means(ends: &[f64], times: &[f64], density: &[f64]) -> Vec<f64> {
    let mut i = 0;
    let mut from = 0.0;
    let mut means = Vec::with_capacity(ends.len());
    for &end in ends {
        let start = from;
        let mut area = 0.0;
        while i < times.len() && times[i] <= end {
            area += density[i] * (times[i] - from);
            from = times[i];
            i += 1;
        }
        if i < times.len() {
            area += density[i] * (end - from);
            from = end;
        }
        means.push(area / (end - start));
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::{Chain, Schedule, System};

    fn sources(steps: &[u64]) -> Vec<ChainSource> {
        let source = |sigma_rel: f64, step: u64| ChainSource {
            chain: Chain::Tracked(Profile::sigma_rel(sigma_rel).unwrap()),
            step,
            label: format!("{sigma_rel} at {step}"),
        };
        [0.05, 0.28].iter().flat_map(|&sigma_rel| steps.iter().map(move |&step| source(sigma_rel, step))).collect()
    }

    fn areas(densities: &Densities) -> (f64, f64) {
        let area = |density: &[f64]| {
            let mut before = 0.0;
            let mass = |(time, value): (&f64, &f64)| {
                let mass = value * (time - before);
                before = *time;
                mass
            };
            densities.times.iter().zip(density).map(mass).sum()
        };
        (area(&densities.target), area(&densities.blend))
    }

    /// Compares with the sum of each source's weights on the updates.
    #[test]
    fn blend_density_equals_the_sum_of_its_sources() {
        let history = Schedule { update_every: 7, ..Schedule::default() }.updates(5000).unwrap();
        let sources = sources(&[1000, 3000, 5000]);
        let weights = [0.5, -0.25, 0.125, 0.25, 0.5, -0.125];
        let profile = Profile::sigma_rel(0.15).unwrap();
        let densities = Densities::new(Some(&history), 5000, &sources, &weights, &profile).unwrap();
        let times = history.times();
        let mut sum = vec![0.0; times.len()];
        for (source, weight) in sources.iter().zip(weights) {
            for (k, share) in source.chain.weights(history.until(source.step).times().as_slice()).iter().enumerate() {
                sum[k] += weight * share;
            }
        }
        let mut before = 0;
        for (k, &time) in times.iter().enumerate() {
            let naive = sum[k] / (time - before) as f64;
            assert!((densities.blend[k] - naive).abs() <= 1e-15, "{time}: {} is not {naive}", densities.blend[k]);
            let mass = profile.cumulative(time as f64, 5000.0) - profile.cumulative(before as f64, 5000.0);
            let mass = mass / (time - before) as f64;
            assert!((densities.target[k] - mass).abs() <= 1e-15, "{time}: {} is not {mass}", densities.target[k]);
            before = time;
        }
    }

    #[test]
    fn norm_of_the_difference_equals_the_relative_error() {
        let history = Schedule::default().updates(20_000).unwrap();
        let sources = sources(&[5000, 10_000, 15_000, 20_000]);
        let profile = Profile::sigma_rel(0.12).unwrap();
        let solution = System::new(&history, 20_000, &sources, 0.0).unwrap().solve(&profile).unwrap();
        let densities = Densities::new(Some(&history), 20_000, &sources, &solution.weights, &profile).unwrap();
        let square = |values: &[f64]| values.iter().map(|v| 10.0 * v * v).sum::<f64>();
        let error = (square(&densities.difference()) / square(&densities.target)).sqrt();
        assert!((error / solution.relative_error - 1.0).abs() < 1e-9, "{error} is not {}", solution.relative_error);
    }

    #[test]
    fn thinning_keeps_areas() {
        let history = Schedule { update_every: 7, ..Schedule::default() }.updates(5000).unwrap();
        let sources = sources(&[2000, 5000]);
        let profile = Profile::sigma_rel(0.1).unwrap();
        let all = Densities::new(Some(&history), 5000, &sources, &[0.5, 0.25, -0.25, 0.5], &profile).unwrap();
        for spans in [1, 3, 64, 700] {
            let thin = all.thinned(spans);
            assert_eq!((thin.times.len(), thin.times.last()), (spans, Some(&5000.0)));
            let (target, blend) = areas(&thin);
            assert!((target - 1.0).abs() < 1e-12 && (blend - 1.0).abs() < 1e-12, "{spans}: {target} {blend}");
        }
        // The mean of a single span is its share; spans that are whole intervals keep every value.
        assert!((all.thinned(1).target[0] - 1.0 / 5000.0).abs() < 1e-15);
        assert_eq!(all.thinned(all.times.len()), all);
    }

    #[test]
    fn densities_without_a_history_equal_those_of_dense_updates() {
        let sources = sources(&[2500, 5000]);
        let profile = Profile::sigma_rel(0.1).unwrap();
        let weights = [0.1, 0.4, 0.2, 0.3];
        let closed = Densities::new(None, 5000, &sources, &weights, &profile).unwrap();
        let (target, blend) = areas(&closed);
        assert!((target - 1.0).abs() < 1e-12 && (blend - 1.0).abs() < 1e-12);
        // Updates at every step approach it, except near the few steps at which the densities jump.
        let history = Schedule { update_every: 1, ..Schedule::default() }.updates(5000).unwrap();
        let dense = Densities::new(Some(&history), 5000, &sources, &weights, &profile).unwrap().thinned(50);
        let closed = closed.thinned(50);
        for (a, b) in closed.blend.iter().zip(&dense.blend) {
            assert!((a - b).abs() <= 1e-2 * a.abs(), "{a} is not {b}");
        }
    }

    #[test]
    fn wrong_number_of_weights_is_an_error() {
        let profile = Profile::sigma_rel(0.1).unwrap();
        let text = Densities::new(None, 5000, &sources(&[5000]), &[1.0], &profile).unwrap_err().to_string();
        assert!(text.contains("1 weights were given for 2 snapshots"), "{text}");
    }
}
