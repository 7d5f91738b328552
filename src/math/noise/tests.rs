//! Expected errors against naive sums and simulations.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::math::{Chain, ChainSource, History, Profile};

/// Creates a system of irregular updates, with a tracked chain and one of another tool, and snapshots at five updates.
fn system() -> (Vec<u64>, Vec<ChainSource>, System) {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mut time = 40;
    let times: Vec<u64> = (0..200)
        .map(|_| {
            time += random.random_range(1..20);
            time
        })
        .collect();
    let tracked = Chain::Tracked(Profile::sigma_rel(0.1).unwrap());
    let counter = Chain::Counter { gamma: 0.5, stride: 3, offset: 2 };
    let source = |chain: &Chain, k: usize| ChainSource { chain: chain.clone(), step: times[k], label: format!("{k}") };
    let sources: Vec<ChainSource> =
        [&tracked, &counter].into_iter().flat_map(|chain| [20, 21, 90, 150, 199].map(|k| source(chain, k))).collect();
    let history = History::from_times(times.iter().copied()).unwrap();
    let system = System::new(&history, times[199], &sources, 0.0).unwrap();
    (times, sources, system)
}

/// Returns the weights of a source on all updates.
fn weights(source: &ChainSource, times: &[u64]) -> Vec<f64> {
    let seen = times.partition_point(|&time| time <= source.step);
    let mut weights = source.chain.weights(&times[..seen]);
    weights.resize(times.len(), 0.0);
    weights
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// Returns `sum_kl d_k d_l c(t_k, t_l)`.
fn double_sum(times: &[u64], d: &[f64], covariance: impl Fn(f64, f64) -> f64) -> f64 {
    let row = |k: usize| -> f64 {
        times.iter().zip(d).map(|(&t, dl)| d[k] * dl * covariance(times[k] as f64, t as f64)).sum()
    };
    (0..times.len()).map(row).sum()
}

/// Variances of a straight line, a random walk and white noise.
#[derive(Clone, Copy)]
struct Truth {
    line: f64,
    walk: f64,
    white: f64,
}

impl Truth {
    /// Returns the mean square of the parameters at `times`, blended with weights that sum to 0.
    fn mean_square(&self, times: &[u64], weights: &[f64]) -> f64 {
        let line: f64 = times.iter().zip(weights).map(|(&t, w)| t as f64 * w).sum();
        let mut from = 0.0;
        let mut walk = 0.0;
        for k in (1..times.len()).rev() {
            from += weights[k];
            walk += from * from * (times[k] - times[k - 1]) as f64;
        }
        self.line * line * line + self.walk * walk + self.white * weights.iter().map(|w| w * w).sum::<f64>()
    }

    /// Returns what exact snapshots of such parameters would be measured as.
    fn measured(&self, sources: &[ChainSource], times: &[u64]) -> Measured {
        let weights: Vec<Vec<f64>> = sources.iter().map(|source| weights(source, times)).collect();
        let moved = |i: usize, j: usize| self.mean_square(times, &difference(&weights[i], &weights[j]));
        exact(Mat::from_fn(sources.len(), sources.len(), moved))
    }
}

/// Returns the residual of the best blend for a target.
fn residual(system: &System, sigma_rel: f64) -> Vec<f64> {
    let updates = system.updates().unwrap();
    let target = system.target(updates, &Profile::sigma_rel(sigma_rel).unwrap()).unwrap();
    system.blend(updates, &target).unwrap().residual
}

#[test]
fn walk_equals_the_double_sum_over_covariances() {
    let (times, sources, _) = system();
    let first = times[0] as f64;
    let d = difference(&weights(&sources[2], &times), &weights(&sources[7], &times));
    let found = Truth { line: 0.0, walk: 1.0, white: 0.0 }.mean_square(&times, &d);
    let expected = double_sum(&times, &d, |s, t| s.min(t) - first);
    assert!((found - expected).abs() <= 1e-9 * expected, "{found} is not {expected}");
}

/// Returns a number of mean 0 and variance 1.
fn random_number(random: &mut ChaCha8Rng) -> f64 {
    (random.random::<f64>() - 0.5) * 12f64.sqrt()
}

/// Simulates an element at each of the times.
fn simulated(random: &mut ChaCha8Rng, times: &[u64], truth: Truth) -> Vec<f64> {
    let speed = truth.line.sqrt() * random_number(random);
    let mut walked = 0.0;
    let mut before = times[0];
    let mut at = |&time: &u64| {
        walked += (truth.walk * (time - before) as f64).sqrt() * random_number(random);
        before = time;
        speed * time as f64 + walked + truth.white.sqrt() * random_number(random)
    };
    times.iter().map(&mut at).collect()
}

#[test]
fn simulated_elements_are_measured_and_predicted() {
    let (times, sources, system) = system();
    let truth = Truth { line: 2e-5, walk: 0.01, white: 3.0 };
    let weights: Vec<Vec<f64>> = sources.iter().map(|source| weights(source, &times)).collect();
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let elements = 4_000;
    let mut values = vec![Vec::with_capacity(elements); sources.len()];
    for _ in 0..elements {
        let element = simulated(&mut random, &times, truth);
        for (values, weights) in values.iter_mut().zip(&weights) {
            values.push(weights.iter().zip(&element).map(|(w, v)| w * v).sum());
        }
    }
    // Exact values: no movement is taken for rounding.
    let sample = Sample { ulps: vec![vec![1e-12; elements]; sources.len()], values, weights: vec![1.0; elements] };
    let measured = measure(&sample, &[0..1000, 1000..elements].map(|block| Vec::from_iter([block])));
    // Six deviations of a mean square over the elements.
    let tolerance = 6.0 * (2.0 / elements as f64).sqrt();
    for (i, j) in [(0, 1), (3, 8), (9, 2)] {
        let expected = truth.mean_square(&times, &difference(&weights[i], &weights[j]));
        assert!((measured.moved[(i, j)] / expected - 1.0).abs() < tolerance, "{i} {j}: {}", measured.moved[(i, j)]);
    }
    check_predictions(&times, &system, &measured, truth);
}

/// Checks the mean squares of blends for targets of several lengths, to a factor of 1.5 of their roots.
fn check_predictions(times: &[u64], system: &System, measured: &Measured, truth: Truth) {
    let basis = MovementBasis::new(Cow::Borrowed(system.updates().unwrap()), &[]);
    let movement = basis.fit(measured);
    for sigma_rel in [0.02, 0.05, 0.15, 0.2] {
        let d = residual(system, sigma_rel);
        let ratio = (basis.mean_square(&movement, &d) / truth.mean_square(times, &d)).sqrt();
        assert!((1.0 / 1.5..1.5).contains(&ratio), "{sigma_rel}: {ratio}");
    }
}

/// Returns a single group.
fn alone(measured: Measured) -> Vec<MeasuredGroup> {
    vec![MeasuredGroup { measured, share: 1.0 }]
}

/// Returns measurements of movement without rounding.
fn exact(moved: Mat<f64>) -> Measured {
    Measured { rounding: Mat::zeros(moved.nrows(), moved.ncols()), moved }
}

#[test]
fn movement_of_known_variances_is_predicted() {
    let (times, sources, system) = system();
    for [line, walk, white] in [[0.0, 1e-9, 0.0], [0.0, 0.0, 5.0], [1e-6, 1e-3, 0.3], [1e-2, 1e-6, 1e-3]] {
        let truth = Truth { line, walk, white };
        check_predictions(&times, &system, &truth.measured(&sources, &times), truth);
    }
}

#[test]
fn movement_of_nothing_is_predicted_as_nothing() {
    let (times, sources, system) = system();
    let truth = Truth { line: 0.0, walk: 0.0, white: 0.0 };
    let basis = MovementBasis::new(Cow::Borrowed(system.updates().unwrap()), &[]);
    let movement = basis.fit(&truth.measured(&sources, &times));
    assert_eq!(basis.mean_square(&movement, &residual(&system, 0.1)), 0.0);
}

/// Convergence is fast at first. All elements move by one function of time, of which the snapshots are one sample.
#[test]
fn fast_start_is_predicted() {
    let times: Vec<u64> = (1..=1000).map(|k| 10 * k).collect();
    let tracked = [0.05, 0.28].map(|length| Chain::Tracked(Profile::sigma_rel(length).unwrap()));
    let source = |chain: &Chain, step: u64| ChainSource { chain: chain.clone(), step, label: format!("{step}") };
    let steps = || (1..=20).map(|i| 500 * i);
    let sources: Vec<ChainSource> = tracked.iter().flat_map(|chain| steps().map(|step| source(chain, step))).collect();
    let history = History::from_times(times.iter().copied()).unwrap();
    let system = System::new(&history, 10_000, &sources, 0.0).unwrap();
    let basis = MovementBasis::new(Cow::Borrowed(system.updates().unwrap()), &[]);
    for time_constant in [100.0, 300.0] {
        let blended = |weights: &[f64]| -> f64 {
            times.iter().zip(weights).map(|(&t, w)| w * (-(t as f64) / time_constant).exp()).sum()
        };
        let averages: Vec<f64> = sources.iter().map(|source| blended(&weights(source, &times))).collect();
        let n = sources.len();
        let movement = basis.fit(&exact(Mat::from_fn(n, n, |i, j| (averages[i] - averages[j]).powi(2))));
        for sigma_rel in [0.1, 0.15, 0.21, 0.26] {
            let d = residual(&system, sigma_rel);
            let ratio = basis.mean_square(&movement, &d).sqrt() / blended(&d).abs();
            assert!((0.5..2.0).contains(&ratio), "{time_constant}, {sigma_rel}: {ratio}");
        }
    }
}

/// Measures values that do not move, and the same values after a movement of many ulps.
#[test]
fn rounding_errors_are_equal_without_movement_and_independent_after_it() {
    let mut random = ChaCha8Rng::seed_from_u64(13);
    let elements = 10_000;
    let ulp = 0.125;
    let exact: Vec<f64> = (0..elements).map(|_| random.random_range(-3.0..3.0)).collect();
    let moved: Vec<f64> = exact.iter().map(|v| v + 2.0 * random_number(&mut random)).collect();
    let stored = |values: &Vec<f64>| values.iter().map(|v| (v / ulp).round() * ulp).collect::<Vec<f64>>();
    let values = vec![stored(&exact), stored(&exact), stored(&moved)];
    let ulps = vec![vec![ulp; elements]; 3];
    let weights = vec![1.0; elements];
    let measured = measure(&Sample { values, ulps, weights }, &[vec![0..5000, 5000..elements]]);
    let variance = ulp * ulp / 12.0;
    let close = |found: f64, expected: f64| (found - expected).abs() < 1e-3 * variance;
    for (i, j, covariance) in [(0, 0, variance), (0, 1, variance), (0, 2, 0.0), (2, 2, variance)] {
        assert!(close(measured.rounding[(i, j)], covariance), "{i} {j}: {}", measured.rounding[(i, j)]);
        assert_eq!(measured.rounding[(i, j)], measured.rounding[(j, i)]);
    }
    assert_eq!(measured.moved[(0, 1)], 0.0);
    assert!((measured.moved[(0, 2)] / 4.0 - 1.0).abs() < 6.0 * (2.0 / elements as f64).sqrt());
}

#[test]
fn regularisation_is_chosen_only_against_rounding() {
    let (_, sources, system) = system();
    let (times, n) = (system.updates().unwrap().times.clone(), sources.len());
    let moved = Truth { line: 0.0, walk: 1e-3, white: 0.0 }.measured(&sources, &times).moved;
    let model = |rounding: f64| {
        let rounding = Mat::from_fn(n, n, |i, j| if i == j { rounding } else { 0.0 });
        ErrorModel::new(&system, alone(Measured { moved: moved.clone(), rounding })).unwrap()
    };
    let target = Profile::sigma_rel(0.05).unwrap();
    let plain = model(0.0).solve(&target, 0.0).unwrap();
    let none = model(0.0).solve_best(&target).unwrap();
    assert_eq!((none.rho, none.solution.weights), (0.0, plain.solution.weights.clone()));
    assert_eq!(none.expected.total(), none.expected.profile);
    let noise = (plain.expected.profile * 3.0).powi(2);
    let plain = model(noise).solve(&target, 0.0).unwrap();
    let quiet = model(noise).solve_best(&target).unwrap();
    assert!(quiet.rho > 0.0 && quiet.expected.total() < 0.9 * plain.expected.total(), "{:?}", quiet.expected);
    assert!((plain.expected.rounding - plain.solution.noise_gain * noise.sqrt()).abs() < 1e-9 * noise.sqrt());
    // No other regularisation is much better.
    for power in -60..10 {
        let rho = 10f64.powf(0.1 * f64::from(power));
        let other = System::new(
            &History::from_times(system.updates().unwrap().times.clone()).unwrap(),
            sources[4].step,
            &sources,
            rho,
        )
        .unwrap();
        let rounding = Mat::from_fn(n, n, |i, j| if i == j { noise } else { 0.0 });
        let other = ErrorModel::new(&other, alone(Measured { moved: moved.clone(), rounding })).unwrap();
        let other = other.solve(&target, rho).unwrap().expected.total();
        assert!(other > 0.9 * quiet.expected.total(), "{rho}: {other} {}", quiet.expected.total());
    }
}

/// A slow group gains from a regularisation that would make a fast one much worse.
#[test]
fn regularisation_does_not_help_one_group_by_hurting_another() {
    let (_, sources, system) = system();
    let (times, n) = (system.updates().unwrap().times.clone(), sources.len());
    let measured = |walk: f64| Measured {
        moved: Truth { line: 0.0, walk, white: 0.0 }.measured(&sources, &times).moved,
        rounding: Mat::from_fn(n, n, |i, j| f64::from(u8::from(i == j))),
    };
    let target = Profile::sigma_rel(0.05).unwrap();
    let slow = MeasuredGroup { measured: measured(1e-4), share: 0.996 };
    let alone = ErrorModel::new(&system, vec![slow.clone()]).unwrap();
    assert!(alone.solve_best(&target).unwrap().rho > 0.0);
    for walk in [1e2, 1e4, 1e8] {
        let fast = MeasuredGroup { measured: measured(walk), share: 0.004 };
        let both = ErrorModel::new(&system, vec![slow.clone(), fast]).unwrap();
        let plain = both.solve(&target, 0.0).unwrap();
        let best = both.solve_best(&target).unwrap();
        for (group, plain) in best.groups.iter().zip(&plain.groups) {
            assert!(group.total() <= 1.05 * plain.total(), "{walk}: {group:?} {plain:?}");
        }
        let mean_square = 0.996 * best.groups[0].total().powi(2) + 0.004 * best.groups[1].total().powi(2);
        assert!((best.expected.total() / mean_square.sqrt() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn elements_count_by_what_they_stand_for() {
    let values = vec![vec![0.0; 3], vec![1.0, 1.0, 3.0]];
    let sample = Sample { values, ulps: vec![vec![1e-9; 3]; 2], weights: vec![4.0, 4.0, 1.0] };
    let moved = |blocks: &[Vec<std::ops::Range<usize>>]| measure(&sample, blocks).moved[(0, 1)];
    for blocks in [vec![vec![0..3]], vec![vec![0..2], vec![2..3]], vec![vec![0..1, 2..3], vec![1..2]]] {
        assert!((moved(&blocks) - 17.0 / 9.0).abs() < 1e-12, "{blocks:?}");
    }
    assert!((moved(&[std::iter::once(2..3).collect()]) - 9.0).abs() < 1e-12);
}
