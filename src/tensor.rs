//! Named views of tensors in the memory of a model, and the traits by which it lends them.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use crate::error::{Difference, Error, Result};

mod element;
mod finite;
mod numbers;
mod part;
mod patterns;
mod scattered;
mod tiled;
mod tiling;

pub use element::Element;
pub use finite::NonFiniteElement;
pub(crate) use finite::{first_non_finite, first_non_finite_of};
pub(crate) use numbers::to_f64;
pub use part::Part;
pub(crate) use patterns::NamePatterns;
pub use scattered::ScatteredElements;
pub(crate) use scattered::equal_elements;
#[cfg(feature = "pytorch")]
pub(crate) use scattered::{first_non_finite_in, for_each_piece};
pub(crate) use tiled::{ElementRange, TensorParts, TiledElements, copy_each_row};
pub(crate) use tiling::{Rows, Stretch, Tile, Tiling, TilingFault, volume};

/// Element type of a tensor in a safetensors file.
pub use safetensors::Dtype;

/// Returns true for a dtype that is averaged. Tensors of other dtypes are copied from the newest update.
pub fn is_averaged(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
}

/// Name, dtype and shape of a tensor, without its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
}

/// Compares two sets of tensors by name, shape and dtype, and returns the first difference.
pub(crate) fn compare_tensors<'a>(
    own: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
    other: impl Iterator<Item = (&'a str, Dtype, &'a [usize])>,
) -> Option<Difference> {
    let mut rest: BTreeMap<&str, (Dtype, &[usize])> =
        other.map(|(name, dtype, shape)| (name, (dtype, shape))).collect();
    for (name, dtype, shape) in own {
        match rest.remove(name) {
            None => return Some(Difference::new(format!("tensor `{name}`"), "missing", "present")),
            Some((_, expected)) if expected != shape => {
                let what = format!("the shape of tensor `{name}`");
                return Some(Difference::new(what, format!("{expected:?}"), format!("{shape:?}")));
            }
            Some((expected, _)) if expected != dtype => {
                return Some(Difference::new(format!("the dtype of tensor `{name}`"), expected, dtype));
            }
            Some(_) => {}
        }
    }
    rest.keys().next().map(|name| Difference::new(format!("tensor `{name}`"), "present", "missing"))
}

/// Memory with the elements of a tensor.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Memory<'a> {
    /// Host memory: elements in C order, little endian, of any alignment.
    Host(&'a [u8]),
    /// Memory of a CUDA device: elements in C order, little endian.
    Cuda(CudaMemory<'a>),
}

/// Memory with the elements of a tensor, for writing.
#[derive(Debug)]
#[non_exhaustive]
pub enum MemoryMut<'a> {
    /// Host memory: elements in C order, little endian, of any alignment.
    Host(&'a mut [u8]),
    /// Memory of a CUDA device: elements in C order, little endian.
    Cuda(CudaMemoryMut<'a>),
}

/// Memory on a CUDA device, with the stream on which its owner uses it.
///
/// This crate reads and writes it in the order of that stream: after all work queued there before, and before all work
/// queued there later. With the feature `cuda`, `CudaMemory::from_raw` creates one.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only the feature creates one"))]
pub struct CudaMemory<'a> {
    /// Number of the device.
    pub(crate) device: usize,
    /// `CUstream` of the owner, as a number; 0 is the legacy default stream.
    pub(crate) stream: usize,
    /// Address on the device.
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    /// True if the owner does not touch the memory, on any stream, until the tracker's fence has passed.
    pub(crate) until_fence: bool,
    pub(crate) lent: PhantomData<&'a [u8]>,
}

/// As [`CudaMemory`], for writing.
#[derive(Debug)]
pub struct CudaMemoryMut<'a>(pub(crate) CudaMemory<'a>);

macro_rules! accessors {
    ($memory:ident, $self:ident => $read:expr) => {
        impl $memory<'_> {
            /// Returns the number of the device.
            pub fn device(&$self) -> usize {
                $read.device
            }

            /// Returns the address on the device.
            pub fn address(&$self) -> u64 {
                $read.address
            }

            /// Returns the number of bytes.
            pub fn len(&$self) -> usize {
                $read.bytes
            }

            /// Returns true if the memory has no bytes.
            pub fn is_empty(&$self) -> bool {
                $read.bytes == 0
            }
        }
    };
}
accessors!(CudaMemory, self => self);
accessors!(CudaMemoryMut, self => self.0);

/// Borrowed tensor: name, dtype, shape and contiguous elements.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name, unique within the model.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: &'a [usize],
    /// Elements.
    pub memory: Memory<'a>,
    /// True for state that is not trained. Of floating-point buffers, only batch-norm statistics are averaged:
    /// `running_mean` and `running_var`. All others are copied.
    pub is_buffer: bool,
    /// Place in a larger tensor, of which this process holds only these elements. `None` for a whole tensor.
    pub part: Option<Part<'a>>,
    /// True if another process of a sharded run stores the same elements. This one averages them, too.
    pub is_replica: bool,
}

impl<'a> TensorView<'a> {
    /// Creates a view of elements in host memory.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of bytes is not that of shape and dtype.
    pub fn host(name: &'a str, dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> Result<Self> {
        check_size(name, dtype, shape, bytes.len())?;
        Ok(TensorView::new(name, dtype, shape, Memory::Host(bytes)))
    }

    /// Creates a view of elements in memory of a CUDA device.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of bytes is not that of shape and dtype.
    pub fn cuda(name: &'a str, dtype: Dtype, shape: &'a [usize], memory: CudaMemory<'a>) -> Result<Self> {
        check_size(name, dtype, shape, memory.bytes)?;
        Ok(TensorView::new(name, dtype, shape, Memory::Cuda(memory)))
    }

    fn new(name: &'a str, dtype: Dtype, shape: &'a [usize], memory: Memory<'a>) -> Self {
        TensorView { name, dtype, shape, memory, is_buffer: false, part: None, is_replica: false }
    }

    /// Marks the tensor as a buffer: state that is not trained, such as the `u` and `v` of a spectral norm.
    ///
    /// Buffers are copied from the newest update, except for batch-norm statistics and those named in
    /// [`Options::average`](crate::Options::average).
    #[must_use]
    pub fn as_buffer(self) -> Self {
        TensorView { is_buffer: true, ..self }
    }

    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the elements if they are in host memory.
    pub fn host_bytes(&self) -> Option<&'a [u8]> {
        match self.memory {
            Memory::Host(bytes) => Some(bytes),
            Memory::Cuda(_) => None,
        }
    }

    /// Returns the number of bytes.
    pub fn byte_len(&self) -> usize {
        match self.memory {
            Memory::Host(bytes) => bytes.len(),
            Memory::Cuda(memory) => memory.bytes,
        }
    }

    /// Returns device (`None` for the host) and address, which are equal for two views of the same memory.
    pub(crate) fn place(&self) -> (Option<usize>, u64) {
        match self.memory {
            Memory::Host(bytes) => (None, bytes.as_ptr().addr() as u64),
            Memory::Cuda(memory) => (Some(memory.device), memory.address),
        }
    }
}

/// Borrowed tensor, for writing.
#[derive(Debug)]
pub struct TensorViewMut<'a> {
    /// Name, unique within the model.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: &'a [usize],
    /// Elements.
    pub memory: MemoryMut<'a>,
}

impl<'a> TensorViewMut<'a> {
    /// Creates a view of elements in host memory.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of bytes is not that of shape and dtype.
    pub fn host(name: &'a str, dtype: Dtype, shape: &'a [usize], bytes: &'a mut [u8]) -> Result<Self> {
        check_size(name, dtype, shape, bytes.len())?;
        Ok(TensorViewMut { name, dtype, shape, memory: MemoryMut::Host(bytes) })
    }

    /// Creates a view of elements in memory of a CUDA device.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the number of bytes is not that of shape and dtype.
    pub fn cuda(name: &'a str, dtype: Dtype, shape: &'a [usize], memory: CudaMemoryMut<'a>) -> Result<Self> {
        check_size(name, dtype, shape, memory.0.bytes)?;
        Ok(TensorViewMut { name, dtype, shape, memory: MemoryMut::Cuda(memory) })
    }

    /// Returns the elements if they are in host memory.
    pub fn into_host_bytes(self) -> Option<&'a mut [u8]> {
        match self.memory {
            MemoryMut::Host(bytes) => Some(bytes),
            MemoryMut::Cuda(_) => None,
        }
    }
}

/// Returns the size of a tensor in bytes.
///
/// # Errors
/// [`Error::Tensor`] if the size overflows or is not a whole number of bytes.
pub fn byte_size(name: &str, dtype: Dtype, shape: &[usize]) -> Result<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bits = elements.and_then(|n| n.checked_mul(dtype.bitsize()));
    match bits {
        Some(bits) if bits.is_multiple_of(8) => Ok(bits / 8),
        _ => Err(Error::tensor(name, format!("shape {shape:?} of {dtype} is not a whole number of bytes below 2^64"))),
    }
}

fn check_size(name: &str, dtype: Dtype, shape: &[usize], bytes: usize) -> Result<()> {
    let expected = byte_size(name, dtype, shape)?;
    if expected != bytes {
        return Err(Error::tensor(
            name,
            format!("shape {shape:?} of {dtype} takes {expected} bytes, {bytes} were given"),
        ));
    }
    Ok(())
}

/// Model whose tensors can be read.
///
/// Implemented for lists of `(name, slice)` pairs, [`Tensors`], safetensors files in memory and, in the crate
/// `posthoc-ema-candle`, for candle's `VarMap`.
pub trait Parameters {
    /// Calls `read` once with a view of every tensor, in any order. Names must be unique.
    ///
    /// # Errors
    /// Errors of `read`, and an error of the model if it cannot lend its tensors.
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()>;
}

/// Model whose tensors can be written.
pub trait ParametersMut: Parameters {
    /// Calls `write` for every tensor, one after the other.
    ///
    /// # Errors
    /// Errors of `write`, and an error of the model if it cannot lend its tensors.
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()>;

    /// Calls `write` for every tensor, with views of several at a time; by default, of one at a time.
    ///
    /// A model on a device that lends all its tensors at once is written with few launches and waits.
    ///
    /// # Errors
    /// As [`ParametersMut::for_each_mut`].
    fn for_each_batch_mut(&mut self, write: &mut dyn FnMut(Vec<TensorViewMut<'_>>) -> Result<()>) -> Result<()> {
        self.for_each_mut(&mut |view| write(vec![view]))
    }
}

/// `(name, elements)` pairs. Each is a tensor of one dimension.
impl<N: AsRef<str>, T: Element> Parameters for [(N, Vec<T>)] {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        with_pairs(self.iter().map(|(name, values)| (name.as_ref(), values.as_slice())), read)
    }
}

impl<N: AsRef<str>, T: Element> Parameters for Vec<(N, Vec<T>)> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        self.as_slice().with_tensors(read)
    }
}

/// `(name, slice)` pairs. Each is a tensor of one dimension.
impl<T: Element> Parameters for [(&str, &[T])] {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        with_pairs(self.iter().copied(), read)
    }
}

impl<T: Element, const N: usize> Parameters for [(&str, &[T]); N] {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        self.as_slice().with_tensors(read)
    }
}

fn with_pairs<'a, T: Element>(
    pairs: impl Iterator<Item = (&'a str, &'a [T])>,
    read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>,
) -> Result<()> {
    let pairs: Vec<_> = pairs.map(|(name, values)| (name, [values.len()], values)).collect();
    let views: Vec<_> = pairs
        .iter()
        .map(|(name, shape, values)| TensorView::host(name, T::DTYPE, shape, bytemuck::cast_slice(values)))
        .collect::<Result<_>>()?;
    read(&views)
}

/// `(name, mutable slice)` pairs, which Switch EMA can write to.
impl<T: Element> Parameters for [(&str, &mut [T])] {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        with_pairs(self.iter().map(|(name, values)| (*name, &**values)), read)
    }
}

impl<T: Element> ParametersMut for [(&str, &mut [T])] {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        for (name, values) in self.iter_mut() {
            let shape = [values.len()];
            write(TensorViewMut::host(name, T::DTYPE, &shape, bytemuck::cast_slice_mut(values))?)?;
        }
        Ok(())
    }
}

impl<N: AsRef<str>, T: Element> ParametersMut for Vec<(N, Vec<T>)> {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        for (name, values) in self.iter_mut() {
            let shape = [values.len()];
            write(TensorViewMut::host(name.as_ref(), T::DTYPE, &shape, bytemuck::cast_slice_mut(values))?)?;
        }
        Ok(())
    }
}

/// Owned tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Elements in C order, little endian.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Creates a tensor from its elements.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the shape does not have that many elements.
    pub fn new<T: Element>(shape: &[usize], values: &[T]) -> Result<Tensor> {
        let bytes = bytemuck::cast_slice(values).to_vec();
        check_size("new", T::DTYPE, shape, bytes.len())?;
        Ok(Tensor { dtype: T::DTYPE, shape: shape.to_vec(), bytes })
    }

    /// Returns the elements if they are of type `T`.
    pub fn to_vec<T: Element>(&self) -> Option<Vec<T>> {
        (self.dtype == T::DTYPE).then(|| bytemuck::allocation::pod_collect_to_vec(&self.bytes))
    }
}

/// Owned tensors by name, such as the result of a synthesis into memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    /// Returns the tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// Iterates over all tensors, by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.0.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Returns the number of tensors.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a tensor or replaces the one of that name.
    pub fn insert(&mut self, name: impl Into<String>, tensor: Tensor) {
        self.0.insert(name.into(), tensor);
    }
}

impl FromIterator<(String, Tensor)> for Tensors {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(tensors: I) -> Self {
        Tensors(tensors.into_iter().collect())
    }
}

impl IntoIterator for Tensors {
    type Item = (String, Tensor);
    type IntoIter = std::collections::btree_map::IntoIter<String, Tensor>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl Parameters for Tensors {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let views: Vec<_> =
            self.iter().map(|(name, t)| TensorView::host(name, t.dtype, &t.shape, &t.bytes)).collect::<Result<_>>()?;
        read(&views)
    }
}

impl ParametersMut for Tensors {
    fn for_each_mut(&mut self, write: &mut dyn FnMut(TensorViewMut<'_>) -> Result<()>) -> Result<()> {
        for (name, t) in &mut self.0 {
            write(TensorViewMut::host(name, t.dtype, &t.shape, &mut t.bytes)?)?;
        }
        Ok(())
    }
}

/// Safetensors file in memory.
impl Parameters for safetensors::SafeTensors<'_> {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let tensors = self.tensors();
        let views: Vec<_> = tensors
            .iter()
            .map(|(name, t)| TensorView::host(name, t.dtype(), t.shape(), t.data()))
            .collect::<Result<_>>()?;
        read(&views)
    }
}
