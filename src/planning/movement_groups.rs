//! Groups of tensors that move alike.

use std::ops::Range;

/// Movement of one tensor's sample.
#[derive(Clone, Debug)]
pub(super) struct TensorMovement {
    /// The range of its elements in the sample.
    pub elements: Range<usize>,
    /// Mean square of the differences of its snapshots.
    pub moved: f64,
    /// Mean square of its weights in the newest snapshot.
    pub size: f64,
}

/// Tensors whose weights move by similar shares of their size.
#[derive(Debug, Default, PartialEq)]
pub(super) struct MovementGroup {
    /// Indices of the tensors.
    pub tensors: Vec<usize>,
    /// Ranges of elements in the sample that move by similar amounts.
    pub blocks: Vec<Vec<Range<usize>>>,
}

/// Most groups of tensors that move.
const GROUPS: usize = 4;

/// Octaves of the mean square that one group spans, unless that would be more groups than [`GROUPS`].
const OCTAVES: f64 = 4.0;

/// Groups tensors by their movement relative to their weights. Those that do not move are a group of their own.
pub(super) fn movement_groups(tensors: &[TensorMovement]) -> Vec<MovementGroup> {
    let relative = |tensor: &TensorMovement| (tensor.moved / tensor.size.max(f64::MIN_POSITIVE)).log2();
    let moving = tensors.iter().filter(|tensor| tensor.moved > 0.0).map(relative);
    let (least, most) = moving.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
    let span = (most - least).max(0.0);
    let count = ((span / OCTAVES).ceil() as usize).clamp(1, GROUPS);
    let mut members = vec![Vec::new(); count + 1];
    for (index, tensor) in tensors.iter().enumerate() {
        let group = if tensor.moved > 0.0 {
            // The division is NaN if all move alike, and the place is then 0.
            let place = (relative(tensor) - least) / span * count as f64;
            (place as usize).min(count - 1)
        } else {
            count
        };
        members[group].push(index);
    }
    let members = members.into_iter().filter(|tensors| !tensors.is_empty());
    members.map(|members| MovementGroup { blocks: blocks(tensors, &members), tensors: members }).collect()
}

/// Joins the elements of tensors that move by the same amount, up to a factor of 2 of the mean square.
///
/// The size of a movement is found from the elements of one block. A few elements of one tensor are too few for it.
fn blocks(tensors: &[TensorMovement], members: &[usize]) -> Vec<Vec<Range<usize>>> {
    let octave = |index: &usize| tensors[*index].moved.log2().floor();
    let mut members = members.to_vec();
    members.sort_by(|a, b| octave(a).total_cmp(&octave(b)));
    let same = members.chunk_by(|a, b| octave(a) == octave(b));
    same.map(|chunk| chunk.iter().map(|&index| tensors[index].elements.clone()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(movements: &[(f64, f64)]) -> Vec<TensorMovement> {
        let tensor =
            |(i, &(moved, size)): (usize, &(f64, f64))| TensorMovement { elements: 10 * i..10 * i + 10, moved, size };
        movements.iter().enumerate().map(tensor).collect()
    }

    fn members(movements: &[(f64, f64)]) -> Vec<Vec<usize>> {
        movement_groups(&tensors(movements)).into_iter().map(|group| group.tensors).collect()
    }

    #[test]
    fn tensors_are_grouped_by_relative_movement() {
        assert_eq!(members(&[(1.0, 1.0), (1.0, 1.0)]), [[0, 1]]);
        assert_eq!(members(&[(1.0, 1.0), (1e-6, 1e-6), (2.0, 1.0)]), [[0, 1, 2]]);
        assert_eq!(members(&[(1e-6, 1.0), (1.0, 1.0), (2e-6, 1.0)]), [vec![0, 2], vec![1]]);
        assert_eq!(members(&[(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]), [vec![1], vec![0, 2]]);
        assert_eq!(members(&[(0.0, 1.0)]), [[0]]);
        assert_eq!(members(&[(1.0, 0.0), (1.0, 1.0)]), [[1], [0]]);
        assert!(members(&[]).is_empty());
        // No more than four groups move, whatever the span.
        let all: Vec<(f64, f64)> = (0..40).map(|i| (10f64.powi(-i), 1.0)).collect();
        assert_eq!(members(&all).len(), 4);
    }

    #[test]
    fn blocks_join_elements_that_move_by_the_same_amount() {
        let groups = movement_groups(&tensors(&[(1.0, 1.0), (3.0, 3.0), (1.5, 1.5), (0.0, 1.0)]));
        assert_eq!(groups[0].blocks, [vec![0..10, 20..30], std::iter::once(10..20).collect()]);
        assert!(groups[1].blocks.concat().into_iter().eq(std::iter::once(30..40)));
    }
}
