//! The program with and without a driver.

use std::path::Path;
use std::process::{Command, Output};

use posthoc_ema::{Dtype, PostHocEma};

use crate::driver::{is_standin, standin};

fn train(dir: &Path) {
    let mut model = vec![("layer.weight", vec![0.5f32; 100_000]), ("layer.bias", vec![0.1f32; 10])];
    let options = PostHocEma::options(dir).checkpoint_every(50).checkpoint_dtype(Dtype::F16);
    let mut ema = options.snapshot_growth(None).create(&model).unwrap();
    for step in 0..500 {
        model.iter_mut().flat_map(|(_, v)| v).enumerate().for_each(|(i, v)| *v += 1e-3 * ((step * 7 + i) as f32).sin());
        ema.update(&model).unwrap();
    }
    ema.finish().unwrap();
}

/// Runs the program, with the stand-in driver in the loader's path or without any driver.
fn run(arguments: &[&str], with_driver: bool, variables: &[(&str, &str)]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
    program.args(arguments).env_remove("LD_LIBRARY_PATH").envs(variables.iter().copied());
    if with_driver {
        program.env("LD_LIBRARY_PATH", standin().parent().unwrap());
    }
    program.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn synthesize_writes_the_same_file_on_every_device() {
    if !is_standin() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    let dir = dir.to_str().unwrap();
    let out = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    let synthesize = |device: &str, with_driver| {
        let out = out(device);
        run(&["synthesize", dir, "--sigma-rel", "0.15", "-o", &out, "--device", device, "--json"], with_driver, &[])
    };
    for (device, with_driver) in [("cuda:1", true), ("cpu", false)] {
        let output = synthesize(device, with_driver);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["device"], device);
    }
    assert!(std::fs::read(out("cuda:1")).unwrap() == std::fs::read(out("cpu")).unwrap());

    // Without a driver, `auto` reports the reason and blends on the CPU.
    let output = run(&["synthesize", dir, "--sigma-rel", "0.15", "-o", &out("auto")], false, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    assert!(printed.contains("blended on cpu: the machine has no NVIDIA driver"), "{printed}");
    assert!(std::fs::read(out("auto")).unwrap() == std::fs::read(out("cpu")).unwrap());
    let output = synthesize("cuda:0", false);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("cuda:0: cannot use the device: the machine has no NVIDIA driver"), "{error}");
    assert!(!Path::new(&out("cuda:0")).exists());

    // A driver that fails.
    let variables = [("STANDIN_FAIL_LAUNCH", "1")];
    let output =
        run(&["synthesize", dir, "--sigma-rel", "0.15", "-o", &out("x"), "--device", "cuda"], true, &variables);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("error: cuda:0: cannot"), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 4, "a failed synthesis leaves no file");
}
