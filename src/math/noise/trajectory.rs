//! How parameters move while a network trains, on average over its elements.

use super::super::gram::fading;
use super::super::solve::Updates;
use super::fit::{Pair, fit};
use super::kernels::Kernels;
use super::measure::Measured;

/// Pairs of snapshots count by this power of the share of the earlier one that the newest averages still hold: what counts is
/// how parameters moved in the time that is blended. Training slows down; what began as noise is forgotten soon by exact
/// averages, and hardly ever by those of tools that decay too slowly.
const MEMORY: i32 = 4;

/// The share of the roundings' difference by which a movement that was found beneath it may be wrong, because elements do
/// not move alike.
const DOUBT: f64 = 0.2;

/// Parameters that drift, walk at random and jump about: the mean square of a blend of them, of weights `d_k` whose sum
/// is 0, is
///
/// `v_l ((sum_k d_k t_k)^2 + bend / T) + v_r sum_j D_j^2 delta_j + v_w sum_k d_k^2`, `D_j = sum_{k >= j} d_k`.
///
/// A drift does not keep its direction for a whole training. Its velocity is taken to walk, by its own size over the
/// time `T` of the target: `bend` is the integral of the square of the second sum of `d` over time. Without it a blend could
/// be expected to follow any smooth movement that it need only follow along a straight line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trajectory {
    /// `v_l`: the mean square velocity, per step and step.
    pub drift: f64,
    /// `v_r`: the variance that a random walk gains per step.
    pub walk: f64,
    /// `v_w`: the variance of what each update sees independently of all others.
    pub white: f64,
}

impl Trajectory {
    /// The trajectory that explains the mean squares by which sources differ.
    ///
    /// Where parameters move in another way than the three, all variances are raised until no pair, by its weight, differs by more
    /// than is expected: too much movement costs a weaker regularisation than could be, too little a worse average than without.
    pub(super) fn fit(updates: &Updates, measured: &Measured) -> Trajectory {
        let kernels = Kernels::new(updates);
        let held = held(updates);
        let mark = |i: usize| updates.sources[i].1;
        let pair = |(i, j): (usize, usize)| Pair {
            forms: kernels.between(i, j),
            moved: measured.moved[(i, j)],
            sure: measured.moved[(i, j)] - DOUBT * measured.apart(i, j),
            weight: held[mark(i).min(mark(j))].powi(MEMORY),
        };
        let pairs = (0..measured.moved.ncols()).flat_map(|j| (0..j).map(move |i| (i, j)));
        let pairs: Vec<Pair> = pairs.map(pair).collect();
        let variances = fit(&pairs);
        let most = pairs.iter().map(|pair| pair.missed(variances)).fold(1.0, f64::max);
        let [drift, walk, white] = variances.map(|variance| variance * most);
        Trajectory { drift, walk, white }
    }

    /// The mean square of a blend of the parameters at `times`, whose weights sum to 0.
    pub(super) fn mean_square(&self, times: &[u64], weights: &[f64]) -> f64 {
        let newest = times.last().map_or(1.0, |&time| time as f64);
        let Sums { walked, mean_time, bend, squares } = sums(times, weights);
        self.drift * (mean_time * mean_time + bend / newest) + self.walk * walked + self.white * squares
    }
}

/// Of the averages at each mark, the largest share that the same chain still holds at the last mark.
fn held(updates: &Updates) -> Vec<f64> {
    let mut held = vec![0.0; updates.marks.len()];
    for decays in &updates.decays {
        let fades = fading(decays, &updates.marks);
        let mut share = 1.0;
        for mark in (0..held.len()).rev() {
            held[mark] = f64::max(held[mark], share);
            share *= mark.checked_sub(1).map_or(1.0, |before| fades[before]);
        }
    }
    held
}

/// What one pass over the updates sums up.
struct Sums {
    /// `sum_j D_j^2 delta_j`; the sums up to an update are those from it on but for the sign.
    walked: f64,
    /// `sum_k d_k t_k`, from the newest update back.
    mean_time: f64,
    /// The integral of `(sum_{t_k <= t} d_k (t - t_k))^2` over `t`.
    bend: f64,
    /// `sum_k d_k^2`.
    squares: f64,
}

fn sums(times: &[u64], weights: &[f64]) -> Sums {
    let newest = times.last().copied().unwrap_or(0);
    let mut sums = Sums { walked: 0.0, mean_time: 0.0, bend: 0.0, squares: 0.0 };
    let (mut first, mut second, mut before) = (0.0, 0.0, times.first().copied().unwrap_or(0));
    for (&time, &weight) in times.iter().zip(weights) {
        let delta = (time - before) as f64;
        sums.walked += first * first * delta;
        sums.bend += delta * (second * second + second * first * delta + first * first * delta * delta / 3.0);
        second += first * delta;
        first += weight;
        sums.mean_time -= weight * (newest - time) as f64;
        sums.squares += weight * weight;
        before = time;
    }
    sums
}
