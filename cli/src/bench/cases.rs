//! Sizes, cases and input values of the measurements, the same on every device.

use posthoc_ema::compute::cpu::{Layout, Precision};
use posthoc_ema::{Error, Result};
use safetensors::Dtype;

use super::session::TaskInfo;
use super::{PROFILES, Work};

/// Tensors of the model that has few large ones.
const FEW: usize = 4;

/// Weight of new parameters in an update, for each profile.
pub(super) const WEIGHTS: [f32; PROFILES] = [0.3, 0.05];

/// Period of the parameters: a prime, so that every value occurs at every position of a chunk.
pub(super) const PERIOD: usize = 251;

/// Sizes of the work on one device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub parameters: usize,
    pub tensors: usize,
    pub snapshots: usize,
    pub targets: usize,
}

impl Sizes {
    /// Refuses sizes that need more bytes of a memory than are free.
    pub fn check_memory(&self, needed: u128, free: u128, memory: &str) -> Result<()> {
        if needed <= free {
            return Ok(());
        }
        let Sizes { parameters, snapshots, targets, .. } = self;
        let needed = needed as f64 / 1e9;
        let free = free as f64 / 1e9;
        let reason = format!(
            "{parameters} parameters with {snapshots} snapshots and {targets} targets take {needed:.1} GB of {memory}, \
             and {free:.1} GB are free: ask for fewer parameters"
        );
        Err(Error::Setting { option: "parameters", reason })
    }
}

/// Returns parameter `i`, which is exact in f32 and bf16.
pub(super) fn parameter(i: usize) -> f32 {
    (i % PERIOD) as f32 / 128.0 - 1.0
}

/// Returns word `i` of the snapshots.
///
/// Every 16 bits are `0x3c00` to `0x3fff`, so that f16, bf16 and f32 values are finite and at most 2.
pub(super) fn word(i: usize) -> u64 {
    let mixed = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    0x3c00_3c00_3c00_3c00 | (mixed & 0x03ff_03ff_03ff_03ff)
}

/// Splits `n` parameters into tensors whose sizes differ by at most one.
pub(super) fn split(n: usize, tensors: usize) -> Vec<usize> {
    (0..tensors).map(|i| n / tensors + usize::from(i < n % tensors)).collect()
}

/// Returns the numbers of tensors of the two models: few and many.
pub(super) fn tensor_counts(sizes: &Sizes) -> Vec<usize> {
    let mut counts = vec![FEW.min(sizes.parameters), sizes.tensors];
    counts.dedup();
    counts
}

/// Returns the numbers of targets of the blends: one and several.
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

/// An update of a model with tensors of some sizes.
#[derive(Clone, Debug)]
pub(super) struct UpdateCase {
    pub dtype: Dtype,
    pub precision: Precision,
    pub elements: Vec<usize>,
}

impl UpdateCase {
    /// Returns all updates: f32 and bf16 parameters, plain and compensated averages, few large and many small tensors.
    pub fn all(sizes: &Sizes) -> Vec<UpdateCase> {
        let mut all = Vec::new();
        for tensors in tensor_counts(sizes) {
            for dtype in [Dtype::F32, Dtype::BF16] {
                for precision in [Precision::Plain, Precision::Compensated] {
                    all.push(UpdateCase { dtype, precision, elements: split(sizes.parameters, tensors) });
                }
            }
        }
        all
    }

    pub fn layout(&self) -> Layout {
        Layout::new(self.elements.iter().copied())
    }

    pub fn info(&self, limit: String) -> TaskInfo {
        let low = if self.precision == Precision::Plain { 0 } else { 2 };
        let each = self.dtype.bitsize() / 8 + PROFILES * 2 * (size_of::<f32>() + low);
        let precision = if self.precision == Precision::Plain { "plain" } else { "compensated" };
        let dtype = name(self.dtype);
        let tensors = self.elements.len();
        TaskInfo {
            name: format!("{dtype}, {precision}, {tensors} tensor{}", plural(tensors)),
            work: Work::Update,
            bytes: (each * self.elements.iter().sum::<usize>()) as u64,
            limit: Some(limit),
        }
    }
}

/// A blend of all snapshots of a dtype into results of the same dtype.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlendCase {
    pub dtype: Dtype,
    pub sources: usize,
    pub targets: usize,
    pub parameters: usize,
}

impl BlendCase {
    /// Returns all blends: f16, bf16 and f32, into one target and into several.
    pub fn all(sizes: &Sizes) -> Vec<BlendCase> {
        let Sizes { parameters, snapshots: sources, .. } = *sizes;
        let mut all = Vec::new();
        for dtype in [Dtype::F16, Dtype::BF16, Dtype::F32] {
            for targets in target_counts(sizes) {
                all.push(BlendCase { dtype, sources, targets, parameters });
            }
        }
        all
    }

    pub fn result_bytes(&self) -> usize {
        self.parameters * self.dtype.bitsize() / 8
    }

    pub fn bytes(&self) -> usize {
        (self.sources + self.targets) * self.result_bytes()
    }

    /// Returns weights of both signs, different for every target.
    pub fn weights(&self) -> Vec<f64> {
        let n = self.sources;
        (0..n * self.targets).map(|i| (((7 * (i % n) + 3 * (i / n)) % 5) as f64 - 0.7) / n as f64).collect()
    }

    pub fn info(&self, limit: String) -> TaskInfo {
        let BlendCase { dtype, sources, targets, .. } = *self;
        let from = plural(sources);
        let to = plural(targets);
        TaskInfo {
            name: format!("{sources} {} snapshot{from} to {targets} target{to}", name(dtype)),
            work: Work::Blend,
            bytes: self.bytes() as u64,
            limit: Some(limit),
        }
    }
}
