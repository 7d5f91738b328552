//! Averages in host memory, for parameters on any device.

use crate::compute::cpu::{Averages, Incoming, Layout, UpdateWeights, update};
use crate::tensor::{NonFiniteElement, first_non_finite_of};
#[cfg(feature = "cuda")]
use crate::tracker::values::OwnedValues;
use crate::tracker::values::Values;

/// Guard that gives access to an engine's values.
pub(in crate::tracker) enum AveragesGuard<'a> {
    /// Values in host memory that no other thread changes.
    Borrowed(Values<'a>),
    /// Copy of values on a device.
    #[cfg(feature = "cuda")]
    Owned(OwnedValues),
    /// Values in host memory that another thread updates; it waits for this guard.
    #[cfg(feature = "cuda")]
    Locked(std::sync::MutexGuard<'a, HostAverages>),
}

impl AveragesGuard<'_> {
    pub(in crate::tracker) fn values(&self) -> Values<'_> {
        match self {
            AveragesGuard::Borrowed(values) => *values,
            #[cfg(feature = "cuda")]
            AveragesGuard::Owned(values) => values.as_values(),
            #[cfg(feature = "cuda")]
            AveragesGuard::Locked(host) => host.values(),
        }
    }
}

/// Returns the first element of the parameters of an update that is NaN or infinite.
pub(super) fn first_refused(incoming: &[Incoming<'_>]) -> Option<NonFiniteElement> {
    let tensors: Vec<_> = incoming.iter().map(|incoming| (incoming.dtype, incoming.bytes)).collect();
    first_non_finite_of(&tensors)
}

/// Averages of every profile, with the newest values of the copied tensors.
pub(in crate::tracker) struct HostAverages {
    averages: Vec<Averages>,
    copies: Vec<Vec<u8>>,
}

impl HostAverages {
    pub(super) fn new(averages: Vec<Averages>, copies: Vec<Vec<u8>>) -> HostAverages {
        HostAverages { averages, copies }
    }

    pub(super) fn update(
        &mut self,
        incoming: &[Incoming<'_>],
        copied: &[&[u8]],
        layout: &Layout,
        weights: UpdateWeights<'_>,
    ) {
        update(&mut self.averages, incoming, layout, weights);
        self.copies.iter_mut().zip(copied).for_each(|(copy, bytes)| copy.copy_from_slice(bytes));
    }

    pub(super) fn values(&self) -> Values<'_> {
        Values { averages: &self.averages, copies: &self.copies, dtypes: None }
    }

    /// Returns the number of copied tensors.
    #[cfg(feature = "cuda")]
    pub(super) fn copies(&self) -> usize {
        self.copies.len()
    }
}
