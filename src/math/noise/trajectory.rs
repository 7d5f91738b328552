//! Movement of parameters during training, as means over their elements.

use super::super::gram::decay_between;
use super::super::solve::Updates;
use super::fit::{Pair, fit};
use super::measure::Measured;
use super::quadratic_forms::QuadraticForms;

/// Power of the held share by which a pair of snapshots is weighted.
///
/// The held share is the part of the newest averages that comes from the pair's earlier snapshot. Only movement within
/// the blended time counts, and earlier movement is larger because training slows down. Exact averages forget the noise
/// of the start soon; those of tools that decay too slowly hardly ever do.
const WEIGHT_POWER: i32 = 4;

/// Uncertainty of a measured movement, as a share of the mean square difference of the pair's rounding errors.
///
/// Movement below the rounding is uncertain because the elements of a group do not all move by the same amount.
const MOVEMENT_MARGIN: f64 = 0.2;

/// Variances of parameters that drift, walk at random and have white noise.
///
/// The mean square of a blend of them with weights `d_k`, whose sum is 0, is
///
/// `v_l ((sum_k d_k t_k)^2 + bend / T) + v_r sum_j D_j^2 delta_j + v_w sum_k d_k^2`, `D_j = sum_{k >= j} d_k`.
///
/// A drift does not keep its direction for a whole training. Its velocity is taken to walk by its own size over the
/// time `T` of the target: `bend` is the integral over time of the square of the second sum of `d`. Without `bend`,
/// only straight movement would count, and every blend would seem to follow curved movement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trajectory {
    /// `v_l`: the mean square velocity, per step and step.
    pub drift: f64,
    /// `v_r`: the variance that a random walk gains per step.
    pub walk: f64,
    /// `v_w`: the variance of the noise of each update, independent of all others.
    pub white: f64,
}

impl Trajectory {
    /// Fits the trajectory to the mean squares by which sources differ.
    ///
    /// If parameters move in another way, all variances are raised until no pair, by its weight, differs by more than
    /// expected. Too large variances make the regularisation weaker than the best; too small ones can make the average
    /// worse than without a regularisation.
    pub(super) fn fit(updates: &Updates, forms: &QuadraticForms, measured: &Measured) -> Trajectory {
        let held = held_shares(updates);
        let mut pairs = Vec::new();
        for j in 0..measured.moved.ncols() {
            for i in 0..j {
                let moved = measured.moved[(i, j)];
                let (_, mark_i) = updates.sources[i];
                let (_, mark_j) = updates.sources[j];
                pairs.push(Pair {
                    forms: forms.between(i, j),
                    moved,
                    certain: moved - MOVEMENT_MARGIN * measured.rounding_distance(i, j),
                    weight: held[mark_i.min(mark_j)].powi(WEIGHT_POWER),
                });
            }
        }
        let variances = fit(&pairs);
        let most = pairs.iter().map(|pair| pair.weighted_ratio(variances)).fold(1.0, f64::max);
        let [drift, walk, white] = variances.map(|variance| variance * most);
        Trajectory { drift, walk, white }
    }

    /// Returns the mean square of a blend of the parameters at `times`, whose weights sum to 0.
    ///
    /// `counts` are the numbers of updates that the times stand for.
    pub(super) fn mean_square(&self, times: &[u64], counts: &[f64], weights: &[f64]) -> f64 {
        let newest = times.last().map_or(1.0, |&time| time as f64);
        let TrajectorySums { walk, mean_time, bend, squares } = TrajectorySums::new(times, counts, weights);
        self.drift * (mean_time * mean_time + bend / newest) + self.walk * walk + self.white * squares
    }
}

/// Returns for each mark the largest share of an average there that the same chain still holds at the last mark.
fn held_shares(updates: &Updates) -> Vec<f64> {
    let mut held = vec![0.0; updates.marks.len()];
    for decays in &updates.decays {
        let between = decay_between(decays, &updates.marks);
        let mut share = 1.0;
        for mark in (0..held.len()).rev() {
            held[mark] = f64::max(held[mark], share);
            share *= mark.checked_sub(1).map_or(1.0, |previous| between[previous]);
        }
    }
    held
}

/// Sums of one pass over the updates.
struct TrajectorySums {
    /// `sum_j D_j^2 delta_j`. Sums up to an update differ from those from it on only in sign.
    walk: f64,
    /// `sum_k d_k t_k`, with times relative to the newest update.
    mean_time: f64,
    /// The integral of `(sum_{t_k <= t} d_k (t - t_k))^2` over `t`.
    bend: f64,
    /// `sum_k d_k^2`.
    squares: f64,
}

impl TrajectorySums {
    fn new(times: &[u64], counts: &[f64], weights: &[f64]) -> TrajectorySums {
        let newest = times.last().copied().unwrap_or(0);
        let mut previous = times.first().copied().unwrap_or(0);
        let mut sums = TrajectorySums { walk: 0.0, mean_time: 0.0, bend: 0.0, squares: 0.0 };
        let mut first_sum = 0.0;
        let mut second_sum = 0.0;
        for ((&time, &count), &weight) in times.iter().zip(counts).zip(weights) {
            let delta = (time - previous) as f64;
            let square = first_sum * first_sum;
            sums.walk += square * delta;
            sums.bend +=
                delta * (second_sum * second_sum + second_sum * first_sum * delta + square * delta * delta / 3.0);
            second_sum += first_sum * delta;
            first_sum += weight;
            sums.mean_time -= weight * (newest - time) as f64;
            sums.squares += weight * weight / count;
            previous = time;
        }
        sums
    }
}
