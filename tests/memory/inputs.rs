//! Averages and imports of the files of other libraries. Every model is larger than the bound.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use posthoc_ema::{
    At, AverageDecay, Checkpoints, Dtype, EmaDecay, Import, ImportAverages, Profile, Tool, WriteOptions,
};

use crate::torch_files::{SPACING, Tensor, Value, dict, object, pickle, save, save_at, sizes, text};
use crate::{MEASURED, most_anonymous};

/// Most anonymous memory, in bytes.
const BOUND: u64 = 64 << 20;

/// Shape of the model's large tensor, of 72 MiB, and that of its small one.
const LARGE: [usize; 2] = [18, SPACING];
const SMALL: [usize; 1] = [5];

/// Writes two checkpoints, in which the values that are not zero are their step, and averages them. `counts` are the
/// numbers of these values in the large tensor and in the small one.
fn check(name: &str, counts: [usize; 2], save: &dyn Fn(&Path, f32)) {
    let temp = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = [1, 3].map(|step| temp.path().join(name.replace('N', &step.to_string()))).to_vec();
    save(&paths[0], 1.0);
    save(&paths[1], 3.0);
    let out = temp.path().join("mean.safetensors");
    let (written, most) = most_anonymous(|| {
        let checkpoints = Checkpoints::open(&paths, Some(&[1, 3]))?;
        let merge = checkpoints.plan(Profile::gamma(0.0)?, At::Latest)?;
        let options = WriteOptions { dtype: Some(Dtype::F16), ..WriteOptions::default() };
        checkpoints.write(&[(&merge, &out)], &options).map(|_| merge.weights.clone())
    });
    let weights = written.unwrap();
    assert!(most > 0 && most < BOUND, "{name}: {most} bytes");
    let bytes = fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let expected = weights.iter().map(|weight| weight.weight * weight.step as f64).sum::<f64>();
    let sum = |name: &str| {
        let elements = file.tensor(name).unwrap();
        let elements = elements.data().as_chunks::<2>().0.iter();
        elements.map(|&bytes| half::f16::from_le_bytes(bytes).to_f64()).sum::<f64>()
    };
    for (tensor, count) in ["large", "small"].into_iter().zip(counts) {
        let mean = sum(tensor) / count as f64;
        assert!((mean - expected).abs() < 1e-3, "{name}, {tensor}: {mean} is not {expected}");
    }
}

/// Returns the tensors of a model, the large one with these strides.
fn model(value: f32, strides: [usize; 2]) -> Value {
    let large = Tensor { strides: strides.to_vec(), ..Tensor::plain(&LARGE, value) };
    dict([("large", Value::Tensor(large)), ("small", Value::Tensor(Tensor::plain(&SMALL, value)))])
}

const PLAIN: [usize; 2] = [SPACING, 1];
const TRANSPOSED: [usize; 2] = [1, 18];

#[test]
fn files_of_pytorch_are_averaged_in_64_mib() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    check("step-N.pt", [18, 1], &|path, value| save(path, &model(value, PLAIN)));
    check("transposed-N.pt", [18, 1], &|path, value| save(path, &model(value, TRANSPOSED)));
}

/// Writes a folder of `torch.distributed.checkpoint`. Two processes have halves of the large tensor's columns.
fn save_distributed(folder: &Path, value: f32) {
    fs::create_dir(folder).unwrap();
    let index = |name: &str, offset: &[usize]| {
        let attributes = [("fqn", text(name)), ("offset", sizes(offset)), ("index", Value::Int(0))];
        object("torch.distributed.checkpoint.metadata.MetadataIndex", attributes)
    };
    let chunk = |offset: &[usize], shape: &[usize]| {
        let attributes = [("offsets", sizes(offset)), ("sizes", sizes(shape))];
        object("torch.distributed.checkpoint.metadata.ChunkStorageMetadata", attributes)
    };
    let half = [LARGE[0], LARGE[1] / 2];
    let parts = [
        ("large", vec![0, 0], half.to_vec(), value),
        ("large", vec![0, half[1]], half.to_vec(), 0.0),
        ("small", vec![0], SMALL.to_vec(), value),
    ];
    let mut storage = Vec::new();
    for (i, (name, offset, shape, value)) in parts.iter().enumerate() {
        let file_name = format!("__{i}_0.distcp");
        let file = File::create(folder.join(&file_name)).unwrap();
        let end = save_at(&file, 0, &Value::Tensor(Tensor::plain(shape, *value)));
        let place =
            [("relative_path", text(&file_name)), ("offset", Value::Int(0)), ("length", Value::Int(end as usize))];
        let place = object("torch.distributed.checkpoint.filesystem._StorageInfo", place);
        storage.push((index(name, offset), place));
    }
    let tensor = |shape: &[usize], chunks: Vec<Value>| {
        let attributes = [("size", sizes(shape)), ("chunks", Value::List(chunks))];
        object("torch.distributed.checkpoint.metadata.TensorStorageMetadata", attributes)
    };
    let large = tensor(&LARGE, vec![chunk(&[0, 0], &half), chunk(&[0, half[1]], &half)]);
    let tensors = dict([("large", large), ("small", tensor(&SMALL, vec![chunk(&[0], &SMALL)]))]);
    let metadata = [("state_dict_metadata", tensors), ("storage_data", Value::Dict(storage))];
    let metadata = object("torch.distributed.checkpoint.metadata.Metadata", metadata);
    fs::write(folder.join(".metadata"), pickle(&metadata).0).unwrap();
}

#[test]
fn distributed_checkpoints_are_averaged_in_64_mib() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    check("step-N", [9, 1], &save_distributed);
}

/// Writes a checkpoint of DeepSpeed by two processes.
fn save_deepspeed(folder: &Path, value: f32, stage: usize) {
    fs::create_dir(folder).unwrap();
    let shapes = Value::List(vec![dict([("large", sizes(&LARGE)), ("small", sizes(&SMALL))])]);
    let is_in_parts = stage == 3;
    let count = LARGE[0] * LARGE[1] + SMALL[0];
    for rank in 0..2 {
        let state = [("module", dict([])), ("param_shapes", shapes.clone()), ("global_steps", Value::Int(1))];
        if is_in_parts {
            save(&folder.join(format!("zero_pp_rank_{rank}_mp_rank_00_model_states.pt")), &dict(state));
        } else if rank == 0 {
            save(&folder.join("mp_rank_00_model_states.pt"), &dict(state));
        }
        // Stage 2 stores half of all elements in one list, stage 3 the halves of all parameters after each other.
        let length = if is_in_parts { LARGE[0] * LARGE[1] / 2 + SMALL[0].div_ceil(2) } else { count.div_ceil(2) };
        let key = if is_in_parts { "fp32_flat_groups" } else { "single_partition_of_fp32_groups" };
        let processes = Value::List(vec![Value::Int(2)]);
        let group = Value::List(vec![Value::Tensor(Tensor::plain(&[length], value))]);
        let optimizer = dict([("zero_stage", Value::Int(stage)), ("partition_count", processes), (key, group)]);
        let path = folder.join(format!("zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"));
        save(&path, &dict([("optimizer_state_dict", optimizer)]));
    }
}

#[test]
fn checkpoints_of_deepspeed_are_averaged_in_64_mib() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    for (stage, counts) in [(2, [19, 1]), (3, [18, 2])] {
        check("step-N", counts, &|folder, value| save_deepspeed(folder, value, stage));
    }
}

/// Tensors with other strides were once copied whole, and imports had a checkpoint in memory.
#[test]
fn imports_take_64_mib() {
    let _alone = MEASURED.lock().unwrap_or_else(PoisonError::into_inner);
    let temp = tempfile::tempdir().unwrap();
    let averages = temp.path().join("averages");
    fs::create_dir(&averages).unwrap();
    for step in [10_u8, 20] {
        let ema = model(step.into(), TRANSPOSED);
        save(&averages.join(format!("step-{step}.pt")), &dict([("ema", ema)]));
    }
    let decays = vec![AverageDecay::Ema(EmaDecay::constant(0.9))];
    let import = ImportAverages { decays, update_every: Some(1), ..Default::default() };
    let run = temp.path().join("run");
    let (report, most) = most_anonymous(|| import.open(&averages)?.write(&run, None));
    assert_eq!(report.unwrap().steps, [10, 20]);
    assert!(most < BOUND, "averages: {most} bytes");

    let tool = temp.path().join("tool");
    fs::create_dir(&tool).unwrap();
    for step in [10_u8, 20] {
        let tensor = |shape: &[usize], value: u8| Value::Tensor(Tensor::plain(shape, value.into()));
        let entries = [("initted", tensor(&[], 1)), ("step", tensor(&[], step)), ("large", tensor(&LARGE, step))];
        save(&tool.join(format!("0.{step}.pt")), &dict(entries));
    }
    let mut import = Import::new(Tool::PytorchPosthocEma, vec![Profile::sigma_rel(0.1).unwrap()], 1);
    import.update_after_step = Some(0);
    let run = temp.path().join("run-of-tool");
    let (report, most) = most_anonymous(|| import.write(&tool, &run, None));
    report.unwrap();
    assert!(most < BOUND, "tool: {most} bytes");
}
