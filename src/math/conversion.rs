//! Conversions between the parametrisations of tracked profiles.

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
/// [`Error::Parameter`] if the average is not longer than one step.
pub fn sigma_rel_to_beta(sigma_rel: f64, at: f64) -> Result<f64> {
    let beta = 1.0 - 1.0 / (sigma_rel * at);
    if !(beta > 0.0 && beta < 1.0) {
        return Err(Error::Parameter {
            name: "sigma_rel",
            value: sigma_rel,
            allowed: format!("at step {at} this average is no longer than one step, so no classical EMA matches it"),
        });
    }
    Ok(beta)
}

/// Returns the decay per step that halves a weight in `half_life` steps: `2^(-1/half_life)`.
pub fn half_life_to_beta(half_life: f64) -> f64 {
    (-1.0 / half_life).exp2()
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

    #[test]
    fn classical_decays_convert_both_ways() {
        let beta = sigma_rel_to_beta(0.1, 10_000.0).unwrap();
        assert!((beta - 0.999).abs() < 1e-15);
        assert!((beta_to_sigma_rel(beta, 10_000.0) - 0.1).abs() < 1e-13);
        assert!(sigma_rel_to_beta(0.1, 10.0).is_err());
        assert!((half_life_to_beta(10.0).powi(10) - 0.5).abs() < 1e-15);
    }
}
