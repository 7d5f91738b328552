//! Models on a CUDA device: read in place, averaged with the bits of the CPU, switched in place. Needs a device.

use std::collections::HashMap;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{DType, Device, Storage, Tensor, Var};
use candle_nn::VarMap;
use posthoc_ema::{
    Dtype, Error, Memory, MemoryMut, Parameters, ParametersMut, PostHocEma, Profile, TensorView, TensorViewMut,
};
use posthoc_ema_candle::{NamedTensors, NamedVars, Variables};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Opens the device with each of candle's two kinds of streams: the calling thread's, and one of the device's own.
fn devices() -> [Device; 2] {
    [Device::new_cuda(0).unwrap(), Device::new_cuda_with_stream(0).unwrap()]
}

fn put(vars: &VarMap, name: &str, tensor: &Tensor) {
    vars.data().lock().unwrap().insert(name.to_owned(), Var::from_tensor(tensor).unwrap());
}

/// Name, dtype, shape, address and bytes of a view.
type ViewPlace = (String, Dtype, Vec<usize>, u64, usize);

/// Returns the places of all views.
fn places(params: &impl Parameters) -> Vec<ViewPlace> {
    let mut all = Vec::new();
    let read = &mut |views: &[TensorView<'_>]| {
        all = views.iter().map(place).collect();
        Ok(())
    };
    params.with_tensors(read).unwrap();
    all
}

fn place(view: &TensorView<'_>) -> ViewPlace {
    match view.memory {
        Memory::Cuda(memory) if memory.device() == 0 => {
            (view.name.to_owned(), view.dtype, view.shape.to_vec(), memory.address(), memory.len())
        }
        _ => panic!("{} is not on the device", view.name),
    }
}

/// Returns the address of an f32 storage on the device.
fn address(tensor: &Tensor) -> u64 {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { panic!("not on a device") };
    let CudaStorageSlice::F32(slice) = &storage.slice else { panic!("not f32") };
    slice.device_ptr(slice.stream()).0
}

#[test]
fn tensors_are_read_in_place() {
    for device in devices() {
        let vars = VarMap::new();
        put(&vars, "matrix", &Tensor::zeros((4, 3), DType::F32, &device).unwrap());
        put(&vars, "scalar", &Tensor::zeros((), DType::F32, &device).unwrap());
        let matrix = vars.data().lock().unwrap()["matrix"].clone();
        vars.data().lock().unwrap().insert("tied".to_owned(), matrix.clone());
        let got = places(&Variables(&vars));
        let shapes: Vec<(&str, &[usize], usize)> = got.iter().map(|g| (g.0.as_str(), g.2.as_slice(), g.4)).collect();
        let expected: [(&str, &[usize], usize); 3] =
            [("matrix", &[4, 3], 48), ("scalar", &[], 4), ("tied", &[4, 3], 48)];
        assert_eq!(shapes, expected);
        assert_eq!((got[0].3, got[2].3), (address(&matrix), address(&matrix)));

        let window = |start, rows| matrix.narrow(0, start, rows).unwrap();
        let windows = HashMap::from([("empty".to_owned(), window(1, 0)), ("rows".to_owned(), window(2, 2))]);
        let got = places(&NamedTensors::from(&windows));
        assert_eq!((&got[0].2, got[0].4), (&vec![0, 3], 0));
        assert_eq!((got[1].3, got[1].4), (address(&matrix) + 24, 24));
    }
}

#[test]
fn every_dtype_is_read_and_written() {
    let device = Device::new_cuda(0).unwrap();
    let expected = [
        (DType::U8, Dtype::U8, vec![1u8, 2]),
        (DType::U32, Dtype::U32, vec![1, 0, 0, 0, 2, 0, 0, 0]),
        (DType::I16, Dtype::I16, vec![1, 0, 2, 0]),
        (DType::I32, Dtype::I32, vec![1, 0, 0, 0, 2, 0, 0, 0]),
        (DType::I64, Dtype::I64, vec![1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        (DType::BF16, Dtype::BF16, vec![0x80, 0x3f, 0, 0x40]),
        (DType::F16, Dtype::F16, vec![0, 0x3c, 0, 0x40]),
        (DType::F32, Dtype::F32, vec![0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]),
        (DType::F64, Dtype::F64, vec![0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0x40]),
        (DType::F8E4M3, Dtype::F8_E4M3, vec![0x38, 0x40]),
    ];
    let var = |dtype, bytes| Var::from_tensor(&Tensor::from_raw_buffer(bytes, dtype, &[2], &device).unwrap()).unwrap();
    let vars = expected.iter().map(|(dtype, _, bytes)| (format!("{dtype:?}"), var(*dtype, bytes))).collect();
    let vars: HashMap<String, Var> = vars;
    let mut vars = NamedVars::from(&vars);

    let temp = tempfile::tempdir().unwrap();
    let mut ema = PostHocEma::options(temp.path().join("ema")).copy(["F8E4M3"]).update_every(1).create(&vars).unwrap();
    ema.update(&vars).unwrap();
    let profile = || Profile::sigma_rel(0.1).unwrap();
    let average = ema.synthesize(profile()).unwrap();
    for (dtype, stored, bytes) in &expected {
        let got = average.get(&format!("{dtype:?}")).unwrap();
        assert_eq!((got.dtype, &got.bytes), (*stored, bytes), "{dtype:?}");
    }
    let mut written = Vec::new();
    let write = &mut |view: TensorViewMut<'_>| {
        let MemoryMut::Cuda(memory) = view.memory else { panic!("{} is not on the device", view.name) };
        written.push((view.name.to_owned(), view.dtype, view.shape.to_vec(), memory.address(), memory.len()));
        Ok(())
    };
    vars.for_each_mut(write).unwrap();
    assert_eq!(written, places(&vars));
    ema.switch_to(profile(), &mut vars).unwrap();
}

/// Names and values of a model's tensors at one step.
type Values = Vec<(&'static str, Vec<f32>)>;

fn values(random: &mut ChaCha8Rng) -> Values {
    let sizes = [("bias", 5), ("embedding", 70_001), ("weight", 12)];
    sizes.map(|(name, n)| (name, (0..n).map(|_| random.random_range(-1.0..1.0)).collect())).into()
}

fn set(vars: &VarMap, values: &Values, device: &Device) {
    for (name, values) in values {
        let tensor = Tensor::from_slice(values, values.len(), device).unwrap();
        vars.data().lock().unwrap()[*name].set(&tensor).unwrap();
    }
}

fn read_var(vars: &VarMap, name: &str) -> Vec<f32> {
    vars.data().lock().unwrap()[name].to_vec1().unwrap()
}

#[test]
fn averages_have_the_cpus_bits_and_can_be_swapped_in_and_switched_to() {
    use posthoc_ema::Device::{Cpu, Cuda};
    for device in devices() {
        for place in [Cpu, Cuda(0)] {
            let temp = tempfile::tempdir().unwrap();
            let options =
                |folder: &str| PostHocEma::options(temp.path().join(folder)).sigma_rels([0.1, 0.25]).update_every(1);
            let mut random = ChaCha8Rng::seed_from_u64(7);
            let (here, there) = (VarMap::new(), VarMap::new());
            for (name, values) in values(&mut random) {
                put(&here, name, &Tensor::zeros(values.len(), DType::F32, &Device::Cpu).unwrap());
                put(&there, name, &Tensor::zeros(values.len(), DType::F32, &device).unwrap());
            }
            let mut expected = options("host").create(&Variables(&here)).unwrap();
            let mut ema = options("device").device(place).create(&Variables(&there)).unwrap();
            let mut last = Vec::new();
            for _ in 0..40 {
                last = values(&mut random);
                set(&here, &last, &Device::Cpu);
                set(&there, &last, &device);
                expected.update(&Variables(&here)).unwrap();
                ema.update(&Variables(&there)).unwrap();
            }
            let profile = || Profile::sigma_rel(0.15).unwrap();
            let average = ema.synthesize(profile()).unwrap();
            assert_eq!(average, expected.synthesize(profile()).unwrap(), "{place}");

            let mut vars = Variables(&there);
            let guard = ema.swap_in(profile(), &mut vars).unwrap();
            for (name, tensor) in average.iter() {
                assert_eq!(read_var(&there, name), tensor.to_vec::<f32>().unwrap(), "{place}: {name}");
            }
            guard.restore().unwrap();
            last.iter().for_each(|(name, values)| assert_eq!(read_var(&there, name), *values, "{place}: {name}"));

            ema.switch_to(profile(), &mut Variables(&there)).unwrap();
            // Later work is queued after the switch, so the model can be freed at once.
            let copies: Vec<(&str, Tensor)> =
                average.iter().map(|(name, _)| (name, there.data().lock().unwrap()[name].copy().unwrap())).collect();
            drop(there);
            for (name, copy) in copies {
                assert_eq!(copy.to_vec1::<f32>().unwrap(), average.get(name).unwrap().to_vec::<f32>().unwrap());
            }
        }
    }
}

#[test]
fn copies_of_strided_tensors_outlive_their_reads() {
    use posthoc_ema::Device::{Cpu, Cuda};
    for device in devices() {
        for place in [Cpu, Cuda(0)] {
            let temp = tempfile::tempdir().unwrap();
            let options = |folder: &str| PostHocEma::options(temp.path().join(folder)).update_every(1);
            let matrix = |step: usize, device: &Device| {
                let values: Vec<f32> = (0..600_000).map(|i| ((i * 37 + step * 101) % 1013) as f32 / 1013.0).collect();
                let whole = Tensor::from_vec(values, (600, 1000), device).unwrap();
                let columns = whole.narrow(1, 3, 500).unwrap();
                HashMap::from([("columns".to_owned(), columns), ("transposed".to_owned(), whole.t().unwrap())])
            };
            let (here, there) = (matrix(0, &Device::Cpu), matrix(0, &device));
            let mut expected = options("host").create(&NamedTensors::from(&here)).unwrap();
            let mut ema = options("device").device(place).create(&NamedTensors::from(&there)).unwrap();
            for step in 1..20 {
                expected.update(&NamedTensors::from(&matrix(step, &Device::Cpu))).unwrap();
                ema.update(&NamedTensors::from(&matrix(step, &device))).unwrap();
            }
            let profile = || Profile::sigma_rel(0.1).unwrap();
            assert_eq!(ema.synthesize(profile()).unwrap(), expected.synthesize(profile()).unwrap(), "{place}");
        }
    }
}

#[test]
fn errors_of_readers_and_writers_are_returned() {
    let device = Device::new_cuda(0).unwrap();
    let vars = VarMap::new();
    put(&vars, "w", &Tensor::zeros(3, DType::F32, &device).unwrap());
    let read = Variables(&vars).with_tensors(&mut |views| Err(Error::Internal(views[0].name.to_owned())));
    assert!(matches!(read.unwrap_err(), Error::Internal(name) if name == "w"));
    let write = Variables(&vars).for_each_mut(&mut |view| Err(Error::Internal(view.name.to_owned())));
    assert!(matches!(write.unwrap_err(), Error::Internal(name) if name == "w"));
    // No lock is left behind.
    set(&vars, &vec![("w", vec![1.0, 2.0, 3.0])], &device);
    assert_eq!(read_var(&vars, "w"), [1.0, 2.0, 3.0]);
}
