//! `posthoc-ema average`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use crate::common::{failure, posthoc_ema, stdout};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

const STEPS: [u64; 6] = [500, 1000, 1500, 2000, 2500, 3000];

/// Returns the weights of a tensor at a step of the training, all different.
fn weights(step: u64, tensor: usize) -> Vec<f32> {
    (0..300).map(|i| (step as f32 * 0.01 + (tensor * 300 + i) as f32).sin()).collect()
}

fn save(path: &Path, step: u64, tensors: &[usize]) {
    let named = tensors.iter().map(|&t| (format!("layer.{t}"), bytemuck::cast_slice(&weights(step, t)).to_vec()));
    let named: Vec<(String, Vec<u8>)> = named.collect();
    let views = named.iter().map(|(name, bytes)| (name, TensorView::new(Dtype::F32, vec![30, 10], bytes).unwrap()));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// Writes a folder with a checkpoint in two shards for each step, and returns its path.
fn training(dir: &Path) -> String {
    let shard = |i: usize| format!("model-0000{i}-of-00002.safetensors");
    for step in STEPS {
        let checkpoint = dir.join(format!("run/checkpoint-{step}"));
        fs::create_dir_all(&checkpoint).unwrap();
        save(&checkpoint.join(shard(1)), step, &[0, 1]);
        save(&checkpoint.join(shard(2)), step, &[2]);
        let map = BTreeMap::from([("layer.0", shard(1)), ("layer.1", shard(1)), ("layer.2", shard(2))]);
        let index = json!({"metadata": {"total_size": 3600}, "weight_map": map});
        fs::write(checkpoint.join("model.safetensors.index.json"), index.to_string()).unwrap();
        fs::write(checkpoint.join("config.json"), r#"{"torch_dtype":"float32"}"#).unwrap();
        fs::write(checkpoint.join("tokenizer.json"), "{}").unwrap();
        fs::write(checkpoint.join("optimizer.pt"), "state").unwrap();
    }
    dir.join("run").to_str().unwrap().to_owned()
}

/// Loads all tensors of a model in shards.
fn load(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let index: Value = serde_json::from_slice(&fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    let mut tensors = BTreeMap::new();
    for (name, file) in index["weight_map"].as_object().unwrap() {
        let bytes = fs::read(dir.join(file.as_str().unwrap())).unwrap();
        let data = SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec();
        tensors.insert(name.clone(), bytemuck::pod_collect_to_vec(&data));
    }
    tensors
}

/// Compares with sums in f64. No value exceeds 1, so that a rounding error is at most half of 2^-24.
fn assert_is_sum(found: &BTreeMap<String, Vec<f32>>, expected: &[f64]) {
    assert_eq!(found.len(), 3);
    for tensor in 0..3 {
        let values: Vec<Vec<f32>> = STEPS.iter().map(|&step| weights(step, tensor)).collect();
        for (i, &is) in found[&format!("layer.{tensor}")].iter().enumerate() {
            let sum: f64 = values.iter().zip(expected).map(|(values, x)| x * f64::from(values[i])).sum();
            assert!((f64::from(is) - sum).abs() <= 2f64.powi(-25) + 1e-14, "{tensor}[{i}] is {is}, not {sum}");
        }
    }
}

#[test]
fn folder_of_checkpoints_gives_a_model_for_each_target() {
    let temp = tempfile::tempdir().unwrap();
    let run = training(temp.path());
    let out = temp.path().join("averages");
    let targets = ["--gamma", "2", "--lr-decay", "1-sqrt:50%", "--uniform", "1000", "--out-dir", out.to_str().unwrap()];
    let text = stdout(&[&["average", &run, "--json"][..], &targets].concat());
    assert_eq!(text.lines().count(), 1);
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["warnings"], json!([]));
    assert_eq!(document["bytes_read"], 6 * 3600);
    let sqrt = |u: f64| u.sqrt();
    let expected: [[f64; 6]; 3] = [
        [1, 2, 3, 4, 5, 6].map(|i: i32| (i.pow(3) - (i - 1).pow(3)) as f64 / 216.0),
        [0.0, 0.0, 0.0, 0.0, 0.5, 0.5],
        [0.0, 0.0, 0.0, sqrt(1.0 / 3.0), sqrt(2.0 / 3.0) - sqrt(1.0 / 3.0), 1.0 - sqrt(2.0 / 3.0)],
    ];
    for (target, expected) in document["targets"].as_array().unwrap().iter().zip(expected) {
        for (weight, (expected, step)) in
            target["weights"].as_array().unwrap().iter().zip(expected.into_iter().zip(STEPS))
        {
            assert!((weight["weight"].as_f64().unwrap() - expected).abs() < 1e-15, "{weight}");
            assert_eq!(weight["step"], step);
            assert_eq!(weight["path"], format!("{run}/checkpoint-{step}"));
        }
        let dir = Path::new(target["path"].as_str().unwrap());
        assert_eq!(dir.parent().unwrap(), out);
        assert_is_sum(&load(dir), &expected);
        assert!(dir.join("tokenizer.json").exists() && !dir.join("optimizer.pt").exists());
        assert!(target["relative_error"].as_f64().unwrap() < 1.0);
        // With equal weights it is half of the 500 steps between checkpoints.
        let lag = target["lag_steps"].as_f64().unwrap();
        assert!(lag > 200.0 && lag < 400.0, "{lag}");
    }
    let uniform = &document["targets"][1];
    assert!((uniform["lag_steps"].as_f64().unwrap() - 249.5).abs() < 1e-9);
    assert!((uniform["effective_checkpoints"].as_f64().unwrap() - 2.0).abs() < 1e-12);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 3);
}

#[test]
fn plan_of_one_target_prints_its_weights() {
    let temp = tempfile::tempdir().unwrap();
    training(temp.path());
    let paths: Vec<String> =
        (1..=4).map(|i| temp.path().join(format!("w{i}.safetensors")).display().to_string()).collect();
    paths.iter().enumerate().for_each(|(i, path)| save(Path::new(path), STEPS[i], &[0, 1, 2]));
    let names: Vec<&str> = paths.iter().map(String::as_str).collect();
    let steps = ["--steps", "500,1000,...,2000", "--uniform", "100%"];
    let text = stdout(&[&["average"], &names[..], &steps, &["--plan"]].concat());
    for part in ["uniform 100%", "2000", "249.5", "4.000", "w3.safetensors", "25.00%"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 5, "a plan writes nothing");
    let out = temp.path().join("mean.safetensors");
    let write = ["--dtype", "bf16", "-o", out.to_str().unwrap()];
    let text = stdout(&[&["average"], &names[..], &steps, &write].concat());
    assert!(text.contains("written: ") && text.contains("mean.safetensors") && text.contains("of checkpoints read"));
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert!(file.len() == 3 && file.iter().all(|(_, view)| view.dtype() == Dtype::BF16));
}

#[test]
fn average_of_about_one_checkpoint_is_warned_of() {
    let temp = tempfile::tempdir().unwrap();
    let run = training(temp.path());
    let output = posthoc_ema(&["average", &run, "--half-life", "100", "--plan"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.starts_with("warning: half_life 100"), "{stderr}");
    assert!(stderr.contains("at step 3000: only 1.06 checkpoints count"), "{stderr}");
    let text = stdout(&["average", &run, "--half-life", "100", "--plan", "--json"]);
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["warnings"].as_array().unwrap().len(), 1);
}

#[test]
fn bad_usage_exits_with_2_and_failures_with_1() {
    let temp = tempfile::tempdir().unwrap();
    let run = training(temp.path());
    let out = temp.path().join("out");
    let out = out.to_str().unwrap();
    let target = ["--sigma-rel", "0.2"];
    const NO_TARGET: &str = "no target: name at least one, such as --uniform 100% for the plain mean";
    let last = format!("{run}/checkpoint-3000");
    save(&temp.path().join("checkpoint-100.safetensors"), 1, &[0]);
    let other = temp.path().join("checkpoint-100.safetensors");
    for (arguments, status, part) in [
        (vec!["average", &run, "-o", out], 2, NO_TARGET),
        (vec!["average", &run, "--uniform", "5%,6%", "-o", out], 2, "-o names one average, and there are 2 targets"),
        (vec!["average", &run, "--uniform", "5%"], 2, "nowhere to write to"),
        (vec!["average", &run, "--uniform", "5%", "-o", out, "--steps", "1,2"], 2, "2 are given for 6 checkpoints"),
        (vec!["average", &run, "--uniform", "5%", "-o", out, "--steps", "1.5"], 2, "1.5 is not a step"),
        (vec!["average", &run, "--uniform", "3001", "-o", out], 2, "no longer than the target time, 3000"),
        (vec!["average", &run, "--uniform", "5%", "-o", &last], 1, "is left untouched"),
        (vec!["average", &run, "--uniform", "5%", "-o", out, "--at", "499"], 1, "the target time 499 is before"),
        (vec!["average", &last, other.to_str().unwrap(), "-o", out], 1, "tensor `layer.1` is present, but missing in"),
        (vec!["average", &last, "-o", out], 1, "with nothing to average it with"),
    ] {
        let own = if part == NO_TARGET || arguments.contains(&"--uniform") { &target[..0] } else { &target[..] };
        let (code, text) = failure(&[&arguments[..], own].concat());
        assert!(code == status && text.contains(part), "{arguments:?}: {code} {text}");
    }
    assert!(!Path::new(out).exists());
}

/// Writes a file of an adapter of rank 1, whose product at a step is its number in the first row.
fn save_adapter(path: &Path, number: f32) {
    let factors = [("x.lora_A.weight", vec![1, 2], [number, 1.0]), ("x.lora_B.weight", vec![2, 1], [1.0, number])];
    let bytes = factors.each_ref().map(|(_, _, values)| bytemuck::cast_slice::<f32, u8>(values).to_vec());
    let views = factors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn products_of_adapters_report_both_errors() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    fs::create_dir(dir.join("run")).unwrap();
    for (step, number) in [(1, 2.0), (2, -2.0)] {
        save_adapter(&dir.join(format!("run/lora-{step}.safetensors")), number);
    }
    let run = dir.join("run").to_str().unwrap().to_owned();
    let out = dir.join("mean.safetensors").to_str().unwrap().to_owned();
    let base = ["average", &run, "--uniform", "100%"];
    let products = [&base[..], &["--product", "svd"]].concat();
    let json = crate::common::json(&[&products[..], &["-o", &out, "--json"]].concat());
    // The mean of [[n, 1], [n^2, n]] for 2 and -2 is [[0, 1], [4, 0]]: its singular values are 4 and 1, and the mean
    // factors have the product [[0, 1], [0, 0]].
    let errors = &json["targets"][0]["product"];
    let expected = [("truncation_error", 1.0 / 17f64.sqrt()), ("factors_error", 4.0 / 17f64.sqrt())];
    for (key, expected) in expected {
        let is = errors[key].as_f64().unwrap();
        assert!((is - expected).abs() < 1e-12, "{key}: {is}, not {expected}");
    }
    assert_eq!(errors["pairs"], 1);
    let text = stdout(&[&products[..], &["--plan"]].concat());
    assert!(text.contains("products of 1 adapters off by 2.43e-1, cut back to their rank; by 9.70e-1 if"), "{text}");
    let plain = crate::common::json(&[&base[..], &["--plan", "--json"]].concat());
    assert!(plain["targets"][0].get("product").is_none(), "{plain}");
}

#[test]
fn models_of_different_configuration_are_averaged_only_if_allowed() {
    let temp = tempfile::tempdir().unwrap();
    let run = training(temp.path());
    fs::write(temp.path().join("run/checkpoint-1000/config.json"), r#"{"hidden_act": "relu"}"#).unwrap();
    let base = ["average", &run, "--uniform", "100%", "--plan"];
    let (code, text) = failure(&base);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(r#"`hidden_act` is "relu", but null in"#), "{text}");
    assert!(text.contains("--ignore-config hidden_act"), "{text}");
    stdout(&[&base[..], &["--ignore-config", "hidden_act"]].concat());
}
