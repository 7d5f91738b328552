//! Profiles as they are drawn: what a target and the blend that stands for it weigh, over the time of training.

use super::{Source, Updates, power_function};
use crate::error::{Error, Result};
use crate::math::{History, Profile};

/// Into how many equal spans the time is cut where there are no updates to tell the spans.
const SPANS: usize = 2000;

/// The densities of a target and of the blend that stands for it: piecewise constant, in shares per unit of time.
///
/// `sum_i target_i (times_i - times_{i-1})` is 1, and so it is for the blend.
#[derive(Clone, Debug, PartialEq)]
pub struct Densities {
    /// Where each span ends; the first begins at 0.
    pub times: Vec<f64>,
    /// The target's share per unit of time on each span.
    pub target: Vec<f64>,
    /// The blend's, which may be negative.
    pub blend: Vec<f64>,
}

impl Densities {
    /// The densities of `profile` at time `at` and of the sources blended with `weights`, one span for each interval
    /// between updates. Without a history, updates are taken as dense and spans are equal.
    ///
    /// # Errors
    /// [`Error::History`] where a source's step is no update, or where there is no history and a source is no tracked
    /// power function; [`Error::Parameter`] for a window longer than the time, and [`Error::Count`] unless there is one weight
    /// for each source.
    pub fn new(
        history: Option<&History>,
        at: u64,
        sources: &[Source],
        weights: &[f64],
        profile: &Profile,
    ) -> Result<Densities> {
        profile.check_at(at as f64)?;
        if weights.len() != sources.len() {
            let (found, expected) = (weights.len(), sources.len());
            return Err(Error::Count { items: "weights", found, owners: "snapshots", expected });
        }
        match history {
            Some(history) => Ok(over_updates(&Updates::new(history, at, sources)?, at, weights, profile)),
            None => over_equal_spans(at, sources, weights, profile),
        }
    }

    /// The blend's density less the target's.
    pub fn difference(&self) -> Vec<f64> {
        self.blend.iter().zip(&self.target).map(|(blend, target)| blend - target).collect()
    }

    /// The means over at most `spans` equal spans: all areas stay. What has no more spans is returned as it is.
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
        |shares: Vec<f64>| shares.iter().zip(&updates.intervals).map(|(share, delta)| share / delta).collect();
    Densities {
        times: updates.times.iter().map(|&time| time as f64).collect(),
        target: per_time(updates.target(profile, at)),
        blend: per_time(blend),
    }
}

fn over_equal_spans(at: u64, sources: &[Source], weights: &[f64], profile: &Profile) -> Result<Densities> {
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

/// The ends of `n` equal spans from 0 to `last`.
fn equal_spans(last: f64, n: usize) -> Vec<f64> {
    (1..=n).map(|i| if i == n { last } else { last * i as f64 / n as f64 }).collect()
}

/// By how much a cumulative share grows on each span, per unit of time.
fn slopes(times: &[f64], share: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut previous = (0.0, share(0.0));
    let slope = |&time: &f64| {
        let now = (time, share(time));
        let slope = (now.1 - previous.1) / (now.0 - previous.0);
        previous = now;
        slope
    };
    times.iter().map(slope).collect()
}

/// The means over the spans that end at `ends` of a density whose own spans end at `times`.
fn means(ends: &[f64], times: &[f64], density: &[f64]) -> Vec<f64> {
    let (mut i, mut from) = (0, 0.0);
    let mut mean = |&end: &f64| {
        let (start, mut area) = (from, 0.0);
        while i < times.len() && times[i] <= end {
            area += density[i] * (times[i] - from);
            from = times[i];
            i += 1;
        }
        if i < times.len() {
            area += density[i] * (end - from);
            from = end;
        }
        area / (end - start)
    };
    ends.iter().map(&mut mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::{Chain, Schedule, System};

    fn sources(steps: &[u64]) -> Vec<Source> {
        let source = |sigma_rel: f64, step: u64| Source {
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

    /// The oracle: each source's own weights on the updates, added up.
    #[test]
    fn a_blend_is_the_sum_of_its_sources() {
        let history = Schedule { update_every: 7, ..Schedule::default() }.updates(5000).unwrap();
        let sources = sources(&[1000, 3000, 5000]);
        let weights = [0.5, -0.25, 0.125, 0.25, 0.5, -0.125];
        let profile = Profile::sigma_rel(0.15).unwrap();
        let densities = Densities::new(Some(&history), 5000, &sources, &weights, &profile).unwrap();
        let times = history.times();
        let mut sum = vec![0.0; times.len()];
        for (source, weight) in sources.iter().zip(weights) {
            for (k, share) in source.chain.densities(history.until(source.step).times().as_slice()).iter().enumerate() {
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

    /// The relative error of a plan is the norm of the difference that is drawn.
    #[test]
    fn the_difference_has_the_size_of_the_error() {
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
        // A span's mean is its share, and where spans are whole intervals nothing is lost.
        assert!((all.thinned(1).target[0] - 1.0 / 5000.0).abs() < 1e-15);
        assert_eq!(all.thinned(all.times.len()), all);
    }

    #[test]
    fn without_a_history_profiles_are_continuous() {
        let sources = sources(&[2500, 5000]);
        let (profile, weights) = (Profile::sigma_rel(0.1).unwrap(), [0.1, 0.4, 0.2, 0.3]);
        let closed = Densities::new(None, 5000, &sources, &weights, &profile).unwrap();
        let (target, blend) = areas(&closed);
        assert!((target - 1.0).abs() < 1e-12 && (blend - 1.0).abs() < 1e-12);
        // An update at every step comes close to it, away from the few steps at which the densities jump.
        let history = Schedule { update_every: 1, ..Schedule::default() }.updates(5000).unwrap();
        let dense = Densities::new(Some(&history), 5000, &sources, &weights, &profile).unwrap().thinned(50);
        let closed = closed.thinned(50);
        for (a, b) in closed.blend.iter().zip(&dense.blend) {
            assert!((a - b).abs() <= 1e-2 * a.abs(), "{a} is not {b}");
        }
    }

    #[test]
    fn weights_of_other_sources_are_refused() {
        let profile = Profile::sigma_rel(0.1).unwrap();
        let text = Densities::new(None, 5000, &sources(&[5000]), &[1.0], &profile).unwrap_err().to_string();
        assert!(text.contains("1 weights were given for 2 snapshots"), "{text}");
    }
}
