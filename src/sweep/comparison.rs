//! Comparison of lengths whose evaluations were repeated.
//!
//! The model is `s_ij = f_i + b_j + e_ij`: the score of length `i` in repeat `j` is the length's own, a part that all
//! lengths share in the repeat (a seed, a subset of the data), and noise. If the evaluation does not use the number of
//! the repeat, `b_j` is noise too, and all below holds as well.

use super::curve::Curve;
use super::points::{Point, points};
use super::trial::Trial;
use crate::math::{Profile, upper_quantile};

/// Probability that the best of the evaluated lengths is not among those called as good as the best.
const RISK: f64 = 0.05;

/// Share of a length's own score beside the parabola's value. It decides between lengths that differ by little.
const OWN_SHARE: f64 = 0.1;

/// Comparison of the lengths by one metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Standard error of a mean, without what all lengths share in a repeat.
    pub standard_error: f64,
    /// Profiles that the repeats do not distinguish from the best one, in the order of their evaluation. The best one
    /// is among them.
    ///
    /// With a probability of 95%, the truly best one of all that were evaluated is among them. If all are equally good,
    /// they are all lengths with the same probability.
    pub as_good: Vec<Profile>,
    /// The one of them whose neighbours agree: nine tenths of the value of a parabola through them and their
    /// neighbours, and one tenth of its own score, are the best.
    pub best: Profile,
}

/// Compares the trials by a metric. Returns `None` without two trials that have two repeats each.
pub(super) fn compare(curve: Curve<'_>) -> Option<Comparison> {
    let scored: Vec<&Trial> = curve.trials().iter().filter(|trial| curve.score(trial).is_some()).collect();
    let values: Vec<Vec<f64>> = scored.iter().map(|trial| trial.values(curve.metric())).collect();
    let repeats = values.iter().map(Vec::len).min().filter(|repeats| *repeats > 1 && scored.len() > 1)?;
    let (deviation, df) = residual(&values, repeats);
    let standard_error = deviation / (repeats as f64).sqrt();
    let raw = curve.best()?;
    let best = curve.score(raw)?;
    // Comparison with the best (Hsu, Multiple Comparisons, chapter 4), with the bound of Bonferroni.
    let others = (scored.len() - 1) as f64;
    let margin_at = |tail: f64| upper_quantile(tail, df) * 2f64.sqrt() * standard_error;
    let loss = |trial: &Trial| curve.score(trial).map_or(f64::INFINITY, |score| curve.sign() * (score - best));
    let spread = scored.iter().map(|trial| loss(trial)).fold(0.0, f64::max);
    // If all pairs are alike, so are all lengths.
    let alike = margin_at(RISK / (others * (others + 1.0)));
    let margin = if spread <= alike { spread } else { margin_at(RISK / others) };
    let is_as_good = |trial: &Trial| loss(trial) <= margin;
    let as_good: Vec<Profile> =
        scored.iter().filter(|trial| is_as_good(trial)).map(|trial| trial.profile.clone()).collect();
    let smooth = smooth_best(curve, standard_error, &is_as_good).unwrap_or(raw);
    Some(Comparison { standard_error, as_good, best: smooth.profile.clone() })
}

/// Standard deviation of the noise and its degrees of freedom, from the residuals of lengths and repeats.
fn residual(values: &[Vec<f64>], repeats: usize) -> (f64, u32) {
    let n = values.len() as f64;
    let r = repeats as f64;
    let rows: Vec<f64> = values.iter().map(|row| row[..repeats].iter().sum::<f64>() / r).collect();
    let columns: Vec<f64> = (0..repeats).map(|j| values.iter().map(|row| row[j]).sum::<f64>() / n).collect();
    let whole = rows.iter().sum::<f64>() / n;
    let square = |(i, j): (usize, usize)| (values[i][j] - rows[i] - columns[j] + whole).powi(2);
    let sum: f64 = (0..values.len()).flat_map(|i| (0..repeats).map(move |j| (i, j))).map(square).sum();
    let df = (values.len() - 1) * (repeats - 1);
    ((sum / df as f64).sqrt(), u32::try_from(df).unwrap_or(u32::MAX))
}

/// Returns the trial among those as good as the best that is best in a parabola, with a small share of its own score.
///
/// The parabola is fitted to them and one neighbour at each side, as far as they follow one within the noise. Returns
/// `None` if fewer than four do.
fn smooth_best<'a>(curve: Curve<'a>, standard_error: f64, is_as_good: &dyn Fn(&Trial) -> bool) -> Option<&'a Trial> {
    let points: Vec<Point<'a>> = points(curve)?.into_iter().filter(|point| point.score.is_some()).collect();
    let best = curve.best()?;
    let centre = points.iter().position(|point| point.trial.profile == best.profile)?;
    let first = points.iter().position(|point| is_as_good(point.trial))?.saturating_sub(1);
    let last = points.iter().rposition(|point| is_as_good(point.trial))?.saturating_add(1).min(points.len() - 1);
    let (mut first, mut last) = (first, last);
    let sign = curve.sign();
    loop {
        let window = &points[first..=last];
        let at: Vec<f64> = window.iter().map(|point| point.at).collect();
        let scores: Vec<f64> = window.iter().filter_map(|point| point.score).collect();
        let fitted = parabola(&at, &scores)?;
        let df = (window.len() - 3) as f64;
        let misfit: f64 = fitted.iter().zip(&scores).map(|(a, b)| ((a - b) / standard_error).powi(2)).sum();
        // Two standard deviations above the mean of a chi-squared variable.
        if misfit <= df + 2.0 * (2.0 * df).sqrt() {
            let good = window.iter().zip(&fitted).filter(|(point, _)| is_as_good(point.trial));
            let value = |(point, fitted): &(&Point<'_>, &f64)| {
                sign * ((1.0 - OWN_SHARE) * **fitted + OWN_SHARE * point.score.unwrap_or(f64::NAN))
            };
            return good.min_by(|a, b| value(a).total_cmp(&value(b))).map(|(point, _)| point.trial);
        }
        if points[last].at - points[centre].at > points[centre].at - points[first].at { last -= 1 } else { first += 1 }
    }
}

/// Returns the values of the least-squares parabola, by orthogonal polynomials. Returns `None` for fewer than four
/// points, which a parabola would follow whatever they are.
///
/// Forsythe 1957, "Generation and use of orthogonal polynomials for data-fitting with a digital computer".
fn parabola(at: &[f64], values: &[f64]) -> Option<Vec<f64>> {
    if at.len() < 4 {
        return None;
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let times = |a: &[f64]| at.iter().zip(a).map(|(at, a)| at * a).collect::<Vec<f64>>();
    let mut fitted = vec![0.0; at.len()];
    let mut before: Vec<f64> = vec![0.0; at.len()];
    let mut current = vec![1.0; at.len()];
    let mut norm_before = 1.0;
    for _ in 0..3 {
        let norm = dot(&current, &current);
        let share = dot(&current, values) / norm;
        fitted.iter_mut().zip(&current).for_each(|(fitted, current)| *fitted += share * current);
        let shifted = times(&current);
        let alpha = dot(&shifted, &current) / norm;
        let beta = norm / norm_before;
        let next = shifted.iter().zip(&current).zip(&before).map(|((s, c), b)| s - alpha * c - beta * b).collect();
        before = std::mem::replace(&mut current, next);
        norm_before = norm;
    }
    Some(fitted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parabola_is_exact_on_parabolas_and_orthogonal_to_residuals() {
        let at = [0.02, 0.03, 0.07, 0.071, 0.15, 0.28];
        let exact: Vec<f64> = at.iter().map(|x| 3.0 - 20.0 * x + 70.0 * x * x).collect();
        for (a, b) in parabola(&at, &exact).unwrap().iter().zip(&exact) {
            assert!((a - b).abs() < 1e-12);
        }
        let values = [1.0, -2.0, 0.5, 3.0, 2.0, -1.0];
        let fitted = parabola(&at, &values).unwrap();
        for power in 0..3 {
            let product: f64 =
                at.iter().zip(values.iter().zip(&fitted)).map(|(x, (v, f))| x.powi(power) * (v - f)).sum();
            assert!(product.abs() < 1e-12, "{power}: {product}");
        }
        assert!(parabola(&at[..3], &values[..3]).is_none());
    }

    #[test]
    fn shared_part_of_a_repeat_is_not_noise() {
        let own = [[0.1, -0.1, 0.0], [0.0, 0.1, -0.1], [-0.1, 0.0, 0.1]];
        let with = |shared: [f64; 3]| -> Vec<Vec<f64>> {
            let row = |row: &[f64; 3]| row.iter().zip(shared).map(|(own, shared)| own + shared).collect();
            own.iter().map(row).collect()
        };
        let (plain, df) = residual(&with([0.0; 3]), 3);
        let (paired, _) = residual(&with([5.0, -3.0, 1.0]), 3);
        // By hand: all means are 0, so the sum of squares is 0.06, on 4 degrees of freedom.
        assert!((plain - 0.015f64.sqrt()).abs() < 1e-12 && (paired - plain).abs() < 1e-12 && df == 4);
    }
}
