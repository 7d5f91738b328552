//! Averages in the form of another folder.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::output::FormOptions;

/// Writes a model's folder with one file of weights, of a dtype, and returns its path.
fn model_folder(dir: &Path, dtype: Dtype) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let mut tensors = model(1);
    for (_, tensor) in tensors.iter_mut().filter(|(_, tensor)| is_averaged(tensor.dtype)) {
        let elements = tensor.shape.iter().product::<usize>();
        *tensor = Tensor { dtype, shape: tensor.shape.clone(), bytes: vec![0; elements * dtype.bitsize() / 8] };
    }
    save(&dir.join("model.safetensors"), &tensors, &[("format", "pt"), ("checksum", "of other data")]);
    for name in ["config.json", "net.py", "optimizer.pt"] {
        fs::write(dir.join(name), "{}").unwrap();
    }
    dir.to_owned()
}

fn plain_mean() -> Profile {
    Profile::uniform(Window::Fraction(1.0)).unwrap()
}

fn form(options: FormOptions) -> OutputForm {
    OutputForm::new(&options).unwrap()
}

/// Averages the series of checkpoints in a form.
fn average(out: &Path, options: FormOptions) -> Result<()> {
    let (_temp, paths) = series();
    let checkpoints = Checkpoints::open(&paths, None)?;
    let merge = checkpoints.plan(plain_mean(), At::Latest)?;
    checkpoints.write_as(&[(&merge, out)], &OutputForm::new(&options)?, &WriteOptions::default()).map(drop)
}

fn all_of(dir: &Path, files: &[&str]) -> Tensors {
    files.iter().flat_map(|file| read(&dir.join(file)).0).collect()
}

#[test]
fn average_like_a_folder_has_its_names_dtypes_and_files() {
    let temp = tempfile::tempdir().unwrap();
    for dtype in [Dtype::F64, Dtype::BF16] {
        let like = model_folder(&temp.path().join(format!("like-{dtype}")), dtype);
        let out = temp.path().join(format!("out-{dtype}"));
        average(&out, FormOptions { like: Some(like), ..Default::default() }).unwrap();
        let (found, metadata) = read(&out.join("model.safetensors"));
        let weights = masses(&plain_mean(), &STEPS, 340);
        assert_is_sum(&found, &STEPS, &weights, Some(dtype));
        assert!(metadata.contains_key("profile") && metadata["step"] == "340" && !metadata.contains_key("checksum"));
        let mut names: Vec<String> =
            fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "model.safetensors", "net.py"]);
    }
}

#[test]
fn everything_that_does_not_fit_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let like = model_folder(&temp.path().join("like"), Dtype::F32);
    let mut tensors = model(1);
    tensors.retain(|(name, _)| !["a.weight", "h.mask"].contains(name));
    tensors[0].1 = Tensor::new(&[71], &[0f32; 71]).unwrap();
    tensors.push(("z.one", Tensor::new(&[1], &[0f32]).unwrap()));
    tensors.push(("z.two", Tensor::new(&[1], &[0f32]).unwrap()));
    save(&like.join("model.safetensors"), &tensors, &[]);
    let out = temp.path().join("out");
    let text = average(&out, FormOptions { like: Some(like), ..Default::default() }).unwrap_err().to_string();
    for expected in [
        "the average has no `z.one`, `z.two`",
        "the folder has no `a.weight`, `h.mask`",
        "`b.half` has shape [70], not [71]",
        "--rename",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn shards_hold_at_most_their_size_and_are_indexed() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    average(&out, FormOptions { shard_size: Some(150), rename: vec!["s/^/net./".into()], ..Default::default() })
        .unwrap();
    let index: Value = serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap()).unwrap();
    let map: BTreeMap<String, String> = serde_json::from_value(index["weight_map"].clone()).unwrap();
    let mut files: Vec<&str> = map.values().map(String::as_str).collect();
    files.sort();
    files.dedup();
    let expected: Vec<String> = (1..=3).map(|i| format!("model-0000{i}-of-00003.safetensors")).collect();
    assert_eq!(files, expected);
    let whole = temp.path().join("whole.safetensors");
    average(&whole, FormOptions::default()).unwrap();
    let mut total = 0;
    for file in &files {
        let tensors = read(&out.join(file)).0;
        let size: usize = tensors.iter().map(|(_, tensor)| tensor.bytes.len()).sum();
        assert!(size <= 150, "{file}: {size}");
        total += size;
        assert!(tensors.iter().all(|(name, _)| map[name] == *file));
    }
    assert_eq!(index["metadata"], json!({ "total_size": total }));
    let prefixed = read(&whole).0.into_iter().map(|(name, tensor)| (format!("net.{name}"), tensor)).collect();
    assert_eq!(all_of(&out, &files), prefixed);
}

#[test]
fn output_in_the_folder_itself_or_under_a_name_of_a_file_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let like = model_folder(&temp.path().join("like"), Dtype::F32);
    for (out, expected) in [
        (like.join("out"), "which is left untouched"),
        (temp.path().join("out.safetensors"), "a folder is written, and this names a file"),
        (temp.path().to_owned(), "the directory is not empty (`like`)"),
    ] {
        let text = average(&out, FormOptions { like: Some(like.clone()), ..Default::default() }).unwrap_err();
        assert!(text.to_string().contains(expected), "{text}");
    }
}

#[test]
fn names_that_become_one_are_both_named() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out.safetensors");
    let rename = |rule: &str| FormOptions { rename: vec![rule.into()], ..Default::default() };
    let text = average(&out, rename(r"s/^[a-z]\.(brain|double)/x/")).unwrap_err().to_string();
    assert!(text.contains("`c.brain` and `d.double` would both be called `x`"), "{text}");
    let text = average(&out, rename("s/^a.weight$//")).unwrap_err().to_string();
    assert!(text.contains("`a.weight` would have no name"), "{text}");
    assert!(average(&out, rename("s/q/r/")).unwrap_err().to_string().contains("changes no name"));
    assert!(!form(rename("wrappers")).is_folder() && !out.exists());
}

#[test]
fn matrix_that_is_tied_to_another_is_left_out_with_a_note() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let like = dir.join("like");
    fs::create_dir(&like).unwrap();
    let matrix = |step: usize| Tensor::new(&[2, 2], &[1f32, 2.0, 3.0, step as f32]).unwrap();
    save(&like.join("model.safetensors"), &[("embed", matrix(0))], &[]);
    let mut paths = Vec::new();
    for step in [1, 2] {
        paths.push(dir.join(format!("step_{step}.safetensors")));
        save(&paths[step - 1], &[("embed", matrix(step)), ("head", matrix(step))], &[]);
    }
    let checkpoints = Checkpoints::open(&paths, None).unwrap();
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    let form = form(FormOptions { like: Some(like), ..Default::default() });
    let notes = checkpoints.check_form(std::slice::from_ref(&merge), &form).unwrap();
    assert_eq!(notes, ["`head` is left out, since it is tied to `embed`"]);
    checkpoints.write_as(&[(&merge, &dir.join("out"))], &form, &WriteOptions::default()).unwrap();
    let (found, _) = read(&dir.join("out/model.safetensors"));
    assert_eq!((found.len(), numbers(found.get("embed").unwrap())), (1, vec![1.0, 2.0, 3.0, 1.5]));
    save(&paths[1], &[("embed", matrix(2)), ("head", matrix(3))], &[]);
    let text = Checkpoints::open(&paths, None).unwrap().check_form(&[merge], &form).unwrap_err().to_string();
    assert!(text.contains("the folder has no `head`"), "{text}");
}

/// A task head that only the folder has is left out of it, and said.
#[test]
fn tensors_that_only_the_folder_has_can_be_left_out() {
    let temp = tempfile::tempdir().unwrap();
    let like = model_folder(&temp.path().join("like"), Dtype::F32);
    let mut tensors = model(1);
    tensors.retain(|(name, _)| *name != "a.weight");
    tensors.push(("head.weight", Tensor::new(&[1], &[0f32]).unwrap()));
    save(&like.join("model.safetensors"), &tensors, &[]);
    let leave_out: Vec<String> = ["head.*", "a.weight"].map(str::to_owned).to_vec();
    let form = form(FormOptions { like: Some(like), leave_out: leave_out.clone(), ..Default::default() });
    let (_temp, paths) = series();
    let options = |other_names| CheckpointOptions { leave_out: leave_out.clone(), other_names, ..Default::default() };
    let text = Checkpoints::open_with(&paths, &options(Vec::new())).unwrap_err().to_string();
    assert!(text.contains("`head.*` matches no tensor"), "{text}");
    let checkpoints = Checkpoints::open_with(&paths, &options(form.left_out().to_vec())).unwrap();
    let merge = checkpoints.plan(plain_mean(), At::Latest).unwrap();
    assert_eq!(checkpoints.notes(), ["left out: `a.weight`"]);
    let notes = checkpoints.check_form(std::slice::from_ref(&merge), &form).unwrap();
    assert_eq!(notes, ["left out, though the folder that averages are like has it: `head.weight`"]);
    let out = temp.path().join("out");
    checkpoints.write_as(&[(&merge, &out)], &form, &WriteOptions::default()).unwrap();
    let (found, _) = read(&out.join("model.safetensors"));
    assert!(found.get("head.weight").is_none() && found.get("a.weight").is_none() && found.len() == tensors.len() - 1);
}
