//! Where blends go: files, memory, a live model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;

use super::backend::{Backend, choose};
use super::blend::TensorBlend;
use super::files::{OutputFile, OutputFiles, Shards};
use super::source_set::{ModelTensor, Selection, SourceSet};
use super::streaming::Streaming;
use crate::compute::cpu;
use crate::device::Device;
use crate::error::{Difference, Error, Result};
use crate::planning::Plan;
use crate::planning::profile_json;
use crate::snapshot::{Meta, PROFILE, STEP};

use crate::fs::{parent_dir, remove_leftovers};
use crate::tensor::{Memory, ParametersMut, Tensor, TensorViewMut, Tensors, byte_size, is_averaged};

/// Targets of one pass: more would exceed the memory promised, and the files that a process may have open.
pub(crate) const MAX_TARGETS: usize = 256;

/// A plan and the file that its result goes to.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The solved target.
    pub plan: &'a Plan,
    /// The file; one of that name is replaced when the new one is whole.
    pub path: &'a Path,
}

/// How results are written.
#[derive(Clone, Copy, Default)]
pub struct WriteOptions<'a> {
    /// The dtype of averaged tensors; the model's own where it is not given.
    pub dtype: Option<Dtype>,
    /// Where they are blended, by default on the CPU; the bits are the same everywhere. [`Device::Auto`] tries the CPU and
    /// the first CUDA device on the beginning of the job, unless it is over before a device would be ready.
    pub device: Device,
    /// Called with the bytes of snapshots that were read since the last call, from any thread.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

impl WriteOptions<'_> {
    /// Checks that averages can be of the dtype.
    pub(crate) fn check(&self) -> Result<()> {
        match self.dtype.filter(|&dtype| !is_averaged(dtype)) {
            Some(dtype) => {
                let reason = format!("{dtype} is no dtype for averages: choose f32, bf16, f16 or f64");
                Err(Error::Setting { option: "dtype", reason })
            }
            None => Ok(()),
        }
    }
}

impl SourceSet<'_> {
    /// Blends a plan into memory of its own.
    pub(crate) fn load(&self, plan: &Plan) -> Result<Tensors> {
        self.load_selection(&self.select(&[plan])?)
    }

    /// Blends the only target of a selection into memory of its own.
    pub(crate) fn load_selection(&self, selection: &Selection<'_>) -> Result<Tensors> {
        let mut tensors = match Backend::asked(self.device(Device::Cpu))? {
            Backend::Cpu => self.load_cpu(selection)?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => self.load_on(&device, selection)?,
        };
        for (dropped, kept) in &self.tied {
            if let Some(tensor) = tensors.get(kept).cloned() {
                tensors.insert(dropped.clone(), tensor);
            }
        }
        Ok(tensors)
    }

    /// The device of the sources, where there is one; otherwise the one asked for.
    pub(super) fn device(&self, wanted: Device) -> Device {
        self.holders.iter().find_map(|(_, holder)| holder.device()).map_or(wanted, Device::Cuda)
    }

    fn load_cpu(&self, selection: &Selection<'_>) -> Result<Tensors> {
        let load = |tensor: &ModelTensor| {
            let mut bytes = cpu::zeros(byte_size(&tensor.name, tensor.dtype, &tensor.shape)?);
            if tensor.averaged {
                TensorBlend::new(selection, tensor, tensor.dtype)?.whole(&mut bytes)?;
            } else {
                bytes.copy_from_slice(copied(selection, 0, tensor)?);
            }
            Ok((tensor.name.clone(), Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes }))
        };
        Ok(self.tensors.par_iter().map(load).collect::<Result<Vec<_>>>()?.into_iter().collect())
    }

    /// Blends a plan into a live model, in the model's own dtypes; tensors that are not averaged stay as they are.
    ///
    /// In host memory everything that can fail is tried before the first byte is written. On a device that would take
    /// another pass over the bus: there the originals are kept until all is well.
    pub(crate) fn write_into(&self, plan: &Plan, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let selection = self.select(&[plan])?;
        match self.place_of(params)? {
            Backend::Cpu => {
                self.check_model(&selection, params, true)?;
                self.blend_into(&selection, params)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => {
                self.swap(plan, params, |_| false)?.keep();
                Ok(())
            }
        }
    }

    /// Where a model is blended into: on its own device, or on that of the sources.
    pub(super) fn place_of(&self, params: &(impl ParametersMut + ?Sized)) -> Result<Backend> {
        let mut device = Device::Cpu;
        params.with_tensors(&mut |views| {
            for view in views {
                let Memory::Cuda(memory) = view.memory else { continue };
                if cfg!(not(feature = "cuda")) {
                    return Err(Error::on_device(view.name));
                }
                device = Device::Cuda(memory.device);
            }
            Ok(())
        })?;
        Backend::asked(self.device(device))
    }

    /// Checks that a model has the averaged tensors of the run; with `sums`, that every sum of a single target fits, too.
    pub(super) fn check_model(
        &self,
        selection: &Selection<'_>,
        params: &(impl ParametersMut + ?Sized),
        sums: bool,
    ) -> Result<()> {
        params.with_tensors(&mut |views| {
            for view in views {
                if let Some(tensor) = self.averaged(view.name) {
                    check_target(tensor, view.dtype, view.shape)?;
                    let blend = TensorBlend::new(selection, tensor, view.dtype)?;
                    if sums {
                        blend.check(view.elements())?;
                    }
                }
            }
            self.check_complete(views.iter().map(|view| view.name).collect())
        })
    }

    /// Blends a single target into a model in host memory that was checked.
    pub(super) fn blend_into(
        &self,
        selection: &Selection<'_>,
        params: &mut (impl ParametersMut + ?Sized),
    ) -> Result<()> {
        params.for_each_mut(&mut |view: TensorViewMut<'_>| match self.averaged(view.name) {
            Some(tensor) => {
                let blend = TensorBlend::new(selection, tensor, view.dtype)?;
                let elsewhere = || Error::on_device(&tensor.name);
                blend.whole(view.into_host_bytes().ok_or_else(elsewhere)?)
            }
            None => Ok(()),
        })
    }

    /// The averaged tensor that a name stands for, tied names included.
    pub(super) fn averaged(&self, name: &str) -> Option<&ModelTensor> {
        self.find(name).filter(|tensor| tensor.averaged)
    }

    /// The tensor that a name stands for, tied names included.
    pub(super) fn find(&self, name: &str) -> Option<&ModelTensor> {
        let kept = self.tied.get(name).map_or(name, String::as_str);
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(kept)).ok()?;
        Some(&self.tensors[found])
    }

    fn check_complete(&self, given: std::collections::BTreeSet<&str>) -> Result<()> {
        match self.tensors.iter().find(|tensor| tensor.averaged && !given.contains(tensor.name.as_str())) {
            Some(missing) => {
                Err(Error::changed(&missing.name, Difference::new("the tensor", "present in the run", "missing")))
            }
            None => Ok(()),
        }
    }

    /// Blends several plans into files in one pass over the sources, and tells where.
    pub(crate) fn write(&self, outputs: &[Output<'_>], options: &WriteOptions<'_>) -> Result<Device> {
        check_distinct(outputs.iter().map(|output| output.path))?;
        options.check()?;
        if outputs.is_empty() {
            return Err(Error::NoTarget);
        }
        let shards = Shards::single(self, options.dtype)?;
        // Before any file is made.
        let mut device = Backend::asked(options.device)?.device();
        for outputs in outputs.chunks(MAX_TARGETS) {
            let plans: Vec<&Plan> = outputs.iter().map(|output| output.plan).collect();
            let head = |output: &Output<'_>| {
                vec![OutputFile { path: output.path.to_owned(), metadata: self.metadata(output.plan) }]
            };
            let heads: Vec<Vec<OutputFile>> = outputs.iter().map(head).collect();
            device = self.write_files(&self.select(&plans)?, &shards, &heads, options)?;
        }
        Ok(device)
    }

    /// Blends the targets of a selection in one pass, each into the files that its heads name, and tells where.
    pub(crate) fn write_files(
        &self,
        selection: &Selection<'_>,
        shards: &Shards,
        heads: &[Vec<OutputFile>],
        options: &WriteOptions<'_>,
    ) -> Result<Device> {
        let directories = heads.iter().flatten().map(|head| parent_dir(&head.path));
        directories.collect::<BTreeSet<_>>().into_iter().for_each(remove_leftovers);
        let files = heads.iter().map(|heads| shards.create(heads)).collect::<Result<Vec<_>>>()?;
        self.copy(selection, shards, &files)?;
        let streaming = Streaming::new(self, selection, shards, &files, options)?;
        let chosen = choose(&streaming, self.device(options.device))?;
        match &chosen {
            Backend::Cpu => streaming.run()?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(device) => streaming.run_on(device)?,
        }
        files.into_iter().try_for_each(OutputFiles::commit)?;
        Ok(chosen.device())
    }

    /// Copies the tensors that are not averaged.
    fn copy(&self, selection: &Selection<'_>, shards: &Shards, files: &[OutputFiles]) -> Result<()> {
        for spot in shards.spots().filter(|spot| !self.tensors[spot.tensor].averaged) {
            for (target, files) in files.iter().enumerate() {
                let bytes = copied(selection, target, &self.tensors[spot.tensor])?;
                files.write_block_at(spot.file, spot.range.start, bytes)?;
            }
        }
        Ok(())
    }

    fn metadata(&self, plan: &Plan) -> BTreeMap<String, String> {
        let mut strings = Meta { tied: self.tied.clone(), ..Meta::default() }.to_strings();
        strings.insert(PROFILE.into(), profile_json(&plan.profile));
        strings.insert(STEP.into(), plan.at.to_string());
        strings
    }
}

/// The newest elements of a tensor that is copied.
pub(super) fn copied<'a>(selection: &Selection<'a>, target: usize, tensor: &ModelTensor) -> Result<&'a [u8]> {
    let stored = selection.newest[target].stored(&tensor.name).and_then(|(_, elements)| elements.host());
    stored.ok_or_else(|| Error::tensor(&tensor.name, "the newest snapshot lacks it"))
}

fn check_target(tensor: &ModelTensor, dtype: Dtype, shape: &[usize]) -> Result<()> {
    if shape != tensor.shape {
        return Err(Error::changed(
            &tensor.name,
            Difference::new("its shape", format!("{:?} in the run", tensor.shape), format!("{shape:?}")),
        ));
    }
    if !is_averaged(dtype) {
        return Err(Error::changed(
            &tensor.name,
            Difference::new("its dtype", format!("{} in the run", tensor.dtype), dtype),
        ));
    }
    Ok(())
}

/// Checks that each target has a file or folder of its own.
pub(crate) fn check_distinct<'p>(paths: impl Iterator<Item = &'p Path>) -> Result<()> {
    let mut paths: Vec<&Path> = paths.collect();
    paths.sort_unstable();
    match paths.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Err(Error::unexpected(pair[0], "two targets are to be written to this one file: name them apart"))
        }
        None => Ok(()),
    }
}
