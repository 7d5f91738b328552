//! Targets averaged from raw parameters at some times, without running averages.
//!
//! | symbol | name | meaning |
//! | --- | --- | --- |
//! | `t_i` | `times` | when the parameters were stored, with `t_0 = 0` |
//! | `T` | `at` | the time of the target |
//! | `F` | [`Profile::cumulative`] | the target's share up to a time |
//! | `x_i` | `weights` | `F(t_i) - F(t_{i-1})`: the mass of the interval that ends at `t_i` |
//! | `r_k` | | the target's mass on a single step |

use super::Profile;
use crate::error::{Error, Result};

/// Largest number of even pieces that the time is cut into to compare two densities.
///
/// Pieces are single steps for trainings of up to a million steps.
const PIECES: u64 = 1 << 20;

/// Smallest ratio of a piece's distance from the target's time to its length.
///
/// The mass of the shortest targets is near that time, so it is cut into single steps at any length of training.
const FINENESS: u64 = 1 << 16;

/// The weights of stored parameters in a target, and the error that their number leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolution {
    /// `x_i` for each time at or before the target's; their sum is 1.
    pub weights: Vec<f64>,
    /// `||p - r|| / ||r||`: the distance of the density `x_i / (t_i - t_{i-1})` from the target's over single steps.
    pub relative_error: f64,
    /// Steps by which the mean time of the average is later than the target's. Each stored time ends its interval.
    pub lag: f64,
    /// `1 / sum_i x_i^2`: the number of equally weighted checkpoints that average noise as well.
    pub effective: f64,
}

impl Resolution {
    /// Gives each time the target's mass on the interval that it ends.
    ///
    /// `times` increase. The first interval starts at 0. The last time at or before `at` also gets the mass up to `at`;
    /// later times have no weight and no entry.
    ///
    /// # Errors
    /// [`Error::NoSource`] if no time is at or before `at`; [`Error::Parameter`] as in [`Profile::check_at`].
    pub fn new(profile: &Profile, times: &[u64], at: u64) -> Result<Resolution> {
        debug_assert!(times.is_sorted_by(|a, b| a < b), "times increase");
        let times = &times[..times.partition_point(|&time| time <= at)];
        let Some(last) = times.len().checked_sub(1) else {
            return Err(Error::NoSource {
                wanted: format!("checkpoint at or before step {at}"),
                remedy: "ask for a later step",
            });
        };
        profile.check_at(at as f64)?;
        let mut ends = times.to_vec();
        ends[last] = at;
        let starts = std::iter::once(0).chain(times.iter().copied());
        let intervals: Vec<(u64, u64)> = starts.zip(ends).collect();
        let share = |time: u64| profile.cumulative(time as f64, at as f64);
        let weights: Vec<f64> = intervals.iter().map(|&(start, end)| share(end) - share(start)).collect();
        let sums = StepSums::new(profile, &intervals, &weights, at);
        let age: f64 = weights.iter().zip(times).map(|(x, &time)| x * (at - time) as f64).sum();
        Ok(Resolution {
            relative_error: (sums.distance / sums.norm).sqrt(),
            lag: sums.age - age,
            effective: 1.0 / weights.iter().map(|x| x * x).sum::<f64>(),
            weights,
        })
    }
}

/// Sums over the single steps of a target.
#[derive(Default)]
struct StepSums {
    /// `||r||^2 = sum_k r_k^2`.
    norm: f64,
    /// `||p - r||^2`.
    distance: f64,
    /// `sum_k (T - k) r_k`. Ages are small near the target's time, so their sums keep their digits there.
    age: f64,
}

impl StepSums {
    fn new(profile: &Profile, intervals: &[(u64, u64)], weights: &[f64], at: u64) -> StepSums {
        let mut sums = StepSums::default();
        // Steps of an interval without mass have no mass.
        for (&(start, end), &weight) in intervals.iter().zip(weights).filter(|(_, weight)| **weight != 0.0) {
            sums.add(profile, (start, end), weight, at);
        }
        sums
    }

    /// Adds an interval in pieces, each with its mass spread evenly over its steps.
    fn add(&mut self, profile: &Profile, (start, end): (u64, u64), weight: f64, at: u64) {
        let density = weight / (end - start) as f64;
        let share = |time: u64| profile.cumulative(time as f64, at as f64);
        let mut from = start;
        let mut before = share(start);
        while from < end {
            let until = end.min(from + piece_length(from, at));
            let steps = (until - from) as f64;
            let after = share(until);
            let mass = after - before;
            self.norm += mass * mass / steps;
            self.distance += (mass / steps - density).powi(2) * steps;
            // Mean age of the steps in the piece; each step counts at its end.
            self.age += mass * ((at - until) as f64 + (steps - 1.0) / 2.0);
            from = until;
            before = after;
        }
    }
}

/// Returns the length of the piece that starts at `from`.
fn piece_length(from: u64, at: u64) -> u64 {
    at.div_ceil(PIECES).min((at - from) / FINENESS).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::{Shape, Window};

    fn profiles() -> Vec<Profile> {
        let window = Window::Fraction(0.4);
        vec![
            Profile::sigma_rel(0.1).unwrap(),
            Profile::gamma(0.0).unwrap(),
            Profile::half_life(300.0).unwrap(),
            Profile::uniform(window).unwrap(),
            Profile::linear(window).unwrap(),
            Profile::lr_decay(Shape::Linear, window).unwrap(),
            Profile::lr_decay(Shape::Cosine, window).unwrap(),
            Profile::lr_decay(Shape::OneMinusSqrt, window).unwrap(),
            Profile::table(vec![(0.0, 0.2), (0.5, 0.2), (0.9, 0.4), (1.0, 1.0)]).unwrap(),
        ]
    }

    /// Sums over single steps, by the definition: weights, relative error and lag.
    fn naive(profile: &Profile, times: &[u64], at: u64) -> (Vec<f64>, f64, f64) {
        let mass = |k: u64| profile.cumulative(k as f64, at as f64) - profile.cumulative((k - 1) as f64, at as f64);
        let mut weights = Vec::new();
        let mut density = Vec::new();
        let mut start = 0;
        for (i, &time) in times.iter().enumerate() {
            let end = if i + 1 == times.len() { at } else { time };
            let weight: f64 = (start + 1..=end).map(mass).sum();
            density.extend((start + 1..=end).map(|_| weight / (end - start) as f64));
            weights.push(weight);
            start = end;
        }
        let target: Vec<f64> = (1..=at).map(mass).collect();
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let distance = square(&mut density.iter().zip(&target).map(|(p, r)| p - r));
        let mean: f64 = target.iter().zip(1..).map(|(r, k)| r * f64::from(k)).sum();
        let average: f64 = weights.iter().zip(times).map(|(x, &time)| x * time as f64).sum();
        (weights, (distance / square(&mut target.iter().copied())).sqrt(), average - mean)
    }

    #[test]
    fn resolution_equals_the_sum_over_single_steps() {
        let times = [7, 100, 450, 500, 1200, 2000];
        for profile in profiles() {
            for at in [2000, 2001, 2345] {
                let found = Resolution::new(&profile, &times, at).unwrap();
                let (weights, relative_error, lag) = naive(&profile, &times, at);
                let close = |a: f64, b: f64, scale: f64| (a - b).abs() <= 1e-11 * scale;
                assert!(found.weights.iter().zip(&weights).all(|(&a, &b)| close(a, b, 1.0)), "{profile}: {found:?}");
                assert!(close(found.relative_error, relative_error, 1.0), "{profile}: {found:?}, {relative_error}");
                assert!(close(found.lag, lag, at as f64), "{profile}: {found:?}, {lag}");
                assert!(close(found.weights.iter().sum(), 1.0, 1.0));
            }
        }
    }

    #[test]
    fn checkpoint_at_every_step_has_no_error() {
        let times: Vec<u64> = (1..=500).collect();
        for profile in profiles() {
            let found = Resolution::new(&profile, &times, 500).unwrap();
            assert!(found.relative_error == 0.0 && found.lag.abs() < 1e-9, "{profile}: {found:?}");
        }
    }

    #[test]
    fn plain_mean_of_even_checkpoints_lags_by_half_an_interval() {
        let times: Vec<u64> = (1..=20).map(|i| 100 * i).collect();
        let found = Resolution::new(&Profile::uniform(Window::Fraction(0.5)).unwrap(), &times, 2000).unwrap();
        assert!(found.weights[..10].iter().all(|&x| x == 0.0));
        assert!(found.weights[10..].iter().all(|&x| (x - 0.1).abs() < 1e-15));
        // The mean of the 100 steps of an interval is 49.5 steps before its end. The density is met exactly.
        assert!((found.lag - 49.5).abs() < 1e-9 && found.relative_error < 1e-7, "{found:?}");
        assert!((found.effective - 10.0).abs() < 1e-9);
    }

    #[test]
    fn pieces_of_a_long_training_meet_the_closed_form() {
        // The density 2 tau/T^2 has the squared norm 4/(3 T). Of that, n even intervals lose n (2/T^2)^2 (T/n)^3 / 12,
        // a share of 1/(4 n^2). The target's mean is 2 T/3, plus half a step because each step counts at its end.
        let profile = Profile::linear(Window::Fraction(1.0)).unwrap();
        let n = 10u64;
        let interval = 10_000_000u64;
        let times: Vec<u64> = (1..=n).map(|i| i * interval).collect();
        let found = Resolution::new(&profile, &times, n * interval).unwrap();
        let expected = 0.5 / n as f64;
        assert!((found.relative_error - expected).abs() < 1e-6, "{found:?}");
        let mean: f64 = times.iter().zip(1..).map(|(&t, i)| t as f64 * (2.0 * f64::from(i) - 1.0) / 100.0).sum();
        let lag = mean - (2.0 / 3.0 * (n * interval) as f64 + 0.5);
        assert!((found.lag - lag).abs() < 1e-3, "{found:?} {lag}");
    }

    /// Short targets, in which the newest checkpoint, of age 0, has all the weight.
    ///
    /// The mean age is `beta / (1 - beta)` under a half-life, and `(w - 1) / 2` for the last `w` steps.
    #[test]
    fn short_targets_late_in_a_training_are_cut_into_single_steps() {
        let at = 1_000_000_000;
        let beta = 0.5f64.powf(1.0 / 20.0);
        for (profile, lag) in [
            (Profile::half_life(20.0).unwrap(), beta / (1.0 - beta)),
            (Profile::uniform(Window::Steps(50.0)).unwrap(), 24.5),
        ] {
            let found = Resolution::new(&profile, &[at / 2, at - 100_000, at], at).unwrap();
            assert!((found.lag - lag).abs() < 1e-6, "{found:?}, {lag}");
            assert!(found.relative_error > 0.99, "{found:?}");
        }
        // Longer targets, which include steps far from the target's time, agree with a training of a thousandth of the
        // length, in which no single step holds much mass.
        let steps = |scale: u64| [1, 2, 3, 4, 5].map(|i| i * 200_000 * scale);
        for profile in [0, 1, 3, 4, 5, 6].map(|i| profiles().swap_remove(i)) {
            let [short, long] =
                [1, 1000].map(|scale| Resolution::new(&profile, &steps(scale), at / 1000 * scale).unwrap());
            assert!((short.relative_error - long.relative_error).abs() < 1e-5, "{profile}: {short:?} {long:?}");
            assert!((short.lag / 1e6 - long.lag / 1e9).abs() < 1e-6, "{profile}: {short:?} {long:?}");
        }
    }

    #[test]
    fn window_within_one_checkpoint_has_a_large_error() {
        let found = Resolution::new(&Profile::half_life(20.0).unwrap(), &[1000, 2000], 2000).unwrap();
        assert!(found.effective < 1.001 && found.relative_error > 0.9, "{found:?}");
    }

    #[test]
    fn time_before_the_first_checkpoint_and_too_long_window_are_errors() {
        let profile = Profile::uniform(Window::Steps(50.0)).unwrap();
        let text = Resolution::new(&profile, &[100], 99).unwrap_err().to_string();
        assert!(text.contains("no checkpoint at or before step 99: ask for a later step"), "{text}");
        let text = Resolution::new(&profile, &[10, 20], 20).unwrap_err().to_string();
        assert!(text.contains("window = 50"), "{text}");
    }
}
