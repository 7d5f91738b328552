//! Quadratic forms against naive sums and simulations, and fits of known variances.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::quadratic_forms::QuadraticForms;
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

/// Drift, walk and white noise of unit variance, each alone.
const ALONE: [Trajectory; 3] = [
    Trajectory { drift: 1.0, walk: 0.0, white: 0.0 },
    Trajectory { drift: 0.0, walk: 1.0, white: 0.0 },
    Trajectory { drift: 0.0, walk: 0.0, white: 1.0 },
];

#[test]
fn mean_squares_equal_double_sums_over_covariances() {
    let (times, sources, _) = system();
    let first = times[0] as f64;
    let newest = times[199] as f64;
    for (a, b) in [(0, 9), (3, 4), (2, 7), (9, 5)] {
        let d = difference(&weights(&sources[a], &times), &weights(&sources[b], &times));
        let [drift, walk, white] = ALONE.map(|trajectory| trajectory.mean_square(&times, &vec![1.0; times.len()], &d));
        // Position and velocity start at the newest update and go back in time: a twice summed walk.
        let bend = |s: f64, t: f64| {
            let near = newest - s.max(t);
            let far = newest - s.min(t);
            near * near * (3.0 * far - near) / 6.0
        };
        let straight = double_sum(&times, &d, |s, t| (s - newest) * (t - newest));
        for (found, expected) in [
            (drift, straight + double_sum(&times, &d, bend) / newest),
            (walk, double_sum(&times, &d, |s, t| s.min(t) - first)),
            (white, double_sum(&times, &d, |s, t| f64::from(u8::from(s == t)))),
        ] {
            assert!((found - expected).abs() <= 1e-9 * expected, "{a} {b}: {found} is not {expected}");
        }
    }
}

#[test]
fn quadratic_forms_equal_mean_squares_of_differences() {
    let (times, sources, system) = system();
    let forms = QuadraticForms::new(system.updates().unwrap());
    for i in 0..sources.len() {
        for j in 0..i {
            let d = difference(&weights(&sources[i], &times), &weights(&sources[j], &times));
            let straight = times.iter().zip(&d).map(|(&t, d)| t as f64 * d).sum::<f64>().powi(2);
            let expected = [
                straight,
                ALONE[1].mean_square(&times, &vec![1.0; times.len()], &d),
                ALONE[2].mean_square(&times, &vec![1.0; times.len()], &d),
            ];
            for (found, expected) in forms.between(i, j).into_iter().zip(expected) {
                // The forms are differences of sums as large as the time.
                let tolerance = 1e-9 * expected + 1e-11;
                assert!((found - expected).abs() <= tolerance, "{i} {j}: {found} is not {expected}");
            }
        }
    }
}

/// Returns a number of mean 0 and variance 1.
fn random_number(random: &mut ChaCha8Rng) -> f64 {
    (random.random::<f64>() - 0.5) * 12f64.sqrt()
}

/// Simulates an element at each of the times, with a constant drift.
fn simulated(random: &mut ChaCha8Rng, times: &[u64], trajectory: Trajectory) -> Vec<f64> {
    let speed = trajectory.drift.sqrt() * random_number(random);
    let mut walked = 0.0;
    let mut before = times[0];
    let mut at = |&time: &u64| {
        walked += (trajectory.walk * (time - before) as f64).sqrt() * random_number(random);
        before = time;
        speed * time as f64 + walked + trajectory.white.sqrt() * random_number(random)
    };
    times.iter().map(&mut at).collect()
}

#[test]
fn simulated_elements_are_measured_and_fitted() {
    let (times, sources, system) = system();
    let truth = Trajectory { drift: 2e-5, walk: 0.01, white: 3.0 };
    let weights: Vec<Vec<f64>> = sources.iter().map(|source| weights(source, &times)).collect();
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let elements = 20_000;
    let mut values = vec![Vec::with_capacity(elements); sources.len()];
    for _ in 0..elements {
        let element = simulated(&mut random, &times, truth);
        for (values, weights) in values.iter_mut().zip(&weights) {
            values.push(weights.iter().zip(&element).map(|(w, v)| w * v).sum());
        }
    }
    // Exact values: no movement is taken for rounding.
    let sample = Sample { ulps: vec![vec![1e-12; elements]; sources.len()], values, weights: vec![1.0; elements] };
    let measured = measure(&sample, &[vec![0..5000], vec![5000..elements]]);
    let direct = |i: usize, j: usize| {
        let pairs = sample.values[i].iter().zip(&sample.values[j]);
        pairs.map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / elements as f64
    };
    for (i, j) in [(0, 1), (3, 8), (9, 2)] {
        assert!((measured.moved[(i, j)] / direct(i, j) - 1.0).abs() < 1e-9);
        let d = difference(&weights[i], &weights[j]);
        let straight = times.iter().zip(&d).map(|(&t, d)| t as f64 * d).sum::<f64>().powi(2);
        let expected = Trajectory { drift: 0.0, ..truth }.mean_square(&times, &vec![1.0; times.len()], &d)
            + truth.drift * straight;
        // Six deviations of a mean square over the elements.
        let tolerance = 6.0 * (2.0 / elements as f64).sqrt();
        assert!((direct(i, j) / expected - 1.0).abs() < tolerance, "{i} {j}: {} is not {expected}", direct(i, j));
    }
    let forms = QuadraticForms::new(system.updates().unwrap());
    let fitted = Trajectory::fit(system.updates().unwrap(), &forms, &measured);
    for (found, expected) in [(fitted.drift, truth.drift), (fitted.walk, truth.walk), (fitted.white, truth.white)] {
        assert!((found / expected - 1.0).abs() < 0.1, "{fitted:?}");
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
fn fit_recovers_known_variances() {
    let (_, sources, system) = system();
    let forms = QuadraticForms::new(system.updates().unwrap());
    for truth in [[1.0, 0.0, 0.0], [0.0, 1e-9, 0.0], [0.0, 0.0, 5.0], [1e-6, 1e-3, 0.3], [0.0; 3]] {
        let moved = Mat::from_fn(sources.len(), sources.len(), |i, j| {
            forms.between(i, j).iter().zip(truth).map(|(form, variance)| form * variance).sum::<f64>()
        });
        let fitted = Trajectory::fit(system.updates().unwrap(), &forms, &exact(moved.clone()));
        for (found, expected) in [fitted.drift, fitted.walk, fitted.white].into_iter().zip(truth) {
            // A variance of 0 is found up to the rounding of the others.
            let most = moved.norm_max();
            assert!((found - expected).abs() <= 1e-6 * expected + 1e-12 * most, "{fitted:?} is not {truth:?}");
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
    let moved = |i: usize, j: usize| QuadraticForms::new(system.updates().unwrap()).between(i, j)[1] * 1e-3;
    let n = sources.len();
    let model = |rounding: f64| {
        let rounding = Mat::from_fn(n, n, |i, j| if i == j { rounding } else { 0.0 });
        ErrorModel::new(&system, alone(Measured { moved: Mat::from_fn(n, n, moved), rounding })).unwrap()
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
        let other = ErrorModel::new(&other, alone(Measured { moved: Mat::from_fn(n, n, moved), rounding })).unwrap();
        let other = other.solve(&target, rho).unwrap().expected.total();
        assert!(other > 0.9 * quiet.expected.total(), "{rho}: {other} {}", quiet.expected.total());
    }
}

/// A slow group gains from a regularisation that would make a fast one much worse.
#[test]
fn regularisation_does_not_help_one_group_by_hurting_another() {
    let (_, sources, system) = system();
    let forms = QuadraticForms::new(system.updates().unwrap());
    let n = sources.len();
    let measured = |walk: f64| Measured {
        moved: Mat::from_fn(n, n, |i, j| forms.between(i, j)[1] * walk),
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
    assert!((moved(&[vec![2..3]]) - 9.0).abs() < 1e-12);
}
