//! Tests of updates with NaN or infinity in parameters on a device, compared with parameters in host memory.

use std::path::Path;

use posthoc_ema::compute::cpu::{self, Averages, Incoming, Layout, Precision, UpdateWeights};
use posthoc_ema::compute::cuda::{CudaDevice, DeviceAverages, NonFiniteElement};
use posthoc_ema::{CudaMemory, Device, Dtype, Error, OnNonFinite, Options, PostHocEma, Profile};

use crate::driver::{check_in_own_process, count, driver};
use crate::model::{Model, files};
use crate::owner::{Owned, Owner};
use crate::values::{AVERAGED, bits, encode, random, size, tame, terms};

/// Lengths of tensors, of which the longest take several chunks.
const LENGTHS: [usize; 8] = [3, 0, 1, 2049, 6147, 9, 4096, 0];

/// Tensors of a dtype on both sides, which are updated together.
struct Both<'o> {
    dtype: Dtype,
    tensors: Vec<(Vec<u8>, Owned<'o>)>,
    copied: Owned<'o>,
    layout: Layout,
    averages: DeviceAverages,
    expected: Vec<Averages>,
}

impl<'o> Both<'o> {
    fn new(owner: &'o Owner, dtype: Dtype, shifts: &[usize], profiles: usize) -> Both<'o> {
        let mut random = random(7);
        let tensors = LENGTHS.iter().enumerate().map(|(i, &n)| {
            let bytes = tame(&mut random, dtype, n);
            let owned = owner.own(&bytes, shifts[i % shifts.len()] * size(dtype));
            (bytes, owned)
        });
        let tensors = tensors.collect();
        let layout = Layout::new(LENGTHS);
        let device = CudaDevice::open(0).unwrap();
        let precision = Precision::Compensated;
        let averages = DeviceAverages::zeros(&device, &layout, profiles, precision, &[5]).unwrap();
        let expected = vec![Averages::zeros(&layout, precision); profiles];
        Both { dtype, tensors, copied: owner.own(&[0; 5], 0), layout, averages, expected }
    }

    /// Sets elements, updates and returns the element that was found; the copied tensor takes `copied`.
    fn update(&mut self, bad: &[(usize, usize, f64)], copied: u8, looks: bool) -> Option<NonFiniteElement> {
        let mut values: Vec<Vec<u8>> = self.tensors.iter().map(|(bytes, _)| bytes.clone()).collect();
        for &(tensor, element, value) in bad {
            let at = element * size(self.dtype);
            values[tensor][at..at + size(self.dtype)].copy_from_slice(&encode(value, self.dtype));
        }
        for ((_, owned), bytes) in self.tensors.iter().zip(&values) {
            owned.set(bytes);
        }
        self.copied.set(&[copied; 5]);
        let each: Vec<f32> = (0..self.expected.len()).map(|i| 0.5 / (i + 1) as f32).collect();
        let weights = UpdateWeights::at(copied.into(), &each);
        let averaged: Vec<(Dtype, CudaMemory<'_>)> =
            self.tensors.iter().map(|(_, owned)| (self.dtype, owned.lend())).collect();
        if looks {
            self.averages.update_if_finite(&averaged, &[self.copied.lend()], weights).unwrap();
        } else {
            self.averages.update(&averaged, &[self.copied.lend()], weights).unwrap();
        }
        if bad.is_empty() || !looks {
            let incoming: Vec<Incoming<'_>> =
                values.iter().map(|bytes| Incoming { dtype: self.dtype, bytes }).collect();
            cpu::update(&mut self.expected, &incoming, &self.layout, weights);
        }
        self.averages.refused().unwrap()
    }

    fn check(&self, copied: u8) {
        let mut reader = self.averages.reader().unwrap();
        for (profile, expected) in self.expected.iter().enumerate() {
            let got = reader.averages(profile).unwrap();
            for i in 0..self.layout.len() {
                let range = self.layout.range(i);
                assert_eq!(bits(&got.high[range.clone()]), bits(&expected.high[range.clone()]), "tensor {i}");
                assert_eq!(terms(&got, range.clone()), terms(expected, range), "tensor {i}");
            }
        }
        assert_eq!(reader.copies().unwrap(), [vec![copied; 5]]);
    }
}

/// Elements to set, the first of which must be found.
fn cases() -> Vec<Vec<(usize, usize, f64)>> {
    let mut cases = Vec::new();
    for (tensor, &n) in LENGTHS.iter().enumerate().filter(|(_, n)| **n > 0) {
        for element in [0, n / 2, n - 1, n.saturating_sub(2), 2047, 2048, 4095, 6146] {
            let value = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][(tensor + element) % 3];
            cases.extend((element < n).then(|| vec![(tensor, element, value)]));
        }
    }
    cases.push(vec![(2, 0, f64::INFINITY), (3, 0, f64::NAN), (4, 5, f64::NAN)]);
    cases.push(vec![(4, 6000, f64::NAN), (4, 6100, f64::INFINITY), (6, 1, f64::NAN)]);
    cases.push(vec![(4, 4100, f64::NEG_INFINITY), (4, 4101, f64::NAN)]);
    cases.push((0..4096).map(|i| (6, i, f64::NAN)).collect());
    cases
}

#[test]
fn look_finds_first_element_and_leaves_averages_of_every_dtype_and_alignment() {
    for dtype in AVERAGED {
        for (shifts, profiles) in [(&[0][..], 2), (&[1, 0, 3], 9)] {
            let owner = Owner::new();
            let mut both = Both::new(&owner, dtype, shifts, profiles);
            let cases = cases();
            // Refused updates before the first, one after another, and between good ones.
            for (i, bad) in cases.iter().enumerate() {
                let found = both.update(bad, 9, true).unwrap();
                let (tensor, element, value) = bad[0];
                assert_eq!((found.tensor, found.element), (tensor, element), "{dtype} {shifts:?} {bad:?}");
                assert!(found.value == value || found.value.is_nan() && value.is_nan(), "{dtype} {found:?} {bad:?}");
                if i % 5 == 4 {
                    both.check(if i < 9 { 0 } else { 1 });
                    assert_eq!(both.update(&[], 1, true), None);
                    assert_eq!(both.update(&[], 1, true), None);
                    both.check(1);
                }
            }
            // Without a look, every value is taken, also right after a refused update.
            assert!(both.update(&cases[0], 9, true).is_some());
            assert_eq!(both.update(&[(0, 1, f64::INFINITY)], 2, false), None);
            both.check(2);
        }
    }
}

/// Checks that an update with the largest finite values and with subnormals is not left out.
#[test]
fn look_passes_extreme_finite_values() {
    for dtype in AVERAGED {
        let largest = match dtype {
            Dtype::F16 => 65_504.0,
            Dtype::BF16 => 2f64.powi(127) * (2.0 - 2f64.powi(-7)),
            Dtype::F32 => f64::from(f32::MAX),
            _ => f64::MAX,
        };
        let owner = Owner::new();
        let mut both = Both::new(&owner, dtype, &[0, 1], 1);
        for value in [largest, -largest, 1e-310, -0.0] {
            let bad: Vec<(usize, usize, f64)> = (0..9).flat_map(|i| [(5, i, value), (4, 6146 - i, value)]).collect();
            assert_eq!(both.update(&bad, 1, true), None, "{dtype} {value}");
        }
    }
}

fn options(dir: &Path, reaction: OnNonFinite) -> Options {
    let options = PostHocEma::options(dir).update_every(2).checkpoint_every(10).snapshot_growth(None);
    options.max_checkpoints(30).on_non_finite(reaction)
}

/// Steps of updates with NaN: the first ones, several in a row, at and before a checkpoint, and the last.
const BAD: [u64; 10] = [2, 4, 8, 14, 16, 18, 20, 26, 28, 46];

/// Sets the last element of a tensor to NaN on both sides, at the step of a bad update.
fn train(model: &mut Model<'_>, step: u64) {
    model.train(step);
    if !BAD.contains(&step) {
        return;
    }
    let i = (step / 2 % 5) as usize;
    let (name, tensor, owned) = &mut model.device.tensors[i];
    let (dtype, at) = (tensor.dtype, tensor.bytes.len() - size(tensor.dtype));
    tensor.bytes[at..].copy_from_slice(&encode([f64::NAN, f64::INFINITY][i % 2], dtype));
    owned.set(&tensor.bytes);
    model.host.insert(name.clone(), tensor.clone());
}

/// Takes the update that an error names: its step, tensor, element and value.
fn take(errors: &mut Vec<(u64, String, usize, String)>, result: posthoc_ema::Result<posthoc_ema::UpdateOutcome>) {
    match result {
        Ok(_) => {}
        Err(Error::NonFiniteParameter { step, tensor, element, value }) => {
            errors.push((step, tensor, element, value.to_string()));
        }
        Err(error) => panic!("{error}"),
    }
}

/// Trains on both sides, and compares errors, histories and files.
fn check(device: Device, reaction: OnNonFinite, in_background: bool, asks: bool) {
    let temp = tempfile::tempdir().unwrap();
    let (on_host, on_device) = (temp.path().join("host"), temp.path().join("device"));
    let owner = Owner::new();
    let mut model = Model::new(&owner);
    let set = |dir: &Path| options(dir, reaction).checkpoint_in_background(in_background);
    let mut expected = set(&on_host).create(&model.host).unwrap();
    let mut got = set(&on_device).device(device).create(&model.device).unwrap();
    let (mut host_errors, mut device_errors) = (Vec::new(), Vec::new());
    for (until, side) in [(47, device), (63, if device == Device::Cpu { Device::Cuda(0) } else { Device::Cpu })] {
        while got.step() < until {
            got.fence().map_or(Ok(()), |fence| fence.wait()).unwrap();
            train(&mut model, got.step() + 1);
            take(&mut host_errors, expected.update(&model.host));
            take(&mut device_errors, got.update(&model.device));
            assert_eq!(got.step(), expected.step());
            if asks {
                assert_eq!(got.history(), expected.history());
            }
            let path = temp.path().join("saved");
            if got.step() == 29 {
                take(&mut device_errors, got.save_to(&path).map(|()| posthoc_ema::UpdateOutcome::Skipped));
                assert_eq!(posthoc_ema::SavedState::at(&path).unwrap().updated, Some(24));
            }
        }
        expected.finish().unwrap();
        take(&mut device_errors, got.finish().map(|()| posthoc_ema::UpdateOutcome::Skipped));
        assert_eq!(got.history().times(), expected.history().times());
        assert_eq!(files(&on_device), files(&on_host), "{device:?} {reaction:?} until {until}");
        drop((expected, got));
        expected = set(&on_host).resume(&model.host).unwrap();
        got = set(&on_device).device(side).resume(&model.device).unwrap();
        assert_eq!(got.history(), expected.history());
    }
    assert_eq!(device_errors, host_errors);
    assert_eq!(host_errors.len(), if reaction == OnNonFinite::Raise { BAD.len() } else { 0 });
}

#[test]
fn bad_updates_leave_errors_history_and_files_of_host() {
    for device in [Device::Cuda(0), Device::Cpu] {
        for reaction in [OnNonFinite::Raise, OnNonFinite::Skip] {
            check(device, reaction, true, false);
            check(device, reaction, false, true);
        }
    }
}

#[test]
fn bad_update_is_reported_once_by_a_synthesis_and_not_in_it() {
    let profile = Profile::sigma_rel(0.1).unwrap();
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let set = |dir: &str| options(&temp.path().join(dir), OnNonFinite::Raise);
        let mut expected = set("host").create(&model.host).unwrap();
        let mut got = set("device").device(device).create(&model.device).unwrap();
        for step in 1..=14 {
            train(&mut model, step);
            let _ = expected.update(&model.host);
            let _ = got.update(&model.device);
        }
        let error = got.synthesize(profile.clone()).unwrap_err();
        assert!(matches!(error, Error::NonFiniteParameter { step: 14, .. }), "{error}");
        assert_eq!(got.synthesize(profile.clone()).unwrap(), expected.synthesize(profile.clone()).unwrap());
        // The first updates alone were bad.
        let mut got = set("first").device(device).create(&model.device).unwrap();
        train(&mut model, 2);
        got.update_at(2, &model.device).unwrap();
        assert!(matches!(got.plan(profile.clone()), Err(Error::NonFiniteParameter { step: 2, .. })));
        assert!(matches!(got.plan(profile.clone()), Err(Error::NoUpdate)));
        assert!(got.history().is_empty());
        got.finish().unwrap();
        assert!(files(&temp.path().join("first")).is_empty());
    }
}

/// An error of the call itself comes first, and the bad update is reported by the next.
#[test]
fn bad_update_before_a_changed_model_is_reported_later() {
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let mut ema = options(temp.path(), OnNonFinite::Raise).device(device).create(&model.device).unwrap();
        train(&mut model, 2);
        ema.update_at(2, &model.device).unwrap();
        train(&mut model, 6);
        let gone = model.device.tensors.pop().unwrap();
        assert!(matches!(ema.update_at(6, &model.device), Err(Error::Changed { .. })));
        model.device.tensors.push(gone);
        assert!(matches!(ema.update_at(6, &model.device), Err(Error::NonFiniteParameter { step: 2, .. })));
        assert_eq!(ema.history().times(), [6]);
        ema.finish().unwrap();
    }
}

/// Runs in its own process, because the counters of the stand-in are global.
#[test]
#[ignore = "run by `look_costs_are_bounded`"]
fn costs() {
    if count("launches").is_none() {
        return;
    }
    for (reaction, launches, copies) in [(OnNonFinite::Skip, 2, 1), (OnNonFinite::Ignore, 1, 0)] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let mut ema = options(temp.path(), reaction).device(Device::Cuda(0)).create(&model.device).unwrap();
        model.train(2);
        ema.update_at(2, &model.device).unwrap();
        let work = || ["launches", "copies", "memsets", "allocations"].map(|what| count(what).unwrap());
        for step in [4, 6] {
            let before = work();
            ema.update_at(step, &model.device).unwrap();
            let done: Vec<u64> = work().iter().zip(before).map(|(now, before)| now - before).collect();
            assert_eq!(done, [launches, copies, 0, 0], "{reaction:?}");
        }
        // A bad update costs the same, and the next one sets the key back.
        train(&mut model, 8);
        let allocated = count("allocations");
        ema.update_at(8, &model.device).unwrap();
        assert_eq!(count("allocations"), allocated);
        if reaction == OnNonFinite::Skip {
            let before = work();
            ema.update_at(12, &model.device).unwrap();
            assert_eq!(count("memsets").unwrap() - before[2], 1);
            assert_eq!(count("allocations"), allocated);
        }
    }
}

#[test]
fn look_costs_are_bounded() {
    driver();
    check_in_own_process("non_finite::costs", &[]);
}

#[test]
fn new_tensors_on_a_device_must_begin_with_finite_values() {
    for device in [Device::Cuda(0), Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let owner = Owner::new();
        let mut model = Model::new(&owner);
        let few = options(temp.path(), OnNonFinite::Skip).leave_out(["d.*"]).device(device);
        let mut ema = few.create(&model.device).unwrap();
        model.train(2);
        ema.update_at(2, &model.device).unwrap();
        ema.finish().unwrap();
        drop(ema);
        let all =
            || options(temp.path(), OnNonFinite::Skip).leave_out(Vec::<String>::new()).extend(true).device(device);
        // The tensor that goes on may hold anything, the new one may not.
        for (i, is_new) in [(0, false), (3, true)] {
            let (_, tensor, owned) = &mut model.device.tensors[i];
            let mut bytes = tensor.bytes.clone();
            bytes[..size(tensor.dtype)].copy_from_slice(&encode(f64::INFINITY, tensor.dtype));
            owned.set(&bytes);
            let resumed = all().resume(&model.device);
            let text = resumed.as_ref().err().map(ToString::to_string).unwrap_or_default();
            assert_eq!(text.contains("`d.half`") && text.contains("inf at element 0"), is_new, "{device:?} {i} {text}");
            assert_eq!(resumed.is_err(), is_new, "{text}");
            resumed.into_iter().for_each(PostHocEma::abandon);
        }
    }
}
