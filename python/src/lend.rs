//! Tensors that Python's libraries lend by address. Only this module is `unsafe`.

use std::collections::{HashMap, HashSet};
use std::slice;

#[cfg(feature = "cuda")]
use posthoc_ema::{CudaMemory, CudaMemoryMut, GraphStream};
use posthoc_ema::{Dtype, Parameters, ParametersMut, Result, TensorView, TensorViewMut};
use pyo3::prelude::*;

use crate::dtypes::parse_dtype;
use crate::errors::{argument, to_python};

/// Description of a tensor, without its address.
struct TensorEntry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
    /// Number of the CUDA device; `None` for the host.
    device: Option<usize>,
    is_buffer: bool,
    part: Option<PartEntry>,
}

/// Global shape and offset of a part of a tensor, and if another process stores it.
type PartEntry = (Vec<usize>, Vec<usize>, bool);

impl TensorEntry {
    fn new(name: String, dtype: &str, shape: Vec<usize>, device: i64, is_buffer: bool) -> PyResult<TensorEntry> {
        let dtype = parse_dtype(dtype)?;
        let bytes = posthoc_ema::byte_size(&name, dtype, &shape).map_err(to_python)?;
        let device = usize::try_from(device).ok();
        Ok(TensorEntry { name, dtype, shape, bytes, device, is_buffer, part: None })
    }
}

/// Description of a list of tensors, without their addresses. It is made again only when the tensors change.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Layout(Vec<TensorEntry>);

#[pymethods]
impl Layout {
    /// Takes `(name, dtype, shape, device)` of each tensor. The dtype is named as in safetensors files; the device is a
    /// number, or -1 for the host. `buffers` has the names of those that are not trained. `parts` has global shape and
    /// offset of each part of a tensor, and if it is a replica.
    #[new]
    #[pyo3(signature = (tensors, buffers = HashSet::new(), parts = HashMap::new()))]
    fn new(
        tensors: Vec<(String, String, Vec<usize>, i64)>,
        buffers: HashSet<String>,
        mut parts: HashMap<String, PartEntry>,
    ) -> PyResult<Layout> {
        let entry = |(name, dtype, shape, device): (String, String, Vec<usize>, i64)| {
            let (is_buffer, part) = (buffers.contains(&name), parts.remove(&name));
            TensorEntry::new(name, &dtype, shape, device, is_buffer).map(|entry| TensorEntry { part, ..entry })
        };
        Ok(Layout(tensors.into_iter().map(entry).collect::<PyResult<_>>()?))
    }
}

/// `CUstream` on which the owner works with the tensors of each device, by the device's number.
pub type Streams = HashMap<usize, usize>;

/// Tensors at their addresses. Those on a device are used in the order of its stream.
///
/// The Python code keeps the tensors alive, initialised, contiguous and in place during the call that lends them, and
/// does not write them meanwhile. The package holds references to all of them. As for every operation of PyTorch, only
/// one thread at a time may use a model.
pub struct Lent<'a> {
    layout: &'a Layout,
    addresses: Vec<u64>,
    /// True for the tensors that do not change before the fence of the call has passed. Missing ones are false.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices have fences"))]
    fenced: Vec<bool>,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices have streams"))]
    streams: Streams,
}

impl<'a> Lent<'a> {
    pub fn new(layout: &'a Layout, addresses: Vec<u64>, streams: Streams) -> PyResult<Lent<'a>> {
        if addresses.len() != layout.0.len() {
            return Err(argument(format!("{} addresses for {} tensors", addresses.len(), layout.0.len())));
        }
        if let Some((entry, _)) = layout.0.iter().zip(&addresses).find(|(e, address)| e.bytes > 0 && **address == 0) {
            return Err(argument(format!("tensor `{}`: its elements have the address 0", entry.name)));
        }
        let lacks_stream = |entry: &&TensorEntry| entry.device.is_some_and(|device| !streams.contains_key(&device));
        if let Some(entry) = layout.0.iter().find(lacks_stream) {
            return Err(argument(format!("tensor `{}`: its device has no stream", entry.name)));
        }
        Ok(Lent { layout, addresses, streams, fenced: Vec::new() })
    }

    /// Lends some of the tensors until the fence of the call that reads them.
    ///
    /// The package keeps them allocated, and makes the stream that changes them wait for the fence.
    pub fn until_fence(self, fenced: Vec<bool>) -> Lent<'a> {
        Lent { fenced, ..self }
    }

    /// Returns the stream of a device; `new` has checked that there is one.
    #[cfg(feature = "cuda")]
    fn stream(&self, device: usize) -> usize {
        self.streams.get(&device).copied().unwrap_or(0)
    }

    fn entries(&self) -> impl Iterator<Item = (&'a TensorEntry, u64)> {
        self.layout.0.iter().zip(self.addresses.iter().copied())
    }

    fn view(&self, i: usize) -> Result<TensorView<'a>> {
        let entry = &self.layout.0[i];
        let view = TensorView { is_buffer: entry.is_buffer, ..self.plain_view(i)? };
        match &entry.part {
            Some((global, offset, true)) => view.as_part_of(global, offset).map(TensorView::as_replica),
            Some((global, offset, false)) => view.as_part_of(global, offset),
            None => Ok(view),
        }
    }

    fn plain_view(&self, i: usize) -> Result<TensorView<'a>> {
        let (entry, address) = (&self.layout.0[i], self.addresses[i]);
        #[cfg(feature = "cuda")]
        if let Some(device) = entry.device {
            // SAFETY: see the contract of `Lent`. PyTorch allocates in the primary context, and frees and reuses memory
            // in the order of the stream, which is the current one of the calling thread on that device.
            let memory = unsafe { CudaMemory::from_raw(device, self.stream(device), address, entry.bytes) };
            let is_fenced = self.fenced.get(i).copied().unwrap_or_default();
            // SAFETY: see `until_fence`.
            let memory = if is_fenced { unsafe { memory.until_fence() } } else { memory };
            return TensorView::cuda(&entry.name, entry.dtype, &entry.shape, memory);
        }
        check_on_host(entry)?;
        if entry.bytes == 0 {
            return TensorView::host(&entry.name, entry.dtype, &entry.shape, &[]);
        }
        // SAFETY: by the contract of `Lent`, this many bytes are initialised there and are not written during the call.
        let bytes = unsafe { slice::from_raw_parts(address as *const u8, entry.bytes) };
        TensorView::host(&entry.name, entry.dtype, &entry.shape, bytes)
    }

    fn view_mut(&mut self, entry: &'a TensorEntry, address: u64) -> Result<TensorViewMut<'a>> {
        #[cfg(feature = "cuda")]
        if let Some(device) = entry.device {
            // SAFETY: as in `view`, and all use of the memory is in the order of the stream.
            let memory = unsafe { CudaMemoryMut::from_raw(device, self.stream(device), address, entry.bytes) };
            return TensorViewMut::cuda(&entry.name, entry.dtype, &entry.shape, memory);
        }
        check_on_host(entry)?;
        if entry.bytes == 0 {
            return TensorViewMut::host(&entry.name, entry.dtype, &entry.shape, &mut []);
        }
        // SAFETY: as in `view`. Nothing else reads or writes the bytes during the call, and of tensors that share their
        // elements only one is lent at a time.
        let bytes = unsafe { slice::from_raw_parts_mut(address as *mut u8, entry.bytes) };
        TensorViewMut::host(&entry.name, entry.dtype, &entry.shape, bytes)
    }

    fn views_mut(&mut self) -> Result<Vec<TensorViewMut<'a>>> {
        let tensors: Vec<_> = self.entries().collect();
        tensors.into_iter().map(|(entry, address)| self.view_mut(entry, address)).collect()
    }
}

/// Returns views of new tensors to write averages to, one list for each list of addresses.
///
/// # Errors
/// If two tensors overlap, also those of different lists.
pub fn output_views(layout: &Layout, addresses: Vec<Vec<u64>>) -> PyResult<Vec<Vec<TensorViewMut<'_>>>> {
    let mut lists =
        addresses.into_iter().map(|list| Lent::new(layout, list, Streams::new())).collect::<PyResult<Vec<_>>>()?;
    check_disjoint(&lists)?;
    lists.iter_mut().map(Lent::views_mut).collect::<Result<_>>().map_err(to_python)
}

/// Makes the streams that work with the tensors wait for a fence, each for the copies of its device.
#[cfg(feature = "cuda")]
pub fn wait_on_streams(fence: &posthoc_ema::compute::cuda::Fence, streams: &Streams) -> Result<()> {
    // SAFETY: each stream is the current one of PyTorch on its device, in the primary context.
    streams.iter().try_for_each(|(&device, &stream)| unsafe { fence.wait_on_device(device, stream) })
}

/// Wraps a stream on which PyTorch captures or launches a CUDA graph.
#[cfg(feature = "cuda")]
pub fn graph_stream(device: usize, stream: usize) -> GraphStream<'static> {
    // SAFETY: it is PyTorch's current stream, and PyTorch never destroys its streams. The package documents that the
    // model's tensors stay in place as long as the graph is replayed, as every graph of PyTorch demands.
    unsafe { GraphStream::from_raw(device, stream) }
}

/// Refuses tensors on a device in a build without CUDA; the package copies them to the host before.
fn check_on_host(entry: &TensorEntry) -> Result<()> {
    match entry.device {
        Some(device) => Err(posthoc_ema::Error::Tensor {
            tensor: entry.name.clone(),
            reason: format!("it is on cuda:{device}, and this build has no CUDA support"),
        }),
        None => Ok(()),
    }
}

fn check_disjoint(lists: &[Lent<'_>]) -> PyResult<()> {
    let mut ranges: Vec<(u64, u64, &str)> = Vec::new();
    for (entry, address) in lists.iter().flat_map(Lent::entries).filter(|(entry, _)| entry.bytes > 0) {
        ranges.push((address, address.saturating_add(entry.bytes as u64), &entry.name));
    }
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(argument(format!("the memory of `{}` and `{}` overlaps", pair[0].2, pair[1].2))),
        None => Ok(()),
    }
}

impl Parameters for Lent<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let views = (0..self.addresses.len()).map(|i| self.view(i)).collect::<Result<Vec<_>>>()?;
        read(&views)
    }
}

impl ParametersMut for Lent<'_> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        let tensors: Vec<_> = self.entries().collect();
        tensors.into_iter().try_for_each(|(entry, address)| write(self.view_mut(entry, address)?))
    }

    fn for_each_batch_mut(&mut self, write: &mut dyn FnMut(Vec<TensorViewMut<'_>>) -> Result<()>) -> Result<()> {
        // In host memory, tensors that share their elements must not be lent together. On a device they are addresses.
        let (on_device, on_host): (Vec<_>, Vec<_>) = self.entries().partition(|(entry, _)| entry.device.is_some());
        on_host.into_iter().try_for_each(|(entry, address)| write(vec![self.view_mut(entry, address)?]))?;
        let views = on_device.into_iter().map(|(entry, address)| self.view_mut(entry, address));
        write(views.collect::<Result<_>>()?)
    }
}
