//! `Sweep`: the search over many lengths and its record. The evaluations are made in Python.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use posthoc_ema::Profile;
use posthoc_ema::sweep::{self, Goal, JointSearch, Metric, Record, SweepKey, SweepLine, Trial, TrialMetrics, WITH};
use pyo3::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::errors::to_python;
use crate::form::OutputForm;
use crate::json::{from_json, to_json};
use crate::plans::{parse_profile, parse_profiles};

/// A search, with the record of its trials.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Sweep(Mutex<RecordedSearch>);

struct RecordedSearch {
    search: JointSearch,
    record: Option<Record>,
}

impl Sweep {
    fn lock(&self) -> MutexGuard<'_, RecordedSearch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RecordedSearch {
    /// Returns the index of a joint trial among all of them.
    fn position(&self, trial: &Trial) -> Option<usize> {
        let is_same = |other: &Trial| other.profile == trial.profile && other.groups == trial.groups;
        self.search.trials().iter().position(is_same)
    }
}

/// Settings of a search and of its record.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SearchSettings {
    minimize: bool,
    metrics: Vec<String>,
    repeats: u32,
    refine: usize,
    jobs: u32,
    groups: Vec<String>,
    /// Second run and its step.
    with: Option<String>,
    rounds: usize,
    run: String,
    at: u64,
    evaluation: String,
    noise: String,
}

/// Python function of a profile as JSON, with its first error.
struct PythonReach<'a, 'py> {
    function: &'a Bound<'py, PyAny>,
    error: RefCell<Option<PyErr>>,
}

impl<'a, 'py> PythonReach<'a, 'py> {
    fn new(function: &'a Bound<'py, PyAny>) -> PythonReach<'a, 'py> {
        PythonReach { function, error: RefCell::new(None) }
    }

    fn holds(&self, profile: &Profile) -> bool {
        let call = || self.function.call1((to_json(profile)?,))?.extract();
        call().unwrap_or_else(|error| {
            self.error.borrow_mut().get_or_insert(error);
            false
        })
    }

    fn check(self) -> PyResult<()> {
        self.error.into_inner().map_or(Ok(()), Err)
    }
}

#[pymethods]
impl Sweep {
    /// Begins a search, or continues the one recorded in `directory`.
    ///
    /// A record belongs to one `run`, `at`, `evaluation`, goal and `noise`; that of another search is an error.
    #[new]
    fn new(
        targets: Vec<String>,
        settings: &str,
        directory: Option<PathBuf>,
        form: &OutputForm,
        with_form: &OutputForm,
    ) -> PyResult<Sweep> {
        let settings: SearchSettings = from_json(settings)?;
        let SearchSettings { minimize, metrics, repeats, refine, jobs, groups, with, rounds, .. } = settings;
        let SearchSettings { run, at, evaluation, noise, .. } = settings;
        let metrics: Vec<Metric> =
            metrics.iter().map(|metric| Metric::parse(metric)).collect::<Result<_, _>>().map_err(to_python)?;
        let goal = if minimize { Goal::Minimize } else { Goal::Maximize };
        let goal = metrics.first().map_or(goal, |metric| metric.goal);
        let search = sweep::Sweep::new(&parse_profiles(&targets)?, goal, refine).map_err(to_python)?;
        let search = search.with_metrics(&metrics).map_err(to_python)?.with_repeats(repeats).with_jobs(jobs);
        let parts: Vec<String> = groups.iter().cloned().chain(with.iter().map(|_| WITH.to_owned())).collect();
        let (form, with_form) = (form.0.recorded(), with.as_ref().and_then(|_| with_form.0.recorded()));
        let key = SweepKey { run, at, evaluation, goal, metrics, groups, with, dtype: None, form, with_form, noise };
        let opened = directory.map(|directory| Record::open(&directory, key)).transpose().map_err(to_python)?;
        if let Some((record, _)) = &opened {
            sweep::remove_pending(record.dir()).map_err(to_python)?;
        }
        let (record, trials) = opened.map_or((None, Vec::new()), |(record, trials)| (Some(record), trials));
        let search = JointSearch::new(search, &parts, rounds, trials);
        Ok(Sweep(Mutex::new(RecordedSearch { search, record })))
    }

    /// Returns the next profiles to evaluate, each with those of all parts; an empty list when the search has ended.
    ///
    /// `is_reached` returns True for a profile that the run makes with a small error.
    fn next(&self, batch: usize, is_reached: &Bound<'_, PyAny>) -> PyResult<Vec<(String, Vec<String>)>> {
        let mut state = self.lock();
        loop {
            let reach = PythonReach::new(is_reached);
            let profiles = state.search.sweep().next(batch, &|profile| reach.holds(profile));
            reach.check()?;
            if !profiles.is_empty() || !state.search.advance() {
                let point =
                    |profile: &Profile| state.search.point(profile).iter().map(to_json).collect::<PyResult<_>>();
                return profiles.iter().map(|profile| Ok((to_json(profile)?, point(profile)?))).collect();
            }
        }
    }

    /// Returns the numbers of the repeats that a profile still needs.
    fn missing(&self, target: &str) -> PyResult<Vec<u32>> {
        Ok(self.lock().search.sweep().missing(&parse_profile(target)?))
    }

    /// Adds the values of a repeat, one of each metric, or its error, and writes the record. `batch` has the profiles
    /// of the batch in their order. Returns True if all repeats so far have succeeded.
    #[expect(clippy::too_many_arguments, reason = "called by the package only")]
    fn record(
        &self,
        py: Python<'_>,
        target: &str,
        repeat: u32,
        values: Option<Vec<f64>>,
        error: Option<String>,
        relative_error: f64,
        noise_gain: f64,
        seconds: f64,
        batch: Vec<String>,
    ) -> PyResult<bool> {
        let scores = match (values, error) {
            (Some(values), None) => Ok(values.into()),
            (_, error) => Err(error.unwrap_or_default()),
        };
        let metrics =
            TrialMetrics { relative_error: Some(relative_error), noise_gain: Some(noise_gain), seconds: Some(seconds) };
        let mut state = self.lock();
        let search = state.search.sweep_mut();
        let has_score = search.record_repeat(parse_profile(target)?, repeat, scores, metrics).score().is_some();
        search.arrange(&parse_profiles(&batch)?);
        let trials = state.search.trials();
        let save = || state.record.as_ref().map_or(Ok(()), |record| record.save_trials(&trials));
        py.detach(save).map_err(to_python)?;
        Ok(has_score)
    }

    /// Returns all trials as JSON, in the order of their evaluation, each with the means of its metrics.
    fn trials(&self) -> PyResult<String> {
        let state = self.lock();
        let metrics = state.search.sweep().metrics();
        let with_means = |trial: &Trial| {
            let mut object = json!(trial);
            let means = metrics.iter().enumerate();
            object["means"] = means.map(|(i, metric)| (metric.name.clone(), json!(trial.mean(i)))).collect();
            object
        };
        to_json(&state.search.trials().iter().map(with_means).collect::<Vec<Value>>())
    }

    /// Returns the metrics as JSON, each with its best trial and the comparison of the trials. That of a joint search
    /// is along its lines.
    fn metrics(&self) -> PyResult<String> {
        let state = self.lock();
        let lines = state.search.lines();
        let sweep = state.search.sweep();
        let describe = |i: usize| {
            let mut object = if lines.is_empty() { comparison(sweep, i) } else { json!({ "as_good": [] }) };
            object["name"] = json!(sweep.metrics()[i].name);
            object["minimize"] = json!(sweep.metrics()[i].goal == Goal::Minimize);
            object["best"] = json!(state.search.best_by(i).and_then(|best| state.position(&best)));
            object
        };
        to_json(&(0..sweep.metrics().len()).map(describe).collect::<Vec<Value>>())
    }

    /// Returns the last sweep along each length of a joint search, as JSON.
    fn lines(&self) -> PyResult<String> {
        let describe = |SweepLine { metric, part, sweep }: SweepLine| {
            let mut object = comparison(&sweep, metric);
            object["metric"] = json!(sweep.metrics()[metric].name);
            object["part"] = json!(part);
            object["edge"] = json!(sweep.edge_by(metric));
            object["best"] = json!(sweep.best_by(metric).map(|best| &best.profile));
            let point = |trial: &Trial| (json!(trial.profile), json!(trial.mean(metric)), json!(trial.refined));
            object["points"] = sweep.trials().iter().map(point).map(|point| json!(point)).collect();
            object
        };
        to_json(&self.lock().search.lines().into_iter().map(describe).collect::<Vec<Value>>())
    }

    /// Returns True if no length of a joint search changed in its last turn.
    fn is_settled(&self) -> bool {
        self.lock().search.is_settled()
    }

    /// Returns the indices of the trials that no other one beats in all metrics.
    fn unbeaten(&self) -> Vec<usize> {
        let state = self.lock();
        state.search.unbeaten().iter().filter_map(|trial| state.position(trial)).collect()
    }

    /// Returns the number of evaluations so far.
    fn done(&self) -> usize {
        self.lock().search.evaluations()
    }

    /// Returns the index of the best trial.
    fn best(&self) -> Option<usize> {
        let state = self.lock();
        state.search.best_by(0).and_then(|best| state.position(&best))
    }

    /// Returns the end of the evaluated lengths at which the best one is; None inside the range.
    fn edge(&self) -> PyResult<Option<String>> {
        let edge = self.lock().search.sweep().edge();
        Ok(edge.map(|edge| if edge == sweep::Edge::Shortest { "shortest" } else { "longest" }.to_owned()))
    }

    /// Returns True if the best trial is at an edge beyond which `is_reached` allows no step.
    fn is_at_limit(&self, is_reached: &Bound<'_, PyAny>) -> PyResult<bool> {
        let reach = PythonReach::new(is_reached);
        let is_at_limit = self.lock().search.sweep().is_at_limit(&|profile| reach.holds(profile));
        reach.check()?;
        Ok(is_at_limit)
    }

    /// Returns the number of all evaluations, done and planned: of a joint search, those along the current length.
    fn planned(&self) -> usize {
        let state = self.lock();
        let sweep = state.search.sweep();
        state.search.evaluations() + sweep.planned() - sweep.done()
    }

    /// Releases the directory for another sweep, without averages that were to be evaluated.
    fn close(&self) -> PyResult<()> {
        self.lock().record.take().map_or(Ok(()), |record| sweep::remove_pending(record.dir())).map_err(to_python)
    }
}

/// Describes the comparison of a sweep's trials by a metric.
fn comparison(sweep: &sweep::Sweep, metric: usize) -> Value {
    let comparison = sweep.comparison(metric);
    json!({
        "flat": sweep.is_flat_by(metric),
        "standard_error": comparison.as_ref().map(|comparison| comparison.standard_error),
        "as_good": comparison.map_or_else(Vec::new, |comparison| comparison.as_good),
    })
}

/// Returns the name of a profile's length and its value; None for a table.
#[pyfunction]
pub fn profile_length(json: &str) -> PyResult<Option<(String, f64)>> {
    let length = parse_profile(json)?.family();
    Ok(length.map(|(family, length)| (family.length_name().to_owned(), length)))
}
