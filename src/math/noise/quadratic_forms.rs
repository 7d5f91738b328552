//! Mean squares by which two averages of one trajectory differ, for each kind of movement.

use faer::Mat;

use super::super::chain::Decays;
use super::super::gram::at_marks;
use super::super::solve::Updates;

/// Covariances of the sources of a system, for unit movement of each kind.
///
/// The kinds are a drift of velocity 1 per step, a random walk of variance 1 per step, and white noise of variance 1
/// per update. Walk and drift start at the first update.
pub(super) struct QuadraticForms {
    /// `sum_k p_k (t_k - t_1)` of each source: its drift.
    ages: Vec<f64>,
    walk: Mat<f64>,
    white: Mat<f64>,
}

impl QuadraticForms {
    /// Computes recurrences over the updates, as for the Gram matrix.
    ///
    /// A chain's share of the updates from `k` on is `A_k = sum_{l >= k} p_l`; the next update changes it to
    /// `beta A_k + (1 - beta)`.
    pub(super) fn new(updates: &Updates) -> QuadraticForms {
        let ages: Vec<Vec<f64>> = updates.decays.iter().map(|decays| ages_at_marks(decays, updates)).collect();
        let walk = updates.pairs(|a, b| {
            let covariances = walk_at_marks(&updates.decays[a], &updates.decays[b], updates);
            let ages = &ages[a];
            move |from: usize, decay: f64| decay * covariances[from] + (1.0 - decay) * ages[from]
        });
        QuadraticForms {
            walk,
            white: updates.gram_over(&updates.counts),
            ages: updates.sources.iter().map(|&(chain, mark)| ages[chain][mark]).collect(),
        }
    }

    /// Returns the mean squares by which two sources differ: drift, walk, white noise.
    pub(super) fn between(&self, i: usize, j: usize) -> [f64; 3] {
        [(self.ages[i] - self.ages[j]).powi(2), squared_distance(&self.walk, i, j), squared_distance(&self.white, i, j)]
    }
}

fn squared_distance(covariance: &Mat<f64>, i: usize, j: usize) -> f64 {
    (covariance[(i, i)] + covariance[(j, j)] - 2.0 * covariance[(i, j)]).max(0.0)
}

/// Returns `sum_k p_k (t_k - t_1) = sum_k A_k delta_k` at each mark.
fn ages_at_marks(decays: &Decays, updates: &Updates) -> Vec<f64> {
    let mut age = 0.0;
    at_marks(&updates.marks, |k| {
        age = decays.beta[k] * age + decays.one_minus_beta[k] * elapsed(updates, k);
        age
    })
}

/// Returns `sum_k A_k B_k delta_k` of two chains at each mark: the covariance of their averages of a random walk.
fn walk_at_marks(a: &Decays, b: &Decays, updates: &Updates) -> Vec<f64> {
    let mut age_a = 0.0;
    let mut age_b = 0.0;
    let mut sum = 0.0;
    at_marks(&updates.marks, |k| {
        let (beta_a, new_a) = (a.beta[k], a.one_minus_beta[k]);
        let (beta_b, new_b) = (b.beta[k], b.one_minus_beta[k]);
        let elapsed = elapsed(updates, k);
        sum = beta_a * beta_b * sum + beta_a * new_b * age_a + beta_b * new_a * age_b + new_a * new_b * elapsed;
        age_a = beta_a * age_a + new_a * elapsed;
        age_b = beta_b * age_b + new_b * elapsed;
        sum
    })
}

/// Returns the steps from the first update to update `k`.
fn elapsed(updates: &Updates, k: usize) -> f64 {
    (updates.times[k] - updates.times[0]) as f64
}
