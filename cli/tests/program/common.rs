//! A small run, and calls of the program.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use posthoc_ema::{Dtype, PostHocEma, Tensor, Tensors};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

/// Trains a toy model for 500 steps with a snapshot every 50.
pub fn train(dir: &Path) {
    train_from(dir, 0.1);
}

/// Trains the toy model with biases that begin at a given value. Those at 0.5 move as its weights do.
pub fn train_from(dir: &Path, bias: f32) {
    let mut model = vec![("layer.weight", vec![0.5f32; 1000]), ("layer.bias", vec![bias; 10])];
    let options = PostHocEma::options(dir).checkpoint_every(50).checkpoint_dtype(Dtype::F16);
    let mut ema = options.snapshot_growth(None).create(&model).unwrap();
    for step in 0..500 {
        for (i, value) in model.iter_mut().flat_map(|(_, values)| values).enumerate() {
            *value += 1e-3 * ((step * 7 + i * 13) as f32).sin();
        }
        ema.update(&model).unwrap();
    }
    ema.finish().unwrap();
}

/// Trains a run in a temporary folder and returns its directory.
pub fn run() -> (tempfile::TempDir, String) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    (temp, dir.to_str().unwrap().to_owned())
}

/// Loads all tensors of a file.
pub fn load(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensor = |(name, view): (String, TensorView<'_>)| {
        (name, Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
    };
    SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(tensor).collect()
}

/// Returns the sorted names of the files in a folder.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs the program and returns its output.
pub fn posthoc_ema(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_posthoc-ema")).args(arguments).output().unwrap()
}

/// Returns the standard output of a command that must succeed with nothing on standard error but warnings of a large
/// relative error.
pub fn stdout(arguments: &[&str]) -> String {
    let output = posthoc_ema(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let is_expected = |line: &str| line.starts_with("warning: ") && line.contains(" has a relative error of ");
    assert!(output.status.success() && stderr.lines().all(is_expected), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the exit status and standard error of a command that must fail with nothing on standard output.
pub fn failure(arguments: &[&str]) -> (i32, String) {
    let output = posthoc_ema(arguments);
    assert!(output.stdout.is_empty(), "{arguments:?} printed {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Returns the JSON document of a command that must succeed.
pub fn json(arguments: &[&str]) -> Value {
    let text = stdout(arguments);
    assert_eq!(text.lines().count(), 1, "one JSON document on one line");
    serde_json::from_str(&text).unwrap()
}
