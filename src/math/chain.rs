//! Chains: the decays that a running average was updated with.

use super::ema_chain::EmaChain;
use super::groups::Groups;
use super::profile::Profile;
use crate::error::{Error, Result};

/// Rule for the decays of a running average, update by update.
#[derive(Clone, Debug, PartialEq)]
pub enum Chain {
    /// A profile tracked exactly: the decay of an update at `t` after one at `s` is `F_t(s)`.
    Tracked(Profile),
    /// Chain of another tool: the decay of update `k = 1, 2, ...` follows a counter instead of the time,
    /// `(1 - 1/(stride k + offset))^(gamma+1)`. Update 0 copies the parameters.
    Counter {
        /// The exponent of the power function, less 1.
        gamma: f64,
        /// The counter's increment per update.
        stride: u64,
        /// The counter at update 0.
        offset: u64,
    },
    /// [`Chain::Counter`] with nitrous-ema's correction for the steps between updates.
    ///
    /// With `c = stride k + offset` the decay of update `k` is
    /// `((1 - 1/c)^(gamma+1) (1 - 1/(c + stride))^(gamma+1))^(stride/2)`: the geometric mean of the per-step decays at
    /// both ends, to the power of the number of steps.
    CorrectedCounter {
        /// The exponent of the power function, less 1.
        gamma: f64,
        /// The counter's increment per update.
        stride: u64,
        /// The counter at update 0.
        offset: u64,
    },
    /// Chain of an EMA of a known decay, whose updates may be some of the history's only.
    Ema(EmaChain),
    /// A raw checkpoint: the parameters of the newest update, without averaging.
    Raw,
}

/// The decay `beta_k` of each update, and `1 - beta_k`, computed separately to keep its digits.
#[derive(Clone, Debug)]
pub struct Decays {
    /// `beta_k`; 0 at the first update.
    pub beta: Vec<f64>,
    /// `1 - beta_k`; 1 at the first update.
    pub one_minus_beta: Vec<f64>,
}

impl Chain {
    /// Returns the decays of updates at increasing `times`.
    pub fn decays(&self, times: &[u64]) -> Decays {
        let one_minus_beta: Vec<f64> = (0..times.len()).map(|k| self.one_minus_beta(k, times)).collect();
        let beta = one_minus_beta.iter().map(|x| 1.0 - x).collect();
        Decays { beta, one_minus_beta }
    }

    /// Returns the decay of each group of updates: the product of the decays of its updates.
    ///
    /// # Errors
    /// [`Error::History`] for a decay by a counter, if updates are grouped and runs overlap.
    pub(super) fn group_decays(&self, groups: &Groups) -> Result<Decays> {
        if matches!(self, Chain::Tracked(_) | Chain::Ema(_) | Chain::Raw) || groups.are_single() {
            return Ok(self.decays(&groups.times));
        }
        if groups.overlap {
            let why = "runs of a long history overlap, which a decay by a counter does not allow".to_owned();
            return Err(Error::History(why));
        }
        let mut updates = 0.0;
        let mut decays = Decays { beta: Vec::new(), one_minus_beta: Vec::new() };
        for &count in &groups.counts {
            let ln_beta = if updates == 0.0 { f64::NEG_INFINITY } else { self.ln_group_decay(updates, count) };
            decays.beta.push(ln_beta.exp());
            decays.one_minus_beta.push(-ln_beta.exp_m1());
            updates += count;
        }
        Ok(decays)
    }

    /// Returns the logarithm of the product of the decays of `count` updates, the first of which has the index `k`.
    fn ln_group_decay(&self, k: f64, count: f64) -> f64 {
        match *self {
            Chain::Counter { gamma, stride, offset } => {
                (gamma + 1.0) * sum_of_ln_step_decays(stride as f64 * k + offset as f64, stride as f64, count)
            }
            Chain::CorrectedCounter { gamma, stride, offset } => {
                let steps = stride as f64;
                let counter = steps * k + offset as f64;
                let own = sum_of_ln_step_decays(counter, steps, count);
                let next = sum_of_ln_step_decays(counter + steps, steps, count);
                (gamma + 1.0) * steps / 2.0 * (own + next)
            }
            Chain::Tracked(_) | Chain::Ema(_) | Chain::Raw => f64::NEG_INFINITY,
        }
    }

    fn one_minus_beta(&self, k: usize, times: &[u64]) -> f64 {
        if k == 0 {
            return 1.0;
        }
        match self {
            Chain::Tracked(profile) => profile.one_minus_beta(times[k - 1] as f64, times[k] as f64),
            Chain::Counter { gamma, stride, offset } => {
                -((gamma + 1.0) * ln_step_decay(counter(*stride, k, *offset))).exp_m1()
            }
            Chain::CorrectedCounter { gamma, stride, offset } => {
                let counter = counter(*stride, k, *offset);
                let steps = *stride as f64;
                -((gamma + 1.0) * steps / 2.0 * (ln_step_decay(counter) + ln_step_decay(counter + steps))).exp_m1()
            }
            Chain::Ema(chain) => chain.one_minus_beta(times[k - 1], times[k]),
            Chain::Raw => 1.0,
        }
    }

    /// Returns the weight of each update in the average after the last one:
    /// `w_k = (1 - beta_k) prod_{k < j <= n} beta_j`.
    pub fn weights(&self, times: &[u64]) -> Vec<f64> {
        let Decays { beta, one_minus_beta: mut weights } = self.decays(times);
        let mut kept = 1.0;
        for k in (0..times.len()).rev() {
            weights[k] *= kept;
            kept *= beta[k];
        }
        weights
    }
}

fn counter(stride: u64, k: usize, offset: u64) -> f64 {
    stride as f64 * k as f64 + offset as f64
}

/// `ln(1 - 1/counter)`: the logarithm of one step's decay for `gamma = 0`.
fn ln_step_decay(counter: f64) -> f64 {
    (-1.0 / counter).ln_1p()
}

/// Most terms of a sum of logarithms that are added one by one.
const FEW: f64 = 32.0;

/// `sum_j ln(1 - 1/(counter + stride j))` over `count` terms.
///
/// Many terms are the middle one times their number, plus the first correction for its curvature. The next correction
/// is below the sum by the fourth power of the group's length relative to the counter.
fn sum_of_ln_step_decays(counter: f64, stride: f64, count: f64) -> f64 {
    if count <= FEW {
        return (0..count as u64).map(|j| ln_step_decay(counter + stride * j as f64)).sum();
    }
    let middle = counter + stride * (count - 1.0) / 2.0;
    let curvature = middle.powi(-2) - (middle - 1.0).powi(-2);
    count * (ln_step_decay(middle) + stride * stride * (count * count - 1.0) / 24.0 * curvature)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: [u64; 7] = [3, 10, 20, 21, 22, 40, 1000];

    #[test]
    fn weights_equal_profile_mass_between_updates() {
        for profile in [Profile::sigma_rel(0.05).unwrap(), Profile::gamma(0.0).unwrap(), Profile::beta(0.97).unwrap()] {
            let weights = Chain::Tracked(profile.clone()).weights(&TIMES);
            let mut before = 0.0;
            for (weight, time) in weights.iter().zip(TIMES) {
                let share = profile.cumulative(time as f64, 1000.0);
                assert!((weight - (share - before)).abs() < 1e-15, "{profile}");
                before = share;
            }
        }
    }

    #[test]
    fn weights_sum_to_one_for_every_chain() {
        let counter = Chain::Counter { gamma: 6.9, stride: 10, offset: 2 };
        let corrected = Chain::CorrectedCounter { gamma: 6.9, stride: 10, offset: 2 };
        for chain in [Chain::Tracked(Profile::sigma_rel(0.2).unwrap()), counter, corrected, Chain::Raw] {
            let sum: f64 = chain.weights(&TIMES).iter().sum();
            assert!((sum - 1.0).abs() < 1e-15, "{chain:?}: {sum}");
        }
        assert_eq!(Chain::Raw.weights(&TIMES)[6], 1.0);
    }

    /// Compares with loops written as in the sources of the tools.
    #[test]
    fn counter_decays_equal_the_loops_of_other_tools() {
        let gamma = 6.94_f64;
        let every = 10;
        let times: Vec<u64> = (0..500).map(|k| 1 + every * k).collect();
        let plain = Chain::Counter { gamma, stride: every, offset: 2 }.decays(&times).beta;
        let corrected = Chain::CorrectedCounter { gamma, stride: every, offset: 2 }.decays(&times).beta;
        assert_eq!((plain[0], corrected[0]), (0.0, 0.0));
        let mut step = 0_u64;
        let mut k = 0;
        while k < 500 {
            let before = step;
            step += 1;
            if !before.is_multiple_of(every) {
                continue;
            }
            let own = (step + 1) as f64;
            let next = (step + 1 + every) as f64;
            let beta = (1.0 - 1.0 / own).powf(1.0 + gamma);
            let both = (beta * (1.0 - 1.0 / next).powf(1.0 + gamma)).powf(every as f64 / 2.0);
            if k > 0 {
                assert!((plain[k] - beta).abs() < 1e-13, "{k}: {} is not {beta}", plain[k]);
                assert!((corrected[k] - both).abs() < 1e-13, "{k}: {} is not {both}", corrected[k]);
            }
            k += 1;
        }
        // Late in training the correction is near the exact decay; without it the average forgets ten times too slowly.
        let exact = Chain::Tracked(Profile::gamma(gamma).unwrap()).decays(&times);
        let corrected = Chain::CorrectedCounter { gamma, stride: every, offset: 2 }.decays(&times);
        let plain = Chain::Counter { gamma, stride: every, offset: 2 }.decays(&times);
        let exact = exact.one_minus_beta[499];
        assert!((corrected.one_minus_beta[499] / exact - 1.0).abs() < 0.01);
        assert!((plain.one_minus_beta[499] / exact - 0.1).abs() < 0.01);
    }
}
