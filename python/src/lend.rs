//! Tensors that Python's libraries lend by address: the one place with `unsafe`.

use std::slice;

#[cfg(feature = "cuda")]
use posthoc_ema::{CudaMemory, CudaMemoryMut};
use posthoc_ema::{Dtype, Parameters, ParametersMut, Result, TensorView, TensorViewMut};
use pyo3::prelude::*;

use crate::errors::argument;

/// A tensor without its address.
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: usize,
    /// The number of the CUDA device; none for the host.
    device: Option<usize>,
}

/// What a list of tensors is, whatever their addresses: made once, and again when the tensors change.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Layout(Vec<Entry>);

#[pymethods]
impl Layout {
    /// Takes `(name, dtype, shape, device)` of each tensor: the dtype as safetensors files name it, the device a number,
    /// or -1 for the host.
    #[new]
    fn new(tensors: Vec<(String, String, Vec<usize>, i64)>) -> PyResult<Layout> {
        let entry = |(name, dtype, shape, device): (String, String, Vec<usize>, i64)| {
            let dtype = parse_dtype(&dtype)?;
            let bytes = posthoc_ema::byte_size(&name, dtype, &shape).map_err(crate::errors::to_python)?;
            let device = usize::try_from(device).ok();
            Ok(Entry { name, dtype, shape, bytes, device })
        };
        tensors.into_iter().map(entry).collect::<PyResult<_>>().map(Layout)
    }
}

/// A dtype as safetensors files name it.
pub fn parse_dtype(name: &str) -> PyResult<Dtype> {
    serde_json::from_value(serde_json::Value::String(name.to_owned()))
        .map_err(|_| argument(format!("`{name}` is no dtype of safetensors files")))
}

/// The name of a dtype as safetensors files have it.
pub fn dtype_name(dtype: Dtype) -> String {
    dtype.to_string()
}

/// Tensors at their addresses, on one stream where they lie on a device.
///
/// Whoever makes one in Python keeps the tensors alive, initialised, contiguous and unmoved during the call that it is
/// made for, and does not write them meanwhile: the package holds references to all of them, and its callers hold, as
/// for any operation of their library, to one thread at a time for one model.
pub struct Lent<'a> {
    layout: &'a Layout,
    addresses: Vec<u64>,
    /// The `CUstream` on which the owner works with the tensors.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices have streams"))]
    stream: usize,
}

impl<'a> Lent<'a> {
    pub fn new(layout: &'a Layout, addresses: Vec<u64>, stream: usize) -> PyResult<Lent<'a>> {
        if addresses.len() != layout.0.len() {
            return Err(argument(format!("{} addresses for {} tensors", addresses.len(), layout.0.len())));
        }
        if let Some((entry, _)) = layout.0.iter().zip(&addresses).find(|(e, address)| e.bytes > 0 && **address == 0) {
            return Err(argument(format!("tensor `{}`: its elements lie nowhere (address 0)", entry.name)));
        }
        Ok(Lent { layout, addresses, stream })
    }

    fn each(&self) -> impl Iterator<Item = (&'a Entry, u64)> {
        self.layout.0.iter().zip(self.addresses.iter().copied())
    }

    fn view(&self, entry: &'a Entry, address: u64) -> Result<TensorView<'a>> {
        #[cfg(feature = "cuda")]
        if let Some(device) = entry.device {
            // SAFETY: the promise of `Lent`; PyTorch allocates in the primary context, and frees and reuses memory in
            // the order of the stream, which is the current one of the calling thread.
            let memory = unsafe { CudaMemory::from_raw(device, self.stream, address, entry.bytes) };
            return TensorView::cuda(&entry.name, entry.dtype, &entry.shape, memory);
        }
        no_device(entry)?;
        if entry.bytes == 0 {
            return TensorView::host(&entry.name, entry.dtype, &entry.shape, &[]);
        }
        // SAFETY: the promise of `Lent`: so many initialised bytes lie there, and nobody writes them during the call.
        let bytes = unsafe { slice::from_raw_parts(address as *const u8, entry.bytes) };
        TensorView::host(&entry.name, entry.dtype, &entry.shape, bytes)
    }

    fn view_mut(&mut self, entry: &'a Entry, address: u64) -> Result<TensorViewMut<'a>> {
        #[cfg(feature = "cuda")]
        if let Some(device) = entry.device {
            // SAFETY: as above; and all use of the memory is in the order of the stream.
            let memory = unsafe { CudaMemoryMut::from_raw(device, self.stream, address, entry.bytes) };
            return TensorViewMut::cuda(&entry.name, entry.dtype, &entry.shape, memory);
        }
        no_device(entry)?;
        if entry.bytes == 0 {
            return TensorViewMut::host(&entry.name, entry.dtype, &entry.shape, &mut []);
        }
        // SAFETY: as above; nobody else reads or writes them during the call, and of several tensors that share their
        // elements one is lent at a time.
        let bytes = unsafe { slice::from_raw_parts_mut(address as *mut u8, entry.bytes) };
        TensorViewMut::host(&entry.name, entry.dtype, &entry.shape, bytes)
    }

    /// Fresh memory, all of it at once; refused where two of the tensors, of whichever list, overlap.
    pub fn fresh(lists: &mut [Lent<'a>]) -> PyResult<Vec<Vec<TensorViewMut<'a>>>> {
        check_disjoint(lists)?;
        let views = |lent: &mut Lent<'a>| {
            let tensors: Vec<_> = lent.each().collect();
            tensors.into_iter().map(|(entry, address)| lent.view_mut(entry, address)).collect::<Result<Vec<_>>>()
        };
        lists.iter_mut().map(views).collect::<Result<_>>().map_err(crate::errors::to_python)
    }
}

/// A build without CUDA cannot reach a device's memory; the package copies such tensors to the host before.
fn no_device(entry: &Entry) -> Result<()> {
    match entry.device {
        Some(device) => Err(posthoc_ema::Error::Tensor {
            tensor: entry.name.clone(),
            reason: format!("it lies on cuda:{device}, and this build has no CUDA"),
        }),
        None => Ok(()),
    }
}

fn check_disjoint(lists: &[Lent<'_>]) -> PyResult<()> {
    let mut places: Vec<(u64, u64, &str)> = Vec::new();
    for (entry, address) in lists.iter().flat_map(Lent::each).filter(|(entry, _)| entry.bytes > 0) {
        places.push((address, address.saturating_add(entry.bytes as u64), &entry.name));
    }
    places.sort_unstable();
    match places.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(argument(format!("the memory for `{}` and `{}` overlaps", pair[0].2, pair[1].2))),
        None => Ok(()),
    }
}

impl Parameters for Lent<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let views = self.each().map(|(entry, address)| self.view(entry, address)).collect::<Result<Vec<_>>>()?;
        read(&views)
    }
}

impl ParametersMut for Lent<'_> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        let tensors: Vec<_> = self.each().collect();
        tensors.into_iter().try_for_each(|(entry, address)| write(self.view_mut(entry, address)?))
    }
}
