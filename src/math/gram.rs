//! Inner products of averages: `<a, b> = sum_k a_k b_k / delta_k` over the updates.

use super::chain::Decays;

/// The inner product of two power-function profiles under dense updates, snapshots at `at_a` and `at_b`: Karras eq. 151.
pub fn power_function_gram(gamma_a: f64, at_a: f64, gamma_b: f64, at_b: f64) -> f64 {
    if at_a > at_b {
        return power_function_gram(gamma_b, at_b, gamma_a, at_a);
    }
    (gamma_a + 1.0) * (gamma_b + 1.0) * (at_a / at_b).powf(gamma_b) / ((gamma_a + gamma_b + 1.0) * at_b)
}

/// `S(t_k) = beta_a beta_b S(t_{k-1}) + (1-beta_a)(1-beta_b)/delta_k` at each of the updates `marks`, which grow.
pub(super) fn recurrence(a: &Decays, b: &Decays, intervals: &[f64], marks: &[usize]) -> Vec<f64> {
    at_marks(marks, |s, k| a.decay[k] * b.decay[k] * s + a.gain[k] * b.gain[k] / intervals[k])
}

/// `S(t_k) = beta S(t_{k-1}) + (1-beta) r_k / delta_k` at each of the updates `marks`: against a target's weights `r`.
pub(super) fn target_recurrence(a: &Decays, target: &[f64], intervals: &[f64], marks: &[usize]) -> Vec<f64> {
    at_marks(marks, |s, k| a.decay[k] * s + a.gain[k] * target[k] / intervals[k])
}

/// Goes through the updates, `s` from the one before and the index of the next, and keeps `s` at each mark.
fn at_marks(marks: &[usize], step: impl Fn(f64, usize) -> f64) -> Vec<f64> {
    let (mut s, mut next) = (0.0, 0);
    let mut advance = |mark: usize| {
        s = (next..=mark).fold(s, &step);
        next = mark + 1;
        s
    };
    marks.iter().map(|&mark| advance(mark)).collect()
}

/// The product of the decays after each mark up to the next: how a snapshot fades into the one after it.
pub(super) fn fading(a: &Decays, marks: &[usize]) -> Vec<f64> {
    marks.windows(2).map(|pair| a.decay[pair[0] + 1..=pair[1]].iter().product()).collect()
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
        let (a, b) =
            (Chain::Tracked(Profile::sigma_rel(0.1).unwrap()), Chain::Counter { gamma: 2.0, stride: 7, offset: 2 });
        let (da, db) = (a.decays(&times), b.decays(&times));
        let marks = [0, 10, 11, 150, 299];
        let products = recurrence(&da, &db, &intervals, &marks);
        let fades = fading(&db, &marks);
        for (i, &mark) in marks.iter().enumerate() {
            let wa = a.densities(&times[..=mark]);
            let exact = direct(&wa, &b.densities(&times[..=mark]), &intervals);
            assert!((products[i] - exact).abs() <= 1e-13 * exact);
            let at_target = target_recurrence(&da, &b.densities(&times), &intervals, &marks)[i];
            let later = direct(&wa, &b.densities(&times), &intervals);
            assert!((at_target - later).abs() <= 1e-13 * later);
            let faded = products[i] * fades[i..].iter().product::<f64>();
            assert!((faded - later).abs() <= 1e-12 * later, "{faded} {later}");
        }
    }

    #[test]
    fn dense_updates_approach_the_closed_form() {
        let times: Vec<u64> = (1..=40_000).collect();
        let intervals = vec![1.0; times.len()];
        let (ga, gb) = (6.9, 0.4);
        let chain = |gamma| Chain::Tracked(Profile::gamma(gamma).unwrap()).decays(&times);
        let marks = [29_999, 39_999];
        let products = recurrence(&chain(ga), &chain(gb), &intervals, &marks);
        let same = power_function_gram(ga, 30_000.0, gb, 30_000.0);
        assert!((products[0] / same - 1.0).abs() < 1e-4);
        let faded = products[0] * fading(&chain(gb), &marks)[0];
        let closed = power_function_gram(ga, 30_000.0, gb, 40_000.0);
        assert!((faded / closed - 1.0).abs() < 1e-4);
        assert_eq!(closed, power_function_gram(gb, 40_000.0, ga, 30_000.0));
    }
}
