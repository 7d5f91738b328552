//! Tests of converted averages and of value ranges from a device.

use posthoc_ema::Dtype;
use posthoc_ema::compute::cpu::{self, Averages, Layout, Precision};
use posthoc_ema::compute::cuda::{CudaDevice, DeviceAverages};
use rand::Rng;

use crate::driver::driver;
use crate::values::{AVERAGED, random, wild};

/// Returns averages, of which a quarter have arbitrary bits.
fn averages(lengths: &[usize], precision: Precision, seed: u64) -> (Layout, Averages) {
    let layout = Layout::new(lengths.iter().copied());
    let mut random = random(seed);
    let mut averages = Averages::zeros(&layout, precision);
    for i in 0..layout.len() {
        let place = layout.range(i);
        let values = wild(&mut random, Dtype::F32, place.len());
        bytemuck::cast_slice_mut(&mut averages.high[place.clone()]).copy_from_slice(&values);
        if let Some(low) = &mut averages.low {
            low[place].iter_mut().for_each(|c| *c = random.random::<i16>() / 2);
        }
    }
    (layout, averages)
}

#[test]
fn conversion_to_every_dtype_has_bits_of_cpu() {
    driver();
    let device = CudaDevice::open(0).unwrap();
    let lengths: Vec<usize> = (0..20).chain([1000, 2049, 70_001]).collect();
    for precision in [Precision::Plain, Precision::Compensated] {
        let (layout, averages) = averages(&lengths, precision, 3);
        let on_device =
            DeviceAverages::upload(&device, &layout, std::slice::from_ref(&averages), precision, &[]).unwrap();
        let mut reader = on_device.reader().unwrap();
        let mixed: Vec<Dtype> = (0..lengths.len()).map(|i| AVERAGED[i / 3 % 4]).collect();
        let same = AVERAGED.map(|dtype| vec![dtype; lengths.len()]);
        for dtypes in same.iter().chain([&mixed]) {
            let (bytes, ranges) = reader.converted(0, dtypes).unwrap();
            for (i, (&dtype, range)) in dtypes.iter().zip(ranges).enumerate() {
                let place = layout.range(i);
                let mut expected = vec![0; place.len() * dtype.bitsize() / 8];
                averages.store(&mut expected, place, dtype);
                assert_eq!(canonical(&bytes[range], dtype), canonical(&expected, dtype), "{dtype} tensor {i}");
            }
        }
    }
}

/// Returns the bits to compare. Only the payload of an f64 NaN may differ.
fn canonical(bytes: &[u8], dtype: Dtype) -> Vec<u64> {
    match dtype {
        Dtype::F64 => {
            let value = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap());
            bytes.chunks(8).map(|b| if value(b).is_nan() { u64::MAX } else { value(b).to_bits() }).collect()
        }
        _ => bytes.iter().map(|&b| u64::from(b)).collect(),
    }
}

#[test]
fn ranges_equal_those_of_cpu() {
    driver();
    let device = CudaDevice::open(0).unwrap();
    let lengths = [0usize, 1, 2, 3, 4, 5, 100, 5000, 140_001];
    for seed in 0..6 {
        let (layout, mut averages) = averages(&lengths, Precision::Plain, seed);
        if seed > 0 {
            // Only the last tensor has NaN or infinities.
            for (i, value) in averages.high.iter_mut().enumerate() {
                *value = if value.is_finite() { *value } else { i as f32 };
            }
            averages.high[layout.range(8).end - seed as usize] = [f32::NAN, f32::INFINITY][seed as usize % 2];
        }
        let profiles = [averages.clone(), Averages::zeros(&layout, Precision::Plain)];
        let on_device = DeviceAverages::upload(&device, &layout, &profiles, Precision::Plain, &[]).unwrap();
        let ranges = on_device.reader().unwrap().ranges().unwrap();
        for (i, (got, zeros)) in ranges[0].iter().zip(&ranges[1]).enumerate() {
            let expected = cpu::scan(&averages.high[layout.range(i)]);
            assert_eq!(got.first_not_finite, expected.first_not_finite, "tensor {i}");
            if expected.first_not_finite.is_none() {
                assert_eq!(*got, expected, "tensor {i}");
            }
            assert_eq!(*zeros, cpu::ValueRange::default());
        }
    }
}

/// Reads several blocks, so that both pinned buffers are reused.
#[test]
fn averages_larger_than_staging_buffers_keep_bits() {
    driver();
    let device = CudaDevice::open(0).unwrap();
    let n = (32 << 20) / 4 * 3 + 12_345;
    let layout = Layout::new([n]);
    let mut averages = Averages::zeros(&layout, Precision::Plain);
    averages.high.iter_mut().enumerate().for_each(|(i, value)| *value = i as f32);
    let on_device =
        DeviceAverages::upload(&device, &layout, std::slice::from_ref(&averages), Precision::Plain, &[]).unwrap();
    assert_eq!(on_device.reader().unwrap().averages(0).unwrap().high, averages.high);
}
