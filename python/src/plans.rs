//! Functions of profiles and plans, which need no tensors.

use std::collections::BTreeMap;
use std::path::PathBuf;

use posthoc_ema::math::Schedule;
use posthoc_ema::{
    ADVICE_PARTS, AdviceRequest, At, Dtype, Forecast, NamedMovement, Noise, Plan, Profile, Retention, Run,
};
use pyo3::prelude::*;
use serde::Deserialize;

use crate::errors::{argument, to_python};
use crate::jobs;
use crate::json::{from_json, to_json};

/// Parses a profile's JSON.
pub fn parse_profile(json: &str) -> PyResult<Profile> {
    from_json(json)
}

/// Parses the JSON of several profiles.
pub fn parse_profiles(jsons: &[String]) -> PyResult<Vec<Profile>> {
    jsons.iter().map(|json| parse_profile(json)).collect()
}

/// Target of an average in which groups of tensors have profiles of their own.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupedTarget {
    profile: Profile,
    groups: BTreeMap<String, Profile>,
}

/// Parses the JSON of targets of one synthesis: each a profile, or the profile of the tensors without a group with
/// those of the groups. Returns a row for each target as [`posthoc_ema::Run::grouped_plans`] takes it, and the groups.
pub fn parse_targets(jsons: &[String]) -> PyResult<(Vec<Vec<Profile>>, Vec<String>)> {
    let parse = |json: &String| {
        let value: serde_json::Value = from_json(json)?;
        if value.get("groups").is_some() { from_json(json) } else { parse_plain(json) }
    };
    let targets: Vec<GroupedTarget> = jsons.iter().map(parse).collect::<PyResult<_>>()?;
    let groups: Vec<String> = targets.first().iter().flat_map(|target| target.groups.keys().cloned()).collect();
    let row = |target: GroupedTarget| std::iter::once(target.profile).chain(target.groups.into_values()).collect();
    Ok((targets.into_iter().map(row).collect(), groups))
}

fn parse_plain(json: &str) -> PyResult<GroupedTarget> {
    Ok(GroupedTarget { profile: parse_profile(json)?, groups: BTreeMap::new() })
}

/// Returns the time of a step, or the newest time for no step.
pub fn at(step: Option<u64>) -> At {
    step.map_or(At::Latest, At::Step)
}

/// Parses a regularisation against rounding: "off", "auto", or a number.
pub fn parse_noise(text: &str) -> PyResult<Noise> {
    text.parse().map_err(|why| argument(format!("noise: {why}")))
}

/// Returns the number of usable CUDA devices, and the reason if there are none.
#[pyfunction]
pub fn cuda_devices() -> (usize, Option<String>) {
    match posthoc_ema::cuda_devices() {
        Ok(devices) => (devices, None),
        Err(why) => (0, Some(why)),
    }
}

/// Checks a profile's JSON; returns it with all fields, and the profile's name for messages.
#[pyfunction]
pub fn check_profile(json: &str) -> PyResult<(String, String)> {
    let profile = parse_profile(json)?;
    Ok((to_json(&profile)?, profile.to_string()))
}

/// Returns the JSON of a profile that can be tracked, from one of its parameters.
#[pyfunction]
pub fn track(kind: &str, value: f64) -> PyResult<String> {
    let profile = match kind {
        "sigma_rel" => Profile::sigma_rel(value),
        "gamma" => Profile::gamma(value),
        "beta" => Profile::beta(value),
        "half_life" => Profile::half_life(value),
        other => {
            return Err(argument(format!(
                "`{other}` is not a parameter of a profile: use sigma_rel, gamma, beta or half_life"
            )));
        }
    };
    to_json(&profile.map_err(to_python)?)
}

/// Returns the relative standard deviation of a power-function profile, or None for other profiles.
#[pyfunction]
pub fn as_sigma_rel(json: &str) -> PyResult<Option<f64>> {
    Ok(parse_profile(json)?.as_sigma_rel())
}

/// Returns `F_T(tau)`, the share of the average at time `at` that belongs to updates up to each of `times`.
#[pyfunction]
pub fn cumulative(json: &str, times: Vec<f64>, at: f64) -> PyResult<Vec<f64>> {
    let profile = parse_profile(json)?;
    profile.check_at(at).map_err(to_python)?;
    Ok(times.into_iter().map(|time| profile.cumulative(time, at)).collect())
}

/// Schedule and tracked profiles of a training that has not begun.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlannedTraining {
    steps: u64,
    update_every: u64,
    update_after_step: u64,
    checkpoint_every: u64,
    /// 0 for no early snapshots.
    snapshot_growth: f64,
    max_checkpoints: usize,
    #[serde(default)]
    retention: Retention,
    tracked: Vec<Profile>,
    dtype: Dtype,
    noise: String,
    /// Movement that is expected of the weights.
    movement: Option<String>,
    /// Directory of a run that moves alike.
    like: Option<PathBuf>,
}

/// Solves targets over the snapshots that a training will keep.
#[pyfunction]
#[pyo3(signature = (training, targets, at_step=None))]
pub fn forecast(py: Python<'_>, training: &str, targets: Vec<String>, at_step: Option<u64>) -> PyResult<String> {
    let training: PlannedTraining = from_json(training)?;
    let noise = parse_noise(&training.noise)?;
    let movement = parse_movement(training.movement.as_deref())?;
    let PlannedTraining {
        steps,
        update_every,
        update_after_step,
        checkpoint_every,
        snapshot_growth,
        max_checkpoints,
        retention,
        tracked,
        dtype,
        like,
        ..
    } = training;
    let snapshot_growth = given(snapshot_growth);
    let schedule = Schedule { update_every, update_after_step, checkpoint_every, snapshot_growth };
    let forecast = Forecast { schedule, steps, keep: max_checkpoints, retention, tracked };
    let targets = parse_profiles(&targets)?;
    let plans = py.detach(|| {
        let like = like.map(Run::open).transpose()?;
        match (movement, like, noise) {
            (None, None, Noise::Rho(rho)) => forecast.plans_with(&targets, at(at_step), rho),
            (None, None, _) => forecast.plans(&targets, at(at_step)),
            (movement, like, noise) => moving(&forecast, &targets, at(at_step), noise, (&movement, &like), dtype),
        }
    });
    to_json(&plans.map_err(to_python)?)
}

fn parse_movement(movement: Option<&str>) -> PyResult<Option<NamedMovement>> {
    let movement = movement.map(str::parse::<NamedMovement>).transpose();
    movement.map_err(|why| argument(format!("movement: {why}")))
}

/// Solves targets of a forecast, and predicts their errors: of a movement, or as if the weights moved as in a run.
fn moving(
    forecast: &Forecast,
    targets: &[Profile],
    at: At,
    noise: Noise,
    (movement, like): (&Option<NamedMovement>, &Option<Run>),
    dtype: Dtype,
) -> posthoc_ema::Result<Vec<Plan>> {
    match (movement, like) {
        (Some(movement), _) => forecast.plans_moving(targets, at, noise, movement, dtype),
        (None, Some(run)) => run.plans_like(forecast, targets, at, noise, dtype),
        (None, None) => Ok(Vec::new()),
    }
}

/// Returns the factor of early snapshots; `None` for 0.
fn given(snapshot_growth: f64) -> Option<f64> {
    Some(snapshot_growth).filter(|factor| *factor != 0.0)
}

/// Facts about a training that advice is computed from.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AdviceInput {
    steps: u64,
    update_every: u64,
    update_after_step: u64,
    /// 0 for no early snapshots.
    snapshot_growth: f64,
    parameters: u64,
    dtype: Dtype,
    disk: u64,
    range: (f64, f64),
    /// Movement that is expected of the weights.
    movement: Option<String>,
    /// Directory of a run that moves alike.
    like: Option<PathBuf>,
}

/// Returns choices of profiles, spacing and number of snapshots for a disk, as JSON. Each has its largest predicted
/// error: null without a movement or a run that moves alike.
///
/// `progress` is called with the parts of the search that have ended, of [`ADVICE_PARTS`].
#[pyfunction]
pub fn advise(py: Python<'_>, input: &str, progress: Option<&Bound<'_, PyAny>>) -> PyResult<String> {
    let input: AdviceInput = from_json(input)?;
    let movement = parse_movement(input.movement.as_deref())?;
    let like = input.like.map(|run| py.detach(|| Run::open(run))).transpose().map_err(to_python)?;
    let AdviceInput { steps, update_every, update_after_step, snapshot_growth, parameters, dtype, disk, range, .. } =
        input;
    let snapshot_growth = given(snapshot_growth);
    let request =
        AdviceRequest { steps, update_every, update_after_step, snapshot_growth, parameters, dtype, disk, range };
    let advice = jobs::run(py, progress, |progress| {
        let report = |_| progress.iter().for_each(|progress| progress(1));
        posthoc_ema::advise(&request, &report).map_err(to_python)
    })?;
    let predicted = advice.iter().map(|advice| {
        let plans = advice.lengths(&request).and_then(|targets| {
            moving(&advice.forecast, &targets, At::Latest, Noise::Off, (&movement, &like), request.dtype)
        })?;
        let predicted = plans.iter().filter_map(|plan| plan.predicted);
        Ok(predicted.max_by(|a, b| a.total.total_cmp(&b.total)))
    });
    let predicted: posthoc_ema::Result<Vec<_>> = py.detach(|| predicted.collect());
    to_json(&advice.iter().zip(predicted.map_err(to_python)?).collect::<Vec<_>>())
}

/// Returns the number of parts of the search for advice.
#[pyfunction]
pub fn advice_parts() -> usize {
    ADVICE_PARTS
}
