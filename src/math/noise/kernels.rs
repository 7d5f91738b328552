//! By how much two averages of one trajectory differ, for each way in which it may move.

use faer::Mat;

use super::super::chain::Decays;
use super::super::solve::Updates;

/// Covariances of the sources of a system, for a drift of velocity 1 a step, a random walk of variance 1 a step, and white
/// noise of variance 1 an update. Where the walk and the drift begin, at the first update, is common to all averages.
pub(super) struct Kernels {
    /// `sum_k p_k (t_k - t_1)` of each source: its drift.
    ages: Vec<f64>,
    walk: Mat<f64>,
    white: Mat<f64>,
}

impl Kernels {
    /// Recurrences over the updates, as for the Gram matrix: a chain's share of what came at or after update `k` is
    /// `A_k = sum_{l >= k} p_l`, which the next update makes `beta A_k + (1 - beta)`.
    pub(super) fn new(updates: &Updates) -> Kernels {
        let ages: Vec<Vec<f64>> = updates.decays.iter().map(|decays| ages(decays, updates)).collect();
        let walk = updates.pairs(|a, b| {
            let same = walked(&updates.decays[a], &updates.decays[b], updates);
            let ages = &ages[a];
            move |from: usize, fade: f64| fade * same[from] + (1.0 - fade) * ages[from]
        });
        Kernels {
            walk,
            white: updates.gram_over(&vec![1.0; updates.times.len()]),
            ages: updates.sources.iter().map(|&(chain, mark)| ages[chain][mark]).collect(),
        }
    }

    /// The mean squares by which two sources differ: drift, walk, white noise.
    pub(super) fn between(&self, i: usize, j: usize) -> [f64; 3] {
        let distance = |matrix: &Mat<f64>| (matrix[(i, i)] + matrix[(j, j)] - 2.0 * matrix[(i, j)]).max(0.0);
        [(self.ages[i] - self.ages[j]).powi(2), distance(&self.walk), distance(&self.white)]
    }
}

/// `sum_k p_k (t_k - t_1)` at each mark, which is also `sum_k A_k delta_k`.
fn ages(decays: &Decays, updates: &Updates) -> Vec<f64> {
    let mut age = 0.0;
    let step = |k: usize| {
        age = decays.decay[k] * age + decays.gain[k] * elapsed(updates, k);
        age
    };
    at_marks(updates, step)
}

/// `sum_k A_k B_k delta_k` of two chains at each mark.
fn walked(a: &Decays, b: &Decays, updates: &Updates) -> Vec<f64> {
    let (mut age_a, mut age_b, mut sum) = (0.0, 0.0, 0.0);
    let step = |k: usize| {
        let (beta_a, beta_b, gain_a, gain_b) = (a.decay[k], b.decay[k], a.gain[k], b.gain[k]);
        let elapsed = elapsed(updates, k);
        sum = beta_a * beta_b * sum + beta_a * gain_b * age_a + beta_b * gain_a * age_b + gain_a * gain_b * elapsed;
        age_a = beta_a * age_a + gain_a * elapsed;
        age_b = beta_b * age_b + gain_b * elapsed;
        sum
    };
    at_marks(updates, step)
}

fn elapsed(updates: &Updates, k: usize) -> f64 {
    (updates.times[k] - updates.times[0]) as f64
}

/// What `step` gives at each mark, when it is called for each update.
fn at_marks(updates: &Updates, step: impl FnMut(usize) -> f64) -> Vec<f64> {
    let all: Vec<f64> = (0..updates.times.len()).map(step).collect();
    updates.marks.iter().map(|&mark| all[mark]).collect()
}
