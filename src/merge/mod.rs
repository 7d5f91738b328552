//! Averages of checkpoints from any training, in which nothing was tracked.

mod mapped;
mod plan;
mod products;
mod write;

use std::path::{Path, PathBuf};

use crate::checkpoint::{CheckpointModel, CheckpointOptions, OpenedCheckpoints, open_all};
use crate::device::Device;
use crate::error::Result;
use crate::math::Profile;
use crate::output::{OutputForm, PartOutcome};
use crate::planning::At;
use crate::synthesis::{ModelTensor, OutputPart, SourceSet, WriteOptions};
use crate::tensor::{TensorSpec, TensorViewMut, Tensors};

use mapped::MappedModels;
use plan::MergeRow;
use products::Products;

pub use plan::{CheckpointWeight, Merge};
pub use products::ProductErrors;

/// Checkpoints of one training, opened and checked against each other, in order of their steps.
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
/// A checkpoint stands for the time since the one before it. Each target gives it the profile's mass on that
/// interval; a [`Merge`] reports the error of this approximation. Sums are taken in f64 and rounded once.
///
/// Floating-point tensors are averaged. All others are copied from the newest checkpoint at or before the target's
/// time. So is the `alpha` beside the factors of a low-rank adapter. It must be the same in all checkpoints, as must
/// the scales in their `adapter_config.json`.
///
/// The factors `A` and `B` of an adapter are averaged separately, like all tensors. That is not the average of their
/// products `B A`, which would have a higher rank than any adapter of the same size. Running averages of adapters do
/// the same, and within one training the factors move together. With
/// [`AdapterProduct::Svd`](crate::AdapterProduct::Svd) the products are averaged.
///
/// The files are mapped: they must not be changed in place while they are open.
#[derive(Debug)]
pub struct Checkpoints {
    /// In order of their steps.
    models: Vec<CheckpointModel>,
    steps: Vec<u64>,
    /// Folders that the user named. Nothing is written into them.
    named: Vec<PathBuf>,
    /// True if files that are copied along may be links to anywhere.
    follow_links: bool,
    notes: Vec<String>,
    /// Averages of the products of adapters, if these are asked for.
    products: Option<Products>,
}

impl Checkpoints {
    /// Opens checkpoints and checks that they are of one model.
    ///
    /// Each path is a safetensors file, an index of shards (`*.index.json`) or a folder that holds either, as Hugging
    /// Face's tools write them. With the feature `pytorch`, it may also be a PyTorch file (`.pt`, `.pth`, `.bin`,
    /// `.ckpt`) or a folder of `torch.distributed.checkpoint`, of `HuggingFaceStorageWriter`'s shards or of DeepSpeed;
    /// no code in it is ever run. A single folder that is not a checkpoint itself is a folder of checkpoints, in order
    /// of their names, where `epoch2` is before `epoch10`.
    ///
    /// `steps` gives the steps in the order of the paths. By default they come from the first of these that has the
    /// step of every checkpoint:
    ///
    /// 1. the metadata: `step`, `global_step`, `steps` or `ss_steps`,
    /// 2. the `trainer_state.json` in the folders,
    /// 3. the names: the number after the same word in all (`step`, `iter` or `checkpoint`), or the last number if the
    ///    names differ in nothing else, or the number after `epoch`.
    ///
    /// # Errors
    /// - [`Error::NoSource`](crate::Error::NoSource), [`Error::Io`](crate::Error::Io) and
    ///   [`Error::Damaged`](crate::Error::Damaged) for checkpoints that cannot be read.
    /// - [`Error::Mismatch`](crate::Error::Mismatch) for checkpoints of different models.
    /// - [`Error::Unexpected`](crate::Error::Unexpected) for a step that cannot be found, is 0 or occurs twice, for
    ///   low-rank adapters of different scales, models of different configuration, snapshots of a run, models without a
    ///   tensor that can be averaged, quantized weights, several models in one file, and entries of a model that are
    ///   not tensors.
    /// - [`Error::Setting`](crate::Error::Setting) for another number of steps than of checkpoints.
    /// - [`Error::Threads`](crate::Error::Threads).
    pub fn open<P: AsRef<Path>>(paths: &[P], steps: Option<&[u64]>) -> Result<Checkpoints> {
        let steps = steps.map(<[u64]>::to_vec);
        Checkpoints::open_with(paths, &CheckpointOptions { steps, ..Default::default() })
    }

    /// Opens checkpoints as [`Checkpoints::open`] does, with options.
    ///
    /// Names of tensors that differ only in what wrappers of a model put before them, such as `_orig_mod.`, are the
    /// same.
    ///
    /// # Errors
    /// As [`Checkpoints::open`], and [`Error::Setting`](crate::Error::Setting) for a pattern that is not a glob or
    /// matches nothing.
    pub fn open_with<P: AsRef<Path>>(paths: &[P], options: &CheckpointOptions) -> Result<Checkpoints> {
        let OpenedCheckpoints { models, steps, notes, adapters } = open_all(paths, options)?;
        let named = paths.iter().map(AsRef::as_ref).filter(|path| path.is_dir()).map(Path::to_owned).collect();
        Ok(Checkpoints { models, steps, named, follow_links: false, notes, products: adapters.map(Products::new) })
    }

    /// Returns what a user may want to know of how the checkpoints were read: the entry that was taken for the model,
    /// other weights beside it, names that were changed, and tensors that were left out.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Copies configuration, tokenizer and other small files even if they are links that lead out of the checkpoint's
    /// folder. By default such a link is an error of [`Checkpoints::write`].
    ///
    /// Links within the folder are always followed. So are those of Hugging Face's cache, from a folder in `snapshots`
    /// to the `blobs` of the same model.
    pub fn follow_links(mut self, follow: bool) -> Checkpoints {
        self.follow_links = follow;
        self
    }

    /// Returns the step of each checkpoint, in order.
    pub fn steps(&self) -> &[u64] {
        &self.steps
    }

    /// Returns the file or folder of each checkpoint, in the order of their steps.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.models.iter().map(|model| model.found.path.as_path())
    }

    /// Returns true if averages are folders, because the newest checkpoint is one.
    pub fn are_folders(&self) -> bool {
        self.models.last().is_some_and(|newest| newest.found.folder.is_some())
    }

    /// Returns the tensors of an average, in order of their names.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.source_set().tensors.into_iter().map(ModelTensor::into_spec).collect()
    }

    /// Returns the names of the tensors that are averaged; all others are copied.
    pub fn averaged(&self) -> Vec<String> {
        let tensors = self.source_set().tensors.into_iter();
        tensors.filter(|tensor| tensor.averaged).map(|tensor| tensor.name).collect()
    }

    /// Weighs the checkpoints for a target.
    ///
    /// # Errors
    /// [`Error::TargetBefore`](crate::Error::TargetBefore) or [`Error::TargetAfter`](crate::Error::TargetAfter)
    /// outside the checkpoints' steps, [`Error::Parameter`](crate::Error::Parameter) for a window longer than the
    /// target's time.
    pub fn plan(&self, profile: Profile, at: At) -> Result<Merge> {
        plan::plan(self, profile, at)
    }

    /// Weighs the checkpoints for several targets at one time.
    ///
    /// # Errors
    /// As [`Checkpoints::plan`].
    pub fn plans(&self, profiles: &[Profile], at: At) -> Result<Vec<Merge>> {
        profiles.iter().map(|profile| self.plan(profile.clone(), at)).collect()
    }

    /// Returns the bytes that [`Checkpoints::write`] reads for these targets in one pass.
    pub fn bytes_to_read(&self, merges: &[Merge]) -> u64 {
        mapped::bytes_to_read(self, merges)
    }

    /// Writes averages in one pass over the checkpoints, each whole or not at all. Returns the device that blended
    /// them.
    ///
    /// Missing directories are created. If the newest checkpoint is a folder, so is each average, unless its path
    /// ends in `.safetensors`. Such a folder has the same shards and index, and the configuration, tokenizer and
    /// all other files of the model, but not the state of the training. With `options.dtype`, its `config.json` has
    /// the new dtype. A copied file keeps its permissions, less those that the umask takes.
    ///
    /// The metadata of the newest checkpoint are kept, except checksums of the data. `profile` and `step` describe the
    /// average.
    ///
    /// # Errors
    /// [`Error::Unexpected`](crate::Error::Unexpected) for a path that is or is in an input, a folder that is not
    /// empty, or a file to be copied that is a link out of its folder (see [`Checkpoints::follow_links`]);
    /// [`Error::Tensor`](crate::Error::Tensor) for a sum that the dtype cannot hold; and those of
    /// [`Run::write_all`](crate::Run::write_all).
    pub fn write(&self, outputs: &[(&Merge, &Path)], options: &WriteOptions<'_>) -> Result<Device> {
        self.write_as(outputs, &OutputForm::default(), options)
    }

    /// Writes averages as [`Checkpoints::write`] does, in a form: like the folder of a model, in shards, or under other
    /// names.
    ///
    /// # Errors
    /// As [`Checkpoints::write`] and [`Checkpoints::check_form`].
    pub fn write_as(
        &self,
        outputs: &[(&Merge, &Path)],
        form: &OutputForm,
        options: &WriteOptions<'_>,
    ) -> Result<Device> {
        write::write(self, outputs, form, options)
    }

    /// Writes one part of averages, as [`Run::write_part`](crate::Run::write_part) does.
    ///
    /// Averages of the products of adapters ([`AdapterProduct::Svd`](crate::AdapterProduct::Svd)) are computed by each
    /// part as a whole.
    ///
    /// # Errors
    /// As [`Checkpoints::write_as`], and [`Error::Unexpected`](crate::Error::Unexpected) for parts of other
    /// checkpoints, targets or options, or of another number of parts.
    pub fn write_part(
        &self,
        outputs: &[(&Merge, &Path)],
        form: &OutputForm,
        options: &WriteOptions<'_>,
        part: OutputPart,
    ) -> Result<PartOutcome> {
        write::write_part(self, outputs, form, options, part)
    }

    /// Checks that averages fit a form, and returns what a user may want to know of it: names that were changed, and
    /// tied tensors that are not written.
    ///
    /// # Errors
    /// [`Error::Unexpected`](crate::Error::Unexpected) with all tensors that the form's folder has and the average
    /// lacks, with all that the folder lacks, and with all of another shape; [`Error::Setting`](crate::Error::Setting)
    /// for rules by which two tensors get one name, and for rules and patterns that match nothing.
    pub fn check_form(&self, merges: &[Merge], form: &OutputForm) -> Result<Vec<String>> {
        write::notes(self, merges, form)
    }

    /// Blends one average into memory.
    ///
    /// # Errors
    /// [`Error::Tensor`](crate::Error::Tensor) for a sum that the dtype cannot hold, and
    /// [`Error::Io`](crate::Error::Io).
    pub fn load(&self, merge: &Merge) -> Result<Tensors> {
        let row = MergeRow::new(self, merge)?;
        let rows = [&row];
        let mapped = MappedModels::new(self, &rows, &|_| ());
        self.source_set().load_selection(&mapped.selection(&rows)).map_err(|error| mapped.blame(error))
    }

    /// Blends averages into the caller's memory in one pass, as [`Run::load_into`](crate::Run::load_into) does.
    ///
    /// `outputs` has a list of views for each merge. `progress` is called with the bytes read since the last call.
    ///
    /// # Errors
    /// Those of [`Run::load_into`](crate::Run::load_into), and [`Error::Io`](crate::Error::Io).
    pub fn load_into(
        &self,
        merges: &[Merge],
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Option<&(dyn Fn(u64) + Sync)>,
    ) -> Result<()> {
        let rows: Vec<MergeRow> = merges.iter().map(|merge| MergeRow::new(self, merge)).collect::<Result<_>>()?;
        let rows: Vec<&MergeRow> = rows.iter().collect();
        let mapped = MappedModels::new(self, &rows, progress.unwrap_or(&|_| ()));
        let loaded = self.source_set().load_selection_into(&mapped.selection(&rows), outputs, progress);
        loaded.map_err(|error| mapped.blame(error))
    }

    /// Returns the errors of averages of adapters, if their products are averaged
    /// ([`AdapterProduct::Svd`](crate::AdapterProduct::Svd)).
    ///
    /// The products are computed if they have not been written or loaded yet.
    ///
    /// # Errors
    /// [`Error::OtherPlan`](crate::Error::OtherPlan) for a merge of other checkpoints,
    /// [`Error::Unexpected`](crate::Error::Unexpected) for factors that are not finite, and
    /// [`Error::Io`](crate::Error::Io).
    pub fn product_errors(&self, merge: &Merge) -> Result<Option<ProductErrors>> {
        let Some(products) = &self.products else { return Ok(None) };
        let row = MergeRow::new(self, merge)?;
        if products.errors(&row).is_none() {
            MappedModels::new(self, &[&row], &|_| ()).compute_products()?;
        }
        Ok(products.errors(&row))
    }

    /// Returns the tensors of an average; the checkpoints that hold them are in a selection.
    fn source_set(&self) -> SourceSet<'static> {
        let first = &self.models[0];
        let mut tensors = Vec::with_capacity(first.tensors.len());
        for (name, entry) in &first.tensors {
            tensors.push(ModelTensor {
                name: name.clone(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                averaged: first.is_averaged(name),
            });
        }
        SourceSet { tensors, tied: Default::default(), sources: Vec::new() }
    }
}

#[cfg(all(test, feature = "pytorch"))]
mod tests;
