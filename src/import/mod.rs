//! Import of other tools' checkpoints: the averages as they are, with the chain that the tool really computed.
//!
//! pytorch-posthoc-ema, ema-pytorch and nitrous-ema apply one step's decay once every `update_every` steps and then
//! synthesize as if it had been applied at every step. Their files still hold sound averages, of a profile that follows
//! from their decays ([`Chain::Counter`]). A solve with that profile gives the averages asked for.

mod averages;
mod clock;
mod copied;
mod counters;
mod layout;
mod listing;
mod messages;
mod plan;
mod planned;
mod snapshots;
mod target;
mod tensors;
mod write;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::fs::start_threads;
use crate::math::{Chain, Profile};

pub use averages::{AverageDecay, FoundAverages, ImportAverages};
use clock::Clock;
use layout::CheckpointLayout;

/// Tool whose checkpoints can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// pytorch-posthoc-ema, all versions up to 1.0.10.
    PytorchPosthocEma,
    /// ema-pytorch's `PostHocEMA`.
    EmaPytorch,
    /// nitrous-ema.
    NitrousEma,
}

impl Tool {
    const ALL: [Tool; 3] = [Tool::PytorchPosthocEma, Tool::EmaPytorch, Tool::NitrousEma];

    /// Returns the name of the package.
    pub fn name(self) -> &'static str {
        match self {
            Tool::PytorchPosthocEma => "pytorch-posthoc-ema",
            Tool::EmaPytorch => "ema-pytorch",
            Tool::NitrousEma => "nitrous-ema",
        }
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tool {
    type Err = String;

    fn from_str(text: &str) -> Result<Tool, String> {
        let known = Tool::ALL.into_iter().find(|tool| tool.name() == text);
        known.ok_or_else(|| format!("the tools are {}", Tool::ALL.map(Tool::name).join(", ")))
    }
}

/// Options of a training with another tool, which its files do not record.
///
/// ```no_run
/// use posthoc_ema::{Import, Profile, Tool};
///
/// let profiles = vec![Profile::sigma_rel(0.05)?, Profile::sigma_rel(0.28)?];
/// let imported = Import::new(Tool::PytorchPosthocEma, profiles, 10).write("checkpoints", "runs/ema", None)?;
/// println!("{} snapshots", imported.snapshots);
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Import {
    /// Tool that wrote the checkpoints.
    pub from: Tool,
    /// Power-function profiles that it tracked, in its order.
    pub profiles: Vec<Profile>,
    /// Steps between its updates.
    pub update_every: u64,
    /// Step before which the tool makes no update: an option of pytorch-posthoc-ema since 1.0.8.
    ///
    /// The default is the tool's: 100, or 0 for files of 1.0.5 and before, which have another layout. Files of 1.0.6
    /// and 1.0.7 look like later ones and need an explicit 0.
    pub update_after_step: Option<u64>,
    /// True if nitrous-ema corrected its decays for the steps between updates.
    pub step_size_correction: bool,
}

/// Summary of an import.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportReport {
    /// Number of snapshots written.
    pub snapshots: usize,
    /// Steps of the snapshots, in order.
    ///
    /// Each is the time of the last update that the snapshot contains, often before the step in the file's name.
    pub steps: Vec<u64>,
    /// Profiles, by their index within the run.
    pub profiles: Vec<Profile>,
    /// Size of all files written, in bytes.
    pub bytes: u64,
    /// Findings in the files that a user should know.
    pub warnings: Vec<String>,
}

impl Import {
    /// Creates an import of files that were written with the tool's defaults for all other options.
    pub fn new(from: Tool, profiles: Vec<Profile>, update_every: u64) -> Import {
        Import { from, profiles, update_every, update_after_step: None, step_size_correction: false }
    }

    /// Checks that the options make sense together.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<()> {
        let fail = |option, reason: String| Err(Error::Setting { option, reason });
        if self.profiles.is_empty() {
            return fail("profiles", "none is given: name those that the tool tracked, in its order".into());
        }
        for (i, profile) in self.profiles.iter().enumerate() {
            if profile.as_gamma().is_none() {
                return fail("profiles", format!("{profile}: the tools track power-function profiles only"));
            }
            if self.profiles[..i].contains(profile) {
                return fail("profiles", format!("{profile} is given twice: each file belongs to one of them"));
            }
        }
        if self.update_every == 0 {
            return fail("update_every", "0: give the steps between updates that the training used".into());
        }
        if self.update_after_step.is_some() && self.from != Tool::PytorchPosthocEma {
            return fail("update_after_step", format!("{} has no such option: leave it out", self.from));
        }
        if self.step_size_correction && self.from != Tool::NitrousEma {
            return fail("step_size_correction", format!("{} has no such option: leave it out", self.from));
        }
        Ok(())
    }

    /// Reads the checkpoints in `source` and writes a run to `target`, a directory that is empty or missing.
    ///
    /// Everything but the values of averages is checked before the first byte is written. The run is written to a
    /// hidden directory beside it (`.posthoc-ema-import-*`) and appears whole, by a rename. An error leaves nothing
    /// behind; what a killed import leaves, the next one removes. The elements are read as they are written. `progress`
    /// is called from any thread, with the bytes of tensors read for the run since the last call.
    ///
    /// The source is only read. Code that a file may name is never run: an entry that is an object is an error.
    ///
    /// Tensors keep their dtypes, except for `num_batches_tracked`: if a tool rounded it to floating point, it becomes
    /// a whole number again. These tensors are not averages, and each gives a warning:
    ///
    /// - A tensor that changes, but is alike for all profiles at every step after the first update, was copied by the
    ///   tool. It is marked as copied, so that a synthesis takes the newest.
    /// - Infinite constants, and whole constants that were rounded to 16 bits, are marked as copied, too.
    /// - Constants with NaN are left out.
    ///
    /// # Errors
    /// [`Error::Setting`] as [`Import::check`]; [`Error::Unexpected`] for checkpoints that contradict the options or
    /// hold a value that is not finite in an average; [`Error::Mismatch`] for checkpoints of different models;
    /// [`Error::Damaged`] for files that PyTorch did not write; [`Error::RunExists`] for a target that holds a run, and
    /// [`Error::Unexpected`] for one that holds anything else; [`Error::Io`]; [`Error::Threads`].
    pub fn write(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
        progress: Option<&(dyn Fn(u64) + Sync)>,
    ) -> Result<ImportReport> {
        self.check()?;
        start_threads()?;
        let source = source.as_ref();
        let target = target.as_ref();
        target::check(source, target)?;
        let plan = plan::ImportPlan::new(self, source)?;
        write::write(&plan, target, progress.unwrap_or(&|_| ()))
    }

    /// Returns the chain that the tool computed for a profile.
    fn chain(&self, profile: &Profile) -> Chain {
        // Only power functions pass the check.
        let gamma = profile.as_gamma().unwrap_or_default();
        let stride = self.update_every;
        let offset = clock::OFFSET;
        if self.step_size_correction {
            Chain::CorrectedCounter { gamma, stride, offset }
        } else {
            Chain::Counter { gamma, stride, offset }
        }
    }

    /// Returns the clock of checkpoints with this layout.
    fn clock(&self, layout: CheckpointLayout) -> Clock {
        let default = match (self.from, layout) {
            (Tool::PytorchPosthocEma, CheckpointLayout::Plain) => 100,
            _ => 0,
        };
        let after = self.update_after_step.unwrap_or(default);
        Clock { first: after.max(1), every: self.update_every }
    }
}

#[cfg(test)]
pub(crate) mod tests;
