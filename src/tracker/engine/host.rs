//! Averages in host memory, updated and written by the calling thread.

use crate::compute::cpu::{Averages, Incoming, Layout, update};
use crate::error::{Error, Result};
use crate::tensor::TensorView;
use crate::tracker::moment::{Failure, Moment};
use crate::tracker::table::Matched;
use crate::tracker::values::Values;

/// The averages of parameters in host memory.
pub(in crate::tracker) struct HostEngine {
    averages: Vec<Averages>,
    /// The newest values of the tensors that are copied.
    copies: Vec<Vec<u8>>,
}

impl HostEngine {
    pub(in crate::tracker) fn new(averages: Vec<Averages>, copies: Vec<Vec<u8>>) -> HostEngine {
        HostEngine { averages, copies }
    }

    pub(super) fn fold(&mut self, matched: &Matched<'_, '_>, layout: &Layout, weights: &[f32]) -> Result<()> {
        // All views are looked at before the first average changes.
        let incoming = matched.averaged.iter().map(|view| incoming(view)).collect::<Result<Vec<_>>>()?;
        let copied = matched.copied.iter().map(|view| host_bytes(view)).collect::<Result<Vec<_>>>()?;
        self.update(&incoming, &copied, layout, weights);
        Ok(())
    }

    pub(super) fn update(&mut self, incoming: &[Incoming<'_>], copied: &[&[u8]], layout: &Layout, weights: &[f32]) {
        update(&mut self.averages, incoming, layout, weights);
        self.copies.iter_mut().zip(copied).for_each(|(copy, bytes)| copy.copy_from_slice(bytes));
    }

    pub(in crate::tracker) fn values(&self) -> Values<'_> {
        Values { averages: &self.averages, copies: &self.copies, converted: None }
    }

    /// The number of tensors that are copied.
    #[cfg(feature = "cuda")]
    pub(super) fn copies(&self) -> usize {
        self.copies.len()
    }

    pub(super) fn checkpoint(&self, moment: &Moment) -> Result<(), Failure> {
        moment.store(&self.values())
    }
}

fn incoming<'a>(view: &TensorView<'a>) -> Result<Incoming<'a>> {
    Ok(Incoming { dtype: view.dtype, bytes: host_bytes(view)? })
}

fn host_bytes<'a>(view: &TensorView<'a>) -> Result<&'a [u8]> {
    view.host_bytes().ok_or_else(|| Error::on_device(view.name))
}
