//! Engine of a model in several places, with each tensor's averages beside it.
//!
//! An update is done in all places or in none: a look for NaN therefore ends in all of them before any average changes.
//! Devices wait for each other's looks. The host waits only if it holds averages itself.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::averages::AveragesGuard;
use super::background::Background;
use super::spread_averages::{PartReader, SpreadAverages, SpreadShape};
use super::{Engine, EngineConfig, Pending};
use crate::compute::cpu::{Layout, UpdateWeights};
use crate::compute::cuda::{AveragesReader, DeviceAverages};
use crate::error::{Error, Result};
use crate::tensor::NonFiniteElement;
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::registry::OrderedViews;

/// Engine that keeps the averages of each tensor beside it.
pub(in crate::tracker) struct SpreadEngine {
    // Declared first, so that it is dropped first: its thread reads the averages.
    background: Background,
    averages: SpreadAverages,
    /// Readers of the devices, kept from checkpoint to checkpoint with their buffers.
    readers: Arc<Mutex<Vec<AveragesReader>>>,
    /// True if the newest update looked for NaN.
    has_looked: bool,
}

impl SpreadEngine {
    pub(super) fn start(dir: &Path, shape: SpreadShape, config: EngineConfig) -> Result<SpreadEngine> {
        let averages = SpreadAverages::start(shape, config)?;
        // Locks their memory now: later, training may have left none.
        let mut readers = device_readers(averages.readers(Vec::new())?);
        readers.iter_mut().try_for_each(AveragesReader::prepare)?;
        let readers = Arc::new(Mutex::new(readers));
        Ok(SpreadEngine { background: Background::start(dir)?, averages, readers, has_looked: false })
    }
}

/// Returns the readers of devices.
fn device_readers(readers: Vec<PartReader>) -> Vec<AveragesReader> {
    let of_device = |reader| match reader {
        PartReader::Device(reader) => Some(reader),
        PartReader::Host(_) => None,
    };
    readers.into_iter().filter_map(of_device).collect()
}

impl Engine for SpreadEngine {
    fn fold(
        &mut self,
        views: &OrderedViews<'_, '_>,
        _: &Layout,
        weights: UpdateWeights<'_>,
        looks: bool,
    ) -> Result<()> {
        self.averages.check()?;
        self.averages.check_parameters(views)?;
        // The averages must not change while a checkpoint reads them.
        self.background.wait_for_reads();
        self.has_looked = looks;
        if looks {
            self.averages.look(views)?;
            // Averages in host memory change at once, so the looks of the devices must have ended.
            if !self.averages.is_on_devices() && self.averages.refused()?.is_some() {
                return Ok(());
            }
        }
        self.averages.update(views, weights, looks)
    }

    fn refused(&self) -> Result<Option<NonFiniteElement>> {
        self.averages.check()?;
        if self.has_looked { self.averages.refused() } else { Ok(None) }
    }

    fn looks_later(&self) -> bool {
        self.averages.is_on_devices()
    }

    fn values(&self) -> Result<AveragesGuard<'_>> {
        self.background.wait();
        let mut readers = self.averages.readers(Vec::new())?;
        Ok(AveragesGuard::Owned(self.averages.shape().gather(&mut readers)?))
    }

    fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure> {
        self.background.wait_for_reads();
        let kept = std::mem::take(&mut *self.readers.lock().unwrap_or_else(PoisonError::into_inner));
        let mut readers = self.averages.readers(kept).map_err(Failure::Files)?;
        let keep = self.readers.clone();
        let shape = self.averages.shape().clone();
        self.background.store(meta, None, move |_| {
            let values = shape.gather(&mut readers);
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = device_readers(readers);
            values.map(Some).map_err(Failure::Files)
        });
        Ok(())
    }

    fn pending(&self) -> Option<&dyn Pending> {
        Some(&self.background)
    }

    fn placement(&self) -> String {
        "averages beside the parameters, on several devices".into()
    }

    fn spread(&self) -> Option<&SpreadAverages> {
        Some(&self.averages)
    }

    fn in_graphs(&mut self, _: bool) -> Result<&mut DeviceAverages> {
        let reason = "an update in a CUDA graph needs all tensors on one device, and they are in several places: \
                      call `update` between the replays of the graph";
        Err(Error::Setting { option: "device", reason: reason.into() })
    }
}
