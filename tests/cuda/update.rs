//! Tests of the update on a device.

use posthoc_ema::compute::cpu::{self, Averages, Incoming, Layout, Precision, UpdateWeights};
use posthoc_ema::compute::cuda::{CudaDevice, DeviceAverages};
use posthoc_ema::{CudaMemory, Dtype};
use rand::Rng;

use crate::driver::driver;
use crate::owner::{Owned, Owner};
use crate::values::{AVERAGED, bits, random, size, terms, wild};

/// Averaged and copied tensors: their bytes, and device memory of another library with the same bytes.
struct Model<'o> {
    tensors: Vec<(Dtype, Vec<u8>, Owned<'o>)>,
    copied: Vec<(Vec<u8>, Owned<'o>)>,
}

fn check(lengths: &[usize], dtypes: &[Dtype], profiles: usize, precision: Precision, shifts: &[usize]) {
    driver();
    let mut random = random(lengths.len() as u64 + 100 * profiles as u64);
    let owner = Owner::new();
    let tensors = lengths.iter().enumerate().map(|(i, &n)| {
        let dtype = dtypes[i % dtypes.len()];
        let bytes = wild(&mut random, dtype, n);
        let owned = owner.own(&bytes, shifts[i % shifts.len()] * size(dtype));
        (dtype, bytes, owned)
    });
    let tensors = tensors.collect();
    let copied = [0usize, 1, 3, 16, 1001].map(|n| {
        let bytes: Vec<u8> = (0..n).map(|_| random.random()).collect();
        let owned = owner.own(&bytes, shifts[n % shifts.len()]);
        (bytes, owned)
    });
    let mut model = Model { tensors, copied: copied.into() };
    let layout = Layout::new(lengths.iter().copied());
    let sizes: Vec<usize> = model.copied.iter().map(|(bytes, _)| bytes.len()).collect();
    let device = CudaDevice::open(0).unwrap();
    let mut got = DeviceAverages::zeros(&device, &layout, profiles, precision, &sizes).unwrap();
    let mut expected = vec![Averages::zeros(&layout, precision); profiles];
    for step in 0..3 {
        let weights: Vec<f32> = (0..profiles).map(|p| if step == 0 { 1.0 } else { 0.9 / (p + 2) as f32 }).collect();
        let averaged: Vec<(Dtype, CudaMemory<'_>)> = model.tensors.iter().map(|(d, _, m)| (*d, m.lend())).collect();
        let copied: Vec<CudaMemory<'_>> = model.copied.iter().map(|(_, memory)| memory.lend()).collect();
        let weights = UpdateWeights::at(step, &weights);
        got.update(&averaged, &copied, weights).unwrap();
        let incoming: Vec<Incoming<'_>> =
            model.tensors.iter().map(|(dtype, bytes, _)| Incoming { dtype: *dtype, bytes }).collect();
        cpu::update(&mut expected, &incoming, &layout, weights);
        compare(&got, &expected, &layout, &model);
        // The next training step: new values at the same addresses.
        for (dtype, bytes, owned) in &mut model.tensors {
            *bytes = wild(&mut random, *dtype, bytes.len() / size(*dtype));
            owned.set(bytes);
        }
    }
}

fn compare(got: &DeviceAverages, expected: &[Averages], layout: &Layout, model: &Model<'_>) {
    let mut reader = got.reader().unwrap();
    for (profile, expected) in expected.iter().enumerate() {
        let got = reader.averages(profile).unwrap();
        for i in 0..layout.len() {
            let place = layout.range(i);
            assert_eq!(bits(&got.high[place.clone()]), bits(&expected.high[place.clone()]), "tensor {i}");
            assert_eq!(terms(&got, place.clone()), terms(expected, place), "tensor {i}");
        }
    }
    let copies: Vec<&Vec<u8>> = model.copied.iter().map(|(bytes, _)| bytes).collect();
    assert_eq!(reader.copies().unwrap().iter().collect::<Vec<_>>(), copies);
}

#[test]
fn update_of_every_length_dtype_and_precision_has_bits_of_cpu() {
    let lengths: Vec<usize> = (0..35).chain([1000, 1023, 4099]).collect();
    for profiles in 1..=8 {
        for precision in [Precision::Plain, Precision::Compensated] {
            check(&lengths, &AVERAGED, profiles, precision, &[0, 1, 3]);
        }
    }
}

#[test]
fn aligned_and_unaligned_update_has_bits_of_cpu() {
    for dtype in AVERAGED {
        for precision in [Precision::Plain, Precision::Compensated] {
            check(&[1, 2047, 2048, 2049, 10_000], &[dtype], 2, precision, &[0]);
            check(&[1, 2047, 2048, 2049, 10_000], &[dtype], 2, precision, &[1, 2, 3]);
        }
    }
}

#[test]
fn update_of_more_profiles_than_one_launch_takes_has_bits_of_cpu() {
    check(&[5, 300, 4097], &[Dtype::BF16, Dtype::F32], 9, Precision::Compensated, &[0]);
    check(&[5, 300, 4097], &[Dtype::F16], 17, Precision::Plain, &[1]);
}

#[test]
fn update_of_large_and_many_tensors_has_bits_of_cpu() {
    check(&[(1 << 16) + 3, 200_001, 1], &[Dtype::F32, Dtype::BF16], 2, Precision::Compensated, &[0, 1]);
    check(&vec![7; 2000], &[Dtype::BF16], 1, Precision::Plain, &[0, 1]);
}

#[test]
fn update_has_the_same_bits_for_every_chunk_size() {
    for chunk in ["2048", "16384", "65536"] {
        let variables = [("POSTHOC_EMA_CUDA_CHUNK", chunk)];
        crate::driver::check_in_own_process("update::update_of_large_and_many_tensors_has_bits_of_cpu", &variables);
    }
}

/// Runs in its own process, for its variable.
#[test]
#[ignore = "run by `a_wrong_chunk_size_is_an_error`"]
fn wrong_chunk_size() {
    driver();
    let device = CudaDevice::open(0).unwrap();
    let zeros = DeviceAverages::zeros(&device, &Layout::new([4]), 1, Precision::Plain, &[]);
    let text = zeros.unwrap_err().to_string();
    assert!(text.contains("POSTHOC_EMA_CUDA_CHUNK") && text.contains("1000"), "{text}");
}

#[test]
fn a_wrong_chunk_size_is_an_error() {
    crate::driver::check_in_own_process("update::wrong_chunk_size", &[("POSTHOC_EMA_CUDA_CHUNK", "1000")]);
}

#[test]
fn update_around_the_ends_of_chunks_has_bits_of_cpu() {
    let lengths = [2047, 2048, 2049, (1 << 15) - 1, 1 << 15, (1 << 15) + 1];
    for profiles in [1, 2, 5, 7] {
        check(&lengths, &[Dtype::F32, Dtype::F16], profiles, Precision::Compensated, &[0, 1]);
    }
}

#[test]
fn update_follows_new_addresses_and_streams() {
    let (first, second) = (Owner::new(), Owner::new());
    let layout = Layout::new([1000]);
    let device = CudaDevice::open(0).unwrap();
    let mut got = DeviceAverages::zeros(&device, &layout, 2, Precision::Compensated, &[]).unwrap();
    let mut expected = vec![Averages::zeros(&layout, Precision::Compensated); 2];
    let mut random = random(5);
    for step in 0..6 {
        let owner = if step % 2 == 0 { &first } else { &second };
        let bytes = wild(&mut random, Dtype::F16, 1000);
        let owned = owner.own(&bytes, 2 * (step % 3));
        let weights = UpdateWeights::at(step as u64, &[0.5, 0.25]);
        got.update(&[(Dtype::F16, owned.lend())], &[], weights).unwrap();
        cpu::update(&mut expected, &[Incoming { dtype: Dtype::F16, bytes: &bytes }], &layout, weights);
    }
    let mut reader = got.reader().unwrap();
    for (profile, expected) in expected.iter().enumerate() {
        assert_eq!(bits(&reader.averages(profile).unwrap().high), bits(&expected.high));
    }
}

#[test]
fn uploaded_averages_continue_with_bits_of_cpu() {
    let owner = Owner::new();
    let layout = Layout::new([100, 33]);
    let mut random = random(9);
    let values: Vec<Vec<u8>> = [100, 33].map(|n| wild(&mut random, Dtype::F32, n)).into();
    let incoming: Vec<Incoming<'_>> = values.iter().map(|bytes| Incoming { dtype: Dtype::F32, bytes }).collect();
    let owned: Vec<Owned<'_>> = values.iter().map(|bytes| owner.own(bytes, 0)).collect();
    for precision in [Precision::Plain, Precision::Compensated] {
        let mut expected = vec![Averages::zeros(&layout, precision); 2];
        cpu::update(&mut expected, &incoming, &layout, UpdateWeights::at(1, &[0.7, 0.3]));
        let copies = [vec![1u8, 2, 3], vec![]];
        let device = CudaDevice::open(0).unwrap();
        let mut got = DeviceAverages::upload(&device, &layout, &expected, precision, &copies).unwrap();
        let reader = &mut got.reader().unwrap();
        assert_eq!(reader.copies().unwrap(), copies);
        let small = [owner.own(&[7, 8, 9], 0), owner.own(&[], 0)];
        let averaged: Vec<(Dtype, CudaMemory<'_>)> = owned.iter().map(|memory| (Dtype::F32, memory.lend())).collect();
        got.update(&averaged, &[small[0].lend(), small[1].lend()], UpdateWeights::at(2, &[0.1, 0.2])).unwrap();
        cpu::update(&mut expected, &incoming, &layout, UpdateWeights::at(2, &[0.1, 0.2]));
        let reader = &mut got.reader().unwrap();
        assert_eq!(reader.copies().unwrap(), [vec![7, 8, 9], vec![]]);
        for (profile, expected) in expected.iter().enumerate() {
            let got = reader.averages(profile).unwrap();
            assert_eq!(bits(&got.high), bits(&expected.high));
            assert_eq!(terms(&got, 0..layout.total()), terms(expected, 0..layout.total()));
        }
    }
}

#[test]
fn tensors_of_several_streams_are_rejected_without_change() {
    let (one, other) = (Owner::new(), Owner::new());
    let bytes = [0u8; 16];
    let (a, b) = (one.own(&bytes, 0), other.own(&bytes, 0));
    let device = CudaDevice::open(0).unwrap();
    let layout = Layout::new([4, 4]);
    let mut averages = DeviceAverages::zeros(&device, &layout, 1, Precision::Plain, &[]).unwrap();
    let mixed = [(Dtype::F32, a.lend()), (Dtype::F32, b.lend())];
    let text = averages.update(&mixed, &[], UpdateWeights::at(1, &[1.0])).unwrap_err().to_string();
    assert!(text.contains("several streams"), "{text}");
    assert!(averages.reader().unwrap().averages(0).unwrap().high.iter().all(|&v| v == 0.0));
}
