//! What the running averages hold at one update: borrowed from an engine, or of its own.

use std::ops::Range;

use safetensors::Dtype;

use crate::compute::cpu::{Averages, Layout};

/// The values that a checkpoint or a synthesis reads, all of the same update.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    /// The averages of each profile.
    pub averages: &'a [Averages],
    /// The newest values of the tensors that are copied.
    pub copies: &'a [Vec<u8>],
    /// The dtype that each averaged tensor of each profile is stored in, where all values have been looked at already.
    pub dtypes: Option<&'a [Vec<Dtype>]>,
    /// Of each profile, what its snapshot stores in these dtypes, where that has been worked out already; otherwise it is
    /// converted from `averages`, which give the same bits.
    pub converted: Option<&'a [Converted]>,
}

impl Values<'_> {
    /// Fills a stretch of bytes of averaged tensor `i` of a profile, as its snapshot stores it in `dtype`.
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
                let (start, size) = (layout.place(i).start, dtype.bitsize() / 8);
                self.averages[profile].store(dst, start + bytes.start / size..start + bytes.end / size, dtype);
            }
        }
    }
}

/// The average of one profile as its snapshot stores it.
#[derive(Clone, Debug)]
#[cfg_attr(not(any(test, feature = "cuda")), allow(dead_code, reason = "made by the engine that converts on a device"))]
pub(super) struct Converted {
    /// Where the elements of each averaged tensor lie within `bytes`.
    pub places: Vec<Range<usize>>,
    /// The elements of all, in their dtypes, little endian.
    pub bytes: Vec<u8>,
}

impl Converted {
    fn tensor(&self, i: usize) -> &[u8] {
        &self.bytes[self.places[i].clone()]
    }
}

/// As [`Values`], in memory of its own: what a thread takes along.
///
/// Whoever gives dtypes chooses them by [`CheckpointMeta::choose_dtypes`](super::moment::Moment::choose_dtypes), which refuses
/// values that are not finite.
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

/// What an engine lends its values through.
pub(super) enum AveragesGuard<'a> {
    /// They lie in host memory and are lent from there.
    Borrowed(Values<'a>),
    /// They were brought there for this.
    #[cfg(feature = "cuda")]
    Owned(OwnedValues),
    /// They lie in host memory, where a thread works on them at other times.
    #[cfg(feature = "cuda")]
    Locked(std::sync::MutexGuard<'a, super::engine::HostAverages>),
}

impl AveragesGuard<'_> {
    pub(super) fn values(&self) -> Values<'_> {
        match self {
            AveragesGuard::Borrowed(values) => *values,
            #[cfg(feature = "cuda")]
            AveragesGuard::Owned(values) => values.as_values(),
            #[cfg(feature = "cuda")]
            AveragesGuard::Locked(host) => host.values(),
        }
    }
}
