//! A device: its primary context, the kernels, and a way to name what its driver refuses.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

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

/// Sets a thread's context back to what it was, none included: the caller's own CUDA work goes by it.
pub(super) struct ContextGuard(sys::CUcontext);

impl ContextGuard {
    /// Remembers the thread's context.
    pub(super) fn new() -> std::result::Result<ContextGuard, DriverError> {
        Ok(ContextGuard(result::ctx::get_current()?.unwrap_or(std::ptr::null_mut())))
    }
}

impl Drop for ContextGuard {
    fn drop(&mut self) {
        // SAFETY: it was this thread's context a moment ago, or none was. A failure leaves ours.
        let _ = unsafe { result::ctx::set_current(self.0) };
    }
}

/// One of cudarc's objects, whose end does not leave the thread with our context.
#[derive(Debug)]
pub(super) struct InContext<T>(ManuallyDrop<T>);

impl<T> Deref for InContext<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for InContext<T> {
    fn drop(&mut self) {
        let _bound = ContextGuard::new();
        // SAFETY: dropped here once, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

/// A stream and an event of our own.
pub(super) type Stream = InContext<Arc<CudaStream>>;
pub(super) type Event = InContext<CudaEvent>;

impl Device {
    /// Opens a device, or returns it where it is open already. It stays open: contexts and kernels take long to load.
    ///
    /// # Errors
    /// [`Error::Cuda`] without a driver, a device of this number, or code that it can run.
    pub fn open(number: usize) -> Result<Arc<Device>> {
        static OPEN: Mutex<BTreeMap<usize, Arc<Device>>> = Mutex::new(BTreeMap::new());
        let unavailable = |reason: String| Error::Cuda { device: number, action: "use the device".into(), reason };
        let count = devices().map_err(|why| unavailable(why.to_string()))?;
        if number >= count {
            let last = count - 1;
            return Err(unavailable(format!("there are {count} devices here: choose cuda:0 to cuda:{last}")));
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&number) {
            return Ok(device.clone());
        }
        let device = Arc::new(Device::start(number)?);
        open.insert(number, device.clone());
        Ok(device)
    }

    fn start(number: usize) -> Result<Device> {
        let driver_error = |action: &str| {
            let action = action.to_owned();
            move |error| refusal(number, action, error)
        };
        let _bound = ContextGuard::new().map_err(driver_error("read the thread's context"))?;
        let context = CudaContext::new(number).map_err(driver_error("open the device"))?;
        // SAFETY: all work is ordered by hand, with events.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(driver_error("read the device's name"))?;
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
        result::mem_get_info().map_err(self.driver_error("ask for the free memory"))
    }

    /// Makes the context this thread's, until the guard is dropped.
    pub(super) fn bind(&self) -> Result<ContextGuard> {
        let bound = ContextGuard::new().map_err(self.driver_error("read the thread's context"))?;
        // An error that cudarc kept from the end of some object says nothing about what is asked for now.
        let _ = self.context.check_err();
        self.context.bind_to_thread().map_err(self.driver_error("use the device from this thread"))?;
        Ok(bound)
    }

    /// A stream of our own, which waits for no other.
    pub(super) fn stream(&self) -> Result<Stream> {
        let _bound = self.bind()?;
        let stream = self.context.new_stream().map_err(self.driver_error("make a stream"))?;
        Ok(InContext(ManuallyDrop::new(stream)))
    }

    /// Somebody's stream.
    pub(super) fn borrow_stream(&self, stream: usize) -> Arc<CudaStream> {
        // SAFETY: whoever lent memory with this stream keeps it alive for the call (`CudaMemory::from_raw`), and nothing
        // here keeps the wrapper longer.
        unsafe { self.context.wrap_borrowed_stream(stream as sys::CUstream) }
    }

    /// An event on which the host sleeps instead of spinning.
    pub(super) fn event(&self) -> Result<Event> {
        self.make_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC))
    }

    /// An event that orders streams: the host hardly ever waits for it.
    pub(super) fn order_event(&self) -> Result<Event> {
        self.make_event(None)
    }

    fn make_event(&self, flags: Option<sys::CUevent_flags>) -> Result<Event> {
        let _bound = self.bind()?;
        let event = self.context.new_event(flags).map_err(self.driver_error("make an event"))?;
        Ok(InContext(ManuallyDrop::new(event)))
    }

    /// Refuses memory of another device.
    pub(super) fn check_is(&self, number: usize) -> Result<()> {
        if number == self.number {
            return Ok(());
        }
        let reason = format!("they lie on cuda:{number} now: keep the model on one device");
        Err(Error::Cuda { device: self.number, action: "read the parameters".into(), reason })
    }

    /// For `map_err`: what could not be done on this device.
    pub(super) fn driver_error(&self, action: &str) -> impl FnOnce(DriverError) -> Error {
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
        Code::CUDA_ERROR_OUT_OF_MEMORY => {
            ": free some of the device's memory (PyTorch keeps what it has freed: torch.cuda.empty_cache()), or keep the \
             averages on the host and blend on the CPU"
        }
        Code::CUDA_ERROR_NO_BINARY_FOR_GPU | Code::CUDA_ERROR_INVALID_PTX => {
            ": build for it with POSTHOC_EMA_CUDA_ARCHS, or use the CPU"
        }
        Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => ": update the NVIDIA driver",
        Code::CUDA_ERROR_INVALID_CONTEXT | Code::CUDA_ERROR_INVALID_HANDLE => {
            ": the stream that the memory was lent with is not one of this device, or exists no longer"
        }
        code if (900..=907).contains(&(code as u32)) => ": call this outside of the capture of a graph",
        Code::CUDA_ERROR_ILLEGAL_ADDRESS
        | Code::CUDA_ERROR_LAUNCH_FAILED
        | Code::CUDA_ERROR_MISALIGNED_ADDRESS
        | Code::CUDA_ERROR_ECC_UNCORRECTABLE
        | Code::CUDA_ERROR_LAUNCH_TIMEOUT
        | Code::CUDA_ERROR_HARDWARE_STACK_ERROR
        | Code::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | Code::CUDA_ERROR_INVALID_PC => {
            ": a kernel of this process failed, and the device cannot be used before a restart; what is on disk is whole"
        }
        _ => "",
    };
    Error::Cuda { device, action, reason: format!("{text} ({}){remedy}", error.0 as u32) }
}
