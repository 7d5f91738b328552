//! The solve: weights of snapshots whose blend comes closest to a target profile.

mod density;

use faer::Mat;
use faer::linalg::solvers::{Lblt, Solve};

use super::chain::{Chain, Decays};
use super::gram::{fading, power_function_gram, recurrence, target_recurrence};
use super::history::History;
use super::profile::Profile;
use crate::error::{Error, Result};

pub use density::Densities;

/// Two sources whose cosine differs from 1 by no more than this hold the same average to the last digits.
const SAME: f64 = 8.0 * f64::EPSILON;

/// Corrections after the first solve: the golden weights need one, the second is for worse conditions.
const REFINEMENTS: usize = 2;

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
    /// [`Error::Nothing`] without sources, [`Error::DuplicateSource`] for two of one profile and step,
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
        let kkt = Kkt::new(&gram, &order, rho);
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
                self.solve_updates(updates, &updates.target(profile, self.at), &self.kkt).map(|blend| blend.solution)
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
    pub(super) fn blend(&self, updates: &Updates, target: &[f64]) -> Result<Blend> {
        self.solve_updates(updates, target, &self.kkt)
    }

    /// As [`System::blend`], with another regularisation than the system's.
    pub(super) fn blend_with(&self, updates: &Updates, target: &[f64], rho: f64) -> Result<Blend> {
        self.solve_updates(updates, target, &Kkt::new(&self.gram, &self.order, rho))
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
        Ok(Solution::new(weights, (square.max(0.0) / own).sqrt(), &self.kkt))
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
        return Err(Error::Nothing("there is no snapshot to blend".into()));
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

/// Everything that is summed over the updates.
pub(super) struct Updates {
    pub times: Vec<u64>,
    intervals: Vec<f64>,
    pub decays: Vec<Decays>,
    /// The updates at which there are sources.
    pub marks: Vec<usize>,
    /// `(chain, mark)` of each source.
    pub sources: Vec<(usize, usize)>,
}

impl Updates {
    fn new(history: &History, at: u64, sources: &[Source]) -> Result<Updates> {
        let times = history.until(at).times();
        let intervals = intervals(&times);
        let mut chains: Vec<&Chain> = Vec::new();
        let mut placed = Vec::with_capacity(sources.len());
        for source in sources {
            let update = times.binary_search(&source.step).map_err(|_| {
                Error::History(format!("{} lies at step {}, where there was no update", source.label, source.step))
            })?;
            let chain = chains.iter().position(|chain| **chain == source.chain).unwrap_or_else(|| {
                chains.push(&source.chain);
                chains.len() - 1
            });
            placed.push((chain, update));
        }
        let mut marks: Vec<usize> = placed.iter().map(|&(_, update)| update).collect();
        marks.sort_unstable();
        marks.dedup();
        let decays = chains.iter().map(|chain| chain.decays(&times)).collect();
        let mark = |update| marks.partition_point(|&m| m < update);
        let sources = placed.iter().map(|&(chain, update)| (chain, mark(update))).collect();
        Ok(Updates { times, intervals, decays, marks, sources })
    }

    /// The Gram matrix of the sources, from one pass over the updates per pair of chains.
    fn gram(&self) -> Mat<f64> {
        self.gram_over(&self.intervals)
    }

    /// `sum_k a_k b_k / delta_k` of all pairs of sources, for any `delta`.
    pub(super) fn gram_over(&self, intervals: &[f64]) -> Mat<f64> {
        self.pairs(|a, b| {
            let products = recurrence(&self.decays[a], &self.decays[b], intervals, &self.marks);
            move |from: usize, fade: f64| products[from] * fade
        })
    }

    /// A symmetric matrix over the sources. `of_chains` gives for a pair of chains the function that knows an entry from the
    /// mark of the earlier source, of the first chain, and from how much the second chain has faded from there to the later.
    pub(super) fn pairs<F: Fn(usize, f64) -> f64>(&self, of_chains: impl Fn(usize, usize) -> F) -> Mat<f64> {
        let fades: Vec<Vec<f64>> = self.decays.iter().map(|decays| fading(decays, &self.marks)).collect();
        let mut matrix = Mat::zeros(self.sources.len(), self.sources.len());
        for a in 0..self.decays.len() {
            for (b, fade) in fades.iter().enumerate() {
                self.fill(&mut matrix, (a, b), fade, of_chains(a, b));
            }
        }
        matrix
    }

    /// Fills in the pairs of which the one of chain `a` is not later than the one of chain `b`.
    fn fill(&self, matrix: &mut Mat<f64>, (a, b): (usize, usize), fade: &[f64], entry: impl Fn(usize, f64) -> f64) {
        let of = |chain| self.sources.iter().enumerate().filter(move |(_, source)| source.0 == chain);
        let mut faded = vec![0.0; self.marks.len()];
        for (i, &(_, from)) in of(a) {
            faded[from] = 1.0;
            for mark in from + 1..self.marks.len() {
                faded[mark] = faded[mark - 1] * fade[mark - 1];
            }
            for (j, &(_, to)) in of(b).filter(|(_, source)| source.1 >= from) {
                matrix[(i, j)] = entry(from, faded[to]);
                matrix[(j, i)] = matrix[(i, j)];
            }
        }
    }

    /// The weights of a target on the updates: the differences of its `F_T`; what lies after the last update at or
    /// before `T` belongs to that one.
    fn target(&self, profile: &Profile, at: u64) -> Vec<f64> {
        let at = at as f64;
        let mut previous = (0.0, 0.0);
        let mut weights: Vec<f64> = Vec::with_capacity(self.times.len());
        for &time in &self.times {
            let time = time as f64;
            let share = profile.cumulative(time, at);
            let exact = profile.is_trackable();
            weights.push(if exact { share * profile.gain(previous.0, time) } else { share - previous.1 });
            previous = (time, share);
        }
        if let Some(last) = weights.last_mut() {
            *last += 1.0 - previous.1;
        }
        weights
    }

    fn products(&self, target: &[f64]) -> Vec<f64> {
        let by_chain: Vec<Vec<f64>> =
            self.decays.iter().map(|decays| target_recurrence(decays, target, &self.intervals, &self.marks)).collect();
        self.sources.iter().map(|&(chain, mark)| by_chain[chain][mark]).collect()
    }

    /// `sum_i x_i p_i - r` on each update: what is taken from it does not cancel as what is taken from the Gram matrix.
    fn difference(&self, weights: &[f64], target: &[f64]) -> Vec<f64> {
        let mut difference: Vec<f64> = target.iter().map(|r| -r).collect();
        for (chain, decays) in self.decays.iter().enumerate() {
            self.add_blend(&mut difference, weights, chain, decays);
        }
        difference
    }

    /// `sqrt(<v, v>)`.
    pub(super) fn norm(&self, values: &[f64]) -> f64 {
        values.iter().zip(&self.intervals).map(|(v, delta)| v * v / delta).sum::<f64>().sqrt()
    }

    /// Adds the weights that the blended sources of one chain put on the updates, from the last to the first.
    fn add_blend(&self, sum: &mut [f64], weights: &[f64], chain: usize, decays: &Decays) {
        let mut starting = vec![0.0; self.times.len()];
        for (&(_, mark), weight) in self.sources.iter().zip(weights).filter(|((c, _), _)| *c == chain) {
            starting[self.marks[mark]] += weight;
        }
        let mut kept = 0.0;
        for k in (0..self.times.len()).rev() {
            kept += starting[k];
            sum[k] += decays.gain[k] * kept;
            kept *= decays.decay[k];
        }
    }
}

/// `delta_k = t_k - t_{k-1}` with `t_0 = 0`.
fn intervals(times: &[u64]) -> Vec<f64> {
    let before = std::iter::once(&0).chain(times);
    times.iter().zip(before).map(|(time, before)| (time - before) as f64).collect()
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
    fn new(gram: &Mat<f64>, order: &[usize], rho: f64) -> Kkt {
        let n = order.len();
        let ridge = rho * rho;
        let entry = |i: usize, j: usize| gram[(order[i], order[j])] + if i == j { ridge } else { 0.0 };
        let scale: Vec<f64> = (0..n).map(|i| 1.0 / entry(i, i).sqrt()).collect();
        let unit = scale.iter().fold(0.0, |most: f64, s| most.max(*s));
        let matrix = Mat::from_fn(n + 1, n + 1, |i, j| match (i < n, j < n) {
            (true, true) => entry(i, j) * scale[i] * scale[j],
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
