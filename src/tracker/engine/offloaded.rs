//! Averages on the host of parameters on CUDA devices, some of which may be in host memory.
//!
//! Each update copies the parameters once, in their own dtype, beside the training. A thread folds them in when they
//! have arrived.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use safetensors::Dtype;

use super::averages::{AveragesGuard, HostAverages, first_refused};
use super::background::Background;
use super::copy_buffer::CopyBuffer;
use super::gathered_copies::{ArrivedCopies, Gathering};
use super::{Engine, EngineConfig, Pending};
use crate::compute::cpu::{Incoming, Layout, UpdateWeights};
use crate::compute::cuda::{CudaDevice, Fence, Offload, check_host_memory};
use crate::error::{Error, Result};
use crate::tensor::{NonFiniteElement, TensorView};
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::registry::OrderedViews;

/// Engine that keeps averages on the host for parameters on a device.
pub(in crate::tracker) struct OffloadedEngine {
    // Declared first, so that it is dropped first: its thread folds in what has arrived.
    background: Background,
    gathering: Gathering,
    averages: Arc<OffloadedAverages>,
    layout: Arc<Layout>,
    /// Result of the newest look.
    looked: Looked,
    fence: Option<Fence>,
    copy_buffer: CopyBuffer,
}

/// Choice of a copy of the parameters within their device at each update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceCopy {
    Never,
    /// Unless the device has too little memory.
    IfPossible,
    Always,
}

/// Result of a look by the thread, once it is there: the first element for which the update is refused.
type Looked = Arc<OnceLock<Option<NonFiniteElement>>>;

/// Promise of a result, which is kept even if the thread fails before it looks.
struct Promise(Looked);

impl Drop for Promise {
    fn drop(&mut self) {
        self.0.get_or_init(|| None);
    }
}

/// Averages, with a record of a lost update.
struct OffloadedAverages {
    /// Number of the first of the parameters' devices.
    device: usize,
    host: Mutex<HostAverages>,
    /// Reason why an update was not folded in completely; nothing may be stored after that. Outside the lock, so that
    /// reading it does not wait for a fold.
    lost: OnceLock<String>,
}

impl OffloadedAverages {
    fn check(&self) -> Result<()> {
        match self.lost.get() {
            Some(reason) => Err(Error::Cuda {
                device: self.device,
                action: "go on with the averages".into(),
                reason: format!("an update was lost ({reason}): nothing is stored; start again and resume the run"),
            }),
            None => Ok(()),
        }
    }

    /// Locks the averages.
    ///
    /// # Errors
    /// [`Error::Cuda`] if an update was lost.
    fn lock(&self) -> Result<MutexGuard<'_, HostAverages>> {
        let host = self.host.lock().unwrap_or_else(|poisoned| {
            // Some tensors may be folded in, and others not.
            self.lost.get_or_init(|| "the thread that folds it in panicked".into());
            poisoned.into_inner()
        });
        self.check()?;
        Ok(host)
    }
}

impl OffloadedEngine {
    pub(super) fn start(
        dir: &Path,
        layout: &Layout,
        places: &[Option<usize>],
        config: EngineConfig,
    ) -> Result<OffloadedEngine> {
        let sizes: Vec<usize> = config.averaged.iter().chain(&config.copied).copied().collect();
        let number = places.iter().flatten().min().copied().unwrap_or(0);
        let on_devices = places.iter().zip(&sizes).filter(|(place, _)| place.is_some()).map(|(_, &bytes)| bytes);
        let pinned = Offload::pinned_bytes(&on_devices.collect::<Vec<_>>());
        let device = CudaDevice::open(number)?;
        check_host_memory(&device, pinned + config.bytes(layout), "averages in host memory")?;
        let prepare = |device: &Arc<CudaDevice>, tensors: &[usize], sizes: &[usize]| {
            let averaged = tensors.iter().filter(|&&tensor| tensor < layout.len());
            let elements = averaged.map(|&tensor| layout.range(tensor).len()).sum();
            offload(device, sizes, device_copy(device, elements, sizes, config.device_copy)?)
        };
        let gathering = Gathering::new(places, &sizes, &prepare)?;
        let averages =
            OffloadedAverages { device: number, host: Mutex::new(config.host(layout)), lost: OnceLock::new() };
        Ok(OffloadedEngine {
            background: Background::start(dir)?,
            gathering,
            averages: Arc::new(averages),
            layout: Arc::new(layout.clone()),
            looked: Arc::new(OnceLock::from(None)),
            fence: None,
            copy_buffer: CopyBuffer::default(),
        })
    }
}

impl Engine for OffloadedEngine {
    fn fold(
        &mut self,
        views: &OrderedViews<'_, '_>,
        _: &Layout,
        weights: UpdateWeights<'_>,
        looks: bool,
    ) -> Result<()> {
        let tensors: Vec<&TensorView<'_>> = views.all().collect();
        self.averages.check()?;
        let (staged, fence) = self.gathering.copy(&tensors)?;
        self.fence = Some(fence);
        let dtypes: Vec<Dtype> = views.averaged.iter().map(|view| view.dtype).collect();
        let averages = self.averages.clone();
        let layout = self.layout.clone();
        let UpdateWeights { each, threshold } = weights;
        let each = each.to_vec();
        self.looked = Looked::default();
        let promise = Promise(self.looked.clone());
        self.background.work(move || {
            let arrived = staged.wait().inspect_err(|error| {
                averages.lost.get_or_init(|| error.to_string());
            })?;
            let mut host = averages.lock()?;
            let incoming = incoming(&arrived, &dtypes);
            let refused = if looks { first_refused(&incoming) } else { None };
            promise.0.get_or_init(|| refused);
            if refused.is_none() {
                let copied: Vec<&[u8]> = (0..host.copies()).map(|i| arrived.tensor(dtypes.len() + i)).collect();
                host.update(&incoming, &copied, &layout, UpdateWeights { each: &each, threshold });
            }
            Ok(())
        });
        Ok(())
    }

    fn refused(&self) -> Result<Option<NonFiniteElement>> {
        let refused = *self.looked.wait();
        self.averages.check().map(|()| refused)
    }

    fn looks_later(&self) -> bool {
        true
    }

    /// Waits until all updates are folded in, and locks the averages.
    fn values(&self) -> Result<AveragesGuard<'_>> {
        self.background.wait();
        self.averages.lock().map(AveragesGuard::Locked)
    }

    fn checkpoint(&mut self, meta: CheckpointMeta) -> Result<(), Failure> {
        let averages = self.averages.clone();
        let copy_buffer = self.copy_buffer.clone();
        self.background.store(meta, Some(self.copy_buffer.clone()), move |meta| {
            let host = averages.lock().map_err(Failure::Values)?;
            let copy = copy_buffer.copy_of(&host.values(), meta)?;
            if copy.is_none() {
                meta.store(&host.values())?;
            }
            Ok(copy)
        });
        Ok(())
    }

    fn pending(&self) -> Option<&dyn Pending> {
        Some(&self.background)
    }

    fn placement(&self) -> String {
        let device = |offload: &Offload| {
            let (number, bytes) = (offload.device().number(), offload.device_bytes());
            let way = match offload.copies_on_device() {
                true => "each update copies the parameters there, and the training waits for that alone",
                false => "the training waits for the bus, at each update or at its fence",
            };
            format!("; {:.1} MB on cuda:{number}: {way}", bytes as f64 / 1e6)
        };
        format!("averages in host memory{}", self.gathering.offloads().map(device).collect::<String>())
    }

    fn needs_fence(&self) -> bool {
        !self.gathering.offloads().all(Offload::copies_on_device)
    }

    fn fence(&self) -> Option<&Fence> {
        self.fence.as_ref()
    }
}

/// Chooses if the parameters of a device are copied within it: with no wish, if they fit beside the training.
fn device_copy(device: &CudaDevice, elements: usize, sizes: &[usize], wish: Option<bool>) -> Result<DeviceCopy> {
    Ok(match wish {
        None if fits_beside_training(device, elements, sizes.iter().sum())? => DeviceCopy::IfPossible,
        None | Some(false) => DeviceCopy::Never,
        Some(true) => DeviceCopy::Always,
    })
}

/// Returns true if memory on a device leaves enough for the training, which may not have begun.
///
/// It may take a quarter of the free memory that is left after a gradient and two moments in f32 for each parameter.
pub(super) fn fits_beside_training(device: &CudaDevice, elements: usize, bytes: usize) -> Result<bool> {
    const TRAINING: usize = 12;
    const SHARE: usize = 4;
    let free = device.memory()?.0.saturating_sub(TRAINING * elements);
    Ok(bytes <= free / SHARE)
}

/// Prepares the copies of tensors to the host.
fn offload(device: &Arc<CudaDevice>, sizes: &[usize], device_copy: DeviceCopy) -> Result<Offload> {
    match (Offload::new(device, sizes, device_copy != DeviceCopy::Never), device_copy) {
        (Err(error @ Error::DeviceMemory { .. }), DeviceCopy::IfPossible) => {
            tracing::warn!("{error}: the training waits for the bus instead, at each update or at its fence");
            Offload::new(device, sizes, false)
        }
        (Err(Error::DeviceMemory { device, action, reason }), DeviceCopy::Always) => {
            let reason = format!("{reason}; or leave out the option `device_copy`");
            Err(Error::DeviceMemory { device, action, reason })
        }
        (prepared, _) => prepared,
    }
}

fn incoming<'a>(arrived: &'a ArrivedCopies, dtypes: &[Dtype]) -> Vec<Incoming<'a>> {
    dtypes.iter().enumerate().map(|(i, &dtype)| Incoming { dtype, bytes: arrived.tensor(i) }).collect()
}
