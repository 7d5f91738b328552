//! Values of the running averages after one update, borrowed or owned.

use std::ops::Range;

use safetensors::Dtype;

use crate::compute::cpu::{Averages, Layout};

/// Values that a checkpoint or a synthesis reads, all of the same update.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    /// Averages of each profile.
    pub averages: &'a [Averages],
    /// Newest values of the copied tensors.
    pub copies: &'a [Vec<u8>],
    /// Stored dtype of each averaged tensor of each profile, if all values have been scanned already.
    pub dtypes: Option<&'a [Vec<Dtype>]>,
    /// Data of each profile's snapshot in these dtypes, if a device has converted it already. Otherwise it is converted
    /// from `averages`, which gives the same bits.
    pub converted: Option<&'a [Converted]>,
}

impl Values<'_> {
    /// Fills `dst` with the range `bytes` of averaged tensor `i` of a profile, as its snapshot stores it in `dtype`.
    pub(super) fn store(
        &self,
        dst: &mut [u8],
        layout: &Layout,
        profile: usize,
        i: usize,
        bytes: Range<usize>,
        dtype: Dtype,
    ) {
        match self.converted {
            Some(converted) => dst.copy_from_slice(&converted[profile].tensor(i)[bytes]),
            None => {
                let start = layout.range(i).start;
                let size = dtype.bitsize() / 8;
                self.averages[profile].store(dst, start + bytes.start / size..start + bytes.end / size, dtype);
            }
        }
    }
}

/// Average of one profile, converted to the dtypes of its snapshot.
#[derive(Clone, Debug)]
#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code, reason = "made by the engine that converts on a device"))]
pub(super) struct Converted {
    /// Range of each averaged tensor within `bytes`.
    pub places: Vec<Range<usize>>,
    /// Elements of all tensors in their dtypes, little endian.
    pub bytes: Vec<u8>,
}

impl Converted {
    fn tensor(&self, i: usize) -> &[u8] {
        &self.bytes[self.places[i].clone()]
    }
}

/// Owned [`Values`], for another thread.
///
/// `dtypes` must come from `CheckpointMeta::choose_dtypes`, which refuses values that are not finite.
#[derive(Clone, Debug, Default)]
pub(super) struct OwnedValues {
    pub averages: Vec<Averages>,
    pub copies: Vec<Vec<u8>>,
    pub dtypes: Option<Vec<Vec<Dtype>>>,
    pub converted: Option<Vec<Converted>>,
}

impl OwnedValues {
    pub(super) fn as_values(&self) -> Values<'_> {
        Values {
            averages: &self.averages,
            copies: &self.copies,
            dtypes: self.dtypes.as_deref(),
            converted: self.converted.as_deref(),
        }
    }
}
