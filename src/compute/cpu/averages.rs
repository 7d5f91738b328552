//! Running averages in memory: one arena of f32 (and of low-order terms) per profile, all of one layout.

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::{CHUNK, convert, vectorised, zeros};

/// Elements to which each tensor's place in an arena is rounded up: 16 bytes of f32, for CUDA's vector accesses.
const ALIGNMENT: usize = 4;

/// How a running average is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// An f32 and a low-order term in bf16 per element: 6 bytes, exact to about 2^-32.
    #[default]
    Compensated,
    /// An f32 per element: 4 bytes. Late in training, increments below half an ulp are lost.
    Plain,
}

/// Where each tensor lies in an arena.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    offsets: Vec<usize>,
    elements: Vec<usize>,
    total: usize,
}

impl Layout {
    /// The layout of tensors with these numbers of elements.
    pub fn new(elements: impl IntoIterator<Item = usize>) -> Layout {
        let mut layout = Layout::default();
        for elements in elements {
            layout.offsets.push(layout.total);
            layout.elements.push(elements);
            layout.total += elements.next_multiple_of(ALIGNMENT);
        }
        layout
    }

    /// The elements of an arena, padding included.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The place of tensor `i` in an arena.
    pub fn place(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i]..self.offsets[i] + self.elements[i]
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.elements.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.elements.is_empty()
    }
}

/// The running averages of one profile.
#[derive(Clone, Debug)]
pub struct Averages {
    /// The f32 part, by [`Layout`].
    pub high: Vec<f32>,
    /// The low-order terms of compensated averages, by the same layout.
    pub low: Option<Vec<bf16>>,
}

impl Averages {
    /// Averages of zeros; the first update, of weight 1, makes them copies of the parameters.
    pub fn zeros(layout: &Layout, precision: Precision) -> Averages {
        let low = (precision == Precision::Compensated).then(|| zeros(layout.total()));
        Averages { high: zeros(layout.total()), low }
    }

    /// A copy, made with all threads.
    pub fn copy(&self) -> Averages {
        Averages { high: copy(&self.high), low: self.low.as_deref().map(copy) }
    }

    /// Writes the elements of a stretch of an arena in `dtype`.
    pub fn store(&self, dst: &mut [u8], place: std::ops::Range<usize>, dtype: Dtype) {
        let size = dtype.bitsize() / 8;
        let high = self.high[place.clone()].par_chunks(CHUNK);
        let stretches = dst.par_chunks_mut(CHUNK * size).zip(high).enumerate();
        stretches.for_each(|(i, (dst, high))| {
            let low = self.low.as_ref().map(|low| &low[place.start + i * CHUNK..][..high.len()]);
            vectorised(
                #[inline(always)]
                || convert::from_average(dst, high, low, dtype),
            );
        });
    }
}

fn copy<T: bytemuck::Pod + Send + Sync>(values: &[T]) -> Vec<T> {
    let mut copy = zeros(values.len());
    copy.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_begins_at_16_bytes() {
        let layout = Layout::new([1, 4, 0, 7, 9]);
        assert_eq!(layout.total(), 4 + 4 + 8 + 12);
        assert_eq!(layout.place(3), 8..15);
        assert_eq!(layout.place(2), 8..8);
        assert!((0..layout.len()).all(|i| layout.place(i).start.is_multiple_of(ALIGNMENT)));
    }

    #[test]
    fn f64_takes_the_low_order_term_along() {
        let layout = Layout::new([2]);
        let mut averages = Averages::zeros(&layout, Precision::Compensated);
        averages.high[..2].copy_from_slice(&[1.0, 2.0]);
        averages.low.as_mut().unwrap()[1] = bf16::from_f32(1e-9);
        let mut bytes = [0; 16];
        averages.store(&mut bytes, layout.place(0), Dtype::F64);
        let values: Vec<f64> = bytes.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(values[0], 1.0);
        assert!((values[1] - 2.0 - 1e-9).abs() < 1e-11);
    }
}
