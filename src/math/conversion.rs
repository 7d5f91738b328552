//! Conversions between the parametrisations of tracked profiles.

use std::f64::consts::LN_2;

use crate::error::{Error, Result};

/// The largest `sigma_rel` of a power-function profile, `1/sqrt(12)`: `gamma = 0`, the plain mean.
pub const MAX_SIGMA_REL: f64 = 0.288_675_134_594_812_9;

/// Returns the relative standard deviation of a power-function profile.
///
/// `sigma_rel^2 = (gamma+1) / ((gamma+2)^2 (gamma+3))`: Karras eq. 123.
pub fn gamma_to_sigma_rel(gamma: f64) -> f64 {
    ((gamma + 1.0) / (gamma + 3.0)).sqrt() / (gamma + 2.0)
}

/// Returns the exponent of the power-function profile of the given relative standard deviation.
///
/// It is the largest real root of `g^3 + 7 g^2 + (16 - sigma_rel^-2) g + (12 - sigma_rel^-2)`: Karras Algorithm 2.
///
/// # Errors
/// [`Error::Parameter`] unless `0 < sigma_rel <= 1/sqrt(12)`.
pub fn sigma_rel_to_gamma(sigma_rel: f64) -> Result<f64> {
    if !(sigma_rel > 0.0 && sigma_rel <= MAX_SIGMA_REL && (1.0 / (sigma_rel * sigma_rel)).is_finite()) {
        return Err(Error::Parameter {
            name: "sigma_rel",
            value: sigma_rel,
            allowed: "must be above 0 and at most 1/sqrt(12) = 0.288675, the plain mean of all updates: no \
                      power-function profile is wider"
                .into(),
        });
    }
    let precision = 1.0 / (sigma_rel * sigma_rel);
    // Above its largest root the cubic is convex and increasing, so Newton's method from 1/sigma_rel decreases to it.
    let mut gamma = 1.0 / sigma_rel;
    loop {
        let value = ((gamma + 7.0) * gamma + (16.0 - precision)) * gamma + (12.0 - precision);
        let slope = (3.0 * gamma + 14.0) * gamma + (16.0 - precision);
        let next = gamma - value / slope;
        if !(next < gamma) {
            return Ok(gamma.max(0.0));
        }
        gamma = next;
    }
}

/// Returns the `sigma_rel` whose standard deviation at time `at` is about that of the classical EMA: `1/((1-beta) T)`.
pub fn beta_to_sigma_rel(beta: f64, at: f64) -> f64 {
    1.0 / ((1.0 - beta) * at)
}

/// Inverts [`beta_to_sigma_rel`]: `1 - 1/(sigma_rel T)`.
///
/// # Errors
/// [`Error::Parameter`] if the average is not longer than one step, or so long that its decay rounds to 1.
pub fn sigma_rel_to_beta(sigma_rel: f64, at: f64) -> Result<f64> {
    let beta = 1.0 - 1.0 / (sigma_rel * at);
    if beta > 0.0 && beta < 1.0 {
        return Ok(beta);
    }
    let why = if beta == 1.0 {
        "its decay per step differs from 1 by less than an f64 holds: use its half-life"
    } else {
        "this average is no longer than one step, so no classical EMA matches it"
    };
    Err(Error::Parameter { name: "sigma_rel", value: sigma_rel, allowed: format!("at step {at} {why}") })
}

/// Returns the decay per step that halves a weight in `half_life` steps: `2^(-1/half_life)`.
///
/// It is 1 for half-lives above 1e16 steps: an f64 does not hold the difference.
pub fn half_life_to_beta(half_life: f64) -> f64 {
    (-1.0 / half_life).exp2()
}

/// Returns the number of steps in which a decay per step halves a weight: `-ln 2 / ln beta`.
pub fn beta_to_half_life(beta: f64) -> f64 {
    -LN_2 / beta.ln()
}

/// Returns [`beta_to_sigma_rel`] of the decay of a half-life, with the digits that `1 - beta` would lose.
pub fn half_life_to_sigma_rel(half_life: f64, at: f64) -> f64 {
    -1.0 / ((-LN_2 / half_life).exp_m1() * at)
}

/// Inverts [`half_life_to_sigma_rel`]: `-ln 2 / ln(1 - 1/(sigma_rel T))`.
///
/// # Errors
/// [`Error::Parameter`] if the average is not longer than one step.
pub fn sigma_rel_to_half_life(sigma_rel: f64, at: f64) -> Result<f64> {
    if sigma_rel * at > 1.0 && (sigma_rel * at).is_finite() {
        return Ok(-LN_2 / (-1.0 / (sigma_rel * at)).ln_1p());
    }
    let allowed = format!("at step {at} this average is no longer than one step, so no classical EMA matches it");
    Err(Error::Parameter { name: "sigma_rel", value: sigma_rel, allowed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Row {
        sigma_rel: String,
        gamma: String,
    }

    fn golden() -> Vec<(f64, f64)> {
        let text = include_str!("../../tests/data/conversions.json");
        let document: serde_json::Value = serde_json::from_str(text).unwrap();
        let rows: Vec<Row> = serde_json::from_value(document["rows"].clone()).unwrap();
        rows.iter().map(|r| (r.sigma_rel.parse().unwrap(), r.gamma.parse().unwrap())).collect()
    }

    #[test]
    fn sigma_rel_to_gamma_equals_25_digit_values() {
        let rows = golden();
        assert_eq!(rows.len(), 12);
        for (sigma_rel, gamma) in rows {
            let got = sigma_rel_to_gamma(sigma_rel).unwrap();
            // Relative to gamma + 1, the exponent of every decay.
            assert!((got - gamma).abs() <= 1e-14 * (gamma + 1.0), "{sigma_rel}: {got} is not {gamma}");
            let back = gamma_to_sigma_rel(gamma);
            assert!((back - sigma_rel).abs() <= 1e-14 * sigma_rel, "{gamma}: {back} is not {sigma_rel}");
        }
    }

    #[test]
    fn plain_mean_has_gamma_zero() {
        assert!(sigma_rel_to_gamma(MAX_SIGMA_REL).unwrap() < 1e-14);
        assert!((gamma_to_sigma_rel(0.0) - MAX_SIGMA_REL).abs() < 1e-16);
    }

    #[test]
    fn sigma_rel_survives_the_round_trip_through_gamma() {
        for i in 1..=2886 {
            let sigma_rel = f64::from(i) * 1e-4;
            let back = gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel).unwrap());
            assert!((back - sigma_rel).abs() <= 1e-14 * sigma_rel, "{sigma_rel} came back as {back}");
        }
    }

    #[test]
    fn sigma_rel_outside_its_range_is_an_error() {
        for bad in [0.0, -0.1, f64::NAN, 0.2887, f64::INFINITY, 1e-200] {
            let text = sigma_rel_to_gamma(bad).unwrap_err().to_string();
            assert!(text.contains("plain mean"), "{text}");
        }
    }

    fn assert_close(found: f64, expected: f64, what: &str) {
        assert!((found / expected - 1.0).abs() <= 1e-15, "{what}: {found} is not {expected}");
    }

    /// Half-lives at a time, with their decay and `sigma_rel` to 16 of 60 computed digits.
    #[test]
    fn half_lives_up_to_1e18_convert_with_fifteen_digits() {
        for (half_life, at, beta, sigma_rel) in [
            (0.5, 10.0, 0.25, 0.133_333_333_333_333_33),
            (3.0, 100.0, 0.793_700_525_984_099_8, 0.048_473_221_018_630_726),
            (700.0, 10_000.0, 0.999_010_279_838_455_1, 0.101_038_661_113_979_45),
            (123_456.0, 1_000_000.0, 0.999_994_385_487_666, 0.178_109_858_968_455_74),
            (1e9, 1e10, 0.999_999_999_306_852_8, 0.144_269_504_138_896_33),
            (3e12, 2e13, 0.999_999_999_999_769, 0.216_404_256_133_369_5),
            (1e15, 1e+16, 0.999_999_999_999_999_3, 0.144_269_504_088_896_38),
            (1e+18, 1e+19, 1.0, 0.144_269_504_088_896_33),
        ] {
            assert_close(half_life_to_beta(half_life), beta, "beta");
            assert_close(half_life_to_sigma_rel(half_life, at), sigma_rel, "sigma_rel");
            let back = sigma_rel_to_half_life(half_life_to_sigma_rel(half_life, at), at).unwrap();
            // A half-life below a step forgets digits of its decay.
            assert!((back / half_life - 1.0).abs() < 4e-15, "{half_life} came back as {back}");
        }
    }

    #[test]
    fn sigma_rel_converts_to_half_life_and_decay_with_fifteen_digits() {
        for (sigma_rel, at, half_life, beta) in [
            (0.1, 15.0, 0.630_929_753_571_457_5, 0.333_333_333_333_333_37),
            (0.1, 10_000.0, 692.800_549_178_500_9, 0.999),
            (0.28, 1_000_000.0, 194_080.863_982_988_14, 0.999_996_428_571_428_6),
            (0.05, 1e12, 34_657_359_027.650_696, 0.999_999_999_98),
            (0.15, 1e+18, 1.039_720_770_839_917_9e+17, 1.0),
            (0.25, 1e+19, 1.732_867_951_399_863_3e+18, 1.0),
        ] {
            assert_close(sigma_rel_to_half_life(sigma_rel, at).unwrap(), half_life, "half-life");
            match sigma_rel_to_beta(sigma_rel, at) {
                Ok(found) => assert_close(found, beta, "beta"),
                Err(error) => assert!(beta == 1.0 && error.to_string().contains("use its half-life"), "{error}"),
            }
        }
        for bad in [0.1, 0.0, -1.0, f64::NAN, f64::INFINITY] {
            let text = sigma_rel_to_half_life(bad, 10.0).unwrap_err().to_string();
            assert!(text.contains("no longer than one step"), "{text}");
        }
    }

    #[test]
    fn decay_converts_to_half_life_and_sigma_rel_with_fifteen_digits() {
        for (beta, at, half_life, sigma_rel) in [
            (0.5, 10.0, 1.0, 0.2),
            (0.9, 100.0, 6.578_813_478_960_585, 0.100_000_000_000_000_02),
            (0.999, 10_000.0, 692.800_549_178_500_2, 0.099_999_999_999_999_91),
            (0.999_999_9, 1e8, 6_931_471.462_674_278, 0.100_000_000_052_635_58),
            (0.999_999_999_99, 1e13, 69_314_712_320.522_95, 0.009_999_999_172_596_358),
        ] {
            assert_close(beta_to_half_life(beta), half_life, "half-life");
            assert_close(beta_to_sigma_rel(beta, at), sigma_rel, "sigma_rel");
        }
    }

    #[test]
    fn sigma_rel_of_any_size_converts_to_gamma_with_fourteen_digits() {
        for (sigma_rel, gamma) in [
            (1e-12, 999_999_999_997.0),
            (1e-09, 999_999_996.999_999_9),
            (1e-06, 999_996.999_999_5),
            (0.0001, 9_996.999_949_989_997),
            (0.001, 996.999_498_997_87),
            (0.01, 96.994_897_823_709_82),
            (0.2, 1.826_213_779_895_839),
            (0.28, 0.169_343_993_769_498_8),
            (0.2886, 0.001_560_428_814_753_696),
            (0.288_675, 2.797_496_738_880_99e-06),
        ] {
            let found = sigma_rel_to_gamma(sigma_rel).unwrap();
            assert!((found - gamma).abs() <= 1e-14 * (gamma + 1.0), "{sigma_rel}: {found} is not {gamma}");
            assert!((gamma_to_sigma_rel(gamma) / sigma_rel - 1.0).abs() <= 1e-14, "{gamma}");
        }
    }

    #[test]
    fn classical_decays_convert_both_ways() {
        let beta = sigma_rel_to_beta(0.1, 10_000.0).unwrap();
        assert!((beta - 0.999).abs() < 1e-15);
        assert!((beta_to_sigma_rel(beta, 10_000.0) - 0.1).abs() < 1e-13);
        assert!(sigma_rel_to_beta(0.1, 10.0).is_err());
        assert!((half_life_to_beta(10.0).powi(10) - 0.5).abs() < 1e-15);
    }
}
