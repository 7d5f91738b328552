//! The rounding error of a stored number.

/// Returns the root mean square relative error of rounding to a significand of `bits` bits, leading bit included.
///
/// A number `m 2^e` with `1 <= m < 2` is rounded by up to half an `ulp = 2^(1 - bits) 2^e`. The rounding error is
/// uniform, so its mean square is `ulp^2 / 12`. Significands of numbers of many magnitudes have the density
/// `1 / (m ln 2)`, for which `E[1/m^2] = 3 / (8 ln 2)`. Together
/// `u^2 = E[(ulp/x)^2] / 12 = 2^(2 - 2 bits) / (32 ln 2)`.
///
/// The result is 2.5e-8 for f32, 2.1e-4 for f16 and 1.7e-3 for bf16. Numbers below a dtype's normal range are rounded
/// more coarsely.
pub fn relative_rounding(bits: u32) -> f64 {
    (1.0 - f64::from(bits)).exp2() / (32.0 * std::f64::consts::LN_2).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds log-uniform numbers with the conversions of the dtypes.
    #[test]
    fn relative_rounding_equals_measured_rounding() {
        let n = 200_000;
        let rms = |round: fn(f64) -> f64| {
            let value = |i: u32| (f64::from(i) / f64::from(n)).exp2();
            let square: f64 = (0..n).map(value).map(|x| ((round(x) - x) / x).powi(2)).sum();
            (square / f64::from(n)).sqrt()
        };
        for (bits, round) in [
            (24, (|x| f64::from(x as f32)) as fn(f64) -> f64),
            (11, |x| half::f16::from_f64(x).to_f64()),
            (8, |x| half::bf16::from_f64(x).to_f64()),
        ] {
            // bf16 has 128 significands: their mean differs from the integral by far less than 2%.
            let measured = rms(round);
            let expected = relative_rounding(bits);
            assert!((measured / expected - 1.0).abs() < 0.02, "{bits} bits: {measured} is not {expected}");
        }
    }
}
