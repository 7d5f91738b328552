//! A sweep's directory: its trials in `sweep.json`, written anew after each.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::candidates::{BEST, FOLDER};
use super::run::SweepOptions;
use super::search::{Goal, Sweep, Trial};
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, Lock, find_document};

use crate::run::Run;
use crate::snapshot::{STATE_FILE, any_snapshot_file};

/// The name of the document.
const FILE: &str = "sweep.json";

/// The version of the document.
const VERSION: u32 = 1;

/// What a sweep asks; two sweeps that differ in it do not share scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SweepKey {
    /// The run: its id, or its directory where the snapshots have none.
    pub run: String,
    /// The time of the targets.
    pub at: u64,
    /// The evaluation: a command, or the name of a function.
    pub evaluation: String,
    /// Which scores are better.
    pub goal: Goal,
    /// The dtype of averaged tensors; none for the model's own.
    pub dtype: Option<String>,
    /// What is done about the snapshots' rounding, as [`Noise`](crate::Noise) is written.
    pub noise: String,
}

/// The directory of a sweep, locked as long as this lives.
#[derive(Debug)]
pub struct Record {
    dir: PathBuf,
    question: SweepKey,
    _lock: Lock,
}

/// The document as it is read.
#[derive(Deserialize)]
struct Stored {
    #[serde(flatten)]
    question: SweepKey,
    trials: Vec<Trial>,
}

/// The document as it is written.
#[derive(Serialize)]
struct Document<'a> {
    posthoc_ema_sweep: u32,
    #[serde(flatten)]
    question: &'a SweepKey,
    trials: &'a [Trial],
}

/// The part that tells whether the rest can be understood.
#[derive(Deserialize)]
struct Version {
    posthoc_ema_sweep: u32,
}

impl Record {
    /// Opens a sweep's directory, which is made where it is missing, and gives the trials of the sweep that was begun there.
    /// The document is written at once, and tells from then on whose directory it is.
    ///
    /// # Errors
    /// [`Error::Unexpected`] where the directory belongs to another sweep or is in use by one, or without a document holds
    /// what a sweep would replace, or a run; [`Error::Damaged`] for a document that cannot be understood, [`Error::Io`].
    pub fn open(dir: &Path, question: SweepKey) -> Result<(Record, Vec<Trial>)> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        // An evaluation may change the directory of its process.
        let dir = &std::path::absolute(dir).map_err(Error::io("read", dir))?;
        check_own(dir)?;
        let lock = Lock::acquire(dir).map_err(|error| match error {
            Error::Locked { path } => {
                Error::unexpected(&path, "another sweep is writing here: wait for it, or choose another directory")
            }
            other => other,
        })?;
        let path = dir.join(FILE);
        let trials = find_document(&path)?.map_or(Ok(Vec::new()), |text| read(&path, &text, &question))?;
        let record = Record { dir: dir.to_owned(), question, _lock: lock };
        if trials.is_empty() {
            record.write(&trials)?;
        }
        Ok((record, trials))
    }

    /// The directory, as an absolute path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes the document anew, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, sweep: &Sweep) -> Result<()> {
        self.write(sweep.trials())
    }

    fn write(&self, trials: &[Trial]) -> Result<()> {
        let document = Document { posthoc_ema_sweep: VERSION, question: &self.question, trials };
        let path = self.dir.join(FILE);
        let text = serde_json::to_string_pretty(&document).map_err(|e| Error::unexpected(&path, e.to_string()))?;
        let file = AtomicFile::create(&path)?;
        file.write_at(0, text.as_bytes())?;
        file.commit()
    }
}

impl SweepKey {
    /// What a sweep over a run asks.
    pub fn new(run: &Run, at: u64, options: &SweepOptions<'_>) -> SweepKey {
        SweepKey {
            run: identity(run),
            at,
            evaluation: options.evaluation.to_owned(),
            goal: options.goal,
            dtype: options.dtype.map(|dtype| dtype.to_string()),
            noise: options.noise.to_string(),
        }
    }

    /// The first difference from another, as text that goes on after "the sweep here".
    fn difference(&self, stored: &SweepKey) -> Option<String> {
        let dtype = |question: &SweepKey| question.dtype.clone().unwrap_or_else(|| "the model's".into());
        let parts = [
            ("is over another run", self.run.clone(), stored.run.clone()),
            ("is at another step", self.at.to_string(), stored.at.to_string()),
            ("has another evaluation", self.evaluation.clone(), stored.evaluation.clone()),
            ("has another direction", self.goal.to_string(), stored.goal.to_string()),
            ("has another dtype", dtype(self), dtype(stored)),
            ("has another regularisation", self.noise.clone(), stored.noise.clone()),
        ];
        let (what, now, then) = parts.into_iter().find(|(_, now, then)| now != then)?;
        Some(format!("{what} ({then}, and now {now})"))
    }
}

/// What a sweep knows a run by: the id that was drawn when it began, or its directory where the snapshots have none.
pub fn identity(run: &Run) -> String {
    let id = run.snapshots().iter().find_map(|snapshot| snapshot.meta.run.clone());
    let dir = || run.dir().canonicalize().unwrap_or_else(|_| run.dir().to_owned());
    id.unwrap_or_else(|| dir().display().to_string())
}

/// Refuses a directory that no sweep began and that holds what is not a sweep's.
fn check_own(dir: &Path) -> Result<()> {
    if dir.join(FILE).exists() {
        return Ok(());
    }
    let filled = |name: &&str| dir.join(name).read_dir().is_ok_and(|mut entries| entries.next().is_some());
    let run = || dir.join(STATE_FILE).exists().then(|| STATE_FILE.to_owned());
    if let Some(found) = run().map_or_else(|| any_snapshot_file(dir), |found| Ok(Some(found)))? {
        let why = format!("it holds {found}, and a run's directory holds nothing but its snapshots: sweep elsewhere");
        return Err(Error::unexpected(dir, why));
    }
    let best = dir.join(BEST).symlink_metadata().is_ok().then_some(BEST);
    match best.or_else(|| Some(FOLDER).filter(filled)) {
        None => Ok(()),
        Some(found) => {
            let why = format!("no sweep was begun here ({FILE} is missing), and one would replace {found}");
            Err(Error::unexpected(dir, format!("{why}: move that away, or choose another directory")))
        }
    }
}

fn read(path: &Path, text: &[u8], question: &SweepKey) -> Result<Vec<Trial>> {
    let damaged = |error: serde_json::Error| Error::damaged(path, format!("it is no record of a sweep: {error}"));
    let version: Version = serde_json::from_slice(text).map_err(damaged)?;
    if version.posthoc_ema_sweep != VERSION {
        let why = format!("its version is {}, and this program reads {VERSION}", version.posthoc_ema_sweep);
        return Err(Error::unexpected(path, format!("{why}: use a newer program, or choose another directory")));
    }
    let stored: Stored = serde_json::from_slice(text).map_err(damaged)?;
    // Nothing is lost or mixed where nothing was evaluated.
    if let Some(difference) = question.difference(&stored.question).filter(|_| !stored.trials.is_empty()) {
        let remedy = "go on as it was begun, or choose another directory";
        return Err(Error::unexpected(path, format!("the sweep here {difference}: {remedy}")));
    }
    Ok(stored.trials)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::Profile;
    use crate::sweep::{Outcome, TrialMetrics};

    fn question() -> SweepKey {
        SweepKey {
            run: "a1".into(),
            at: 500,
            evaluation: "eval {}".into(),
            goal: Goal::Minimize,
            dtype: None,
            noise: "off".into(),
        }
    }

    fn sweep() -> Sweep {
        let targets = [0.05, 0.1, 0.15].map(|s| Profile::sigma_rel(s).unwrap());
        let mut sweep = Sweep::new(&targets, Goal::Minimize, 2).unwrap();
        let figures = TrialMetrics { relative_error: Some(1.0 / 3.0), noise_gain: Some(2.5), seconds: Some(0.1) };
        for (target, outcome) in targets.into_iter().zip([
            Outcome::Score(0.1 + 0.2),
            Outcome::Error("no \"number\"\nat all".into()),
            Outcome::Score(f64::INFINITY),
        ]) {
            sweep.record(target, outcome, figures);
        }
        sweep
    }

    #[test]
    fn what_is_saved_is_read_to_the_last_bit() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("deep/sweep");
        let (record, trials) = Record::open(&dir, question()).unwrap();
        assert!(trials.is_empty());
        record.save(&sweep()).unwrap();
        let text = Record::open(&dir, question()).unwrap_err().to_string();
        assert!(text.contains("another sweep is writing here"), "{text}");
        drop(record);
        let (_record, trials) = Record::open(&dir, question()).unwrap();
        assert_eq!(trials, sweep().trials());
        assert_eq!(trials[2].score(), None);
    }

    #[test]
    fn another_sweep_is_told_from_this_one_by_what_differs() {
        let temp = tempfile::tempdir().unwrap();
        Record::open(temp.path(), question()).unwrap().0.save(&sweep()).unwrap();
        for (other, part) in [
            (SweepKey { run: "b2".into(), ..question() }, "is over another run (a1, and now b2)"),
            (SweepKey { at: 400, ..question() }, "is at another step (500, and now 400)"),
            (SweepKey { evaluation: "true".into(), ..question() }, "has another evaluation (eval {}, and now true)"),
            (SweepKey { goal: Goal::Maximize, ..question() }, "has another direction (minimize, and now maximize)"),
            (SweepKey { dtype: Some("F16".into()), ..question() }, "has another dtype (the model's, and now F16)"),
        ] {
            let text = Record::open(temp.path(), other).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains("sweep.json"), "{text}");
        }
        Record::open(temp.path(), question()).unwrap();
    }

    #[test]
    fn a_directory_that_no_sweep_began_is_refused_where_it_holds_what_is_not_a_sweeps() {
        for (name, part) in [
            (BEST, "would replace best.safetensors"),
            ("candidates/mine", "would replace candidates"),
            (STATE_FILE, "sweep elsewhere"),
            ("0.50.safetensors", "it holds 0.50.safetensors"),
            ("0.50-00001-of-00002.safetensors", "sweep elsewhere"),
        ] {
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "mine").unwrap();
            let before = fs::read_dir(temp.path()).unwrap().count();
            let text = Record::open(temp.path(), question()).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
            assert_eq!(
                (fs::read_dir(temp.path()).unwrap().count(), fs::read(&path).unwrap()),
                (before, b"mine".into())
            );
        }
        // Other files do not matter; and what was begun goes on, with another question as long as nothing was evaluated.
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("notes"), "").unwrap();
        drop(Record::open(temp.path(), SweepKey { at: 400, ..question() }).unwrap());
        fs::write(temp.path().join(BEST), "").unwrap();
        Record::open(temp.path(), question()).unwrap();
    }

    #[test]
    fn a_document_that_makes_no_sense_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join(FILE);
        Record::open(temp.path(), question()).unwrap().0.save(&sweep()).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for (text, part) in [
            (good[..good.len() / 2].to_owned(), "no record of a sweep"),
            ("{}".into(), "posthoc_ema_sweep"),
            (good.replace("\"posthoc_ema_sweep\": 1", "\"posthoc_ema_sweep\": 2"), "its version is 2"),
            (good.replace("\"trials\"", "\"trails\""), "missing field `trials`"),
            (good.replace("\"gamma\": ", "\"gamma\": -"), "gamma = -"),
        ] {
            fs::write(&path, text).unwrap();
            let text = Record::open(temp.path(), question()).unwrap_err().to_string();
            assert!(text.contains(part) && text.contains("sweep.json"), "{text}");
        }
    }
}
