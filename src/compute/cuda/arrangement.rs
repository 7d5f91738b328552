//! Places of tensors in a copy to the host, and the order in which they are copied.

use std::ops::Range;
use std::sync::Arc;

/// Size in bytes below which tensors are gathered by a kernel before a copy. Each of thousands of small copies would
/// cost more than the transfer of its bytes.
pub(super) const SMALL: usize = 1 << 20;

/// Places of tensors of given sizes, and the order of their copies.
///
/// Tensors whose owner waits for the copy come first, so that it does not wait for the others. Small tensors are
/// beside each other, in batches that fit into a buffer of the device.
#[derive(Debug)]
pub(super) struct Arrangement {
    /// True for the tensors whose owner waits until they have been read.
    pub ordered: Vec<bool>,
    /// Range of each tensor, aligned to 16 bytes.
    pub ranges: Arc<[Range<usize>]>,
    /// Batches of small tensors.
    pub batches: Vec<Batch>,
    /// Tensors that are not small.
    pub large: Vec<usize>,
}

/// Small tensors that are gathered together.
#[derive(Debug)]
pub(super) struct Batch {
    pub tensors: Vec<usize>,
    /// Range of all of them.
    pub range: Range<usize>,
    pub ordered: bool,
}

/// Returns the bytes that all tensors of these sizes take.
pub(super) fn total_bytes(sizes: &[usize]) -> usize {
    sizes.iter().map(|bytes| bytes.next_multiple_of(16)).sum()
}

impl Arrangement {
    /// Arranges tensors of these sizes in bytes, in batches of at most `room` bytes, which is at least [`SMALL`].
    pub fn new(sizes: &[usize], ordered: Vec<bool>, room: usize) -> Arrangement {
        let in_order = |ordered_first: &[bool]| {
            let (first, last): (Vec<usize>, Vec<usize>) = (0..sizes.len()).partition(|&i| ordered_first[i]);
            first.into_iter().chain(last)
        };
        let mut ranges = vec![0..0; sizes.len()];
        let mut end = 0;
        let mut batches: Vec<Batch> = Vec::new();
        for i in in_order(&ordered).filter(|&i| sizes[i] < SMALL) {
            ranges[i] = end..end + sizes[i];
            end += sizes[i].next_multiple_of(16);
            match batches.last_mut() {
                Some(batch) if batch.ordered == ordered[i] && end - batch.range.start <= room => {
                    batch.tensors.push(i);
                    batch.range.end = end;
                }
                _ => batches.push(Batch { tensors: vec![i], range: ranges[i].start..end, ordered: ordered[i] }),
            }
        }
        let large: Vec<usize> = in_order(&ordered).filter(|&i| sizes[i] >= SMALL).collect();
        for &i in &large {
            ranges[i] = end..end + sizes[i];
            end += sizes[i].next_multiple_of(16);
        }
        Arrangement { ranges: ranges.into(), batches, large, ordered }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrangement_overlaps_nowhere_and_has_ordered_tensors_first() {
        let sizes = [5, SMALL, 0, 17, SMALL + 3, SMALL - 1, SMALL - 1, 100];
        for mask in 0..256 {
            let ordered: Vec<bool> = (0..8).map(|i| mask >> i & 1 == 1).collect();
            let arranged = Arrangement::new(&sizes, ordered.clone(), SMALL);
            let mut ranges: Vec<Range<usize>> = arranged.ranges.to_vec();
            assert!(ranges.iter().zip(sizes).all(|(range, bytes)| range.len() == bytes && range.start % 16 == 0));
            ranges.sort_by_key(|range| (range.start, range.end));
            assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{mask}");
            assert!(ranges.last().unwrap().end <= total_bytes(&sizes));
            let batched: Vec<usize> = arranged.batches.iter().flat_map(|batch| batch.tensors.clone()).collect();
            for order in [&batched, &arranged.large] {
                assert!(order.windows(2).all(|pair| ordered[pair[0]] || !ordered[pair[1]]), "{mask}: {order:?}");
            }
            let mut all = [batched, arranged.large].concat();
            all.sort_unstable();
            assert_eq!(all, (0..8).collect::<Vec<_>>());
            for batch in &arranged.batches {
                assert!(batch.range.len() <= SMALL && batch.range.start % 16 == 0);
                assert!(batch.tensors.iter().all(|&i| ordered[i] == batch.ordered));
                let (first, last) = (batch.tensors[0], batch.tensors[batch.tensors.len() - 1]);
                assert!(batch.range.start == arranged.ranges[first].start);
                assert!(batch.range.end >= arranged.ranges[last].end);
            }
        }
    }
}
