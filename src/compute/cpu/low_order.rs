//! Low-order term of a compensated average: the part of the value that its f32 cannot hold.
//!
//! For an f32 `e` with `2^E <= |e| < 2^(E + 1)`, the term is an integer `k` in units of `u = 2^(E - 37)`, which is
//! `2^-14 ulp(e)`. The average is `e + k u`. Zeros and subnormal numbers have no term, because their sums are exact.
//!
//! **Rounding.** An update leaves a remainder `r`, and keeps `k = floor(r / u + t)`. The threshold `t` is a multiple of
//! 1/64 below 1, drawn for each update from its time. So the mean of `k u` over the thresholds is `r`, and its variance
//! at most `u^2 / 4`, whatever the parameters do. Over `n` updates the error is at most `u sqrt(n) / 2` RMS: 3.6e-9 of
//! the average for a million. Remainders are first rounded to `u / 64`. This loses increments below `u / 128`, which
//! costs an average of weight `w` at most `u / (128 w)`: 5.7e-8 of its value for the mean of a million.
//!
//! **Range.** Let `d` be the increment and `s` the rounded sum. For `|e| >= |d|`, `r` is the rounding error of the sum,
//! at most `ulp(s) / 2`. Otherwise `s - e` is rounded as well, by at most as much. So `|r| <= ulp(s)` and
//! `|k| <= 2^14`: a term never saturates.
//!
//! **Operations.** The anchor `1.5 2^E` has neighbours at a distance of `ulp(e)`. Adding `2^14 r` to it rounds `r` to
//! units, and the difference of the bits is `k`. All products are with powers of two, and exact.
//!
//! Tried and rejected:
//! - bf16 terms. Parameters of 16 bits stay at one value for long, and every update then rounds the same way: errors of
//!   2.3e-6 after a million updates with a noise of 0.1% (`accuracy.rs`).
//! - Integers rounded to the nearest unit, of `2^-14 ulp(e)`: 5.3e-7 after a million updates of settling parameters,
//!   whose last increments are below half a unit. Units of `2^-16 ulp(e)` leave 1.7e-7, and need a clamp.
//! - The anchor `2^E`, which saves an instruction: its lower neighbours are half as far away.
//!
//! The term of an average that is not finite has no meaning. Its bits may differ between devices.

use half::bf16;

/// Bits of an f32's exponent.
const EXPONENT: u32 = 0x7f80_0000;

/// Bit that turns `2^E` into the anchor `1.5 2^E`.
const HALF: u32 = 0x0040_0000;

/// Number of thresholds, as a power of two.
const THRESHOLD_BITS: u32 = 6;

/// Units in the distance between neighbouring f32, as a power of two.
const UNIT_BITS: u32 = 14;

/// Factor from ulps to a 64th of a unit, in which remainders are rounded.
const FINE: f32 = (1u32 << (UNIT_BITS + THRESHOLD_BITS)) as f32;

/// Factor from units to ulps.
const UNIT: f32 = 1.0 / (1u32 << UNIT_BITS) as f32;

/// Threshold that rounds to the nearest unit.
pub const NEAREST: u32 = 1 << (THRESHOLD_BITS - 1);

#[inline(always)]
fn anchor(value: f32) -> u32 {
    value.to_bits() & EXPONENT | HALF
}

/// Returns the term of an average with the value `value` and the remainder `remainder`.
///
/// `threshold` is below 64. Remainders are at most an ulp of the value, or the term has no meaning.
#[inline(always)]
pub fn encode(value: f32, remainder: f32, threshold: u32) -> i16 {
    let sum = f32::from_bits(anchor(value)) + remainder * FINE;
    (sum.to_bits().wrapping_add(threshold) >> THRESHOLD_BITS) as i16
}

/// Returns the remainder that the term of an average stands for, exactly.
#[inline(always)]
pub fn decode(value: f32, term: i16) -> f32 {
    let anchor = anchor(value);
    let sum = f32::from_bits(anchor.wrapping_add_signed(i32::from(term)));
    (sum - f32::from_bits(anchor)) * UNIT
}

/// Sets terms from remainders in bf16, which older versions stored, in little-endian bytes.
///
/// # Errors
/// The index of the first remainder that is larger than an ulp of its value, or that is not a number. Remainders of
/// values that are not finite have no meaning.
pub fn from_bf16(terms: &mut [i16], values: &[f32], remainders: &[u8]) -> Result<(), usize> {
    let remainders = remainders.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32());
    for (i, ((term, &value), remainder)) in terms.iter_mut().zip(values).zip(remainders).enumerate() {
        let is_term = remainder.abs() <= decode(value, 1 << UNIT_BITS);
        *term = if is_term { encode(value, remainder, NEAREST) } else { 0 };
        if value.is_finite() && !is_term {
            return Err(i);
        }
    }
    Ok(())
}

/// Returns the threshold of an update, below 64: a hash of its time (the finaliser of SplitMix64).
pub fn threshold(time: u64) -> u32 {
    let mut bits = time.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> (64 - THRESHOLD_BITS)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the unit of a value's term in f64, by its definition.
    fn unit(value: f32) -> f64 {
        let exponent = f64::from(value.abs()).log2().floor().max(-126.0);
        // `log2` may round up to the next integer.
        let exponent = if exponent.exp2() > f64::from(value.abs()) { exponent - 1.0 } else { exponent };
        (exponent - 37.0).exp2()
    }

    /// Normal numbers at both ends of binades, of both signs.
    fn values() -> impl Iterator<Item = f32> {
        let exponents = (1..=254u32)
            .flat_map(|exponent| [0, 1, 0x3f_ffff, 0x40_0000, 0x7f_fffe, 0x7f_ffff].map(|m| exponent << 23 | m));
        exponents.flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
    }

    #[test]
    fn term_is_a_multiple_of_its_unit() {
        for value in values() {
            for term in [-16384i16, -8192, -8191, -1, 0, 1, 2, 8191, 8192, 16384] {
                let expected = f64::from(term) * unit(value);
                let remainder = decode(value, term);
                // Remainders are multiples of the smallest subnormal number.
                let smallest = f64::from(f32::from_bits(1));
                if expected % smallest == 0.0 {
                    assert_eq!(f64::from(remainder), expected, "{value:e} {term}");
                    for threshold in 0..64 {
                        assert_eq!(encode(value, remainder, threshold), term, "{value:e} {term} {threshold}");
                    }
                } else {
                    assert!((f64::from(remainder) - expected).abs() <= smallest / 2.0, "{value:e} {term}");
                }
            }
        }
    }

    #[test]
    fn term_is_remainder_rounded_at_threshold() {
        for value in [1.0f32, -1.5, 1.999_999_9, 3e-20, -2e20] {
            for i in -300..=300 {
                let remainder = (f64::from(i) / 64.0 * unit(value)) as f32;
                for threshold in 0..64 {
                    let expected = (f64::from(i) / 64.0 + f64::from(threshold) / 64.0).floor();
                    assert_eq!(f64::from(encode(value, remainder, threshold)), expected);
                }
                let mean = (0..64).map(|threshold| f64::from(encode(value, remainder, threshold))).sum::<f64>() / 64.0;
                assert_eq!(mean, f64::from(i) / 64.0);
            }
        }
    }

    #[test]
    fn zero_and_subnormal_numbers_have_no_term() {
        for bits in [0u32, 1, 2, 0x40_0000, 0x7f_ffff] {
            for value in [f32::from_bits(bits), -f32::from_bits(bits)] {
                assert_eq!(decode(value, 0).to_bits(), 0);
                assert!(
                    (0..64).all(|threshold| encode(value, 0.0, threshold) == 0 && encode(value, -0.0, threshold) == 0)
                );
            }
        }
    }

    #[test]
    fn bf16_remainders_become_the_nearest_terms() {
        let mut terms = [7i16];
        for value in values() {
            for share in [-1.0, -0.5, -0.37, -1e-3, 0.0, 1e-6, 0.25, 0.5, 1.0] {
                let remainder = bf16::from_f64(share * 16384.0 * unit(value));
                from_bf16(&mut terms, &[value], &remainder.to_le_bytes()).unwrap();
                let error = f64::from(remainder) - f64::from(decode(value, terms[0]));
                assert!(error.abs() <= 0.51 * unit(value), "{value:e} {remainder:e}");
            }
            for wrong in [bf16::from_f64(1.1 * 16384.0 * unit(value)), bf16::NAN, bf16::NEG_INFINITY] {
                // A remainder below the smallest bf16 is zero.
                let fits = wrong.is_finite() && f64::from(wrong).abs() <= 16384.0 * unit(value);
                assert_eq!(from_bf16(&mut terms, &[value], &wrong.to_le_bytes()), if fits { Ok(()) } else { Err(0) });
            }
        }
        for value in [f32::NAN, f32::INFINITY] {
            assert_eq!((from_bf16(&mut terms, &[value], &bf16::NAN.to_le_bytes()), terms[0]), (Ok(()), 0));
        }
    }

    /// Checks the bound on remainders for sums of any two numbers, also where the increment is the larger one.
    #[test]
    fn remainder_of_any_sum_has_a_term() {
        let mantissas = [0u32, 1, 2, 3, 0x2a_aaab, 0x3f_ffff, 0x40_0000, 0x40_0001, 0x7f_fffd, 0x7f_fffe, 0x7f_ffff];
        let numbers = |exponents: std::ops::Range<u32>| {
            let bits = exponents.flat_map(move |exponent| mantissas.map(|mantissa| exponent << 23 | mantissa));
            bits.flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)]).collect::<Vec<_>>()
        };
        let mut largest = 0.0f64;
        for e in numbers(127..128) {
            for d in numbers(100..156) {
                let s = e + d;
                let r = d - (s - e);
                let ulps = f64::from(r.abs()) / (unit(s) * 16384.0);
                assert!(s == 0.0 && r == 0.0 || ulps <= 1.0, "{e:e} + {d:e}");
                largest = if s == 0.0 { largest } else { largest.max(ulps) };
                let term = encode(s, r, 63);
                let error = f64::from(r) - f64::from(decode(s, term));
                assert!(s == 0.0 || error.abs() < unit(s), "{e:e} + {d:e}");
            }
        }
        assert!(largest >= 0.5);
    }

    #[test]
    fn thresholds_are_even_and_independent_of_their_neighbours() {
        for stride in [1u64, 2, 8, 10, 144, 1000, 1024, 1 << 20, 1 << 32] {
            let mut counts = [0usize; 64];
            let mut product = 0.0;
            let mut last = 31.5;
            for i in 1..=64_000 {
                let next = threshold(i * stride);
                counts[next as usize] += 1;
                product += (f64::from(next) - 31.5) * (last - 31.5);
                last = f64::from(next);
            }
            assert!(counts.iter().all(|count| (850..1150).contains(count)), "{stride}: {counts:?}");
            // The variance of a threshold is 341.
            assert!((product / 64_000.0).abs() < 341.0 * 0.02, "{stride}: {product}");
        }
    }
}
