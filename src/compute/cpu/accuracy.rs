//! Tests of the documented accuracy: over a million updates, a compensated average stays within 1e-7 of the weights'
//! RMS from an average in f64.

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;

use super::low_order::{NEAREST, decode, threshold};
use super::update::compensated;
use super::vectorised;

/// Averages of one element.
#[derive(Clone, Copy, Default)]
struct TrackedElement {
    centre: f64,
    exact: f64,
    plain: f32,
    high: f32,
    low: i16,
    /// Average whose term is rounded to the nearest unit, and this term.
    nearest: (f32, i16),
    /// Average whose low-order term is rounded to bf16, and this term.
    coarse: (f32, f32),
}

impl TrackedElement {
    #[inline(always)]
    fn update(&mut self, p: f32, weight: f64, threshold: u32) {
        let w = weight as f32;
        self.exact += weight * (f64::from(p) - self.exact);
        self.plain = w.mul_add(p - self.plain, self.plain);
        (self.high, self.low) = updated((self.high, self.low), p, w, threshold);
        self.nearest = updated(self.nearest, p, w, NEAREST);
        let (e, c) = self.coarse;
        let increment = w.mul_add(p - e, c);
        let sum = e + increment;
        self.coarse = (sum, bf16::from_f32(increment - (sum - e)).to_f32());
    }
}

#[inline(always)]
fn updated((high, low): (f32, i16), p: f32, weight: f32, threshold: u32) -> (f32, i16) {
    let (mut high, mut low) = ([high], [low]);
    compensated(&mut high, &mut low, &[p], weight, threshold);
    (high[0], low[0])
}

/// Distances from averages in f64, relative to the RMS of their values.
#[derive(Debug)]
struct Distances {
    compensated: f64,
    plain: f64,
    /// Distance of averages whose low-order term is rounded to the nearest unit.
    nearest: f64,
    /// Distance of averages whose low-order term is rounded to bf16.
    coarse: f64,
}

/// Returns a random number of the standard normal distribution (Box and Muller).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.random::<f64>()).cos()
}

/// Averages parameters of a dtype with the profile `gamma`. `parameter` returns a value, given the centre of the
/// element, a normal random number, and the number of the update, from 1 on.
fn distances(
    elements: usize,
    updates: u32,
    gamma: f64,
    dtype: Dtype,
    parameter: impl Fn(f64, f64, f64) -> f64,
) -> Distances {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut all = vec![TrackedElement::default(); elements];
    all.iter_mut().for_each(|element| element.centre = normal(&mut random));
    vectorised(
        #[inline(always)]
        || {
            for number in 1..=updates {
                let time = f64::from(number);
                let weight = 1.0 - ((time - 1.0) / time).powf(gamma + 1.0);
                for element in &mut all {
                    let value = parameter(element.centre, normal(&mut random), time);
                    let value = match dtype {
                        Dtype::F16 => f16::from_f64(value).to_f32(),
                        Dtype::BF16 => bf16::from_f64(value).to_f32(),
                        _ => value as f32,
                    };
                    element.update(value, weight, threshold(number.into()));
                }
            }
        },
    );
    let rms = |value: &dyn Fn(&TrackedElement) -> f64| all.iter().map(|e| value(e).powi(2)).sum::<f64>().sqrt();
    let size = rms(&|e| e.exact);
    let value = |(high, low)| f64::from(high) + f64::from(decode(high, low));
    Distances {
        compensated: rms(&|e| value((e.high, e.low)) - e.exact) / size,
        nearest: rms(&|e| value(e.nearest) - e.exact) / size,
        plain: rms(&|e| f64::from(e.plain) - e.exact) / size,
        coarse: rms(&|e| f64::from(e.coarse.0) + f64::from(e.coarse.1) - e.exact) / size,
    }
}

/// Parameters of 16 bits stay at one value for long, so each update rounds a bf16 term the same way.
#[test]
fn parameters_that_move_below_their_resolution_are_averaged_exactly() {
    let found = distances(256, 30_000, 0.17, Dtype::BF16, |centre, noise, _| centre + 1e-3 * noise);
    assert!(found.compensated < 1e-8, "{found:?}");
    assert!(found.coarse > 1e-7 && found.plain > 1e-6, "{found:?}");
}

#[test]
fn compensated_average_stays_within_1e_7_over_a_million_updates() {
    let check = |name, gamma, dtype, parameter: &dyn Fn(f64, f64, f64) -> f64| {
        let found = distances(16, 1_000_000, gamma, dtype, parameter);
        println!("{name}: {found:?}");
        assert!(found.compensated < 1e-7, "{name}: {found:?}");
        assert!(found.coarse > 1e-7 && found.plain > 1e-6, "{name}: {found:?}");
        found
    };
    check("noise of 0.001, bf16", 0.17, Dtype::BF16, &|centre, noise, _| centre + 1e-3 * noise);
    check("noise of 0.0001, f16", 0.17, Dtype::F16, &|centre, noise, _| centre + 1e-4 * noise);
    // The last increments are below half a unit.
    let settling = |centre: f64, _, time: f64| centre * (1.0 + 1e-3 * (-time / 1e3).exp());
    let found = check("settling, f32", 0.17, Dtype::F32, &settling);
    assert!(found.nearest > 1e-7, "{found:?}");
    check("at rest after 10, bf16", 0.0, Dtype::BF16, &|centre, _, time| {
        if time > 10.0 { centre } else { 0.9 * centre }
    });
}
