//! `Sweep`: the search over many lengths and its record. The evaluations are made in Python.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use posthoc_ema::Profile;
use posthoc_ema::sweep::{self, Goal, Metric, Record, SweepKey, TrialMetrics};
use pyo3::prelude::*;
use serde_json::{Value, json};

use crate::errors::to_python;
use crate::json::to_json;
use crate::plans::{parse_profile, parse_profiles};

/// A search, with the record of its trials.
#[pyclass(frozen, module = "posthoc_ema._native")]
pub struct Sweep(Mutex<RecordedSearch>);

struct RecordedSearch {
    search: sweep::Sweep,
    record: Option<Record>,
}

impl Sweep {
    fn lock(&self) -> MutexGuard<'_, RecordedSearch> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    #[expect(clippy::too_many_arguments, reason = "called by the package only")]
    fn new(
        targets: Vec<String>,
        minimize: bool,
        refine: usize,
        directory: Option<PathBuf>,
        run: String,
        at: u64,
        evaluation: String,
        noise: String,
        metrics: Vec<String>,
        repeats: u32,
    ) -> PyResult<Sweep> {
        let metrics: Vec<Metric> =
            metrics.iter().map(|metric| Metric::parse(metric)).collect::<Result<_, _>>().map_err(to_python)?;
        let goal = if minimize { Goal::Minimize } else { Goal::Maximize };
        let goal = metrics.first().map_or(goal, |metric| metric.goal);
        let search = sweep::Sweep::new(&parse_profiles(&targets)?, goal, refine).map_err(to_python)?;
        let mut search = search.with_metrics(&metrics).map_err(to_python)?.with_repeats(repeats);
        let key = SweepKey {
            run,
            at,
            evaluation,
            goal,
            metrics,
            groups: Vec::new(),
            with: None,
            dtype: None,
            form: None,
            noise,
        };
        let mut record = None;
        if let Some(directory) = directory {
            let (opened, trials) = Record::open(&directory, key).map_err(to_python)?;
            search.restore(trials);
            record = Some(opened);
        }
        Ok(Sweep(Mutex::new(RecordedSearch { search, record })))
    }

    /// Returns the next profiles to evaluate; an empty list when the search has ended.
    ///
    /// `is_reached` returns True for a profile that the run makes with a small error.
    fn next(&self, batch: usize, is_reached: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
        let reach = PythonReach::new(is_reached);
        let profiles = self.lock().search.next(batch, &|profile| reach.holds(profile));
        reach.check()?;
        profiles.iter().map(to_json).collect()
    }

    /// Returns the numbers of the repeats that a profile still needs.
    fn missing(&self, target: &str) -> PyResult<Vec<u32>> {
        Ok(self.lock().search.missing(&parse_profile(target)?))
    }

    /// Adds the values of a repeat, one of each metric, or its error, and writes the record. Returns True if all
    /// repeats so far have succeeded.
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
    ) -> PyResult<bool> {
        let scores = match (values, error) {
            (Some(values), None) => Ok(values.into()),
            (_, error) => Err(error.unwrap_or_default()),
        };
        let metrics =
            TrialMetrics { relative_error: Some(relative_error), noise_gain: Some(noise_gain), seconds: Some(seconds) };
        let mut state = self.lock();
        let trial = state.search.record_repeat(parse_profile(target)?, repeat, scores, metrics);
        let has_score = trial.score().is_some();
        let save = || state.record.as_ref().map_or(Ok(()), |record| record.save(&state.search));
        py.detach(save).map_err(to_python)?;
        Ok(has_score)
    }

    /// Returns all trials as JSON, in the order of their evaluation, each with the means of its metrics.
    fn trials(&self) -> PyResult<String> {
        let state = self.lock();
        let search = &state.search;
        let with_means = |trial: &sweep::Trial| {
            let mut object = json!(trial);
            let means = search.metrics().iter().enumerate();
            object["means"] = means.map(|(i, metric)| (metric.name.clone(), json!(trial.mean(i)))).collect();
            object
        };
        to_json(&search.trials().iter().map(with_means).collect::<Vec<Value>>())
    }

    /// Returns the metrics as JSON, each with its best trial and the comparison of the trials.
    fn metrics(&self) -> PyResult<String> {
        let state = self.lock();
        let search = &state.search;
        let describe = |i: usize| {
            let comparison = search.comparison(i);
            json!({
                "name": search.metrics()[i].name,
                "minimize": search.metrics()[i].goal == Goal::Minimize,
                "best": search.best_by(i).and_then(|best| position(search, best)),
                "flat": search.is_flat_by(i),
                "standard_error": comparison.as_ref().map(|comparison| comparison.standard_error),
                "as_good": comparison.map_or_else(Vec::new, |comparison| comparison.as_good),
            })
        };
        to_json(&(0..search.metrics().len()).map(describe).collect::<Vec<Value>>())
    }

    /// Returns the indices of the trials that no other one beats in all metrics.
    fn unbeaten(&self) -> Vec<usize> {
        let state = self.lock();
        state.search.unbeaten().into_iter().filter_map(|trial| position(&state.search, trial)).collect()
    }

    /// Returns the number of evaluations so far.
    fn done(&self) -> usize {
        self.lock().search.done()
    }

    /// Returns the index of the best trial.
    fn best(&self) -> Option<usize> {
        let state = self.lock();
        let best = &state.search.best()?.profile;
        state.search.trials().iter().position(|trial| trial.profile == *best)
    }

    /// Returns the end of the evaluated lengths at which the best one is; None inside the range.
    fn edge(&self) -> PyResult<Option<String>> {
        let edge = self.lock().search.edge();
        Ok(edge.map(|edge| if edge == sweep::Edge::Shortest { "shortest" } else { "longest" }.to_owned()))
    }

    /// Returns True if the best trial is at an edge beyond which `is_reached` allows no step.
    fn is_at_limit(&self, is_reached: &Bound<'_, PyAny>) -> PyResult<bool> {
        let reach = PythonReach::new(is_reached);
        let is_at_limit = self.lock().search.is_at_limit(&|profile| reach.holds(profile));
        reach.check()?;
        Ok(is_at_limit)
    }

    /// Returns True if all lengths have the same score.
    fn is_flat(&self) -> bool {
        self.lock().search.is_flat()
    }

    /// Returns the number of all evaluations, done and planned.
    fn planned(&self) -> usize {
        self.lock().search.planned()
    }

    /// Releases the directory for another sweep.
    fn close(&self) {
        self.lock().record = None;
    }
}

fn position(search: &sweep::Sweep, trial: &sweep::Trial) -> Option<usize> {
    search.trials().iter().position(|other| other.profile == trial.profile)
}

/// Returns the name of a profile's length and its value; None for a table.
#[pyfunction]
pub fn profile_length(json: &str) -> PyResult<Option<(String, f64)>> {
    let length = parse_profile(json)?.family();
    Ok(length.map(|(family, length)| (family.length_name().to_owned(), length)))
}
