//! Running averages in host memory: per profile an arena of f32 and, if compensated, an arena of low-order terms.

use rayon::prelude::*;
use safetensors::Dtype;

use super::memory::Spare;
use super::scan::{ValueRange, copy_and_scan};
use super::{CHUNK, convert, vectorised, zeros};

/// Alignment of each tensor in an arena, in elements: 16 bytes of f32, for CUDA's vector accesses.
const ALIGNMENT: usize = 4;

/// Precision of a running average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// An f32 and a low-order term of 16 bits per element: 6 bytes, exact to about 2^-38.
    #[default]
    Compensated,
    /// An f32 per element: 4 bytes. Increments below half an ulp, which occur late in training, are lost.
    Plain,
}

/// Position of each tensor in an arena.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    offsets: Vec<usize>,
    elements: Vec<usize>,
    total: usize,
}

impl Layout {
    /// Creates the layout of tensors with these numbers of elements.
    pub fn new(elements: impl IntoIterator<Item = usize>) -> Layout {
        let mut layout = Layout::default();
        for elements in elements {
            layout.offsets.push(layout.total);
            layout.elements.push(elements);
            layout.total += elements.next_multiple_of(ALIGNMENT);
        }
        layout
    }

    /// Returns the number of elements of an arena, padding included.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Returns the elements of an arena that hold tensor `i`.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i]..self.offsets[i] + self.elements[i]
    }

    /// Splits an arena into its tensors, without the padding.
    fn split<'a, T>(&self, mut arena: &'a mut [T]) -> Vec<&'a mut [T]> {
        let mut tensors = Vec::with_capacity(self.len());
        for &elements in &self.elements {
            let (tensor, rest) = std::mem::take(&mut arena).split_at_mut(elements);
            let padding = elements.next_multiple_of(ALIGNMENT) - elements;
            arena = &mut rest[padding..];
            tensors.push(tensor);
        }
        tensors
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// Returns true if the layout is empty.
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }
}

/// Running averages of one profile.
#[derive(Clone, Debug)]
pub struct Averages {
    /// Arena of the f32 parts, in the order of a [`Layout`].
    pub high: Vec<f32>,
    /// Arena of the [low-order terms](super::low_order) in the same layout, if the averages are compensated.
    pub low: Option<Vec<i16>>,
}

impl Averages {
    /// Creates averages of zeros. The first update has weight 1 and turns them into copies of the parameters.
    pub fn zeros(layout: &Layout, precision: Precision) -> Averages {
        let low = (precision == Precision::Compensated).then(|| zeros(layout.total()));
        Averages { high: zeros(layout.total()), low }
    }

    /// Converts the elements `range` of the arena to `dtype` and writes them to `dst`.
    pub fn store(&self, dst: &mut [u8], range: std::ops::Range<usize>, dtype: Dtype) {
        let size = dtype.bitsize() / 8;
        let high = self.high[range.clone()].par_chunks(CHUNK);
        let chunks = dst.par_chunks_mut(CHUNK * size).zip(high).enumerate();
        chunks.for_each(|(i, (dst, high))| {
            let low = self.low.as_ref().map(|low| &low[range.start + i * CHUNK..][..high.len()]);
            vectorised(
                #[inline(always)]
                || convert::from_average(dst, high, low, dtype),
            );
        });
    }
}

/// Unused memory that is kept for a copy of averages.
#[derive(Debug)]
pub struct SpareAverages {
    high: Spare<f32>,
    low: Option<Spare<i16>>,
}

impl SpareAverages {
    /// Allocates memory for a copy of `averages`. Returns none if the system has too little.
    pub fn for_copy_of(averages: &Averages) -> Option<SpareAverages> {
        let low = match &averages.low {
            Some(low) => Some(Spare::new(low.len())?),
            None => None,
        };
        Some(SpareAverages { high: Spare::new(averages.high.len())?, low })
    }

    /// Touches every page once, as [`Spare::prefault`].
    pub fn prefault(self) -> SpareAverages {
        SpareAverages { high: self.high.prefault(), low: self.low.map(Spare::prefault) }
    }

    /// Turns a copy that is no longer needed into spare memory, as [`Spare::release`].
    pub fn release(copy: Averages) -> SpareAverages {
        SpareAverages { high: Spare::release(copy.high), low: copy.low.map(Spare::release) }
    }

    /// Copies averages with all threads and returns the value range of each tensor. Padding is not copied.
    pub fn copy(self, averages: &Averages, layout: &Layout) -> (Averages, Vec<ValueRange>) {
        let mut ranges = Vec::new();
        let high = self.high.fill_with(|high| {
            let tensors = layout.split(high).into_par_iter().enumerate();
            ranges = tensors.map(|(i, dst)| copy_and_scan(dst, &averages.high[layout.range(i)])).collect();
        });
        let low = self.low.zip(averages.low.as_ref()).map(|(spare, from)| {
            spare.fill_with(|low| {
                let chunks = low.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
                chunks.for_each(|(dst, src)| dst.copy_from_slice(src));
            })
        });
        (Averages { high, low }, ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::super::scan;
    use super::*;

    #[test]
    fn layout_aligns_every_tensor_to_16_bytes() {
        let layout = Layout::new([1, 4, 0, 7, 9]);
        assert_eq!(layout.total(), 4 + 4 + 8 + 12);
        assert_eq!(layout.range(3), 8..15);
        assert_eq!(layout.range(2), 8..8);
        assert!((0..layout.len()).all(|i| layout.range(i).start.is_multiple_of(ALIGNMENT)));
    }

    #[test]
    fn store_as_f64_includes_low_order_term() {
        let layout = Layout::new([2]);
        let mut averages = Averages::zeros(&layout, Precision::Compensated);
        averages.high[..2].copy_from_slice(&[1.0, 2.0]);
        averages.low.as_mut().unwrap()[1] = super::super::low_order::encode(2.0, 1e-9, 32);
        let mut bytes = [0; 16];
        averages.store(&mut bytes, layout.range(0), Dtype::F64);
        let values: Vec<f64> = bytes.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(values[0], 1.0);
        assert!((values[1] - 2.0 - 1e-9).abs() < 1e-11);
    }

    #[test]
    fn copy_equals_original_in_fresh_and_reused_memory() {
        // Many small tensors, and one of several chunks.
        let layout = Layout::new((0..300).chain([3 * CHUNK + 7, 1]));
        for precision in [Precision::Compensated, Precision::Plain] {
            let mut averages = Averages::zeros(&layout, precision);
            let mut spare = SpareAverages::for_copy_of(&averages).unwrap();
            for round in 0..3 {
                let value = |i: usize| ((i * 31 + round) % 9973) as f32 - 5000.0;
                averages.high.iter_mut().enumerate().for_each(|(i, v)| *v = value(i));
                averages.low.iter_mut().flatten().enumerate().for_each(|(i, v)| *v = value(i) as i16);
                averages.high[layout.range(300).start + CHUNK + round] = f32::NAN;
                let (copy, ranges) = spare.copy(&averages, &layout);
                let tensor_ranges = || (0..layout.len()).map(|i| layout.range(i));
                assert!(ranges.iter().copied().eq(tensor_ranges().map(|range| scan(&averages.high[range]))));
                assert_eq!(ranges[300].first_not_finite, Some(CHUNK + round));
                let bits = |averages: &Averages, range: std::ops::Range<usize>| -> Vec<u32> {
                    averages.high[range].iter().map(|v| v.to_bits()).collect()
                };
                assert!(tensor_ranges().all(|range| bits(&copy, range.clone()) == bits(&averages, range)));
                assert_eq!(copy.low, averages.low);
                spare = SpareAverages::release(copy);
            }
        }
    }
}
