//! Averages of parameters in host memory.
//!
//! The calling thread updates them and copies them at a checkpoint; another thread writes the copy.

use std::path::Path;

use super::averages::{AveragesGuard, HostAverages, first_refused};
use super::copy_buffer::CopyBuffer;
use super::{Engine, Pending};
use crate::compute::cpu::{Incoming, Layout, UpdateWeights};
use crate::error::{Error, Result};
use crate::tensor::{NonFiniteElement, TensorView};
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::registry::OrderedViews;
use crate::tracker::writer::{CheckpointJob, Writer};

/// Engine for parameters in host memory.
pub(in crate::tracker) struct HostEngine {
    averages: HostAverages,
    refused: Option<NonFiniteElement>,
    /// Started at the first checkpoint: a process may fork before that, or never store anything.
    pub(in crate::tracker) writer: Option<Writer>,
    pub(in crate::tracker) copy_buffer: CopyBuffer,
}

impl HostEngine {
    pub(super) fn new(averages: HostAverages) -> HostEngine {
        HostEngine { averages, refused: None, writer: None, copy_buffer: CopyBuffer::default() }
    }

    fn writer(&mut self, dir: &Path) -> Result<&Writer> {
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => Writer::start(dir)?,
        };
        Ok(self.writer.insert(writer))
    }
}

impl Engine for HostEngine {
    fn fold(
        &mut self,
        views: &OrderedViews<'_, '_>,
        layout: &Layout,
        weights: UpdateWeights<'_>,
        looks: bool,
    ) -> Result<()> {
        // Checks all views before the first average changes.
        let incoming = views.averaged.iter().map(|view| incoming(view)).collect::<Result<Vec<_>>>()?;
        let copied = views.copied.iter().map(|view| host_bytes(view)).collect::<Result<Vec<_>>>()?;
        self.refused = if looks { first_refused(&incoming) } else { None };
        if self.refused.is_none() {
            self.averages.update(&incoming, &copied, layout, weights);
        }
        Ok(())
    }

    fn refused(&self) -> Result<Option<NonFiniteElement>> {
        Ok(self.refused)
    }

    fn values(&self) -> Result<AveragesGuard<'_>> {
        Ok(AveragesGuard::Borrowed(self.averages.values()))
    }

    /// Allocates the memory of checkpoints.
    fn prepare(&self) {
        self.copy_buffer.prepare(&self.averages.values());
    }

    /// Copies the averages for the writing thread, after the previous checkpoint is written or given up.
    ///
    /// There is at most one copy at any time.
    fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure> {
        self.wait_idle().map_err(Failure::Files)?;
        let values = self.averages.values();
        let Some(copy) = self.copy_buffer.copy_of(&values, &meta)? else {
            return meta.store(&values);
        };
        let recycle = self.copy_buffer.recycle();
        let writer = self.writer(&meta.dir).map_err(Failure::Files)?;
        writer.submit(CheckpointJob { meta, values: copy, recycle: Some(recycle) }).map_err(Failure::Files)
    }

    fn pending(&self) -> Option<&dyn Pending> {
        self.writer.as_ref().map(|writer| writer as &dyn Pending)
    }
}

fn incoming<'a>(view: &TensorView<'a>) -> Result<Incoming<'a>> {
    Ok(Incoming { dtype: view.dtype, bytes: host_bytes(view)? })
}

fn host_bytes<'a>(view: &TensorView<'a>) -> Result<&'a [u8]> {
    view.host_bytes().ok_or_else(|| Error::on_device(view.name))
}
