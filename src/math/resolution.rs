//! Targets averaged from raw parameters at some times, without running averages.
//!
//! | symbol | name | meaning |
//! | --- | --- | --- |
//! | `t_i` | `times` | when the parameters were stored, with `t_0 = 0` |
//! | `T` | `at` | the time of the target |
//! | `F` | [`Profile::cumulative`] | the target's share up to a time |
//! | `x_i` | `weights` | `F(t_i) - F(t_{i-1})`: the mass of the interval that ends at `t_i` |
//! | `P(k)` | | the average's share up to step `k`: the sum of the `x_i` with `t_i <= k` |
//!
//! All sums over single steps are over the steps `k` from 0 to `T - 1`.

use super::Profile;
use crate::error::{Error, Result};

/// Largest number of even pieces that the time is cut into to compare two densities.
///
/// Pieces are single steps for trainings of up to a million steps.
const PIECES: u64 = 1 << 20;

/// Smallest ratio of a piece's distance from the target's time, and from its edge, to its length.
///
/// The mass of the shortest targets is near their time, and the slope of a `1-sqrt` decay is infinite at its edge. Both
/// are cut into single steps at any length of training.
const FINENESS: u64 = 1 << 16;

/// The weights of stored parameters in a target, and the error that their number leaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolution {
    /// `x_i` for each time at or before the target's; their sum is 1.
    pub weights: Vec<f64>,
    /// `sqrt(sum_k (P(k) - F(k))^2 / sum_k F(k)^2)`.
    ///
    /// It is the distance of the average from the target for parameters that walk at random, relative to that of the
    /// newest parameters. It is 1 if the newest parameters have all the weight, and 0 if each step is stored.
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
        let starts: Vec<u64> = std::iter::once(0).chain(times.iter().copied()).collect();
        let share = |time: u64| profile.cumulative(time as f64, at as f64);
        let end = |i: usize| if i == last { at } else { times[i] };
        let weights: Vec<f64> = (0..times.len()).map(|i| share(end(i)) - share(starts[i])).collect();
        let sums = StepSums::new(profile, &starts, at);
        let age: f64 = weights.iter().zip(times).map(|(x, &time)| x * (at - time) as f64).sum();
        // Without a share before its time, the target is the newest parameters.
        let relative_error = if sums.target > 0.0 { (sums.distance / sums.target).sqrt() } else { 0.0 };
        Ok(Resolution {
            relative_error,
            lag: sums.age - age,
            effective: 1.0 / weights.iter().map(|x| x * x).sum::<f64>(),
            weights,
        })
    }
}

/// Sums over the single steps before a target's time.
#[derive(Default)]
struct StepSums {
    /// `sum_k F(k)^2`.
    target: f64,
    /// `sum_k (P(k) - F(k))^2`.
    distance: f64,
    /// `sum_k F(k)`: the mean age of the target.
    age: f64,
}

impl StepSums {
    /// Sums over the intervals that start at `starts` and end at the next one, the last one at `at`.
    fn new(profile: &Profile, starts: &[u64], at: u64) -> StepSums {
        let edge = profile.edge(at as f64).max(0.0) as u64;
        let mut sums = StepSums::default();
        for (i, &start) in starts.iter().enumerate() {
            let (end, reached) = match starts.get(i + 1) {
                Some(&end) => (end, profile.cumulative(start as f64, at as f64)),
                // The newest stored parameters have all that is left.
                None => (at, 1.0),
            };
            sums.add(profile, (start, end), reached, (edge, at));
        }
        sums
    }

    /// Adds an interval, over which the average has the share `reached`, in pieces on which `F` is nearly a line.
    fn add(&mut self, profile: &Profile, (start, end): (u64, u64), reached: f64, (edge, at): (u64, u64)) {
        let mut from = start.max(edge.min(end));
        let share = |time: u64| profile.cumulative(time as f64, at as f64);
        // The share before the edge is 0.
        self.distance += reached * reached * (from - start) as f64;
        let mut before = share(from);
        while from < end {
            let until = end.min(from + piece_length(from, edge, at));
            let steps = (until - from) as f64;
            let after = share(until);
            let mass = after - before;
            self.target += square_of_line(before, mass, steps);
            self.distance += square_of_line(before - reached, mass, steps);
            self.age += before * steps + mass * (steps - 1.0) / 2.0;
            from = until;
            before = after;
        }
    }
}

/// `sum_j (first + rise j / steps)^2` over `j` from 0 to `steps - 1`.
fn square_of_line(first: f64, rise: f64, steps: f64) -> f64 {
    let linear = first * rise * (steps - 1.0);
    first * first * steps + linear + rise * rise * (steps - 1.0) * (2.0 * steps - 1.0) / (6.0 * steps)
}

/// Returns the length of the piece that starts at `from`: short near the target's time and after its edge.
fn piece_length(from: u64, edge: u64, at: u64) -> u64 {
    at.div_ceil(PIECES).min((at - from) / FINENESS).min((from - edge) / FINENESS).max(1)
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
        let mut start = 0;
        for (i, &time) in times.iter().enumerate() {
            let end = if i + 1 == times.len() { at } else { time };
            weights.push((start + 1..=end).map(mass).sum::<f64>());
            start = end;
        }
        let mut target = 0.0;
        let mut distance = 0.0;
        for k in 0..at {
            let share = profile.cumulative(k as f64, at as f64);
            let reached: f64 = weights.iter().zip(times).filter(|(_, time)| **time <= k).map(|(x, _)| x).sum();
            target += share * share;
            distance += (reached - share).powi(2);
        }
        let mean: f64 = (1..=at).map(|k| mass(k) * k as f64).sum();
        let average: f64 = weights.iter().zip(times).map(|(x, &time)| x * time as f64).sum();
        (weights, (distance / target).sqrt(), average - mean)
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
            assert!(found.relative_error < 1e-7 && found.lag.abs() < 1e-9, "{profile}: {found:?}");
        }
    }

    #[test]
    fn plain_mean_of_even_checkpoints_lags_by_half_an_interval() {
        let times: Vec<u64> = (1..=20).map(|i| 100 * i).collect();
        let found = Resolution::new(&Profile::uniform(Window::Fraction(0.5)).unwrap(), &times, 2000).unwrap();
        assert!(found.weights[..10].iter().all(|&x| x == 0.0));
        assert!(found.weights[10..].iter().all(|&x| (x - 0.1).abs() < 1e-15));
        // The mean of the 100 steps of an interval is 49.5 steps before its end. Ten steps of a share follow a line.
        assert!((found.lag - 49.5).abs() < 1e-9 && (found.relative_error - 0.1).abs() < 1e-3, "{found:?}");
        assert!((found.effective - 10.0).abs() < 1e-9);
    }

    #[test]
    fn pieces_of_a_long_training_meet_the_closed_form() {
        // The share x^2 has the squared norm T/5. Even intervals, each a stair below it, lose the sum over i of the
        // integral of (x^2 - (i/n)^2)^2. The target's mean is 2 T/3, plus half a step: each step counts at its end.
        let profile = Profile::linear(Window::Fraction(1.0)).unwrap();
        let n = 10u64;
        let interval = 10_000_000u64;
        let times: Vec<u64> = (1..=n).map(|i| i * interval).collect();
        let found = Resolution::new(&profile, &times, n * interval).unwrap();
        let stair = |a: f64, b: f64| {
            (b.powi(5) - a.powi(5)) / 5.0 - 2.0 * a * a * (b.powi(3) - a.powi(3)) / 3.0 + a.powi(4) * (b - a)
        };
        let lost: f64 = (0..n).map(|i| stair(i as f64 / n as f64, (i + 1) as f64 / n as f64)).sum();
        let expected = (5.0 * lost).sqrt();
        assert!((found.relative_error - expected).abs() < 1e-6, "{found:?}, {expected}");
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
            assert!((found.relative_error - 1.0).abs() < 1e-9, "{found:?}");
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

    /// The newest checkpoint has all the weight of a plain mean: the average is not nearer to it than that checkpoint.
    #[test]
    fn two_distant_checkpoints_are_no_average() {
        let found = Resolution::new(&Profile::gamma(0.0).unwrap(), &[1, 1_000_000_000], 1_000_000_000).unwrap();
        assert!((found.relative_error - 1.0).abs() < 1e-6 && (found.lag / 5e8 - 1.0).abs() < 1e-6, "{found:?}");
        // Even checkpoints have an error of one over their number, and a lag of half an interval.
        for count in [2u64, 5, 20, 100] {
            let times: Vec<u64> = (1..=count).map(|i| 1_000_000 * i).collect();
            let found = Resolution::new(&Profile::gamma(0.0).unwrap(), &times, 1_000_000 * count).unwrap();
            assert!((found.relative_error * count as f64 - 1.0).abs() < 1e-5, "{found:?}");
            assert!((found.lag / 5e5 - 1.0).abs() < 1e-5, "{found:?}");
        }
    }

    /// The mean age over a window `w` is `sum_k sqrt(k/w)`, by Euler and Maclaurin `2w/3 - 1/2 + zeta(-1/2)/sqrt(w)`.
    #[test]
    fn infinite_slope_at_the_start_of_a_decay_is_summed_exactly() {
        for (at, window) in [(1_000_000_000u64, 2e8), (1_000_000_000, 1e9), (3_000_000_000, 6e8)] {
            let profile = Profile::lr_decay(Shape::OneMinusSqrt, Window::Steps(window)).unwrap();
            let found = Resolution::new(&profile, &[at / 2, at], at).unwrap();
            let age = 2.0 * window / 3.0 - 0.5 - 0.207_886_225 / window.sqrt();
            let first = found.weights[0] * (at / 2) as f64;
            assert!((found.lag + first - age).abs() < 0.01, "{found:?}, {age}");
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
