//! Snapshots and results open with the Python package `safetensors` as plain state dicts.
//!
//! `POSTHOC_EMA_PYTHON` names a Python that has the packages `safetensors` and `numpy`.

use std::process::Command;

#[test]
#[ignore = "needs POSTHOC_EMA_PYTHON, a Python with safetensors and numpy"]
fn python_loads_snapshots_and_averages() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let out = temp.path().join("out.safetensors");
    crate::common::train(&dir);
    let arguments = ["synthesize", dir.to_str().unwrap(), "--sigma-rel", "0.15", "-o", out.to_str().unwrap()];
    crate::common::stdout(&arguments);
    let script = r#"
import sys, numpy, safetensors
from safetensors.numpy import load_file
for path, dtype in [(sys.argv[1] + "/0.500.safetensors", "float16"), (sys.argv[2], "float32")]:
    tensors = load_file(path)
    assert sorted(tensors) == ["layer.bias", "layer.weight"], sorted(tensors)
    assert tensors["layer.weight"].shape == (1000,) and tensors["layer.weight"].dtype == dtype
    assert numpy.isfinite(tensors["layer.weight"]).all() and abs(tensors["layer.bias"].mean() - 0.1) < 0.1
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["step"] == "500"
print("read")
"#;
    let python = std::env::var_os("POSTHOC_EMA_PYTHON").expect("POSTHOC_EMA_PYTHON names a Python");
    let output = Command::new(python).args(["-c", script]).arg(&dir).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"read\n");
}
