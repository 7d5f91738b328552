//! Averages of checkpoints that any training has stored, where nothing was tracked.

mod adapter;
mod companions;
#[cfg(feature = "pytorch")]
mod convert;
mod find;
mod index;
mod json;
mod mapped;
mod model;
mod natural;
mod plan;
mod steps;
mod write;

use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::math::Profile;
use crate::planning::At;
use crate::tensor::TensorSpec;

use crate::synthesis::{ModelTensor, SourceSet, WriteOptions};
use crate::tensor::{TensorViewMut, Tensors};

use mapped::Mapped;
use model::{Held, Model};

pub use plan::{CheckpointWeight, Merge};

/// The checkpoints of one training, opened and checked against each other, in order of their steps.
///
/// ```no_run
/// use posthoc_ema::{At, Checkpoints, Profile, Shape, Window};
///
/// let checkpoints = Checkpoints::open(&["out/checkpoints"], None)?;
/// let target = Profile::lr_decay(Shape::OneMinusSqrt, Window::Fraction(0.2))?;
/// let merge = checkpoints.plan(target, At::Latest)?;
/// println!("{:.1} of {} checkpoints count", merge.effective_checkpoints, merge.weights.len());
/// checkpoints.write(&[(&merge, "out/merged".as_ref())], &Default::default())?;
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
///
/// A checkpoint stands for the time since the one before it, and each target gives it the profile's mass on that interval. A
/// [`Merge`] tells what this approximation costs. Sums are taken in f64 and rounded once. Floating-point tensors are averaged;
/// all others, and the `alpha` beside the factors of low-rank adapters, which must be the same in all as must be the scales in
/// their `adapter_config.json`, are copied from the newest checkpoint at
/// or before the target's time. The factors `A` and `B` of an adapter are averaged each for itself, as all tensors are; that is
/// not the average of their products `B A`, which would be of a higher rank and no adapter of the same size. Within one
/// training, where factors move together, it is what running averages of adapters do, too.
///
/// The files are mapped: nobody may change them in place meanwhile.
#[derive(Debug)]
pub struct Checkpoints {
    /// In order of their steps.
    models: Vec<Model>,
    steps: Vec<u64>,
    /// Folders that the user named, which nothing is written into.
    named: Vec<PathBuf>,
}

impl Checkpoints {
    /// Opens checkpoints and checks that they are of one model.
    ///
    /// Each path is a safetensors file, an index of shards (`*.index.json`), a folder that holds either, as Hugging Face's tools
    /// write them, or, with the feature `import`, a file of PyTorch (`.pt`, `.pth`, `.bin`, `.ckpt`), of which no code is ever
    /// run. A single folder that is no checkpoint itself is a folder of checkpoints, which come in order of their names, where `epoch2` is before `epoch10`.
    ///
    /// `steps` gives their steps in the order of the paths. Without it, they are what all metadata tell (`step`,
    /// `global_step`, `steps`, `ss_steps`), or the `trainer_state.json` of all folders, or names: the number after the
    /// same word in all, `step`, `iter` or `checkpoint`, or the last one where they are alike but for it, or that after `epoch`.
    ///
    /// # Errors
    /// [`Error::NoSource`](crate::Error::NoSource), [`Error::Io`](crate::Error::Io), and
    /// [`Error::Damaged`](crate::Error::Damaged) for what cannot be read; [`Error::Mismatch`](crate::Error::Mismatch) for
    /// checkpoints of different models; [`Error::Unexpected`](crate::Error::Unexpected) for a step that cannot be read, is 0 or
    /// occurs twice, for low-rank adapters of different scales, snapshots of a run, models of which no tensor can be averaged,
    /// and entries of PyTorch's files that are objects; [`Error::Setting`](crate::Error::Setting) for another number of steps.
    pub fn open<P: AsRef<Path>>(paths: &[P], steps: Option<&[u64]>) -> Result<Checkpoints> {
        let found = find::find(paths)?;
        let models: Vec<Result<Model>> = found.into_par_iter().map(Model::open).collect();
        let models: Vec<Model> = models.into_iter().collect::<Result<_>>()?;
        let steps = steps::steps(&models, steps)?;
        let mut both: Vec<(u64, Model)> = steps.into_iter().zip(models).collect();
        both.sort_by_key(|(step, _)| *step);
        let (steps, models): (Vec<u64>, Vec<Model>) = both.into_iter().unzip();
        models[1..].iter().try_for_each(|model| model.check_sibling(&models[0]))?;
        models[0].check_averaged()?;
        let named = paths.iter().map(AsRef::as_ref).filter(|path| path.is_dir()).map(Path::to_owned).collect();
        Ok(Checkpoints { models, steps, named })
    }

    /// The step of each checkpoint, in order.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// The file or folder of each checkpoint, in the order of their steps.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.models.iter().map(|model| model.input.path.as_path())
    }

    /// Whether averages are folders: where the newest checkpoint is one.
    pub fn are_folders(&self) -> bool {
        self.models.last().is_some_and(|newest| newest.input.folder.is_some())
    }

    /// The tensors of an average, in order of their names.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.pool().tensors.into_iter().map(ModelTensor::into_spec).collect()
    }

    /// The names of those that are averaged; the others are copied.
    pub fn averaged(&self) -> Vec<String> {
        self.pool().tensors.into_iter().filter(|tensor| tensor.averaged).map(|tensor| tensor.name).collect()
    }

    /// The weights of a target, and what it costs that there are no more checkpoints.
    ///
    /// # Errors
    /// [`Error::TargetBefore`](crate::Error::TargetBefore) or [`Error::TargetAfter`](crate::Error::TargetAfter) outside the
    /// checkpoints' steps, [`Error::Parameter`](crate::Error::Parameter) for a window that is longer than the target's time.
    pub fn plan(&self, profile: Profile, at: At) -> Result<Merge> {
        plan::merge(self, profile, at)
    }

    /// As [`Checkpoints::plan`], for several targets at one time.
    ///
    /// # Errors
    /// As [`Checkpoints::plan`].
    pub fn plans(&self, profiles: &[Profile], at: At) -> Result<Vec<Merge>> {
        profiles.iter().map(|profile| self.plan(profile.clone(), at)).collect()
    }

    /// The bytes that [`Checkpoints::write`] reads for these targets, where one pass suffices: files of PyTorch are read
    /// twice, once to be mapped.
    pub fn bytes_to_read(&self, merges: &[Merge]) -> u64 {
        mapped::bytes_to_read(self, merges)
    }

    /// Writes averages, each whole or not at all, in one pass over the checkpoints, and tells where they were blended.
    ///
    /// Directories above them are made where they are missing. Where the newest checkpoint is a folder, so is each average, unless its path ends in `.safetensors`: with the same
    /// shards and their index, and the configuration, tokenizer and other small files that belong to the model, but for the
    /// state of the training. Otherwise it is one safetensors file. Metadata are carried over, but for checksums of the data;
    /// `profile` and `step` say what the average is. With `options.dtype`, `config.json` tells of it.
    ///
    /// # Errors
    /// [`Error::Unexpected`](crate::Error::Unexpected) for a path that is or lies in an input, or a folder that is not empty;
    /// [`Error::Tensor`](crate::Error::Tensor) for a sum that the dtype cannot hold, and those of
    /// [`Run::write_all`](crate::Run::write_all).
    pub fn write(&self, outputs: &[(&Merge, &Path)], options: &WriteOptions<'_>) -> Result<Device> {
        write::write(self, outputs, options)
    }

    /// Blends one average into memory.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) for a sum that the dtype cannot hold, and [`Error::Io`](crate::Error::Io).
    pub fn load(&self, merge: &Merge) -> Result<Tensors> {
        let row = plan::row(self, merge)?;
        let mapped = Mapped::new(self, &[&row], None, &|_| ())?;
        self.pool().load_selection(&mapped.selection(&[&row])).map_err(|error| mapped.blame(error))
    }

    /// Blends averages into the caller's memory in one pass, a list of views for each, as
    /// [`Run::load_into`](crate::Run::load_into) does.
    ///
    /// # Errors
    /// Those of [`Run::load_into`](crate::Run::load_into), and [`Error::Io`](crate::Error::Io).
    pub fn load_into(
        &self,
        merges: &[Merge],
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Option<&(dyn Fn(u64) + Sync)>,
    ) -> Result<()> {
        let rows: Vec<plan::Row> = merges.iter().map(|merge| plan::row(self, merge)).collect::<Result<_>>()?;
        let rows: Vec<&plan::Row> = rows.iter().collect();
        let mapped = Mapped::new(self, &rows, None, progress.unwrap_or(&|_| ()))?;
        let loaded = self.pool().load_selection_into(&mapped.selection(&rows), outputs, progress);
        loaded.map_err(|error| mapped.blame(error))
    }

    /// What is blended; the holders are in a selection.
    fn pool(&self) -> SourceSet<'static> {
        let first = &self.models[0];
        let tensor = |(name, held): (&String, &Held)| ModelTensor {
            name: name.clone(),
            dtype: held.dtype,
            shape: held.shape.clone(),
            averaged: first.is_averaged(name),
        };
        SourceSet { tensors: first.tensors.iter().map(tensor).collect(), tied: Default::default(), holders: Vec::new() }
    }
}

#[cfg(all(test, feature = "pytorch"))]
mod tests;
