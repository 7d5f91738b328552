//! The effect of rounding on the movement between two values.
//!
//! A value between two stored neighbours, and the same value after a movement of `f u`, `0 <= f <= 1`, are rounded to
//! the same neighbour with probability `1 - f`. Over all values, the mean square of the rounded movement is the square
//! of the movement plus `u^2 h`, where `h` is `f (1 - f)` of the movement's fraction. For Gaussian movements of
//! standard deviation `s u` the Fourier series of `f (1 - f)` gives
//!
//! `h(s) = 1/6 - sum_n exp(-2 pi^2 n^2 s^2) / (pi^2 n^2)`.
//!
//! It is 0 for values that do not move, whose rounding errors are equal. It grows to 1/6 for values that move far,
//! whose rounding errors are independent.

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2, PI};
use std::sync::LazyLock;

/// `h` of independent rounding errors: twice the variance `u^2/12` of one.
pub(super) const INDEPENDENT: f64 = 1.0 / 6.0;

/// Mean square below which a movement reaches at most the next neighbour, so that `h(s) = s sqrt(2/pi) - s^2`.
const SHORT: f64 = 0.2;

/// Mean square above which rounding errors are independent to eight digits.
const FAR: f64 = 1.0;

/// `h` at evenly spaced mean squares from [`SHORT`] to [`FAR`].
static TABLE: LazyLock<Vec<f64>> = LazyLock::new(|| (0..=512).map(|i| solve(SHORT + i as f64 * SPACING)).collect());
const SPACING: f64 = (FAR - SHORT) / 512.0;

/// Returns `h` of movements whose mean square after rounding is `rounded`, in units of `u^2`: `s^2 = rounded - h`.
pub(super) fn excess(rounded: f64) -> f64 {
    if !(rounded < FAR) {
        return INDEPENDENT;
    }
    if rounded <= SHORT {
        // s^2 + h(s) = s sqrt(2/pi).
        return rounded - FRAC_PI_2 * rounded * rounded;
    }
    let position = (rounded - SHORT) / SPACING;
    let i = (position as usize).min(TABLE.len() - 2);
    TABLE[i] + (position - i as f64) * (TABLE[i + 1] - TABLE[i])
}

/// Returns `h(s)` of movements whose mean square before rounding is `moved`, in units of `u^2`: `s^2`.
pub(super) fn excess_of(moved: f64) -> f64 {
    let s = moved.sqrt();
    if moved > FAR {
        INDEPENDENT
    } else if s < 0.2 {
        s * FRAC_2_PI.sqrt() - moved
    } else {
        gaussian(s)
    }
}

/// Returns `h(s)` of the `s` with `s^2 + h(s) = rounded`, by bisection.
fn solve(rounded: f64) -> f64 {
    let mut low = 0.0;
    let mut high = rounded.sqrt();
    // To 1e-10, which is less than the interpolation error of the table.
    for _ in 0..34 {
        let middle = 0.5 * (low + high);
        if middle * middle + gaussian(middle) < rounded { low = middle } else { high = middle }
    }
    gaussian(high)
}

/// Returns `h(s)` for `s >= 0.2`.
fn gaussian(s: f64) -> f64 {
    let term = |n: f64| (-2.0 * (PI * n * s).powi(2)).exp() / (PI * n).powi(2);
    // Later terms are below the rounding of f64.
    INDEPENDENT - (1..=8).map(|n| term(f64::from(n))).take_while(|&term| term > 1e-18).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    /// Moves and rounds random values, and compares the excess found with the computed one.
    #[test]
    fn excess_equals_what_rounding_adds() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let count = 400_000;
        for s in [0.01, 0.05, 0.2, 0.26, 0.35, 0.5, 0.8, 3.0] {
            let mut rounded = 0.0;
            let mut exact = 0.0;
            for _ in 0..count {
                let value: f64 = random.random_range(0.0..1000.0);
                // The sum of 12 uniform numbers is close to a Gaussian.
                let step = s * ((0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0);
                rounded += ((value + step).round() - value.round()).powi(2) / count as f64;
                exact += step * step / count as f64;
            }
            let found = rounded - excess(rounded);
            // The number of rare jumps has a relative deviation of 1/sqrt(count * probability).
            let tolerance = 0.01 + 6.0 / (count as f64 * rounded.min(1.0)).sqrt();
            assert!((found / exact - 1.0).abs() < tolerance + 2e-3 / s, "{s}: {found} is not {exact}");
        }
    }

    #[test]
    fn excess_before_and_after_rounding_is_the_same() {
        for s in [1e-9, 1e-3, 0.1, 0.19, 0.21, 0.4, 0.7, 0.99] {
            let moved = s * s;
            let h = excess_of(moved);
            assert!((excess(moved + h) - h).abs() < 2e-4, "{s}: {h} is not {}", excess(moved + h));
        }
        assert_eq!((excess_of(0.0), excess_of(1e9)), (0.0, INDEPENDENT));
    }

    #[test]
    fn excess_is_continuous_and_does_not_decrease() {
        for border in [SHORT, FAR] {
            let below = excess(border * (1.0 - 1e-9));
            let above = excess(border * (1.0 + 1e-9));
            assert!((below - above).abs() < 1e-4, "{border}: {below} {above}");
        }
        assert_eq!(excess(0.0), 0.0);
        assert_eq!(excess(f64::INFINITY), INDEPENDENT);
        let values = (0..2000).map(|i| excess(f64::from(i) * 1e-3)).collect::<Vec<_>>();
        assert!(values.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12));
    }
}
