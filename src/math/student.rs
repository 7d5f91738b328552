//! Quantiles of Student's t distribution.

use std::f64::consts::PI;

/// Number of halvings of the search for a quantile. They leave no bit of doubt.
const HALVINGS: usize = 100;

/// Largest quantile that is looked for.
const LARGEST: f64 = 1e6;

/// Returns the probability that a t variable of `df` degrees of freedom is below `t`, for `t` of at least 0.
///
/// Equations 26.7.3 and 26.7.4 of Abramowitz and Stegun, Handbook of Mathematical Functions: finite sums.
fn cumulative(t: f64, df: u32) -> f64 {
    let angle = (t / f64::from(df).sqrt()).atan();
    let (sin, cos) = angle.sin_cos();
    let is_odd = df % 2 == 1;
    let mut term = if is_odd { cos } else { 1.0 };
    let mut sum = if df == 1 { 0.0 } else { term };
    let first = if is_odd { 3 } else { 2 };
    for k in (first..df.saturating_sub(1)).step_by(2) {
        term *= cos * cos * f64::from(k - 1) / f64::from(k);
        sum += term;
    }
    let between = if is_odd { 2.0 / PI * (angle + sin * sum) } else { sin * sum };
    0.5 * (1.0 + between)
}

/// Returns the value that a t variable of `df` degrees of freedom exceeds with probability `tail`, of at most a half.
pub fn upper_quantile(tail: f64, df: u32) -> f64 {
    let (mut low, mut high) = (0.0, LARGEST);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if 1.0 - cumulative(middle, df) > tail { low = middle } else { high = middle }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Table 26.10 of Abramowitz and Stegun.
    #[test]
    fn quantiles_are_those_of_the_table() {
        for (tail, df, expected) in [
            (0.025, 1, 12.706),
            (0.05, 1, 6.314),
            (0.025, 2, 4.303),
            (0.05, 3, 2.353),
            (0.005, 4, 4.604),
            (0.05, 5, 2.015),
            (0.025, 10, 2.228),
            (0.005, 13, 3.012),
            (0.05, 30, 1.697),
            (0.025, 120, 1.980),
        ] {
            let found = upper_quantile(tail, df);
            assert!((found - expected).abs() < 6e-4, "{tail} {df}: {found}");
        }
    }

    /// The sums agree with the integral of the density, by the trapezoidal rule.
    #[test]
    fn probabilities_are_integrals_of_the_density() {
        for df in 1..40 {
            let power = -0.5 * f64::from(df + 1);
            let density = |t: f64| (1.0 + t * t / f64::from(df)).powf(power);
            // In the angle, the whole line is an interval.
            let area = |to: f64| {
                let end = to.atan();
                let points = 20_000;
                let width = end / f64::from(points);
                let value = |i: i32| {
                    let t = (width * f64::from(i)).tan();
                    density(t) * (1.0 + t * t)
                };
                width * ((1..points).map(value).sum::<f64>() + 0.5 * (value(0) + value(points)))
            };
            let whole = area(1e9);
            for t in [0.1, 1.0, 2.5, 10.0] {
                let expected = 0.5 + 0.5 * area(t) / whole;
                assert!((cumulative(t, df) - expected).abs() < 1e-6, "{df} {t}");
            }
        }
    }
}
