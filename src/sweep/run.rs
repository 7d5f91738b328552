//! Sweep over a run: averages are written to files and evaluated.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use super::candidates::{Candidate, SweepDir, WITH};
use super::evaluator::{BatchProgress, Evaluator, Parallel, Serial, Task, TaskEvent};
use super::joint::JointSearch;
use super::options::{SweepOptions, SweepResult};
use super::record::{Record, SweepKey};
use super::scores::Scores;
use super::search::Sweep;
use super::second::SecondRun;
use super::trial::{Trial, TrialMetrics};
use crate::error::{Error, Result};
use crate::math::Profile;
use crate::output::check_inputs;
use crate::planning::{At, Plan, log_warnings};
use crate::run::Run;
use crate::synthesis::Output;

impl Run {
    /// Synthesizes and evaluates the targets, refines around the best one, and keeps the best average as
    /// `best.safetensors`.
    ///
    /// `evaluate` receives one average at a time as a safetensors file, and returns its score. An error, NaN or an
    /// infinity is recorded as a failure, and the sweep continues. After each evaluation the trials are saved in
    /// `sweep.json` in the directory. The same call therefore continues an interrupted sweep, and tries failed
    /// evaluations again.
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
    /// - [`Error::Unexpected`] for a directory of another sweep, or one inside the run's.
    /// - [`Error::Io`] if the directory cannot be read or written.
    /// - As [`Run::plans`] and [`Run::write_all`].
    ///
    /// Recorded trials are kept.
    pub fn sweep<S: Into<Scores>, E: Display>(
        &self,
        options: &SweepOptions<'_>,
        evaluate: impl FnMut(&Candidate<'_>) -> Result<S, E>,
    ) -> Result<SweepResult> {
        self.sweep_with(options, 1, &mut Serial(evaluate))
    }

    /// As [`Run::sweep`], with up to `jobs` evaluations at a time, each on a thread of its own.
    ///
    /// Targets, repeats and [steps of the refinement](Sweep::with_width) are evaluated side by side. The trials depend
    /// on the number of jobs and the scores, not on the order in which evaluations end. After an error of the sweep
    /// itself, the evaluations that run already end first.
    ///
    /// # Errors
    /// As [`Run::sweep`].
    pub fn sweep_parallel<S: Into<Scores>, E: Display>(
        &self,
        options: &SweepOptions<'_>,
        jobs: u32,
        evaluate: impl Fn(&Candidate<'_>) -> Result<S, E> + Sync,
    ) -> Result<SweepResult> {
        self.sweep_with(options, jobs, &mut Parallel(evaluate, jobs.max(1)))
    }

    fn sweep_with(&self, options: &SweepOptions<'_>, jobs: u32, evaluator: &mut dyn Evaluator) -> Result<SweepResult> {
        let sweep = Sweep::new(options.targets, options.goal, options.refine)?;
        let sweep = sweep.with_metrics(options.metrics)?.with_repeats(options.repeats).with_jobs(jobs);
        // All targets are solved first, so that an impossible one fails before anything is written.
        let plans = self.plans_with(sweep.targets(), options.at, options.noise)?;
        let at = plans.first().map_or(0, |plan| plan.at);
        let rows = vec![vec![sweep.targets()[0].clone(); options.groups.len() + 1]];
        self.grouped_plans(&rows, options.groups, At::Step(at), options.noise)?;
        if let Some(run) = options.with {
            if options.groups.iter().any(|group| group == WITH) {
                let reason = format!("`{WITH}` is the name of the second run: write [w]ith");
                return Err(Error::Setting { option: "group", reason });
            }
            let plans = run.plans_with(sweep.targets(), At::Latest, options.noise)?;
            run.check_apart(options.dir)?;
            if let Some(form) = options.with_form {
                run.check_form(&plans, form)?;
                check_inputs(options.dir, form.folder())?;
            }
        }
        self.check_apart(options.dir)?;
        if let Some(form) = options.form {
            self.check_form(&plans, form)?;
            check_inputs(options.dir, form.folder())?;
        }
        log_warnings(self.dir(), &plans);
        let (record, trials) = Record::open(options.dir, SweepKey::new(self, at, options))?;
        let dir = SweepDir::new(record.dir(), options.keep_all, options.are_folders(), &trials)?;
        let second = options.with.map(|run| SecondRun::new(run, options, record.dir())).transpose()?;
        let with = second.iter().map(|_| WITH.to_owned());
        let parts: Vec<String> = options.groups.iter().cloned().chain(with).collect();
        let search = JointSearch::new(sweep, &parts, options.rounds, trials);
        let mut active = ActiveSweep { run: self, options, record, dir, second, search, at, evaluated: 0 };
        active.search(evaluator)?;
        let (best_trials, best, best_with) = active.ensure_best()?;
        let search = &active.search;
        Ok(SweepResult {
            trials: search.trials(),
            best_trials,
            unbeaten: search.unbeaten(),
            lines: search.lines(),
            settled: search.is_settled(),
            best,
            best_with,
            at,
            at_limit: search.sweep().is_at_limit(&|profile| active.is_reached(profile)),
            evaluated: active.evaluated,
            sweep: search.sweep().clone(),
        })
    }

    /// Checks that a sweep's directory is outside the run's, which may hold only the run's files.
    fn check_apart(&self, dir: &Path) -> Result<()> {
        let absolute = std::path::absolute(dir).map_err(Error::io("read", dir))?;
        let existing = absolute.ancestors().find_map(|ancestor| ancestor.canonicalize().ok());
        let is_inside = matches!((existing, self.dir().canonicalize()), (Some(dir), Ok(run)) if dir.starts_with(&run));
        if is_inside {
            return Err(Error::unexpected(dir, "a run's directory holds nothing but its snapshots: sweep elsewhere"));
        }
        Ok(())
    }
}

/// Sweep in progress.
struct ActiveSweep<'a> {
    run: &'a Run,
    options: &'a SweepOptions<'a>,
    record: Record,
    dir: SweepDir,
    second: Option<SecondRun<'a>>,
    search: JointSearch,
    at: u64,
    evaluated: usize,
}

impl ActiveSweep<'_> {
    /// Evaluates all targets and refinements.
    fn search(&mut self, evaluator: &mut dyn Evaluator) -> Result<()> {
        loop {
            let profiles = self.search.sweep().next(self.options.batch, &|profile| self.is_reached(profile));
            if profiles.is_empty() {
                if self.search.advance() {
                    continue;
                }
                return Ok(());
            }
            let rows: Vec<Vec<Profile>> = profiles.iter().map(|profile| self.search.point(profile)).collect();
            let plans = self.plans(&rows)?;
            let paths = self.dir.candidates(&plans, self.search.sweep().targets());
            let results = self.synthesize(&plans, &paths)?;
            let seconds = self.write_seconds(&rows, &paths)?;
            let mut tasks = Vec::new();
            for (index, profile) in profiles.iter().enumerate() {
                let (plan, path) = (&plans[index], &paths[index]);
                match &results[index] {
                    Ok(()) => {
                        let with = seconds.get(index).map(PathBuf::as_path);
                        let candidate = |repeat| Candidate { plan, path, with, repeat, job: 0 };
                        let task = |repeat| Task { candidate: candidate(repeat), index };
                        tasks.extend(self.search.sweep().missing(profile).into_iter().map(task));
                    }
                    Err(error) => {
                        self.record(profile, 1, Err(error.to_string()), TrialMetrics::of(plan, 0.0), &profiles)?;
                        self.announce(profile);
                    }
                }
            }
            self.evaluate(&tasks, &profiles, evaluator)?;
        }
    }

    /// Evaluates the tasks of a batch, and announces each as soon as all before it have ended.
    fn evaluate(&mut self, tasks: &[Task<'_>], batch: &[Profile], evaluator: &mut dyn Evaluator) -> Result<()> {
        let mut progress = BatchProgress::new(tasks);
        evaluator.run(tasks, &mut |event| {
            let (i, is_skipped) = match event {
                TaskEvent::Started(i) => {
                    self.options.observer.evaluating(&batch[tasks[i].index], self.search.sweep());
                    return Ok(());
                }
                TaskEvent::Ended(i, scores, seconds) => {
                    let Candidate { plan, repeat, .. } = tasks[i].candidate;
                    self.evaluated += 1;
                    self.record(&batch[tasks[i].index], repeat, scores, TrialMetrics::of(plan, seconds), batch)?;
                    (i, false)
                }
                TaskEvent::Skipped(i) => (i, true),
            };
            let is_last = progress.end(i, tasks[i].index, is_skipped);
            while let Some(ended) = progress.next_to_announce() {
                self.announce(&batch[tasks[ended].index]);
            }
            let Task { candidate, index } = tasks[i];
            if is_last { self.keep_or_discard(&batch[index], candidate.path) } else { Ok(()) }
        })
    }

    /// Keeps the file of an evaluated candidate if it is a best one, and removes it otherwise.
    fn keep_or_discard(&self, profile: &Profile, path: &Path) -> Result<()> {
        let sweep = self.search.sweep();
        let is_best = |metric: &usize| sweep.best_by(*metric).is_some_and(|best| best.profile == *profile);
        let metrics: Vec<usize> = self.search.stage_metrics().filter(is_best).collect();
        let best_of = |dir: &SweepDir| metrics.iter().map(|m| dir.best(sweep.metrics(), *m)).collect::<Vec<_>>();
        if let Some(SecondRun { dir, .. }) = &self.second {
            let beside = dir.beside(path);
            dir.make_best(&beside, &best_of(dir))?;
            dir.discard(&beside)?;
        }
        self.dir.make_best(path, &best_of(&self.dir))?;
        self.dir.discard(path)
    }

    /// Writes the second run's averages, if there is one, and returns their paths.
    fn write_seconds(&self, rows: &[Vec<Profile>], paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
        let Some(second) = &self.second else { return Ok(Vec::new()) };
        let targets: Vec<Profile> = rows.iter().filter_map(|row| row.last().cloned()).collect();
        second.write(&targets, paths)
    }

    /// Solves for averages, each with the targets of all parts.
    fn plans(&self, rows: &[Vec<Profile>]) -> Result<Vec<Plan>> {
        let parts = self.options.groups.len() + 1;
        let rows: Vec<Vec<Profile>> = rows.iter().map(|row| row[..parts].to_vec()).collect();
        self.run.grouped_plans(&rows, self.options.groups, At::Step(self.at), self.options.noise)
    }

    /// Returns true if the run makes this average with a relative error of at most 5%.
    fn is_reached(&self, profile: &Profile) -> bool {
        let plans = self.run.plans_with(std::slice::from_ref(profile), At::Step(self.at), self.options.noise);
        let is_in_second = || self.second.as_ref().is_none_or(|second| second.is_reached(profile));
        plans.is_ok_and(|plans| plans[0].shortfall.is_none()) && is_in_second()
    }

    /// Writes all candidates in one pass, and returns the result of each.
    ///
    /// If the dtype cannot hold one of them, each is written by itself, so that only this one fails.
    fn synthesize(&self, plans: &[Plan], paths: &[PathBuf]) -> Result<Vec<Result<()>>> {
        self.options.observer.synthesizing(plans.len(), self.run.bytes_to_read(plans));
        let outputs: Vec<Output<'_>> = plans.iter().zip(paths).map(|(plan, path)| Output { plan, path }).collect();
        match self.write(&outputs) {
            Ok(()) => return Ok(plans.iter().map(|_| Ok(())).collect()),
            Err(Error::Tensor { .. }) => {}
            Err(other) => return Err(other),
        }
        let write_one = |output: &Output<'_>| {
            self.options.observer.synthesizing(1, self.run.bytes_to_read(std::slice::from_ref(output.plan)));
            match self.write(std::slice::from_ref(output)) {
                Err(other) if !matches!(other, Error::Tensor { .. }) => Err(other),
                result => Ok(result),
            }
        };
        outputs.iter().map(write_one).collect()
    }

    fn write(&self, outputs: &[Output<'_>]) -> Result<()> {
        self.options.write(self.run, outputs, self.options.form)
    }

    fn record(
        &mut self,
        profile: &Profile,
        repeat: u32,
        scores: Result<Scores, String>,
        metrics: TrialMetrics,
        batch: &[Profile],
    ) -> Result<()> {
        let sweep = self.search.sweep_mut();
        sweep.record_repeat(profile.clone(), repeat, scores, metrics);
        sweep.arrange(batch);
        self.record.save_trials(&self.search.trials())
    }

    fn announce(&self, profile: &Profile) {
        let sweep = self.search.sweep();
        if let Some(trial) = sweep.trial(profile) {
            self.options.observer.evaluated(trial, sweep);
        }
    }

    /// Returns the best trial by each metric and its files. Each is synthesized again if it was removed, if the sweep
    /// was killed before it was renamed, or if it became the best after others were evaluated.
    fn ensure_best(&self) -> Result<(Vec<Trial>, Vec<PathBuf>, Vec<PathBuf>)> {
        let metrics = self.search.sweep().metrics();
        let (mut trials, mut paths, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
        for metric in 0..metrics.len() {
            let Some(best) = self.search.best_by(metric) else { break };
            let path = self.dir.best(metrics, metric);
            let mut groups = best.groups.clone();
            let with = self.second.as_ref().and_then(|_| groups.remove(WITH));
            if !self.dir.holds(&path, &best.profile, &groups) {
                self.write_best(&best, &path)?;
            }
            paths.push(path);
            if let (Some(second), Some(with)) = (&self.second, with) {
                let path = second.dir.best(metrics, metric);
                second.ensure_best(&with, &path)?;
                seconds.push(path);
            }
            trials.push(best);
        }
        Ok((trials, paths, seconds))
    }

    /// Writes a best average. It is written among the candidates first, at the same path after an interruption.
    fn write_best(&self, best: &Trial, path: &PathBuf) -> Result<()> {
        let plans = self.plans(&self.search.point_of(best).into_iter().collect::<Vec<_>>())?;
        let candidates = self.dir.candidates(&plans, self.search.sweep().targets());
        let (Some(plan), Some(candidate)) = (plans.first(), candidates.first()) else { return Ok(()) };
        self.options.observer.synthesizing(1, self.run.bytes_to_read(&plans));
        self.write(&[Output { plan, path: candidate }])?;
        self.dir.make_best(candidate, std::slice::from_ref(path))
    }
}
