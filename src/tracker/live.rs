//! Synthesis during training, from the snapshots and the live averages, so that it reaches the newest update.

use std::collections::BTreeMap;

use super::PostHocEma;
use super::live_source::{LiveGuard, LiveSource};
use super::regions::RegionSource;
use super::registry::Entry;
use crate::error::{Error, Result};
use crate::math::{Chain, Profile};
use crate::planning::{
    At, ErrorSource, IndexedSource, NoPrediction, Noise, Plan, SampledSource, SnapshotNoise, Weight, log_warnings,
    solve, solve_later,
};
use crate::run::{Run, later_groups};
use crate::snapshot::beginning_of;
use crate::synthesis::{ModelTensor, SourceSet, SwapGuard, TensorSource};
use crate::tensor::{ParametersMut, TensorSpec, TensorViewMut, Tensors};

impl PostHocEma {
    /// Solves a target at the newest update, from the snapshots on disk and the live averages, and predicts its error.
    ///
    /// # Errors
    /// [`Error::NoUpdate`] before the first update, [`Error::NonFiniteParameter`] once for an update on a device that
    /// was left out, and the errors of [`Run::open`] and [`Run::plan`].
    pub fn plan(&self, profile: Profile) -> Result<Plan> {
        Ok(self.plans(&[profile])?.remove(0))
    }

    /// Solves several targets at the newest update, and predicts the error of each average if it were made now.
    ///
    /// The system is factored once. Snapshots and live averages are read for a sample of their elements.
    ///
    /// # Errors
    /// Those of [`PostHocEma::plan`].
    pub fn plans(&self, profiles: &[Profile]) -> Result<Vec<Plan>> {
        let (run, step) = self.open_snapshots()?;
        let sources = self.sources(run.as_ref(), step);
        let noise = self.live_noise(run.as_ref(), &sources, step)?;
        let movement = noise.as_ref().map(|noise| noise as &dyn ErrorSource);
        self.solve_sources(&sources, profiles, movement.map_err(|why| *why))
    }

    /// Logs the warnings of targets at the newest update, as a synthesis does.
    ///
    /// # Errors
    /// Those of [`PostHocEma::plan`].
    pub fn log_warnings(&self, profiles: &[Profile]) -> Result<()> {
        let (run, step) = self.open_snapshots()?;
        log_warnings(&self.dir, &self.solve_unpredicted(&self.sources(run.as_ref(), step), profiles)?);
        Ok(())
    }

    /// Returns the average of `profile` at the newest update, in the model's shapes and dtypes.
    ///
    /// # Errors
    /// Those of [`PostHocEma::plan`], [`Error::Tensor`] for a result that its dtype cannot hold, and [`Error::Cuda`].
    pub fn synthesize(&self, profile: Profile) -> Result<Tensors> {
        self.with_plan(&profile, |sources, plan| sources.load(plan))
    }

    /// Writes the averages of several profiles at the newest update into the caller's memory, like [`Run::load_into`].
    ///
    /// # Errors
    /// Those of [`PostHocEma::plan`] and [`Run::load_into`], and [`Error::Cuda`].
    pub fn load_into(
        &self,
        profiles: &[Profile],
        outputs: Vec<Vec<TensorViewMut<'_>>>,
        progress: Option<&(dyn Fn(u64) + Sync)>,
    ) -> Result<Vec<Plan>> {
        let solve = |sources: &[IndexedSource]| self.solve_unpredicted(sources, profiles);
        self.with_sources(solve, |sources, plans| {
            log_warnings(&self.dir, &plans);
            sources.load_into(&plans.iter().collect::<Vec<_>>(), outputs, progress)?;
            Ok(plans)
        })
    }

    /// Writes the running average of profile number `index` into the caller's memory, like [`Run::load_into`].
    ///
    /// # Errors
    /// [`Error::Setting`] for an index out of range, [`Error::NoUpdate`] before the first update, [`Error::Cuda`], and
    /// those of [`Run::load_into`].
    pub fn load_tracked_into(&self, index: usize, output: Vec<TensorViewMut<'_>>) -> Result<()> {
        let Some(profile) = self.settings.profiles.get(index) else {
            let count = self.settings.profiles.len();
            let reason = format!("index {index} is out of range: {count} profiles are tracked");
            return Err(Error::Setting { option: "profiles", reason });
        };
        let at = self.newest_step()?;
        let plan = Plan {
            profile: profile.clone(),
            at,
            relative_error: 0.0,
            noise_gain: 1.0,
            condition: 1.0,
            sum: 1.0,
            rho: 0.0,
            predicted: None,
            no_prediction: Some(NoPrediction::NotAsked),
            event: None,
            worst_group: None,
            held_back: None,
            shortfall: None,
            weights: vec![Weight { index, step: at, weight: 1.0 }],
            later: Vec::new(),
            groups: BTreeMap::new(),
        };
        self.with_sources(|_| Ok(vec![plan]), |sources, plans| sources.load_into(&[&plans[0]], vec![output], None))
    }

    /// Returns the tensors of a synthesis in the order of their names, with the model's dtypes.
    ///
    /// Of tied tensors, only the one that is kept is listed.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.model_tensors().into_iter().map(ModelTensor::into_spec).collect()
    }

    /// Returns the names of the averaged tensors; the others are copied.
    pub fn averaged(&self) -> Vec<String> {
        self.registry.averaged().iter().map(|entry| entry.name.clone()).collect()
    }

    /// Returns the names of tensors that share another tensor's elements, each with that tensor's name.
    pub fn tied(&self) -> &BTreeMap<String, String> {
        self.registry.tied()
    }

    /// Replaces the model's weights by their average at the newest update, to train on from there (Switch EMA).
    ///
    /// Tensors that are not averaged stay as they are. The running averages do not change.
    ///
    /// # Errors
    /// Those of [`PostHocEma::synthesize`], and [`Error::Changed`] for a model with other tensors, which then does not
    /// change.
    pub fn switch_to(&self, profile: Profile, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        self.with_plan(&profile, |sources, plan| sources.write_into(plan, params))
    }

    /// Temporarily swaps the average at the newest update into a model, for evaluation.
    ///
    /// The model then equals the result of [`PostHocEma::synthesize`]: tensors that are not averaged take their values
    /// of the newest update. Dropping the guard restores the original weights. They are kept in host memory until then,
    /// those of tied tensors once.
    ///
    /// ```
    /// use posthoc_ema::{PostHocEma, Profile};
    ///
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let dir = dir.path().join("ema");
    /// let mut weights = vec![("layer.weight", vec![0.0f32; 8])];
    /// let mut ema = PostHocEma::options(&dir).create(&weights)?;
    /// for step in 0..100 {
    ///     weights[0].1.iter_mut().for_each(|w| *w += step as f32); // the optimiser's step
    ///     ema.update(&weights)?;
    /// }
    /// let trained = weights.clone();
    /// let averaged = ema.swap_in(Profile::sigma_rel(0.15)?, &mut weights)?;
    /// assert!(averaged[0].1[0] < trained[0].1[0]); // the evaluation; an error in it restores the weights too
    /// averaged.restore()?;
    /// assert_eq!(weights, trained);
    /// # Ok::<(), posthoc_ema::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`PostHocEma::switch_to`]; the model then does not change.
    pub fn swap_in<'p, P: ParametersMut + ?Sized>(
        &self,
        profile: Profile,
        params: &'p mut P,
    ) -> Result<SwapGuard<'p, P>> {
        self.with_plan(&profile, |sources, plan| sources.swap_in(plan, params))
    }

    /// Returns the step of the newest update that was done.
    fn newest_step(&self) -> Result<u64> {
        self.settle_replays()?;
        self.non_finite.check_shared()?;
        self.non_finite.take_error()?;
        self.history().last().ok_or(Error::NoUpdate)
    }

    /// Opens the snapshots, if there are any, and returns them with the step of the live averages.
    fn open_snapshots(&self) -> Result<(Option<Run>, u64)> {
        let step = self.newest_step()?;
        // Without waiting, the result would depend on how many snapshots are written already.
        self.engine.wait_idle()?;
        self.await_snapshots(step)?;
        let run = if crate::snapshot::list(&self.dir)?.is_empty() { None } else { Some(Run::open(&self.dir)?) };
        Ok((run, step))
    }

    /// Returns the snapshots before `step` and the live averages, in the order of profile and step.
    fn sources(&self, run: Option<&Run>, step: u64) -> Vec<IndexedSource> {
        let mut sources = run.map(Run::sources).unwrap_or_default();
        // A snapshot of the newest step duplicates the live average, perhaps in a narrower dtype.
        sources.retain(|source| source.step < step);
        if self.shard.is_some() {
            // Other processes may have removed their parts of the others.
            sources.retain(|source| self.kept.contains(&source.step));
        }
        sources.extend((0..self.settings.profiles.len()).map(|index| self.live_source(index, step)));
        sources.sort_by_key(|source| (source.index, source.step));
        sources
    }

    /// Measures the movement and rounding of the sources, on a sample of their elements.
    ///
    /// The inner result has the reason if there is too little to predict from.
    fn live_noise(
        &self,
        run: Option<&Run>,
        sources: &[IndexedSource],
        step: u64,
    ) -> Result<Result<SnapshotNoise, NoPrediction>> {
        if self.shard.is_some() {
            return Ok(Err(NoPrediction::Parts));
        }
        let guard = self.live_values()?;
        let live = self.live_sources(&guard);
        let stored: Vec<(IndexedSource, &dyn SampledSource)> =
            run.map(|run| run.sources().into_iter().zip(run.sampled()).collect()).unwrap_or_default();
        let sampled = |source: &IndexedSource| -> &dyn SampledSource {
            let found = stored.iter().find(|(other, _)| (other.index, other.step) == (source.index, source.step));
            found.filter(|_| source.step < step).map_or(&live[source.index], |(_, snapshot)| *snapshot)
        };
        let is_in_all = |entry: &&Entry| beginning_of(&self.extensions, &entry.name) == 0;
        let averaged = self.registry.averaged().iter().filter(is_in_all);
        let averaged: Vec<TensorSpec> = averaged.map(|entry| model_tensor(entry, true).into_spec()).collect();
        let steps: Vec<u64> = sources.iter().map(|source| source.step).collect();
        Ok(SnapshotNoise::of(&steps, &sources.iter().map(sampled).collect::<Vec<_>>(), &averaged))
    }

    /// Returns the live averages of all profiles.
    fn live_sources<'a>(&'a self, guard: &'a LiveGuard<'_>) -> Vec<LiveSource<'a>> {
        let of_profile = |index| LiveSource { registry: &self.registry, values: guard.values(), index };
        (0..self.settings.profiles.len()).map(of_profile).collect()
    }

    /// Solves targets for a synthesis, which needs no prediction.
    fn solve_unpredicted(&self, sources: &[IndexedSource], profiles: &[Profile]) -> Result<Vec<Plan>> {
        self.solve_sources(sources, profiles, Err(NoPrediction::NotAsked))
    }

    fn solve_sources(
        &self,
        sources: &[IndexedSource],
        profiles: &[Profile],
        movement: Result<&dyn ErrorSource, NoPrediction>,
    ) -> Result<Vec<Plan>> {
        let mut plans = solve(sources, Some(self.history()), profiles, At::Latest, Noise::Off, movement)?;
        let groups = later_groups(&self.extensions, self.averaged().into_iter());
        solve_later(&mut plans, &groups, sources, self.history(), Noise::Off)?;
        Ok(plans)
    }

    /// Solves one target and calls `act` with all sources and the plan.
    fn with_plan<R>(&self, profile: &Profile, act: impl FnOnce(&SourceSet<'_>, &Plan) -> Result<R>) -> Result<R> {
        let solve = |sources: &[IndexedSource]| self.solve_unpredicted(sources, std::slice::from_ref(profile));
        self.with_sources(solve, |sources, plans| {
            log_warnings(&self.dir, &plans);
            act(sources, &plans[0])
        })
    }

    /// Calls `act` with all sources and the plans that `solve` makes of them.
    fn with_sources<R>(
        &self,
        solve: impl FnOnce(&[IndexedSource]) -> Result<Vec<Plan>>,
        act: impl FnOnce(&SourceSet<'_>, Vec<Plan>) -> Result<R>,
    ) -> Result<R> {
        let (run, step) = self.open_snapshots()?;
        let sources = self.sources(run.as_ref(), step);
        let plans = solve(&sources)?;
        let guard = self.live_values()?;
        let live = self.live_sources(&guard);
        let snapshots = run.as_ref().map(Run::tensor_sources).unwrap_or_default();
        let cut = |snapshot| RegionSource::new(snapshot, &self.registry);
        let parts: Vec<RegionSource<'_>> = match (&run, self.shard) {
            (Some(run), Some(_)) => run.snapshots().iter().map(cut).collect(),
            _ => Vec::new(),
        };
        let mut held: Vec<(IndexedSource, &dyn TensorSource)> = Vec::with_capacity(sources.len());
        for source in sources {
            let of_source = |(other, _): &(IndexedSource, _)| (other.index, other.step) == (source.index, source.step);
            let snapshot = snapshots.iter().position(of_source).filter(|_| source.step < step);
            let holder: &dyn TensorSource = match snapshot {
                Some(place) => parts.get(place).map_or(snapshots[place].1, |part| part),
                None => &live[source.index],
            };
            held.push((source, holder));
        }
        act(&SourceSet { tensors: self.model_tensors(), tied: self.registry.tied().clone(), sources: held }, plans)
    }

    /// Returns a guard of the live averages, in the memory that holds them.
    fn live_values(&self) -> Result<LiveGuard<'_>> {
        #[cfg(feature = "cuda")]
        if let Some(averages) = self.engine.on_device() {
            averages.wait()?;
            return Ok(LiveGuard::Device(averages, averages.reader()?.copies()?));
        }
        #[cfg(feature = "cuda")]
        if let Some(averages) = self.engine.spread() {
            averages.wait()?;
            return Ok(LiveGuard::Spread(averages, averages.copies()?));
        }
        self.engine.values().map(LiveGuard::Host)
    }

    fn live_source(&self, index: usize, step: u64) -> IndexedSource {
        let profile = &self.settings.profiles[index];
        let label = format!("the live average of {profile}");
        let extensions = self.extensions.len();
        IndexedSource { index, step, chain: Chain::Tracked(profile.clone()), extensions, label }
    }

    fn model_tensors(&self) -> Vec<ModelTensor> {
        let averaged = self.registry.averaged().iter().map(|entry| model_tensor(entry, true));
        let copied = self.registry.copied().iter().map(|entry| model_tensor(entry, false));
        let mut tensors: Vec<ModelTensor> = averaged.chain(copied).collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }
}

fn model_tensor(entry: &Entry, averaged: bool) -> ModelTensor {
    ModelTensor { name: entry.name.clone(), dtype: entry.dtype, shape: entry.shape.clone(), averaged }
}
