//! Reading a run on disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;

mod extended;
mod formed;
mod grouped;
mod like;
mod lineage;
mod parsed_snapshot;
mod saved_state;
mod sessions;
mod settings;
mod state;
#[cfg(test)]
mod tests;
mod verify;

pub use saved_state::SavedState;
pub(crate) use saved_state::{newest_state, saved_files};
pub(crate) use settings::Settings;
pub(crate) use state::{LiveState, STATE, StateDocument, check_snapshots, copy_name, high_name, low_name};
pub use verify::{VerifyReport, verify};

pub(crate) use extended::later_groups;
use extended::{model_tensors, used};
use parsed_snapshot::{ParsedSnapshot, common_history, remove_diverged};

use crate::device::Device;
use crate::error::{Error, Result, shown};
use crate::fs::{parent_dir, start_threads};
use crate::math::{Chain, Densities, History, Profile};
use crate::planning::{
    At, ErrorSource, IndexedSource, NoPrediction, Noise, Plan, SampledSource, SnapshotNoise, densities, log_warnings,
    solve, solve_later,
};
use crate::snapshot::{self, Snapshot, SnapshotId, beginning_of};
use crate::synthesis::{MAX_TARGETS, ModelTensor, Output, SwapGuard, WriteOptions};
use crate::tensor::{ParametersMut, TensorSpec, TensorViewMut, Tensors};

/// Snapshots of a run, mapped and checked against each other.
///
/// The files stay mapped, so a plan stays valid while a tracker drops old snapshots.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    snapshots: Vec<Snapshot>,
    /// Profile of each snapshot.
    profiles: Vec<Profile>,
    /// Chain of each snapshot.
    chains: Vec<Chain>,
    /// Updates of the newest snapshot, unless a snapshot has no history.
    history: Option<History>,
    /// Estimate from a sample of the elements, computed for the first plan.
    noise: OnceLock<Result<SnapshotNoise, NoPrediction>>,
    /// Process that opened the run. A forked child lacks its threads and would wait for them forever.
    process: u32,
}

/// Unmaps pages with all threads before the mappings are closed, one after the other.
///
/// A single thread would take a tenth to a third of the time of reading.
impl Drop for Run {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            self.snapshots.par_iter().for_each(Snapshot::unmap_pages);
        }
    }
}

impl Run {
    /// Opens all snapshots in a directory.
    ///
    /// # Errors
    /// [`Error::NoRun`], [`Error::Damaged`], [`Error::Unexpected`] or [`Error::Mismatch`], each naming the file;
    /// [`Error::Threads`] if the system cannot start the threads that compute.
    pub fn open(dir: impl AsRef<Path>) -> Result<Run> {
        start_threads()?;
        let snapshots = snapshot::open_all(dir.as_ref())?;
        let parsed: Vec<_> = snapshots.into_iter().map(ParsedSnapshot::new).collect::<Result<_>>()?;
        let run = Run::new(dir.as_ref(), parsed)?;
        sessions::check(&run.snapshots)?;
        Ok(run)
    }

    /// Opens the intact snapshots and returns the error of each of the others. Plans use the intact ones only.
    ///
    /// Reads every byte and compares it with its checksum. Calls `progress` with the bytes of each file.
    ///
    /// # Errors
    /// [`Error::NoRun`] if the directory has no snapshot; the first snapshot's error if none is intact.
    pub fn open_sound(dir: impl AsRef<Path>, progress: &mut dyn FnMut(u64)) -> Result<(Run, Vec<Error>)> {
        start_threads()?;
        let (snapshots, mut damaged) = snapshot::open_sound(dir.as_ref(), progress)?;
        let mut sound = Vec::with_capacity(snapshots.len());
        for snapshot in snapshots {
            match ParsedSnapshot::new(snapshot) {
                Ok(parsed) => sound.push(parsed),
                Err(error) => damaged.push(error),
            }
        }
        damaged.extend(remove_diverged(&mut sound));
        damaged.extend(sessions::remove_strays(&mut sound));
        if sound.is_empty() {
            return Err(damaged.swap_remove(0));
        }
        Ok((Run::new(dir.as_ref(), sound)?, damaged))
    }

    fn new(dir: &Path, parsed: Vec<ParsedSnapshot>) -> Result<Run> {
        let history = common_history(&parsed)?;
        let mut run = Run {
            dir: dir.to_owned(),
            snapshots: Vec::with_capacity(parsed.len()),
            profiles: Vec::with_capacity(parsed.len()),
            chains: Vec::with_capacity(parsed.len()),
            history,
            noise: OnceLock::new(),
            process: std::process::id(),
        };
        for ParsedSnapshot { snapshot, profile, chain, .. } in parsed {
            run.snapshots.push(snapshot);
            run.profiles.push(profile);
            run.chains.push(chain);
        }
        Ok(run)
    }

    /// Returns the directory of the run.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the snapshots, in order of profile and step.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// Returns the tracked profiles, by their index within the run.
    pub fn profiles(&self) -> BTreeMap<usize, &Profile> {
        self.snapshots.iter().map(|snapshot| snapshot.id.index).zip(&self.profiles).collect()
    }

    /// Returns the updates up to the newest snapshot, if the snapshots have a history.
    pub fn history(&self) -> Option<&History> {
        self.history.as_ref()
    }

    /// Solves for one target.
    ///
    /// # Errors
    /// [`Error::TargetBefore`] or [`Error::TargetAfter`] outside the snapshots' steps, and errors of the solve.
    pub fn plan(&self, profile: Profile, at: At) -> Result<Plan> {
        Ok(self.plans(&[profile], at)?.remove(0))
    }

    /// Solves for several targets at one time. The system is factored once.
    ///
    /// # Errors
    /// As [`Run::plan`].
    pub fn plans(&self, profiles: &[Profile], at: At) -> Result<Vec<Plan>> {
        self.plans_with(profiles, at, Noise::Off)
    }

    /// As [`Run::plans`], with regularisation against the rounding of the stored snapshots.
    ///
    /// # Errors
    /// As [`Run::plan`], and [`Error::Parameter`] for a `rho` that is negative, infinite or NaN.
    pub fn plans_with(&self, profiles: &[Profile], at: At, noise: Noise) -> Result<Vec<Plan>> {
        let sources = self.sources();
        let movement = self.stored_noise().map(|stored| stored as &dyn ErrorSource);
        let mut plans = solve(&sources, self.history.as_ref(), profiles, at, noise, movement)?;
        if let (Some(history), Some(at)) = (&self.history, plans.first().map(|plan| plan.at)) {
            solve_later(&mut plans, &self.later_groups(at), &sources, history, noise)?;
        }
        Ok(plans)
    }

    /// Returns the movement and rounding of the snapshots, estimated from a sample on the first call.
    ///
    /// # Errors
    /// [`NoPrediction`] if there are too few snapshots, or if they have no history.
    pub(super) fn stored_noise(&self) -> Result<&SnapshotNoise, NoPrediction> {
        let estimate = || {
            self.history.as_ref().ok_or(NoPrediction::NoHistory)?;
            let is_in_all = |tensor: &ModelTensor| beginning_of(self.extensions(), &tensor.name) == 0;
            let averaged = self.model_tensors().into_iter().filter(|tensor| tensor.averaged && is_in_all(tensor));
            let steps: Vec<u64> = self.snapshots.iter().map(|snapshot| snapshot.id.step).collect();
            SnapshotNoise::of(&steps, &self.sampled(), &averaged.map(ModelTensor::into_spec).collect::<Vec<_>>())
        };
        self.noise.get_or_init(estimate).as_ref().map_err(|why| *why)
    }

    /// Returns the snapshots as the sources of a sample, in the order of [`Run::sources`].
    pub(crate) fn sampled(&self) -> Vec<&dyn SampledSource> {
        self.snapshots.iter().map(|snapshot| snapshot as &dyn SampledSource).collect()
    }

    /// Returns the weights of a planned average and of its target over the training, one for each interval between
    /// updates.
    ///
    /// # Errors
    /// [`Error::OtherPlan`] for a plan of other snapshots, and errors of [`Densities::new`].
    pub fn densities(&self, plan: &Plan) -> Result<Densities> {
        densities(self.sources(), self.history(), plan)
    }

    /// Writes one planned average as a safetensors file, in the model's dtypes.
    ///
    /// # Errors
    /// As [`Run::write_all`].
    pub fn write(&self, plan: &Plan, path: impl AsRef<Path>) -> Result<()> {
        self.write_all(&[Output { plan, path: path.as_ref() }], &WriteOptions::default()).map(drop)
    }

    /// Writes several planned averages, up to 256 in one pass over the snapshots, and returns the device that blended
    /// them.
    ///
    /// Each file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Tensor`] for a result that the dtype cannot hold, [`Error::Unexpected`] for an output
    /// within the run's own directory, [`Error::Cuda`] if the requested device cannot be used, [`Error::Setting`] if it
    /// needs the feature `cuda`.
    pub fn write_all(&self, outputs: &[Output<'_>], options: &WriteOptions<'_>) -> Result<Device> {
        outputs.iter().try_for_each(|output| self.check_outside(output.path))?;
        log_warnings(&self.dir, outputs.iter().map(|output| output.plan));
        self.source_set_of(outputs.iter().map(|output| output.plan))?.write(outputs, options)
    }

    /// Blends one planned average into memory, in the model's dtypes. Tied tensors appear under each of their names.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a result that the dtype cannot hold.
    pub fn load(&self, plan: &Plan) -> Result<Tensors> {
        log_warnings(&self.dir, [plan]);
        self.source_set_of([plan])?.load(plan)
    }

    /// Blends several planned averages into the caller's memory, in one pass over the snapshots.
    ///
    /// `outputs` has one list of views for each plan: one view for each of [`Run::tensors`], in host memory. Averaged
    /// tensors may be of any floating-point dtype, the same for all plans; copied ones are of their own. `progress` is
    /// called from any thread, with the bytes of snapshots that were read since the last call.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a view that does not fit, or a result that its dtype cannot hold. The contents of the
    /// views are then unspecified.
    pub fn load_into(
        &self,
        plans: &[Plan],
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Option<&(dyn Fn(u64) + Sync)>,
    ) -> Result<()> {
        log_warnings(&self.dir, plans);
        self.source_set_of(plans)?.load_into(&plans.iter().collect::<Vec<_>>(), outputs, progress)
    }

    /// Returns the tensors of a synthesis at the newest step by name, in the model's dtypes.
    ///
    /// Of tied tensors, only the kept one is listed.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.model_tensors().into_iter().map(ModelTensor::into_spec).collect()
    }

    /// Returns the names of the tensors that are averaged. The others are copied.
    pub fn averaged(&self) -> Vec<String> {
        self.model_tensors().into_iter().filter(|tensor| tensor.averaged).map(|tensor| tensor.name).collect()
    }

    /// Returns the names of tied tensors, as `dropped name -> kept name`.
    pub fn tied(&self) -> &BTreeMap<String, String> {
        &self.newest().meta.tied
    }

    /// Puts one planned average into a live model, in the model's own dtypes, until the returned guard is dropped.
    ///
    /// The model becomes the result of a synthesis: tensors that are not averaged take their stored values. The
    /// originals are saved in host memory, those of tied tensors once. Tensors that the run does not have stay
    /// unchanged.
    ///
    /// ```
    /// use posthoc_ema::{At, PostHocEma, Profile, Run};
    ///
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let dir = dir.path().join("ema");
    /// # let mut weights = vec![("layer.weight", vec![0.0f32; 8])];
    /// # let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&weights)?;
    /// # for step in 0..100 {
    /// #     weights[0].1.iter_mut().for_each(|w| *w += step as f32);
    /// #     ema.update(&weights)?;
    /// # }
    /// # ema.flush()?;
    /// # let trained = weights.clone();
    /// let run = Run::open(&dir)?;
    /// for sigma_rel in [0.05, 0.1, 0.15] {
    ///     let plan = run.plan(Profile::sigma_rel(sigma_rel)?, At::Latest)?;
    ///     let averaged = run.swap_in(&plan, &mut weights)?;
    ///     println!("{sigma_rel}: {}", averaged[0].1[0]); // the evaluation
    /// } // here the weights are the trained ones again
    /// # assert_eq!(weights, trained);
    /// # Ok::<(), posthoc_ema::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Changed`] for a model with other tensors, [`Error::Tensor`] for a result that its dtype cannot
    /// hold, [`Error::Cuda`]. The model is then unchanged.
    pub fn swap_in<'p, P: ParametersMut + ?Sized>(&self, plan: &Plan, params: &'p mut P) -> Result<SwapGuard<'p, P>> {
        log_warnings(&self.dir, [plan]);
        self.source_set_of([plan])?.swap_in(plan, params)
    }

    /// Returns the bytes of snapshots that a synthesis of these plans reads, once for up to 256 targets.
    pub fn bytes_to_read(&self, plans: &[Plan]) -> u64 {
        plans.chunks(MAX_TARGETS).map(|plans| self.bytes_of_pass(plans)).sum()
    }

    /// Iterates over the snapshots that have a weight in any of the plans.
    fn used_by(&self, plans: &[Plan]) -> impl Iterator<Item = &Snapshot> {
        let used = used(plans.iter().flat_map(|plan| plan.all_weights()));
        self.snapshots.iter().filter(move |snapshot| used.contains(&snapshot.id))
    }

    /// Reads every byte of every snapshot and compares its checksum.
    ///
    /// # Errors
    /// [`Error::Damaged`] for the first file that does not match.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<()> {
        self.snapshots.iter().try_for_each(Snapshot::verify_index)?;
        for file in self.snapshots.iter().flat_map(Snapshot::files) {
            file.verify()?;
            progress(file.len());
        }
        Ok(())
    }

    /// Reads every byte of the snapshots that these plans blend and compares its checksum.
    ///
    /// A synthesis does not, because it would take twice as long. Opening a run compares the checksums of headers.
    ///
    /// # Errors
    /// As [`Run::verify`].
    pub fn verify_used(&self, plans: &[Plan], progress: &mut dyn FnMut(u64)) -> Result<()> {
        for file in self.used_by(plans).flat_map(Snapshot::files) {
            file.verify()?;
            progress(file.len());
        }
        Ok(())
    }

    /// Checks that an output is not in the directory of the run.
    fn check_outside(&self, path: &Path) -> Result<()> {
        if matches!((parent_dir(path).canonicalize(), self.dir.canonicalize()), (Ok(a), Ok(b)) if a == b) {
            return Err(Error::unexpected(path, "a run's directory holds nothing but its snapshots: write elsewhere"));
        }
        Ok(())
    }

    /// Returns the snapshots as the sources of a solve.
    pub(crate) fn sources(&self) -> Vec<IndexedSource> {
        let mut sources = Vec::with_capacity(self.snapshots.len());
        for (snapshot, chain) in self.snapshots.iter().zip(&self.chains) {
            let SnapshotId { index, step } = snapshot.id;
            let extensions = snapshot.meta.extensions.len();
            let label = shown(snapshot.path());
            sources.push(IndexedSource { index, step, chain: chain.clone(), extensions, label });
        }
        sources
    }

    /// Returns the tensors of a synthesis at the newest step.
    fn model_tensors(&self) -> Vec<ModelTensor> {
        model_tensors(self.newest())
    }
}
