//! Tests of checkpoints with owned values, as threads and devices pass them.

use super::storage::listing;
use super::*;
use crate::compute::cpu;
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::values::{Converted, OwnedValues};

/// Returns a checkpoint of the run to be written into another directory, with its values.
pub(super) fn checkpoint_for(ema: &PostHocEma, dir: &Path) -> (CheckpointMeta, OwnedValues) {
    std::fs::create_dir_all(dir).unwrap();
    let meta = CheckpointMeta { dir: dir.to_owned(), ..ema.checkpoint_meta(ema.stored) };
    let held = ema.engine.values().unwrap();
    let values = held.values();
    (meta, OwnedValues { averages: values.averages.to_vec(), copies: values.copies.to_vec(), ..OwnedValues::default() })
}

/// Converts averages to the data of their snapshots, with gaps between the tensors.
fn converted(meta: &CheckpointMeta, averages: &[Averages], dtypes: &[Dtype]) -> Vec<Converted> {
    let layout = meta.registry.layout();
    let of_profile = |averages: &Averages| {
        let mut converted = Converted { places: Vec::new(), bytes: Vec::new() };
        for (i, &dtype) in dtypes.iter().enumerate() {
            let start = converted.bytes.len() + 3;
            let end = start + layout.range(i).len() * dtype.bitsize() / 8;
            converted.bytes.resize(end, 0xee);
            averages.store(&mut converted.bytes[start..], layout.range(i), dtype);
            converted.places.push(start..end);
        }
        converted
    };
    averages.iter().map(of_profile).collect()
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
fn values_converted_beforehand_give_the_same_files() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, mut values) = checkpoint_for(&ema, &temp.path().join("other"));
    meta.store(&values.as_values()).unwrap();
    assert_eq!(contents(&meta.dir), contents(&dir));

    let dtypes = [Dtype::F16, Dtype::F32];
    values.dtypes = Some(vec![dtypes.to_vec(); 2]);
    values.converted = Some(converted(&meta, &values.averages, &dtypes));
    let meta = CheckpointMeta { dir: temp.path().join("converted"), ..meta };
    std::fs::create_dir(&meta.dir).unwrap();
    meta.store(&values.as_values()).unwrap();
    assert_eq!(contents(&meta.dir), contents(&dir));

    // Snapshots store the converted values, and the state the averages.
    let first = &mut values.converted.as_mut().unwrap()[1];
    let start = first.places[1].start;
    first.bytes[start..start + 4].copy_from_slice(&7.5f32.to_le_bytes());
    meta.store(&values.as_values()).unwrap();
    let run = Run::open(&meta.dir).unwrap();
    let large = |i: usize| bytemuck::pod_read_unaligned::<f32>(&run.snapshots()[i].tensor("large").unwrap().1[..4]);
    assert_eq!((large(0), large(1)), (70_000.0, 7.5));
    let state = |dir: &Path| std::fs::read(dir.join("state.safetensors")).unwrap();
    assert_eq!(state(&meta.dir), state(&dir));
}

#[test]
fn dtypes_are_chosen_by_given_ranges() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, values) = checkpoint_for(&ema, &temp.path().join("other"));
    let range = |largest| cpu::ValueRange { largest, first_not_finite: None };
    let never = |_: usize, _: usize| -> Result<f32> { panic!("no element has to be looked up") };
    // The largest value that f16 takes, and the first that it would round to infinity.
    let chosen = meta.choose_dtypes(0, &[range(65_519.996), range(65_520.0)], never).unwrap();
    assert_eq!(chosen, [Dtype::F16, Dtype::F32]);
    let bad = cpu::ValueRange { largest: 0.0, first_not_finite: Some(3) };
    let look_up = |tensor: usize, element: usize| {
        assert_eq!((tensor, element), (1, 3));
        Ok(f32::NEG_INFINITY)
    };
    let text = meta.choose_dtypes(1, &[range(1.0), bad], look_up).unwrap_err().to_string();
    for part in ["`large`", "sigma_rel 0.28", "-inf", "element 3", "step 20"] {
        assert!(text.contains(part), "{text}");
    }
    // Without ranges, a scan of the values gives the same error.
    let mut poisoned = values.clone();
    let place = meta.registry.layout().range(1);
    poisoned.averages[1].high[place.start + 3] = f32::NEG_INFINITY;
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
