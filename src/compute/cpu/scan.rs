//! What values an average holds: whether all are finite, and how large they are.

use rayon::prelude::*;

use super::{CHUNK, vectorised};

/// The range of some values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    /// The largest magnitude among the finite values.
    pub largest: f32,
    /// The first value that is NaN or infinite, by its index.
    pub first_not_finite: Option<usize>,
}

/// Looks at all values once.
pub fn scan(values: &[f32]) -> Range {
    let chunks = values.par_chunks(CHUNK).enumerate().map(|(i, chunk)| {
        // Bits of magnitudes compare like the magnitudes, with infinity and NaN on top.
        let largest = vectorised(
            #[inline(always)]
            || chunk.iter().fold(0, |most: u32, v| most.max(v.to_bits() & 0x7fff_ffff)),
        );
        let finite = f32::from_bits(largest).is_finite();
        let first = if finite { None } else { chunk.iter().position(|v| !v.is_finite()).map(|j| i * CHUNK + j) };
        Range { largest: if finite { f32::from_bits(largest) } else { 0.0 }, first_not_finite: first }
    });
    chunks.reduce(Range::default, |a, b| Range {
        largest: a.largest.max(b.largest),
        first_not_finite: a.first_not_finite.into_iter().chain(b.first_not_finite).min(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_largest_and_the_first_bad_one() {
        let mut values: Vec<f32> = (0..3 * CHUNK + 11).map(|i| (i % 1000) as f32 - 600.0).collect();
        assert_eq!(scan(&values), Range { largest: 600.0, first_not_finite: None });
        values[2 * CHUNK + 5] = f32::NAN;
        assert_eq!(scan(&values).first_not_finite, Some(2 * CHUNK + 5));
        values[17] = f32::NEG_INFINITY;
        assert_eq!(scan(&values).first_not_finite, Some(17));
        assert_eq!(scan(&[]), Range::default());
    }
}
