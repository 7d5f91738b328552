//! What is measured, alike on every device: the sizes, the cases, and the values that they work on.

use safetensors::Dtype;

use super::session::Row;
use super::{PROFILES, Work};
use posthoc_ema::compute::cpu::{Layout, Precision};

/// The large tensors.
const FEW: usize = 4;

/// What an update weighs new parameters with, profile by profile.
pub(super) const WEIGHTS: [f32; PROFILES] = [0.3, 0.05];

/// Parameters repeat after so many: a prime, so that no place in a chunk is left out.
pub(super) const PERIOD: usize = 251;

/// How much of everything there is on one device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub parameters: usize,
    pub tensors: usize,
    pub snapshots: usize,
    pub targets: usize,
}

/// Parameter `i`, in f32 and bf16 alike: 255 values are exact in bf16.
pub(super) fn parameter(i: usize) -> f32 {
    (i % PERIOD) as f32 / 128.0 - 1.0
}

/// Every 16 bits are `0x3c00` to `0x3fff`: whether read as f16, as bf16 or as f32, they are finite and at most 2.
pub(super) fn word(i: usize) -> u64 {
    let mixed = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    0x3c00_3c00_3c00_3c00 | (mixed & 0x03ff_03ff_03ff_03ff)
}

/// `n` parameters in tensors of all but equal sizes.
pub(super) fn split(n: usize, tensors: usize) -> Vec<usize> {
    let (each, rest) = (n / tensors, n % tensors);
    (0..tensors).map(|i| each + usize::from(i < rest)).collect()
}

/// The numbers of tensors that a model is cut into: few, and many.
pub(super) fn tensor_counts(sizes: &Sizes) -> Vec<usize> {
    let mut counts = vec![FEW.min(sizes.parameters), sizes.tensors];
    counts.dedup();
    counts
}

/// One target, and as many as were asked for.
pub(super) fn target_counts(sizes: &Sizes) -> Vec<usize> {
    let mut counts = vec![1, sizes.targets];
    counts.dedup();
    counts
}

pub(super) fn name(dtype: Dtype) -> String {
    dtype.to_string().to_lowercase()
}

pub(super) fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// An update of a model of these tensors.
#[derive(Clone, Debug)]
pub(super) struct Update {
    pub dtype: Dtype,
    pub precision: Precision,
    pub elements: Vec<usize>,
}

impl Update {
    /// f32 and bf16 parameters, plain and compensated averages, for few large tensors and many small ones.
    pub fn all(sizes: &Sizes) -> Vec<Update> {
        let mut all = Vec::new();
        for tensors in tensor_counts(sizes) {
            for dtype in [Dtype::F32, Dtype::BF16] {
                for precision in [Precision::Plain, Precision::Compensated] {
                    all.push(Update { dtype, precision, elements: split(sizes.parameters, tensors) });
                }
            }
        }
        all
    }

    pub fn layout(&self) -> Layout {
        Layout::new(self.elements.iter().copied())
    }

    pub fn row(&self, limit: String) -> Row {
        let low = if self.precision == Precision::Plain { 0 } else { 2 };
        let each = self.dtype.bitsize() / 8 + PROFILES * 2 * (size_of::<f32>() + low);
        let precision = if self.precision == Precision::Plain { "plain" } else { "compensated" };
        let (dtype, tensors) = (name(self.dtype), self.elements.len());
        Row {
            name: format!("{dtype}, {precision}, {tensors} tensor{}", plural(tensors)),
            work: Work::Update,
            bytes: (each * self.elements.iter().sum::<usize>()) as u64,
            limit: Some(limit),
        }
    }
}

/// A blend of all snapshots of a dtype into results of the same.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blend {
    pub dtype: Dtype,
    pub sources: usize,
    pub targets: usize,
    pub parameters: usize,
}

impl Blend {
    /// f16, bf16 and f32, into one target and into several.
    pub fn all(sizes: &Sizes) -> Vec<Blend> {
        let Sizes { parameters, snapshots: sources, .. } = *sizes;
        let of =
            |dtype| target_counts(sizes).into_iter().map(move |targets| Blend { dtype, sources, targets, parameters });
        [Dtype::F16, Dtype::BF16, Dtype::F32].into_iter().flat_map(of).collect()
    }

    pub fn result_bytes(&self) -> usize {
        self.parameters * self.dtype.bitsize() / 8
    }

    pub fn bytes(&self) -> usize {
        (self.sources + self.targets) * self.result_bytes()
    }

    /// Weights of both signs, different for every target.
    pub fn weights(&self) -> Vec<f64> {
        let n = self.sources;
        let weight = |i: usize| (((7 * (i % n) + 3 * (i / n)) % 5) as f64 - 0.7) / n as f64;
        (0..n * self.targets).map(weight).collect()
    }

    pub fn row(&self, limit: String) -> Row {
        let Blend { dtype, sources, targets, .. } = *self;
        let (from, to) = (plural(sources), plural(targets));
        Row {
            name: format!("{sources} {} snapshot{from} to {targets} target{to}", name(dtype)),
            work: Work::Blend,
            bytes: self.bytes() as u64,
            limit: Some(limit),
        }
    }
}
