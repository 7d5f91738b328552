//! The solve against golden values and by identities.

use super::*;
use crate::math::{Schedule, Shape, Window};

#[derive(serde::Deserialize)]
struct Golden {
    cases: Vec<Case>,
    foreign: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    update_every: Option<u64>,
    checkpoint_every: Option<u64>,
    update_after_step: Option<u64>,
    steps: u64,
    at: u64,
    tracked: Vec<serde_json::Value>,
    snapshots: Vec<(usize, u64)>,
    targets: Vec<Target>,
}

#[derive(serde::Deserialize)]
struct Target {
    profile: serde_json::Value,
    relative_error: f64,
    noise_gain: f64,
    weights: Vec<f64>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../tests/data/plans.json")).unwrap()
}

/// Parses a profile of the golden file, which has power functions by `sigma_rel`.
fn profile(value: &serde_json::Value) -> Profile {
    match value["sigma_rel"].as_f64() {
        Some(sigma_rel) => Profile::sigma_rel(sigma_rel).unwrap(),
        None => serde_json::from_value(value.clone()).unwrap(),
    }
}

fn sources(chains: &[Chain], snapshots: &[(usize, u64)]) -> Vec<ChainSource> {
    let label = |&(index, step): &(usize, u64)| format!("snapshot {index}.{step}");
    snapshots.iter().map(|s| ChainSource { chain: chains[s.0].clone(), step: s.1, label: label(s) }).collect()
}

fn compare(case: &Case, history: &History, chains: &[Chain]) {
    let system = System::new(history, case.at, &sources(chains, &case.snapshots), 0.0).unwrap();
    for target in &case.targets {
        let solution = system.solve(&profile(&target.profile)).unwrap();
        let name = format!("{} steps, {}", case.steps, target.profile);
        let tolerance = 1e-9 * target.noise_gain;
        for (x, expected) in solution.weights.iter().zip(&target.weights) {
            assert!((x - expected).abs() <= tolerance, "{name}: weight {x} is not {expected}");
        }
        assert_eq!(solution.weights.len(), target.weights.len());
        let difference = (solution.relative_error - target.relative_error).abs();
        assert!(difference <= 1e-9, "{name}: error {} is not {}", solution.relative_error, target.relative_error);
        assert!((solution.noise_gain - target.noise_gain).abs() <= tolerance, "{name}: {}", solution.noise_gain);
        assert!(solution.condition > 1.0 && solution.condition.is_finite());
    }
}

#[test]
fn golden_plans_are_reproduced() {
    let golden = golden();
    assert_eq!(golden.cases.len(), 8);
    for case in golden.cases {
        let schedule = Schedule {
            update_every: case.update_every.unwrap(),
            update_after_step: case.update_after_step.unwrap(),
            checkpoint_every: case.checkpoint_every.unwrap(),
            snapshot_growth: None,
        };
        let chains: Vec<Chain> = case.tracked.iter().map(|p| Chain::Tracked(profile(p))).collect();
        compare(&case, &schedule.updates(case.steps).unwrap(), &chains);
    }
}

#[test]
fn golden_foreign_plans_are_reproduced() {
    let golden = golden();
    assert_eq!(golden.foreign.len(), 1);
    for case in golden.foreign {
        let history = History::from_times((0..=(case.steps - 100) / 10).map(|k| 100 + 10 * k)).unwrap();
        let gamma = |p: &serde_json::Value| profile(p).as_gamma().unwrap();
        let chains: Vec<Chain> =
            case.tracked.iter().map(|p| Chain::Counter { gamma: gamma(p), stride: 10, offset: 2 }).collect();
        compare(&case, &history, &chains);
    }
}

fn power(sigma_rel: f64) -> Profile {
    Profile::sigma_rel(sigma_rel).unwrap()
}

fn tracked(sigma_rels: &[f64]) -> Vec<Chain> {
    sigma_rels.iter().map(|&s| Chain::Tracked(power(s))).collect()
}

/// Two profiles, a snapshot every 1,000 of 20,000 steps.
fn usual() -> (History, Vec<ChainSource>) {
    let steps: Vec<(usize, u64)> = (0..2).flat_map(|p| (1..=20).map(move |i| (p, 1000 * i))).collect();
    let history = Schedule::default().updates(20_000).unwrap();
    (history, sources(&tracked(&[0.05, 0.28]), &steps))
}

#[test]
fn stored_profile_gets_weight_one() {
    let (history, sources) = usual();
    for at in [1000, 7000, 20_000] {
        let sources: Vec<ChainSource> = sources.iter().filter(|s| s.step <= at).cloned().collect();
        let system = System::new(&history, at, &sources, 0.0).unwrap();
        for (sigma_rel, chain) in [(0.05, 0), (0.28, 1)] {
            let solution = system.solve(&power(sigma_rel)).unwrap();
            assert!(solution.relative_error < 1e-11, "{}", solution.relative_error);
            let own = sources.iter().position(|s| s.step == at && s.chain == tracked(&[0.05, 0.28])[chain]).unwrap();
            // At the first snapshot both averages are close: weights are exact up to the condition number.
            assert!((solution.weights[own] - 1.0).abs() < 1e-9);
        }
    }
}

#[test]
fn weights_sum_to_one_and_reported_error_equals_the_sum_over_updates() {
    let (history, sources) = usual();
    let system = System::new(&history, 20_000, &sources, 0.0).unwrap();
    let times = history.times();
    let window = crate::math::Window::Steps(3333.0);
    for target in [power(0.11), Profile::beta(0.9995).unwrap(), Profile::uniform(window).unwrap()] {
        let solution = system.solve(&target).unwrap();
        assert!((solution.weights.iter().sum::<f64>() - 1.0).abs() < 1e-13);
        let mut blend = vec![0.0; times.len()];
        let mut reached = 0.0;
        for (source, x) in sources.iter().zip(&solution.weights) {
            let updates = &times[..times.partition_point(|&t| t <= source.step)];
            for (sum, weight) in blend.iter_mut().zip(source.chain.weights(updates)) {
                *sum += x * weight;
            }
        }
        let mut square = 0.0;
        let mut norm = 0.0;
        for (k, &time) in times.iter().enumerate() {
            let share = target.cumulative(time as f64, 20_000.0);
            square += (blend[k] - (share - reached)).powi(2) / 10.0;
            norm += (share - reached).powi(2) / 10.0;
            reached = share;
        }
        let error = (square / norm).sqrt();
        assert!((error - solution.relative_error).abs() < 1e-9 * error, "{error} {}", solution.relative_error);
    }
}

#[test]
fn changed_weights_increase_the_error() {
    let (history, sources) = usual();
    let system = System::new(&history, 20_000, &sources, 0.0).unwrap();
    let InnerProducts::Updates(updates) = &system.products else { unreachable!() };
    let target = updates.target(&power(0.1), 20_000);
    let error = |x: &[f64]| updates.norm(&updates.residual(x, &target)) / updates.norm(&target);
    let best = system.solve(&power(0.1)).unwrap();
    for i in 0..sources.len() {
        for step in [1e-3, -1e-3] {
            let mut moved = best.weights.clone();
            moved[i] += step;
            moved[(i + 7) % sources.len()] -= step;
            assert!(error(&moved) > best.relative_error);
        }
    }
}

#[test]
fn regularisation_lowers_noise_gain_and_raises_error() {
    let (history, sources) = usual();
    let plain = System::new(&history, 20_000, &sources, 0.0).unwrap().solve(&power(0.03)).unwrap();
    let quiet = System::new(&history, 20_000, &sources, 1e-3).unwrap().solve(&power(0.03)).unwrap();
    assert!(quiet.noise_gain < 0.8 * plain.noise_gain, "{} {}", quiet.noise_gain, plain.noise_gain);
    assert!(quiet.relative_error > plain.relative_error);
    assert!((quiet.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
}

#[test]
fn closed_form_agrees_with_dense_updates() {
    let history = History::from_times(1..=20_000).unwrap();
    let (_, sources) = usual();
    let dense = System::new(&history, 20_000, &sources, 0.0).unwrap();
    let closed = System::closed_form(20_000, &sources, 0.0).unwrap();
    for sigma_rel in [0.08, 0.15, 0.25] {
        let a = dense.solve(&power(sigma_rel)).unwrap();
        let b = closed.solve(&power(sigma_rel)).unwrap();
        assert!((a.relative_error - b.relative_error).abs() < 1e-2 * a.relative_error);
        let largest = a.weights.iter().zip(&b.weights).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(largest < 1e-2 * a.noise_gain, "{largest}");
    }
    assert!(closed.solve(&Profile::beta(0.99).unwrap()).is_err());
}

#[test]
fn repeated_source_error_names_both() {
    let (history, mut sources) = usual();
    sources.push(ChainSource { label: "the copy".into(), ..sources[3].clone() });
    let text = System::new(&history, 20_000, &sources, 0.0).err().unwrap().to_string();
    assert!(text.contains("snapshot 0.4000") && text.contains("the copy") && text.contains("same profile"), "{text}");
}

#[test]
fn profiles_of_equal_values_share_one_weight() {
    // After the first update every average is a copy of the parameters.
    let history = Schedule { update_after_step: 1000, ..Schedule::default() }.updates(3000).unwrap();
    let snapshots: Vec<(usize, u64)> = (0..2).flat_map(|p| (1..=3).map(move |i| (p, 1000 * i))).collect();
    let sources = sources(&tracked(&[0.05, 0.28]), &snapshots);
    let mut without = sources.clone();
    without.remove(3);
    let solve =
        |sources: &[ChainSource]| System::new(&history, 3000, sources, 0.0).unwrap().solve(&power(0.15)).unwrap();
    let mut all = solve(&sources);
    let five = solve(&without);
    assert_eq!(all.weights.remove(3), 0.0);
    assert_eq!(all.weights, five.weights);
    assert_eq!(all.relative_error, five.relative_error);
}

#[test]
fn raw_checkpoints_blend_to_a_plain_mean() {
    let history = History::from_times([10, 20, 30, 40]).unwrap();
    let sources: Vec<ChainSource> =
        [10, 20, 30, 40].map(|step| ChainSource { chain: Chain::Raw, step, label: step.to_string() }).to_vec();
    let solution = System::new(&history, 40, &sources, 0.0).unwrap().solve(&Profile::gamma(0.0).unwrap()).unwrap();
    assert!(solution.weights.iter().all(|x| (x - 0.25).abs() < 1e-14), "{:?}", solution.weights);
}

/// Applies one step's decay every ten steps, as some tools do, with weights solved for the exact decay.
///
/// A ramp from 0 to 1 over 20,000 steps, averaged at sigma_rel 0.15, is 0.82.
#[test]
fn decay_that_ignores_the_interval_gives_a_wrong_average() {
    let (history, sources) = usual();
    let times = history.times();
    let weights = System::new(&history, 20_000, &sources, 0.0).unwrap().solve(&power(0.15)).unwrap().weights;
    let ramp = |chain: &Chain, step: u64| -> f64 {
        let updates = &times[..times.partition_point(|&t| t <= step)];
        chain.weights(updates).iter().zip(updates).map(|(w, &t)| w * t as f64 / 20_000.0).sum()
    };
    let ignoring = |source: &ChainSource| {
        let Chain::Tracked(profile) = &source.chain else { unreachable!() };
        Chain::Counter { gamma: profile.as_gamma().unwrap(), stride: 10, offset: 2 }
    };
    let exact: f64 = sources.iter().zip(&weights).map(|(s, x)| x * ramp(&s.chain, s.step)).sum();
    let wrong: f64 = sources.iter().zip(&weights).map(|(s, x)| x * ramp(&ignoring(s), s.step)).sum();
    assert!((exact - 0.82).abs() < 0.005, "{exact}");
    assert!((wrong - 0.24).abs() < 0.01, "{wrong}");
}

#[test]
fn source_between_updates_is_an_error() {
    let (history, mut sources) = usual();
    sources[2].step += 1;
    let text = System::new(&history, 20_000, &sources, 0.0).err().unwrap().to_string();
    assert!(text.contains("step 3001, where there was no update"), "{text}");
}

/// Times the solve in turns with a product of two matrices of the same size by three plain loops.
///
/// The ratio does not depend on the speed and load of the machine.
#[test]
fn solve_of_512_snapshots_is_faster_than_a_plain_matrix_product() {
    let steps: Vec<(usize, u64)> = (0..2).flat_map(|p| (1..=256).map(move |i| (p, 1000 * i))).collect();
    let history = Schedule::default().updates(256_000).unwrap();
    let sources = sources(&tracked(&[0.05, 0.28]), &steps);
    let seconds = |work: &dyn Fn()| {
        let start = std::time::Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    let solve = || {
        let solution = System::new(&history, 256_000, &sources, 0.0).unwrap().solve(&power(0.15)).unwrap();
        assert!(solution.relative_error < 0.01);
    };
    let n = sources.len();
    let matrix = vec![1.5; n * n];
    let multiply = || {
        let entry = |i: usize, j: usize| (0..n).map(|k| matrix[i * n + k] * matrix[k * n + j]).sum::<f64>();
        let product: Vec<f64> = (0..n * n).map(|at| entry(at / n, at % n)).collect();
        assert_eq!(std::hint::black_box(product)[n], 2.25 * n as f64);
    };
    let turns: Vec<(f64, f64)> = (0..5).map(|_| (seconds(&solve), seconds(&multiply))).collect();
    let solved = turns.iter().map(|turn| turn.0).fold(f64::MAX, f64::min);
    let multiplied = turns.iter().map(|turn| turn.1).fold(f64::MAX, f64::min);
    println!("solve {solved} s, product {multiplied} s");
    assert!(solved < multiplied, "solve {solved} s, product {multiplied} s");
}

/// Solves over many snapshots of close profiles, for which the factors have no correct digits.
///
/// Stored profiles are reproduced, and no target has a larger error than its nearest snapshot.
#[test]
fn nearly_dependent_snapshots_are_solved_with_a_ridge() {
    let tracked = [0.139, 0.263, 0.28].map(|s| Profile::sigma_rel(s).unwrap());
    let schedule = Schedule { checkpoint_every: 310, ..Schedule::default() };
    let steps = schedule.snapshots(40_000);
    let history = schedule.updates(40_000).unwrap();
    let source = |step: u64, profile: &Profile| ChainSource {
        chain: Chain::Tracked(profile.clone()),
        step,
        label: format!("{profile} at {step}"),
    };
    let sources: Vec<ChainSource> = steps.iter().flat_map(|&t| tracked.iter().map(move |p| source(t, p))).collect();
    let at = steps[steps.len() - 1];
    let system = System::new(&history, at, &sources, 0.0).unwrap();
    for (sigma_rel, most) in [(0.139, 1e-6), (0.263, 1e-6), (0.28, 1e-6), (0.2, 1e-3), (0.15, 1e-3), (0.12, 0.01)] {
        let solution = system.solve(&Profile::sigma_rel(sigma_rel).unwrap()).unwrap();
        assert!(solution.relative_error < most, "{sigma_rel}: {}", solution.relative_error);
        assert!((solution.weights.iter().sum::<f64>() - 1.0).abs() < 1e-6);
    }
}

/// Creates the system of a history whose updates are put into about `limit` groups.
fn grouped_system(history: &History, at: u64, sources: &[ChainSource], limit: usize) -> System {
    let updates = Updates::grouped(history, at, sources, |_| limit).unwrap();
    assert!(updates.times.len() <= 2 * limit);
    let gram = updates.gram();
    System::factor(at, InnerProducts::Updates(updates), gram, sources, 0.0)
}

/// Returns the relative error of a blend with these weights, summed over each update.
fn error_of(system: &System, weights: &[f64], profile: &Profile) -> f64 {
    let updates = system.updates().unwrap();
    let target = updates.target(profile, system.at);
    updates.norm(&updates.residual(weights, &target)) / updates.norm(&target)
}

#[test]
fn grouped_updates_give_the_best_weights_and_the_true_error() {
    let histories =
        ["[[10,3000000,10]]", "[[7,2100000,7],[2101000,3000000,1000]]", "[[3,300000,3],[300100,3000000,100]]"];
    for text in histories {
        let history: History = serde_json::from_str(text).unwrap();
        let at = history.last().unwrap();
        let steps: Vec<u64> = (1..=12).map(|i| history.until(at / 12 * i).last().unwrap()).collect();
        let chains =
            [Chain::Tracked(power(0.05)), Chain::Tracked(power(0.28)), Chain::Tracked(Profile::beta(0.9999).unwrap())];
        let snapshots: Vec<(usize, u64)> = (0..3).flat_map(|i| steps.iter().map(move |&step| (i, step))).collect();
        let sources = sources(&chains, &snapshots);
        let exact = System::new(&history, at, &sources, 0.0).unwrap();
        let grouped = grouped_system(&history, at, &sources, 40_000);
        let fraction = Window::Fraction(0.15);
        let decay = |shape| Profile::lr_decay(shape, fraction).unwrap();
        // A group is 0.4% of the distance to the next snapshot, and smooth densities are off by about its square.
        // The step of a uniform profile and the infinite slope of a decay by 1-sqrt fall into a group.
        for (profile, tolerance) in [
            (power(0.15), 4e-6),
            (Profile::half_life(100_000.0).unwrap(), 4e-6),
            (Profile::uniform(fraction).unwrap(), 1e-4),
            (Profile::linear(fraction).unwrap(), 1e-4),
            (decay(Shape::Cosine), 1e-4),
            (decay(Shape::OneMinusSqrt), 1e-4),
        ] {
            let best = exact.solve(&profile).unwrap().relative_error;
            let found = grouped.solve(&profile).unwrap();
            let truth = error_of(&exact, &found.weights, &profile);
            assert!(truth <= best * (1.0 + tolerance), "{text}, {profile}: {truth} instead of {best}");
            let predicted = found.relative_error;
            assert!(
                (predicted / truth - 1.0).abs() <= 10.0 * tolerance,
                "{text}, {profile}: {predicted} is not {truth}"
            );
        }
    }
}

#[test]
fn a_billion_updates_are_solved_as_dense_ones_within_a_second() {
    let at = 1_000_000_000;
    let history: History = serde_json::from_str("[[1,1000000000,1]]").unwrap();
    let chains = tracked(&[0.05, 0.28]);
    let snapshots: Vec<(usize, u64)> = (0..40).map(|i| (i % 2, at / 20 * (i as u64 / 2 + 1))).collect();
    let sources = sources(&chains, &snapshots);
    let begun = std::time::Instant::now();
    let solution = System::new(&history, at, &sources, 0.0).unwrap().solve(&power(0.15)).unwrap();
    let seconds = begun.elapsed().as_secs_f64();
    let dense = System::closed_form(at, &sources, 0.0).unwrap().solve(&power(0.15)).unwrap();
    let error = solution.relative_error / dense.relative_error;
    assert!((error - 1.0).abs() < 1e-4, "{} is not {}", solution.relative_error, dense.relative_error);
    for (weight, expected) in solution.weights.iter().zip(&dense.weights) {
        assert!((weight - expected).abs() < 1e-4, "{weight} is not {expected}");
    }
    assert!(seconds < 1.0, "{seconds} s");
}
