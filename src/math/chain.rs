//! Chains: what a running average really holds.

use super::profile::Profile;

/// The decays of a running average, update by update.
#[derive(Clone, Debug, PartialEq)]
pub enum Chain {
    /// A profile tracked exactly: the decay of an update at `t` after one at `s` is `F_t(s)`.
    Tracked(Profile),
    /// What other tools wrote: the decay of update `k = 1, 2, ...` follows a counter, not the time:
    /// `(1 - 1/(stride k + offset))^(gamma+1)`; update 0 copies the parameters.
    Counter {
        /// The exponent of the power function, less 1.
        gamma: f64,
        /// By how much the counter grows from update to update.
        stride: u64,
        /// The counter at update 0.
        offset: u64,
    },
    /// As [`Chain::Counter`], with nitrous-ema's correction for the updates that it leaves out. With `c = stride k + offset`
    /// the decay of update `k` is `((1 - 1/c)^(gamma+1) (1 - 1/(c + stride))^(gamma+1))^(stride/2)`: a step's decay to the
    /// power of the steps, a step being the geometric mean of those at both ends.
    CorrectedCounter {
        /// The exponent of the power function, less 1.
        gamma: f64,
        /// By how much the counter grows from update to update.
        stride: u64,
        /// The counter at update 0.
        offset: u64,
    },
    /// No average at all: the parameters of the newest update, a raw checkpoint.
    Raw,
}

/// The decay `beta_k` of each update and `1 - beta_k`, which is computed on its own to keep its digits.
#[derive(Clone, Debug)]
pub struct Decays {
    /// `beta_k`; 0 at the first update.
    pub decay: Vec<f64>,
    /// `1 - beta_k`; 1 at the first update.
    pub gain: Vec<f64>,
}

impl Chain {
    /// The decays of updates at `times`, which grow.
    pub fn decays(&self, times: &[u64]) -> Decays {
        let gain: Vec<f64> = (0..times.len()).map(|k| self.gain(k, times)).collect();
        let decay = gain.iter().map(|gain| 1.0 - gain).collect();
        Decays { decay, gain }
    }

    fn gain(&self, k: usize, times: &[u64]) -> f64 {
        if k == 0 {
            return 1.0;
        }
        match self {
            Chain::Tracked(profile) => profile.gain(times[k - 1] as f64, times[k] as f64),
            Chain::Counter { gamma, stride, offset } => {
                -((gamma + 1.0) * ln_step(counter(*stride, k, *offset))).exp_m1()
            }
            Chain::CorrectedCounter { gamma, stride, offset } => {
                let (counter, steps) = (counter(*stride, k, *offset), *stride as f64);
                -((gamma + 1.0) * steps / 2.0 * (ln_step(counter) + ln_step(counter + steps))).exp_m1()
            }
            Chain::Raw => 1.0,
        }
    }

    /// `w_k = (1 - beta_k) prod_{k < j <= n} beta_j`: the weight of each update in the average after the last.
    pub fn densities(&self, times: &[u64]) -> Vec<f64> {
        let Decays { decay, mut gain } = self.decays(times);
        let mut kept = 1.0;
        for k in (0..times.len()).rev() {
            gain[k] *= kept;
            kept *= decay[k];
        }
        gain
    }
}

fn counter(stride: u64, k: usize, offset: u64) -> f64 {
    stride as f64 * k as f64 + offset as f64
}

/// `ln(1 - 1/counter)`: what one step keeps, for `gamma = 0`.
fn ln_step(counter: f64) -> f64 {
    (-1.0 / counter).ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: [u64; 7] = [3, 10, 20, 21, 22, 40, 1000];

    #[test]
    fn weights_are_the_profile_mass_between_updates() {
        for profile in [Profile::sigma_rel(0.05).unwrap(), Profile::gamma(0.0).unwrap(), Profile::beta(0.97).unwrap()] {
            let weights = Chain::Tracked(profile.clone()).densities(&TIMES);
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
            let sum: f64 = chain.densities(&TIMES).iter().sum();
            assert!((sum - 1.0).abs() < 1e-15, "{chain:?}: {sum}");
        }
        assert_eq!(Chain::Raw.densities(&TIMES)[6], 1.0);
    }

    /// The loops of the tools, as their sources have them.
    #[test]
    fn decays_by_a_counter_are_those_of_the_tools() {
        let (gamma, every) = (6.94_f64, 10);
        let times: Vec<u64> = (0..500).map(|k| 1 + every * k).collect();
        let plain = Chain::Counter { gamma, stride: every, offset: 2 }.decays(&times).decay;
        let corrected = Chain::CorrectedCounter { gamma, stride: every, offset: 2 }.decays(&times).decay;
        assert_eq!((plain[0], corrected[0]), (0.0, 0.0));
        let (mut step, mut k) = (0_u64, 0);
        while k < 500 {
            let before = step;
            step += 1;
            if before % every != 0 {
                continue;
            }
            let (own, next) = ((step + 1) as f64, (step + 1 + every) as f64);
            let beta = (1.0 - 1.0 / own).powf(1.0 + gamma);
            let both = (beta * (1.0 - 1.0 / next).powf(1.0 + gamma)).powf(every as f64 / 2.0);
            if k > 0 {
                assert!((plain[k] - beta).abs() < 1e-13, "{k}: {} is not {beta}", plain[k]);
                assert!((corrected[k] - both).abs() < 1e-13, "{k}: {} is not {both}", corrected[k]);
            }
            k += 1;
        }
        // The correction comes near to what an exact average has late in training; without it a tenth is forgotten.
        let exact = Chain::Tracked(Profile::gamma(gamma).unwrap()).decays(&times);
        let corrected = Chain::CorrectedCounter { gamma, stride: every, offset: 2 }.decays(&times);
        let plain = Chain::Counter { gamma, stride: every, offset: 2 }.decays(&times);
        assert!((corrected.gain[499] / exact.gain[499] - 1.0).abs() < 0.01);
        assert!((plain.gain[499] / exact.gain[499] - 0.1).abs() < 0.01);
    }
}
