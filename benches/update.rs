//! Measures the update of two profiles beside the machine's copy bandwidth.

mod limits;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use posthoc_ema::compute::cpu::{Averages, Incoming, Layout, Precision, UpdateWeights, update};
use posthoc_ema::{Dtype, Element};

const PARAMETERS: usize = 20_000_000;

/// Model of equal tensors, with the averages of two profiles.
struct Case<T> {
    name: &'static str,
    parameters: Vec<T>,
    tensors: usize,
    precision: Precision,
}

impl<T: Element + Into<f32>> Case<T> {
    fn bytes(&self) -> usize {
        let state = if self.precision == Precision::Plain { 8 } else { 12 };
        self.parameters.len() * (size_of::<T>() + 2 * state)
    }

    fn run(&self, criterion: &mut Criterion, copy: f64) {
        let each = self.parameters.len() / self.tensors;
        let layout = Layout::new((0..self.tensors).map(|_| each));
        let mut averages = vec![Averages::zeros(&layout, self.precision); 2];
        let tensors = self.parameters.chunks(each).map(bytemuck::cast_slice);
        let incoming: Vec<Incoming<'_>> = tensors.map(|bytes| Incoming { dtype: T::DTYPE, bytes }).collect();
        let weights = [0.25f32, 0.5];
        let at = |time| UpdateWeights::at(time, &weights);
        update(&mut averages, &incoming, &layout, at(1));
        self.check(&averages, &layout, &weights);
        let mut group = criterion.benchmark_group("update");
        group.throughput(Throughput::Bytes(self.bytes() as u64)).sample_size(20);
        group.bench_function(self.name, |bench| bench.iter(|| update(&mut averages, &incoming, &layout, at(2))));
        group.finish();
        let seconds = limits::best_seconds(|| update(&mut averages, &incoming, &layout, at(3)));
        limits::report(self.name, self.bytes(), seconds, copy, "a copy");
    }

    /// Checks the first update: from averages of zero, it leaves the weight times each parameter.
    fn check(&self, averages: &[Averages], layout: &Layout, weights: &[f32]) {
        let each = self.parameters.len() / self.tensors;
        for (averages, weight) in averages.iter().zip(weights) {
            for (i, &parameter) in self.parameters.iter().enumerate().step_by(997) {
                let got = averages.high[layout.range(i / each).start + i % each];
                assert_eq!(got, weight * parameter.into(), "{} at {i}", self.name);
            }
        }
    }
}

fn value(i: usize) -> f32 {
    (i % 8191) as f32 / 4096.0 - 1.0
}

fn benchmark(criterion: &mut Criterion) {
    assert_eq!(f32::DTYPE, Dtype::F32);
    let copy = limits::copy_bytes_per_second(400_000_000);
    let f32s: Vec<f32> = (0..PARAMETERS).map(value).collect();
    let bf16s: Vec<bf16> = (0..PARAMETERS).map(|i| bf16::from_f32(value(i))).collect();
    let case = |name, tensors, precision| Case { name, parameters: f32s.clone(), tensors, precision };
    case("f32 plain", 1, Precision::Plain).run(criterion, copy);
    case("f32 compensated", 1, Precision::Compensated).run(criterion, copy);
    case("f32 compensated, 800 tensors", 800, Precision::Compensated).run(criterion, copy);
    let case = |name, precision| Case { name, parameters: bf16s.clone(), tensors: 1, precision };
    case("bf16 plain", Precision::Plain).run(criterion, copy);
    case("bf16 compensated", Precision::Compensated).run(criterion, copy);
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
