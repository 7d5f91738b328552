//! Tests of checkpoints with owned values, as threads and devices pass them.

use super::storage::listing;
use super::*;
use crate::compute::cpu;
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::values::OwnedValues;

/// Returns a checkpoint of the run to be written into another directory, with its values.
pub(super) fn checkpoint_for(ema: &PostHocEma, dir: &Path) -> (CheckpointMeta, OwnedValues) {
    std::fs::create_dir_all(dir).unwrap();
    let meta = CheckpointMeta { dir: dir.to_owned(), ..ema.checkpoint_meta(ema.stored) };
    let held = ema.engine.values().unwrap();
    let values = held.values();
    (meta, OwnedValues { averages: values.averages.to_vec(), copies: values.copies.to_vec(), ..OwnedValues::default() })
}

/// Returns names and contents of all files but the lock.
pub(super) fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let names = listing(dir).into_iter().map(|(path, bytes)| (path.file_name().unwrap().to_owned(), bytes));
    names.map(|(name, bytes)| (name.into_string().unwrap(), bytes)).filter(|(name, _)| name != ".lock").collect()
}

/// Returns a model with a tensor that f16 cannot hold and one that is copied.
pub(super) fn model(step: u16) -> Tensors {
    let value = f32::from(step);
    let mut model = Tensors::default();
    model.insert("fine", Tensor::new(&[2, 3], &[value, 0.1, -0.0, 1e-7, 3.0, value / 3.0]).unwrap());
    model.insert("large", Tensor::new(&[5], &[70_000.0, value, 1.0, 2.0, 3.0]).unwrap());
    model.insert("steps", Tensor::new(&[1], &[i64::from(step)]).unwrap());
    model
}

pub(super) fn trained(dir: &Path) -> PostHocEma {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(20).checkpoint_dtype(Dtype::F16);
    let options = options.snapshot_growth(None);
    let mut ema = options.create(&model(0)).unwrap();
    for step in 1..=20 {
        ema.update(&model(step)).unwrap();
    }
    ema.flush().unwrap();
    ema
}

#[test]
fn dtypes_chosen_beforehand_give_the_same_files() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, mut values) = checkpoint_for(&ema, &temp.path().join("other"));
    meta.store(&values.as_values()).unwrap();
    assert_eq!(contents(&meta.dir), contents(&dir));

    values.dtypes = Some(vec![vec![Dtype::F16, Dtype::F32]; 2]);
    let meta = CheckpointMeta { dir: temp.path().join("chosen"), ..meta };
    std::fs::create_dir(&meta.dir).unwrap();
    meta.store(&values.as_values()).unwrap();
    assert_eq!(contents(&meta.dir), contents(&dir));
}

#[test]
fn dtypes_are_chosen_by_given_ranges() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, values) = checkpoint_for(&ema, &temp.path().join("other"));
    let range = |largest| cpu::ValueRange { largest, first_not_finite: None };
    // The largest value that f16 takes, and the first that it would round to infinity.
    let fine = vec![range(65_519.996), range(65_520.0)];
    let chosen = meta.choose_dtypes(&values.as_values(), &[fine.clone(), fine.clone()]).unwrap();
    assert_eq!(chosen, [[Dtype::F16, Dtype::F32], [Dtype::F16, Dtype::F32]]);
    let mut poisoned = values.clone();
    let place = meta.registry.layout().range(1);
    poisoned.averages[1].high[place.start + 3] = f32::NEG_INFINITY;
    let bad = vec![range(1.0), cpu::ValueRange { largest: 0.0, first_not_finite: Some(3) }];
    let text = meta.choose_dtypes(&poisoned.as_values(), &[fine, bad]).unwrap_err().to_string();
    for part in ["`large`", "sigma_rel 0.28", "-inf", "element 3", "step 20"] {
        assert!(text.contains(part), "{text}");
    }
    // Without ranges, a scan of the values gives the same error.
    let failure = meta.store(&poisoned.as_values()).unwrap_err();
    assert!(matches!(failure, Failure::Values(_)) && failure.into_error().to_string() == text);
    assert!(contents(&meta.dir).is_empty());
}

#[test]
fn failures_are_sorted_by_stage() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, values) = checkpoint_for(&ema, &temp.path().join("other"));
    let gone = CheckpointMeta { dir: temp.path().join("gone"), ..meta.clone() };
    assert!(matches!(gone.store(&values.as_values()), Err(Failure::Files(Error::Io { .. }))));
    // An old snapshot that cannot be removed does not undo the new one.
    let mut meta = meta;
    meta.settings.max_checkpoints = 1;
    let earlier = CheckpointMeta { history: meta.history.until(10), ..meta.clone() };
    earlier.store(&values.as_values()).unwrap();
    std::fs::create_dir(meta.dir.join("0.10.safetensors.index.json")).unwrap();
    let failure = meta.store(&values.as_values()).unwrap_err();
    assert!(matches!(failure, Failure::Removal(_)));
    assert!(meta.missing().unwrap().is_empty());
}
