//! Writes a made-up run for the GPU check, and synthesizes from it repeatedly in one process; times single pieces of
//! work on a device.

#[cfg(feature = "cuda")]
mod device;

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use posthoc_ema::{At, Device, Dtype, Output, PostHocEma, Profile, Run, WriteOptions};
use serde_json::json;

/// Number of tensors of the model.
const TENSORS: usize = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["write", dir, parameters, snapshots] => write(Path::new(dir), parameters.parse()?, snapshots.parse()?),
        ["synthesize", dir, device, out, times] => {
            synthesize(Path::new(dir), device.parse()?, Path::new(out), times.parse()?)
        }
        #[cfg(feature = "cuda")]
        ["update", at, profiles, dtype, parameters, off, repeats] => {
            let dtype = match dtype {
                "f32" => Dtype::F32,
                "bf16" => Dtype::BF16,
                "f16" => Dtype::F16,
                other => return Err(format!("dtype {other}: choose f32, bf16 or f16").into()),
            };
            let (profiles, parameters, off) = (profiles.parse()?, parameters.parse()?, off.parse()?);
            let kind = device::UpdateCase { profiles, dtype, parameters, off };
            device::update_times(&device::open(at.parse()?)?, &kind, repeats.parse()?)
        }
        #[cfg(feature = "cuda")]
        ["pin", at, bytes] => device::pin_times(&device::open(at.parse()?)?, bytes.parse()?),
        _ => Err("gpu-check-run write DIR PARAMETERS SNAPSHOTS | synthesize DIR DEVICE FILE TIMES | \
                  update DEVICE PROFILES DTYPE PARAMETERS OFF REPEATS | pin DEVICE BYTES"
            .into()),
    }
}

/// Writes a run of two profiles, with f16 snapshots after every update.
fn write(dir: &Path, parameters: usize, snapshots: u64) -> Result<(), Box<dyn Error>> {
    let each = (parameters / TENSORS).max(1);
    let value = |i: usize| (i % 1009) as f32 / 1009.0 - 0.5;
    let tensor = |t: usize| (format!("layer.{t}.weight"), (0..each).map(|i| value(i + t)).collect::<Vec<f32>>());
    let mut model: Vec<(String, Vec<f32>)> = (0..TENSORS).map(tensor).collect();
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(1).max_checkpoints(snapshots as usize);
    let mut ema = options.checkpoint_dtype(Dtype::F16).create(&model)?;
    for step in 1..=snapshots {
        let (keep, add) = (1.0 - 0.1 / step as f32, 0.01 * (step % 7) as f32);
        model.iter_mut().for_each(|(_, values)| values.iter_mut().for_each(|v| *v = *v * keep + add));
        ema.update(&model)?;
    }
    ema.finish()?;
    Ok(())
}

/// Prints the seconds of each synthesis. The device stays open in between, and the files stay in the page cache.
fn synthesize(dir: &Path, device: Device, out: &Path, times: usize) -> Result<(), Box<dyn Error>> {
    let run = Run::open(dir)?;
    let plans = run.plans(&[Profile::sigma_rel(0.15)?], At::Latest)?;
    #[cfg(feature = "cuda")]
    let _open = match device {
        Device::Cuda(number) => Some(posthoc_ema::compute::cuda::CudaDevice::open(number)?),
        _ => None,
    };
    let mut seconds = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        let options = WriteOptions { dtype: Some(Dtype::F16), device, progress: None };
        run.write_all(&[Output { plan: &plans[0], path: out }], &options)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    println!("{}", json!({ "bytes_read": run.bytes_to_read(&plans), "seconds": seconds }));
    Ok(())
}
