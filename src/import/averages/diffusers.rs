//! Averages in folders of their own within the checkpoints' folders, such as `checkpoint-500/unet_ema` of diffusers.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::clock::UpdateClock;
use super::found::{FoundSeries, FoundSet};
use super::{AverageDecay, ImportAverages};
use crate::checkpoint::{CheckpointSeries, read_json};
use crate::error::{Difference, Error, Result, listed};
use crate::math::{EmaDecay, Ramp};

/// Ending of the folders in which diffusers' trainings save an `EMAModel`.
const ENDING: &str = "_ema";

/// State of an `EMAModel`, which it stores in the configuration of the model.
#[derive(Clone, Debug, PartialEq)]
struct EmaConfig {
    decay: EmaDecay,
    update_after_step: u64,
    /// Updates so far, with those that copied.
    optimization_step: u64,
}

impl EmaConfig {
    /// Reads the state; `None` for the configuration of a plain model.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a state that is not complete.
    fn read(folder: &Path) -> Result<Option<EmaConfig>> {
        let path = folder.join("config.json");
        let Some(config) = read_json(&path)? else { return Ok(None) };
        if config["optimization_step"].is_null() {
            return Ok(None);
        }
        let parsed = EmaConfig::parse(&config);
        parsed.map(Some).ok_or_else(|| Error::damaged(&path, "the state of its EMAModel is not complete"))
    }

    fn parse(config: &Value) -> Option<EmaConfig> {
        let ramp = if config["use_ema_warmup"].as_bool()? {
            Ramp::InverseGamma { gamma: config["inv_gamma"].as_f64()?, power: config["power"].as_f64()? }
        } else {
            Ramp::Ratio { offset: 10.0 }
        };
        let decay = EmaDecay { beta: config["decay"].as_f64()?, floor: config["min_decay"].as_f64()?, ramp };
        decay.check().ok()?;
        let update_after_step = config["update_after_step"].as_u64()?;
        Some(EmaConfig { decay, update_after_step, optimization_step: config["optimization_step"].as_u64()? })
    }
}

/// Finds the averages in the folders of a folder; `None` without any.
///
/// # Errors
/// [`Error::Io`]; [`Error::Setting`] for options that contradict the configurations; [`Error::Mismatch`] and
/// [`Error::Unexpected`] for configurations that contradict each other or the folders' names.
pub(super) fn find(import: &ImportAverages, dir: &Path) -> Result<Option<FoundSet>> {
    let Some(names) = folder_names(import, dir)? else { return Ok(None) };
    let folders = folders_with(dir, &names[0])?;
    let mut set = FoundSet::default();
    for (i, name) in names.iter().enumerate() {
        let (series, clock) = average(import, &folders, name, i)?;
        if set.clock.is_some_and(|other| other != clock) {
            let reason = format!("the averages `{}` and `{name}` began at different steps: import one alone", names[0]);
            return Err(Error::Setting { option: "key", reason });
        }
        set.clock = Some(clock);
        set.notes.extend(
            series.decay.as_ref().map(|decay| format!("folders called `{name}` hold an average, {}", describe(decay))),
        );
        set.series.push(series);
    }
    let raw = import.raw.clone().or_else(|| names[0].strip_suffix(ENDING).map(str::to_owned));
    let raw = raw.filter(|raw| import.raw.is_some() || folders.iter().all(|folder| folder.join(raw).is_dir()));
    if let Some(raw) = raw {
        set.notes.push(format!("folders called `{raw}` hold the raw weights, each an average of its own step"));
        let paths = folders.iter().map(|folder| folder.join(&raw)).collect();
        let steps = set.series[0].source.steps.clone();
        set.series.push(FoundSeries { source: CheckpointSeries { paths, key: None, steps }, decay: None });
    }
    Ok(Some(set))
}

/// Returns the average in the folders of a name, which is the one with index `i` of the options.
fn average(import: &ImportAverages, folders: &[PathBuf], name: &str, i: usize) -> Result<(FoundSeries, UpdateClock)> {
    let paths: Vec<PathBuf> = folders.iter().map(|folder| folder.join(name)).collect();
    let configs: Vec<Option<EmaConfig>> = paths.iter().map(|path| EmaConfig::read(path)).collect::<Result<_>>()?;
    let every = import.update_every.unwrap_or(1);
    let (decay, clock) = match &configs[0] {
        Some(first) => {
            check_configs(&paths, first, &configs)?;
            check_options(import, first, i)?;
            let start = first.update_after_step.saturating_add(1).saturating_mul(every);
            (AverageDecay::Ema(first.decay), UpdateClock { start, every })
        }
        None => given(import, i)?,
    };
    let steps = match (&import.steps, configs.into_iter().collect::<Option<Vec<_>>>()) {
        (Some(steps), _) => Some(steps.clone()),
        (None, Some(configs)) => Some(steps(folders, &configs, every)?),
        (None, None) => None,
    };
    Ok((FoundSeries { source: CheckpointSeries { paths, key: None, steps }, decay: Some(decay) }, clock))
}

/// Returns the names of the folders that hold averages: those of the options, or the only one that diffusers wrote.
fn folder_names(import: &ImportAverages, dir: &Path) -> Result<Option<Vec<String>>> {
    if let Some(first) = import.keys.first() {
        let folders = folders_with(dir, first)?;
        for folder in &folders {
            if let Some(missing) = import.keys.iter().find(|key| !folder.join(key).is_dir()) {
                let why = format!("no folder called `{missing}` is in it, unlike `{first}`: move it out of the folder");
                return Err(Error::unexpected(folder, why));
            }
        }
        return Ok((!folders.is_empty()).then(|| import.keys.clone()));
    }
    let mut names: Vec<String> = Vec::new();
    for folder in folders(dir)? {
        for inner in self::folders(&folder)? {
            let name = inner.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(ENDING) && !names.contains(&name) && EmaConfig::read(&inner)?.is_some() {
                names.push(name);
            }
        }
    }
    names.sort();
    if names.len() > 1 {
        let several: Vec<&str> = names.iter().map(String::as_str).collect();
        let reason = format!("folders called {} hold averages of different models: name one", listed(&several));
        return Err(Error::Setting { option: "key", reason });
    }
    Ok((!names.is_empty()).then_some(names))
}

/// Lists the folders in a folder, without links, in order of the last numbers in their names.
fn folders(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        if entry.file_type().map_err(Error::io("list", dir))?.is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort_by_key(|path| (number(path), path.clone()));
    Ok(folders)
}

/// Lists the folders that hold a folder of a name.
fn folders_with(dir: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let mut folders = folders(dir)?;
    folders.retain(|folder| folder.join(name).is_dir());
    Ok(folders)
}

/// Returns the number at the end of a folder's name.
fn number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_string_lossy().into_owned();
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name[name.len() - digits..].parse().ok()
}

/// Checks that all averages have one decay.
fn check_configs(paths: &[PathBuf], first: &EmaConfig, configs: &[Option<EmaConfig>]) -> Result<()> {
    for (path, config) in paths.iter().zip(configs) {
        let Some(config) = config else {
            let why =
                "its config.json has no state of an EMAModel, unlike those of the others: move it out of the folder";
            return Err(Error::unexpected(path, why));
        };
        let same = EmaConfig { optimization_step: first.optimization_step, ..config.clone() };
        if same != *first {
            let text = |config: &EmaConfig| format!("{:?} from step {} on", config.decay, config.update_after_step);
            let difference = Difference::new("the decay of the average", text(first), text(config));
            return Err(Error::mismatch(path, &paths[0], difference));
        }
    }
    Ok(())
}

/// Checks that options do not contradict a configuration.
fn check_options(import: &ImportAverages, config: &EmaConfig, i: usize) -> Result<()> {
    let fail = |option, reason: String| Err(Error::Setting { option, reason });
    match import.decays.get(i) {
        None => {}
        Some(decay) if *decay == AverageDecay::Ema(config.decay) => {}
        Some(_) => {
            return fail(
                "beta",
                format!("the files record {}: leave it out", describe(&AverageDecay::Ema(config.decay))),
            );
        }
    }
    match import.update_after_step {
        Some(after) if after != config.update_after_step => {
            fail("update_after_step", format!("the files record {}: leave it out", config.update_after_step))
        }
        _ => Ok(()),
    }
}

/// Returns a decay and the clock of the options, for folders that do not record them.
fn given(import: &ImportAverages, i: usize) -> Result<(AverageDecay, UpdateClock)> {
    let missing = |option, what: &str| {
        let reason = format!("the files do not record it: give the {what} of the training");
        Error::Setting { option, reason }
    };
    let decay = import.decays.get(i).cloned().ok_or_else(|| missing("beta", "decay"))?;
    let every = import.update_every.ok_or_else(|| missing("update_every", "steps between updates"))?;
    let start = import.update_after_step.map_or(0, |after| after.saturating_add(1));
    Ok((decay, UpdateClock { start, every }))
}

/// Returns the step of each average, from its count of updates.
///
/// # Errors
/// [`Error::Unexpected`] for a folder whose name has another number.
fn steps(folders: &[PathBuf], configs: &[EmaConfig], every: u64) -> Result<Vec<u64>> {
    let mut steps = Vec::with_capacity(configs.len());
    for (folder, config) in folders.iter().zip(configs) {
        let step = config.optimization_step.saturating_mul(every);
        if let Some(number) = number(folder).filter(|number| number.checked_sub(step).is_none_or(|rest| rest >= every))
        {
            let why = format!(
                "its average has {} updates, every {every} steps, and not those of {number} steps: give \
                 --update-every (`update_every`) as the training used it, or the steps with --steps (`steps`)",
                config.optimization_step
            );
            return Err(Error::unexpected(folder, why));
        }
        steps.push(step);
    }
    Ok(steps)
}

fn describe(decay: &AverageDecay) -> String {
    match decay {
        AverageDecay::Power(profile) => profile.to_string(),
        AverageDecay::Ema(EmaDecay { beta, ramp, .. }) => match ramp {
            Ramp::Constant => format!("of decay {beta}"),
            Ramp::Ratio { .. } => format!("of decay {beta} after a ramp (1 + k)/(10 + k)"),
            Ramp::InverseGamma { .. } => format!("of decay {beta} after a warm-up by inverse gamma"),
            Ramp::Exponential { .. } => format!("of decay {beta} after an exponential ramp"),
        },
    }
}
