//! An average in the place of a live model's weights, for as long as it is looked at.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Deref, DerefMut};

use rayon::prelude::*;
use safetensors::Dtype;

use super::backend::Backend;
use super::output::copied;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::compute::cpu::{f32_to_bf16, f32_to_f16, to_f32};
#[cfg(feature = "cuda")]
use crate::compute::cuda::{self, Staging};
use crate::error::{Difference, Error, Result};
use crate::planning::Plan;
use crate::tensor::{Memory, MemoryMut, Parameters, ParametersMut, Tensor, TensorView, TensorViewMut};

/// Parameters that hold an average, until this is dropped: then every tensor has its own bits back.
///
/// Made by [`PostHocEma::swap_in`](crate::PostHocEma::swap_in) and [`Run::swap_in`](crate::Run::swap_in); it stands for
/// the parameters. They are restored when the scope is left by an error or a panic, too. What a failure of that leaves
/// behind is logged; [`SwapGuard::restore`] returns it as an error instead.
#[must_use = "the parameters are restored as soon as this is dropped"]
pub struct SwapGuard<'p, P: ParametersMut + ?Sized> {
    params: &'p mut P,
    /// None where there is nothing to restore any more.
    originals: Option<SavedWeights>,
}

impl<P: ParametersMut + ?Sized> SwapGuard<'_, P> {
    /// Gives every tensor its own bits back: what dropping does, with the error if that fails.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor whose shape or dtype changed meanwhile, or that is gone; all others are restored.
    /// [`Error::Cuda`] where a device fails.
    pub fn restore(mut self) -> Result<()> {
        self.originals.take().map_or(Ok(()), |originals| originals.restore(self.params))
    }

    /// Leaves the average where it is, for good: Switch EMA after a look at it.
    pub fn keep(mut self) {
        self.originals = None;
    }

    /// Leaves the average where it is, and hands out what restores the parameters: for a caller, such as a binding to
    /// another language, that cannot hold on to the borrow.
    pub fn into_originals(mut self) -> SavedWeights {
        self.originals.take().unwrap_or_default()
    }
}

impl<P: ParametersMut + ?Sized> Drop for SwapGuard<'_, P> {
    fn drop(&mut self) {
        let restored = self.originals.take().map_or(Ok(()), |originals| originals.restore(self.params));
        if let Err(error) = restored {
            tracing::error!("the parameters may still hold an average in part: {error}");
        }
    }
}

impl<P: ParametersMut + ?Sized> Deref for SwapGuard<'_, P> {
    type Target = P;

    fn deref(&self) -> &P {
        self.params
    }
}

impl<P: ParametersMut + ?Sized> DerefMut for SwapGuard<'_, P> {
    fn deref_mut(&mut self) -> &mut P {
        self.params
    }
}

impl<P: ParametersMut + ?Sized> fmt::Debug for SwapGuard<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwappedIn").finish_non_exhaustive()
    }
}

impl SourceSet<'_> {
    /// Makes a live model what a synthesis of a plan gives, copied tensors included, and keeps what was there.
    pub(crate) fn swap_in<'p, P: ParametersMut + ?Sized>(
        &self,
        plan: &Plan,
        params: &'p mut P,
    ) -> Result<SwapGuard<'p, P>> {
        self.check_copied(params)?;
        let mut swapped = self.swap(plan, params, |_| true)?;
        self.copy_into_model(&self.select(&[plan])?, &mut *swapped)?;
        Ok(swapped)
    }

    /// Blends a plan into a live model, and keeps what was there of its averaged tensors; of others where `is_kept` says.
    ///
    /// Nothing is written before all is read; what was written before an error or a panic is restored.
    pub(super) fn swap<'p, P: ParametersMut + ?Sized>(
        &self,
        plan: &Plan,
        params: &'p mut P,
        is_kept: impl Fn(&ModelTensor) -> bool,
    ) -> Result<SwapGuard<'p, P>> {
        let selection = self.select(&[plan])?;
        let place = self.place_of(params)?;
        self.check_model(&selection, params, matches!(place, Backend::Cpu))?;
        let is_wanted = |name: &str| self.find(name).is_some_and(|tensor| tensor.averaged || is_kept(tensor));
        let originals = SavedWeights::read(params, is_wanted)?;
        let swapped = SwapGuard { params, originals: Some(originals) };
        match place {
            Backend::Cpu => self.blend_into(&selection, swapped.params)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => self.blend_into_on(&device, &selection, swapped.params)?,
        }
        Ok(swapped)
    }

    /// Checks that the model's tensors that are not averaged can take their stored values.
    fn check_copied(&self, params: &(impl Parameters + ?Sized)) -> Result<()> {
        params.with_tensors(&mut |views| {
            let copied = views.iter().filter_map(|view| Some((view, self.find(view.name)?)));
            for (view, tensor) in copied.filter(|(_, tensor)| !tensor.averaged) {
                if view.shape != tensor.shape || !can_become(tensor.dtype, view.dtype) {
                    let stored = format!("{} {:?} in the run", tensor.dtype, tensor.shape);
                    let now = format!("{} {:?}", view.dtype, view.shape);
                    return Err(Error::changed(view.name, Difference::new("the tensor", stored, now)));
                }
            }
            Ok(())
        })
    }

    /// Gives the model's tensors that are not averaged their stored values.
    fn copy_into_model(&self, selection: &Selection<'_>, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let mut bus = Bus::default();
        params.for_each_mut(&mut |view| match self.find(view.name) {
            Some(tensor) if !tensor.averaged => {
                let bytes = converted(copied(selection, 0, tensor)?, tensor.dtype, view.dtype);
                bus.write(view.name, view.memory, &bytes)
            }
            _ => Ok(()),
        })
    }
}

/// Whether a copied tensor of one dtype can be put into a model of another: an import may have 16 bits of a model in f32.
fn can_become(from: Dtype, to: Dtype) -> bool {
    let by_way_of_f32 = |dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    from == to || (by_way_of_f32(from) && by_way_of_f32(to))
}

/// A copied tensor's elements in another dtype that they can become.
fn converted(bytes: &[u8], from: Dtype, to: Dtype) -> Cow<'_, [u8]> {
    if from == to {
        return bytes.into();
    }
    let mut values = vec![0.0; bytes.len() * 8 / from.bitsize()];
    to_f32(&mut values, bytes, from);
    let halves = |half: fn(f32) -> u16| values.iter().flat_map(|value| half(*value).to_le_bytes()).collect();
    match to {
        Dtype::F16 => halves(f32_to_f16),
        Dtype::BF16 => halves(f32_to_bf16),
        _ => Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
    }
}

/// What tensors held before an average was put in their place: see [`SwapGuard::into_originals`].
#[derive(Default)]
#[must_use = "nothing is restored unless `restore` is called"]
pub struct SavedWeights {
    /// Every piece of memory once, however many tensors share it.
    tensors: Vec<Tensor>,
    /// The place in `tensors` of each name.
    names: BTreeMap<String, usize>,
}

impl SavedWeights {
    /// Copies the tensors of which `is_wanted` holds.
    fn read(params: &(impl Parameters + ?Sized), is_wanted: impl Fn(&str) -> bool) -> Result<SavedWeights> {
        let mut originals = SavedWeights::default();
        params.with_tensors(&mut |views| {
            let mut places = BTreeMap::new();
            let mut distinct = Vec::new();
            for view in views.iter().filter(|view| is_wanted(view.name)) {
                let place = (view.place(), view.byte_len(), view.dtype, view.shape);
                let index = *places.entry(place).or_insert(distinct.len());
                if index == distinct.len() {
                    distinct.push(view);
                }
                if originals.names.insert(view.name.to_owned(), index).is_some() {
                    return Err(Error::tensor(view.name, "the name occurs twice: names must be unique"));
                }
            }
            originals.tensors = read_all(&distinct)?;
            Ok(())
        })?;
        Ok(originals)
    }

    /// Writes everything back that can be, and returns the first error.
    ///
    /// # Errors
    /// As [`SwapGuard::restore`].
    pub fn restore(&self, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let (mut first, mut bus) = (None, Bus::default());
        let mut missing: BTreeSet<&str> = self.names.keys().map(String::as_str).collect();
        params.for_each_mut(&mut |view| {
            if let Some(&index) = self.names.get(view.name) {
                missing.remove(view.name);
                if let Err(error) = write_tensor(view, &self.tensors[index], &mut bus) {
                    first.get_or_insert(error);
                }
            }
            Ok(())
        })?;
        let gone = || missing.first().map(|name| lost(name, "it is gone"));
        first.or_else(gone).map_or(Ok(()), Err)
    }
}

impl fmt::Debug for SavedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Originals").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

/// Copies tensors: those in host memory with all threads, those on a device one after the other over the bus.
fn read_all(views: &[&TensorView<'_>]) -> Result<Vec<Tensor>> {
    let tensor = |view: &TensorView<'_>, bytes| Tensor { dtype: view.dtype, shape: view.shape.to_vec(), bytes };
    if views.iter().all(|view| view.host_bytes().is_some()) {
        let copy = |view: &&TensorView<'_>| tensor(view, view.host_bytes().unwrap_or_default().to_vec());
        return Ok(views.par_iter().map(copy).collect());
    }
    let mut bus = Bus::default();
    views.iter().map(|view| Ok(tensor(view, bus.read(view)?))).collect()
}

/// Copies between host memory and a model's, wherever that lies.
#[derive(Default)]
struct Bus {
    #[cfg(feature = "cuda")]
    staging: Option<Staging>,
}

impl Bus {
    fn read(&mut self, view: &TensorView<'_>) -> Result<Vec<u8>> {
        match view.memory {
            Memory::Host(bytes) => Ok(bytes.to_vec()),
            #[cfg(feature = "cuda")]
            Memory::Cuda(memory) => self.staging(memory.device)?.read(&memory),
            #[cfg(not(feature = "cuda"))]
            Memory::Cuda(_) => Err(Error::on_device(view.name)),
        }
    }

    fn write(&mut self, name: &str, memory: MemoryMut<'_>, bytes: &[u8]) -> Result<()> {
        let length = match &memory {
            MemoryMut::Host(dst) => dst.len(),
            MemoryMut::Cuda(memory) => memory.0.bytes,
        };
        if length != bytes.len() {
            return Err(lost(name, &format!("{length} bytes are lent, and were {}", bytes.len())));
        }
        match memory {
            MemoryMut::Host(dst) => dst.copy_from_slice(bytes),
            #[cfg(feature = "cuda")]
            MemoryMut::Cuda(memory) => self.staging(memory.0.device)?.write(&memory, bytes)?,
            #[cfg(not(feature = "cuda"))]
            MemoryMut::Cuda(_) => return Err(Error::on_device(name)),
        }
        Ok(())
    }

    /// The pinned buffers for copies from and to a device.
    #[cfg(feature = "cuda")]
    fn staging(&mut self, device: usize) -> Result<&mut Staging> {
        let staging = match self.staging.take() {
            Some(staging) if staging.device().number() == device => staging,
            _ => Staging::new(&cuda::CudaDevice::open(device)?, usize::MAX)?,
        };
        Ok(self.staging.insert(staging))
    }
}

/// Writes a tensor's elements back.
fn write_tensor(view: TensorViewMut<'_>, original: &Tensor, bus: &mut Bus) -> Result<()> {
    let name = view.name;
    if view.shape != original.shape || view.dtype != original.dtype {
        let now = format!("it is {} {:?} now, and was {} {:?}", view.dtype, view.shape, original.dtype, original.shape);
        return Err(lost(name, &now));
    }
    bus.write(name, view.memory, &original.bytes)
}

fn lost(name: &str, how: &str) -> Error {
    let reason = format!("{how}: the average that stands for it cannot be taken out; load the model's own checkpoint");
    Error::tensor(name, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_tensors_of_16_bits_go_into_models_of_more() {
        let halves: Vec<u8> =
            [1.0f32, f32::NEG_INFINITY, -0.5].iter().flat_map(|x| f32_to_f16(*x).to_le_bytes()).collect();
        let wide = converted(&halves, Dtype::F16, Dtype::F32);
        assert_eq!(*wide, *[1.0f32, f32::NEG_INFINITY, -0.5].map(f32::to_le_bytes).as_flattened());
        assert_eq!(*converted(&wide, Dtype::F32, Dtype::F16), *halves);
        let brains = converted(&halves, Dtype::F16, Dtype::BF16);
        assert_eq!(*converted(&brains, Dtype::BF16, Dtype::F32), *wide);
        assert!(can_become(Dtype::I64, Dtype::I64) && can_become(Dtype::BF16, Dtype::F32));
        assert!(!can_become(Dtype::I64, Dtype::F32) && !can_become(Dtype::F64, Dtype::F32));
    }

    #[test]
    fn memory_that_tensors_share_is_kept_once() {
        let (shared, apart) = ([1.0f32, 2.0], [1.0f32, 2.0]);
        let params = [("a", &shared[..]), ("apart", &apart), ("b", &shared), ("half", &shared[..1]), ("not", &apart)];
        let originals = SavedWeights::read(&params, |name| name != "not").unwrap();
        assert_eq!(originals.tensors.len(), 3);
        let names = BTreeMap::from([("a", 0), ("apart", 1), ("b", 0), ("half", 2)]);
        assert_eq!(originals.names, names.into_iter().map(|(name, i)| (name.to_owned(), i)).collect());
    }
}
