//! Inner products of averages: `<a, b> = sum_k a_k b_k / delta_k` over the updates.

use super::chain::Decays;
use super::profile::Profile;

/// Returns the inner product of two power-function profiles under dense updates, in 1/steps: Karras eq. 151.
///
/// The snapshots are at `at_a` and `at_b`.
pub fn power_function_gram(gamma_a: f64, at_a: f64, gamma_b: f64, at_b: f64) -> f64 {
    if at_a > at_b {
        return power_function_gram(gamma_b, at_b, gamma_a, at_a);
    }
    (gamma_a + 1.0) * (gamma_b + 1.0) * (at_a / at_b).powf(gamma_b) / ((gamma_a + gamma_b + 1.0) * at_b)
}

/// Returns the inner product of two tracked averages at time `at`, under dense updates that start at `first`.
///
/// The product with an average of profile `b` at a later `T` is this times `F_T(at)` of `b`.
pub(super) fn dense_product(a: &Profile, b: &Profile, at: f64, first: f64) -> f64 {
    match (a.as_gamma(), b.as_gamma()) {
        (Some(gamma_a), Some(gamma_b)) => power_function_gram(gamma_a, at, gamma_b, at),
        (Some(gamma), None) => {
            first_update_product(a, b, at, first) + power_with_exponential(gamma, rate(b), at, first)
        }
        (None, Some(gamma)) => {
            first_update_product(a, b, at, first) + power_with_exponential(gamma, rate(a), at, first)
        }
        (None, None) => {
            let sum = rate(a) + rate(b);
            first_update_product(a, b, at, first) - rate(a) * rate(b) / sum * (-sum * (at - first)).exp_m1()
        }
    }
}

/// Returns the first update's part of an inner product; an exponential profile's mass before it belongs to it.
fn first_update_product(a: &Profile, b: &Profile, at: f64, first: f64) -> f64 {
    a.cumulative(first, at) * b.cumulative(first, at) / first
}

/// `lambda` of an exponential profile.
fn rate(profile: &Profile) -> f64 {
    profile.as_half_life().map_or(0.0, |steps| std::f64::consts::LN_2 / steps)
}

/// Integrates `(gamma+1) tau^gamma / T^(gamma+1) lambda e^(-lambda (T - tau))` from `first` to `T = at`.
///
/// Uses Simpson's rule, over the part in which the exponential is not negligible.
fn power_with_exponential(gamma: f64, lambda: f64, at: f64, first: f64) -> f64 {
    const HALVES: usize = 128;
    let span = (at - first).min(40.0 / lambda);
    let value = |i: usize| {
        let back = span * i as f64 / (2 * HALVES) as f64;
        (1.0 - back / at).powf(gamma) * (-lambda * back).exp()
    };
    let inner: f64 = (1..2 * HALVES).map(|i| if i % 2 == 1 { 4.0 * value(i) } else { 2.0 * value(i) }).sum();
    (gamma + 1.0) / at * lambda * span / (6 * HALVES) as f64 * (value(0) + inner + value(2 * HALVES))
}

/// Inner products of two chains at each of the updates `marks`, which increase.
///
/// `S(t_k) = beta_a beta_b S(t_{k-1}) + (1-beta_a)(1-beta_b)/delta_k`.
pub(super) fn recurrence(a: &Decays, b: &Decays, intervals: &[f64], marks: &[usize]) -> Vec<f64> {
    let mut sum = 0.0;
    at_marks(marks, |k| {
        sum = a.beta[k] * b.beta[k] * sum + a.one_minus_beta[k] * b.one_minus_beta[k] / intervals[k];
        sum
    })
}

/// Inner products of a chain, at each of the updates `marks`, with a target of weights `r_k`.
///
/// `S(t_k) = beta S(t_{k-1}) + (1-beta) r_k / delta_k`.
pub(super) fn target_recurrence(a: &Decays, target: &[f64], intervals: &[f64], marks: &[usize]) -> Vec<f64> {
    let mut sum = 0.0;
    at_marks(marks, |k| {
        sum = a.beta[k] * sum + a.one_minus_beta[k] * target[k] / intervals[k];
        sum
    })
}

/// Calls `step` for each update up to the last mark, and returns its values at the marks, which increase.
pub(super) fn at_marks(marks: &[usize], mut step: impl FnMut(usize) -> f64) -> Vec<f64> {
    let mut next = 0;
    let mut value = 0.0;
    let mut values = Vec::with_capacity(marks.len());
    for &mark in marks {
        for k in next..=mark {
            value = step(k);
        }
        values.push(value);
        next = mark + 1;
    }
    values
}

/// Returns the product of the decays after each mark, up to and including the next mark.
pub(super) fn decay_between(a: &Decays, marks: &[usize]) -> Vec<f64> {
    marks.windows(2).map(|pair| a.beta[pair[0] + 1..=pair[1]].iter().product()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Chain, Profile};
    use super::*;

    fn direct(a: &[f64], b: &[f64], intervals: &[f64]) -> f64 {
        a.iter().zip(b).zip(intervals).map(|((a, b), delta)| a * b / delta).sum()
    }

    #[test]
    fn recurrences_equal_the_direct_sum() {
        let times: Vec<u64> = (1..=300).map(|i| i * 7 + i % 3).collect();
        let intervals: Vec<f64> = (0..300).map(|k| (times[k] - if k > 0 { times[k - 1] } else { 0 }) as f64).collect();
        let a = Chain::Tracked(Profile::sigma_rel(0.1).unwrap());
        let b = Chain::Counter { gamma: 2.0, stride: 7, offset: 2 };
        let (da, db) = (a.decays(&times), b.decays(&times));
        let marks = [0, 10, 11, 150, 299];
        let products = recurrence(&da, &db, &intervals, &marks);
        let between = decay_between(&db, &marks);
        for (i, &mark) in marks.iter().enumerate() {
            let wa = a.weights(&times[..=mark]);
            let exact = direct(&wa, &b.weights(&times[..=mark]), &intervals);
            assert!((products[i] - exact).abs() <= 1e-13 * exact);
            let at_target = target_recurrence(&da, &b.weights(&times), &intervals, &marks)[i];
            let later = direct(&wa, &b.weights(&times), &intervals);
            assert!((at_target - later).abs() <= 1e-13 * later);
            let decayed = products[i] * between[i..].iter().product::<f64>();
            assert!((decayed - later).abs() <= 1e-12 * later, "{decayed} {later}");
        }
    }

    #[test]
    fn recurrence_approaches_dense_products() {
        let times: Vec<u64> = (1..=30_000).collect();
        let intervals = vec![1.0; times.len()];
        let all = [Profile::gamma(6.9), Profile::gamma(0.0), Profile::beta(0.999), Profile::half_life(20_000.0)];
        let all = all.map(Result::unwrap);
        for (a, b) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
            let decays = |profile: &Profile| Chain::Tracked(profile.clone()).decays(&times);
            let exact = recurrence(&decays(a), &decays(b), &intervals, &[29_999])[0];
            let dense = dense_product(a, b, 30_000.0, 1.0);
            assert!((dense / exact - 1.0).abs() < 1e-3, "{a}, {b}: {dense} is not {exact}");
        }
    }

    #[test]
    fn dense_updates_approach_the_closed_form() {
        let times: Vec<u64> = (1..=40_000).collect();
        let intervals = vec![1.0; times.len()];
        let ga = 6.9;
        let gb = 0.4;
        let chain = |gamma| Chain::Tracked(Profile::gamma(gamma).unwrap()).decays(&times);
        let marks = [29_999, 39_999];
        let products = recurrence(&chain(ga), &chain(gb), &intervals, &marks);
        let same = power_function_gram(ga, 30_000.0, gb, 30_000.0);
        assert!((products[0] / same - 1.0).abs() < 1e-4);
        let decayed = products[0] * decay_between(&chain(gb), &marks)[0];
        let closed = power_function_gram(ga, 30_000.0, gb, 40_000.0);
        assert!((decayed / closed - 1.0).abs() < 1e-4);
        assert_eq!(closed, power_function_gram(gb, 40_000.0, ga, 30_000.0));
    }
}
