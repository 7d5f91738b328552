//! Averages on the host of parameters on a CUDA device: each update copies the parameters once, in their own dtype, beside
//! the training, and a thread folds them in when they have arrived.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use safetensors::Dtype;

use super::background::Background;
use super::{HostEngine, Start, cuda_memory};
use crate::compute::cpu::{Incoming, Layout};
use crate::compute::cuda::{Arrived, Device, Fence, Offload};
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;
use crate::tracker::moment::{Failure, Moment};
use crate::tracker::table::Matched;
use crate::tracker::values::OwnedValues;

/// The averages, fed from a device.
pub(in crate::tracker) struct OffloadedEngine {
    // Dropped first: its thread folds what has arrived.
    background: Background,
    offload: Offload,
    averages: Arc<Mutex<Averages>>,
    layout: Arc<Layout>,
    fence: Option<Fence>,
}

/// The averages, and whether an update is missing in them.
pub(in crate::tracker) struct Averages {
    host: HostEngine,
    /// What became of an update that never arrived: nothing may be stored after it.
    lost: Option<String>,
}

impl Averages {
    pub(in crate::tracker) fn host(&self) -> &HostEngine {
        &self.host
    }

    fn check(&self) -> Result<()> {
        match &self.lost {
            Some(reason) => Err(Error::Nothing(format!(
                "an update of the averages was lost ({reason}): they are not stored; start again and resume the run"
            ))),
            None => Ok(()),
        }
    }
}

impl OffloadedEngine {
    pub(super) fn start(device: &Arc<Device>, dir: &Path, layout: &Layout, start: Start) -> Result<OffloadedEngine> {
        let sizes: Vec<usize> = start.averaged.iter().chain(&start.copied).copied().collect();
        let averages = Averages { host: start.host(layout), lost: None };
        Ok(OffloadedEngine {
            background: Background::start(dir)?,
            offload: Offload::new(device, &sizes)?,
            averages: Arc::new(Mutex::new(averages)),
            layout: Arc::new(layout.clone()),
            fence: None,
        })
    }

    pub(super) fn fold(&mut self, matched: &Matched<'_, '_>, weights: &[f32]) -> Result<()> {
        let views = matched.averaged.iter().chain(&matched.copied);
        let tensors = views.map(|view| cuda_memory(view)).collect::<Result<Vec<CudaMemory<'_>>>>()?;
        lock(&self.averages).check()?;
        let (staged, fence) = self.offload.copy(&tensors)?;
        self.fence = Some(fence);
        let dtypes: Vec<Dtype> = matched.averaged.iter().map(|view| view.dtype).collect();
        let (averages, layout, weights) = (self.averages.clone(), self.layout.clone(), weights.to_vec());
        self.background.work(move || {
            let arrived = staged.wait();
            let mut averages = lock(&averages);
            match arrived {
                Ok(arrived) => fold(&mut averages.host, &arrived, &dtypes, &layout, &weights),
                Err(error) => {
                    averages.lost.get_or_insert(error.to_string());
                    return Err(error);
                }
            }
            Ok(())
        });
        Ok(())
    }

    /// The averages with all updates folded in.
    pub(super) fn averages(&self) -> Result<MutexGuard<'_, Averages>> {
        self.background.wait();
        let averages = lock(&self.averages);
        averages.check()?;
        Ok(averages)
    }

    pub(super) fn checkpoint(&self, moment: Moment) -> Result<(), Failure> {
        let averages = self.averages.clone();
        self.background.store(moment, move |_| {
            let averages = lock(&averages);
            averages.check().map_err(Failure::Values)?;
            let values = averages.host.values();
            Ok(OwnedValues { averages: values.averages.to_vec(), copies: values.copies.to_vec(), converted: None })
        });
        Ok(())
    }

    pub(super) fn fence(&self) -> Option<&Fence> {
        self.fence.as_ref()
    }

    pub(super) fn background(&self) -> &Background {
        &self.background
    }
}

fn fold(host: &mut HostEngine, arrived: &Arrived, dtypes: &[Dtype], layout: &Layout, weights: &[f32]) {
    let incoming = dtypes.iter().enumerate().map(|(i, &dtype)| Incoming { dtype, bytes: arrived.tensor(i) });
    let incoming: Vec<Incoming<'_>> = incoming.collect();
    let copied: Vec<&[u8]> = (0..host.copies()).map(|i| arrived.tensor(dtypes.len() + i)).collect();
    host.update(&incoming, &copied, layout, weights);
}

/// A thread that panicked while it held the lock has left whole numbers behind, and told of it.
fn lock(averages: &Mutex<Averages>) -> MutexGuard<'_, Averages> {
    averages.lock().unwrap_or_else(PoisonError::into_inner)
}
