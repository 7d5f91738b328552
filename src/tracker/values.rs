//! Values of the running averages after one update, borrowed or owned.

use safetensors::Dtype;

use crate::compute::cpu::Averages;

/// Values that a checkpoint or a synthesis reads, all of the same update.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    /// Averages of each profile.
    pub averages: &'a [Averages],
    /// Newest values of the copied tensors.
    pub copies: &'a [Vec<u8>],
    /// Stored dtype of each averaged tensor of each profile, if all values have been scanned already.
    pub dtypes: Option<&'a [Vec<Dtype>]>,
}

/// Owned [`Values`], for another thread.
///
/// `dtypes` must come from `CheckpointMeta::choose_dtypes`, which refuses values that are not finite.
#[derive(Clone, Debug, Default)]
pub(super) struct OwnedValues {
    pub averages: Vec<Averages>,
    pub copies: Vec<Vec<u8>>,
    pub dtypes: Option<Vec<Vec<Dtype>>>,
}

impl OwnedValues {
    pub(super) fn as_values(&self) -> Values<'_> {
        Values { averages: &self.averages, copies: &self.copies, dtypes: self.dtypes.as_deref() }
    }
}
