//! Movement and rounding of snapshots, from a sample of their elements.

use std::ops::Range;

use faer::Mat;
use rayon::prelude::*;

use super::staircase::{INDEPENDENT, excess};

/// What a sample tells of each pair of snapshots: means over the elements.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// The mean square by which the exact averages differ.
    pub moved: Mat<f64>,
    /// The covariance of their roundings.
    pub rounding: Mat<f64>,
}

/// The same elements of several snapshots.
pub(crate) struct Sample {
    /// Of each snapshot, one value for each element.
    pub values: Vec<Vec<f64>>,
    /// Of each snapshot, the distance of neighbouring values of its dtype at each element.
    pub ulps: Vec<Vec<f64>>,
    /// Elements that are likely to move alike: parts of one tensor.
    pub blocks: Vec<Range<usize>>,
}

/// Measures each pair. Elements of one block and one `ulp` are taken as a group that moves alike: how far, compared with
/// the `ulp`, decides whether their roundings are the same or independent.
pub(crate) fn measure(sample: &Sample) -> Measured {
    let groups = groups(sample);
    let elements: usize = groups.iter().map(Vec::len).sum();
    let zero = || Measured::zero(sample.values.len());
    let add = |mut sum: Measured, group: &Vec<usize>| {
        sum.add(&Group::new(sample, group), group.len() as f64 / elements as f64);
        sum
    };
    // In a fixed order, so that the figures do not depend on the number of threads.
    let parts: Vec<Measured> =
        groups.par_chunks(groups.len().div_ceil(PARTS).max(1)).map(|part| part.iter().fold(zero(), add)).collect();
    parts
        .into_iter()
        .fold(zero(), |sum, part| Measured { moved: sum.moved + part.moved, rounding: sum.rounding + part.rounding })
}

/// Into how many parts the work is cut.
const PARTS: usize = 8;

/// The elements of each block by their `ulp` in the last snapshot.
fn groups(sample: &Sample) -> Vec<Vec<usize>> {
    let Some(last) = sample.ulps.last() else { return Vec::new() };
    let of_block = |block: &Range<usize>| {
        let mut elements: Vec<usize> = block.clone().collect();
        elements.sort_by(|&a, &b| last[a].total_cmp(&last[b]));
        elements.chunk_by(|&a, &b| last[a] == last[b]).map(<[usize]>::to_vec).collect::<Vec<_>>()
    };
    sample.blocks.iter().flat_map(of_block).collect()
}

/// The values of one group, side by side.
struct Group {
    /// Of each snapshot.
    values: Vec<Vec<f64>>,
    /// The mean of `ulp^2` of each snapshot.
    square: Vec<f64>,
}

impl Group {
    fn new(sample: &Sample, elements: &[usize]) -> Group {
        let of = |all: &Vec<f64>| elements.iter().map(|&i| all[i]).collect::<Vec<f64>>();
        let square = |ulps: &Vec<f64>| elements.iter().map(|&i| ulps[i] * ulps[i]).sum::<f64>() / elements.len() as f64;
        Group { values: sample.values.iter().map(of).collect(), square: sample.ulps.iter().map(square).collect() }
    }

    /// Mean square movement of a pair, and the covariance of its roundings.
    fn pair(&self, i: usize, j: usize) -> (f64, f64) {
        let (a, b) = (&self.values[i], &self.values[j]);
        let rounded = squared_distance(a, b) / a.len() as f64;
        let square = 0.5 * (self.square[i] + self.square[j]);
        // Exact values, such as those of an f64 that underflows, have no neighbours to speak of.
        let h = if square > 0.0 { excess(rounded / square) } else { 0.0 };
        let covariance = (self.square[i] * self.square[j]).sqrt() / 12.0 * (1.0 - h / INDEPENDENT);
        ((rounded - h * square).max(0.0), covariance)
    }
}

/// The squared distance of two equally long lists: as many sums side by side as fill a processor's pipes, in a fixed order.
fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += (a[lane] - b[lane]) * (a[lane] - b[lane]);
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b) * (a - b));
    sums.into_iter().chain(rest).sum()
}

/// Sums that are built side by side.
const LANES: usize = 16;

impl Measured {
    fn zero(snapshots: usize) -> Measured {
        Measured { moved: Mat::zeros(snapshots, snapshots), rounding: Mat::zeros(snapshots, snapshots) }
    }

    fn add(&mut self, group: &Group, share: f64) {
        for j in 0..group.values.len() {
            for i in 0..=j {
                let (moved, covariance) = group.pair(i, j);
                self.moved[(i, j)] += share * moved;
                self.rounding[(i, j)] += share * covariance;
                self.moved[(j, i)] = self.moved[(i, j)];
                self.rounding[(j, i)] = self.rounding[(i, j)];
            }
        }
    }

    /// The mean square by which the roundings of a pair differ.
    pub(super) fn apart(&self, i: usize, j: usize) -> f64 {
        self.rounding[(i, i)] + self.rounding[(j, j)] - 2.0 * self.rounding[(i, j)]
    }

    /// Of some of the snapshots.
    pub(crate) fn only(&self, snapshots: &[usize]) -> Measured {
        let n = snapshots.len();
        let of = |matrix: &Mat<f64>| Mat::from_fn(n, n, |i, j| matrix[(snapshots[i], snapshots[j])]);
        Measured { moved: of(&self.moved), rounding: of(&self.rounding) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn a_squared_distance_is_that_of_the_plain_sum() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for length in (0..70).chain([1000]) {
            let mut values = || (0..length).map(|_| random.random_range(-1.0..1.0)).collect::<Vec<f64>>();
            let (a, b) = (values(), values());
            let plain: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
            let found = squared_distance(&a, &b);
            assert!((found - plain).abs() <= 1e-14 * plain, "{length}: {found} is not {plain}");
        }
    }
}
