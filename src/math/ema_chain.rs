//! Chains of the averages that training loops keep: an EMA of a known decay, updated at a regular interval.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::conversion::beta_to_half_life;
use super::profile::Profile;
use crate::error::Result;

/// Most terms of a sum of logarithms that are added one by one.
const FEW: u64 = 32;

/// Growth of an EMA's decay over its first updates. `k = 1, 2, ...` counts the updates after the copy it began with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Ramp {
    /// The decay is `beta` from the first update on.
    #[default]
    Constant,
    /// `(1 + k)/(offset + k)`, at most `beta`: TensorFlow, latent diffusion and diffusers, with an offset of 10.
    Ratio {
        /// Number that is added to `k` in the denominator.
        offset: f64,
    },
    /// `1 - (1 + k/gamma)^-power`, at most `beta`: the warm-up of timm, diffusers and ema-pytorch's `EMA`.
    InverseGamma {
        /// Updates over which the decay grows.
        gamma: f64,
        /// Exponent; 2/3 in most tools.
        power: f64,
    },
    /// `beta (1 - exp(-k/tau))`: YOLO, with a `tau` of 2000.
    Exponential {
        /// Updates over which the decay grows.
        tau: f64,
    },
}

/// Parses `ratio[:OFFSET]`, `inverse-gamma[:GAMMA[:POWER]]` and `exponential:TAU`, with the defaults of the tools: an
/// offset of 10, a gamma of 1 and a power of 2/3.
impl FromStr for Ramp {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Ramp, String> {
        let error = || format!("`{text}` is not ratio[:OFFSET], inverse-gamma[:GAMMA[:POWER]] or exponential:TAU");
        let mut parts = text.split(':');
        let kind = parts.next().unwrap_or_default();
        let numbers: Vec<f64> = parts.map(str::parse).collect::<std::result::Result<_, _>>().map_err(|_| error())?;
        match (kind, numbers.as_slice()) {
            ("ratio", []) => Ok(Ramp::Ratio { offset: 10.0 }),
            ("ratio", &[offset]) => Ok(Ramp::Ratio { offset }),
            ("inverse-gamma", []) => Ok(Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 }),
            ("inverse-gamma", &[gamma]) => Ok(Ramp::InverseGamma { gamma, power: 2.0 / 3.0 }),
            ("inverse-gamma", &[gamma, power]) => Ok(Ramp::InverseGamma { gamma, power }),
            ("exponential", &[tau]) => Ok(Ramp::Exponential { tau }),
            _ => Err(error()),
        }
    }
}

/// Decay of an EMA at each of its updates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmaDecay {
    /// Decay at the end of the ramp, per update.
    pub beta: f64,
    /// Smallest decay; 0 for none.
    pub floor: f64,
    /// Growth at the start.
    pub ramp: Ramp,
}

impl EmaDecay {
    /// Returns the decay that is `beta` at each update.
    pub fn constant(beta: f64) -> EmaDecay {
        EmaDecay { beta, floor: 0.0, ramp: Ramp::Constant }
    }

    /// Checks that every decay is in `[0, 1)`.
    ///
    /// # Errors
    /// The parameter that is out of range, and the range.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { beta, floor, ramp } = *self;
        if !(beta > 0.0 && beta < 1.0) {
            return Err(format!("beta {beta}: a decay must be above 0 and below 1"));
        }
        if !(floor >= 0.0 && floor <= beta) {
            return Err(format!("the smallest decay {floor} must be from 0 to beta, {beta}"));
        }
        let parameters: &[(&str, f64, f64)] = match ramp {
            Ramp::Constant => &[],
            Ramp::Ratio { offset } => &[("offset", offset, 1.0)],
            Ramp::InverseGamma { gamma, power } => &[("gamma", gamma, 0.0), ("power", power, 0.0)],
            Ramp::Exponential { tau } => &[("tau", tau, 0.0)],
        };
        match parameters.iter().find(|(_, value, above)| !(value > above && value.is_finite())) {
            Some((name, value, above)) => Err(format!("the ramp's {name} {value} must be above {above} and finite")),
            None => Ok(()),
        }
    }

    /// Returns `1 - beta_k`, computed without a difference of numbers near 1.
    fn one_minus(&self, k: f64) -> f64 {
        let least = 1.0 - self.beta;
        let own = match self.ramp {
            Ramp::Constant => least,
            Ramp::Ratio { offset } => (offset - 1.0) / (offset + k),
            Ramp::InverseGamma { gamma, power } => (-power * (k / gamma).ln_1p()).exp(),
            Ramp::Exponential { tau } => least + self.beta * (-k / tau).exp(),
        };
        own.max(least).min(1.0 - self.floor)
    }

    /// Returns the updates at which the ramp reaches the floor and `beta`.
    fn kinks(&self) -> [f64; 2] {
        [1.0 - self.floor, 1.0 - self.beta].map(|one_minus| match self.ramp {
            Ramp::Ratio { offset } => (offset - 1.0) / one_minus - offset,
            Ramp::InverseGamma { gamma, power } => gamma * (-one_minus.ln() / power).exp_m1(),
            // The exponential ramp only approaches `beta`.
            Ramp::Exponential { tau } => -tau * (1.0 - self.floor / self.beta).ln(),
            Ramp::Constant => 0.0,
        })
    }
}

/// EMA that begins as a copy of the weights at `start`, and is updated every `every` steps from then on.
///
/// A history may have other updates too, which the average does not see. A `start` of 0 means the initial weights. They
/// count as those of the first update of the history.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmaChain {
    /// Decay of each update.
    pub decay: EmaDecay,
    /// Step of the copy.
    pub start: u64,
    /// Steps from update to update.
    pub every: u64,
}

impl EmaChain {
    /// Returns the profile of the average after the ramp: exponential, per step.
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) for a decay out of range.
    pub fn profile(&self) -> Result<Profile> {
        match self.every {
            1 => Profile::beta(self.decay.beta),
            every => Profile::half_life(every as f64 * beta_to_half_life(self.decay.beta)),
        }
    }

    /// Returns the number of updates up to a step, without the copy.
    fn count(&self, step: u64) -> u64 {
        step.saturating_sub(self.start) / self.every.max(1)
    }

    /// Returns 1 less the decay from one time of a history to the next.
    pub(super) fn one_minus_beta(&self, previous: u64, time: u64) -> f64 {
        if time <= self.start {
            return 1.0;
        }
        -self.ln_product(self.count(previous), self.count(time)).exp_m1()
    }

    /// Sums `ln beta_k` over `from < k <= to`.
    ///
    /// Long sums are taken over pieces that are short beside `k`, and that end where the decay has a kink.
    fn ln_product(&self, from: u64, to: u64) -> f64 {
        if self.decay.ramp == Ramp::Constant {
            return self.ln_beta(1.0) * (to - from) as f64;
        }
        let kinks = self.decay.kinks();
        let mut sum = 0.0;
        let mut at = from;
        while at < to {
            let mut end = at.saturating_add(FEW.max(at / 16)).min(to);
            for kink in kinks {
                // The last update before the kink. The conversion saturates.
                let kink = (kink.ceil() - 1.0) as u64;
                if at < kink && kink < end {
                    end = kink;
                }
            }
            sum += self.ln_piece(at, end);
            at = end;
        }
        sum
    }

    /// Sums over a piece in which the logarithm is smooth, with Gauss's three points, moved to the exact variance of
    /// whole numbers.
    fn ln_piece(&self, from: u64, to: u64) -> f64 {
        let count = (to - from) as f64;
        if to - from <= FEW {
            return (from + 1..=to).map(|k| self.ln_beta(k as f64)).sum();
        }
        let middle = (from as f64 + to as f64 + 1.0) / 2.0;
        let apart = ((count * count - 1.0) * 0.15).sqrt();
        let outer = self.ln_beta(middle - apart) + self.ln_beta(middle + apart);
        count * (4.0 * self.ln_beta(middle) + 2.5 * outer) / 9.0
    }

    fn ln_beta(&self, k: f64) -> f64 {
        (-self.decay.one_minus(k)).ln_1p()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Chain;
    use super::*;

    fn ramps() -> [Ramp; 4] {
        [
            Ramp::Constant,
            Ramp::Ratio { offset: 10.0 },
            Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 },
            Ramp::Exponential { tau: 2000.0 },
        ]
    }

    /// Returns the decay as the sources of the tools compute it.
    fn decay(decay: &EmaDecay, k: f64) -> f64 {
        let own = match decay.ramp {
            Ramp::Constant => decay.beta,
            Ramp::Ratio { offset } => (1.0 + k) / (offset + k),
            Ramp::InverseGamma { gamma, power } => 1.0 - (1.0 + k / gamma).powf(-power),
            Ramp::Exponential { tau } => decay.beta * (1.0 - (-k / tau).exp()),
        };
        own.min(decay.beta).max(decay.floor)
    }

    /// Runs the loop of an EMA: the weight of each step's parameters in it.
    fn response(chain: &EmaChain, steps: u64) -> Vec<f64> {
        let mut weights = vec![0.0; steps as usize + 1];
        weights[chain.start as usize] = 1.0;
        let mut k = 0.0;
        for step in (chain.start + chain.every..=steps).step_by(chain.every as usize) {
            k += 1.0;
            let beta = decay(&chain.decay, k);
            weights.iter_mut().for_each(|weight| *weight *= beta);
            weights[step as usize] += 1.0 - beta;
        }
        weights
    }

    #[test]
    fn weights_equal_the_loop_of_an_ema() {
        for ramp in ramps() {
            for (start, every, floor) in [(1, 1, 0.0), (101, 7, 0.0), (1, 10, 0.3), (100, 1, 0.9)] {
                let chain = EmaChain { decay: EmaDecay { beta: 0.99, floor, ramp }, start, every };
                // Every third step has an update of the history, those of the chain among them.
                let times: Vec<u64> =
                    (start..=2000).filter(|t| (t - start).is_multiple_of(every) || t.is_multiple_of(3)).collect();
                let weights = Chain::Ema(chain).weights(&times);
                let exact = response(&chain, 2000);
                for (weight, &time) in weights.iter().zip(&times) {
                    let difference = (weight - exact[time as usize]).abs();
                    assert!(difference <= 1e-13, "{chain:?} at {time}: {weight}");
                }
            }
        }
    }

    /// The response of a constant decay: `(1-beta) beta^(T-t)`, and `beta^T` of the initial weights.
    #[test]
    fn initial_weights_keep_their_share() {
        let beta = 0.999_f64;
        for every in [1, 10] {
            let chain = EmaChain { decay: EmaDecay::constant(beta), start: 0, every };
            let times: Vec<u64> = (1..=3000).filter(|t| *t == 1 || t % every == 0).collect();
            let weights = Chain::Ema(chain).weights(&times);
            let updates = 3000 / every;
            // With updates at each step, the initial weights count as those of step 1.
            let rest = if every == 1 { (1.0 - beta) * beta.powi(2999) } else { 0.0 };
            let initial = beta.powi(updates as i32);
            let difference = (weights[0] - rest - initial).abs();
            assert!(difference < 1e-14, "{every}: {difference}");
            let last = weights.len() - 1;
            assert!((weights[last - 5] - (1.0 - beta) * beta.powi(5)).abs() < 1e-15);
        }
    }

    #[test]
    fn sums_over_many_updates_equal_the_sum_of_each() {
        for ramp in ramps() {
            for (beta, floor) in [(0.9999, 0.0), (0.999, 0.5)] {
                let chain = EmaChain { decay: EmaDecay { beta, floor, ramp }, start: 0, every: 1 };
                for (from, to) in [(0, 200_000), (17, 90), (60_000, 130_000), (3, 3)] {
                    let exact: f64 = (from + 1..=to).map(|k| decay(&chain.decay, k as f64).ln()).sum();
                    let sum = chain.ln_product(from, to);
                    assert!((sum - exact).abs() <= 1e-7 * exact.abs(), "{chain:?} {from} {to}: {sum}, not {exact}");
                }
            }
        }
    }

    #[test]
    fn ramps_are_parsed_with_the_defaults_of_the_tools() {
        for (text, ramp) in [
            ("ratio", Ramp::Ratio { offset: 10.0 }),
            ("ratio:4", Ramp::Ratio { offset: 4.0 }),
            ("inverse-gamma", Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 }),
            ("inverse-gamma:2:0.75", Ramp::InverseGamma { gamma: 2.0, power: 0.75 }),
            ("exponential:2000", Ramp::Exponential { tau: 2000.0 }),
        ] {
            assert_eq!(text.parse(), Ok(ramp));
        }
        for text in ["", "linear", "exponential", "ratio:x", "ratio:1:2"] {
            assert!(text.parse::<Ramp>().unwrap_err().contains("exponential:TAU"), "{text}");
        }
    }

    #[test]
    fn decays_out_of_range_are_errors() {
        let decay = EmaDecay::constant(0.999);
        for (decay, expected) in [
            (EmaDecay::constant(1.0), "beta 1"),
            (EmaDecay::constant(f64::NAN), "beta NaN"),
            (EmaDecay { floor: 0.9999, ..decay }, "smallest decay 0.9999"),
            (EmaDecay { ramp: Ramp::Ratio { offset: 1.0 }, ..decay }, "offset 1"),
            (EmaDecay { ramp: Ramp::InverseGamma { gamma: 0.0, power: 1.0 }, ..decay }, "gamma 0"),
            (EmaDecay { ramp: Ramp::Exponential { tau: f64::INFINITY }, ..decay }, "tau inf"),
        ] {
            assert!(decay.check().unwrap_err().contains(expected), "{decay:?}");
        }
        assert!(decay.check().is_ok());
    }
}
