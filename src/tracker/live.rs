//! Synthesis during training: the live averages are sources beside the snapshots, so it reaches the newest update.

use safetensors::Dtype;

use super::PostHocEma;
use super::table::Table;
use super::values::Values;
use crate::error::{Error, Result};
use crate::math::{Chain, Profile};
use crate::synthesis::{At, Holder, Plan, Pool, PoolTensor, Run, Source, SwappedIn, solve};
use crate::tensor::{ParametersMut, Tensors};

/// The live averages of one profile.
struct Live<'a> {
    table: &'a Table,
    values: Values<'a>,
    index: usize,
}

impl Holder for Live<'_> {
    fn stored(&self, name: &str) -> Option<(Dtype, &[u8])> {
        Some(match self.table.find(name)? {
            Ok(i) => {
                let values = &self.values.averages[self.index].high[self.table.layout().place(i)];
                (Dtype::F32, bytemuck::cast_slice(values))
            }
            Err(i) => (self.table.copied()[i].dtype, &self.values.copies[i]),
        })
    }
}

impl PostHocEma {
    /// Solves a target at the newest update, over the snapshots on disk and the live averages.
    ///
    /// # Errors
    /// [`Error::Nothing`] before the first update, and those of [`Run::open`] and the solve.
    pub fn plan(&self, profile: Profile) -> Result<Plan> {
        self.with_pool(&profile, |_, plan| Ok(plan.clone()))
    }

    /// The average of `profile` at the newest update, in the model's dtypes.
    ///
    /// # Errors
    /// As [`PostHocEma::plan`], and [`Error::Tensor`] for a result that its dtype cannot hold.
    pub fn synthesize(&self, profile: Profile) -> Result<Tensors> {
        self.with_pool(&profile, |pool, plan| pool.load(plan))
    }

    /// Switch EMA: the model becomes its average at the newest update, in place, and training goes on from there.
    ///
    /// Tensors that are not averaged stay as they are. The running averages do not change.
    ///
    /// # Errors
    /// As [`PostHocEma::synthesize`], and [`Error::Changed`] for a model with other tensors; the model is then as it was.
    pub fn switch_to(&self, profile: Profile, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        self.with_pool(&profile, |pool, plan| pool.write_into(plan, params))
    }

    /// The model becomes its average at the newest update until what is returned is dropped: for evaluation.
    ///
    /// The original of every averaged tensor is kept in host memory meanwhile; tied tensors take theirs once. Tensors
    /// that are not averaged stay as they are.
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
    /// As [`PostHocEma::switch_to`], and [`Error::Tensor`] for a tensor on a device; the model is then as it was.
    pub fn swap_in<'p, P: ParametersMut + ?Sized>(
        &self,
        profile: Profile,
        params: &'p mut P,
    ) -> Result<SwappedIn<'p, P>> {
        self.with_pool(&profile, |pool, plan| pool.swap_in(plan, params))
    }

    /// Opens the snapshots, adds the live averages, solves, and hands both on.
    fn with_pool<R>(&self, profile: &Profile, act: impl FnOnce(&Pool<'_>, &Plan) -> Result<R>) -> Result<R> {
        let Some(step) = self.history.last() else {
            return Err(Error::Nothing("there was no update yet: train until the first one is due".into()));
        };
        let run = if crate::snapshot::list(&self.dir)?.is_empty() { None } else { Some(Run::open(&self.dir)?) };
        let held = self.engine.values()?;
        let live = |index| Live { table: &self.table, values: held.values(), index };
        let live: Vec<Live<'_>> = (0..self.settings.profiles.len()).map(live).collect();
        let mut pool = Pool { tensors: self.pool_tensors(), tied: self.table.tied().clone(), holders: Vec::new() };
        if let Some(run) = &run {
            pool.holders.extend(run.pool().holders);
        }
        // A snapshot of the newest step is the live average again, in fewer digits where its dtype is narrower.
        pool.holders.retain(|(source, _)| source.step < step);
        pool.holders.extend(live.iter().map(|live| (self.live_source(live.index, step), live as &dyn Holder)));
        pool.holders.sort_by_key(|(source, _)| (source.index, source.step));
        let sources: Vec<Source> = pool.holders.iter().map(|(source, _)| source.clone()).collect();
        let plan = solve(&sources, Some(&self.history), std::slice::from_ref(profile), At::Latest, 0.0)?.remove(0);
        act(&pool, &plan)
    }

    fn live_source(&self, index: usize, step: u64) -> Source {
        let profile = &self.settings.profiles[index];
        let label = format!("the live average of {profile}");
        Source { index, step, chain: Chain::Tracked(profile.clone()), label }
    }

    fn pool_tensors(&self) -> Vec<PoolTensor> {
        let tensor = |entry: &super::table::Entry, averaged| PoolTensor {
            name: entry.name.clone(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            averaged,
        };
        let averaged = self.table.averaged().iter().map(|entry| tensor(entry, true));
        let mut tensors: Vec<PoolTensor> =
            averaged.chain(self.table.copied().iter().map(|e| tensor(e, false))).collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }
}
