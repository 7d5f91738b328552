//! Temporary swap of an average into a live model.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Deref, DerefMut};

use safetensors::Dtype;

use super::backend::Backend;
use super::source_set::{ModelTensor, Selection, SourceSet};
use super::transfer::Transfer;
use crate::compute::cpu::{f32_to_bf16, f32_to_f16, to_f32};
use crate::error::{Difference, Error, Result};
use crate::planning::Plan;
use crate::tensor::{Parameters, ParametersMut, Tensor, TensorViewMut};

/// Guard of parameters that hold an average. On drop, every tensor gets its own bits back.
///
/// It is returned by [`PostHocEma::swap_in`](crate::PostHocEma::swap_in) and [`Run::swap_in`](crate::Run::swap_in), and
/// dereferences to the parameters. They are also restored if an error or a panic leaves the scope. A failure to restore
/// is logged; [`SwapGuard::restore`] returns it instead.
#[must_use = "the parameters are restored as soon as this is dropped"]
pub struct SwapGuard<'p, P: ParametersMut + ?Sized> {
    params: &'p mut P,
    /// `None` once the parameters were restored, kept, or handed over.
    saved: Option<SavedWeights>,
}

impl<P: ParametersMut + ?Sized> SwapGuard<'_, P> {
    /// Restores every tensor, as a drop does, and returns an error if that fails.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that is missing now, or whose shape or dtype changed; all others are restored.
    /// [`Error::Cuda`] if a device fails.
    pub fn restore(mut self) -> Result<()> {
        self.restore_saved()
    }

    /// Keeps the average in the model for good: Switch EMA after an evaluation of it.
    pub fn keep(mut self) {
        self.saved = None;
    }

    /// Leaves the average in the model, and returns the saved weights that restore it. This is for callers that cannot
    /// keep the borrow, such as a binding to another language.
    pub fn into_saved_weights(mut self) -> SavedWeights {
        self.saved.take().unwrap_or_default()
    }

    fn restore_saved(&mut self) -> Result<()> {
        self.saved.take().map_or(Ok(()), |saved| saved.restore(self.params))
    }
}

impl<P: ParametersMut + ?Sized> Drop for SwapGuard<'_, P> {
    fn drop(&mut self) {
        if let Err(error) = self.restore_saved() {
            tracing::error!("some parameters still hold the average: {error}");
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
        f.debug_struct("SwapGuard").finish_non_exhaustive()
    }
}

impl SourceSet<'_> {
    /// Swaps the synthesis of a plan into a live model, copied tensors included. The guard restores the model.
    ///
    /// # Errors
    /// - [`Error::Changed`] if the model differs from the run.
    /// - [`Error::Tensor`] if a tensor is missing or a sum does not fit its dtype.
    /// - [`Error::Cuda`] if a device fails.
    /// - Those of [`SourceSet::select`].
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

    /// Blends a plan into a live model, and saves its averaged tensors, and those others that `is_saved` selects.
    ///
    /// All tensors are saved before any is written. After an error or a panic the model is restored.
    pub(super) fn swap<'p, P: ParametersMut + ?Sized>(
        &self,
        plan: &Plan,
        params: &'p mut P,
        is_saved: impl Fn(&ModelTensor) -> bool,
    ) -> Result<SwapGuard<'p, P>> {
        let selection = self.select(&[plan])?;
        let backend = self.backend_of(params)?;
        self.check_model(&selection, params, matches!(backend, Backend::Cpu))?;
        let is_wanted = |name: &str| self.find(name).is_some_and(|tensor| tensor.averaged || is_saved(tensor));
        let saved = SavedWeights::read(params, is_wanted)?;
        let swapped = SwapGuard { params, saved: Some(saved) };
        match backend {
            Backend::Cpu => self.blend_into(&selection, swapped.params)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => self.blend_into_on(&selection, swapped.params)?,
        }
        Ok(swapped)
    }

    /// Checks that the model's copied tensors can take their stored values.
    fn check_copied(&self, params: &(impl Parameters + ?Sized)) -> Result<()> {
        params.with_tensors(&mut |views| {
            let known = views.iter().filter_map(|view| Some((view, self.find(view.name)?)));
            for (view, tensor) in known.filter(|(_, tensor)| !tensor.averaged) {
                if view.shape != tensor.shape || !is_convertible(tensor.dtype, view.dtype) {
                    let stored = format!("{} {:?} in the run", tensor.dtype, tensor.shape);
                    let now = format!("{} {:?}", view.dtype, view.shape);
                    return Err(Error::changed(view.name, Difference::new("the tensor", stored, now)));
                }
            }
            Ok(())
        })
    }

    /// Writes the stored values of the copied tensors into the model.
    fn copy_into_model(&self, selection: &Selection<'_>, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let mut transfer = Transfer::default();
        params.for_each_batch_mut(&mut |views| {
            let mut writes = Vec::with_capacity(views.len());
            for view in views {
                let Some(tensor) = self.find(view.name).filter(|tensor| !tensor.averaged) else { continue };
                let stored = selection.copied(0, tensor)?.to_bytes();
                let bytes = converted(&stored, tensor.dtype, view.dtype).into_owned();
                writes.push((view, Cow::Owned(bytes)));
            }
            transfer.write_all(writes)
        })
    }
}

/// Returns true if a copied tensor can be converted to a model's dtype. An import may store 16 bits of a model in f32.
fn is_convertible(from: Dtype, to: Dtype) -> bool {
    let is_float = |dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    from == to || (is_float(from) && is_float(to))
}

/// Converts the elements of a copied tensor to another dtype, after [`is_convertible`].
fn converted(bytes: &[u8], from: Dtype, to: Dtype) -> Cow<'_, [u8]> {
    if from == to {
        return bytes.into();
    }
    let mut values = vec![0.0; bytes.len() * 8 / from.bitsize()];
    to_f32(&mut values, bytes, from);
    let halves = |round: fn(f32) -> u16| values.iter().flat_map(|value| round(*value).to_le_bytes()).collect();
    match to {
        Dtype::F16 => halves(f32_to_f16),
        Dtype::BF16 => halves(f32_to_bf16),
        _ => Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
    }
}

/// Weights that a model had before an average was swapped in, from [`SwapGuard::into_saved_weights`].
#[derive(Default)]
#[must_use = "nothing is restored unless `restore` is called"]
pub struct SavedWeights {
    /// Every distinct piece of memory. Several tensors may share one.
    tensors: Vec<Tensor>,
    /// Index in `tensors` for each name.
    names: BTreeMap<String, usize>,
}

impl SavedWeights {
    /// Copies all tensors of a model to host memory, for a caller that replaces them itself: a rank that receives the
    /// average of another process.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a name occurs twice; [`Error::Cuda`] if a device fails.
    pub fn copy_of(params: &(impl Parameters + ?Sized)) -> Result<SavedWeights> {
        SavedWeights::read(params, |_| true)
    }

    /// Copies the tensors that `is_wanted` selects.
    fn read(params: &(impl Parameters + ?Sized), is_wanted: impl Fn(&str) -> bool) -> Result<SavedWeights> {
        let mut saved = SavedWeights::default();
        params.with_tensors(&mut |views| {
            let mut places = BTreeMap::new();
            let mut distinct = Vec::new();
            for view in views.iter().filter(|view| is_wanted(view.name)) {
                let place = (view.place(), view.byte_len(), view.dtype, view.shape);
                let index = *places.entry(place).or_insert(distinct.len());
                if index == distinct.len() {
                    distinct.push(view);
                }
                if saved.names.insert(view.name.to_owned(), index).is_some() {
                    return Err(Error::tensor(view.name, "the name occurs twice: names must be unique"));
                }
            }
            saved.tensors = Transfer::default().read_all(&distinct)?;
            Ok(())
        })?;
        Ok(saved)
    }

    /// Restores all tensors that can be restored, and returns the first error.
    ///
    /// # Errors
    /// As [`SwapGuard::restore`].
    pub fn restore(&self, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let mut first_error = None;
        let mut transfer = Transfer::default();
        let mut missing: BTreeSet<&str> = self.names.keys().map(String::as_str).collect();
        params.for_each_batch_mut(&mut |views| {
            let mut writes = Vec::with_capacity(views.len());
            for view in views {
                let Some(&index) = self.names.get(view.name) else { continue };
                missing.remove(view.name);
                match check_unchanged(&view, &self.tensors[index]) {
                    Ok(()) => writes.push((view, Cow::Borrowed(self.tensors[index].bytes.as_slice()))),
                    Err(error) => drop(first_error.get_or_insert(error)),
                }
            }
            if let Err(error) = transfer.write_all(writes) {
                first_error.get_or_insert(error);
            }
            Ok(())
        })?;
        match (first_error, missing.first()) {
            (Some(error), _) => Err(error),
            (None, Some(name)) => Err(not_restored(name, "the model no longer has it")),
            (None, None) => Ok(()),
        }
    }
}

impl fmt::Debug for SavedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SavedWeights").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

/// Checks that a tensor still has its shape and dtype.
fn check_unchanged(view: &TensorViewMut<'_>, saved: &Tensor) -> Result<()> {
    if view.shape != saved.shape || view.dtype != saved.dtype {
        let why = format!("it is {} {:?} now, and was {} {:?}", view.dtype, view.shape, saved.dtype, saved.shape);
        return Err(not_restored(view.name, &why));
    }
    Ok(())
}

fn not_restored(name: &str, why: &str) -> Error {
    Error::tensor(name, format!("{why}: its weights cannot be restored; load the model's own checkpoint"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_tensors_convert_between_float_dtypes() {
        let halves: Vec<u8> =
            [1.0f32, f32::NEG_INFINITY, -0.5].iter().flat_map(|x| f32_to_f16(*x).to_le_bytes()).collect();
        let wide = converted(&halves, Dtype::F16, Dtype::F32);
        assert_eq!(*wide, *[1.0f32, f32::NEG_INFINITY, -0.5].map(f32::to_le_bytes).as_flattened());
        assert_eq!(*converted(&wide, Dtype::F32, Dtype::F16), *halves);
        let brains = converted(&halves, Dtype::F16, Dtype::BF16);
        assert_eq!(*converted(&brains, Dtype::BF16, Dtype::F32), *wide);
        assert!(is_convertible(Dtype::I64, Dtype::I64) && is_convertible(Dtype::BF16, Dtype::F32));
        assert!(!is_convertible(Dtype::I64, Dtype::F32) && !is_convertible(Dtype::F64, Dtype::F32));
    }

    #[test]
    fn copy_of_a_model_restores_all_of_it() {
        let mut params = vec![("a", vec![1.0f32, f32::from_bits(0x7fc0_1234)]), ("b", vec![3.0])];
        let bits = |params: &[(&str, Vec<f32>)]| -> Vec<u32> {
            params.iter().flat_map(|(_, values)| values.iter().map(|x| x.to_bits())).collect()
        };
        let before = bits(&params);
        let saved = SavedWeights::copy_of(&params).unwrap();
        params.iter_mut().for_each(|(_, values)| values.fill(9.0));
        saved.restore(&mut params).unwrap();
        assert_eq!(bits(&params), before);
    }

    #[test]
    fn shared_memory_is_saved_once() {
        let shared = [1.0f32, 2.0];
        let apart = [1.0f32, 2.0];
        let params = [("a", &shared[..]), ("apart", &apart), ("b", &shared), ("half", &shared[..1]), ("not", &apart)];
        let saved = SavedWeights::read(&params, |name| name != "not").unwrap();
        assert_eq!(saved.tensors.len(), 3);
        let names = BTreeMap::from([("a", 0), ("apart", 1), ("b", 0), ("half", 2)]);
        assert_eq!(saved.names, names.into_iter().map(|(name, i)| (name.to_owned(), i)).collect());
    }
}
