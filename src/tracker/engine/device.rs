//! Averages on a CUDA device, updated by one launch on the training stream and stored in the background.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::averages::AveragesGuard;
use super::background::Background;
use super::{Engine, EngineConfig, Pending, cuda_tensors};
use crate::compute::cpu::{Layout, UpdateWeights};
use crate::compute::cuda::{AveragesReader, CudaDevice, DeviceAverages};
use crate::error::Result;
use crate::tensor::NonFiniteElement;
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::registry::OrderedViews;
use crate::tracker::values::OwnedValues;

/// Engine that keeps the averages on the device of the parameters.
pub(in crate::tracker) struct DeviceEngine {
    // Declared first, so that it is dropped first: its thread reads the averages.
    background: Background,
    averages: DeviceAverages,
    /// Reader of the averages, kept from checkpoint to checkpoint with its buffers.
    reader: Arc<Mutex<Option<AveragesReader>>>,
}

impl DeviceEngine {
    pub(super) fn start(
        device: &Arc<CudaDevice>,
        dir: &Path,
        layout: &Layout,
        config: EngineConfig,
    ) -> Result<DeviceEngine> {
        let averages = match config.values {
            Some((averages, copies)) => DeviceAverages::upload(device, layout, &averages, config.precision, &copies)?,
            None => DeviceAverages::zeros(device, layout, config.profiles, config.precision, &config.copied)?,
        };
        // Locks its memory now: later, training may have left none.
        let mut reader = averages.reader()?;
        reader.prepare()?;
        Ok(DeviceEngine { background: Background::start(dir)?, averages, reader: Arc::new(Mutex::new(Some(reader))) })
    }
}

impl Engine for DeviceEngine {
    fn fold(
        &mut self,
        views: &OrderedViews<'_, '_>,
        _: &Layout,
        weights: UpdateWeights<'_>,
        looks: bool,
    ) -> Result<()> {
        let (averaged, copied) = cuda_tensors(views)?;
        // The averages must not change while a checkpoint reads them.
        self.background.wait_for_reads();
        match looks {
            true => self.averages.update_if_finite(&averaged, &copied, weights),
            false => self.averages.update(&averaged, &copied, weights),
        }
    }

    fn refused(&self) -> Result<Option<NonFiniteElement>> {
        self.averages.refused()
    }

    fn looks_later(&self) -> bool {
        true
    }

    fn values(&self) -> Result<AveragesGuard<'_>> {
        self.background.wait();
        Ok(AveragesGuard::Owned(read(&mut self.averages.reader()?, self.averages.profiles())?))
    }

    fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure> {
        // Does not delay the training further: the updates since an earlier checkpoint have waited already.
        self.background.wait_for_reads();
        let kept = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reader = match kept {
            Some(reader) => self.averages.follow(&reader).map(|()| reader),
            None => self.averages.reader(),
        };
        let mut reader = reader.map_err(Failure::Files)?;
        let keep = self.reader.clone();
        let profiles = self.averages.profiles();
        self.background.store(meta, None, move |_| {
            let values = read(&mut reader, profiles);
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = Some(reader);
            values.map(Some).map_err(Failure::Files)
        });
        Ok(())
    }

    fn pending(&self) -> Option<&dyn Pending> {
        Some(&self.background)
    }

    fn placement(&self) -> String {
        format!("averages on cuda:{}, beside the parameters", self.averages.device().number())
    }

    fn on_device(&self) -> Option<&DeviceAverages> {
        Some(&self.averages)
    }

    fn in_graphs(&mut self, is_due: bool) -> Result<&mut DeviceAverages> {
        if is_due {
            self.background.wait_for_reads();
        }
        Ok(&mut self.averages)
    }
}

/// Copies the averages and the copied tensors to the host, where the writer converts them for the snapshots.
fn read(reader: &mut AveragesReader, profiles: usize) -> Result<OwnedValues> {
    let averages = (0..profiles).map(|profile| reader.averages(profile)).collect::<Result<_>>()?;
    Ok(OwnedValues { averages, copies: reader.copies()?, dtypes: None })
}
