//! Import of averages that a training loop kept itself: any series of files that hold an EMA of a known decay.
//!
//! An EMA of constant decay weighs the parameters of step `t` by `(1-beta) beta^(T-t)`, and the initial ones by
//! `beta^T`. A snapshot stores the rule of its decays ([`EmaChain`]), so the solve knows its weights exactly.

mod clock;
mod copied;
mod diffusers;
mod edm2;
mod files;
mod found;
mod lightning;
mod openai;
mod plan;
mod recorded_decay;
mod search;
mod steps;
mod write;

use std::path::Path;

use super::{ImportReport, target};
use crate::error::{Error, Result};
use crate::fs::start_threads;
use crate::math::{EmaDecay, Profile};

use plan::AveragesPlan;

/// Decay of an average that a training loop kept.
#[derive(Clone, Debug, PartialEq)]
pub enum AverageDecay {
    /// EMA of constant decay per update, or with a ramp.
    Ema(EmaDecay),
    /// Power-function profile, by its decay at each update.
    Power(Profile),
}

/// Options of an import of averages that a training loop kept.
///
/// ```no_run
/// use posthoc_ema::{AverageDecay, EmaDecay, ImportAverages};
///
/// let decays = vec![AverageDecay::Ema(EmaDecay::constant(0.9999))];
/// let averages = ImportAverages { decays, update_every: Some(1), ..Default::default() };
/// let report = averages.open("output/checkpoints")?.write("runs/ema", None)?;
/// println!("{} snapshots", report.snapshots);
/// # Ok::<(), posthoc_ema::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImportAverages {
    /// Entries of the files that hold the averages, or folders of this name in the checkpoints' folders.
    ///
    /// By default, those of timm, torchvision, Lightning, ultralytics, diffusers, OpenAI and EDM2 are found, and the
    /// only entry that holds weights or is called an average.
    pub keys: Vec<String>,
    /// Decay of each average, in the order of `keys`. None are given if the files record them: those of diffusers do,
    /// those of EDM2 and OpenAI in their names, and those of trainings that store their arguments with the decay.
    pub decays: Vec<AverageDecay>,
    /// Entry, or folder, of the raw weights, which join as averages of their own step.
    ///
    /// By default, those of timm, torchvision, Lightning, OpenAI and diffusers are found if `keys` is empty.
    pub raw: Option<String>,
    /// Steps between the updates of the averages. The default is 1 for files of a known layout.
    pub update_every: Option<u64>,
    /// Last step before the first update: the average begins as a copy of the weights one step later.
    ///
    /// By default the average began with the initial weights; in the files of tools that copy the weights at step 1,
    /// with those.
    pub update_after_step: Option<u64>,
    /// Steps of the checkpoints, in the order of their names; by default they are read.
    pub steps: Option<Vec<u64>>,
    /// Tensors that were copied instead of averaged: names or globs.
    pub copy: Vec<String>,
    /// Tensors to leave out: names or globs.
    pub leave_out: Vec<String>,
    /// Settings of `config.json` in which the checkpoints may differ: keys, joined by dots, or globs.
    pub ignore_config: Vec<String>,
}

/// Averages that were found, opened and checked against each other and against the options.
#[derive(Debug)]
pub struct FoundAverages(AveragesPlan);

impl ImportAverages {
    /// Checks that the options make sense together.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<()> {
        let fail = |option, reason: String| Err(Error::Setting { option, reason });
        for decay in &self.decays {
            match decay {
                AverageDecay::Ema(decay) => decay.check().or_else(|why| fail("beta", why))?,
                AverageDecay::Power(profile) if profile.as_gamma().is_none() => {
                    return fail(
                        "sigma_rels",
                        format!("{profile}: not a power-function profile; use the option of it"),
                    );
                }
                AverageDecay::Power(_) => {}
            }
        }
        if self.update_every == Some(0) {
            return fail("update_every", "0: give the steps between updates that the training used".into());
        }
        if !self.keys.is_empty() && !self.decays.is_empty() && self.keys.len() != self.decays.len() {
            let (keys, decays) = (self.keys.len(), self.decays.len());
            return fail("key", format!("{keys} averages are named and {decays} decays are given: give one for each"));
        }
        let mut all: Vec<&String> = self.keys.iter().chain(&self.raw).collect();
        all.sort();
        if let Some(twice) = all.windows(2).find(|pair| pair[0] == pair[1]) {
            return fail("key", format!("`{}` is named twice: each entry is one average", twice[0]));
        }
        Ok(())
    }

    /// Opens the averages in a folder: files, folders, or distributed checkpoints, as
    /// [`Checkpoints::open`](crate::Checkpoints::open) reads them.
    ///
    /// Files without a number in their name, such as `last.ckpt`, are left out if others have one.
    ///
    /// # Errors
    /// [`Error::Setting`] for options that are missing or contradict the files; [`Error::Unexpected`] for files that
    /// contradict each other or are before the first update; and those of
    /// [`Checkpoints::open_with`](crate::Checkpoints::open_with).
    pub fn open(&self, source: impl AsRef<Path>) -> Result<FoundAverages> {
        self.check()?;
        start_threads()?;
        let found = search::find(self, source.as_ref())?;
        AveragesPlan::new(self, source.as_ref(), found).map(FoundAverages)
    }
}

impl FoundAverages {
    /// Returns the bytes that [`FoundAverages::write`] reads.
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Returns how the files were read.
    pub fn notes(&self) -> &[String] {
        &self.0.notes
    }

    /// Writes a run to `target`, a directory that is empty or missing, as [`Import::write`](crate::Import::write) does.
    ///
    /// Tensors keep their dtypes. One that is alike in all averages and the raw weights of each step, but changes from
    /// step to step, was copied by the training and is marked as copied. Infinities that all averages share, as in a
    /// mask, stay. The elements are read from the mapped files as they are written, a few blocks at a time.
    /// `progress` is called from any thread, with the bytes written since the last call.
    ///
    /// # Errors
    /// [`Error::RunExists`] for a target that holds a run, and [`Error::Unexpected`] for one that holds anything else,
    /// or for NaN or an infinity of its own in an average; [`Error::Io`].
    pub fn write(&self, target: impl AsRef<Path>, progress: Option<&(dyn Fn(u64) + Sync)>) -> Result<ImportReport> {
        target::check(&self.0.source, target.as_ref())?;
        write::write(&self.0, target.as_ref(), progress.unwrap_or(&|_| ()))
    }
}

#[cfg(test)]
mod tests;
