//! Checkpoints of other tools, written as a run: the averages as they are, with the chain that the tool really computed.
//!
//! pytorch-posthoc-ema, ema-pytorch and nitrous-ema apply one step's decay once every `update_every` steps and then
//! synthesize as if it had been applied at every step. What they stored is a sound average all the same, of a profile that
//! follows from their decays ([`Chain::Counter`]); solved with that profile, it gives the averages asked for.

mod clock;
mod copied;
mod layout;
mod listing;
mod plan;
mod target;
mod write;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::math::{Chain, Profile};

use clock::Clock;

/// A tool whose checkpoints can be imported.
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

    /// The name of the package.
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
        let known = || Tool::ALL.map(Tool::name).join(", ");
        Tool::ALL.into_iter().find(|tool| tool.name() == text).ok_or_else(|| format!("the tools are {}", known()))
    }
}

/// How the checkpoints of another tool came about, which the files do not tell.
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
    /// The tool that wrote them.
    pub from: Tool,
    /// The power-function profiles that it tracked, in its order.
    pub profiles: Vec<Profile>,
    /// Its steps between updates.
    pub update_every: u64,
    /// Its step before which there was no update: an option of pytorch-posthoc-ema since 1.0.8. Where it is not given it
    /// is 100, as it is there, and 0 for files of 1.0.5 and before, which are laid out differently; those of 1.0.6 and 1.0.7
    /// look like the later ones and want an explicit 0.
    pub update_after_step: Option<u64>,
    /// Whether nitrous-ema corrected its decays for the steps between updates.
    pub step_size_correction: bool,
}

/// What was imported.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportReport {
    /// How many snapshots were written.
    pub snapshots: usize,
    /// Their steps, in order: the time of the last update that each contains, often before the step in the file's name.
    pub steps: Vec<u64>,
    /// The profiles, by their index within the run.
    pub profiles: Vec<Profile>,
    /// The size of all files written.
    pub bytes: u64,
    /// What is worth knowing about the files, in words.
    pub warnings: Vec<String>,
}

impl Import {
    /// An import of files that were made with the tool's defaults in all else.
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

    /// Reads the checkpoints in `source` and writes a run to `target`, which is a directory that is empty or missing.
    ///
    /// Everything but the values of averages is checked before the first byte is written. The run appears whole, with its
    /// directory: it is written to a hidden one beside it (`.posthoc-ema-import-*`, which a killed import leaves and the next one removes) and
    /// renamed. After an error nothing is left behind. The source is only read, no code that a file may name is ever
    /// run, and an entry that is an object is refused. At most one checkpoint is held in memory. `progress` is called with
    /// the bytes of tensors that were read for the run since the last call, from any thread.
    ///
    /// Tensors keep their dtypes, but for `num_batches_tracked`: where a tool has rounded it to floating point, it becomes
    /// a whole number again. A tensor that changes, but is alike for all profiles at every step after the first update, was
    /// copied by the tool: so it is marked, and a synthesis takes the newest. So are infinite constants, and whole ones
    /// that 16 bits have rounded. A constant of NaN is left out. Each of them is a warning.
    ///
    /// # Errors
    /// [`Error::Setting`] as [`Import::check`]; [`Error::Unexpected`] for checkpoints that contradict the options or hold
    /// what is no average, [`Error::Mismatch`] for those of another model, [`Error::Damaged`] for what PyTorch did not
    /// write; [`Error::RunExists`] for a target that holds a run, and [`Error::Unexpected`] for one that holds anything
    /// else; [`Error::Io`].
    pub fn write(
        &self,
        source: impl AsRef<Path>,
        target: impl AsRef<Path>,
        progress: Option<&(dyn Fn(u64) + Sync)>,
    ) -> Result<ImportReport> {
        self.check()?;
        let (source, target) = (source.as_ref(), target.as_ref());
        target::check(source, target)?;
        let plan = plan::Plan::new(self, source)?;
        write::write(&plan, target, progress.unwrap_or(&|_| ()))
    }

    /// The chain of a profile.
    fn chain(&self, profile: &Profile) -> Chain {
        // Only power functions pass the check.
        let gamma = profile.as_gamma().unwrap_or_default();
        let (stride, offset) = (self.update_every, clock::OFFSET);
        match self.step_size_correction {
            true => Chain::CorrectedCounter { gamma, stride, offset },
            false => Chain::Counter { gamma, stride, offset },
        }
    }

    /// The clock of checkpoints in this layout.
    fn clock(&self, layout: layout::Layout) -> Clock {
        let default = match (self.from, layout) {
            (Tool::PytorchPosthocEma, layout::Layout::Plain) => 100,
            _ => 0,
        };
        let after = self.update_after_step.unwrap_or(default);
        Clock { first: after.max(1), every: self.update_every }
    }
}

#[cfg(test)]
pub(crate) mod tests;
