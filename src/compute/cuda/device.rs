//! A device: its primary context, the kernels, and a way to name what its driver refuses.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::kernels::Kernels;
use super::probe::devices;
use crate::error::{Error, Result};

/// A CUDA device that is ready for use.
#[derive(Debug)]
pub struct Device {
    number: usize,
    name: String,
    context: Arc<CudaContext>,
    pub(super) kernels: Kernels,
}

/// Sets a thread's context back to what it was: the caller's own CUDA work goes by it.
pub(super) struct Bound(Option<sys::CUcontext>);

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(context) = self.0 {
            // SAFETY: it was this thread's context a moment ago. A failure leaves ours, which works as well on one device.
            let _ = unsafe { result::ctx::set_current(context) };
        }
    }
}

impl Device {
    /// Opens a device, or returns it where it is open already.
    ///
    /// # Errors
    /// [`Error::Cuda`] without a driver, a device of this number, or code that it can run.
    pub fn open(number: usize) -> Result<Arc<Device>> {
        static OPEN: Mutex<BTreeMap<usize, Weak<Device>>> = Mutex::new(BTreeMap::new());
        let unavailable = |reason: String| Error::Cuda { device: number, action: "use the device".into(), reason };
        let count = devices().map_err(|why| unavailable(why.to_string()))?;
        if number >= count {
            let last = count - 1;
            return Err(unavailable(format!("there are {count} devices here: choose cuda:0 to cuda:{last}")));
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&number).and_then(Weak::upgrade) {
            return Ok(device);
        }
        let device = Arc::new(Device::start(number)?);
        open.insert(number, Arc::downgrade(&device));
        Ok(device)
    }

    fn start(number: usize) -> Result<Device> {
        let refused = |action: &str| {
            let action = action.to_owned();
            move |error| refusal(number, action, error)
        };
        let before = result::ctx::get_current().map_err(refused("read the thread's context"))?;
        let context = CudaContext::new(number).map_err(refused("open the device"))?;
        let _bound = Bound(before);
        // SAFETY: all work is ordered by hand, with events.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(refused("read the device's name"))?;
        let kernels = Kernels::load(&context).map_err(|error| {
            let (major, minor) = context.compute_capability().unwrap_or_default();
            refusal(number, format!("load the kernels on a device of compute capability {major}.{minor}"), error)
        })?;
        Ok(Device { number, name, context, kernels })
    }

    /// Its number among the devices.
    pub fn number(&self) -> usize {
        self.number
    }

    /// The name that its maker gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number of multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        self.context.attribute(attribute).ok().and_then(|n| usize::try_from(n).ok()).unwrap_or(1)
    }

    /// The bytes of its memory that are free, and all of them.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let _bound = self.bind()?;
        result::mem_get_info().map_err(self.refused("ask for the free memory"))
    }

    /// Makes the context this thread's, until the guard is dropped.
    pub(super) fn bind(&self) -> Result<Bound> {
        let before = result::ctx::get_current().map_err(self.refused("read the thread's context"))?;
        self.context.bind_to_thread().map_err(self.refused("use the device from this thread"))?;
        Ok(Bound(before.filter(|&context| context != self.context.cu_ctx())))
    }

    /// A stream of our own, which waits for no other.
    pub(super) fn stream(&self) -> Result<Arc<CudaStream>> {
        let _bound = self.bind()?;
        self.context.new_stream().map_err(self.refused("make a stream"))
    }

    /// Somebody's stream.
    pub(super) fn borrow_stream(&self, stream: usize) -> Arc<CudaStream> {
        // SAFETY: whoever lent memory with this stream keeps it alive for the call (`CudaMemory::from_raw`), and nothing
        // here keeps the wrapper longer.
        unsafe { self.context.wrap_borrowed_stream(stream as sys::CUstream) }
    }

    /// An event on which the host sleeps instead of spinning.
    pub(super) fn event(&self) -> Result<CudaEvent> {
        let _bound = self.bind()?;
        self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC)).map_err(self.refused("make an event"))
    }

    /// For `map_err`: what could not be done on this device.
    pub(super) fn refused(&self, action: &str) -> impl FnOnce(DriverError) -> Error {
        let (number, action) = (self.number, action.to_owned());
        move |error| refusal(number, action, error)
    }
}

/// The driver's answer in words, with what can be done about it.
pub(super) fn refusal(device: usize, action: String, error: DriverError) -> Error {
    use sys::CUresult as Code;
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    let text = text.unwrap_or_else(|_| format!("{:?}", error.0));
    let remedy = match error.0 {
        Code::CUDA_ERROR_OUT_OF_MEMORY => ": free some of the device's memory, or keep the averages on the host",
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU | Code::CUDA_ERROR_INVALID_PTX => {
            ": build for it with POSTHOC_EMA_CUDA_ARCHS, or use the CPU"
        }
        Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => ": update the NVIDIA driver",
        Code::CUDA_ERROR_ILLEGAL_ADDRESS | Code::CUDA_ERROR_LAUNCH_FAILED | Code::CUDA_ERROR_MISALIGNED_ADDRESS => {
            ": a kernel of this process failed, and the device cannot be used before a restart; what is on disk is whole"
        }
        _ => "",
    };
    Error::Cuda { device, action, reason: format!("{text} ({}){remedy}", error.0 as u32) }
}
