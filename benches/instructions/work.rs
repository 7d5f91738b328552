//! Hot loops whose instructions are counted.

use posthoc_ema::Dtype;
use posthoc_ema::Precision;
use posthoc_ema::compute::cpu::{Averages, Blend, Incoming, Layout, SimdLevel, UpdateWeights, blend_with, update_with};

/// Elements of a tile: a multiple of the tiles of every loop (64 and 96).
pub const TILE: usize = 192;

/// Number of snapshots that are blended.
const SOURCES: usize = 40;

/// Loop, with the instruction set that it is compiled for.
pub struct Row {
    level: SimdLevel,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// Update of two averages from parameters of a dtype.
    Update(Dtype, Precision),
    /// Blend of sources of a dtype into a number of targets of the same dtype.
    Blend(Dtype, usize),
}

/// Returns the rows to count on this machine, on x86-64 without the baseline, where speed does not depend on these
/// loops.
pub fn rows() -> Vec<Row> {
    let levels =
        SimdLevel::all().into_iter().filter(|level| *level != SimdLevel::BASELINE || cfg!(not(target_arch = "x86_64")));
    let kinds = [
        Kind::Update(Dtype::F32, Precision::Plain),
        Kind::Update(Dtype::F32, Precision::Compensated),
        Kind::Update(Dtype::BF16, Precision::Plain),
        Kind::Update(Dtype::BF16, Precision::Compensated),
        Kind::Update(Dtype::F16, Precision::Compensated),
        Kind::Blend(Dtype::F16, 1),
        Kind::Blend(Dtype::BF16, 1),
        Kind::Blend(Dtype::F32, 1),
        Kind::Blend(Dtype::F16, 8),
        Kind::Blend(Dtype::F32, 8),
    ];
    levels.flat_map(|level| kinds.map(|kind| Row { level, kind })).collect()
}

impl Row {
    pub fn name(&self) -> String {
        let level = self.level.name();
        match self.kind {
            Kind::Update(dtype, precision) => format!("{level}: update of 2, {dtype}, {precision:?}").to_lowercase(),
            Kind::Blend(dtype, targets) => format!("{level}: blend of {SOURCES}, {dtype}, to {targets}").to_lowercase(),
        }
    }

    /// Returns the work on `elements` elements, ready to be done repeatedly.
    pub fn prepare(&self, elements: usize) -> Box<dyn FnMut()> {
        let level = self.level;
        match self.kind {
            Kind::Update(dtype, precision) => {
                let layout = Layout::new([elements]);
                let mut averages = vec![Averages::zeros(&layout, precision); 2];
                let bytes = values(dtype, elements);
                Box::new(move || {
                    let weights = UpdateWeights::at(1, &[0.3, 0.05]);
                    update_with(level, &mut averages, &[Incoming { dtype, bytes: &bytes }], &layout, weights);
                })
            }
            Kind::Blend(dtype, targets) => {
                let bytes = values(dtype, elements);
                let mut results = vec![vec![0; bytes.len()]; targets];
                let weights: Vec<f64> = (0..SOURCES * targets).map(|i| (i % 7) as f64 / 40.0).collect();
                Box::new(move || {
                    let mut dst: Vec<&mut [u8]> = results.iter_mut().map(Vec::as_mut_slice).collect();
                    let blend = Blend { dtypes: &[dtype; SOURCES], weights: &weights, output: dtype };
                    blend_with(level, &mut dst, &[bytes.as_slice(); SOURCES], &blend).expect("the sums are small");
                })
            }
        }
    }
}

/// Fills elements with words of `0x3c00`: numbers near one in f16, and small ones in the other dtypes.
fn values(dtype: Dtype, elements: usize) -> Vec<u8> {
    0x3c00u16.to_le_bytes().repeat(elements * dtype.bitsize() / 16)
}
