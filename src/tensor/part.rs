//! Parts of tensors: the rectangles that the processes of a sharded training hold.

use super::TensorView;
use crate::error::{Error, Result};

/// Place of a rectangle in a larger tensor.
///
/// The shape of the rectangle is that of its [`TensorView`]. A view of one dimension whose offset has one number, while
/// the tensor has another number of dimensions, is a range of the flattened tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// Shape of the whole tensor.
    pub global: &'a [usize],
    /// First element of the rectangle: one index for each dimension, or one index into the flattened tensor.
    pub offset: &'a [usize],
}

impl<'a> TensorView<'a> {
    /// Marks the view as a rectangle of a larger tensor, of which other processes hold the rest. It may be empty.
    ///
    /// `global` is the shape of the whole tensor, `offset` the first element of the rectangle in each dimension. With
    /// an offset of one number and a view of one dimension, a tensor of several dimensions is flattened.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the rectangle is not in the tensor.
    pub fn as_part_of(self, global: &'a [usize], offset: &'a [usize]) -> Result<Self> {
        let part = Part { global, offset };
        part.check(self.name, self.shape)?;
        Ok(TensorView { part: Some(part), ..self })
    }

    /// Marks elements that another process of a sharded run stores. They are averaged here, too.
    #[must_use]
    pub fn as_replica(self) -> Self {
        TensorView { is_replica: true, ..self }
    }

    /// Returns the place of the view, which for a whole tensor is all of it.
    pub(crate) fn placed(&self) -> (Vec<usize>, Vec<usize>) {
        match self.part {
            Some(Part { global, offset }) => (global.to_vec(), offset.to_vec()),
            None => (self.shape.to_vec(), vec![0; self.shape.len()]),
        }
    }
}

impl Part<'_> {
    /// Checks that a rectangle of this shape is in the tensor.
    pub(crate) fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        let Part { global, offset } = self;
        let Some(elements) = global.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent)) else {
            return Err(Error::tensor(name, format!("its global shape {global:?} has more than 2^64 elements")));
        };
        let flat = [elements];
        let grid = if offset.len() == 1 && global.len() != 1 { &flat[..] } else { global };
        let is_inside = offset.len() == grid.len()
            && shape.len() == grid.len()
            && (0..grid.len()).all(|i| offset[i].checked_add(shape[i]).is_some_and(|end| end <= grid[i]));
        if is_inside {
            return Ok(());
        }
        let reason = format!(
            "a part of shape {shape:?} at offset {offset:?} is not in the global shape {global:?}: give one offset for \
             each dimension, or one offset and one extent in the flattened tensor"
        );
        Err(Error::tensor(name, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;

    #[test]
    fn parts_must_be_in_their_tensor() {
        let bytes = [0; 24];
        for (shape, global, offset, is_inside) in [
            (&[2, 3][..], &[4, 3][..], &[2, 0][..], true),
            (&[2, 3], &[4, 3], &[3, 0], false),
            (&[2, 3], &[4, 3], &[usize::MAX, 0], false),
            (&[6], &[4, 3], &[6], true),
            (&[6], &[4, 3], &[7], false),
            (&[6], &[6], &[0], true),
            (&[2, 3], &[4, 3], &[2], false),
            (&[6, 1], &[usize::MAX, 3], &[0, 0], false),
        ] {
            let view = TensorView::host("the.name", Dtype::F32, shape, &bytes).unwrap();
            match view.as_part_of(global, offset) {
                Ok(_) => assert!(is_inside, "{shape:?} {global:?} {offset:?}"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(!is_inside && text.contains("the.name") && text.contains("global shape"), "{text}");
                }
            }
        }
        let empty = TensorView::host("e", Dtype::F32, &[0, 3], &[]).unwrap().as_part_of(&[4, 3], &[4, 0]).unwrap();
        assert_eq!(empty.placed(), (vec![4, 3], vec![4, 0]));
        assert!(empty.as_replica().is_replica);
    }
}
