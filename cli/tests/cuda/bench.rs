//! Measurements of a device: their list and the checks of their answers. Times on the stand-in driver mean nothing.

use std::process::{Command, Output};

use posthoc_ema::{Device, Error};
use posthoc_ema_cli::bench::{self, Measurement, Measurements, Options, Work};

use crate::driver::{Driver, driver};

/// Returns small sizes without common divisors, with more snapshots than one launch takes.
fn small() -> Options {
    Options { parameters: Some(20_011), tensors: 37, snapshots: 66, targets: 9, repeats: 2, device: Device::Cuda(0) }
}

fn names(rows: &[Measurement], work: Work) -> Vec<&str> {
    rows.iter().filter(|row| row.work == work).map(|row| row.name.as_str()).collect()
}

#[test]
fn bench_measures_a_device_beside_copy_and_bus_limits() {
    driver();
    let Measurements { devices, rows, without_cuda } = bench::run(&small(), &mut |_| {}).unwrap();
    assert_eq!((devices.len(), without_cuda), (1, None));
    assert_eq!((devices[0].device.as_str(), devices[0].parameters), ("cuda:0", 20_011));
    let limits = names(&rows, Work::Limit);
    assert_eq!(
        limits,
        [
            "copy within the device",
            "copy within the device, beside the blends",
            "copy within the device, beside the bus",
            "pinned host to device",
            "device to host, pinned",
            "pageable host to device",
            "pageable device to host",
        ]
    );
    assert_eq!((names(&rows, Work::Update).len(), names(&rows, Work::Blend).len()), (12, 6));
    assert_eq!(
        names(&rows, Work::Offload),
        [
            "f32 parameters in 37 tensors to the host",
            "bf16 parameters in 37 tensors to the host",
            "copies within the device, while f32 parameters in 37 tensors to the host go",
        ]
    );
    for row in &rows {
        assert_eq!((row.device.as_str(), row.seconds_all.len()), ("cuda:0", 2));
        assert!(row.bytes > 0 && row.seconds_all.iter().all(|&seconds| seconds > 0.0), "{row:?}");
        assert_eq!(row.share_of_limit.is_none(), row.work == Work::Limit, "{row:?}");
        assert!(row.limit.iter().all(|limit| limits.contains(&limit.as_str())), "{row:?}");
    }
    let named = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
    // Reads a parameter, and reads and writes two averages of 6 bytes. Reads 66 snapshots and writes 9 results.
    assert_eq!(named("bf16, compensated, 37 tensors").bytes, 20_011 * (2 + 2 * 2 * 6));
    assert_eq!(named("bf16, compensated, 37 tensors, with a look").bytes, 20_011 * (2 + 2 + 2 * 2 * 6));
    assert_eq!(named("66 f16 snapshots to 9 targets").bytes, 20_011 * 2 * (66 + 9));
    assert_eq!(named("bf16 parameters in 37 tensors to the host").bytes, 20_011 * 2);
    // Bytes read and written count, and tensors are aligned to 512 bytes.
    let copied = (0..37u64).map(|i| (20_011 / 37 + u64::from(i < 20_011 % 37)).next_multiple_of(128)).sum::<u64>();
    assert_eq!(named("copy within the device").bytes, 2 * 4 * copied);
}

#[test]
fn bench_measures_each_case_once_for_sizes_of_one() {
    driver();
    let one = Options { parameters: Some(1), tensors: 1, snapshots: 1, targets: 1, repeats: 1, ..small() };
    let rows = bench::run(&one, &mut |_| {}).unwrap().rows;
    let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names.len(), 7 + 6 + 3 + 3);
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), rows.len());
}

#[test]
fn bench_refuses_too_large_models_and_missing_devices() {
    driver();
    let large = Options { parameters: Some(1 << 50), ..small() };
    let error = bench::run(&large, &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::Setting { option: "parameters", .. }), "{error}");
    assert!(error.to_string().contains("of cuda:0, and") && error.to_string().contains("fewer"), "{error}");
    let nowhere = Options { device: Device::Cuda(999), ..small() };
    let text = bench::run(&nowhere, &mut |_| {}).unwrap_err().to_string();
    assert!(text.contains("cuda:999") && text.contains("choose cpu"), "{text}");
}

/// Runs the program on the stand-in driver, unless the tests use a real one.
fn program(arguments: &[&str], memory: &str) -> Option<Output> {
    let Driver::StandIn(_) = driver() else { return None };
    let library = crate::driver::standin();
    let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
    command.args(arguments).env("LD_LIBRARY_PATH", library.parent().unwrap()).env("STANDIN_MEMORY", memory);
    Some(command.output().unwrap())
}

#[test]
fn program_measures_and_draws_a_device() {
    let temp = tempfile::tempdir().unwrap();
    let plot = temp.path().join("plot.svg");
    let arguments = ["bench", "--device", "cuda:0", "--parameters", "5000", "--tensors", "30", "--repeats", "1"];
    let arguments = [&arguments[..], &["--json", "--plot", plot.to_str().unwrap()]].concat();
    let Some(output) = program(&arguments, "8000000000") else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["devices"][0]["device"], "cuda:0");
    assert_eq!(document["devices"][0]["parameters"], 5000);
    assert_eq!(document["measurements"].as_array().unwrap().len(), 7 + 12 + 3 + 6);
    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(
        svg.contains("pinned host to device") && svg.contains("bf16 parameters in 30 tensors to the host"),
        "{svg}"
    );
}

#[test]
fn small_device_is_measured_with_fewer_parameters() {
    let arguments = ["bench", "--device", "cuda:0", "--tensors", "30", "--repeats", "1", "--json"];
    let Some(output) = program(&arguments, "6000000") else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let parameters = document["devices"][0]["parameters"].as_u64().unwrap();
    assert!((10_000..80_000).contains(&parameters), "{parameters}");
}
