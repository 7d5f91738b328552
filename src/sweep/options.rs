//! Options and result of a sweep over a run.

use std::path::{Path, PathBuf};

use super::folders;
use super::joint::SweepLine;
use super::observer::Observer;
use super::search::Sweep;
use super::trial::{Goal, Metric, Trial};
use crate::device::Device;
use crate::error::Result;
use crate::math::Profile;
use crate::output::OutputForm;
use crate::planning::{At, Noise};
use crate::run::Run;
use crate::synthesis::{Output, WriteOptions};
use crate::tensor::Dtype;

/// Default number of averages in one pass: the most that a pass allows.
const BATCH: usize = 256;

/// Default number of refinement steps. They narrow an evenly spaced list about twentyfold.
const REFINE: usize = 6;

/// Default number of turns of a joint sweep.
const ROUNDS: usize = 2;

/// Options of [`Run::sweep`](crate::Run::sweep).
#[derive(Clone)]
pub struct SweepOptions<'a> {
    /// Directory of the sweep, outside the run's. It is created if it is missing. An earlier sweep in it continues.
    pub dir: &'a Path,
    /// Targets to evaluate first, in any mixture of families.
    pub targets: &'a [Profile],
    /// Time of the targets.
    pub at: At,
    /// Name of the evaluation. A directory holds the scores of one evaluation only.
    pub evaluation: &'a str,
    /// Direction in which scores are better, if `metrics` is empty.
    pub goal: Goal,
    /// Metrics of each evaluation, in the order of its values; empty for one number. Each has its own best, which is
    /// refined by itself. `best.safetensors` is the best by the first one, `best-NAME.safetensors` that by another.
    pub metrics: &'a [Metric],
    /// Globs of tensor names: each group has a length of its own, and so have the other tensors. All begin with the
    /// same one; then one is varied at a time. Empty for one length.
    pub groups: &'a [String],
    /// Second run, such as that of a guiding model. Its averages have a length of their own, as a group has one, and
    /// are those of its newest snapshot.
    pub with: Option<&'a Run>,
    /// Number of times that each length of a joint sweep is varied at most, for each metric.
    pub rounds: usize,
    /// Number of times that each average is evaluated.
    pub repeats: u32,
    /// Number of golden-section steps around the best target. At an edge of the list they go outwards first, as far
    /// as the run makes averages with a relative error of at most 5%.
    pub refine: usize,
    /// Number of averages that are synthesized in one pass, and so are on the disk at a time.
    pub batch: usize,
    /// Treatment of the snapshots' rounding.
    pub noise: Noise,
    /// Dtype of averaged tensors; `None` for the model's own.
    pub dtype: Option<Dtype>,
    /// Form of the averages: they may be folders that the model's own library loads. The best is then the folder
    /// `best`.
    pub form: Option<&'a OutputForm>,
    /// Form of the second run's averages; `None` for plain files.
    pub with_form: Option<&'a OutputForm>,
    /// Device that blends them.
    pub device: Device,
    /// Keeps every average in the folder `candidates` of the directory, instead of the best one only.
    pub keep_all: bool,
    /// Receives the progress.
    pub observer: &'a dyn Observer,
}

impl<'a> SweepOptions<'a> {
    /// Minimizes the score over `targets` at the newest snapshot, with 6 steps of refinement.
    pub fn new(dir: &'a Path, targets: &'a [Profile]) -> SweepOptions<'a> {
        SweepOptions {
            dir,
            targets,
            at: At::Latest,
            evaluation: "",
            goal: Goal::Minimize,
            metrics: &[],
            groups: &[],
            with: None,
            rounds: ROUNDS,
            repeats: 1,
            refine: REFINE,
            batch: BATCH,
            noise: Noise::Off,
            dtype: None,
            form: None,
            with_form: None,
            device: Device::Cpu,
            keep_all: false,
            observer: &(),
        }
    }
}

impl SweepOptions<'_> {
    /// Returns true if averages are folders.
    pub(super) fn are_folders(&self) -> bool {
        self.form.is_some_and(OutputForm::is_folder)
    }

    /// Writes averages of a run, in the place of earlier ones of the same targets.
    pub(super) fn write(&self, run: &Run, outputs: &[Output<'_>], form: Option<&OutputForm>) -> Result<()> {
        let progress = |bytes| self.observer.read(bytes);
        let write = WriteOptions { dtype: self.dtype, device: self.device, progress: Some(&progress) };
        let Some(form) = form else { return run.write_all(outputs, &write).map(drop) };
        if form.is_folder() {
            // A file would be replaced.
            outputs.iter().try_for_each(|output| folders::remove(output.path))?;
        }
        run.write_as(outputs, form, &write).map(drop)
    }
}

/// Result of [`Run::sweep`](crate::Run::sweep).
#[derive(Clone, Debug)]
pub struct SweepResult {
    /// All trials, including those of earlier calls. [`Sweep::best`] returns the best one. Of a joint sweep, those of
    /// the last length that was varied.
    pub sweep: Sweep,
    /// All trials of a joint sweep, or of a plain one.
    pub trials: Vec<Trial>,
    /// Best trial by each metric, with the targets of its groups. Empty if no evaluation succeeded.
    pub best_trials: Vec<Trial>,
    /// Trials that no other one beats: none is as good in all metrics, and better in one.
    pub unbeaten: Vec<Trial>,
    /// Last sweep along each length of a joint sweep, by metric; empty for a plain one.
    pub lines: Vec<SweepLine>,
    /// False if the turns of a joint sweep ended before the lengths settled.
    pub settled: bool,
    /// Safetensors file or folder of the best average by each metric. Empty if no evaluation succeeded.
    pub best: Vec<PathBuf>,
    /// Files or folders of the second run that go with them. Empty without a second run.
    pub best_with: Vec<PathBuf>,
    /// Time of the targets.
    pub at: u64,
    /// True at an edge of the evaluated lengths beyond which the run makes no average with a relative error of at most
    /// 5%.
    pub at_limit: bool,
    /// Number of evaluations in this call.
    pub evaluated: usize,
}
