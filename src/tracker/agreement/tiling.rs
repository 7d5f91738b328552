//! Rectangles of one tensor: overlaps, and the elements that they cover.

use std::collections::BTreeSet;

/// HeldRectangle in a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct HeldRectangle<'a> {
    pub offset: &'a [usize],
    pub shape: &'a [usize],
}

impl HeldRectangle<'_> {
    /// Returns the number of elements. Its factors are those of a tensor in memory.
    pub(super) fn volume(&self) -> usize {
        self.shape.iter().product()
    }

    fn overlaps(&self, other: &HeldRectangle<'_>) -> bool {
        let meets =
            |i| self.offset[i] < other.offset[i] + other.shape[i] && other.offset[i] < self.offset[i] + self.shape[i];
        (0..self.shape.len()).all(meets)
    }
}

/// Returns the indices of two rectangles that overlap, if there are such. All are of one grid, and none is empty.
///
/// They are sorted along the dimension with most distinct starts, so that few are compared whatever the tiling.
pub(super) fn first_overlap(rectangles: &[HeldRectangle<'_>]) -> Option<(usize, usize)> {
    let dimensions = rectangles.first()?.shape.len();
    let starts = |d: usize| rectangles.iter().map(|rectangle| rectangle.offset[d]).collect::<BTreeSet<_>>().len();
    // Scalars have no dimension: two of them overlap.
    let Some(d) = (0..dimensions).max_by_key(|&d| starts(d)) else {
        return (rectangles.len() > 1).then_some((0, 1));
    };
    let mut order: Vec<usize> = (0..rectangles.len()).collect();
    order.sort_by_key(|&i| rectangles[i].offset[d]);
    for (place, &i) in order.iter().enumerate() {
        let end = rectangles[i].offset[d] + rectangles[i].shape[d];
        let near = order[place + 1..].iter().take_while(|&&j| rectangles[j].offset[d] < end);
        if let Some(&j) = near.into_iter().find(|&&j| rectangles[i].overlaps(&rectangles[j])) {
            return Some((i.min(j), i.max(j)));
        }
    }
    None
}
