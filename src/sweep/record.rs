//! Directory of a sweep. The file `sweep.json` in it holds the trials, and is replaced after each of them.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::candidates::{FOLDERS, best_name};
use super::folders::check_best;
use super::options::SweepOptions;
use super::search::Sweep;
use super::trial::{Goal, Metric, Trial};
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, Lock, find_document, remove_leftovers};
use crate::output::{FormOptions, OutputForm};
use crate::run::Run;
use crate::snapshot::{STATE_FILE, any_snapshot_file};

/// Name of the document.
const FILE: &str = "sweep.json";

/// Version of a document with one number for each trial.
const PLAIN_VERSION: u32 = 1;

/// Version of a document with metrics, repeats or groups, which older programs would lose.
const VERSION: u32 = 2;

/// Settings that the scores of a sweep depend on. Sweeps that differ in one do not share scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepKey {
    /// Run, as returned by [`identity`].
    pub run: String,
    /// Time of the targets.
    pub at: u64,
    /// Evaluation: a command, or the name of a function.
    pub evaluation: String,
    /// Direction in which scores are better: that of the first metric.
    pub goal: Goal,
    /// Metrics of the evaluation; empty for one without a name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<Metric>,
    /// Globs of the groups of a joint sweep.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// Second run and the step of its averages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with: Option<String>,
    /// Dtype of averaged tensors; `None` for the model's own.
    pub dtype: Option<String>,
    /// Form of the averages, unless they are plain files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<FormOptions>,
    /// Form of the second run's averages, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with_form: Option<FormOptions>,
    /// Treatment of the snapshots' rounding, as [`Noise`](crate::Noise) is written.
    pub noise: String,
}

/// Directory of a sweep, locked until this is dropped.
#[derive(Debug)]
pub struct Record {
    dir: PathBuf,
    key: SweepKey,
    lock: Lock,
}

/// Contents of the document.
#[derive(Serialize, Deserialize)]
struct SweepDocument<'a> {
    posthoc_ema_sweep: u32,
    #[serde(flatten)]
    key: Cow<'a, SweepKey>,
    trials: Cow<'a, [Trial]>,
}

/// Version of a document, which is checked before the rest is parsed.
#[derive(Deserialize)]
struct SweepVersion {
    posthoc_ema_sweep: u32,
}

impl Record {
    /// Opens the directory of a sweep, and returns the trials of the earlier sweep in it.
    ///
    /// A missing directory is created. The document of a new sweep is written at once, which marks the directory as the
    /// sweep's. Temporary files that a killed sweep left are removed.
    ///
    /// # Errors
    /// - [`Error::Unexpected`] if the directory belongs to another sweep, if another process uses it, if it holds a
    ///   run, or if it has no document but files that a sweep would replace.
    /// - [`Error::Damaged`] if the document cannot be parsed.
    /// - [`Error::Io`] if the directory cannot be read or written.
    pub fn open(dir: &Path, key: SweepKey) -> Result<(Record, Vec<Trial>)> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        // The path is made absolute, because an evaluation may change the working directory.
        let dir = &std::path::absolute(dir).map_err(Error::io("read", dir))?;
        let metrics = 0..key.metrics.len().max(1);
        let runs: &[bool] = if key.with.is_some() { &[false, true] } else { &[false] };
        let best = |metric| runs.iter().map(move |&is_second| (metric, is_second));
        let best: Vec<(usize, bool)> = metrics.flat_map(best).collect();
        let name = |&(metric, is_second)| best_name(&key.metrics, metric, is_second, key.are_folders(is_second));
        let names: Vec<String> = best.iter().map(name).collect();
        if let Some(name) = names.iter().enumerate().find_map(|(i, name)| names[..i].contains(name).then_some(name)) {
            let reason = format!("{name} would be the best average of two: give the metric another name");
            return Err(Error::Setting { option: "metric", reason });
        }
        check_own(dir, &names)?;
        // The best averages are written last, after all evaluations.
        for (name, &(_, is_second)) in names.iter().zip(&best) {
            check_best(&dir.join(name), key.are_folders(is_second))?;
        }
        let lock = Lock::acquire(dir).map_err(|error| match error {
            Error::Locked { path } | Error::LockedHere { path } => {
                Error::unexpected(&path, "another sweep is writing here: wait for it, or choose another directory")
            }
            other => other,
        })?;
        remove_leftovers(dir);
        let path = dir.join(FILE);
        let trials = find_document(&path)?.map_or(Ok(Vec::new()), |text| read(&path, &text, &key))?;
        let record = Record { dir: dir.to_owned(), key, lock };
        if trials.is_empty() {
            record.write(&trials)?;
        }
        Ok((record, trials))
    }

    /// Absolute path of the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Replaces the document atomically.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written, [`Error::LockLost`] if another process may write here.
    pub fn save(&self, sweep: &Sweep) -> Result<()> {
        self.write(sweep.trials())
    }

    /// As [`Record::save`], for the trials of a joint sweep.
    ///
    /// # Errors
    /// As [`Record::save`].
    pub fn save_trials(&self, trials: &[Trial]) -> Result<()> {
        self.write(trials)
    }

    fn write(&self, trials: &[Trial]) -> Result<()> {
        self.lock.id().check()?;
        let is_plain = self.key.metrics.is_empty()
            && self.key.groups.is_empty()
            && self.key.with.is_none()
            && self.key.form.is_none()
            && self.key.with_form.is_none()
            && trials.iter().all(|trial| trial.repeats.is_empty());
        let version = if is_plain { PLAIN_VERSION } else { VERSION };
        let document =
            SweepDocument { posthoc_ema_sweep: version, key: Cow::Borrowed(&self.key), trials: trials.into() };
        let path = self.dir.join(FILE);
        let text = serde_json::to_string_pretty(&document).map_err(|e| Error::unexpected(&path, e.to_string()))?;
        let file = AtomicFile::create(&path)?;
        file.write_at(0, text.as_bytes())?;
        file.commit()
    }
}

impl SweepKey {
    /// Key of a sweep over a run at the resolved time `at`.
    pub fn new(run: &Run, at: u64, options: &SweepOptions<'_>) -> SweepKey {
        SweepKey {
            run: identity(run),
            at,
            evaluation: options.evaluation.to_owned(),
            goal: options.metrics.first().map_or(options.goal, |metric| metric.goal),
            metrics: options.metrics.to_vec(),
            groups: options.groups.to_vec(),
            with: options.with.map(second_identity),
            dtype: options.dtype.map(|dtype| dtype.to_string()),
            form: options.form.and_then(OutputForm::recorded),
            with_form: options.with.and(options.with_form).and_then(OutputForm::recorded),
            noise: options.noise.to_string(),
        }
    }

    /// Returns true if averages of the run, or of the second one, are folders.
    fn are_folders(&self, is_second: bool) -> bool {
        let form = if is_second { &self.with_form } else { &self.form };
        form.as_ref().is_some_and(FormOptions::is_folder)
    }

    /// Describes the first difference from the stored key, for a message that begins with "the sweep here".
    fn difference(&self, stored: &SweepKey) -> Option<String> {
        let metrics = |key: &SweepKey| match key.metrics.is_empty() {
            true => "one number".into(),
            false => key.metrics.iter().map(Metric::to_string).collect::<Vec<_>>().join(", "),
        };
        let groups = |key: &SweepKey| match key.groups.is_empty() {
            true => "none".into(),
            false => key.groups.join(", "),
        };
        let with = |key: &SweepKey| key.with.clone().unwrap_or_else(|| "none".into());
        let dtype = |key: &SweepKey| key.dtype.clone().unwrap_or_else(|| "the model's".into());
        let form = |form: &Option<FormOptions>| serde_json::json!(form).to_string();
        let parts = [
            ("is over another run", self.run.clone(), stored.run.clone()),
            ("is at another step", self.at.to_string(), stored.at.to_string()),
            ("has another evaluation", self.evaluation.clone(), stored.evaluation.clone()),
            ("has other metrics", metrics(self), metrics(stored)),
            ("has other groups", groups(self), groups(stored)),
            ("has another second run", with(self), with(stored)),
            ("has another direction", self.goal.to_string(), stored.goal.to_string()),
            ("has another dtype", dtype(self), dtype(stored)),
            ("has another form", form(&self.form), form(&stored.form)),
            ("has another form of the second run", form(&self.with_form), form(&stored.with_form)),
            ("has another regularisation", self.noise.clone(), stored.noise.clone()),
        ];
        let (what, now, then) = parts.into_iter().find(|(_, now, then)| now != then)?;
        Some(format!("{what} ({then}, and now {now})"))
    }
}

/// Identifies the second run and its newest step.
fn second_identity(run: &Run) -> String {
    let newest = run.snapshots().iter().map(|snapshot| snapshot.id.step).max().unwrap_or(0);
    format!("{} at step {newest}", identity(run))
}

/// Identifies a run: by the id that its snapshots store, or by its directory if they store none.
pub fn identity(run: &Run) -> String {
    if let Some(id) = run.snapshots().iter().find_map(|snapshot| snapshot.meta.run.clone()) {
        return id;
    }
    let dir = run.dir().canonicalize().unwrap_or_else(|_| run.dir().to_owned());
    dir.display().to_string()
}

/// Checks that a directory without a document holds neither a run nor files that a sweep would replace.
fn check_own(dir: &Path, best: &[String]) -> Result<()> {
    if dir.join(FILE).exists() {
        return Ok(());
    }
    let run_file = if dir.join(STATE_FILE).exists() { Some(STATE_FILE.to_owned()) } else { any_snapshot_file(dir)? };
    if let Some(found) = run_file {
        let why = format!("it holds {found}, and a run's directory holds nothing but its snapshots: sweep elsewhere");
        return Err(Error::unexpected(dir, why));
    }
    let has_files = |folder: &&str| dir.join(folder).read_dir().is_ok_and(|mut entries| entries.next().is_some());
    let best = best.iter().map(String::as_str).find(|name| dir.join(name).symlink_metadata().is_ok());
    let Some(found) = best.or_else(|| FOLDERS.into_iter().find(has_files)) else { return Ok(()) };
    let why = format!("a sweep would replace {found}, and no earlier sweep wrote it ({FILE} is missing)");
    Err(Error::unexpected(dir, format!("{why}: move it away, or choose another directory")))
}

/// Parses the document of an earlier sweep, and returns its trials if its key is the same.
fn read(path: &Path, text: &[u8], key: &SweepKey) -> Result<Vec<Trial>> {
    let damaged = |error: serde_json::Error| Error::damaged(path, format!("not the record of a sweep: {error}"));
    let version: SweepVersion = serde_json::from_slice(text).map_err(damaged)?;
    if !(PLAIN_VERSION..=VERSION).contains(&version.posthoc_ema_sweep) {
        let version = version.posthoc_ema_sweep;
        let why = format!("its version is {version}, and this program reads versions {PLAIN_VERSION} to {VERSION}");
        return Err(Error::unexpected(path, format!("{why}: use a newer program, or choose another directory")));
    }
    let stored: SweepDocument<'_> = serde_json::from_slice(text).map_err(damaged)?;
    // A sweep without trials may be replaced by any other.
    if let Some(difference) = key.difference(&stored.key).filter(|_| !stored.trials.is_empty()) {
        let remedy = "use the same settings as before, or choose another directory";
        return Err(Error::unexpected(path, format!("the sweep here {difference}: {remedy}")));
    }
    Ok(stored.trials.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::Profile;
    use crate::sweep::{TrialMetrics, TrialOutcome};

    fn key() -> SweepKey {
        SweepKey {
            run: "a1".into(),
            at: 500,
            evaluation: "eval {}".into(),
            goal: Goal::Minimize,
            metrics: Vec::new(),
            groups: Vec::new(),
            with: None,
            dtype: None,
            form: None,
            with_form: None,
            noise: "off".into(),
        }
    }

    fn sweep() -> Sweep {
        let targets = [0.05, 0.1, 0.15].map(|s| Profile::sigma_rel(s).unwrap());
        let mut sweep = Sweep::new(&targets, Goal::Minimize, 2).unwrap();
        let metrics = TrialMetrics { relative_error: Some(1.0 / 3.0), noise_gain: Some(2.5), seconds: Some(0.1) };
        for (target, outcome) in targets.into_iter().zip([
            TrialOutcome::Score(0.1 + 0.2),
            TrialOutcome::Error("no \"number\"\nat all".into()),
            TrialOutcome::Score(f64::INFINITY),
        ]) {
            sweep.record(target, outcome, metrics);
        }
        sweep
    }

    #[test]
    fn saved_trials_are_read_bit_for_bit() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("deep/sweep");
        let (record, trials) = Record::open(&dir, key()).unwrap();
        assert!(trials.is_empty());
        record.save(&sweep()).unwrap();
        let text = Record::open(&dir, key()).unwrap_err().to_string();
        assert!(text.contains("another sweep is writing here"), "{text}");
        drop(record);
        let (_record, trials) = Record::open(&dir, key()).unwrap();
        assert_eq!(trials, sweep().trials());
        assert_eq!(trials[2].score(), None);
    }

    /// A document of version 1, as older programs wrote it, continues with repeats and is then one of version 2.
    #[test]
    fn plain_document_of_version_1_is_read_and_extended() {
        let temp = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(temp.path(), key()).unwrap();
        let text = r#"{"posthoc_ema_sweep": 1, "run": "a1", "at": 500, "evaluation": "eval {}", "goal": "minimize",
            "dtype": null, "noise": "off", "trials": [{"profile": {"kind": "power", "gamma": 3.5}, "score": 0.25,
            "relative_error": 0.001, "noise_gain": 1.5, "seconds": 2.0, "refined": false}]}"#;
        fs::write(temp.path().join(FILE), text).unwrap();
        drop(record);
        let (record, trials) = Record::open(temp.path(), key()).unwrap();
        let profile = trials[0].profile.clone();
        let mut sweep = Sweep::new(std::slice::from_ref(&profile), Goal::Minimize, 0).unwrap().with_repeats(2);
        sweep.restore(trials);
        assert_eq!((sweep.next(9, &|_| true), sweep.missing(&profile)), (vec![profile.clone()], vec![2]));
        sweep.record_repeat(profile.clone(), 2, Ok(0.75.into()), TrialMetrics::default());
        assert_eq!(sweep.trials()[0].score(), Some(0.5));
        record.save(&sweep).unwrap();
        drop(record);
        let text = fs::read_to_string(temp.path().join(FILE)).unwrap();
        assert!(text.contains("\"posthoc_ema_sweep\": 2"), "{text}");
        let (_record, trials) = Record::open(temp.path(), key()).unwrap();
        assert_eq!(trials, sweep.trials());
    }

    /// A kill while the document is written leaves one.
    #[test]
    fn temporary_files_of_a_killed_sweep_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        Record::open(temp.path(), key()).unwrap().0.save(&sweep()).unwrap();
        // Both names are of another machine: the process that wrote the new file may be alive.
        let [old, new] =
            ["00000000-abcdef", "00000000-ABCDEF"].map(|name| temp.path().join(".posthoc-ema-".to_owned() + name));
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(2 * 24 * 60 * 60);
        fs::File::create(&old).unwrap().set_modified(long_ago).unwrap();
        fs::write(&new, "").unwrap();
        Record::open(temp.path(), key()).unwrap();
        assert!(!old.exists() && new.exists());
    }

    #[test]
    fn sweep_with_other_settings_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        Record::open(temp.path(), key()).unwrap().0.save(&sweep()).unwrap();
        let fid = Metric::parse("fid").unwrap();
        for (other, part) in [
            (SweepKey { run: "b2".into(), ..key() }, "is over another run (a1, and now b2)"),
            (SweepKey { at: 400, ..key() }, "is at another step (500, and now 400)"),
            (SweepKey { evaluation: "true".into(), ..key() }, "has another evaluation (eval {}, and now true)"),
            (SweepKey { metrics: vec![fid], ..key() }, "has other metrics (one number, and now fid:min)"),
            (SweepKey { goal: Goal::Maximize, ..key() }, "has another direction (minimize, and now maximize)"),
            (
                SweepKey { with_form: Some(FormOptions { shard_size: Some(5), ..Default::default() }), ..key() },
                "has another form of the second run (null, and now {\"",
            ),
            (SweepKey { dtype: Some("F16".into()), ..key() }, "has another dtype (the model's, and now F16)"),
        ] {
            let text = Record::open(temp.path(), other).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains("sweep.json"), "{text}");
        }
        Record::open(temp.path(), key()).unwrap();
    }

    #[test]
    fn directory_with_files_of_others_is_refused() {
        for (name, part) in [
            ("best.safetensors", "would replace best.safetensors"),
            ("candidates/mine", "would replace candidates"),
            ("evaluating/mine", "would replace evaluating"),
            (STATE_FILE, "sweep elsewhere"),
            ("0.50.safetensors", "it holds 0.50.safetensors"),
            ("0.50-00001-of-00002.safetensors", "sweep elsewhere"),
        ] {
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "mine").unwrap();
            let before = fs::read_dir(temp.path()).unwrap().count();
            let text = Record::open(temp.path(), key()).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
            assert_eq!(
                (fs::read_dir(temp.path()).unwrap().count(), fs::read(&path).unwrap()),
                (before, b"mine".into())
            );
        }
        // Other files do not matter. A sweep without trials may be replaced by one with another key.
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("notes"), "").unwrap();
        drop(Record::open(temp.path(), SweepKey { at: 400, ..key() }).unwrap());
        fs::write(temp.path().join("best.safetensors"), "").unwrap();
        Record::open(temp.path(), key()).unwrap();
    }

    #[test]
    fn damaged_document_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join(FILE);
        Record::open(temp.path(), key()).unwrap().0.save(&sweep()).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for (text, part) in [
            (good[..good.len() / 2].to_owned(), "not the record of a sweep"),
            ("{}".into(), "posthoc_ema_sweep"),
            (good.replace("\"posthoc_ema_sweep\": 1", "\"posthoc_ema_sweep\": 3"), "its version is 3"),
            (good.replace("\"trials\"", "\"trails\""), "missing field `trials`"),
            (good.replace("\"gamma\": ", "\"gamma\": -"), "gamma = -"),
        ] {
            fs::write(&path, text).unwrap();
            let text = Record::open(temp.path(), key()).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains("sweep.json"), "{text}");
        }
    }
}
