//! Averages of the products of adapters, whose factors in f64 are larger than the bound.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::PoisonError;

use posthoc_ema::{AdapterProduct, At, CheckpointOptions, Checkpoints, Profile, WriteOptions};

use crate::{MEASURED, most_anonymous};

/// Most anonymous memory, in bytes.
const BOUND: u64 = 64 << 20;

/// Pairs of factors of rank 1, and elements of each factor: 80 MiB in f64 for each checkpoint and for the average.
const PAIRS: usize = 40;
const ELEMENTS: usize = 1 << 17;

/// Writes an adapter. The first element of each `B` is `value`, that of `A` is 1, and all others are zero.
fn save(path: &Path, value: f32) {
    let names = (0..PAIRS).flat_map(|i| [format!("layer{i:02}.lora_A.weight"), format!("layer{i:02}.lora_B.weight")]);
    let mut header = serde_json::Map::new();
    for (i, name) in names.enumerate() {
        let shape = if i % 2 == 0 { [1, ELEMENTS] } else { [ELEMENTS, 1] };
        let offsets = [i, i + 1].map(|i| 4 * ELEMENTS * i);
        header.insert(name, serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": offsets }));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = File::create(path).unwrap();
    file.write_all_at(&[&(header.len() as u64).to_le_bytes()[..], &header].concat(), 0).unwrap();
    let data = 8 + header.len();
    file.set_len((data + 2 * PAIRS * ELEMENTS * 4) as u64).unwrap();
    for i in 0..2 * PAIRS {
        let first = if i % 2 == 0 { 1.0 } else { value };
        file.write_all_at(&f32::to_le_bytes(first), (data + 4 * ELEMENTS * i) as u64).unwrap();
    }
}

#[test]
fn products_of_adapters_are_averaged_in_64_mib() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let temp = tempfile::tempdir().unwrap();
    let paths = [1, 3].map(|step| temp.path().join(format!("lora-{step}.safetensors")));
    save(&paths[0], 1.0);
    save(&paths[1], 3.0);
    let out = temp.path().join("mean.safetensors");
    let (written, most) = most_anonymous(|| {
        let options = CheckpointOptions { product: AdapterProduct::Svd, ..Default::default() };
        let checkpoints = Checkpoints::open_with(&paths, &options)?;
        let merge = checkpoints.plan(Profile::gamma(0.0)?, At::Latest)?;
        checkpoints.write(&[(&merge, &out)], &WriteOptions::default())?;
        checkpoints.product_errors(&merge).map(|errors| (merge.weights.clone(), errors))
    });
    let (weights, errors) = written.unwrap();
    assert!(most > 0 && most < BOUND, "{most} bytes");
    assert_eq!(errors.unwrap().pairs, PAIRS);
    let bytes = fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let expected = weights.iter().map(|weight| weight.weight * weight.step as f64).sum::<f64>();
    for i in 0..PAIRS {
        let first = |name: &str| {
            let factor = file.tensor(&format!("layer{i:02}.{name}.weight")).unwrap();
            f64::from(f32::from_le_bytes(factor.data()[..4].try_into().unwrap()))
        };
        let product = first("lora_A") * first("lora_B");
        assert!((product - expected).abs() < 1e-6, "{i}: {product} is not {expected}");
    }
}
