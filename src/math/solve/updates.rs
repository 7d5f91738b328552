//! Sums over the updates: inner products, targets and residuals.

use faer::Mat;

use super::ChainSource;
use crate::error::{Error, Result};
use crate::math::chain::{Chain, Decays};
use crate::math::gram::{decay_between, recurrence, target_recurrence};
use crate::math::groups::Groups;
use crate::math::history::History;
use crate::math::profile::Profile;

/// Largest number of bytes that the sums over the updates of one system and one target take.
const MEMORY: usize = 64 << 20;

/// Least number of groups that the updates of a long history are put into.
const MIN_GROUPS: usize = 1 << 14;

/// The updates up to a time, and the chains and sources on them. "Update" is a group of updates if there are many.
#[derive(Clone)]
pub(in crate::math) struct Updates {
    pub times: Vec<u64>,
    /// Number of updates that each one stands for.
    pub counts: Vec<f64>,
    pub(super) intervals: Vec<f64>,
    /// The decays of each distinct chain.
    pub decays: Vec<Decays>,
    /// Indices, in increasing order, of the updates at which there are sources.
    pub marks: Vec<usize>,
    /// `(chain, mark)` of each source, as indices of `decays` and `marks`.
    pub sources: Vec<(usize, usize)>,
}

impl Updates {
    pub(super) fn new(history: &History, at: u64, sources: &[ChainSource]) -> Result<Updates> {
        Updates::grouped(history, at, sources, max_groups)
    }

    /// Groups the updates if there are more than `limit` of the number of chains.
    pub(super) fn grouped(
        history: &History,
        at: u64,
        sources: &[ChainSource],
        limit: impl Fn(usize) -> usize,
    ) -> Result<Updates> {
        let mut chains: Vec<&Chain> = Vec::new();
        for source in sources {
            if source.step > at || !history.contains(source.step) {
                let ChainSource { label, step, .. } = source;
                return Err(Error::History(format!("{label} is at step {step}, where there was no update")));
            }
            if !chains.contains(&&source.chain) {
                chains.push(&source.chain);
            }
        }
        let steps: Vec<u64> = sources.iter().map(|source| source.step).collect();
        let groups = Groups::new(history, at, &steps, limit(chains.len()))?;
        let decays = chains.iter().map(|chain| chain.group_decays(&groups)).collect::<Result<_>>()?;
        let Groups { times, counts, .. } = groups;
        let intervals = intervals(&times);
        let place = |source: &ChainSource| {
            let chain = chains.iter().position(|chain| **chain == source.chain).unwrap_or_default();
            (chain, times.partition_point(|&time| time < source.step))
        };
        let placed: Vec<(usize, usize)> = sources.iter().map(place).collect();
        let mut marks: Vec<usize> = placed.iter().map(|&(_, update)| update).collect();
        marks.sort_unstable();
        marks.dedup();
        let mark = |update| marks.partition_point(|&m| m < update);
        let sources = placed.iter().map(|&(chain, update)| (chain, mark(update))).collect();
        Ok(Updates { times, counts, intervals, decays, marks, sources })
    }

    /// Returns the updates at some places among other times. The other times have no update: a count of 0.
    pub(in crate::math) fn placed(&self, times: &[u64], places: &[usize]) -> Updates {
        let spread = |values: &[f64], other: f64| {
            let mut all = vec![other; times.len()];
            places.iter().zip(values).for_each(|(&place, value)| all[place] = *value);
            all
        };
        let of_chain = |Decays { beta, one_minus_beta }: &Decays| Decays {
            beta: spread(beta, 1.0),
            one_minus_beta: spread(one_minus_beta, 0.0),
        };
        Updates {
            times: times.to_vec(),
            counts: spread(&self.counts, 0.0),
            intervals: intervals(times),
            decays: self.decays.iter().map(of_chain).collect(),
            marks: self.marks.iter().map(|&mark| places[mark]).collect(),
            sources: self.sources.clone(),
        }
    }

    /// Returns the Gram matrix of the sources, from one pass over the updates per pair of chains.
    pub(super) fn gram(&self) -> Mat<f64> {
        self.gram_over(&self.intervals)
    }

    /// Returns `sum_k a_k b_k / delta_k` of all pairs of sources, for any `delta`.
    pub(in crate::math) fn gram_over(&self, intervals: &[f64]) -> Mat<f64> {
        self.pairs(|a, b| {
            let products = recurrence(&self.decays[a], &self.decays[b], intervals, &self.marks);
            move |from: usize, decay: f64| products[from] * decay
        })
    }

    /// Returns a symmetric matrix over the sources.
    ///
    /// `of_chains` returns the function that computes the entries of a pair of chains. Its arguments are the mark of
    /// the first chain's source, and the decay of the second chain from that mark to its own source, which is not
    /// earlier.
    pub(in crate::math) fn pairs<F: Fn(usize, f64) -> f64>(&self, of_chains: impl Fn(usize, usize) -> F) -> Mat<f64> {
        let between: Vec<Vec<f64>> = self.decays.iter().map(|decays| decay_between(decays, &self.marks)).collect();
        let mut matrix = Mat::zeros(self.sources.len(), self.sources.len());
        for a in 0..self.decays.len() {
            for (b, between) in between.iter().enumerate() {
                self.fill_pairs(&mut matrix, (a, b), between, of_chains(a, b));
            }
        }
        matrix
    }

    /// Fills in the pairs in which the source of chain `a` is not later than that of chain `b`.
    ///
    /// `between` are the decays of chain `b` from mark to mark.
    fn fill_pairs(
        &self,
        matrix: &mut Mat<f64>,
        (a, b): (usize, usize),
        between: &[f64],
        entry: impl Fn(usize, f64) -> f64,
    ) {
        let of_chain = |chain| self.sources.iter().enumerate().filter(move |(_, source)| source.0 == chain);
        let mut decay = vec![0.0; self.marks.len()];
        for (i, &(_, from)) in of_chain(a) {
            decay[from] = 1.0;
            for mark in from + 1..self.marks.len() {
                decay[mark] = decay[mark - 1] * between[mark - 1];
            }
            for (j, &(_, to)) in of_chain(b).filter(|(_, source)| source.1 >= from) {
                matrix[(i, j)] = entry(from, decay[to]);
                matrix[(j, i)] = matrix[(i, j)];
            }
        }
    }

    /// Returns the weights of a target on the updates: the differences of its `F_T`.
    ///
    /// The last update at or before `T` also gets the mass after it.
    pub(super) fn target(&self, profile: &Profile, at: u64) -> Vec<f64> {
        let at = at as f64;
        let mut previous_time = 0.0;
        let mut previous_share = 0.0;
        let mut weights: Vec<f64> = Vec::with_capacity(self.times.len());
        for &time in &self.times {
            let time = time as f64;
            let share = profile.cumulative(time, at);
            weights.push(if profile.is_trackable() {
                share * profile.one_minus_beta(previous_time, time)
            } else {
                share - previous_share
            });
            previous_time = time;
            previous_share = share;
        }
        if let Some(last) = weights.last_mut() {
            *last += 1.0 - previous_share;
        }
        weights
    }

    /// Returns the inner product of each source with a target's weights on the updates.
    pub(super) fn products(&self, target: &[f64]) -> Vec<f64> {
        let by_chain: Vec<Vec<f64>> =
            self.decays.iter().map(|decays| target_recurrence(decays, target, &self.intervals, &self.marks)).collect();
        self.sources.iter().map(|&(chain, mark)| by_chain[chain][mark]).collect()
    }

    /// Returns `sum_i x_i p_i - r` on each update.
    ///
    /// Errors computed from it keep digits that cancel in the Gram matrix.
    pub(super) fn residual(&self, weights: &[f64], target: &[f64]) -> Vec<f64> {
        let mut residual: Vec<f64> = target.iter().map(|r| -r).collect();
        for (chain, decays) in self.decays.iter().enumerate() {
            self.add_blend(&mut residual, weights, chain, decays);
        }
        residual
    }

    /// Returns `sqrt(<v, v>)`.
    pub(in crate::math) fn norm(&self, values: &[f64]) -> f64 {
        values.iter().zip(&self.intervals).map(|(v, delta)| v * v / delta).sum::<f64>().sqrt()
    }

    /// Adds the weights of one chain's blended sources on the updates, from the last update to the first.
    pub(super) fn add_blend(&self, sum: &mut [f64], weights: &[f64], chain: usize, decays: &Decays) {
        let mut starting = vec![0.0; self.times.len()];
        for (&(_, mark), weight) in self.sources.iter().zip(weights).filter(|((c, _), _)| *c == chain) {
            starting[self.marks[mark]] += weight;
        }
        let mut kept = 0.0;
        for k in (0..self.times.len()).rev() {
            kept += starting[k];
            sum[k] += decays.one_minus_beta[k] * kept;
            kept *= decays.beta[k];
        }
    }
}

/// Returns the largest number of groups of a system with this number of chains.
///
/// Each group takes 48 bytes for times, intervals, counts, a target and a residual, and 16 bytes per chain.
fn max_groups(chains: usize) -> usize {
    (MEMORY / (48 + 16 * chains)).max(MIN_GROUPS)
}

/// Returns `delta_k = t_k - t_{k-1}`, with `t_0 = 0`.
fn intervals(times: &[u64]) -> Vec<f64> {
    let before = std::iter::once(&0).chain(times);
    times.iter().zip(before).map(|(time, before)| (time - before) as f64).collect()
}
