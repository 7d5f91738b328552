//! Places of a model's tensors: host memory and CUDA devices.

use crate::tensor::{Memory, TensorView};

/// Returns the number of each tensor's CUDA device, in the order of the views; none for host memory.
pub(in crate::tracker) fn places<'v, 'a: 'v>(views: impl Iterator<Item = &'v TensorView<'a>>) -> Vec<Option<usize>> {
    views.map(device_of).collect()
}

/// Returns the place of all tensors, if it is the same. A model without tensors is on the host.
pub(super) fn common_place(places: &[Option<usize>]) -> Option<Option<usize>> {
    let first = places.first().copied().flatten();
    places.iter().all(|place| *place == first).then_some(first)
}

/// Returns the number of a tensor's CUDA device; none for host memory.
pub(super) fn device_of(view: &TensorView<'_>) -> Option<usize> {
    match view.memory {
        Memory::Host(_) => None,
        Memory::Cuda(memory) => Some(memory.device),
    }
}

/// Returns the words for a place.
#[cfg(feature = "cuda")]
pub(super) fn place_name(device: Option<usize>) -> String {
    device.map_or("in host memory".to_owned(), |number| format!("on cuda:{number}"))
}

/// Tensors of a model that are in one place, by their indices in the model.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(super) struct PlacedTensors {
    /// Number of the CUDA device; none for host memory.
    pub place: Option<usize>,
    /// Averaged tensors.
    pub averaged: Vec<usize>,
    /// Copied tensors, counted by themselves.
    pub copied: Vec<usize>,
}

/// Groups the tensors of a model by their places, devices first. The first `averaged` tensors are averaged.
#[cfg(feature = "cuda")]
pub(super) fn group_by_place(places: &[Option<usize>], averaged: usize) -> Vec<PlacedTensors> {
    let mut distinct: Vec<Option<usize>> = places.to_vec();
    distinct.sort_unstable_by_key(|place| (place.is_none(), *place));
    distinct.dedup();
    let in_place = |place: Option<usize>, range: std::ops::Range<usize>| -> Vec<usize> {
        let start = range.start;
        range.filter(|&i| places[i] == place).map(|i| i - start).collect()
    };
    let group = |place| PlacedTensors {
        place,
        averaged: in_place(place, 0..averaged),
        copied: in_place(place, averaged..places.len()),
    };
    distinct.into_iter().map(group).collect()
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_grouped_with_the_host_last() {
        let places = [Some(1), None, Some(0), Some(1), None, Some(1)];
        assert_eq!(common_place(&places), None);
        let groups = group_by_place(&places, 4);
        let listed: Vec<_> = groups.into_iter().map(|g| (g.place, g.averaged, g.copied)).collect();
        let expected = [(Some(0), vec![2], vec![]), (Some(1), vec![0, 3], vec![1]), (None, vec![1], vec![0])];
        assert_eq!(listed, expected);
        assert_eq!(common_place(&[Some(1), Some(1)]), Some(Some(1)));
        assert_eq!(common_place(&[]), Some(None));
    }
}
