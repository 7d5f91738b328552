//! Synthesis of several plans into the caller's memory, in one pass over the sources.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::backend::Backend;
use super::blend::TensorBlend;
#[cfg(feature = "cuda")]
use super::on_device::blend_by_device;
use super::options::{MAX_TARGETS, Progress};
use super::prefetch::Prefetcher;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::compute::cpu::CHUNK;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::planning::Plan;
use crate::tensor::{TensorViewMut, byte_size, is_averaged};

/// Number of pieces between the one that is blended and the one that is prefetched meanwhile.
const PREFETCH_DISTANCE: usize = 4;

/// Memory of one target: dtype and bytes of each tensor, by name.
type Target<'a> = BTreeMap<String, (Dtype, &'a mut [u8])>;

impl SourceSet<'_> {
    /// Blends each plan into its list of views. A list holds every tensor once, tied ones under the kept name only.
    ///
    /// # Errors
    /// - [`Error::Count`] if there is not one list for each plan.
    /// - [`Error::Tensor`] if a view is missing or does not fit, or if a sum does not fit its dtype.
    /// - [`Error::Cuda`] if a device fails.
    /// - Those of [`SourceSet::select`].
    pub(crate) fn load_into(
        &self,
        plans: &[&Plan],
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Progress<'_>,
    ) -> Result<()> {
        if plans.len() != outputs.len() {
            return Err(Error::Count {
                items: "lists of views",
                found: outputs.len(),
                owners: "targets",
                expected: plans.len(),
            });
        }
        let mut targets = self.targets(outputs)?;
        let backend = Backend::open(self.device(Device::Cpu))?;
        let targets_per_pass = if matches!(backend, Backend::Cpu) { MAX_TARGETS } else { 1 };
        for (plans, targets) in plans.chunks(targets_per_pass).zip(targets.chunks_mut(targets_per_pass)) {
            self.fill_targets(&backend, &self.select(plans)?, targets, progress)?;
        }
        Ok(())
    }

    /// Blends each target of a selection in host memory into its list of views.
    ///
    /// # Errors
    /// [`Error::Tensor`], as [`SourceSet::load_into`].
    pub(crate) fn load_selection_into(
        &self,
        selection: &Selection<'_>,
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Progress<'_>,
    ) -> Result<()> {
        self.fill_targets(&Backend::Cpu, selection, &mut self.targets(outputs)?, progress)
    }

    fn fill_targets(
        &self,
        backend: &Backend,
        selection: &Selection<'_>,
        targets: &mut [Target<'_>],
        progress: Progress<'_>,
    ) -> Result<()> {
        self.copy_into(selection, targets)?;
        match backend {
            Backend::Cpu => self.fill_on_cpu(selection, targets, progress),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => self.fill_on_cuda(device, selection, &mut targets[0], progress),
        }
    }

    fn targets<'v>(&self, outputs: Vec<Vec<TensorViewMut<'v>>>) -> Result<Vec<Target<'v>>> {
        outputs.into_iter().map(|views| self.target(views)).collect()
    }

    /// Checks the views of one target, and returns their memory by name.
    ///
    /// # Errors
    /// [`Error::Tensor`] if a view is missing, unknown, repeated or of another shape or dtype.
    fn target<'v>(&self, views: Vec<TensorViewMut<'v>>) -> Result<Target<'v>> {
        let mut target = Target::new();
        for view in views {
            let name = view.name;
            let dtype = view.dtype;
            let bytes = self.checked_bytes(view)?;
            if target.insert(name.to_owned(), (dtype, bytes)).is_some() {
                return Err(Error::tensor(name, "the name occurs twice: names must be unique"));
            }
        }
        match self.tensors.iter().find(|tensor| !target.contains_key(&tensor.name)) {
            Some(missing) => Err(Error::tensor(&missing.name, "no memory was given for it")),
            None => Ok(target),
        }
    }

    /// Checks that a view fits its tensor, and returns its memory.
    fn checked_bytes<'v>(&self, view: TensorViewMut<'v>) -> Result<&'v mut [u8]> {
        let TensorViewMut { name, dtype, shape, .. } = view;
        let Some(tensor) = self.find_kept(name) else {
            return Err(Error::tensor(name, "the run has no tensor of this name to fill it with"));
        };
        let is_dtype_ok = if tensor.averaged { is_averaged(dtype) } else { dtype == tensor.dtype };
        if shape != tensor.shape || !is_dtype_ok {
            let stored = format!("{} {:?}", tensor.dtype, tensor.shape);
            return Err(Error::tensor(name, format!("memory for {dtype} {shape:?} was given, but it is {stored}")));
        }
        let size = byte_size(name, dtype, shape)?;
        let bytes = view.into_host_bytes().ok_or_else(|| Error::on_device(name))?;
        if bytes.len() != size {
            return Err(Error::tensor(name, format!("{} bytes were given, but it takes {size}", bytes.len())));
        }
        Ok(bytes)
    }

    /// Fills the tensors that are not averaged.
    fn copy_into(&self, selection: &Selection<'_>, targets: &mut [Target<'_>]) -> Result<()> {
        for tensor in self.copied() {
            for (i, target) in targets.iter_mut().enumerate() {
                if let Some((_, bytes)) = target.get_mut(&tensor.name) {
                    bytes.copy_from_slice(&selection.copied(i, tensor)?.to_bytes());
                }
            }
        }
        Ok(())
    }

    /// Blends the averaged tensors of all targets on the CPU.
    fn fill_on_cpu(&self, selection: &Selection<'_>, targets: &mut [Target<'_>], progress: Progress<'_>) -> Result<()> {
        let mut slices: BTreeMap<&str, Slices<'_>> = BTreeMap::new();
        for (name, (dtype, bytes)) in targets.iter_mut().flatten() {
            slices.entry(name).or_default().push((*dtype, bytes));
        }
        let mut blends = Vec::with_capacity(self.tensors.len());
        for tensor in self.averaged().filter(|tensor| !selection.is_computed(&tensor.name)) {
            let slices = slices.remove(tensor.name.as_str()).unwrap_or_default();
            let dtype = common_dtype(tensor, &slices)?;
            blends.push((TensorBlend::new(selection.of(&tensor.name), tensor, dtype)?, slices));
        }
        fill(&mut blends, progress)?;
        drop(blends);
        selection.for_each_group(|group| {
            let mut blends = Vec::with_capacity(group.tensors.len());
            for tensor in group.tensors.iter().filter_map(|name| self.find_kept(name)) {
                let slices = slices.remove(tensor.name.as_str()).unwrap_or_default();
                blends.push((TensorBlend::new(&group.weighted, tensor, common_dtype(tensor, &slices)?)?, slices));
            }
            fill(&mut blends, progress)
        })
    }

    /// Blends the averaged tensors of a single target on the devices of the sources.
    #[cfg(feature = "cuda")]
    fn fill_on_cuda(
        &self,
        device: &std::sync::Arc<crate::compute::cuda::CudaDevice>,
        selection: &Selection<'_>,
        target: &mut Target<'_>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let mut places: BTreeMap<&str, (Dtype, &mut [u8])> = BTreeMap::new();
        places.extend(target.iter_mut().map(|(name, (dtype, bytes))| (name.as_str(), (*dtype, &mut **bytes))));
        let mut blends = Vec::with_capacity(places.len());
        let mut results = Vec::with_capacity(places.len());
        for tensor in self.averaged() {
            let Some((dtype, bytes)) = places.remove(tensor.name.as_str()) else { continue };
            blends.push(TensorBlend::new(selection.of(&tensor.name), tensor, dtype)?);
            results.push(bytes);
        }
        blend_by_device(device, &blends, results, progress)
    }
}

/// Memory of one tensor in each target.
type Slices<'s> = Vec<(Dtype, &'s mut [u8])>;

/// Blends tensors into the memory of all targets, a chunk of all targets at a time.
fn fill(blends: &mut [(TensorBlend<'_>, Slices<'_>)], progress: Progress<'_>) -> Result<()> {
    let pieces: Vec<_> = blends.iter_mut().flat_map(|(blend, slices)| pieces(&*blend, slices)).collect();
    let places: Vec<_> = pieces.iter().map(|piece| (piece.blend, piece.elements.clone())).collect();
    let prefetcher = Prefetcher::new();
    pieces.into_par_iter().enumerate().try_for_each(|(i, Piece { blend, elements, mut dst })| {
        let prefetch = || {
            if let Some((blend, elements)) = places.get(i + PREFETCH_DISTANCE) {
                blend.prefetch(elements.clone());
            }
        };
        let bytes = blend.bytes_read(elements.len());
        prefetcher.run(bytes, prefetch, || blend.blend_range(&mut dst, elements))?;
        progress.inspect(|progress| progress(bytes));
        Ok(())
    })
}

/// Returns the dtype of a tensor's memory, which all targets share.
///
/// # Errors
/// [`Error::Tensor`] if they differ.
fn common_dtype(tensor: &ModelTensor, slices: &[(Dtype, &mut [u8])]) -> Result<Dtype> {
    let first = slices.first().map_or(tensor.dtype, |(dtype, _)| *dtype);
    match slices.iter().find(|(dtype, _)| *dtype != first) {
        Some((other, _)) => {
            let reason = format!("one target wants {first} and another {other}: use one dtype for all targets");
            Err(Error::tensor(&tensor.name, reason))
        }
        None => Ok(first),
    }
}

/// Range of a tensor's elements, and the memory for it in every target.
struct Piece<'b, 'a, 's> {
    blend: &'b TensorBlend<'a>,
    elements: Range<usize>,
    dst: Vec<&'s mut [u8]>,
}

/// Cuts a tensor of all targets into pieces of one chunk.
fn pieces<'b, 'a, 's>(blend: &'b TensorBlend<'a>, slices: &'s mut [(Dtype, &mut [u8])]) -> Vec<Piece<'b, 'a, 's>> {
    let mut pieces: Vec<Piece<'b, 'a, 's>> = Vec::new();
    for (_, slice) in slices {
        for (i, chunk) in slice.chunks_mut(CHUNK * blend.size()).enumerate() {
            if i == pieces.len() {
                let start = i * CHUNK;
                let elements = start..start + chunk.len() / blend.size();
                pieces.push(Piece { blend, elements, dst: Vec::new() });
            }
            pieces[i].dst.push(chunk);
        }
    }
    pieces
}
