//! Tests of a model on several devices and in host memory, compared with a twin in host memory alone.

use std::path::Path;

use posthoc_ema::compute::cuda::devices;
use posthoc_ema::{
    Device, Dtype, Error, GraphStream, OnNonFinite, Options, Parameters, ParametersMut, PostHocEma, Profile, Result,
    Tensor, TensorView, TensorViewMut, Tensors,
};

use crate::capture::{begin_capture, end_capture};
use crate::driver::{check_in_own_process, count, driver};
use crate::model::{Model, files};
use crate::owner::{Owned, Owner};

/// Place of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Device(usize),
    Host,
}

use Place::{Device as On, Host};

/// Places of a model's tensors, one after the other, again and again.
const PLACES: [&[Place]; 3] = [&[On(0), On(1)], &[On(1), Host, On(0)], &[Host, On(1)]];

/// Model whose tensors are in several places.
struct Spread<'o> {
    tensors: Vec<(String, Tensor, Option<Owned<'o>>)>,
    until_fence: bool,
}

/// Two devices, and a model in host memory that is trained alike.
struct Twins<'o> {
    model: Model<'o>,
    spread: Spread<'o>,
}

fn owners() -> Option<[Owner; 2]> {
    driver();
    (devices().unwrap() > 1).then(|| [Owner::on(0), Owner::on(1)])
}

impl<'o> Twins<'o> {
    fn new(owners: &'o [Owner; 2], places: &[Place]) -> Twins<'o> {
        let model = Model::new(&owners[0]);
        let mut tensors = Vec::new();
        for (i, (name, tensor, _)) in model.device.tensors.iter().enumerate() {
            let owned = match places[i % places.len()] {
                On(number) => Some(owners[number].own(&tensor.bytes, 0)),
                Host => None,
            };
            tensors.push((name.clone(), tensor.clone(), owned));
        }
        Twins { model, spread: Spread { tensors, until_fence: false } }
    }

    /// Changes the tensors on both sides.
    fn train(&mut self, step: u64) {
        self.model.train_host(step);
        for (name, tensor, owned) in &mut self.spread.tensors {
            tensor.bytes = self.model.host.get(name).unwrap().bytes.clone();
            owned.iter().for_each(|owned| owned.set(&tensor.bytes));
        }
    }

    /// Sets bytes of a tensor on both sides.
    fn set(&mut self, name: &str, at: usize, bytes: &[u8]) {
        let (_, tensor, owned) = self.spread.tensors.iter_mut().find(|(other, ..)| other == name).unwrap();
        tensor.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        owned.iter().for_each(|owned| owned.set(&tensor.bytes));
        self.model.host.insert(name, tensor.clone());
    }
}

impl Spread<'_> {
    /// Reads all tensors, each where it is.
    fn read(&self) -> Tensors {
        let read = |(name, tensor, owned): &(String, Tensor, Option<Owned<'_>>)| {
            let bytes = owned.as_ref().map_or_else(|| tensor.bytes.clone(), Owned::get);
            (name.clone(), Tensor { bytes, ..tensor.clone() })
        };
        self.tensors.iter().map(read).collect()
    }
}

impl Parameters for Spread<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let mut views = Vec::new();
        for (name, tensor, owned) in &self.tensors {
            views.push(match owned {
                None => TensorView::host(name, tensor.dtype, &tensor.shape, &tensor.bytes)?,
                Some(owned) => {
                    let lent = owned.lend();
                    // SAFETY: the tests change the memory only after its stream has waited for the fence.
                    let lent = if self.until_fence { unsafe { lent.until_fence() } } else { lent };
                    TensorView::cuda(name, tensor.dtype, &tensor.shape, lent)?
                }
            });
        }
        read(&views)
    }
}

impl ParametersMut for Spread<'_> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        for (name, tensor, owned) in &mut self.tensors {
            write(match owned {
                None => TensorViewMut::host(name, tensor.dtype, &tensor.shape, &mut tensor.bytes)?,
                Some(owned) => TensorViewMut::cuda(name, tensor.dtype, &tensor.shape, owned.lend_mut())?,
            })?;
        }
        Ok(())
    }
}

fn options(dir: &Path) -> Options {
    let options = PostHocEma::options(dir).update_every(2).checkpoint_every(10).snapshot_growth(None);
    options.max_checkpoints(3).checkpoint_dtype(Dtype::F16)
}

/// Trains both sides until a step, each device's stream behind its part of the fence.
fn train(twins: &mut Twins<'_>, owners: &[Owner; 2], got: &mut PostHocEma, expected: &mut PostHocEma, until: u64) {
    while got.step() < until {
        if let Some(fence) = got.fence() {
            for number in fence.devices() {
                // SAFETY: the stream of that device's owner.
                unsafe { fence.wait_on_device(number, owners[number].stream()) }.unwrap();
            }
        }
        twins.train(got.step() + 1);
        assert_eq!(got.update(&twins.spread).unwrap(), expected.update(&twins.model.host).unwrap());
    }
}

#[test]
fn model_in_several_places_stores_files_of_host() {
    let Some(owners) = owners() else { return };
    for (places, until_fence) in PLACES.into_iter().flat_map(|places| [(places, false), (places, true)]) {
        for device in [Device::AnyCuda, Device::Cpu] {
            let temp = tempfile::tempdir().unwrap();
            let [on_host, spread] = ["host", "spread"].map(|name| temp.path().join(name));
            let mut twins = Twins::new(&owners, places);
            twins.spread.until_fence = until_fence;
            let mut expected = options(&on_host).create(&twins.model.host).unwrap();
            let mut got = options(&spread).device(device).create(&twins.spread).unwrap();
            train(&mut twins, &owners, &mut got, &mut expected, 25);
            assert_eq!(got.fence().is_some(), device == Device::Cpu);
            got.finish().unwrap();
            expected.finish().unwrap();
            assert_eq!(files(&spread), files(&on_host), "{places:?} {device}");
            drop((got, expected));
            // Resumes with the tensors elsewhere, and the averages on the other side.
            let other = if device == Device::Cpu { Device::AnyCuda } else { Device::Cpu };
            for (places, device, until) in [(&[On(1), On(0)][..], other, 38), (&[On(1)], Device::Cuda(1), 49)] {
                twins = Twins::new(&owners, places);
                let mut expected = options(&on_host).resume(&twins.model.host).unwrap();
                let mut got = options(&spread).device(device).resume(&twins.spread).unwrap();
                train(&mut twins, &owners, &mut got, &mut expected, until);
                got.finish().unwrap();
                expected.finish().unwrap();
                assert_eq!(files(&spread), files(&on_host), "{places:?} {device} until {until}");
            }
        }
    }
}

#[test]
fn synthesis_from_several_places_has_bits_of_host() {
    let Some(owners) = owners() else { return };
    for (places, device) in PLACES.into_iter().flat_map(|p| [(p, Device::AnyCuda), (p, Device::Auto), (p, Device::Cpu)])
    {
        let temp = tempfile::tempdir().unwrap();
        let mut twins = Twins::new(&owners, places);
        let mut expected = options(&temp.path().join("host")).create(&twins.model.host).unwrap();
        let mut got = options(&temp.path().join("spread")).device(device).create(&twins.spread).unwrap();
        train(&mut twins, &owners, &mut got, &mut expected, 34);
        let profile = Profile::sigma_rel(0.15).unwrap();
        let average = expected.synthesize(profile.clone()).unwrap();
        assert!(got.synthesize(profile.clone()).unwrap() == average, "{places:?} {device}");
        let plans = [&got, &expected].map(|ema| format!("{:?}", ema.plan(profile.clone()).unwrap()));
        assert_eq!(plans[0], plans[1], "predictions read the same elements");
        // In place, and back.
        let before = twins.spread.read();
        let swapped = got.swap_in(profile.clone(), &mut twins.spread).unwrap();
        assert!(swapped.read() == average, "{places:?} {device}");
        swapped.restore().unwrap();
        assert!(twins.spread.read() == before);
        // Into memory of the host.
        let mut outputs: Vec<(String, Tensor)> = average.iter().map(|(name, t)| (name.to_owned(), t.clone())).collect();
        outputs.iter_mut().for_each(|(_, tensor)| tensor.bytes.fill(0xee));
        let views = outputs
            .iter_mut()
            .map(|(name, tensor)| TensorViewMut::host(name, tensor.dtype, &tensor.shape, &mut tensor.bytes).unwrap());
        got.load_into(std::slice::from_ref(&profile), vec![views.collect()], None).unwrap();
        outputs.iter().for_each(|(name, tensor)| assert!(average.get(name).unwrap() == tensor, "{name}"));
        // Switch EMA, and on.
        got.switch_to(profile.clone(), &mut twins.spread).unwrap();
        expected.switch_to(profile, &mut twins.model.host).unwrap();
        assert!(twins.spread.read() == twins.model.host, "{places:?} {device}");
        train(&mut twins, &owners, &mut got, &mut expected, 41);
        got.finish().unwrap();
        expected.finish().unwrap();
        assert_eq!(files(&temp.path().join("spread")), files(&temp.path().join("host")), "{places:?} {device}");
    }
}

/// NaN in one place must leave the averages of all places as they are.
#[test]
fn nan_in_one_place_changes_no_average_in_any() {
    let Some(owners) = owners() else { return };
    for (places, device) in PLACES.into_iter().flat_map(|places| [(places, Device::AnyCuda), (places, Device::Cpu)]) {
        // Averaged tensors of each place, among them the first and the last.
        for bad in [&["a.weight"][..], &["b.weight"], &["e.double", "b.weight"], &["d.half"]] {
            let temp = tempfile::tempdir().unwrap();
            let of = |name: &str| options(&temp.path().join(name)).update_every(1).on_non_finite(OnNonFinite::Skip);
            let mut twins = Twins::new(&owners, places);
            let mut expected = of("host").create(&twins.model.host).unwrap();
            let mut got = of("spread").device(device).create(&twins.spread).unwrap();
            for step in 1..=30 {
                twins.train(step);
                if step % 4 == 0 {
                    for name in bad {
                        let dtype = twins.model.host.get(name).unwrap().dtype;
                        twins.set(name, dtype.bitsize() / 8, &crate::values::encode(f64::NAN, dtype));
                    }
                }
                got.update(&twins.spread).unwrap();
                expected.update(&twins.model.host).unwrap();
                assert_eq!(got.history(), expected.history(), "{places:?} {device} {bad:?}");
            }
            got.finish().unwrap();
            expected.finish().unwrap();
            assert_eq!(files(&temp.path().join("spread")), files(&temp.path().join("host")), "{places:?} {bad:?}");
        }
    }
    // The error names the first such tensor of the model, whatever its place.
    let temp = tempfile::tempdir().unwrap();
    let mut twins = Twins::new(&owners, PLACES[1]);
    let mut got = options(temp.path()).update_every(1).device(Device::AnyCuda).create(&twins.spread).unwrap();
    twins.train(1);
    for name in ["e.double", "b.weight", "d.half"] {
        let dtype = twins.model.host.get(name).unwrap().dtype;
        twins.set(name, 0, &crate::values::encode(f64::INFINITY, dtype));
    }
    let error = got.update(&twins.spread).unwrap_err();
    assert!(matches!(&error, Error::NonFiniteParameter { tensor, .. } if tensor == "b.weight"), "{error}");
}

#[test]
fn impossible_and_moved_places_are_refused_without_a_change() {
    let Some(owners) = owners() else { return };
    let temp = tempfile::tempdir().unwrap();
    let mut twins = Twins::new(&owners, PLACES[1]);
    let create = |name: &str, device| options(&temp.path().join(name)).update_every(1).device(device);
    let error = create("refused", Device::Cuda(1)).create(&twins.spread).unwrap_err().to_string();
    assert!(error.contains("cuda:0, cuda:1, the host") && error.contains("option device"), "{error}");
    for device in [Device::AnyCuda, Device::Cpu] {
        let name = format!("{device}");
        let mut expected = create(&format!("{name}-host"), Device::Cpu).create(&twins.model.host).unwrap();
        let mut got = create(&name, device).on_non_finite(OnNonFinite::Ignore).create(&twins.spread).unwrap();
        train(&mut twins, &owners, &mut got, &mut expected, 3);
        // The last tensors move: those of the first device must not have changed either.
        let moved = Twins::new(&owners, &[On(1), Host, On(0), On(1), Host, On(0), On(1), On(0)]);
        let error = got.update(&moved.spread).unwrap_err().to_string();
        assert!(
            error.contains("`h.mask`") && error.contains("in host memory") && error.contains("on cuda:0"),
            "{error}"
        );
        train(&mut twins, &owners, &mut got, &mut expected, 9);
        got.finish().unwrap();
        expected.finish().unwrap();
        assert_eq!(files(&temp.path().join(&name)), files(&temp.path().join(format!("{name}-host"))));
    }
}

#[test]
fn capture_of_an_update_in_several_places_is_refused() {
    let Some(owners) = owners() else { return };
    for places in PLACES {
        let temp = tempfile::tempdir().unwrap();
        let twins = Twins::new(&owners, places);
        let mut got = options(temp.path()).device(Device::AnyCuda).create(&twins.spread).unwrap();
        // SAFETY: the stream exists, and nothing is launched on it.
        let stream = unsafe { GraphStream::from_raw(0, owners[0].stream()) };
        for error in [
            got.capture_update(&twins.spread, stream).unwrap_err(),
            got.replay(stream, || Ok::<(), Error>(())).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("in several places: call `update` between the replays"), "{text}");
        }
        assert_eq!(got.step(), 0);
    }
}

/// Runs in its own process, because the driver counts the waits of all tests.
#[test]
#[ignore = "run by `update_on_several_devices_does_not_wait_for_the_look`"]
fn waits() {
    let Some(owners) = owners() else { return };
    for until_fence in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let mut twins = Twins::new(&owners, PLACES[0]);
        twins.spread.until_fence = until_fence;
        let options = options(temp.path()).update_every(1).device(Device::AnyCuda);
        let mut got = options.on_non_finite(OnNonFinite::Skip).create(&twins.spread).unwrap();
        for step in 1..=6 {
            twins.train(step);
            if step == 4 {
                // The last tensor of the second device; the look of the first finds nothing.
                twins.set("d.half", 0, &crate::values::encode(f64::NAN, Dtype::F16));
            }
            let before = count("host_waits");
            got.update(&twins.spread).unwrap();
            assert!(step == 1 || count("host_waits") == before, "step {step}");
            // Waits, so that the next update need not.
            assert_eq!(got.history().last(), Some(if step == 4 { 3 } else { step }));
        }
    }
}

#[test]
fn update_on_several_devices_does_not_wait_for_the_look() {
    check_in_own_process("spread::waits", &[]);
}

/// Runs in its own process: in the default mode, calls of other tests invalidate a capture.
#[test]
#[ignore = "run by `capture_on_one_of_the_devices_is_refused`"]
fn captured() {
    let Some(owners) = owners() else { return };
    for device in [Device::AnyCuda, Device::Cpu] {
        let temp = tempfile::tempdir().unwrap();
        let mut twins = Twins::new(&owners, PLACES[0]);
        let create = |name: &str, device| options(&temp.path().join(name)).update_every(1).device(device);
        let mut expected = create("host", Device::Cpu).create(&twins.model.host).unwrap();
        let spread = create("spread", device).on_non_finite(OnNonFinite::Ignore);
        let mut got = spread.create(&twins.spread).unwrap();
        train(&mut twins, &owners, &mut got, &mut expected, 4);
        twins.train(5);
        owners.iter().for_each(Owner::wait);
        begin_capture(&owners[1]);
        let error = got.update(&twins.spread).unwrap_err().to_string();
        assert!(error.contains("cuda:1") && error.contains("captured in a CUDA graph"), "{error}");
        end_capture(&owners[1]);
        train(&mut twins, &owners, &mut got, &mut expected, 12);
        got.finish().unwrap();
        expected.finish().unwrap();
        assert_eq!(files(&temp.path().join("spread")), files(&temp.path().join("host")), "{device}");
    }
}

#[test]
fn capture_on_one_of_the_devices_is_refused() {
    check_in_own_process("spread::captured", &[]);
}

/// A stream cannot wait for events of a device that is not named.
#[test]
fn fence_of_several_devices_needs_the_number_of_the_streams_device() {
    let Some(owners) = owners() else { return };
    let temp = tempfile::tempdir().unwrap();
    let twins = Twins::new(&owners, PLACES[0]);
    let mut ema = options(temp.path()).update_every(1).device(Device::Cpu).create(&twins.spread).unwrap();
    ema.update(&twins.spread).unwrap();
    let fence = ema.fence().unwrap().clone();
    assert_eq!(fence.devices().collect::<Vec<_>>(), [0, 1]);
    // SAFETY: the stream exists.
    let error = unsafe { fence.wait_on(owners[0].stream()) }.unwrap_err().to_string();
    assert!(error.contains("several devices") && error.contains("wait_on_device"), "{error}");
    fence.wait().unwrap();
}
