//! Updates of one kind on a device, and the time that it takes to lock memory.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use half::{bf16, f16};
use posthoc_ema::compute::cpu::{Averages, Incoming, Layout, Precision, UpdateWeights, update};
use posthoc_ema::compute::cuda::{Buffer, CudaDevice, DeviceAverages, PinnedMemory, TimedStream};
use posthoc_ema::{Device, Dtype};
use serde_json::json;

/// Number of tensors of the model.
const TENSORS: usize = 100;

/// Alignment of tensors in elements.
const ALIGNMENT: usize = 128;

/// Elements after which the parameters repeat.
const PERIOD: usize = 1009;

/// Repetitions of the parameters that the host writes. The device makes the others.
const REPETITIONS: usize = 1 << 10;

/// Update to time, from the command line.
pub struct UpdateCase {
    pub profiles: usize,
    pub dtype: Dtype,
    pub parameters: usize,
    /// Bytes by which the addresses of all tensors are off their alignment.
    pub off: usize,
}

/// Opens a device by its name.
pub fn open(device: Device) -> Result<Arc<CudaDevice>, Box<dyn Error>> {
    match device {
        Device::Cuda(number) => Ok(CudaDevice::open(number)?),
        other => Err(format!("{other} is not a device: name one as cuda:0").into()),
    }
}

/// Prints the seconds of an update with compensated averages, after two updates that are compared with the CPU's.
pub fn update_times(device: &Arc<CudaDevice>, kind: &UpdateCase, repeats: usize) -> Result<(), Box<dyn Error>> {
    let size = kind.dtype.bitsize() / 8;
    if !kind.off.is_multiple_of(size) {
        return Err(format!("{} bytes off: not a multiple of the {size} bytes of an element", kind.off).into());
    }
    let each = (kind.parameters / TENSORS).max(1);
    let stride = size * each.next_multiple_of(ALIGNMENT);
    let stream = TimedStream::new(device)?;
    let mut parameters = Buffer::new(device, TENSORS * stride + kind.off, "parameters")?;
    let mut copy = Buffer::new(device, parameters.len(), "a copy of the parameters")?;
    let pattern: Vec<u8> = (0..PERIOD * REPETITIONS).flat_map(|i| element(kind.dtype, i)).collect();
    stream.repeat(&mut parameters, &pattern)?;
    let layout = Layout::new(vec![each; TENSORS]);
    let mut averages = DeviceAverages::zeros(device, &layout, kind.profiles, Precision::Compensated, &[])?;
    let place = |tensor: usize| tensor * stride + kind.off;
    let lend = |tensor: usize| (kind.dtype, stream.lend(&parameters, place(tensor)..place(tensor) + size * each));
    let tensors: Vec<_> = (0..TENSORS).map(lend).collect();
    let weights: Vec<f32> = (0..kind.profiles).map(|profile| 0.3 / (1 + profile) as f32).collect();
    let mut once = || averages.update(&tensors, &[], UpdateWeights::at(1, &weights));
    (0..2).try_for_each(|_| once())?;
    let seconds = (0..repeats.max(1)).map(|_| stream.seconds(&mut once)).collect::<Result<Vec<_>, _>>()?;
    let copies = (0..repeats.max(1)).map(|_| stream.seconds(&mut || stream.copy(&mut copy, &parameters)));
    let copied = copies.collect::<Result<Vec<_>, _>>()?;
    let mut checked = DeviceAverages::zeros(device, &layout, kind.profiles, Precision::Compensated, &[])?;
    (0..2).try_for_each(|_| checked.update(&tensors, &[], UpdateWeights::at(1, &weights)))?;
    check(&stream, &checked, kind, &layout, &weights, &pattern, place(0))?;
    // An f32 value and a low-order term of 16 bits, read and written.
    let bytes = TENSORS * each * (size + kind.profiles * 12);
    let rate = (2 * parameters.len()) as f64 / median(&copied);
    let middle = median(&seconds);
    let document = json!({
        "bytes": bytes,
        "seconds_all": seconds,
        "seconds_median": middle,
        "copy_bytes_per_second": rate,
    });
    println!("{document}");
    Ok(())
}

/// Compares the first tensor's averages with the CPU's after the same two updates.
fn check(
    stream: &TimedStream,
    averages: &DeviceAverages,
    kind: &UpdateCase,
    layout: &Layout,
    weights: &[f32],
    pattern: &[u8],
    start: usize,
) -> Result<(), Box<dyn Error>> {
    let size = kind.dtype.bitsize() / 8;
    let n = layout.range(0).len().min(PERIOD);
    let own = Layout::new([n]);
    let mut expected = vec![Averages::zeros(&own, Precision::Compensated); kind.profiles];
    let incoming = [Incoming { dtype: kind.dtype, bytes: &pattern[start..start + size * n] }];
    (0..2).for_each(|_| update(&mut expected, &incoming, &own, UpdateWeights::at(1, weights)));
    for (profile, expected) in expected.iter().enumerate() {
        let got = stream.averages(averages, profile, 0..n)?;
        let differs = |i: &usize| got.high[*i].to_bits() != expected.high[*i].to_bits();
        if let Some(i) = (0..n).find(differs) {
            let (got, expected) = (got.high[i], expected.high[i]);
            return Err(format!("profile {profile}, element {i}: the device has {got}, the CPU {expected}").into());
        }
        if got.low != expected.low {
            return Err(format!("profile {profile}: the low-order terms differ from the CPU's").into());
        }
    }
    Ok(())
}

/// Prints the seconds that it takes to lock memory and to zero it, and to give it back.
pub fn pin_times(device: &Arc<CudaDevice>, bytes: usize) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let memory = PinnedMemory::new(device, bytes)?;
    let seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    drop(memory);
    println!("{}", json!({ "bytes": bytes, "seconds": seconds, "seconds_to_free": start.elapsed().as_secs_f64() }));
    Ok(())
}

/// Returns the bytes of a parameter in [-0.5, 0.5).
fn element(dtype: Dtype, i: usize) -> Vec<u8> {
    let value = (i % PERIOD) as f32 / PERIOD as f32 - 0.5;
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
