//! Comparison of synthesized averages with averages that were tracked directly.
//!
//! A synthesis gives update `k`, with weights `p_k`, the factor `x_k`; the target gives it `r_k`. Both factors sum to
//! 1, so a constant `c` can be subtracted from `p_k`. Cauchy-Schwarz then bounds the difference of every single weight:
//!
//! `|sum_k (x_k - r_k) (p_k - c)| <= ||x - r|| sqrt(sum_k delta_k (p_k - c)^2)`, `||a||^2 = sum_k a_k^2 / delta_k`
//!
//! Here `delta_k` is the number of steps since the update before. A plan predicts `||x - r|| / ||r||`.

use std::iter::zip;

use anyhow::{Result, ensure};
use candle_nn::VarMap;
use posthoc_ema::{At, Plan, Profile, Run, Tensors};

use crate::model;
use crate::track::{Tracked, Trajectory};

/// Differences for one length, each a root mean square over the weights.
pub struct Agreement {
    pub sigma_rel: f64,
    /// `||x - r|| / ||r||` as the plan predicts it.
    pub predicted_error: f64,
    /// Distance between the last weights and the tracked average, which is the scale of the other differences.
    pub distance: f64,
    /// Difference between the synthesized and the tracked average.
    pub difference: f64,
    /// Bound of that difference.
    pub allowed: f64,
    /// Largest difference of a single weight, as a share of its own bound.
    worst: f64,
}

impl Agreement {
    /// Checks the bound of every weight.
    ///
    /// # Errors
    /// If a single weight differs by more than the predicted error allows.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.worst <= 1.0,
            "sigma_rel {}: synthesized and tracked average differ by {:.2} times what the predicted error allows",
            self.sigma_rel,
            self.worst
        );
        Ok(())
    }
}

/// Synthesizes each length that was tracked directly, and compares the two averages.
pub fn measure(run: &Run, tracked: &Tracked, vars: &VarMap) -> Result<Vec<Agreement>> {
    let last = model::flatten(vars)?;
    let compare_length = |(sigma_rel, direct): &(f64, Tensors)| {
        let plan = run.plan(Profile::sigma_rel(*sigma_rel)?, At::Latest)?;
        let weights = Weights { last: &last, direct: &floats(direct)?, synthesized: &floats(&run.load(&plan)?)? };
        Ok(compare(*sigma_rel, &plan, &weights, &bounds(&plan, &tracked.trajectory)))
    };
    tracked.direct.iter().map(compare_length).collect()
}

/// All weights as flat lists, tensor after tensor in the order of their names.
struct Weights<'a> {
    last: &'a [f32],
    direct: &'a [f32],
    synthesized: &'a [f32],
}

fn compare(sigma_rel: f64, plan: &Plan, weights: &Weights<'_>, bounds: &[f64]) -> Agreement {
    let differences = || zip(weights.synthesized, weights.direct).map(|(&a, &b)| f64::from(a) - f64::from(b));
    let distances = zip(weights.last, weights.direct).map(|(&a, &b)| f64::from(a) - f64::from(b));
    Agreement {
        sigma_rel,
        predicted_error: plan.relative_error,
        distance: root_mean_square(distances),
        difference: root_mean_square(differences()),
        allowed: root_mean_square(bounds.iter().copied()),
        worst: zip(differences(), bounds)
            .map(|(difference, &bound)| share_of_bound(difference, bound))
            .fold(0.0, f64::max),
    }
}

/// Returns the share that a difference has of its bound, and infinity for NaN, which `f64::max` would ignore.
fn share_of_bound(difference: f64, bound: f64) -> f64 {
    let share = difference.abs() / bound.max(f64::MIN_POSITIVE);
    if share.is_nan() { f64::INFINITY } else { share }
}

/// Returns the bound for each weight: the profile's error, and the rounding of snapshots and results to f32.
fn bounds(plan: &Plan, trajectory: &Trajectory) -> Vec<f64> {
    let profile_error = plan.relative_error * target_norm(plan, &trajectory.times);
    let roundings = 2.0 + plan.weights.iter().map(|weight| weight.weight.abs()).sum::<f64>();
    let rounding = 0.5 * f64::from(f32::EPSILON) * roundings;
    zip(trajectory.norms(), trajectory.largest())
        .map(|(norm, largest)| profile_error * norm + rounding * largest)
        .collect()
}

/// Returns `||r||`; the factor `r_k` is the mass of the target's profile since the update before.
fn target_norm(plan: &Plan, times: &[u64]) -> f64 {
    let mut square = 0.0;
    let mut before = 0;
    let mut share = 0.0;
    for &time in times {
        let next = plan.profile.cumulative(time as f64, plan.at as f64);
        square += (next - share).powi(2) / (time - before) as f64;
        before = time;
        share = next;
    }
    square.sqrt()
}

fn floats(tensors: &Tensors) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (name, tensor) in tensors.iter() {
        let values = tensor.to_vec::<f32>();
        all.extend(values.ok_or_else(|| anyhow::anyhow!("tensor `{name}` is {}, not f32", tensor.dtype))?);
    }
    Ok(all)
}

fn root_mean_square(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1) as f64;
    (values.map(|value| value * value).sum::<f64>() / count).sqrt()
}
