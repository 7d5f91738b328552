//! Tests of the blend on a device.

use std::cell::RefCell;

use posthoc_ema::compute::cpu::{self, Blend, Overflow};
use posthoc_ema::compute::cuda::{BlendInput, BlendPart, Blender, CudaDevice, Destination, ScatteredElements};
use posthoc_ema::{Dtype, Error, Result};
use rand::Rng;

use crate::log::logged;
use crate::owner::{Owned, Owner};
use crate::values::{AVERAGED, encode, random, size, tame};

/// Sources of one tensor, and the dtype of the results.
struct Case {
    dtypes: Vec<Dtype>,
    output: Dtype,
    elements: usize,
    sources: Vec<Vec<u8>>,
}

impl Case {
    fn new(dtypes: &[Dtype], output: Dtype, elements: usize, seed: u64) -> Case {
        let mut random = random(seed);
        let sources = dtypes.iter().map(|&dtype| tame(&mut random, dtype, elements)).collect();
        Case { dtypes: dtypes.to_vec(), output, elements, sources }
    }

    fn expected(&self, weights: &[f64], targets: usize) -> Vec<Vec<u8>> {
        let mut results = vec![vec![0u8; self.elements * size(self.output)]; targets];
        let mut dst: Vec<&mut [u8]> = results.iter_mut().map(Vec::as_mut_slice).collect();
        let sources: Vec<&[u8]> = self.sources.iter().map(Vec::as_slice).collect();
        cpu::blend(&mut dst, &sources, &Blend { dtypes: &self.dtypes, weights, output: self.output }).unwrap();
        results
    }

    fn part(&self) -> BlendPart<'_> {
        let sources = self.sources.iter().map(|bytes| BlendInput::Host(bytes)).collect();
        BlendPart { sources, dtypes: self.dtypes.clone(), output: self.output, elements: self.elements }
    }
}

fn weights(sources: usize, targets: usize, seed: u64) -> Vec<f64> {
    let mut random = random(seed);
    (0..sources * targets).map(|_| random.random::<f64>() * 6.0 - 2.9).collect()
}

fn report(part: usize, overflow: Overflow) -> Error {
    let Overflow { target, element, value } = overflow;
    Error::Internal(format!("part {part} target {target} element {element} is {value}"))
}

/// Blends several tensors in one block and compares every byte with the CPU's result.
fn check(cases: &[Case], targets: usize) {
    crate::driver::driver();
    let weights = weights(cases[0].dtypes.len(), targets, 11);
    let got = RefCell::new(Vec::new());
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let deliver = |results: &[&[u8]]| -> Result<()> {
        *got.borrow_mut() = results.iter().map(|bytes| bytes.to_vec()).collect();
        Ok(())
    };
    let parts = cases.iter().map(Case::part).collect();
    blender.submit(parts, &weights, targets, Destination::Host(Box::new(deliver)), Box::new(report)).unwrap();
    blender.flush().unwrap();
    for (target, got) in got.borrow().iter().enumerate() {
        let expected: Vec<u8> =
            cases.iter().flat_map(|case| case.expected(&weights, targets)[target].clone()).collect();
        assert_eq!(got.len(), expected.len());
        assert!(*got == expected, "target {target} of {targets}");
    }
}

#[test]
fn blend_between_all_dtypes_for_every_number_of_targets_has_bits_of_cpu() {
    for input in AVERAGED {
        for output in AVERAGED {
            for targets in 1..=9 {
                check(&[Case::new(&[input; 5], output, 1037, 2)], targets);
            }
        }
    }
}

#[test]
fn blend_of_every_length_has_bits_of_cpu() {
    for elements in 0..70 {
        check(&[Case::new(&[Dtype::F16, Dtype::F16, Dtype::F32], Dtype::BF16, elements, 4)], 1);
        check(&[Case::new(&[Dtype::BF16; 6], Dtype::F32, elements, 4)], 3);
    }
}

#[test]
fn blend_of_mixed_dtypes_has_bits_of_cpu() {
    let dtypes: Vec<Dtype> = (0..23).map(|i| AVERAGED[i * i % 7 % 4]).collect();
    for targets in [1, 2, 4, 8] {
        check(&[Case::new(&dtypes, Dtype::F32, 3001, 5)], targets);
    }
}

#[test]
fn blend_of_more_sources_than_one_launch_takes_has_bits_of_cpu() {
    for sources in [51, 52, 53, 104, 130, 200] {
        let dtypes: Vec<Dtype> = (0..sources).map(|i| AVERAGED[i / 50 % 3]).collect();
        check(&[Case::new(&dtypes, Dtype::F32, 1025, 6)], 1);
        check(&[Case::new(&dtypes, Dtype::BF16, 77, 6)], 10);
    }
}

/// A thread loads 8, 4 and 2 sources at a time, and those of each dtype by themselves.
#[test]
fn blend_of_every_number_of_sources_and_every_run_has_bits_of_cpu() {
    for sources in 1..=19 {
        for dtype in AVERAGED {
            check(&[Case::new(&vec![dtype; sources], Dtype::F32, 67, 8)], 1);
            check(&[Case::new(&vec![dtype; sources], Dtype::F32, 67, 8)], 3);
        }
        for first in 0..sources {
            let dtypes: Vec<Dtype> = (0..sources).map(|i| if i < first { Dtype::BF16 } else { Dtype::F32 }).collect();
            check(&[Case::new(&dtypes, Dtype::F32, 67, 9)], 2);
        }
    }
}

/// Runs in its own process, for its counters.
#[test]
#[ignore = "run by `only_sources_on_the_host_cross_the_bus`"]
fn bytes_over_the_bus() {
    let owner = Owner::new();
    let cases: Vec<Case> = (0..30).map(|i| Case::new(&[Dtype::F16, Dtype::F32], Dtype::F32, 101 + i, 1)).collect();
    let owned: Vec<Owned<'_>> = cases.iter().map(|case| owner.own(&case.sources[1], 0)).collect();
    owner.wait();
    let parts = cases.iter().zip(&owned).map(|(case, source)| {
        let device = BlendInput::Device { address: source.address(), bytes: source.bytes };
        BlendPart { sources: vec![BlendInput::Host(&case.sources[0]), device], ..case.part() }
    });
    let weights = [0.75, -2.5];
    let expected: Vec<u8> = cases.iter().flat_map(|case| case.expected(&weights, 1)[0].clone()).collect();
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let deliver = move |results: &[&[u8]]| -> Result<()> {
        assert!(results[0] == expected);
        Ok(())
    };
    let [bytes, copies] = ["h2d_bytes", "copies"].map(|name| crate::driver::count(name).unwrap());
    let destination = Destination::Host(Box::new(deliver));
    blender.submit(parts.collect(), &weights, 1, destination, Box::new(report)).unwrap();
    blender.flush().unwrap();
    let on_host: usize = cases.iter().map(|case| case.sources[0].len()).sum();
    assert_eq!(crate::driver::count("h2d_bytes").unwrap() - bytes, on_host as u64);
    // One for the host's sources, one for each source on the device, results and overflows.
    assert_eq!(crate::driver::count("copies").unwrap() - copies, 1 + 30 + 2);
}

#[test]
fn only_sources_on_the_host_cross_the_bus() {
    crate::driver::check_in_own_process("blend::bytes_over_the_bus", &[]);
}

/// Elements that report their copy to the delivery of an older block.
#[derive(Debug)]
struct Reporting(usize, std::sync::Mutex<std::sync::mpsc::Sender<()>>);

impl ScatteredElements for Reporting {
    fn len(&self) -> usize {
        self.0
    }

    fn piece(&self, _: std::ops::Range<usize>) -> Option<&[u8]> {
        None
    }

    fn copy(&self, dst: &mut [u8], _: usize) {
        dst.fill(0);
        self.1.lock().unwrap().send(()).unwrap();
    }

    fn will_need(&self, _: std::ops::Range<usize>) {}
}

#[test]
fn a_block_is_delivered_while_another_is_filled() {
    crate::driver::driver();
    const ELEMENTS: usize = 1 << 19;
    let (sender, receiver) = std::sync::mpsc::channel();
    let reporting = Reporting(4 * ELEMENTS, std::sync::Mutex::new(sender));
    let zeros = vec![0u8; 4 * ELEMENTS];
    let part =
        |source| BlendPart { sources: vec![source], dtypes: vec![Dtype::F32], output: Dtype::F32, elements: ELEMENTS };
    let order = RefCell::new(Vec::new());
    let order = &order;
    let receiver = &receiver;
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    for block in 0..4 {
        let scattered = BlendInput::Scattered { elements: &reporting, start: 0, bytes: 4 * ELEMENTS };
        let source = if block == 2 { scattered } else { BlendInput::Host(&zeros) };
        let deliver = move |_: &[&[u8]]| -> Result<()> {
            order.borrow_mut().push(block);
            if block == 0 {
                receiver.recv_timeout(std::time::Duration::from_secs(60)).expect("block 2 is filled meanwhile");
            }
            Ok(())
        };
        let destination = Destination::Host(Box::new(deliver));
        blender.submit(vec![part(source)], &[1.0], 1, destination, Box::new(report)).unwrap();
    }
    blender.flush().unwrap();
    assert_eq!(*order.borrow(), [0, 1, 2, 3]);
}

#[test]
fn blend_of_many_tensors_in_one_block_has_bits_of_cpu() {
    let case = |i: usize| Case::new(&[Dtype::F16; 4], [Dtype::F16, Dtype::F32][i / 20 % 2], 1 + 37 * i % 500, i as u64);
    let cases: Vec<Case> = (0..80).map(case).collect();
    check(&cases, 3);
}

#[test]
fn blocks_are_delivered_in_order() {
    crate::driver::driver();
    let cases: Vec<Case> = (0..7).map(|i| Case::new(&[Dtype::F32; 3], Dtype::F32, 100 * (i + 1), i as u64)).collect();
    let weights = weights(3, 2, 1);
    let order = RefCell::new(Vec::new());
    let order = &order;
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    for (i, case) in cases.iter().enumerate() {
        let expected = case.expected(&weights, 2);
        let deliver = move |results: &[&[u8]]| -> Result<()> {
            assert!(results.iter().zip(&expected).all(|(got, expected)| got == expected));
            order.borrow_mut().push(i);
            Ok(())
        };
        let destination = Destination::Host(Box::new(deliver));
        blender.submit(vec![case.part()], &weights, 2, destination, Box::new(report)).unwrap();
    }
    blender.flush().unwrap();
    assert_eq!(*order.borrow(), [0, 1, 2, 3, 4, 5, 6]);
}

#[test]
fn blend_reads_and_writes_memory_of_another_library() {
    let owner = Owner::new();
    let cases = [
        Case::new(&[Dtype::F16, Dtype::F32], Dtype::BF16, 501, 1),
        Case::new(&[Dtype::F16, Dtype::F32], Dtype::BF16, 64, 2),
    ];
    let weights = [0.75, -2.5];
    let owned: Vec<Owned<'_>> = cases.iter().map(|case| owner.own(&vec![9; case.elements * 2], 2)).collect();
    let sources: Vec<Owned<'_>> = cases.iter().map(|case| owner.own(&case.sources[1], 0)).collect();
    owner.wait();
    let parts = cases.iter().zip(&sources).map(|(case, source)| {
        let device = BlendInput::Device { address: source.address(), bytes: source.bytes };
        BlendPart { sources: vec![BlendInput::Host(&case.sources[0]), device], ..case.part() }
    });
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let to = Destination::Device(owned.iter().map(Owned::lend_mut).collect());
    blender.submit(parts.collect(), &weights, 1, to, Box::new(report)).unwrap();
    // The owner's next work runs after the results are written, although the host does not wait.
    let copies: Vec<Vec<u8>> = owned.iter().map(Owned::get).collect();
    blender.flush().unwrap();
    for (case, got) in cases.iter().zip(copies) {
        assert_eq!(got, case.expected(&weights, 1)[0]);
    }
}

#[test]
pub fn overflow_is_reported_as_on_cpu() {
    crate::driver::driver();
    let mut case = Case::new(&[Dtype::F32; 3], Dtype::F16, 1000, 3);
    let finite = Case::new(&[Dtype::F32; 3], Dtype::F16, 50, 4);
    for (element, value) in [(0, 65_520.0), (777, f64::NAN), (999, -1e30)] {
        let before = case.sources[1][4 * element..][..4].to_vec();
        case.sources[1][4 * element..][..4].copy_from_slice(&encode(value, Dtype::F32));
        let weights = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
        let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
        let deliver = |_: &[&[u8]]| -> Result<()> { panic!("delivered") };
        let parts = vec![finite.part(), case.part()];
        blender.submit(parts, &weights, 2, Destination::Host(Box::new(deliver)), Box::new(report)).unwrap();
        let text = blender.flush().unwrap_err().to_string();
        drop(blender);
        let expected = if value.is_nan() { "NaN".into() } else { f64::from(value as f32).to_string() };
        // 0 times NaN is NaN, so the first target overflows too.
        let target = usize::from(!value.is_nan());
        assert!(text.contains(&format!("part 1 target {target} element {element} is {expected}")), "{text}");
        case.sources[1][4 * element..][..4].copy_from_slice(&before);
    }
    // The largest value that rounds to a finite one fits.
    case.sources[1][..4].copy_from_slice(&65_519.0f32.to_le_bytes());
    let deliver = |results: &[&[u8]]| -> Result<()> {
        assert_eq!(results[0][..2], half::f16::from_f32(65_504.0).to_le_bytes());
        Ok(())
    };
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let destination = Destination::Host(Box::new(deliver));
    blender.submit(vec![case.part()], &[0.0, 1.0, 0.0], 1, destination, Box::new(report)).unwrap();
    blender.flush().unwrap();
}

/// Runs in its own process, with 6 MB of device memory.
#[test]
#[ignore = "run by `block_that_does_not_fit_is_blended_in_pieces`"]
fn pieces() {
    let dtypes = [Dtype::F16, Dtype::F32, Dtype::BF16];
    for targets in [1, 3, 9] {
        let cases = [500_001, 0, 70_000].map(|elements| Case::new(&dtypes, Dtype::F32, elements, 7));
        check(&cases, targets);
        check(&[Case::new(&dtypes, Dtype::BF16, 600_000, 8)], targets);
    }
    let owner = Owner::new();
    let mut case = Case::new(&[Dtype::F32; 2], Dtype::BF16, 400_001, 9);
    let target = owner.own(&vec![9; case.elements * 2], 2);
    let source = owner.own(&case.sources[1], 0);
    owner.wait();
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let device = BlendInput::Device { address: source.address(), bytes: source.bytes };
    let part = BlendPart { sources: vec![BlendInput::Host(&case.sources[0]), device], ..case.part() };
    let to = Destination::Device(vec![target.lend_mut()]);
    blender.submit(vec![part], &[0.75, -2.5], 1, to, Box::new(report)).unwrap();
    assert!(target.get() == case.expected(&[0.75, -2.5], 1)[0]);
    drop(blender);
    drop((target, source));

    case = Case::new(&[Dtype::F32; 3], Dtype::F16, 600_000, 3);
    case.sources[1][4 * 599_998..][..4].copy_from_slice(&encode(65_520.0, Dtype::F32));
    let weights = [0.0, 1.0, 0.0];
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let deliver = |_: &[&[u8]]| -> Result<()> { panic!("delivered") };
    let parts = vec![Case::part(&case)];
    let outcome = blender.submit(parts, &weights, 1, Destination::Host(Box::new(deliver)), Box::new(report));
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("part 0 target 0 element 599998 is 65520"), "{text}");
}

#[test]
fn block_that_does_not_fit_is_blended_in_pieces() {
    crate::driver::check_in_own_process("blend::pieces", &[("STANDIN_MEMORY", "6000000")]);
}

/// Runs in its own process, with too little memory for the smallest piece.
#[test]
#[ignore = "run by `blend_without_device_memory_has_bits_of_cpu`"]
fn no_piece_fits() {
    let owner = Owner::new();
    let dtypes = [Dtype::F16, Dtype::F32, Dtype::BF16];
    for targets in [1, 3, 9] {
        let cases = [70_001, 0, 3].map(|elements| Case::new(&dtypes, Dtype::F32, elements, 7));
        check(&cases, targets);
        check(&[Case::new(&dtypes, Dtype::BF16, 600_000, 8)], targets);
    }
    // A source on the device, and results for it.
    let case = Case::new(&[Dtype::F32; 2], Dtype::BF16, 301, 9);
    let target = owner.own(&vec![9; case.elements * 2], 2);
    let source = owner.own(&case.sources[1], 0);
    owner.wait();
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let device = BlendInput::Device { address: source.address(), bytes: source.bytes };
    let part = BlendPart { sources: vec![BlendInput::Host(&case.sources[0]), device], ..case.part() };
    let to = Destination::Device(vec![target.lend_mut()]);
    let lines = logged(|| {
        for _ in 0..2 {
            let to = Destination::Device(vec![target.lend_mut()]);
            blender.submit(vec![part.clone()], &[0.75, -2.5], 1, to, Box::new(report)).unwrap();
        }
        blender.submit(vec![part.clone()], &[0.75, -2.5], 1, to, Box::new(report)).unwrap();
    });
    assert!(target.get() == case.expected(&[0.75, -2.5], 1)[0]);
    let of_host: Vec<&String> = lines.iter().filter(|line| line.contains("the CPU blends")).collect();
    assert!(matches!(of_host[..], [line] if line.contains("empty_cache")), "{lines:?}");

    let mut case = Case::new(&[Dtype::F32; 3], Dtype::F16, 600_000, 3);
    case.sources[1][4 * 599_998..][..4].copy_from_slice(&encode(65_520.0, Dtype::F32));
    let mut blender = Blender::new(&CudaDevice::open(0).unwrap()).unwrap();
    let deliver = |_: &[&[u8]]| -> Result<()> { panic!("delivered") };
    let destination = Destination::Host(Box::new(deliver));
    let outcome = blender.submit(vec![case.part()], &[0.0, 1.0, 0.0], 1, destination, Box::new(report));
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("part 0 target 0 element 599998 is 65520"), "{text}");
}

#[test]
fn blend_without_device_memory_has_bits_of_cpu() {
    crate::driver::check_in_own_process("blend::no_piece_fits", &[("STANDIN_MEMORY", "5000")]);
}
