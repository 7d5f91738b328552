//! Folders, shards and PyTorch files.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::import::tests::pt::Pt;

/// Writes a checkpoint as Hugging Face's trainer does: two shards, their index, and all other files.
fn folder(dir: &Path, step: u64) {
    fs::create_dir_all(dir).unwrap();
    let tensors = model(step);
    let mut map = BTreeMap::new();
    for (i, part) in [&tensors[..3], &tensors[3..]].into_iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", i + 1);
        save(&dir.join(&name), part, &[("format", "pt"), ("part", &i.to_string())]);
        map.extend(part.iter().map(|(tensor, _)| (*tensor, name.clone())));
    }
    let index = json!({"metadata": {"total_size": 1, "total_parameters": 7}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config = json!({"model_type": "llama", "torch_dtype": "float32", "_name_or_path": step});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    for name in ["tokenizer.json", "merges.txt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"] {
        fs::write(dir.join(name), format!("{name} {step}")).unwrap();
    }
    fs::write(dir.join("trainer_state.json"), json!({"global_step": step}).to_string()).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn plain_mean() -> Profile {
    Profile::uniform(Window::Fraction(1.0)).unwrap()
}

/// Averages the same checkpoints in single files.
fn reference(merge: &Merge) -> Tensors {
    let (_temp, paths) = series();
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    checkpoints.load(&checkpoints.plan(merge.profile.clone(), At::Step(merge.at)).unwrap()).unwrap()
}

#[test]
fn folders_in_shards_become_a_folder_in_shards() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    STEPS.iter().for_each(|step| folder(&run.join(format!("checkpoint-{step}")), *step));
    fs::create_dir(run.join("logs")).unwrap();
    fs::write(run.join("logs/events"), "").unwrap();
    let checkpoints = Checkpoints::open(&[&run], None).unwrap();
    assert_eq!(checkpoints.steps(), STEPS);
    assert!(checkpoints.are_folders());
    let [note] = checkpoints.notes() else { panic!("{:?}", checkpoints.notes()) };
    assert!(note.contains("has a `total_size` of 1 bytes, but its shards hold "), "{note}");
    for (at, newest) in [(At::Latest, 340), (At::Step(310), 300)] {
        let merge = checkpoints.plan(Profile::sigma_rel(0.2).unwrap(), at).unwrap();
        let out = temp.path().join(format!("deep/average-{newest}"));
        checkpoints.write(&[(&merge, &out)], &WriteOptions::default()).unwrap();
        let shards = [1, 2].map(|i| format!("model-0000{i}-of-00002.safetensors"));
        let small = ["config.json", "merges.txt"];
        let rest = ["model.safetensors.index.json", "tokenizer.json"];
        let expected = [&small[..], &shards.each_ref().map(String::as_str), &rest].concat();
        assert_eq!(names(&out), expected);
        assert_eq!(fs::read_to_string(out.join("merges.txt")).unwrap(), format!("merges.txt {newest}"));
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config, json!({"model_type": "llama", "torch_dtype": "float32", "_name_or_path": newest}));
        let index: Value =
            serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
        let mut all = Tensors::default();
        for (i, shard) in shards.iter().enumerate() {
            let (tensors, metadata) = read(&out.join(shard));
            assert_eq!((metadata["part"].as_str(), metadata["format"].as_str()), (["0", "1"][i], "pt"));
            for (name, tensor) in tensors {
                assert_eq!(index["weight_map"][&name], *shard, "{name}");
                all.insert(name, tensor);
            }
        }
        let size: usize = all.iter().map(|(_, tensor)| tensor.bytes.len()).sum();
        assert_eq!(index["metadata"], json!({"total_size": size, "total_parameters": 7}));
        assert_eq!(index["weight_map"].as_object().unwrap().len(), all.len());
        assert_eq!(all, reference(&merge));
    }
    assert_eq!(names(temp.path()), ["deep", "run"], "nothing temporary is left");
    // The average is itself a checkpoint, with its step in the metadata.
    let again = [temp.path().join("deep/average-300"), temp.path().join("deep/average-340")];
    assert_eq!(Checkpoints::open(&again, None).unwrap().steps(), [310, 340]);
}

#[test]
fn dtype_is_in_the_configuration_and_a_file_is_written_if_named() {
    let temp = tempfile::tempdir().unwrap();
    let folders = [1, 2].map(|step| temp.path().join(format!("checkpoint-{step}")));
    (1..).zip(&folders).for_each(|(step, dir)| folder(dir, step));
    let checkpoints = Checkpoints::open(&folders, None).unwrap();
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    let dir = temp.path().join("average");
    let file = temp.path().join("average.safetensors");
    let options = WriteOptions { dtype: Some(Dtype::BF16), ..WriteOptions::default() };
    checkpoints.write(&[(&merge, &dir), (&merge, &file)], &options).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    assert_eq!(config, json!({"model_type": "llama", "torch_dtype": "bfloat16", "_name_or_path": 2}));
    let (whole, metadata) = read(&file);
    assert_is_sum(&whole, &[1, 2], &[0.5, 0.5], Some(Dtype::BF16));
    assert_eq!(metadata["format"], "pt");
    let (part, _) = read(&dir.join("model-00001-of-00002.safetensors"));
    assert!(part.len() == 3 && part.iter().all(|(name, tensor)| whole.get(name) == Some(tensor)));
}

/// Python's tools write `NaN` and `Infinity`, which are not JSON.
#[test]
fn json_files_may_hold_numbers_that_are_not_finite() {
    let temp = tempfile::tempdir().unwrap();
    let config = r#"{"torch_dtype": "float32", "time_step_limit": [0.0, Infinity]}"#;
    let folders = [1, 2].map(|step| temp.path().join(format!("checkpoint-{step}")));
    for (step, dir) in (1..).zip(&folders) {
        folder(dir, step);
        fs::write(dir.join("config.json"), config).unwrap();
        let state = format!(r#"{{"log_history": [{{"loss": NaN}}], "global_step": {}}}"#, 10 * step);
        fs::write(dir.join("trainer_state.json"), state).unwrap();
    }
    let checkpoints = Checkpoints::open(&folders, None).unwrap();
    assert_eq!(checkpoints.steps(), [10, 20]);
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    let write = |name: &str| {
        let read = std::sync::atomic::AtomicU64::new(0);
        let progress = |bytes| {
            read.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        };
        let options = WriteOptions { dtype: Some(Dtype::BF16), progress: Some(&progress), ..WriteOptions::default() };
        let written = checkpoints.write(&[(&merge, &temp.path().join(name))], &options);
        (written.map_err(|error| error.to_string()), read.into_inner())
    };
    write("average").0.unwrap();
    let written = fs::read_to_string(temp.path().join("average/config.json")).unwrap();
    assert_eq!(written, config.replace("float32", "bfloat16"));
    // Damaged files are reported before the blend.
    fs::write(folders[1].join("config.json"), "{").unwrap();
    let (written, bytes) = write("again");
    assert!(written.unwrap_err().contains("checkpoint-2/config.json: ") && bytes == 0);
    fs::write(folders[0].join("trainer_state.json"), "{").unwrap();
    let text = Checkpoints::open(&folders, None).unwrap_err().to_string();
    assert!(text.contains("checkpoint-1/trainer_state.json: "), "{text}");
}

/// Lists modules as sentence-transformers does; those without weights are folders with a configuration.
#[test]
fn modules_are_averaged_with_their_configurations() {
    let temp = tempfile::tempdir().unwrap();
    let folders = [1, 2].map(|step| temp.path().join(format!("checkpoint-{step}")));
    for (step, dir) in (1..).zip(&folders) {
        folder(dir, step);
        let modules =
            ["", "1_Pooling", "2_Normalize", "3_Dense", "../out", "deep/4_Pooling"].map(|path| json!({"path": path}));
        fs::write(dir.join("modules.json"), json!(modules).to_string()).unwrap();
        for module in ["1_Pooling", "3_Dense", "deep/4_Pooling", "other"] {
            fs::create_dir_all(dir.join(module)).unwrap();
            fs::write(
                dir.join(module).join("config.json"),
                format!("{{\"dtype\": \"float32\", \"_name_or_path\": {step}}}"),
            )
            .unwrap();
            fs::write(dir.join(module).join("notes.txt"), "").unwrap();
        }
        let dense = [("w", Tensor { dtype: Dtype::F32, shape: vec![1], bytes: (step as f32).to_le_bytes().into() })];
        save(&dir.join("3_Dense/model.safetensors"), &dense, &[]);
    }
    let checkpoints = Checkpoints::open(&folders, None).unwrap();
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    let out = temp.path().join("average");
    checkpoints.write(&[(&merge, &out)], &WriteOptions::default()).unwrap();
    assert!(names(&out).iter().map(String::as_str).filter(|name| !name.contains('.')).eq([
        "1_Pooling",
        "3_Dense",
        "deep"
    ]));
    assert_eq!(names(&out.join("3_Dense")), ["config.json", "model.safetensors", "notes.txt"]);
    let dense = read(&out.join("3_Dense/model.safetensors")).0;
    assert_eq!(dense.get("w").unwrap().bytes, 1.5f32.to_le_bytes());
    for module in ["1_Pooling", "deep/4_Pooling"] {
        assert_eq!(names(&out.join(module)), ["config.json", "notes.txt"]);
        assert!(fs::read_to_string(out.join(module).join("config.json")).unwrap().contains("\"_name_or_path\": 2"));
    }
}

/// A folder may hold a file that is larger than any document that is read whole.
#[test]
fn large_files_are_copied_in_pieces() {
    let temp = tempfile::tempdir().unwrap();
    let folders = [1, 2].map(|step| temp.path().join(format!("checkpoint-{step}")));
    for (step, dir) in (1..).zip(&folders) {
        folder(dir, step);
        let samples = fs::File::create(dir.join("samples.jsonl")).unwrap();
        samples.set_len((1 << 28) + 3).unwrap();
    }
    let checkpoints = Checkpoints::open(&folders, None).unwrap();
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    let out = temp.path().join("average");
    checkpoints.write(&[(&merge, &out)], &WriteOptions::default()).unwrap();
    assert_eq!(fs::metadata(out.join("samples.jsonl")).unwrap().len(), (1 << 28) + 3);
}

/// Returns a model as a `.pt` file.
fn pt(step: u64) -> Pt {
    let storage = |dtype| match dtype {
        Dtype::F32 => "FloatStorage",
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
        Dtype::F64 => "DoubleStorage",
        Dtype::I64 => "LongStorage",
        _ => "BoolStorage",
    };
    model(step)
        .into_iter()
        .fold(Pt::default(), |pt, (name, tensor)| pt.tensor(name, storage(tensor.dtype), &tensor.shape, &tensor.bytes))
}

#[test]
fn pytorch_files_give_the_same_bits() {
    let temp = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = STEPS.iter().map(|step| temp.path().join(format!("epoch=1-step={step}.pt"))).collect();
    paths.iter().zip(STEPS).for_each(|(path, step)| pt(step).save(path));
    // The last one also holds state of the training.
    let int = |value: u16| [b"M", &value.to_le_bytes()[..]].concat();
    pt(340).within("state_dict").entry("global_step", &int(340)).save(&paths[4]);
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    assert_eq!(checkpoints.steps(), STEPS);
    let merge = checkpoints.plan(Profile::sigma_rel(0.25).unwrap(), At::Latest).unwrap();
    assert_eq!(checkpoints.load(&merge).unwrap(), reference(&merge));
    let out = temp.path().join("out/average.safetensors");
    checkpoints.write(&[(&merge, &out)], &WriteOptions::default()).unwrap();
    assert_eq!(read(&out).0, reference(&merge));
    assert_eq!(names(&temp.path().join("out")), ["average.safetensors"]);
}

/// Tensors beside the model's dict are not part of the model.
#[test]
fn model_is_found_beside_other_tensors() {
    let temp = tempfile::tempdir().unwrap();
    let save = |name: &str, pt: Pt| {
        let path = temp.path().join(name);
        pt.save(&path);
        path
    };
    let paths = STEPS.map(|step| {
        let best = pt(step).within("model").floats("best_loss", &[0.5]);
        let state = best.tensor("torch_rng_state", "ByteStorage", &[3], &[1, 2, 3]).nested("ema", "a.weight", &[9.0]);
        save(&format!("{}.pt", 1000 - step), state.tensor("step", "LongStorage", &[], &(step as i64).to_le_bytes()))
    });
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    assert_eq!(checkpoints.steps(), STEPS, "the tensor `step` precedes the name");
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    assert_eq!(checkpoints.load(&merge).unwrap(), reference(&merge));
    let both = save("both-1.pt", pt(1).within("model").nested("state_dict", "w", &[1.0]).floats("loss", &[1.0]));
    let odd = save("odd-2.pt", pt(1).within("teacher").floats("best_loss", &[1.0]));
    for (path, part) in [
        (both, "`model` and `state_dict` hold weights: choose one with --key (`key`)"),
        (odd, "tensors are at its top level and in `teacher`: choose these with --key (`key`)"),
    ] {
        let text = Checkpoints::open(&[&paths[0], &path], None).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
}

/// A process may open fewer files than a training stores.
#[cfg(target_os = "linux")]
#[test]
fn pytorch_files_are_not_kept_open() {
    let temp = tempfile::tempdir().unwrap();
    let paths = STEPS.map(|step| temp.path().join(format!("step={step}.pt")));
    paths.iter().zip(STEPS).for_each(|(path, step)| pt(step).save(path));
    let open = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.filter(|file| paths.contains(file)).count()
    };
    let held = fs::File::open(&paths[0]).unwrap();
    assert_eq!(open(), 1);
    drop(held);
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    assert_eq!((checkpoints.steps().len(), open()), (5, 0));
}

#[test]
fn pytorch_folders_become_safetensors_folders() {
    let temp = tempfile::tempdir().unwrap();
    let folders = STEPS.map(|step| temp.path().join(format!("checkpoint-{step}")));
    for (dir, step) in folders.iter().zip(STEPS) {
        fs::create_dir(dir).unwrap();
        pt(step).save(dir.join("pytorch_model.bin"));
        fs::write(dir.join("config.json"), "{}").unwrap();
    }
    let checkpoints = Checkpoints::open(&[temp.path()], None).unwrap();
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    let other = tempfile::tempdir().unwrap();
    checkpoints.write(&[(&merge, &other.path().join("average"))], &WriteOptions::default()).unwrap();
    assert_eq!(names(&other.path().join("average")), ["config.json", "model.safetensors"]);
    assert_eq!(read(&other.path().join("average/model.safetensors")).0, reference(&merge));
    assert_eq!(names(other.path()), ["average"]);
}

#[test]
fn folder_of_checkpoints_may_hold_shards_and_links() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    fs::create_dir(&run).unwrap();
    for step in [100u64, 200] {
        let first = format!("step{step}-00001-of-00002.safetensors");
        let second = format!("step{step}-00002-of-00002.safetensors");
        let tensors = model(step);
        save(&run.join(&first), &tensors[..4], &[]);
        save(&run.join(&second), &tensors[4..], &[]);
        let map: BTreeMap<&str, &str> = tensors
            .iter()
            .enumerate()
            .map(|(i, (name, _))| (*name, if i < 4 { first.as_str() } else { &second }))
            .collect();
        let index = json!({ "weight_map": map }).to_string();
        fs::write(run.join(format!("step{step}.safetensors.index.json")), index).unwrap();
    }
    save(&run.join("step50.safetensors"), &model(50), &[]);
    save(&run.join(".step60.safetensors"), &model(60), &[]);
    std::os::unix::fs::symlink("step50.safetensors", run.join("latest.safetensors")).unwrap();
    let checkpoints = Checkpoints::open(&[&run], None).unwrap();
    assert_eq!(checkpoints.steps(), [50, 100, 200]);
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    assert_is_sum(&checkpoints.load(&merge).unwrap(), &[50, 100, 200], &[0.25, 0.25, 0.5], None);
    let out = temp.path().join("out");
    checkpoints.write(&[(&merge, &out)], &WriteOptions::default()).unwrap();
    let expected =
        ["step200-00001-of-00002.safetensors", "step200-00002-of-00002.safetensors", "step200.safetensors.index.json"];
    assert_eq!(names(&out), expected);
    // With a single index beside another file, the folder is still not a checkpoint itself.
    fs::remove_file(run.join("step100.safetensors.index.json")).unwrap();
    (1..=2).for_each(|i| fs::remove_file(run.join(format!("step100-0000{i}-of-00002.safetensors"))).unwrap());
    assert_eq!(Checkpoints::open(&[&run], None).unwrap().steps(), [50, 200]);
}

#[test]
fn given_steps_follow_the_natural_order_of_names() {
    let temp = tempfile::tempdir().unwrap();
    for epoch in 1..=12 {
        save(&temp.path().join(format!("epoch{epoch}.safetensors")), &model(epoch), &[]);
    }
    let steps: Vec<u64> = (1..=12).map(|epoch| 100 * epoch).collect();
    let checkpoints = Checkpoints::open(&[temp.path()], Some(&steps)).unwrap();
    let expected: Vec<PathBuf> = (1..=12).map(|i| temp.path().join(format!("epoch{i}.safetensors"))).collect();
    assert!(checkpoints.paths().eq(expected.iter()), "{checkpoints:?}");
}

#[test]
fn steps_come_from_the_first_source_that_has_all() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(name);
    let files = [path("a-7.safetensors"), path("a-8.safetensors")];
    let open = |given: Option<&[u64]>| Checkpoints::open(&files, given).map(|checkpoints| checkpoints.steps().to_vec());
    save(&files[0], &model(1), &[("step", "100")]);
    save(&files[1], &model(2), &[("step", "50")]);
    assert_eq!(open(None).unwrap(), [50, 100]);
    assert_eq!(open(Some(&[5, 6])).unwrap(), [5, 6]);
    // Steps from two sources are not mixed.
    save(&files[1], &model(2), &[]);
    assert_eq!(open(None).unwrap(), [7, 8]);
    for (i, name) in ["x", "y"].into_iter().enumerate() {
        let dir = path(name);
        folder(&dir, 30 + i as u64);
    }
    assert_eq!(Checkpoints::open(&[path("x"), path("y")], None).unwrap().steps(), [30, 31]);
}

/// Saves a training checkpoint of timm: the number of an epoch is the step in its name.
fn save_epoch(path: &Path, epoch: u8, value: f32) {
    Pt::default().floats("w", &[value]).within("state_dict").entry("epoch", &[b'K', epoch]).save(path);
}

#[test]
fn checkpoints_that_repeat_another_are_left_out() {
    let temp = tempfile::tempdir().unwrap();
    let [ten, twenty] = [10, 20].map(|epoch| temp.path().join(format!("checkpoint-{epoch}.pth.tar")));
    save_epoch(&ten, 10, 1.0);
    save_epoch(&twenty, 20, 2.0);
    fs::hard_link(&twenty, temp.path().join("last.pth.tar")).unwrap();
    fs::copy(&ten, temp.path().join("model_best.pth.tar")).unwrap();
    let checkpoints = Checkpoints::open(&[temp.path()], None).unwrap();
    assert_eq!(checkpoints.steps(), [10, 20]);
    let notes = checkpoints.notes().join("\n");
    assert!(notes.contains("left out, the same as `checkpoint-20.pth.tar`: `last.pth.tar`"), "{notes}");
    assert!(notes.contains("left out, the same as `checkpoint-10.pth.tar`: `model_best.pth.tar`"), "{notes}");
    // Nothing is left to average it with.
    fs::remove_file(&ten).unwrap();
    fs::remove_file(temp.path().join("model_best.pth.tar")).unwrap();
    let error = Checkpoints::open(&[temp.path()], None).unwrap_err().to_string();
    assert!(error.contains("the only checkpoint (left out, the same as"), "{error}");
}

#[test]
fn a_newer_checkpoint_without_a_number_is_taken_by_its_epoch() {
    let temp = tempfile::tempdir().unwrap();
    let path = |name: &str| temp.path().join(format!("{name}.pth.tar"));
    save_epoch(&path("checkpoint-10"), 10, 1.0);
    save_epoch(&path("checkpoint-20"), 20, 2.0);
    save_epoch(&path("last"), 25, 3.0);
    let checkpoints = Checkpoints::open(&[temp.path()], None).unwrap();
    assert_eq!(checkpoints.steps(), [10, 20, 25]);
    let notes = checkpoints.notes().join("\n");
    assert!(notes.contains("`last.pth.tar` is taken as step 25, by its epoch"), "{notes}");
    // Another one of the same epoch.
    save_epoch(&path("last"), 20, 3.0);
    let error = Checkpoints::open(&[temp.path()], None).unwrap_err().to_string();
    assert!(error.contains("last.pth.tar") && error.contains("no step can be read"), "{error}");
    // Epochs that are not the steps of the names.
    save_epoch(&path("last"), 25, 3.0);
    save_epoch(&path("checkpoint-20"), 2, 2.0);
    let error = Checkpoints::open(&[temp.path()], None).unwrap_err().to_string();
    assert!(error.contains("last.pth.tar") && error.contains("no step can be read"), "{error}");
}

/// Lightning stores the step in each file, so that the last has that of the newest.
#[test]
fn a_copy_with_the_step_of_another_is_left_out() {
    let temp = tempfile::tempdir().unwrap();
    for (name, step, value) in [("step=5", 5, 1.0), ("step=9", 9, 2.0), ("last", 9, 2.0)] {
        let pt = Pt::default().floats("w", &[value]).within("state_dict").entry("global_step", &[b'K', step]);
        pt.save(temp.path().join(format!("{name}.ckpt")));
    }
    let checkpoints = Checkpoints::open(&[temp.path()], None).unwrap();
    assert_eq!(checkpoints.steps(), [5, 9]);
    assert!(checkpoints.notes().join("\n").contains("the same as `step=9.ckpt`: `last.ckpt`"));
}
