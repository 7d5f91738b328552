//! Everything that a solve sums over the updates.

use faer::Mat;

use super::Source;
use crate::error::{Error, Result};
use crate::math::chain::{Chain, Decays};
use crate::math::gram::{fading, recurrence, target_recurrence};
use crate::math::history::History;
use crate::math::profile::Profile;

/// The updates up to a time, and the chains and sources on them.
pub(in crate::math) struct Updates {
    pub times: Vec<u64>,
    pub(super) intervals: Vec<f64>,
    pub decays: Vec<Decays>,
    /// The updates at which there are sources.
    pub marks: Vec<usize>,
    /// `(chain, mark)` of each source.
    pub sources: Vec<(usize, usize)>,
}

impl Updates {
    pub(super) fn new(history: &History, at: u64, sources: &[Source]) -> Result<Updates> {
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
    pub(super) fn gram(&self) -> Mat<f64> {
        self.gram_over(&self.intervals)
    }

    /// `sum_k a_k b_k / delta_k` of all pairs of sources, for any `delta`.
    pub(in crate::math) fn gram_over(&self, intervals: &[f64]) -> Mat<f64> {
        self.pairs(|a, b| {
            let products = recurrence(&self.decays[a], &self.decays[b], intervals, &self.marks);
            move |from: usize, fade: f64| products[from] * fade
        })
    }

    /// A symmetric matrix over the sources. `of_chains` gives for a pair of chains the function that knows an entry from the
    /// mark of the earlier source, of the first chain, and from how much the second chain has faded from there to the later.
    pub(in crate::math) fn pairs<F: Fn(usize, f64) -> f64>(&self, of_chains: impl Fn(usize, usize) -> F) -> Mat<f64> {
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
    pub(super) fn target(&self, profile: &Profile, at: u64) -> Vec<f64> {
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

    pub(super) fn products(&self, target: &[f64]) -> Vec<f64> {
        let by_chain: Vec<Vec<f64>> =
            self.decays.iter().map(|decays| target_recurrence(decays, target, &self.intervals, &self.marks)).collect();
        self.sources.iter().map(|&(chain, mark)| by_chain[chain][mark]).collect()
    }

    /// `sum_i x_i p_i - r` on each update: what is taken from it does not cancel as what is taken from the Gram matrix.
    pub(super) fn difference(&self, weights: &[f64], target: &[f64]) -> Vec<f64> {
        let mut difference: Vec<f64> = target.iter().map(|r| -r).collect();
        for (chain, decays) in self.decays.iter().enumerate() {
            self.add_blend(&mut difference, weights, chain, decays);
        }
        difference
    }

    /// `sqrt(<v, v>)`.
    pub(in crate::math) fn norm(&self, values: &[f64]) -> f64 {
        values.iter().zip(&self.intervals).map(|(v, delta)| v * v / delta).sum::<f64>().sqrt()
    }

    /// Adds the weights that the blended sources of one chain put on the updates, from the last to the first.
    pub(super) fn add_blend(&self, sum: &mut [f64], weights: &[f64], chain: usize, decays: &Decays) {
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
