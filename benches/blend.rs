//! Measures synthesis from 40 mapped snapshots beside adding up the same files, and the blend's arithmetic alone.

mod limits;

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use posthoc_ema::compute::cpu::{Blend, blend, to_f32};
use posthoc_ema::{At, Dtype, Plan, PostHocEma, Profile, Run, Tensors};

const PARAMETERS: usize = 10_000_000;

/// Writes 20 snapshots of two profiles of a moving model.
fn train(dir: &Path, dtype: Dtype, tensors: usize) {
    let each = PARAMETERS / tensors;
    let mut model: Vec<(String, Vec<f32>)> = (0..tensors).map(|i| (format!("{i:05}"), vec![1.0; each])).collect();
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(1).checkpoint_dtype(dtype);
    let mut ema = options.create(&model).expect("the run is new");
    for step in 1..=20u16 {
        let values = model.iter_mut().flat_map(|(_, values)| values);
        values.enumerate().for_each(|(i, value)| *value += f32::from(step % 3) + (i % 1021) as f32 / 1024.0);
        ema.update(&model).expect("the disk holds it");
    }
}

/// Checks a sample of the elements against sums of single elements.
fn check(result: &Tensors, plan: &Plan, run: &Run) {
    let element = |name: &str, i: usize, index, step| -> f64 {
        let found = run.snapshots().iter().find(|s| (s.id.index, s.id.step) == (index, step));
        let (tensor, bytes) = found.and_then(|s| s.tensor(name)).expect("it is in the run");
        let (mut value, size) = ([0.0], tensor.dtype.bitsize() / 8);
        to_f32(&mut value, &bytes[i * size..][..size], tensor.dtype);
        f64::from(value[0])
    };
    for (name, tensor) in result.iter() {
        let values: &[f32] = bytemuck::cast_slice(&tensor.bytes);
        for i in (0..values.len()).step_by(9973) {
            let expected =
                plan.weights.iter().map(|w| w.weight * element(name, i, w.index, w.step)).sum::<f64>() as f32;
            assert!((values[i] - expected).abs() <= expected.abs() * f32::EPSILON, "{name} at {i}");
        }
    }
}

/// Times synthesis into memory: reading, converting and adding, without writing the result to a disk.
fn bench(criterion: &mut Criterion, name: &str, dtype: Dtype, tensors: usize) {
    let temp = tempfile::tempdir().expect("there is a temporary folder");
    let dir = temp.path().join("run");
    train(&dir, dtype, tensors);
    let run = Run::open(&dir).expect("it was just written");
    let profile = Profile::sigma_rel(0.15).expect("it is in range");
    let plan = run.plan(profile, At::Latest).expect("it can be solved");
    let load = || run.load(&plan).expect("the snapshots are whole");
    check(&load(), &plan, &run);
    let bytes = run.bytes_to_read(std::slice::from_ref(&plan)) as usize;
    let mut group = criterion.benchmark_group("synthesis");
    group.throughput(Throughput::Bytes(bytes as u64)).sample_size(20);
    group.bench_function(name, |bench| bench.iter(load));
    group.finish();
    let snapshots = run.snapshots().iter();
    let stored: Vec<_> = snapshots.flat_map(|s| s.tensors().filter_map(|(n, _)| s.tensor(n)).map(|t| t.1)).collect();
    let slices: Vec<&[u8]> = stored.iter().map(|bytes| &**bytes).collect();
    let scan = limits::scan_bytes_per_second(&slices);
    let seconds = limits::best_seconds(|| drop(load()));
    limits::report(name, bytes, seconds, scan, "adding up the same mapped files");
}

/// Times a blend of 40 cached sources into many targets, which is limited by arithmetic.
fn bench_targets(criterion: &mut Criterion, targets: usize) {
    const ELEMENTS: usize = 1 << 14;
    let sources: Vec<Vec<f32>> = (0..40).map(|k| vec![k as f32; ELEMENTS]).collect();
    let sources: Vec<&[u8]> = sources.iter().map(|source| bytemuck::cast_slice(source)).collect();
    let weights = vec![0.5; 40 * targets];
    let task = Blend { dtypes: &[Dtype::F32; 40], weights: &weights, output: Dtype::F32 };
    let mut results = vec![vec![0f32; ELEMENTS]; targets];
    let mut run = || {
        let mut dst: Vec<&mut [u8]> = results.iter_mut().map(|result| bytemuck::cast_slice_mut(result)).collect();
        blend(&mut dst, &sources, &task).expect("the sums are finite");
    };
    run();
    let mut group = criterion.benchmark_group("blend");
    group.throughput(Throughput::Elements((40 * targets * ELEMENTS) as u64));
    group.bench_function(format!("40 sources to {targets} targets, multiply-adds on one thread"), |bench| {
        bench.iter(&mut run)
    });
    group.finish();
    assert!(results.iter().flatten().all(|&sum| sum == 390.0));
}

fn benchmark(criterion: &mut Criterion) {
    bench(criterion, "40 f16 snapshots", Dtype::F16, 1);
    bench(criterion, "40 f16 snapshots of 400 tensors", Dtype::F16, 400);
    bench(criterion, "40 bf16 snapshots", Dtype::BF16, 1);
    bench(criterion, "40 f32 snapshots", Dtype::F32, 1);
    [1, 8, 31].into_iter().for_each(|targets| bench_targets(criterion, targets));
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
