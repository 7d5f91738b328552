//! CUDA device: its primary context, the kernels, and errors of its driver.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::kernels::{KernelCode, Kernels};
use super::probe::{DriverVersion, KERNELS, described, devices};
use super::remedies::{oldest_driver, remedy};
use crate::error::{Error, Result};

/// CUDA device that is ready for use.
#[derive(Debug)]
pub struct CudaDevice {
    number: usize,
    name: String,
    driver: DriverVersion,
    context: Arc<CudaContext>,
    pub(super) kernels: Kernels,
}

/// Action of errors about streams of other libraries.
const STREAM_ACTION: &str = "use the stream of the parameters";

/// Guard that restores the thread's context, or the absence of one, and its capture mode. The caller's own CUDA work
/// depends on both.
pub(super) struct ContextGuard {
    context: sys::CUcontext,
    mode: sys::CUstreamCaptureMode,
}

impl ContextGuard {
    /// Saves the thread's context, and makes its capture mode relaxed.
    ///
    /// In the default mode, an allocation or a wait invalidates a graph that any other thread captures.
    pub(super) fn new() -> std::result::Result<ContextGuard, DriverError> {
        let context = result::ctx::get_current()?.unwrap_or(std::ptr::null_mut());
        let mode = exchange_capture_mode(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        Ok(ContextGuard { context, mode })
    }
}

impl Drop for ContextGuard {
    fn drop(&mut self) {
        // A failure leaves the relaxed mode, which allows more.
        let _ = exchange_capture_mode(self.mode);
        // SAFETY: it was this thread's context before, or null. A failure leaves ours in place.
        let _ = unsafe { result::ctx::set_current(self.context) };
    }
}

/// Sets the thread's capture mode and returns the one before.
fn exchange_capture_mode(
    mut mode: sys::CUstreamCaptureMode,
) -> std::result::Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: the pointer is valid for the call.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result()?;
    Ok(mode)
}

/// Object of cudarc that keeps the thread's context when it is dropped.
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
        // SAFETY: it is dropped only here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

/// Stream that this crate created.
pub(super) type Stream = InContext<Arc<CudaStream>>;

/// Event that this crate created.
pub(super) type Event = InContext<CudaEvent>;

impl CudaDevice {
    /// Opens a device, or returns it if it is already open. It stays open, because contexts and kernels load slowly.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver, the device, or kernel code that the device can run is missing.
    pub fn open(number: usize) -> Result<Arc<CudaDevice>> {
        static OPEN: Mutex<BTreeMap<usize, Arc<CudaDevice>>> = Mutex::new(BTreeMap::new());
        let unavailable = |reason: String| Error::Cuda { device: number, action: "use the device".into(), reason };
        let count = devices().map_err(|why| unavailable(why.to_string()))?;
        if number >= count {
            let last = if count > 1 { format!(" to cuda:{}", count - 1) } else { String::new() };
            return Err(unavailable(format!("the machine has only cuda:0{last}")));
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&number) {
            return Ok(device.clone());
        }
        let device = Arc::new(CudaDevice::initialize(number)?);
        open.insert(number, device.clone());
        Ok(device)
    }

    fn initialize(number: usize) -> Result<CudaDevice> {
        let _bound = ContextGuard::new().map_err(|error| cuda_error(number, "read the thread's context", error))?;
        let context = CudaContext::new(number).map_err(|error| cuda_error(number, "open the device", error))?;
        // SAFETY: this crate orders all work explicitly, with events.
        unsafe { context.disable_event_tracking() };
        let name = context.name().map_err(|error| cuda_error(number, "read the device's name", error))?;
        let driver = DriverVersion::read().map_err(|why| Error::Cuda {
            device: number,
            action: "read the driver's version".into(),
            reason: why.to_string(),
        })?;
        if driver.code() == KernelCode::Ptx {
            tracing::warn!(
                "cuda:{number}: the driver supports CUDA {driver}, the kernels are of CUDA {KERNELS}: it compiles them \
                 now, and keeps them in its cache; a driver of version {} or later need not",
                oldest_driver(KERNELS)
            );
        }
        let kernels = Kernels::load(&context, driver.code()).map_err(|error| {
            let (major, minor) = context.compute_capability().unwrap_or_default();
            let action = format!("load the kernels on a device of compute capability {major}.{minor}");
            cuda_error(number, action, error)
        })?;
        Ok(CudaDevice { number, name, driver, context, kernels })
    }

    /// Returns the number among the devices of the machine.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Returns the product name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the newest CUDA version that the driver supports, such as 12.2.
    pub fn driver(&self) -> String {
        self.driver.to_string()
    }

    /// Returns the kind of the kernels' code that the driver has loaded.
    pub fn code(&self) -> KernelCode {
        self.driver.code()
    }

    /// Returns the product name, the CUDA version of the driver, and the kind of the kernels' code.
    pub fn description(&self) -> String {
        described(&self.name, self.driver)
    }

    /// Returns the number of multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        self.context.attribute(attribute).ok().and_then(|n| usize::try_from(n).ok()).unwrap_or(1)
    }

    /// Returns the free and the total memory in bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver fails.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let _bound = self.bind()?;
        result::mem_get_info().map_err(self.driver_error("read the amount of free memory"))
    }

    /// Makes the device's context current on this thread until the guard is dropped.
    pub(super) fn bind(&self) -> Result<ContextGuard> {
        let bound = ContextGuard::new().map_err(self.driver_error("read the thread's context"))?;
        // Clears an error that cudarc kept from dropping another object, which is unrelated to the next call.
        let _ = self.context.check_err();
        self.context.bind_to_thread().map_err(self.driver_error("use the device from this thread"))?;
        Ok(bound)
    }

    /// Creates a stream that does not synchronise with the default stream.
    pub(super) fn stream(&self) -> Result<Stream> {
        let _bound = self.bind()?;
        let stream = self.context.new_stream().map_err(self.driver_error("create a stream"))?;
        Ok(InContext(ManuallyDrop::new(stream)))
    }

    /// Wraps a stream of another library for the duration of a call.
    ///
    /// # Errors
    /// [`Error::Cuda`] while the owner captures the stream's work: replays of the graph would write to memory that is
    /// in use for something else by then.
    pub(super) fn borrow_stream(&self, stream: usize) -> Result<Arc<CudaStream>> {
        let (borrowed, is_captured) = self.wrap_stream(stream)?;
        if !is_captured {
            return Ok(borrowed);
        }
        let reason = "its work is being captured in a CUDA graph: call this after the capture, and between replays";
        Err(Error::Cuda { device: self.number, action: STREAM_ACTION.into(), reason: reason.into() })
    }

    /// Wraps a stream of another library whose work is being captured in a CUDA graph.
    ///
    /// # Errors
    /// [`Error::Cuda`] if it is not captured, or if the driver is too old.
    pub(super) fn borrow_captured_stream(&self, stream: usize) -> Result<Arc<CudaStream>> {
        let (borrowed, is_captured) = self.wrap_stream(stream)?;
        let reason = match is_captured {
            true if self.driver.keeps_memory_of_graphs() => return Ok(borrowed),
            true => format!(
                "the driver supports CUDA {}, and updates in CUDA graphs need 12.3: update the driver (545 or later), \
                 or update the averages between replays",
                self.driver
            ),
            false => "its work is not being captured: call this within the capture of a CUDA graph".to_owned(),
        };
        Err(Error::Cuda { device: self.number, action: STREAM_ACTION.into(), reason })
    }

    /// Wraps a stream of another library, and returns true if its work is being captured.
    fn wrap_stream(&self, stream: usize) -> Result<(Arc<CudaStream>, bool)> {
        let _bound = self.bind()?;
        // SAFETY: the owner keeps the stream alive for the call (`CudaMemory::from_raw`), and the wrapper is not kept
        // longer.
        let borrowed = unsafe { self.context.wrap_borrowed_stream(stream as sys::CUstream) };
        let status = borrowed.capture_status().map_err(self.driver_error(STREAM_ACTION))?;
        Ok((borrowed, status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE))
    }

    /// Creates an event on which the host sleeps instead of spinning.
    pub(super) fn event(&self) -> Result<Event> {
        self.create_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC))
    }

    /// Waits for the work of a stream. The thread sleeps; a plain wait for a stream spins.
    pub(super) fn wait_for(&self, stream: &CudaStream, action: &str) -> Result<()> {
        let _bound = self.bind()?;
        let done = self.event()?;
        done.record(stream).and_then(|()| done.synchronize()).map_err(self.driver_error(action))
    }

    /// Creates an event that orders streams. The host rarely waits for it.
    pub(super) fn order_event(&self) -> Result<Event> {
        self.create_event(None)
    }

    fn create_event(&self, flags: Option<sys::CUevent_flags>) -> Result<Event> {
        let _bound = self.bind()?;
        let event = self.context.new_event(flags).map_err(self.driver_error("create an event"))?;
        Ok(InContext(ManuallyDrop::new(event)))
    }

    /// Checks that the model's memory is on this device.
    pub(super) fn check_number(&self, number: usize) -> Result<()> {
        if number == self.number {
            return Ok(());
        }
        let reason = format!("they are on cuda:{number}: keep the model on one device");
        Err(Error::Cuda { device: self.number, action: "read the parameters".into(), reason })
    }

    /// Returns a function for `map_err` that names the action which failed on this device.
    pub(super) fn driver_error(&self, action: &str) -> impl FnOnce(DriverError) -> Error {
        let number = self.number;
        let action = action.to_owned();
        move |error| cuda_error(number, action, error)
    }
}

/// Returns the error of a driver call, with the driver's text and a remedy.
fn cuda_error(device: usize, action: impl Into<String>, error: DriverError) -> Error {
    use sys::CUresult as Code;
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    let text = text.unwrap_or_else(|_| format!("{:?}", error.0));
    let code = error.0 as u32;
    let remedy = remedy(code).map_or(String::new(), |remedy| format!(": {remedy}"));
    let (action, reason) = (action.into(), format!("{text} ({code}){remedy}"));
    match error.0 {
        Code::CUDA_ERROR_OUT_OF_MEMORY => Error::DeviceMemory { device, action, reason },
        _ => Error::Cuda { device, action, reason },
    }
}

/// Formats a number of bytes for a message.
pub(super) fn format_bytes(bytes: usize) -> String {
    if bytes < 1_000_000 { format!("{bytes} bytes") } else { format!("{:.1} MB", bytes as f64 / 1e6) }
}
