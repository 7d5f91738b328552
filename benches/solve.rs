//! Times the solve with two profiles' snapshots at 20 and 256 steps, and the choice of the step to drop of 21 and 101.

use criterion::{Criterion, criterion_group, criterion_main};
use posthoc_ema::math::Schedule;
use posthoc_ema::{At, Forecast, Profile, Retention};

fn benchmark(criterion: &mut Criterion) {
    let profile = |sigma_rel| Profile::sigma_rel(sigma_rel).expect("it is in range");
    let mut group = criterion.benchmark_group("solve");
    group.sample_size(20);
    for steps in [20, 256] {
        let tracked = vec![profile(0.05), profile(0.28)];
        let forecast = Forecast {
            schedule: Schedule::default(),
            steps: 1000 * steps,
            keep: 256,
            retention: Retention::Latest,
            tracked,
        };
        for targets in [1, 31] {
            let profiles: Vec<Profile> = (0..targets).map(|i| profile(0.05 + 0.007 * f64::from(i))).collect();
            group.bench_function(format!("2 x {steps} snapshots, {targets} targets"), |bench| {
                bench.iter(|| {
                    let plans = forecast.plans(&profiles, At::Latest).expect("it can be solved");
                    assert!(plans.iter().all(|plan| plan.relative_error < 0.02 && (plan.sum - 1.0).abs() < 1e-12));
                });
            });
        }
    }
    group.finish();
}

fn retention(criterion: &mut Criterion) {
    let tracked = [0.05, 0.28].map(|sigma_rel| Profile::sigma_rel(sigma_rel).expect("it is in range"));
    let mut group = criterion.benchmark_group("retention");
    for keep in [20, 100] {
        let steps: Vec<u64> = (1..=keep + 1).map(|i| 1000 * i).collect();
        group.bench_function(format!("2 x {keep} kept"), |bench| {
            bench.iter(|| {
                let surplus = Retention::default().surplus(&tracked, 10, &steps, keep as usize);
                assert!(matches!(surplus.as_slice(), [step] if *step <= 1000 * keep));
            });
        });
    }
    group.finish();
}

criterion_group!(benches, benchmark, retention);
criterion_main!(benches);
