//! Blends of several plans into tensors of the caller's, in one pass over the sources.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;
use safetensors::Dtype;

use super::backend::Backend;
use super::blend::TensorBlend;
#[cfg(feature = "cuda")]
use super::on_device::into_host;
use super::output::{MAX_TARGETS, copied};
use super::prefetch::Prefetcher;
use super::source_set::{ModelTensor, Selection, SourceSet};
use crate::compute::cpu::CHUNK;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::planning::Plan;
use crate::tensor::{TensorViewMut, byte_size, is_averaged};

/// Told the bytes of sources that were read since the last call, from any thread.
type Progress<'a> = Option<&'a (dyn Fn(u64) + Sync)>;

/// The memory of one target: dtype and elements of each tensor, by name.
type Target<'a> = BTreeMap<String, (Dtype, &'a mut [u8])>;

impl SourceSet<'_> {
    /// Blends each plan into its list of views: every tensor once, tied names under the kept one only.
    pub(crate) fn load_into(
        &self,
        plans: &[&Plan],
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Progress<'_>,
    ) -> Result<()> {
        if plans.len() != outputs.len() {
            let (found, expected) = (outputs.len(), plans.len());
            return Err(Error::Count { items: "lists of views", found, owners: "targets", expected });
        }
        let mut targets = self.targets(outputs)?;
        let device = Backend::asked(self.device(Device::Cpu))?;
        let each = if matches!(device, Backend::Cpu) { MAX_TARGETS } else { 1 };
        for (plans, targets) in plans.chunks(each).zip(targets.chunks_mut(each)) {
            self.fill_targets(&device, &self.select(plans)?, targets, progress)?;
        }
        Ok(())
    }

    /// Blends each target of a selection, all of host memory, into its list of views.
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
        device: &Backend,
        selection: &Selection<'_>,
        targets: &mut [Target<'_>],
        progress: Progress<'_>,
    ) -> Result<()> {
        self.copy_into(selection, targets)?;
        match device {
            Backend::Cpu => self.fill(selection, targets, progress),
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => self.fill_by(device, selection, &mut targets[0], progress),
        }
    }

    fn targets<'v>(&self, outputs: Vec<Vec<TensorViewMut<'v>>>) -> Result<Vec<Target<'v>>> {
        outputs.into_iter().map(|views| self.target(views)).collect()
    }

    /// Checks the views of one target.
    fn target<'v>(&self, views: Vec<TensorViewMut<'v>>) -> Result<Target<'v>> {
        let mut target = Target::new();
        for view in views {
            let (name, dtype) = (view.name, view.dtype);
            let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name));
            let Ok(found) = found else {
                return Err(Error::tensor(name, "the run has no tensor of this name to fill it with"));
            };
            let tensor = &self.tensors[found];
            let fits = if tensor.averaged { is_averaged(dtype) } else { dtype == tensor.dtype };
            if view.shape != tensor.shape || !fits {
                let (shape, own, is) = (view.shape, &tensor.shape, tensor.dtype);
                return Err(Error::tensor(name, format!("memory for {dtype} {shape:?} was lent, it is {is} {own:?}")));
            }
            let size = byte_size(name, dtype, view.shape)?;
            let bytes = view.into_host_bytes().ok_or_else(|| Error::on_device(name))?;
            if bytes.len() != size {
                return Err(Error::tensor(name, format!("{} bytes were lent, it takes {size}", bytes.len())));
            }
            if target.insert(name.to_owned(), (dtype, bytes)).is_some() {
                return Err(Error::tensor(name, "the name occurs twice: names must be unique"));
            }
        }
        match self.tensors.iter().find(|tensor| !target.contains_key(&tensor.name)) {
            Some(missing) => Err(Error::tensor(&missing.name, "no memory was lent for it")),
            None => Ok(target),
        }
    }

    /// Fills the tensors that are not averaged.
    fn copy_into(&self, selection: &Selection<'_>, targets: &mut [Target<'_>]) -> Result<()> {
        for tensor in self.tensors.iter().filter(|tensor| !tensor.averaged) {
            for (i, target) in targets.iter_mut().enumerate() {
                if let Some((_, bytes)) = target.get_mut(&tensor.name) {
                    bytes.copy_from_slice(copied(selection, i, tensor)?);
                }
            }
        }
        Ok(())
    }

    /// Blends on the CPU, a chunk of all targets at a time.
    fn fill(&self, selection: &Selection<'_>, targets: &mut [Target<'_>], progress: Progress<'_>) -> Result<()> {
        let mut slices: BTreeMap<&str, Vec<(Dtype, &mut [u8])>> = BTreeMap::new();
        for (name, (dtype, bytes)) in targets.iter_mut().flatten() {
            slices.entry(name).or_default().push((*dtype, bytes));
        }
        let mut blends = Vec::with_capacity(self.tensors.len());
        for tensor in self.tensors.iter().filter(|tensor| tensor.averaged) {
            let slices = slices.remove(tensor.name.as_str()).unwrap_or_default();
            blends.push((TensorBlend::new(selection, tensor, common_dtype(tensor, &slices)?)?, slices));
        }
        let chunks: Vec<_> = blends.iter_mut().flat_map(|(blend, slices)| chunks(&*blend, slices)).collect();
        let places: Vec<_> = chunks.iter().map(|(blend, elements, _)| (*blend, elements.clone())).collect();
        let ahead = Prefetcher::new();
        chunks.into_par_iter().enumerate().try_for_each(|(i, (blend, elements, mut dst))| {
            let ask =
                || places.get(i + AHEAD).into_iter().for_each(|(blend, elements)| blend.ask_for(elements.clone()));
            let bytes = blend.bytes_read(elements.len());
            ahead.around(bytes, ask, || blend.stretch(&mut dst, elements))?;
            progress.inspect(|progress| progress(bytes));
            Ok(())
        })
    }

    /// Blends a single target by way of the device where sources lie.
    #[cfg(feature = "cuda")]
    fn fill_by(
        &self,
        device: &std::sync::Arc<crate::compute::cuda::CudaDevice>,
        selection: &Selection<'_>,
        target: &mut Target<'_>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let mut blender = crate::compute::cuda::Blender::new(device)?;
        for tensor in self.tensors.iter().filter(|tensor| tensor.averaged) {
            let Some((dtype, bytes)) = target.get_mut(&tensor.name) else { continue };
            let blend = TensorBlend::new(selection, tensor, *dtype)?;
            into_host(&mut blender, &blend, bytes)?;
            progress.inspect(|progress| progress(blend.bytes_read(blend.elements())));
        }
        blender.flush()
    }
}

/// The dtype in which all targets want a tensor.
fn common_dtype(tensor: &ModelTensor, slices: &[(Dtype, &mut [u8])]) -> Result<Dtype> {
    let first = slices.first().map_or(tensor.dtype, |(dtype, _)| *dtype);
    match slices.iter().find(|(dtype, _)| *dtype != first) {
        Some((other, _)) => {
            let reason = format!("{first} is wanted of one target and {other} of another: ask for one dtype in a pass");
            Err(Error::tensor(&tensor.name, reason))
        }
        None => Ok(first),
    }
}

/// How many pieces ahead of one another is asked for.
const AHEAD: usize = 4;

/// A piece of a tensor of all targets: its blend, its elements, and one slice for each.
type Piece<'b, 'a, 's> = (&'b TensorBlend<'a>, Range<usize>, Vec<&'s mut [u8]>);

/// Cuts a tensor of all targets into pieces.
fn chunks<'b, 'a, 's>(blend: &'b TensorBlend<'a>, slices: &'s mut [(Dtype, &mut [u8])]) -> Vec<Piece<'b, 'a, 's>> {
    let mut pieces: Vec<Piece<'b, 'a, 's>> = Vec::new();
    for (_, slice) in slices {
        for (i, chunk) in slice.chunks_mut(CHUNK * blend.size()).enumerate() {
            if i == pieces.len() {
                let start = i * CHUNK;
                pieces.push((blend, start..start + chunk.len() / blend.size(), Vec::new()));
            }
            pieces[i].2.push(chunk);
        }
    }
    pieces
}
