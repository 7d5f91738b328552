//! Refused checkpoints and targets: the error names the file, the value and the remedy.

use super::*;
use crate::import::tests::pt::{Pt, call};

fn error(paths: &[PathBuf], steps: Option<&[u64]>) -> String {
    Checkpoints::open(paths, steps).unwrap_err().to_string()
}

#[test]
fn checkpoints_of_other_models_are_refused_with_the_difference() {
    let (_temp, paths) = series();
    let changed = |change: &dyn Fn(&mut Weights)| {
        let mut tensors = model(300);
        change(&mut tensors);
        save(&paths[3], &tensors, &[]);
        error(&paths, None)
    };
    let own = "step_300.safetensors";
    let other = "step_40.safetensors";
    for (text, part) in [
        (changed(&|model| model[0].1.shape = vec![5, 3]), "the shape of tensor `a.weight` is [5, 3], but [3, 5] in"),
        (changed(&|model| model[1].1.dtype = Dtype::BF16), "the dtype of tensor `b.half` is BF16, but F16 in"),
        (changed(&|model| drop(model.remove(3))), "tensor `d.double` is missing, but present in"),
        (
            changed(&|model| model.push(("z", Tensor::new(&[1], &[1f32]).unwrap()))),
            "tensor `z` is present, but missing in",
        ),
    ] {
        assert!(text.contains(own) && text.contains(other) && text.contains(part), "{text}");
    }
}

#[test]
fn missing_and_repeated_steps_are_refused_with_the_option() {
    let (temp, mut paths) = series();
    let steps = "--steps 1000,2000,...";
    let copy = |name: &str| {
        let path = temp.path().join(name);
        fs::copy(&paths[0], &path).unwrap();
        path
    };
    let unnamed = temp.path().join("last.safetensors");
    save(&unnamed, &model(999), &[]);
    let zero = copy("step_0.safetensors");
    let twice = copy("other-step100.safetensors");
    assert_eq!(error(&paths, Some(&[1, 2])), "option steps: 2 are given for 5 checkpoints: give one for each");
    for (path, part) in [
        (unnamed, "no step can be read from its name as from the others', nor from metadata"),
        (zero, "its step is 0, before any training"),
        (twice, "its step is 100, and so is that of"),
    ] {
        paths.push(path);
        let text = error(&paths, None);
        let name = paths.pop().unwrap();
        assert!(text.starts_with(&format!("{}: {part}", name.display())) && text.contains(steps), "{text}");
    }
    assert!(error(&paths, Some(&[1, 2, 3, 4, 4])).contains("its step is 4, and so is that of"));
}

#[test]
fn invalid_checkpoints_are_refused_with_the_reason() {
    let (temp, mut paths) = series();
    let path = |name: &str| temp.path().join(name);
    fs::create_dir(path("empty")).unwrap();
    fs::create_dir(path("many")).unwrap();
    fs::write(path("notes-5.txt"), "x").unwrap();
    fs::write(path("cut-6.safetensors"), &fs::read(&paths[0]).unwrap()[..99]).unwrap();
    for name in ["p.safetensors", "q.safetensors"] {
        save(&path("many").join(name), &model(1), &[]);
    }
    for (name, text) in [
        ("bad-7", r#"{"weight_map": {"a": "../x"}}"#),
        ("gone-8", r#"{"weight_map": {"a": "x.safetensors"}}"#),
        ("wrong-9", r#"{"weight_map": {"zz": "step_40.safetensors"}}"#),
        ("fewer-10", r#"{"weight_map": {"a.weight": "step_40.safetensors"}}"#),
    ] {
        fs::write(path(&format!("{name}.safetensors.index.json")), text).unwrap();
    }
    let snapshot = [("posthoc_ema", "1"), ("history", "[]"), ("step", "9")];
    save(&path("0.9.safetensors"), &model(9), &snapshot);
    let mut coarse = model(11);
    coarse.push(("q", Tensor { dtype: Dtype::F8_E4M3, shape: vec![2], bytes: vec![0, 0] }));
    save(&path("coarse-11.safetensors"), &coarse, &[]);
    Pt::default().floats("w", &[1.0]).entry("evil", &call("os", "system", "true")).save(path("evil-12.pt"));
    Pt::default().nested("state_dict", "w", &[1.0]).nested("model", "w", &[1.0]).save(path("two-13.pt"));
    Pt::default().nested("optimizer", "w", &[1.0]).save(path("odd-14.pt"));
    for (name, part) in [
        ("missing", "check the path"),
        ("empty", "no weights are in this folder"),
        ("many", "both `p.safetensors` and `q.safetensors` are in this folder: name the file of each"),
        ("notes-5.txt", "not a file of weights"),
        ("cut-6.safetensors", "the file is damaged or incomplete"),
        ("bad-7.safetensors.index.json", "it names the file `../x`"),
        ("gone-8.safetensors.index.json", "cannot read"),
        ("wrong-9.safetensors.index.json", "tensor `zz` is not in `step_40.safetensors`"),
        ("fewer-10.safetensors.index.json", "`b.half`, which fewer-10.safetensors.index.json does not name: the files"),
        ("0.9.safetensors", "this is a snapshot of a run"),
        ("coarse-11.safetensors", "tensor `q` is of F8_E4M3, which cannot be averaged"),
        ("evil-12.pt", "`evil` is a Python object (`os.system`), whose code is never run"),
        ("two-13.pt", "`state_dict` and `model` hold weights: choose one with --key (`key`)"),
        ("odd-14.pt", "no weights are at its top level or in one of its entries `optimizer`"),
    ] {
        paths.push(path(name));
        let text = error(&paths, None);
        paths.pop();
        assert!(text.contains(part), "{name}: {text}");
    }
    assert!(error(&[], None).contains("no checkpoint to average: name files, or a folder of them"));
    assert!(error(&paths[..1], None).contains("with nothing to average it with"));
    assert!(error(&[path("empty")], None).contains("no weights are in it, nor in its folders"));
}

/// A trainer writes the last model beside the folders of earlier checkpoints.
#[test]
fn model_beside_its_checkpoints_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    for name in [".", "checkpoint-1", "checkpoint-2"] {
        fs::create_dir_all(temp.path().join(name)).unwrap();
        save(&temp.path().join(name).join("model.safetensors"), &model(1), &[]);
    }
    let text = error(&[temp.path().to_owned()], None);
    assert!(text.contains("this is one checkpoint, and its folders hold others, such as `checkpoint-1`"), "{text}");
}

#[test]
fn checkpoints_without_anything_to_average_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    for step in [1, 2] {
        save(
            &temp.path().join(format!("ids-{step}.safetensors")),
            &[("ids", Tensor::new(&[1], &[step]).unwrap())],
            &[],
        );
    }
    let text = error(&[temp.path().to_owned()], None);
    assert!(text.contains("ids-1.safetensors: none of its tensors is of floating point"), "{text}");
}

#[test]
fn targets_outside_the_checkpoints_are_refused() {
    let (_temp, paths) = series();
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    let uniform = |steps| Profile::uniform(Window::Steps(steps)).unwrap();
    for (profile, at, part) in [
        (uniform(10.0), At::Step(39), "the target time 39 is before"),
        (uniform(10.0), At::Step(341), "the target time 341 is after"),
        (uniform(101.0), At::Step(100), "window = 101"),
    ] {
        let text = checkpoints.plan(profile, at).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    let merge = checkpoints.plan(uniform(10.0), At::Latest).unwrap();
    let fewer = Checkpoints::open(&paths[1..], None).unwrap();
    let text = fewer.load(&merge).unwrap_err().to_string();
    let missing = format!("the plan needs checkpoint {} (step 40), which is not open", paths[0].display());
    assert!(text.contains(&missing), "{text}");
}

#[test]
fn inputs_are_never_overwritten() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    for step in [1, 2] {
        let dir = run.join(format!("checkpoint-{step}"));
        fs::create_dir_all(&dir).unwrap();
        save(&dir.join("model.safetensors"), &model(step), &[]);
    }
    std::os::unix::fs::symlink(&run, temp.path().join("link")).unwrap();
    let checkpoints = Checkpoints::open(&[&run], None).unwrap();
    let merge = checkpoints.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let write = |path: PathBuf| {
        let written = checkpoints.write(&[(&merge, &path)], &WriteOptions::default());
        written.unwrap_err().to_string()
    };
    for path in [
        "run/checkpoint-2/model.safetensors",
        "link/checkpoint-2/model.safetensors",
        "new/../run/checkpoint-2/model.safetensors",
        "new/deep/../../link/./checkpoint-1/../checkpoint-2/model.safetensors",
    ] {
        assert!(write(temp.path().join(path)).contains("this is one of the checkpoints"), "{path}");
    }
    for path in [
        "run/average",
        "run/checkpoint-1/x.safetensors",
        "link/deep/average",
        "run",
        "run/new/..",
        "new/../run/average",
    ] {
        assert!(write(temp.path().join(path)).contains("which is left untouched: write elsewhere"), "{path}");
    }
    assert!(write(temp.path().to_owned()).contains("the directory is not empty"));
    let twice = temp.path().join("average");
    for again in [twice.clone(), temp.path().join("new/../average")] {
        let text = checkpoints.write(&[(&merge, &twice), (&merge, &again)], &WriteOptions::default()).unwrap_err();
        assert!(text.to_string().contains("two targets are to be written to this one file"), "{text}");
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 2);
    assert_eq!(fs::read_dir(&run).unwrap().count(), 2);
}

#[test]
fn overflow_leaves_no_folder_and_no_directory_above() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    for step in [1, 2] {
        let dir = run.join(format!("checkpoint-{step}"));
        fs::create_dir_all(&dir).unwrap();
        save(&dir.join("model.safetensors"), &[("w", Tensor::new(&[1], &[1e5f32]).unwrap())], &[]);
    }
    let checkpoints = Checkpoints::open(&[&run], None).unwrap();
    let merge = checkpoints.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let out = temp.path().join("deep/average");
    let options = WriteOptions { dtype: Some(Dtype::F16), ..WriteOptions::default() };
    for out in [out.clone(), out.join("a.safetensors"), temp.path().join("new/../deep/../b.safetensors")] {
        let text = checkpoints.write(&[(&merge, &out)], &options).unwrap_err().to_string();
        assert!(text.contains("tensor `w`: the average is 100000 at element 0, beyond F16"), "{text}");
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn shards_with_the_same_output_name_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    for step in [1, 2] {
        let dir = run.join(format!("checkpoint-{step}"));
        fs::create_dir_all(&dir).unwrap();
        Pt::default().floats("a", &[1.0]).save(dir.join("x.bin"));
        Pt::default().floats("b", &[1.0]).save(dir.join("x.pt"));
        fs::write(dir.join("x.index.json"), r#"{"weight_map": {"a": "x.bin", "b": "x.pt"}}"#).unwrap();
    }
    let checkpoints = Checkpoints::open(&[&run], None).unwrap();
    let merge = checkpoints.plan(Profile::gamma(0.0).unwrap(), At::Latest).unwrap();
    let write = |name: &str| checkpoints.write(&[(&merge, &temp.path().join(name))], &WriteOptions::default());
    let text = write("average").unwrap_err().to_string();
    assert!(text.contains("checkpoint-2: `x.bin` and `x.pt` would both be written as `x.safetensors`"), "{text}");
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    write("average.safetensors").unwrap();
    assert_eq!(read(&temp.path().join("average.safetensors")).0.len(), 2);
}

#[test]
fn infinities_of_a_mask_stay_and_others_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let paths = [1, 2, 3].map(|step| temp.path().join(format!("step_{step}.safetensors")));
    let [first, second, third] = [&paths[0], &paths[1], &paths[2]];
    let mask = |values: [f32; 3]| [("bias", Tensor::new(&[3], &values).unwrap())];
    save(first, &mask([f32::NEG_INFINITY, 1.0, f32::INFINITY]), &[]);
    save(second, &mask([f32::NEG_INFINITY, 2.0, f32::INFINITY]), &[]);
    save(third, &mask([f32::NEG_INFINITY, f32::INFINITY, f32::INFINITY]), &[]);
    let average = |paths: &[&PathBuf]| {
        let checkpoints = Checkpoints::open(paths, None).unwrap();
        let merge = checkpoints.plan(Profile::uniform(Window::Fraction(1.0)).unwrap(), At::Latest).unwrap();
        let out = temp.path().join("out/mean.safetensors");
        let written = checkpoints.write(&[(&merge, &out)], &WriteOptions::default());
        written.map(|_| numbers(read(&out).0.get("bias").unwrap())).map_err(|error| error.to_string())
    };
    assert_eq!(average(&[first, second]), Ok(vec![f64::NEG_INFINITY, 1.5, f64::INFINITY]));
    let text = average(&[first, second, third]).unwrap_err();
    assert!(text.contains("step_3.safetensors: tensor `bias` holds inf at element 1"), "{text}");
}
