//! Tests of swapping averages into a model and restoring every bit.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::log::logged;
use super::*;
use crate::tensor::{Memory, ParametersMut, TensorViewMut};

/// Returns a model with every averaged dtype and tensors that are not averaged.
fn model(step: u16) -> Tensors {
    let value = f32::from(step);
    let mut model = Tensors::default();
    model.insert("bf16", Tensor::new(&[2, 2], &[bf16::from_f32(value); 4]).unwrap());
    model.insert("f16", Tensor::new(&[4], &[f16::from_f32(value); 4]).unwrap());
    model.insert("f32", Tensor::new(&[1, 1, 5], &[value; 5]).unwrap());
    model.insert("f64", Tensor::new(&[3], &[f64::from(value); 3]).unwrap());
    model.insert("empty", Tensor::new(&[0, 4], &[] as &[f32]).unwrap());
    model.insert("steps", Tensor::new(&[2], &[i64::from(step), -1]).unwrap());
    model.insert("norm.running_var", Tensor::new(&[2], &[value, 2.0 * value]).unwrap());
    model.insert("frozen", Tensor::new(&[1], &[7.0f32]).unwrap());
    model
}

/// Returns the same tensors with bits that arithmetic would not preserve.
fn odd_bits() -> Tensors {
    let mut model = model(9);
    let bits16 = [0x8000u16, 0x7fc1, 0xfe55, 0x0001];
    model.insert("bf16", Tensor::new(&[2, 2], &bits16.map(bf16::from_bits)).unwrap());
    model.insert("f16", Tensor::new(&[4], &bits16.map(f16::from_bits)).unwrap());
    let bits32 = [0x8000_0000u32, 0x7f80_0001, 0xffc1_2345, 0x0000_0001, 0xff80_0000];
    model.insert("f32", Tensor::new(&[1, 1, 5], &bits32.map(f32::from_bits)).unwrap());
    let bits64 = [1u64 << 63, 0x7ff0_0000_0000_0001, 0xfff8_0000_dead_beef];
    model.insert("f64", Tensor::new(&[3], &bits64.map(f64::from_bits)).unwrap());
    model
}

fn trained(dir: &Path) -> PostHocEma {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(10);
    let mut ema = options.copy(["*.running_*"]).leave_out(["frozen"]).create(&model(0)).unwrap();
    for step in 1..=20 {
        ema.update(&model(step)).unwrap();
    }
    ema
}

fn profile() -> Profile {
    Profile::sigma_rel(0.1).unwrap()
}

/// Checks that a model holds a synthesized average, and its own tensor that is left out.
fn assert_averaged(params: &Tensors, average: &Tensors) {
    for (name, tensor) in params.iter() {
        let averaged = name != "frozen";
        let original = odd_bits();
        let expected = if averaged { average.get(name) } else { original.get(name) };
        assert_eq!(Some(tensor), expected, "{name}");
    }
}

#[test]
fn swap_in_and_restore_keep_bits() {
    let (_temp, dir) = scratch();
    let ema = trained(&dir);
    let average = ema.synthesize(profile()).unwrap();
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(profile(), At::Latest).unwrap();
    let mut params = odd_bits();
    {
        let swapped = ema.swap_in(profile(), &mut params).unwrap();
        assert_averaged(&swapped, &average);
    }
    assert_eq!(params, odd_bits());
    let swapped = run.swap_in(&plan, &mut params).unwrap();
    assert_averaged(&swapped, &run.load(&plan).unwrap());
    swapped.restore().unwrap();
    assert_eq!(params, odd_bits());
    // Changes of tensors that are left out stay; those of averaged ones are undone.
    let mut swapped = run.swap_in(&plan, &mut params).unwrap();
    swapped.insert("frozen", Tensor::new(&[1], &[8.0f32]).unwrap());
    swapped.insert("f64", Tensor::new(&[3], &[1.0f64; 3]).unwrap());
    drop(swapped);
    let mut expected = odd_bits();
    expected.insert("frozen", Tensor::new(&[1], &[8.0f32]).unwrap());
    assert_eq!(params, expected);
    // keep() leaves the average in the model.
    let mut params = odd_bits();
    ema.swap_in(profile(), &mut params).unwrap().keep();
    assert_averaged(&params, &average);
}

#[test]
fn error_or_panic_during_a_swap_restores_bits() {
    let (_temp, dir) = scratch();
    let ema = trained(&dir);
    let mut params = odd_bits();
    let evaluate = |params: &mut Tensors| -> Result<()> {
        let swapped = ema.swap_in(profile(), params)?;
        assert_ne!(swapped.get("f32"), odd_bits().get("f32"));
        Err(Error::Internal("the evaluation failed".into()))
    };
    assert!(evaluate(&mut params).unwrap_err().to_string().contains("evaluation"));
    assert_eq!(params, odd_bits());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _swapped = ema.swap_in(profile(), &mut params).unwrap();
        panic!("in the evaluation");
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"in the evaluation"));
    assert_eq!(params, odd_bits());
}

/// Model that runs a fault once, when it lends its fourth tensor for writing.
struct Faulty {
    tensors: Tensors,
    fault: Option<fn() -> Result<()>>,
}

impl Parameters for Faulty {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        self.tensors.with_tensors(read)
    }
}

impl ParametersMut for Faulty {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        let mut lent = 0;
        let fault = &mut self.fault;
        self.tensors.for_each_mut(&mut |view| {
            lent += 1;
            if lent == 4
                && let Some(fault) = fault.take()
            {
                fault()?;
            }
            write(view)
        })
    }
}

#[test]
fn failed_swap_in_is_undone() {
    let (_temp, dir) = scratch();
    let ema = trained(&dir);
    let fail = || Err(Error::tensor("f32", "its memory is gone"));
    let mut params = Faulty { tensors: odd_bits(), fault: Some(fail) };
    let text = ema.swap_in(profile(), &mut params).unwrap_err().to_string();
    assert!(text.contains("its memory is gone"), "{text}");
    assert_eq!(params.tensors, odd_bits());
    params.fault = Some(|| panic!("half way"));
    assert!(catch_unwind(AssertUnwindSafe(|| ema.swap_in(profile(), &mut params).map(drop))).is_err());
    assert_eq!(params.tensors, odd_bits());
    // Switch EMA keeps no originals, so tensors written before the fault stay.
    params.fault = Some(fail);
    ema.switch_to(profile(), &mut params).unwrap_err();
    assert_ne!(params.tensors.get("bf16"), odd_bits().get("bf16"));
    assert_eq!(params.tensors.get("f32"), odd_bits().get("f32"));
}

#[test]
fn swap_in_refuses_an_unfit_model_unchanged() {
    let (_temp, dir) = scratch();
    let ema = trained(&dir);
    let mut reshaped = odd_bits();
    reshaped.insert("f64", Tensor::new(&[4], &[1.0f64; 4]).unwrap());
    let fewer: Tensors = odd_bits().into_iter().filter(|(name, _)| name != "f64").collect();
    for (mut params, part) in [
        (reshaped, "`f64`: its shape is [4], but was [3] in the run"),
        (fewer, "`f64`: the tensor is missing, but was present in the run"),
    ] {
        let before = params.clone();
        let text = ema.swap_in(profile(), &mut params).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
        assert_eq!(params, before);
    }
    let mut twice = vec![("f32", vec![0.0f32; 5]), ("f32", vec![1.0f32; 5])];
    let (_temp, dir) = scratch();
    let mut ema = PostHocEma::options(&dir).update_every(1).create(&twice[..1].to_vec()).unwrap();
    ema.update(&twice[..1].to_vec()).unwrap();
    assert!(ema.swap_in(profile(), &mut twice).unwrap_err().to_string().contains("occurs twice"));
    assert_eq!(twice[1].1, [1.0; 5]);
}

#[test]
fn restore_names_unfit_tensors_and_restores_the_rest() {
    let (_temp, dir) = scratch();
    let ema = trained(&dir);
    fn reshape(params: &mut Tensors) {
        params.insert("f16", Tensor::new(&[5], &[f16::ONE; 5]).unwrap());
    }
    fn remove(params: &mut Tensors) {
        *params = std::mem::take(params).into_iter().filter(|(name, _)| name != "f16").collect();
    }
    let cases = [
        (reshape as fn(&mut Tensors), "`f16`: it is F16 [5] now, and was F16 [4]"),
        (remove, "`f16`: the model no longer has it"),
    ];
    for (change, part) in cases {
        let mut params = odd_bits();
        let mut swapped = ema.swap_in(profile(), &mut params).unwrap();
        change(&mut swapped);
        let text = swapped.restore().unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("the model's own checkpoint"), "{text}");
        for name in ["bf16", "f32", "f64"] {
            assert_eq!(params.get(name), odd_bits().get(name), "{name}");
        }
        let mut params = odd_bits();
        let lines = logged(|| change(&mut ema.swap_in(profile(), &mut params).unwrap()));
        assert!(lines.len() == 1 && lines[0].starts_with("ERROR") && lines[0].contains(part), "{lines:?}");
    }
}

/// Model with two tied tensors and a third of the same shape.
struct Tied {
    shared: Vec<f32>,
    apart: Vec<f32>,
}

impl Parameters for Tied {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        [("apart", &self.apart[..]), ("embedding", &self.shared), ("head", &self.shared)].with_tensors(read)
    }
}

impl ParametersMut for Tied {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        for (name, values) in [("apart", &mut self.apart), ("embedding", &mut self.shared)] {
            [(name, &mut values[..])].as_mut_slice().for_each_mut(write)?;
        }
        [("head", &mut self.shared[..])].as_mut_slice().for_each_mut(write)
    }
}

#[test]
fn tied_tensors_are_swapped_and_restored_together() {
    let (_temp, dir) = scratch();
    let mut params = Tied { shared: vec![1.0; 6], apart: vec![2.0; 6] };
    let mut ema = PostHocEma::options(&dir).update_every(1).checkpoint_every(1).create(&params).unwrap();
    ema.update(&params).unwrap();
    let odd = [f32::from_bits(0xffc1_2345), -0.0, 1.0, 2.0, 3.0, 4.0];
    params.shared.copy_from_slice(&odd);
    params.apart.copy_from_slice(&odd);
    let swapped = ema.swap_in(profile(), &mut params).unwrap();
    assert_eq!((&swapped.shared[..], &swapped.apart[..]), (&[1.0; 6][..], &[2.0; 6][..]));
    drop(swapped);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!((bits(&params.shared), bits(&params.apart)), (bits(&odd), bits(&odd)));
    // In a model where they are not tied, they are swapped one by one.
    let mut loose: Model = vec![("apart", vec![5.0; 6]), ("embedding", vec![6.0; 6]), ("head", vec![7.0; 6])];
    let before = loose.clone();
    let swapped = ema.swap_in(profile(), &mut loose).unwrap();
    assert_eq!((swapped[1].1[0], swapped[2].1[0]), (1.0, 1.0));
    drop(swapped);
    assert_eq!(loose, before);
}

/// Checks a model on a device that does not exist.
#[test]
fn swap_in_refuses_device_memory() {
    struct Elsewhere(Tensors);
    impl Parameters for Elsewhere {
        fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
            let memory = crate::tensor::CudaMemory {
                // No machine has that many devices.
                device: 4096,
                stream: 0,
                address: 0x1000,
                bytes: 20,
                until_fence: false,
                lent: std::marker::PhantomData,
            };
            self.0.with_tensors(&mut |views| {
                let mut views = views.to_vec();
                views.iter_mut().filter(|v| v.name == "f32").for_each(|v| v.memory = Memory::Cuda(memory));
                read(&views)
            })
        }
    }
    impl ParametersMut for Elsewhere {
        fn for_each_mut(&mut self, _: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
            panic!("the model must not be written");
        }
    }
    let (_temp, dir) = scratch();
    let text = trained(&dir).swap_in(profile(), &mut Elsewhere(odd_bits())).unwrap_err().to_string();
    let expected =
        if cfg!(feature = "cuda") { "cuda:4096: cannot use the device" } else { "`f32`: it is on a CUDA device" };
    assert!(text.contains(expected), "{text}");
}
