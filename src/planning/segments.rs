//! Choice of the elements that a sample is taken from.

use std::ops::Range;

/// Number of contiguous elements of a sample.
const STRETCH: usize = 16;

/// Largest number of elements at which a tensor may be read whole.
const SMALL: usize = 1024;

/// Fractional part of the golden ratio, whose multiples are spread evenly and hit no period of a tensor's rows.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Contiguous elements of one tensor.
#[derive(Debug)]
pub(crate) struct Segment {
    pub tensor: usize,
    pub elements: Range<usize>,
}

/// Returns segments of every tensor that has elements, in order of tensor and element.
///
/// One half of the sample is shared equally among the tensors, so that a small tensor is seen beside a large one. The
/// other is shared by their sizes. A tensor no larger than its share is read whole. There are at most about 1.5 times
/// `elements` elements, or one for each tensor.
pub(super) fn segments(counts: &[usize], elements: usize) -> Vec<Segment> {
    let total: usize = counts.iter().sum();
    let tensors = counts.iter().filter(|count| **count > 0).count();
    let equal = (elements / (2 * tensors.max(1))).clamp(1, SMALL);
    let mut segments = Vec::new();
    for (tensor, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let share = (elements as f64 * (count as f64 / total as f64)) as usize;
        let wanted = if count <= equal { count } else { (equal + share).min(count) };
        if wanted == count {
            segments.push(Segment { tensor, elements: 0..count });
            continue;
        }
        let pieces = wanted.div_ceil(STRETCH);
        let length = wanted / pieces;
        let stride = count / pieces;
        for piece in 0..pieces {
            let offset = (stride - length) as f64 * (piece as f64 * GOLDEN).fract();
            let start = piece * stride + offset as usize;
            segments.push(Segment { tensor, elements: start..start + length });
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the number of sampled elements of each tensor.
    fn sampled(counts: &[usize], segments: &[Segment]) -> Vec<usize> {
        let mut sampled = vec![0; counts.len()];
        segments.iter().for_each(|segment| sampled[segment.tensor] += segment.elements.len());
        sampled
    }

    #[test]
    fn every_tensor_is_sampled_in_bounded_number() {
        for counts in [vec![1], vec![3, 0, 5], vec![100_000], vec![7; 5000], vec![1 << 40, 10], vec![2000; 300]] {
            for elements in [256, 4096, 16_384] {
                let cut = segments(&counts, elements);
                let mut end = (0, 0);
                for Segment { tensor, elements } in &cut {
                    assert!((*tensor, elements.start) >= end, "{counts:?}: segments overlap");
                    assert!(elements.end <= counts[*tensor] && !elements.is_empty(), "{counts:?}");
                    end = (*tensor, elements.end);
                }
                let sampled = sampled(&counts, &cut);
                assert!(sampled.iter().zip(&counts).all(|(sampled, count)| (*sampled > 0) == (*count > 0)));
                let all: usize = sampled.iter().sum();
                assert!(all <= (2 * elements).max(2 * counts.len()), "{all} of {elements}");
                assert!(all >= counts.iter().sum::<usize>().min(elements / 4), "{all} of {elements}");
            }
        }
        assert!(segments(&[], 4096).is_empty());
    }

    #[test]
    fn small_tensor_beside_a_large_one_is_read_whole() {
        assert_eq!(sampled(&[1 << 30, 480], &segments(&[1 << 30, 480], 16_384))[1], 480);
        let mut counts = vec![1 << 22; 300];
        counts.push(20);
        assert_eq!(sampled(&counts, &segments(&counts, 16_384))[300], 20);
    }

    #[test]
    fn segments_reach_every_part_of_a_tensor() {
        let count = 1 << 24;
        let cut = segments(&[count], 16_384);
        let part = count / 500;
        for first in (0..count - part).step_by(part / 2) {
            assert!(cut.iter().any(|segment| (first..first + part).contains(&segment.elements.start)), "{first}");
        }
        // Rows of a power of two are not sampled at one place alone.
        let columns: std::collections::BTreeSet<usize> =
            cut.iter().map(|segment| segment.elements.start % 4096 / 512).collect();
        assert_eq!(columns.len(), 8);
    }
}
