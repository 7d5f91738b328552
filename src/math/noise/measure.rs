//! Movement and rounding of snapshots, from a sample of their elements.

use std::ops::Range;

use faer::Mat;
use rayon::prelude::*;

use super::quantization::{INDEPENDENT, excess};

/// Number of parts that the work is split into, at any number of threads.
const PARTS: usize = 8;

/// Number of sums that [`squared_distance`] keeps in parallel.
const LANES: usize = 16;

/// Means over the sampled elements for each pair of snapshots.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// The mean square difference of the exact averages.
    pub moved: Mat<f64>,
    /// The covariance of the rounding errors.
    pub rounding: Mat<f64>,
}

/// The same elements of several snapshots.
pub(crate) struct Sample {
    /// The values of each snapshot, one per element.
    pub values: Vec<Vec<f64>>,
    /// The distances of neighbouring values of each snapshot's dtype, one per element.
    pub ulps: Vec<Vec<f64>>,
    /// Number of the model's elements that each element stands for.
    pub weights: Vec<f64>,
}

/// Measures each pair of snapshots on the elements of some blocks.
///
/// A block has ranges of elements that are likely to move by similar amounts. Its elements of one `ulp` form a group:
/// the size of the movement in `ulp`s decides how far their rounding errors are equal or independent.
pub(crate) fn measure(sample: &Sample, blocks: &[Vec<Range<usize>>]) -> Measured {
    let groups = group_elements(sample, blocks);
    let weight = |group: &Vec<usize>| group.iter().map(|&i| sample.weights[i]).sum::<f64>();
    let total: f64 = groups.iter().map(weight).sum();
    let measure_part = |part: &[Vec<usize>]| {
        let mut sum = Measured::zero(sample.values.len());
        for group in part {
            sum.add(&UlpGroup::new(sample, group), weight(group) / total);
        }
        sum
    };
    // Parts are summed in a fixed order, so that the results do not depend on the number of threads.
    let parts: Vec<Measured> = groups.par_chunks(groups.len().div_ceil(PARTS).max(1)).map(measure_part).collect();
    let mut total = Measured::zero(sample.values.len());
    for part in parts {
        total.moved += part.moved;
        total.rounding += part.rounding;
    }
    total
}

/// Groups the elements of each block by their `ulp` in the last snapshot.
fn group_elements(sample: &Sample, blocks: &[Vec<Range<usize>>]) -> Vec<Vec<usize>> {
    let Some(last) = sample.ulps.last() else { return Vec::new() };
    let mut groups = Vec::new();
    for block in blocks {
        let mut elements: Vec<usize> = block.iter().cloned().flatten().collect();
        elements.sort_by(|&a, &b| last[a].total_cmp(&last[b]));
        groups.extend(elements.chunk_by(|&a, &b| last[a] == last[b]).map(<[usize]>::to_vec));
    }
    groups
}

/// Contiguous values of the elements of one group.
struct UlpGroup {
    /// The values of each snapshot, each times the root of the element's share of the group.
    values: Vec<Vec<f64>>,
    /// The weighted mean of `ulp^2` of each snapshot.
    ulp_squares: Vec<f64>,
}

impl UlpGroup {
    fn new(sample: &Sample, elements: &[usize]) -> UlpGroup {
        let total: f64 = elements.iter().map(|&i| sample.weights[i]).sum();
        let shares: Vec<f64> = elements.iter().map(|&i| sample.weights[i] / total).collect();
        let roots: Vec<f64> = shares.iter().map(|share| share.sqrt()).collect();
        let gather = |all: &Vec<f64>| elements.iter().zip(&roots).map(|(&i, root)| all[i] * root).collect();
        let mean_square =
            |ulps: &Vec<f64>| elements.iter().zip(&shares).map(|(&i, share)| ulps[i] * ulps[i] * share).sum();
        UlpGroup {
            values: sample.values.iter().map(gather).collect(),
            ulp_squares: sample.ulps.iter().map(mean_square).collect(),
        }
    }

    /// Returns the mean square movement between two snapshots, and the covariance of their rounding errors.
    fn pair(&self, i: usize, j: usize) -> (f64, f64) {
        let rounded = squared_distance(&self.values[i], &self.values[j]);
        let ulp_square = 0.5 * (self.ulp_squares[i] + self.ulp_squares[j]);
        // The square underflows to 0 for the smallest f64 values, whose rounding is negligible.
        let h = if ulp_square > 0.0 { excess(rounded / ulp_square) } else { 0.0 };
        let covariance = (self.ulp_squares[i] * self.ulp_squares[j]).sqrt() / 12.0 * (1.0 - h / INDEPENDENT);
        ((rounded - h * ulp_square).max(0.0), covariance)
    }
}

/// Returns the squared distance of two lists of equal length.
///
/// It keeps several sums in parallel to fill a processor's pipelines, and adds them in a fixed order.
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

impl Measured {
    fn zero(snapshots: usize) -> Measured {
        Measured { moved: Mat::zeros(snapshots, snapshots), rounding: Mat::zeros(snapshots, snapshots) }
    }

    fn add(&mut self, group: &UlpGroup, share: f64) {
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

    /// Returns the mean square difference of the rounding errors of a pair.
    pub(super) fn rounding_distance(&self, i: usize, j: usize) -> f64 {
        self.rounding[(i, i)] + self.rounding[(j, j)] - 2.0 * self.rounding[(i, j)]
    }

    /// Returns the measurements of some of the snapshots, by their indices.
    pub(crate) fn subset(&self, snapshots: &[usize]) -> Measured {
        let n = snapshots.len();
        let select = |matrix: &Mat<f64>| Mat::from_fn(n, n, |i, j| matrix[(snapshots[i], snapshots[j])]);
        Measured { moved: select(&self.moved), rounding: select(&self.rounding) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn squared_distance_equals_the_plain_sum() {
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
