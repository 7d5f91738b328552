//! The solve: weights of snapshots whose blend comes closest to a target profile.

mod density;
mod updates;

use faer::Mat;
use faer::linalg::solvers::{Lblt, Solve};

use super::chain::Chain;
use super::gram::power_function_gram;
use super::history::History;
use super::profile::Profile;
use crate::error::{Error, Result};

pub use density::Densities;
pub(super) use updates::Updates;

/// Two sources whose cosine differs from 1 by no more than this hold the same average to the last digits.
const SAME: f64 = 8.0 * f64::EPSILON;

/// Corrections after the first solve: the golden weights need one, the second is for worse conditions.
const REFINEMENTS: usize = 2;

/// What is added to the diagonal of the scaled matrix, from little to more, where its factors have no right digits without.
const STEADIER: [f64; 3] = [1e-14, 1e-12, 1e-10];

/// The most sources of one solve: their Gram matrix and its factors take 1.5 GB.
const MAX_SOURCES: usize = 8192;

/// An average that can be blended: a chain of updates up to `step`.
#[derive(Clone, Debug)]
pub struct Source {
    /// How it weighs the updates.
    pub chain: Chain,
    /// The time of its newest update.
    pub step: u64,
    /// What errors call it.
    pub label: String,
}

/// The weights of a target, and how good they are.
#[derive(Clone, Debug)]
pub struct Solution {
    /// One weight for each source, in their order; they sum to 1.
    pub weights: Vec<f64>,
    /// `||sum_i x_i p_i - r|| / ||r||`.
    pub relative_error: f64,
    /// `sqrt(sum_i x_i^2)`: by how much independent rounding errors of the sources are amplified.
    pub noise_gain: f64,
    /// The condition number of the scaled system in the 1-norm (Hager's estimate).
    pub condition: f64,
}

impl Solution {
    fn new(weights: Vec<f64>, relative_error: f64, kkt: &Kkt) -> Solution {
        let noise_gain = weights.iter().map(|x| x * x).sum::<f64>().sqrt();
        Solution { weights, relative_error, noise_gain, condition: kkt.condition }
    }
}

/// A solution, and `sum_i x_i p_i - r` on each update.
pub(super) struct Blend {
    pub solution: Solution,
    pub difference: Vec<f64>,
}

/// The factored system of one set of sources at one time: minimise `||sum_i x_i p_i - r||^2 + rho^2 ||x||^2` subject
/// to `sum_i x_i = 1`.
pub struct System {
    at: u64,
    products: Products,
    gram: Mat<f64>,
    /// The sources that are solved for.
    order: Vec<usize>,
    kkt: Kkt,
    /// For each source the position among those solved for; none for one that repeats another's values.
    kept: Vec<Option<usize>>,
    labels: Vec<String>,
}

/// Where inner products come from.
enum Products {
    /// Sums over the updates.
    Updates(Updates),
    /// Karras eq. 151: `(gamma, step)` of each source.
    PowerFunctions(Vec<(f64, f64)>),
}

impl System {
    /// The system of `sources`, all at or before `at`, over the updates of `history`.
    ///
    /// `rho` is the regularisation in the units of the inner product (1/steps); 0 for none.
    ///
    /// # Errors
    /// [`Error::NoSource`] without sources, [`Error::DuplicateSource`] for two of one profile and step,
    /// [`Error::History`] where a source's step is no update.
    pub fn new(history: &History, at: u64, sources: &[Source], rho: f64) -> Result<System> {
        check_distinct(sources)?;
        let updates = Updates::new(history, at, sources)?;
        let gram = updates.gram();
        Ok(System::factor(at, Products::Updates(updates), gram, sources, rho))
    }

    /// The system of power-function snapshots that carry no history: updates are taken as dense.
    ///
    /// # Errors
    /// As [`System::new`], and [`Error::History`] for a source that is no tracked power function.
    pub fn closed_form(at: u64, sources: &[Source], rho: f64) -> Result<System> {
        check_distinct(sources)?;
        let powers: Vec<(f64, f64)> = sources.iter().map(power_function).collect::<Result<_>>()?;
        let gram = Mat::from_fn(powers.len(), powers.len(), |i, j| {
            power_function_gram(powers[i].0, powers[i].1, powers[j].0, powers[j].1)
        });
        Ok(System::factor(at, Products::PowerFunctions(powers), gram, sources, rho))
    }

    fn factor(at: u64, products: Products, gram: Mat<f64>, sources: &[Source], rho: f64) -> System {
        let kept = drop_repeated(&gram);
        let order: Vec<usize> = (0..sources.len()).filter(|&i| kept[i].is_some()).collect();
        let kkt = Kkt::new(&gram, &order, rho, 0.0);
        let labels = sources.iter().map(|source| source.label.clone()).collect();
        System { at, products, gram, order, kkt, kept, labels }
    }

    /// The weights of `profile` at the system's time.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window longer than the time, [`Error::DependentSources`] where the sources are too
    /// much alike to be solved for.
    pub fn solve(&self, profile: &Profile) -> Result<Solution> {
        profile.check_at(self.at as f64)?;
        match &self.products {
            Products::Updates(updates) => {
                self.blend(updates, &updates.target(profile, self.at)).map(|blend| blend.solution)
            }
            Products::PowerFunctions(sources) => self.solve_closed_form(sources, profile),
        }
    }

    /// The updates that inner products are summed over; none where the sources carry no history.
    pub(super) fn updates(&self) -> Option<&Updates> {
        match &self.products {
            Products::Updates(updates) => Some(updates),
            Products::PowerFunctions(_) => None,
        }
    }

    /// The weights of a profile on the updates.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window longer than the time.
    pub(super) fn target(&self, updates: &Updates, profile: &Profile) -> Result<Vec<f64>> {
        profile.check_at(self.at as f64)?;
        Ok(updates.target(profile, self.at))
    }

    /// As [`System::solve`] for the weights of a target on the updates, with the difference that is left.
    ///
    /// Snapshots that lie too close together leave the factors without right digits. The same corrections then start from the
    /// factors of a steadier matrix; what still misses the target by more than a single source does is no solution.
    pub(super) fn blend(&self, updates: &Updates, target: &[f64]) -> Result<Blend> {
        let norm = updates.norm(target);
        let single = self.single_best(&updates.products(target), norm * norm);
        let sound = |blend: &Blend| self.kkt.ridge > 0.0 || blend.solution.relative_error <= single;
        let plain = self.solve_updates(updates, target, &self.kkt);
        if plain.as_ref().is_ok_and(sound) {
            return plain;
        }
        let rho = self.kkt.ridge.sqrt();
        let steadied =
            |&by: &f64| self.solve_updates(updates, target, &Kkt::new(&self.gram, &self.order, rho, by)).ok();
        let blends = STEADIER.iter().filter_map(steadied).filter(sound);
        let best = blends.min_by(|a, b| a.solution.relative_error.total_cmp(&b.solution.relative_error));
        best.ok_or_else(|| self.dependent())
    }

    /// The relative error of the source that comes closest to a target by itself, and a little for rounding: `products` are those
    /// with the target, `own` is its own square.
    fn single_best(&self, products: &[f64], own: f64) -> f64 {
        let distance = |i: usize| (self.gram[(i, i)] - 2.0 * products[i] + own) / own;
        (0..products.len()).map(|i| distance(i).max(0.0).sqrt()).fold(f64::INFINITY, f64::min) + 1e-6
    }

    /// As [`System::blend`], with another regularisation than the system's.
    pub(super) fn blend_with(&self, updates: &Updates, target: &[f64], rho: f64) -> Result<Blend> {
        self.solve_updates(updates, target, &Kkt::new(&self.gram, &self.order, rho, 0.0))
    }

    fn solve_updates(&self, updates: &Updates, target: &[f64], kkt: &Kkt) -> Result<Blend> {
        let mut weights = self.step(kkt, &updates.products(target), 1.0);
        for _ in 0..REFINEMENTS {
            // The gradient taken from the difference itself keeps the digits that the Gram matrix has squared away.
            let gradient = updates.products(&updates.difference(&weights, target));
            let right: Vec<f64> = gradient.iter().zip(&weights).map(|(g, x)| -g - kkt.ridge * x).collect();
            let correction = self.step(kkt, &right, 1.0 - weights.iter().sum::<f64>());
            weights.iter_mut().zip(correction).for_each(|(x, c)| *x += c);
        }
        self.check_sum(&weights)?;
        let difference = updates.difference(&weights, target);
        let relative_error = updates.norm(&difference) / updates.norm(target);
        Ok(Blend { solution: Solution::new(weights, relative_error, kkt), difference })
    }

    fn solve_closed_form(&self, sources: &[(f64, f64)], profile: &Profile) -> Result<Solution> {
        let (gamma, at) = (profile.as_gamma(), self.at as f64);
        let gamma = gamma.ok_or_else(|| {
            let why = format!("the snapshots carry no history of updates, and {profile} cannot be solved without one");
            Error::History(why)
        })?;
        let products: Vec<f64> = sources.iter().map(|&(g, t)| power_function_gram(g, t, gamma, at)).collect();
        let weights = self.step(&self.kkt, &products, 1.0);
        self.check_sum(&weights)?;
        let own = power_function_gram(gamma, at, gamma, at);
        let square = own + closed_form_distance(sources, &products, &weights);
        let relative_error = (square.max(0.0) / own).sqrt();
        let sound = self.kkt.ridge > 0.0 || relative_error <= self.single_best(&products, own);
        if sound { Ok(Solution::new(weights, relative_error, &self.kkt)) } else { Err(self.dependent()) }
    }

    /// The weights of all sources from those solved for.
    fn step(&self, kkt: &Kkt, right: &[f64], sum: f64) -> Vec<f64> {
        let solved_for = |(kept, value): (&Option<usize>, &f64)| kept.map(|_| *value);
        let right: Vec<f64> = self.kept.iter().zip(right).filter_map(solved_for).collect();
        let solved = kkt.solve(&right, sum);
        self.kept.iter().map(|kept| kept.map_or(0.0, |i| solved[i])).collect()
    }

    fn check_sum(&self, weights: &[f64]) -> Result<()> {
        let within = (weights.iter().sum::<f64>() - 1.0).abs() < 1e-6;
        if within { Ok(()) } else { Err(self.dependent()) }
    }

    /// Names the pair that is most alike.
    fn dependent(&self) -> Error {
        let place = |i: usize| self.kept.iter().position(|&kept| kept == Some(i)).unwrap_or(0);
        let (i, j, cosine) = self.kkt.most_alike();
        let (first, second) = (self.labels[place(i)].clone(), self.labels[place(j)].clone());
        Error::DependentSources { first, second, cosine }
    }
}

fn check_distinct(sources: &[Source]) -> Result<()> {
    if sources.is_empty() {
        return Err(Error::NoSource {
            wanted: "snapshot to blend".into(),
            remedy: "train until the first one is stored",
        });
    }
    if sources.len() > MAX_SOURCES {
        let reason = format!("{} snapshots are more than the {MAX_SOURCES} of one solve: keep fewer", sources.len());
        return Err(Error::Setting { option: "max_checkpoints", reason });
    }
    for (i, first) in sources.iter().enumerate() {
        for second in &sources[i + 1..] {
            if first.step == second.step && first.chain == second.chain {
                return Err(Error::DuplicateSource { first: first.label.clone(), second: second.label.clone() });
            }
        }
    }
    Ok(())
}

/// Numbers the sources that are solved for. Averages of different profiles can hold the same values (all do after the
/// first update); one of them then stands for all, and the others get weight 0.
fn drop_repeated(gram: &Mat<f64>) -> Vec<Option<usize>> {
    let mut kept: Vec<Option<usize>> = Vec::with_capacity(gram.nrows());
    let mut count = 0;
    for j in 0..gram.nrows() {
        let same = |i: usize| 1.0 - gram[(i, j)] / (gram[(i, i)] * gram[(j, j)]).sqrt() < SAME;
        let repeats = (0..j).any(|i| kept[i].is_some() && same(i));
        kept.push((!repeats).then_some(count));
        count += usize::from(!repeats);
    }
    kept
}

fn power_function(source: &Source) -> Result<(f64, f64)> {
    match &source.chain {
        Chain::Tracked(profile) if profile.as_gamma().is_some() => {
            Ok((profile.as_gamma().unwrap_or(0.0), source.step as f64))
        }
        _ => Err(Error::History(format!(
            "{} carries no history of updates, which only power-function averages can do without",
            source.label
        ))),
    }
}

/// `x' G x - 2 x' h`: the squared distance of a blend from its target, less the target's own square.
fn closed_form_distance(sources: &[(f64, f64)], products: &[f64], weights: &[f64]) -> f64 {
    let pair = |(gi, ti): (f64, f64)| {
        sources.iter().zip(weights).map(move |(&(gj, tj), xj)| xj * power_function_gram(gi, ti, gj, tj)).sum::<f64>()
    };
    weights.iter().zip(sources).zip(products).map(|((x, &source), h)| x * (pair(source) - 2.0 * h)).sum()
}

/// The symmetric system of the constrained least squares, scaled to unit diagonal and factored.
struct Kkt {
    matrix: Mat<f64>,
    factor: Lblt<f64>,
    /// What each weight is divided by in the scaled system.
    scale: Vec<f64>,
    /// The scale of the constraint, which brings it to the size of the other rows.
    unit: f64,
    /// `rho^2`.
    ridge: f64,
    condition: f64,
}

impl Kkt {
    /// `steadier` is added to the scaled diagonal of the factors alone: what is solved for stays the same.
    fn new(gram: &Mat<f64>, order: &[usize], rho: f64, steadier: f64) -> Kkt {
        let n = order.len();
        let ridge = rho * rho;
        let entry = |i: usize, j: usize| gram[(order[i], order[j])] + if i == j { ridge } else { 0.0 };
        let scale: Vec<f64> = (0..n).map(|i| 1.0 / entry(i, i).sqrt()).collect();
        let unit = scale.iter().fold(0.0, |most: f64, s| most.max(*s));
        let matrix = Mat::from_fn(n + 1, n + 1, |i, j| match (i < n, j < n) {
            (true, true) => entry(i, j) * scale[i] * scale[j] + if i == j { steadier } else { 0.0 },
            (true, false) => scale[i] / unit,
            (false, true) => scale[j] / unit,
            (false, false) => 0.0,
        });
        let factor = Lblt::new(matrix.as_ref(), faer::Side::Lower);
        let mut kkt = Kkt { matrix, factor, scale, unit, ridge, condition: 0.0 };
        kkt.condition = kkt.estimate_condition();
        kkt
    }

    /// The weights for a right-hand side in the units of the inner product, whose sum is `sum`.
    fn solve(&self, right: &[f64], sum: f64) -> Vec<f64> {
        let n = self.scale.len();
        let scaled = |i: usize| if i < n { right[i] * self.scale[i] } else { sum / self.unit };
        let solved = self.factor.solve(&Mat::from_fn(n + 1, 1, |i, _| scaled(i)));
        (0..n).map(|i| solved[(i, 0)] * self.scale[i]).collect()
    }

    /// `||A|| ||A^-1||` in the 1-norm, the second factor by Hager's method (Higham 1988, Algorithm 2.1).
    fn estimate_condition(&self) -> f64 {
        let n = self.matrix.nrows();
        let mut x = Mat::from_fn(n, 1, |_, _| 1.0 / n as f64);
        let mut inverse_norm = 0.0;
        for _ in 0..5 {
            let y = self.factor.solve(&x);
            let norm: f64 = (0..n).map(|i| y[(i, 0)].abs()).sum();
            let signs = Mat::from_fn(n, 1, |i, _| y[(i, 0)].signum());
            let z = self.factor.solve(&signs);
            let largest = (0..n).max_by(|&i, &j| z[(i, 0)].abs().total_cmp(&z[(j, 0)].abs())).unwrap_or(0);
            let here: f64 = (0..n).map(|i| z[(i, 0)] * x[(i, 0)]).sum();
            inverse_norm = f64::max(inverse_norm, norm);
            if z[(largest, 0)].abs() <= here {
                break;
            }
            x = Mat::from_fn(n, 1, |i, _| f64::from(u8::from(i == largest)));
        }
        let norm = (0..n).map(|j| (0..n).map(|i| self.matrix[(i, j)].abs()).sum::<f64>()).fold(0.0, f64::max);
        norm * inverse_norm
    }

    /// The two sources with the largest cosine.
    fn most_alike(&self) -> (usize, usize, f64) {
        let n = self.scale.len();
        let pairs = (0..n).flat_map(|j| (0..j).map(move |i| (i, j)));
        let alike = pairs.max_by(|&a, &b| self.matrix[a].total_cmp(&self.matrix[b])).unwrap_or((0, 0));
        (alike.0, alike.1, self.matrix[alike])
    }
}

#[cfg(test)]
mod tests;
