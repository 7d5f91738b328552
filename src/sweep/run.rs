//! A sweep over a run: averages as files, evaluated one after the other.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::candidates::{Candidate, Files};
use super::observer::Observer;
use super::record::{Record, SweepKey};
use super::search::{Goal, Outcome, Sweep, TrialMetrics};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::math::Profile;
use crate::planning::{At, Noise, Plan};

use crate::synthesis::{Output, WriteOptions};

use crate::run::Run;
use crate::tensor::Dtype;

/// How many averages are synthesized in one pass, where nothing else is asked for: as many as one pass can have.
const BATCH: usize = 256;

/// The steps of the refinement, where nothing else is asked for: they narrow an evenly spaced list about twentyfold.
const REFINE: usize = 6;

/// What a sweep does.
#[derive(Clone)]
pub struct SweepOptions<'a> {
    /// The directory of the sweep, outside of the run's; made where it is missing. A sweep that was begun there goes on.
    pub dir: &'a Path,
    /// What to evaluate first, in any mixture of families.
    pub targets: &'a [Profile],
    /// The time of the targets.
    pub at: At,
    /// A name for the evaluation: a directory holds the scores of one.
    pub evaluation: &'a str,
    /// Which scores are better.
    pub goal: Goal,
    /// The golden-section steps around the best.
    pub refine: usize,
    /// The averages that are synthesized in one pass, and lie on the disk at a time.
    pub batch: usize,
    /// What is done about the rounding of the snapshots.
    pub noise: Noise,
    /// The dtype of averaged tensors; the model's own where it is not given.
    pub dtype: Option<Dtype>,
    /// Where they are blended.
    pub device: Device,
    /// Every average is kept, in the directory's folder `candidates`; otherwise only the best.
    pub keep_all: bool,
    /// Told how it goes on.
    pub observer: &'a dyn Observer,
}

impl<'a> SweepOptions<'a> {
    /// Looks for the smallest score among some targets, at the newest snapshot, with 6 steps of refinement.
    pub fn new(dir: &'a Path, targets: &'a [Profile]) -> SweepOptions<'a> {
        SweepOptions {
            dir,
            targets,
            at: At::Latest,
            evaluation: "",
            goal: Goal::Minimize,
            refine: REFINE,
            batch: BATCH,
            noise: Noise::Off,
            dtype: None,
            device: Device::Cpu,
            keep_all: false,
            observer: &(),
        }
    }
}

/// What came of a sweep.
#[derive(Clone, Debug)]
pub struct SweepResult {
    /// All trials, those of earlier calls among them; [`Sweep::best`] is the best one.
    pub sweep: Sweep,
    /// The best average as a safetensors file; none where no evaluation succeeded.
    pub best: Option<PathBuf>,
    /// The time of the targets.
    pub at: u64,
    /// How many were evaluated in this call.
    pub evaluated: usize,
}

impl Run {
    /// Synthesizes many lengths, calls `evaluate` for each, goes on around the best one, and keeps that as
    /// `best.safetensors`.
    ///
    /// `evaluate` is given one average at a time, as a file that any reader of safetensors loads, and returns its score. An
    /// error, NaN or an infinity is recorded, and the others go on. After each evaluation `sweep.json` in the directory is
    /// written anew: the same call goes on where an earlier one was interrupted, and tries again what failed.
    ///
    /// ```
    /// use posthoc_ema::{PostHocEma, Profile, Run, SweepOptions};
    ///
    /// # let temp = tempfile::tempdir().unwrap();
    /// # let dir = temp.path().join("ema");
    /// # let mut weights = vec![("layer.weight", vec![0.0f32; 8])];
    /// # let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&weights)?;
    /// # for step in 0..1000 {
    /// #     weights[0].1.iter_mut().for_each(|w| *w = (step as f32).sqrt());
    /// #     ema.update(&weights)?;
    /// # }
    /// # ema.flush()?;
    /// # let sweep_dir = temp.path().join("sweep");
    /// let run = Run::open(&dir)?;
    /// let targets = [0.05, 0.1, 0.15, 0.2, 0.25].map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap());
    /// let swept = run.sweep(&SweepOptions::new(&sweep_dir, &targets), |candidate| {
    ///     let bytes = std::fs::read(candidate.path)?; // the evaluation
    ///     let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    ///     let weight = tensors.tensor("layer.weight").unwrap().data()[..4].try_into().unwrap();
    ///     std::io::Result::Ok((f64::from(f32::from_le_bytes(weight)) - 29.0).abs())
    /// })?;
    /// println!("{}: {:?}", swept.sweep.best().unwrap().profile, swept.best);
    /// # assert_eq!(swept.evaluated, 11);
    /// # Ok::<(), posthoc_ema::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Run::plans`] and [`Run::write_all`], [`Error::Unexpected`] for a directory of another sweep or within the
    /// run's own, [`Error::Io`]. What was recorded until then stays.
    pub fn sweep<E: Display>(
        &self,
        options: &SweepOptions<'_>,
        evaluate: impl FnMut(&Candidate<'_>) -> Result<f64, E>,
    ) -> Result<SweepResult> {
        let mut sweep = Sweep::new(options.targets, options.goal, options.refine)?;
        // A target that cannot be had is told before anything is done.
        let plans = self.plans_with(sweep.targets(), options.at, options.noise)?;
        let at = plans.first().map_or(0, |plan| plan.at);
        self.check_apart(options.dir)?;
        let question = SweepKey::new(self, at, options);
        let (record, trials) = Record::open(options.dir, question)?;
        let files = Files::new(record.dir(), options.keep_all, &trials)?;
        sweep.restore(trials);
        let mut sweeping = Sweeping { run: self, options, record, files, sweep, at, evaluate, evaluated: 0 };
        sweeping.search()?;
        let best = sweeping.ensure_best()?;
        Ok(SweepResult { sweep: sweeping.sweep, best, at, evaluated: sweeping.evaluated })
    }

    /// A sweep writes neither into a run's directory, which is flat and holds nothing else, nor below it.
    fn check_apart(&self, dir: &Path) -> Result<()> {
        let absolute = std::path::absolute(dir).map_err(Error::io("read", dir))?;
        let there = absolute.ancestors().find_map(|ancestor| ancestor.canonicalize().ok());
        let within = matches!((there, self.dir().canonicalize()), (Some(dir), Ok(run)) if dir.starts_with(&run));
        if within {
            return Err(Error::unexpected(dir, "a run's directory holds nothing but its snapshots: sweep elsewhere"));
        }
        Ok(())
    }
}

/// A sweep under way.
struct Sweeping<'a, F> {
    run: &'a Run,
    options: &'a SweepOptions<'a>,
    record: Record,
    files: Files,
    sweep: Sweep,
    at: u64,
    evaluate: F,
    evaluated: usize,
}

impl<F, E: Display> Sweeping<'_, F>
where
    F: FnMut(&Candidate<'_>) -> Result<f64, E>,
{
    fn search(&mut self) -> Result<()> {
        loop {
            let profiles = self.sweep.next(self.options.batch);
            if profiles.is_empty() {
                return Ok(());
            }
            let plans = self.run.plans_with(&profiles, At::Step(self.at), self.options.noise)?;
            let paths = self.files.candidates(&plans, &self.sweep);
            let failed = self.synthesize(&plans, &paths)?;
            for ((plan, path), failed) in plans.iter().zip(&paths).zip(failed) {
                match failed {
                    None => self.evaluate(plan, path)?,
                    Some(error) => self.record(plan, Outcome::Error(error.to_string()), 0.0)?,
                }
            }
        }
    }

    /// Writes all candidates in one pass; an average that its dtype cannot hold fails alone.
    fn synthesize(&self, plans: &[Plan], paths: &[PathBuf]) -> Result<Vec<Option<Error>>> {
        self.options.observer.synthesizing(plans.len(), self.run.bytes_to_read(plans));
        let outputs: Vec<Output<'_>> = plans.iter().zip(paths).map(|(plan, path)| Output { plan, path }).collect();
        match self.write(&outputs) {
            Ok(()) => return Ok(plans.iter().map(|_| None).collect()),
            Err(Error::Tensor { .. }) => {}
            Err(other) => return Err(other),
        }
        let alone = |output: &Output<'_>| match self.write(std::slice::from_ref(output)) {
            Ok(()) => Ok(None),
            Err(error @ Error::Tensor { .. }) => Ok(Some(error)),
            Err(other) => Err(other),
        };
        outputs.iter().map(alone).collect()
    }

    fn write(&self, outputs: &[Output<'_>]) -> Result<()> {
        let SweepOptions { dtype, device, observer, .. } = *self.options;
        let progress = |bytes| observer.read(bytes);
        self.run.write_all(outputs, &WriteOptions { dtype, device, progress: Some(&progress) }).map(drop)
    }

    /// Evaluates a candidate, records what came of it, and keeps its file if it is the best.
    fn evaluate(&mut self, plan: &Plan, path: &Path) -> Result<()> {
        self.options.observer.evaluating(&plan.profile, &self.sweep);
        let start = Instant::now();
        let outcome = match (self.evaluate)(&Candidate { plan, path }) {
            Ok(score) => Outcome::Score(score),
            Err(error) => Outcome::Error(error.to_string()),
        };
        self.evaluated += 1;
        self.record(plan, outcome, start.elapsed().as_secs_f64())?;
        if self.sweep.best().is_some_and(|best| best.profile == plan.profile) {
            self.files.keep(path)?;
        }
        self.files.discard(path)
    }

    fn record(&mut self, plan: &Plan, outcome: Outcome, seconds: f64) -> Result<()> {
        self.sweep.record(plan.profile.clone(), outcome, TrialMetrics::of(plan, seconds));
        self.record.save(&self.sweep)?;
        let trial = self.sweep.trial(&plan.profile);
        trial.into_iter().for_each(|trial| self.options.observer.evaluated(trial, &self.sweep));
        Ok(())
    }

    /// The file of the best, synthesized once more where it is missing or another's: it was removed, or the sweep was
    /// killed before it was kept.
    fn ensure_best(&self) -> Result<Option<PathBuf>> {
        let Some(best) = self.sweep.best() else { return Ok(None) };
        let path = self.files.best();
        if !self.files.holds(&best.profile) {
            let best = std::slice::from_ref(&best.profile);
            let plans = self.run.plans_with(best, At::Step(self.at), self.options.noise)?;
            self.options.observer.synthesizing(1, self.run.bytes_to_read(&plans));
            // Among the candidates, where it is found again if this is cut short.
            let candidates = self.files.candidates(&plans, &self.sweep);
            self.write(&[Output { plan: &plans[0], path: &candidates[0] }])?;
            self.files.keep(&candidates[0])?;
        }
        Ok(Some(path))
    }
}
