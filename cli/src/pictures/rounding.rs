//! Rounding of stored snapshots.

use std::collections::BTreeMap;

use posthoc_ema::{Dtype, Run, rounding};

/// The rounding of snapshots.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounding {
    /// Root mean square relative error of a stored element:
    /// [`relative_rounding`](posthoc_ema::math::relative_rounding).
    pub rms: f64,
    /// Dtypes of the snapshots: `f16`, `bf16 and f32`.
    pub dtypes: String,
}

impl Rounding {
    /// Returns the rounding of snapshots in one dtype.
    pub fn of_dtype(dtype: Dtype) -> Rounding {
        Rounding { rms: rounding(dtype), dtypes: dtype.to_string().to_lowercase() }
    }

    /// Returns the rounding of a run's newest snapshot, over all averaged elements.
    pub fn of_run(run: &Run) -> Rounding {
        // The number of elements and the rounding of each dtype.
        let mut elements: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        let newest = run.snapshots().iter().max_by_key(|snapshot| snapshot.id.step);
        for name in run.averaged() {
            if let Some(tensor) = newest.and_then(|snapshot| snapshot.stored(&name)) {
                let dtype = tensor.dtype.to_string().to_lowercase();
                let count = tensor.shape.iter().map(|&n| n as f64).product::<f64>();
                elements.entry(dtype).or_insert((0.0, rounding(tensor.dtype))).0 += count;
            }
        }
        let total: f64 = elements.values().map(|(count, _)| count).sum();
        let square: f64 = elements.values().map(|(count, rms)| count * rms * rms).sum();
        let dtypes: Vec<&str> = elements.keys().map(String::as_str).collect();
        Rounding { rms: (square / total.max(1.0)).sqrt(), dtypes: dtypes.join(" and ") }
    }
}
