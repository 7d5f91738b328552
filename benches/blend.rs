//! Synthesis from 40 mapped snapshots, beside adding up the same files.

mod limits;

use std::path::{Path, PathBuf};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use posthoc_ema::{At, Dtype, Output, Plan, PostHocEma, Profile, Run, WriteOptions};

const PARAMETERS: usize = 10_000_000;

/// 20 snapshots of two profiles of a model that moves.
fn train(dir: &Path, dtype: Dtype, tensors: usize) {
    let each = PARAMETERS / tensors;
    let mut model: Vec<(String, Vec<f32>)> = (0..tensors).map(|i| (format!("{i:05}"), vec![1.0; each])).collect();
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(1).checkpoint_dtype(dtype);
    let mut ema = options.create(&model).expect("the run is new");
    for step in 1..=20u16 {
        model.iter_mut().flat_map(|(_, values)| values).for_each(|value| *value += f32::from(step % 3));
        ema.update(&model).expect("the disk holds it");
    }
}

/// A model whose elements are all alike has averages that are all alike: known from one of them.
fn check(path: &Path, plan: &Plan, run: &Run) {
    let written = std::fs::read(path).expect("it was written");
    let written = safetensors::SafeTensors::deserialize(&written).expect("it is whole");
    let sum = |name: &str| -> f64 {
        let value = |index, step| {
            let found = run.snapshots().iter().find(|s| (s.stem.index, s.stem.step) == (index, step));
            let (tensor, bytes) = found.and_then(|s| s.tensor(name)).expect("it is in the run");
            let mut value = [0.0];
            posthoc_ema::compute::cpu::to_f32(&mut value, &bytes[..tensor.dtype.bitsize() / 8], tensor.dtype);
            f64::from(value[0])
        };
        plan.weights.iter().map(|w| w.weight * value(w.index, w.step)).sum()
    };
    for (name, tensor) in written.tensors() {
        let values: &[f32] = bytemuck::cast_slice(tensor.data());
        let expected = sum(&name) as f32;
        assert!(values.iter().all(|&v| (v - expected).abs() <= expected.abs() * f32::EPSILON), "{name}");
    }
}

fn bench(criterion: &mut Criterion, name: &str, dtype: Dtype, tensors: usize, targets: usize) {
    let temp = tempfile::tempdir().expect("there is a temporary folder");
    let dir = temp.path().join("run");
    train(&dir, dtype, tensors);
    let run = Run::open(&dir).expect("it was just written");
    let profile = |i: usize| Profile::sigma_rel(0.05 + 0.007 * i as f64).expect("it is in range");
    let profiles: Vec<Profile> = (0..targets).map(profile).collect();
    let plans = run.plans(&profiles, At::Latest).expect("it can be solved");
    let paths: Vec<PathBuf> = (0..targets).map(|i| temp.path().join(i.to_string())).collect();
    let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
    let write = || run.write_all(&outputs, &WriteOptions::default()).expect("the disk holds it");
    write();
    paths.iter().zip(&plans).for_each(|(path, plan)| check(path, plan, &run));
    let bytes = run.bytes_to_read(&plans) as usize;
    let mut group = criterion.benchmark_group("synthesis");
    group.throughput(Throughput::Bytes(bytes as u64)).sample_size(10);
    group.bench_function(name, |bench| bench.iter(write));
    group.finish();
    let snapshots = run.snapshots().iter();
    let slices: Vec<&[u8]> =
        snapshots.flat_map(|s| s.tensors().filter_map(|(n, _)| s.tensor(n)).map(|t| t.1)).collect();
    let scan = limits::scan_bytes_per_second(&slices);
    limits::report(name, bytes, limits::best_seconds(write), scan, "adding up the same mapped files");
}

fn benchmark(criterion: &mut Criterion) {
    bench(criterion, "40 f16 snapshots to 1 target", Dtype::F16, 1, 1);
    bench(criterion, "40 f16 snapshots of 400 tensors to 1 target", Dtype::F16, 400, 1);
    bench(criterion, "40 f16 snapshots to 31 targets", Dtype::F16, 1, 31);
    bench(criterion, "40 bf16 snapshots to 1 target", Dtype::BF16, 1, 1);
    bench(criterion, "40 f32 snapshots to 1 target", Dtype::F32, 1, 1);
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
