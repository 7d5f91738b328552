//! Tensors of a pickle: calls of PyTorch's own functions that rebuild them.

use std::ops::Range;

use safetensors::Dtype;

use super::legacy;
use super::pickle::{MemoryBudget, NodeId, Pickle};
use super::storage::{self, StorageRef, UNTYPED};

/// Most dimensions of a PyTorch tensor.
const MAX_RANK: usize = 64;

/// Most calls within each other that make one tensor: a parameter of a subclass of a tensor takes three.
const MAX_CALLS: usize = 8;

/// Tensor whose elements are in the file.
#[derive(Clone, Debug)]
pub(super) struct PickledTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Distance of neighbouring elements along each dimension, in elements.
    strides: Vec<usize>,
    /// Byte of the file at which the first element is.
    start: usize,
    /// True if the elements are stored with the other sign, as those of `x.imag` of a conjugate are.
    negated: bool,
    /// True if complex elements are stored with the other sign of their imaginary part.
    conjugated: bool,
}

/// Reason why a value of a pickle cannot be read as a tensor.
#[derive(Debug, PartialEq)]
pub(super) enum NotRead {
    /// It is something else.
    Other,
    /// It is a tensor of a kind that is not read, by the name of the function that makes it or of its storage.
    Kind(String),
    /// Its elements are not in the file.
    Damaged(String),
}

/// Pickle with the storages that its tensors refer to.
pub(super) struct TensorReader<'a> {
    pub file: &'a [u8],
    pub pickle: &'a Pickle,
    /// Returns the place of a storage in the file.
    pub place: &'a dyn Fn(&str) -> Option<Range<usize>>,
}

/// Returns true for a tensor, also of a kind that cannot be read.
pub(super) fn is_tensor(pickle: &Pickle, id: NodeId) -> bool {
    pickle.call(id).is_some_and(|(function, _)| is_rebuild(function))
}

fn is_rebuild(function: &str) -> bool {
    function.starts_with("torch._utils._rebuild_") || function.starts_with("torch._tensor._rebuild_")
}

/// Elements that a tensor refers to.
struct Storage {
    /// Place in the file.
    range: Range<usize>,
    /// `None` for bytes without a dtype.
    dtype: Option<Dtype>,
}

impl TensorReader<'_> {
    /// Reads a tensor without its elements.
    ///
    /// # Errors
    /// [`NotRead`].
    pub(super) fn read(&self, id: NodeId) -> Result<PickledTensor, NotRead> {
        let (function, arguments) = self.pickle.call(id).ok_or(NotRead::Other)?;
        self.rebuild(function, arguments, 0)
    }

    /// Follows the functions of `torch._utils` and `torch._tensor` by their names.
    fn rebuild(&self, function: &str, arguments: &[NodeId], depth: usize) -> Result<PickledTensor, NotRead> {
        let name = function.rsplit('.').next().unwrap_or_default();
        let kind = || NotRead::Kind(function.to_owned());
        match (name, arguments) {
            _ if !is_rebuild(function) => Err(NotRead::Other),
            _ if depth > MAX_CALLS => Err(kind()),
            ("_rebuild_parameter" | "_rebuild_parameter_with_state", [data, ..]) => {
                let (function, arguments) = self.pickle.call(*data).ok_or_else(kind)?;
                self.rebuild(function, arguments, depth + 1)
            }
            // A subclass of a tensor that holds its elements as a tensor does.
            ("_rebuild_from_type_v2" | "_rebuild_from_type", [inner, _, arguments, ..]) => {
                let inner = self.pickle.class(*inner).ok_or_else(kind)?;
                self.rebuild(inner, self.pickle.items(*arguments).ok_or_else(kind)?, depth + 1)
            }
            ("_rebuild_tensor", [storage, offset, shape, strides]) => {
                self.tensor(*storage, [*offset, *shape, *strides], None, None)
            }
            ("_rebuild_tensor_v2", [storage, offset, shape, strides, _, _, rest @ ..]) => {
                self.tensor(*storage, [*offset, *shape, *strides], None, rest.first().copied())
            }
            ("_rebuild_tensor_v3", [storage, offset, shape, strides, _, _, dtype, rest @ ..]) => {
                self.tensor(*storage, [*offset, *shape, *strides], Some(*dtype), rest.first().copied())
            }
            _ => Err(kind()),
        }
    }

    /// Makes a tensor of its storage, its offset, shape and strides, its dtype if the storage has none, and its flags.
    fn tensor(
        &self,
        storage: NodeId,
        numbers: [NodeId; 3],
        dtype: Option<NodeId>,
        flags: Option<NodeId>,
    ) -> Result<PickledTensor, NotRead> {
        let storage = self.storage(storage, 0)?;
        let dtype = match dtype {
            None => storage.dtype.unwrap_or(Dtype::U8),
            Some(name) => {
                let name = self.pickle.class(name).unwrap_or("a dtype without a name");
                let dtype = name.strip_prefix("torch.").and_then(storage::dtype_named);
                dtype.ok_or_else(|| NotRead::Kind(name.to_owned()))?
            }
        };
        let [offset, shape, strides] = numbers;
        let list = |id| self.pickle.items(id)?.iter().map(|&item| self.size(item)).collect::<Option<Vec<usize>>>();
        let damaged = |why: &str| NotRead::Damaged(why.to_owned());
        let (Some(offset), Some(shape), Some(strides)) = (self.size(offset), list(shape), list(strides)) else {
            return Err(damaged("its shape or its strides do not hold numbers"));
        };
        if shape.len() != strides.len() {
            return Err(damaged("it has another number of strides than of dimensions"));
        }
        if shape.len() > MAX_RANK {
            let why = format!("it has more than {MAX_RANK} dimensions, the most that PyTorch allows");
            return Err(NotRead::Damaged(why));
        }
        let size = dtype.bitsize() / 8;
        let start = offset.checked_mul(size).and_then(|bytes| bytes.checked_add(storage.range.start));
        let end = end(&shape, &strides).and_then(|end| end.checked_mul(size)?.checked_add(start?));
        let (Some(start), true) = (start, end.is_some_and(|end| end <= storage.range.end)) else {
            return Err(damaged("its elements are not in its storage"));
        };
        let flag = |name| flags.and_then(|flags| self.pickle.get(flags, name)).is_some();
        let tensor = PickledTensor { dtype, shape, strides, start, negated: flag("neg"), conjugated: flag("conj") };
        let is_signed = matches!(dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64 | Dtype::C64);
        if (tensor.negated && !is_signed) || (tensor.conjugated && dtype != Dtype::C64) {
            return Err(NotRead::Kind(format!("a negated tensor of {dtype}")));
        }
        Ok(tensor)
    }

    fn size(&self, id: NodeId) -> Option<usize> {
        self.pickle.int(id)?.try_into().ok()
    }

    /// Finds a storage: a reference to the file, or bytes that hold a file of their own.
    fn storage(&self, id: NodeId, depth: usize) -> Result<Storage, NotRead> {
        use super::pickle::Node;
        let damaged = |why: &str| NotRead::Damaged(why.to_owned());
        if let Node::Persistent(reference) = self.pickle.node(id) {
            let reference = StorageRef::new(self.pickle, *reference).ok_or_else(|| damaged("it has no storage"))?;
            let kind = reference.kind;
            let size = storage::element_size(kind).ok_or_else(|| NotRead::Kind(kind.to_owned()))?;
            let range = (self.place)(reference.key).ok_or_else(|| damaged("its storage is missing"))?;
            let within = part(&range, &reference, size).ok_or_else(|| damaged("its storage is too short"))?;
            if kind == UNTYPED {
                return Ok(Storage { range: within, dtype: None });
            }
            let dtype = storage::dtype(kind).ok_or_else(|| NotRead::Kind(kind.to_owned()))?;
            return Ok(Storage { range: within, dtype: Some(dtype) });
        }
        // Pickles that are not PyTorch's own hold each storage as a small file of `torch.save`.
        let Some(("torch.storage._load_from_bytes", [bytes])) = self.pickle.call(id) else {
            return Err(damaged("it has no storage"));
        };
        let Node::Bytes(range) = self.pickle.node(*bytes) else { return Err(damaged("it has no storage")) };
        let mut memory = MemoryBudget::new(STORAGE_MEMORY);
        let inner = legacy::read(self.file, range.clone(), &mut memory)
            .map_err(|_| damaged("its storage is not a file of `torch.save`"))?;
        let place = |key: &str| inner.storages.get(key).cloned();
        let inner_tensors = TensorReader { file: self.file, pickle: &inner.pickle, place: &place };
        match depth {
            0 => inner_tensors.storage(inner.pickle.root(), 1),
            _ => Err(damaged("its storage holds another")),
        }
    }
}

/// Bytes that the pickles of one storage may take.
const STORAGE_MEMORY: usize = 1 << 20;

/// Returns the part of a stored array that a reference is to.
fn part(range: &Range<usize>, reference: &StorageRef<'_>, size: usize) -> Option<Range<usize>> {
    let bytes = |count: i64| usize::try_from(count).ok()?.checked_mul(size);
    let (start, length) = match reference.view {
        Some((offset, count)) => (range.start.checked_add(bytes(offset)?)?, bytes(count)?),
        None => (range.start, bytes(reference.count)?),
    };
    let end = start.checked_add(length)?;
    (end <= range.end).then_some(start..end)
}

/// Returns the number of elements from a tensor's first to behind its last; 0 if it has none.
fn end(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape
        .iter()
        .zip(strides)
        .try_fold(1usize, |end, (&extent, &stride)| end.checked_add((extent - 1).checked_mul(stride)?))
}

impl PickledTensor {
    /// Returns a tensor whose elements follow each other from the byte `start` of a file on; `None` if it is too large.
    pub(super) fn plain(dtype: Dtype, shape: Vec<usize>, start: usize) -> Option<PickledTensor> {
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = shape[i].checked_mul(strides[i])?;
        }
        let tensor = PickledTensor { dtype, shape, strides, start, negated: false, conjugated: false };
        start.checked_add(tensor.bytes()?).map(|_| tensor)
    }

    /// Returns true if the elements of a plain tensor are in a file.
    pub(super) fn ends_within(&self, file: &[u8]) -> bool {
        self.bytes().is_some_and(|bytes| self.start + bytes <= file.len())
    }

    /// Returns some elements of a list; `None` if they are not in it, or if it is not a plain list.
    pub(super) fn stretch(&self, elements: Range<usize>) -> Option<PickledTensor> {
        let is_plain = self.shape.len() == 1 && self.is_contiguous() && !self.negated && !self.conjugated;
        if !is_plain || elements.start > elements.end || elements.end > self.shape[0] {
            return None;
        }
        PickledTensor::plain(self.dtype, vec![elements.len()], self.start + elements.start * self.dtype.bitsize() / 8)
    }

    /// Number of elements; `None` if it has no number.
    fn len(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))
    }

    /// Size of the elements in bytes.
    pub(super) fn bytes(&self) -> Option<usize> {
        self.len()?.checked_mul(self.dtype.bitsize() / 8)
    }

    /// Returns the tensor of a file whose bytes come after some others.
    pub(super) fn moved(mut self, bytes: usize) -> PickledTensor {
        self.start += bytes;
        self
    }

    /// Returns what is equal for tied tensors: the same elements under several names.
    pub(super) fn place(&self) -> (usize, usize, &[usize], &[usize]) {
        (self.start, self.dtype.bitsize(), &self.shape, &self.strides)
    }

    /// Returns the elements in C order if the file has them so.
    pub(super) fn stored<'a>(&self, file: &'a [u8]) -> Option<&'a [u8]> {
        let is_plain = self.is_contiguous() && !self.negated && !self.conjugated;
        is_plain.then(|| file.get(self.start..self.start + self.bytes()?)).flatten()
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        let mut dimensions = self.shape.iter().zip(&self.strides).rev();
        self.shape.contains(&0)
            || dimensions.all(|(&extent, &stride)| {
                let fits = extent == 1 || stride == expected;
                expected *= extent;
                fits
            })
    }

    /// Returns a range of the elements in C order if the file has them so.
    pub(super) fn piece<'a>(&self, file: &'a [u8], elements: Range<usize>) -> Option<&'a [u8]> {
        let size = self.dtype.bitsize() / 8;
        self.stored(file)?.get(elements.start * size..elements.end * size)
    }

    /// Copies elements in C order, little endian, from the element `first` on.
    pub(super) fn copy(&self, file: &[u8], dst: &mut [u8], first: usize) {
        let size = self.dtype.bitsize() / 8;
        if let Some(stored) = self.piece(file, first..first + dst.len() / size) {
            dst.copy_from_slice(stored);
            return;
        }
        let mut index = vec![0; self.shape.len()];
        let mut rest = first;
        let mut at = self.start;
        for (i, extent) in self.shape.iter().enumerate().rev() {
            index[i] = rest % extent;
            rest /= extent;
            at += index[i] * self.strides[i] * size;
        }
        for element in dst.chunks_exact_mut(size) {
            element.copy_from_slice(&file[at..at + size]);
            // Moves to the next element: along the last dimension, or back to its start and along the one before.
            for (i, extent) in self.shape.iter().enumerate().rev() {
                index[i] += 1;
                at += self.strides[i] * size;
                if index[i] < *extent {
                    break;
                }
                at -= self.strides[i] * size * extent;
                index[i] = 0;
            }
        }
        self.resolve_signs(dst);
    }

    /// Changes the signs of the elements as the flags say.
    fn resolve_signs(&self, bytes: &mut [u8]) {
        let is_complex = self.dtype == Dtype::C64;
        let size = if is_complex { 4 } else { self.dtype.bitsize() / 8 };
        for (i, number) in bytes.chunks_exact_mut(size).enumerate() {
            let is_imaginary = is_complex && i % 2 == 1;
            if self.negated != (self.conjugated && is_imaginary) {
                number[size - 1] ^= 0x80;
            }
        }
    }
}
