//! Pass of one part over several averages.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::file_plan::FilePlan;
use super::part_folder::{PartState, PartTarget, is_gone};
use crate::device::Device;
use crate::error::Result;
use crate::synthesis::{OutputFile, OutputPart};

/// Number of attempts of a pass: other processes may finish an average that this one is writing to.
const ATTEMPTS: usize = 3;

/// Outcome of one part of a synthesis.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartOutcome {
    /// Device that blended; `None` if the part had been written before.
    pub device: Option<Device>,
    /// Parts that are not complete yet, from 1. If there are none, the averages have their names.
    pub missing: Vec<usize>,
}

impl PartOutcome {
    /// Joins the outcome of another pass.
    pub(crate) fn join(&mut self, other: PartOutcome) {
        self.device = other.device.or(self.device);
        let missing: BTreeSet<usize> = self.missing.iter().chain(&other.missing).copied().collect();
        self.missing = missing.into_iter().collect();
    }
}

/// Average whose part is blended: its index among the targets, its files, and the weights of its sources.
pub(crate) struct PendingPart {
    pub target: usize,
    pub files: Vec<OutputFile>,
    pub weights: Vec<f64>,
}

impl FilePlan {
    /// Writes a part of averages in one pass. Averages of which it was written before are left out. `blend` blends the
    /// others.
    ///
    /// # Errors
    /// Those of `blend`; [`Error::Unexpected`](crate::Error::Unexpected) for parts that disagree;
    /// [`Error::Io`](crate::Error::Io).
    pub(crate) fn write_part(
        &self,
        targets: &[PartTarget<'_>],
        part: OutputPart,
        dtype: Option<Dtype>,
        blend: &dyn Fn(Vec<PendingPart>) -> Result<Device>,
    ) -> Result<PartOutcome> {
        let mut outcome = PartOutcome::default();
        for attempt in 1.. {
            match self.try_part(targets, part, dtype, blend, &mut outcome) {
                Err(error) if attempt < ATTEMPTS && is_gone(&error) => {}
                done => return done.map(|()| outcome),
            }
        }
        Ok(outcome)
    }

    fn try_part(
        &self,
        targets: &[PartTarget<'_>],
        part: OutputPart,
        dtype: Option<Dtype>,
        blend: &dyn Fn(Vec<PendingPart>) -> Result<Device>,
        outcome: &mut PartOutcome,
    ) -> Result<()> {
        let mut folders = Vec::new();
        let mut pending = Vec::new();
        for (i, target) in targets.iter().enumerate() {
            let PartState::Unfinished(folder) = self.open_part(target, part, dtype)? else { continue };
            let is_written = folder.is_written()?;
            if !is_written {
                let files = folder.files(self, target);
                pending.push(PendingPart { target: i, files, weights: folder.weights() });
            }
            folders.push((i, folder, is_written));
        }
        if !pending.is_empty() {
            outcome.device = Some(blend(pending)?);
        }
        outcome.missing.clear();
        for (i, folder, is_written) in &folders {
            if !is_written {
                folder.mark(self)?;
            }
            let missing = folder.finish(self, &targets[*i])?;
            outcome.join(PartOutcome { device: None, missing });
        }
        Ok(())
    }
}
