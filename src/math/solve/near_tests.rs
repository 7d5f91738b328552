//! Sources that are a target, and sources that nearly depend on each other.

use super::*;
use crate::math::{Schedule, Shape, Window};

fn power(sigma_rel: f64) -> Profile {
    Profile::sigma_rel(sigma_rel).unwrap()
}

fn source(chain: &Chain, step: u64) -> ChainSource {
    ChainSource { chain: chain.clone(), step, label: format!("{chain:?} at {step}") }
}

/// Returns `count` snapshots of each chain, every `every` steps.
fn sources(chains: &[Chain], every: u64, count: u64) -> Vec<ChainSource> {
    chains.iter().flat_map(|chain| (1..=count).map(|i| source(chain, every * i))).collect()
}

fn tracked(sigma_rels: &[f64]) -> Vec<Chain> {
    sigma_rels.iter().map(|&sigma_rel| Chain::Tracked(power(sigma_rel))).collect()
}

fn assert_is_source(system: &System, target: &Profile, index: usize) {
    let solution = system.solve(target).unwrap();
    let expected = unit_weights(solution.weights.len(), index);
    assert!(solution.weights == expected, "{target}: {:?}", solution.weights);
    assert!(solution.relative_error < EXACT && solution.noise_gain == 1.0, "{target}: {}", solution.relative_error);
}

/// Two averages of nearly the same length, with a snapshot at each update: a blend would have a noise gain of 47.
#[test]
fn stored_target_of_a_near_singular_set_is_its_snapshot() {
    for (every, count) in [(10, 60), (10, 100), (100, 100)] {
        let last = every * count;
        let history = Schedule { checkpoint_every: every, ..Schedule::default() }.updates(last).unwrap();
        let sources = sources(&tracked(&[0.1, 0.1001]), every, count);
        let system = System::new(&history, last, &sources, 0.0).unwrap();
        assert_is_source(&system, &power(0.1), count as usize - 1);
        assert_is_source(&system, &power(0.1001), 2 * count as usize - 1);
        let closed = System::closed_form(last, &sources, 0.0).unwrap();
        assert_is_source(&closed, &power(0.1), count as usize - 1);
        assert_is_source(&closed, &power(0.1001), 2 * count as usize - 1);
    }
}

/// Chains of each kind, with the target that each of them is.
#[test]
fn stored_target_of_any_kind_is_its_snapshot() {
    let history = Schedule { update_every: 1, checkpoint_every: 500, ..Schedule::default() }.updates(20_000).unwrap();
    let beta = Profile::beta(0.9995).unwrap();
    let half_life = Profile::half_life(3000.0).unwrap();
    let gamma = power(0.08).as_gamma().unwrap();
    let chains = [
        (Chain::Tracked(power(0.05)), power(0.05)),
        (Chain::Tracked(power(0.28)), power(0.28)),
        (Chain::Tracked(beta.clone()), beta),
        (Chain::Tracked(half_life.clone()), half_life),
        // With a counter that is the step, this decay is that of the power function.
        (Chain::Counter { gamma, stride: 1, offset: 1 }, power(0.08)),
        (Chain::Raw, Profile::uniform(Window::Steps(1.0)).unwrap()),
    ];
    let all: Vec<Chain> = chains.iter().map(|(chain, _)| chain.clone()).collect();
    let system = System::new(&history, 20_000, &sources(&all, 1000, 20), 0.0).unwrap();
    for (index, (_, target)) in chains.iter().enumerate() {
        assert_is_source(&system, target, 20 * index + 19);
    }
    // A longer history, whose updates are in groups.
    let history = Schedule { update_every: 1, ..Schedule::default() }.updates(200_000_000).unwrap();
    let sources = sources(&all[..4], 20_000_000, 10);
    let system = System::new(&history, 200_000_000, &sources, 0.0).unwrap();
    for (index, (_, target)) in chains[..4].iter().enumerate() {
        assert_is_source(&system, target, 10 * index + 9);
    }
}

#[test]
fn every_target_at_the_first_update_is_its_parameters() {
    let history = Schedule { update_after_step: 1000, ..Schedule::default() }.updates(1000).unwrap();
    let sources = sources(&tracked(&[0.05, 0.28]), 1000, 1);
    let system = System::new(&history, 1000, &sources, 0.0).unwrap();
    let window = Window::Fraction(0.5);
    for target in [power(0.05), power(0.28), power(0.15), Profile::lr_decay(Shape::Cosine, window).unwrap()] {
        assert_is_source(&system, &target, 0);
    }
}

/// A named regularisation prefers equal weights to a single one: the sum of its two terms is smaller.
#[test]
fn regularised_solve_minimises_both_terms_for_a_stored_target() {
    let history = Schedule::default().updates(20_000).unwrap();
    let sources = sources(&tracked(&[0.05, 0.28]), 1000, 20);
    let plain = System::new(&history, 20_000, &sources, 0.0).unwrap();
    let norm = {
        let updates = plain.updates().unwrap();
        updates.norm(&updates.target(&power(0.05), 20_000))
    };
    for rho in [1e-3 * norm, 0.1 * norm, norm] {
        let blend = System::new(&history, 20_000, &sources, rho).unwrap().solve(&power(0.05)).unwrap();
        let terms = |error: f64, gain: f64| (error * norm).powi(2) + (rho * gain).powi(2);
        let (found, alone) = (terms(blend.relative_error, blend.noise_gain), terms(0.0, 1.0));
        assert!(found < alone, "{rho}: {found} is not below {alone}");
    }
}

/// Lengths that differ by less and less: at some point their averages count as one.
///
/// Blends of factors without digits would be up to six times as far from the target as blends of the first average.
#[test]
fn more_snapshots_never_raise_the_error() {
    let history = Schedule::default().updates(100_000).unwrap();
    let targets = [0.1, 0.11, 0.15, 0.2].map(power);
    let errors = |lengths: &[f64]| {
        let system = System::new(&history, 100_000, &sources(&tracked(lengths), 5000, 20), 0.0).unwrap();
        targets.each_ref().map(|target| system.solve(target).unwrap().relative_error)
    };
    let one = errors(&[0.1]);
    for exponent in (4..=20).map(|i| 0.5 * f64::from(i)) {
        let ratio = 1.0 + 10f64.powf(-exponent);
        for lengths in [vec![0.1, 0.1 * ratio], vec![0.1, 0.1 * ratio, 0.1 * ratio.powf(2.5)]] {
            let several = errors(&lengths);
            for (several, one) in several.iter().zip(&one) {
                assert!(*several <= one + 1e-6, "{lengths:?}: {several} is above {one}");
            }
            // Averages that are not merged are used.
            if (ratio - 1.0) > 7e-6 {
                assert!(several[1] < 1e-4 && several[2] < 2e-3, "{lengths:?}: {several:?}");
            }
        }
    }
}

/// A target between two averages that are merged costs less than a millionth.
#[test]
fn merging_two_averages_costs_less_than_a_millionth() {
    let history = Schedule::default().updates(100_000).unwrap();
    for ratio in [3e-6, 1e-6, 1e-7, 1e-8].map(|distance| 1.0 + distance) {
        let sources = sources(&tracked(&[0.1, 0.1 * ratio]), 5000, 20);
        let system = System::new(&history, 100_000, &sources, 0.0).unwrap();
        for length in [0.1, 0.1 * ratio, 0.1 * ratio.sqrt()] {
            let solution = system.solve(&power(length)).unwrap();
            assert!(solution.relative_error < 1e-6 && solution.noise_gain < 1.001, "{ratio}, {length}: {solution:?}");
        }
    }
}
