//! The solve: weights of snapshots whose blend is closest to a target profile.

mod density;
mod kkt;
mod target;
mod updates;

use faer::Mat;

use super::chain::Chain;
use super::gram::power_function_gram;
use super::history::History;
use super::profile::Profile;
use crate::error::{Error, Result};

pub use density::Densities;
use kkt::Kkt;
pub(super) use kkt::scaled_kkt;
pub(super) use target::TargetWeights;
pub(super) use updates::Updates;

/// Largest difference from 1 of the cosine of two sources that are taken as one average.
///
/// They are closer than a millionth of their size, so merging them costs less than that. A blend that uses so small a
/// difference would amplify rounding a million times, and the factors have too few digits to find it.
const SAME: f64 = 5e-13;

/// Largest relative error at which a single source is the target.
///
/// Rounding in the products of a million decays is far below it, and the rounding of stored snapshots far above.
const EXACT: f64 = 1e-10;

/// Relative error, computed from the Gram matrix, up to which a single source may be the target.
const NEAR: f64 = 1e-5;

/// Most sources that are compared with the target one by one.
const MOST_NEAR: usize = 8;

/// Condition number from which the factors may have lost the digits that a blend needs.
const ILL_CONDITIONED: f64 = 1e12;

/// Refinement steps after the first solve. The golden weights need one; the second is for worse conditions.
const REFINEMENTS: usize = 2;

/// Ridges that are tried in turn if the factors of the scaled matrix have no correct digits.
const RIDGES: [f64; 3] = [1e-14, 1e-12, 1e-10];

/// Most sources of one solve: their Gram matrix and its factors take 1.5 GB.
const MAX_SOURCES: usize = 8192;

/// An average that can be blended: a chain of updates up to `step`.
#[derive(Clone, Debug)]
pub struct ChainSource {
    /// The decays of its updates.
    pub chain: Chain,
    /// The time of its newest update.
    pub step: u64,
    /// Name of the source in errors.
    pub label: String,
}

/// The weights of a target, and their quality.
#[derive(Clone, Debug)]
pub struct Solution {
    /// One weight per source, in their order; they sum to 1.
    pub weights: Vec<f64>,
    /// `||sum_i x_i p_i - r|| / ||r||`.
    pub relative_error: f64,
    /// `sqrt(sum_i x_i^2)`: the amplification of independent rounding errors of the sources.
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

/// A solution with its residual, `sum_i x_i p_i - r` on each update.
pub(super) struct BlendSolution {
    pub solution: Solution,
    pub residual: Vec<f64>,
}

/// Factored system of one set of sources at one time.
///
/// It minimises `||sum_i x_i p_i - r||^2 + rho^2 ||x||^2` subject to `sum_i x_i = 1`.
pub struct System {
    at: u64,
    products: InnerProducts,
    gram: Mat<f64>,
    /// The sources that are solved for.
    order: Vec<usize>,
    kkt: Kkt,
    /// Position of each source in `order`; `None` for a source that repeats another's values.
    kept: Vec<Option<usize>>,
    labels: Vec<String>,
}

/// Method of computing inner products.
enum InnerProducts {
    /// Sums over the updates.
    Updates(Updates),
    /// Karras eq. 151: `(gamma, step)` of each source.
    PowerFunctions(Vec<(f64, f64)>),
}

impl System {
    /// Creates the system of `sources`, all at or before `at`, over the updates of `history`.
    ///
    /// `rho` is the regularisation in the units of the profiles' norm (1/sqrt steps); 0 for none.
    ///
    /// # Errors
    /// [`Error::NoSource`] without sources, [`Error::DuplicateSource`] for two sources of one profile and step,
    /// [`Error::History`] if there was no update at a source's step, and [`Error::Setting`] for more than 8192 sources.
    pub fn new(history: &History, at: u64, sources: &[ChainSource], rho: f64) -> Result<System> {
        check_distinct(sources)?;
        let updates = Updates::new(history, at, sources)?;
        let gram = updates.gram();
        Ok(System::factor(at, InnerProducts::Updates(updates), gram, sources, rho))
    }

    /// Creates the system of power-function snapshots without a history, as if updates were dense.
    ///
    /// # Errors
    /// As [`System::new`], and [`Error::History`] for a source that is not a tracked power function.
    pub fn closed_form(at: u64, sources: &[ChainSource], rho: f64) -> Result<System> {
        check_distinct(sources)?;
        let powers: Vec<(f64, f64)> = sources.iter().map(power_function).collect::<Result<_>>()?;
        let gram = Mat::from_fn(powers.len(), powers.len(), |i, j| {
            power_function_gram(powers[i].0, powers[i].1, powers[j].0, powers[j].1)
        });
        Ok(System::factor(at, InnerProducts::PowerFunctions(powers), gram, sources, rho))
    }

    fn factor(at: u64, products: InnerProducts, gram: Mat<f64>, sources: &[ChainSource], rho: f64) -> System {
        let kept = drop_repeated(&gram);
        let order: Vec<usize> = (0..sources.len()).filter(|&i| kept[i].is_some()).collect();
        let kkt = Kkt::new(&gram, &order, rho, 0.0);
        let labels = sources.iter().map(|source| source.label.clone()).collect();
        System { at, products, gram, order, kkt, kept, labels }
    }

    /// Returns the weights of `profile` at the system's time.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window longer than the time, and [`Error::DependentSources`] if the sources are too
    /// similar to be solved for.
    pub fn solve(&self, profile: &Profile) -> Result<Solution> {
        profile.check_at(self.at as f64)?;
        match &self.products {
            InnerProducts::Updates(updates) => {
                self.blend(updates, &TargetWeights::new(updates, profile, self.at)).map(|blend| blend.solution)
            }
            InnerProducts::PowerFunctions(sources) => self.solve_closed_form(sources, profile),
        }
    }

    /// Returns the updates that inner products are summed over; `None` if the sources have no history.
    pub(super) fn updates(&self) -> Option<&Updates> {
        match &self.products {
            InnerProducts::Updates(updates) => Some(updates),
            InnerProducts::PowerFunctions(_) => None,
        }
    }

    /// Returns the weights of a profile on the updates.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a window longer than the time.
    pub(super) fn target(&self, updates: &Updates, profile: &Profile) -> Result<TargetWeights> {
        profile.check_at(self.at as f64)?;
        Ok(TargetWeights::new(updates, profile, self.at))
    }

    /// Solves for the weights of a target on the updates, and keeps the residual.
    ///
    /// A source that is the target has weight 1, unless a regularisation prefers other weights. Factors have few
    /// correct digits if snapshots are close together. The same refinement then starts from the factors of a matrix
    /// with a ridge, too, and the smallest error is taken. A blend with a larger error than a single source is not
    /// accepted.
    ///
    /// # Errors
    /// [`Error::DependentSources`] if no blend is accepted.
    pub(super) fn blend(&self, updates: &Updates, target: &TargetWeights) -> Result<BlendSolution> {
        let single_errors = self.single_errors(&updates.products(target), target.square(updates));
        if let Some(blend) = self.target_source(updates, target, &single_errors) {
            return Ok(blend);
        }
        let limit = self.error_limit(&single_errors);
        let plain = self.solve_updates(updates, target, &self.kkt);
        let is_accepted = plain.as_ref().is_ok_and(|blend| blend.solution.relative_error <= limit);
        if is_accepted && self.kkt.condition < ILL_CONDITIONED {
            return plain;
        }
        let rho = self.kkt.rho_squared.sqrt();
        let mut best = plain.ok().filter(|_| is_accepted);
        for ridge in RIDGES {
            let kkt = Kkt::new(&self.gram, &self.order, rho, ridge);
            let Ok(blend) = self.solve_updates(updates, target, &kkt) else { continue };
            let error = blend.solution.relative_error;
            if error <= limit && best.as_ref().is_none_or(|best| error < best.solution.relative_error) {
                best = Some(blend);
            }
        }
        best.ok_or_else(|| self.dependent())
    }

    /// Returns the relative error of each source alone, from the Gram matrix, to about 1e-8.
    ///
    /// `products` are the inner products of the sources with the target, `target_square` is that of the target with
    /// itself.
    fn single_errors(&self, products: &[f64], target_square: f64) -> Vec<f64> {
        let square = |i: usize| (self.gram[(i, i)] - 2.0 * products[i] + target_square) / target_square;
        (0..products.len()).map(|i| square(i).max(0.0).sqrt()).collect()
    }

    /// Returns the largest relative error of an acceptable blend: that of the nearest single source, plus rounding.
    ///
    /// A regularised blend has no limit.
    fn error_limit(&self, single_errors: &[f64]) -> f64 {
        if self.kkt.rho_squared > 0.0 {
            return f64::INFINITY;
        }
        single_errors.iter().copied().fold(f64::INFINITY, f64::min) + 1e-6
    }

    /// Returns the source that is the target, with weight 1; `None` if there is none or the solve is regularised.
    ///
    /// Sources that nearly depend on each other have many blends without an error, of any noise gain.
    fn target_source(&self, updates: &Updates, target: &TargetWeights, single_errors: &[f64]) -> Option<BlendSolution> {
        if self.kkt.rho_squared > 0.0 {
            return None;
        }
        let mut near: Vec<usize> = (0..single_errors.len()).filter(|&i| single_errors[i] <= NEAR).collect();
        near.sort_by(|&a, &b| single_errors[a].total_cmp(&single_errors[b]));
        let alone = near.into_iter().take(MOST_NEAR).map(|source| {
            let weights = unit_weights(single_errors.len(), source);
            let residual = updates.residual(&weights, target);
            let relative_error = target.relative_error(updates, &residual);
            BlendSolution { solution: Solution::new(weights, relative_error, &self.kkt), residual }
        });
        let best = alone.min_by(|a, b| a.solution.relative_error.total_cmp(&b.solution.relative_error));
        best.filter(|best| best.solution.relative_error <= EXACT)
    }

    /// Solves as [`System::blend`], with `rho` instead of the system's regularisation.
    pub(super) fn blend_with(&self, updates: &Updates, target: &TargetWeights, rho: f64) -> Result<BlendSolution> {
        self.solve_updates(updates, target, &Kkt::new(&self.gram, &self.order, rho, 0.0))
    }

    fn solve_updates(&self, updates: &Updates, target: &TargetWeights, kkt: &Kkt) -> Result<BlendSolution> {
        let mut weights = self.solve_once(kkt, &updates.products(target), 1.0);
        for _ in 0..REFINEMENTS {
            // The gradient of the residual keeps the digits that the Gram matrix, which squares the condition, loses.
            let gradient = updates.products(&updates.residual(&weights, target));
            let right: Vec<f64> = gradient.iter().zip(&weights).map(|(g, x)| -g - kkt.rho_squared * x).collect();
            let correction = self.solve_once(kkt, &right, 1.0 - weights.iter().sum::<f64>());
            weights.iter_mut().zip(correction).for_each(|(x, c)| *x += c);
        }
        self.check_sum(&weights)?;
        let residual = updates.residual(&weights, target);
        let relative_error = target.relative_error(updates, &residual);
        Ok(BlendSolution { solution: Solution::new(weights, relative_error, kkt), residual })
    }

    fn solve_closed_form(&self, sources: &[(f64, f64)], profile: &Profile) -> Result<Solution> {
        let gamma = profile.as_gamma().ok_or_else(|| {
            Error::History(format!("the snapshots have no history of updates, which solving for {profile} needs"))
        })?;
        let at = self.at as f64;
        let products: Vec<f64> = sources.iter().map(|&(g, t)| power_function_gram(g, t, gamma, at)).collect();
        let is_target = |&(g, t): &(f64, f64)| t == at && (g - gamma).abs() <= EXACT * (gamma + 1.0);
        if self.kkt.rho_squared == 0.0
            && let Some(source) = sources.iter().position(is_target)
        {
            return Ok(Solution::new(unit_weights(sources.len(), source), 0.0, &self.kkt));
        }
        let weights = self.solve_once(&self.kkt, &products, 1.0);
        self.check_sum(&weights)?;
        let target_square = power_function_gram(gamma, at, gamma, at);
        let square = target_square + closed_form_distance(sources, &products, &weights);
        let relative_error = (square.max(0.0) / target_square).sqrt();
        if !(relative_error <= self.error_limit(&self.single_errors(&products, target_square))) {
            return Err(self.dependent());
        }
        Ok(Solution::new(weights, relative_error, &self.kkt))
    }

    /// Solves once, and returns weights for all sources: 0 for those that repeat another.
    fn solve_once(&self, kkt: &Kkt, right: &[f64], sum: f64) -> Vec<f64> {
        let right: Vec<f64> = self.order.iter().map(|&i| right[i]).collect();
        let solved = kkt.solve(&right, sum);
        self.kept.iter().map(|kept| kept.map_or(0.0, |i| solved[i])).collect()
    }

    fn check_sum(&self, weights: &[f64]) -> Result<()> {
        let sums_to_one = (weights.iter().sum::<f64>() - 1.0).abs() < 1e-6;
        if sums_to_one { Ok(()) } else { Err(self.dependent()) }
    }

    /// Creates the error that names the two most similar sources.
    fn dependent(&self) -> Error {
        let (i, j, cosine) = self.kkt.most_similar();
        Error::DependentSources {
            first: self.labels[self.order[i]].clone(),
            second: self.labels[self.order[j]].clone(),
            cosine,
        }
    }
}

/// Returns the weights of one source alone.
fn unit_weights(sources: usize, source: usize) -> Vec<f64> {
    (0..sources).map(|i| f64::from(u8::from(i == source))).collect()
}

fn check_distinct(sources: &[ChainSource]) -> Result<()> {
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

/// Numbers the sources that are solved for; `None` for a source that repeats an earlier one.
///
/// Averages of different profiles can hold the same values, as all do after the first update. The first of them is
/// solved for; the others get weight 0.
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

/// Returns `(gamma, step)` of a tracked power-function average.
fn power_function(source: &ChainSource) -> Result<(f64, f64)> {
    let gamma = match &source.chain {
        Chain::Tracked(profile) => profile.as_gamma(),
        _ => None,
    };
    match gamma {
        Some(gamma) => Ok((gamma, source.step as f64)),
        None => Err(Error::History(format!(
            "{} has no history of updates; only power-function averages can be blended without one",
            source.label
        ))),
    }
}

/// `x' G x - 2 x' h`: the squared distance of a blend from its target, less the target's square.
fn closed_form_distance(sources: &[(f64, f64)], products: &[f64], weights: &[f64]) -> f64 {
    let row = |(gi, ti): (f64, f64)| {
        sources.iter().zip(weights).map(move |(&(gj, tj), xj)| xj * power_function_gram(gi, ti, gj, tj)).sum::<f64>()
    };
    weights.iter().zip(sources).zip(products).map(|((x, &source), h)| x * (row(source) - 2.0 * h)).sum()
}

#[cfg(test)]
mod near_tests;
#[cfg(test)]
mod tests;
