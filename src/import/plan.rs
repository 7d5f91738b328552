//! Everything that an import will write, checked as far as is possible without the values of the averages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::clock::{Clock, distinguishes};
use super::copied::Copied;
use super::counters::BatchCounters;
use super::layout::ParsedCheckpoint;
use super::listing::{self, CheckpointFile};
use super::planned::PlannedSnapshot;
use super::tensors::ImportTensors;
use super::{Import, Tool};
use crate::error::{Error, Result, escape_controls};
use crate::math::{Chain, Profile};
use crate::pytorch::Checkpoint;
use crate::snapshot::SnapshotId;

/// Smallest error of `update_after_step` that the counts must show: the tools' defaults, 0 and 100, are that far apart.
const DISTANCE: u64 = 100;

/// The run that an import writes.
pub(super) struct ImportPlan {
    pub profiles: Vec<Profile>,
    /// Chain of each profile.
    pub chains: Vec<Chain>,
    /// In order of their steps.
    pub snapshots: Vec<PlannedSnapshot>,
    pub tensors: ImportTensors,
    pub warnings: Vec<String>,
}

impl ImportPlan {
    /// Reads the headers of all checkpoints, their tensors of one element, and the tensors that show what was copied.
    ///
    /// # Errors
    /// As [`Import::write`].
    pub(super) fn new(import: &Import, dir: &Path) -> Result<ImportPlan> {
        let (files, others) = listing::list(import.from, dir, import.profiles.len())?;
        let survey = Survey::new(import, &files)?;
        let mut warnings: Vec<String> =
            others.iter().map(|name| format!("{name} is left out: its name is not INDEX.STEP.pt")).collect();
        warnings.extend(survey.warnings(import));
        let Survey { snapshots, mut tensors, .. } = survey;
        let snapshots = drop_repeated(import, snapshots, &tensors, &mut warnings)?;
        let copied = Copied::find(&snapshots, &tensors)?;
        tensors.leave_out(&copied.left_out);
        tensors.copied = copied.names;
        warnings.extend(copied.warnings);
        // Names from the files are in them, and Python's `warnings` print them as they are.
        let warnings = warnings.iter().map(|warning| escape_controls(warning, &[])).collect();
        let profiles = import.profiles.clone();
        let chains = profiles.iter().map(|profile| import.chain(profile)).collect();
        Ok(ImportPlan { profiles, chains, snapshots, tensors, warnings })
    }
}

/// Headers of all checkpoints, read and checked.
struct Survey {
    snapshots: Vec<PlannedSnapshot>,
    tensors: ImportTensors,
    counters: BatchCounters,
    /// Entries that are not tensors of the model.
    ignored: BTreeSet<String>,
    /// Another tool that more likely wrote the checkpoints.
    likelier_tool: Option<Tool>,
    /// True if a count confirms `update_after_step`.
    confirmed: bool,
}

impl Survey {
    /// Opens all checkpoints and checks them against the first and against the options.
    fn new(import: &Import, files: &[CheckpointFile]) -> Result<Survey> {
        let mut survey: Option<Survey> = None;
        for file in files {
            let checkpoint = Checkpoint::open(&file.path)?;
            let parsed = ParsedCheckpoint::new(import.from, &checkpoint)?;
            let tensors = ImportTensors::new(&checkpoint, &parsed)?;
            let survey = match &mut survey {
                Some(survey) => {
                    tensors.check_sibling(&file.path, &survey.tensors, &files[0].path)?;
                    survey
                }
                none => none.insert(Survey::empty(tensors)),
            };
            survey.add(import, file, &checkpoint, parsed)?;
        }
        let mut survey = survey.ok_or_else(|| Error::NoSource {
            wanted: "checkpoint to import".into(),
            remedy: "name a directory that holds some",
        })?;
        survey.tensors.counters = survey.counters.names();
        Ok(survey)
    }

    fn empty(tensors: ImportTensors) -> Survey {
        Survey {
            snapshots: Vec::new(),
            tensors,
            counters: BatchCounters::default(),
            ignored: BTreeSet::new(),
            likelier_tool: None,
            confirmed: false,
        }
    }

    fn add(
        &mut self,
        import: &Import,
        file: &CheckpointFile,
        checkpoint: &Checkpoint,
        parsed: ParsedCheckpoint,
    ) -> Result<()> {
        self.snapshots.push(PlannedSnapshot::new(import, file, &parsed)?);
        self.counters.add(checkpoint, &parsed)?;
        let clock = import.clock(parsed.layout);
        let distance = clock.every.max(DISTANCE);
        self.confirmed |= distinguishes(parsed.counted, clock.counted(file.call), distance);
        self.ignored.extend(parsed.ignored);
        self.likelier_tool = parsed.likelier_tool;
        Ok(())
    }

    fn warnings(&self, import: &Import) -> Vec<String> {
        let mut warnings: Vec<String> =
            self.ignored.iter().map(|key| format!("the entry `{key}` is left out: it is not a tensor")).collect();
        warnings.extend(self.counters.warning());
        if let Some(tool) = self.likelier_tool {
            warnings.push(format!(
                "all names begin with `ema_model.`, as {tool} has them: if it wrote the files, import them as its own"
            ));
        }
        if !self.confirmed && import.from == Tool::PytorchPosthocEma {
            warnings.push(unconfirmed(import, import.clock(self.tensors.layout)));
        }
        warnings
    }
}

/// Returns the warning that no count confirms `update_after_step`.
fn unconfirmed(import: &Import, clock: Clock) -> String {
    let (after, origin) = match import.update_after_step {
        Some(after) => (after, "as given"),
        None => (clock.update_after_step(), "the default"),
    };
    format!(
        "update_after_step is taken to be {after}, {origin}: the tool rounded `step` too far in every checkpoint to \
         confirm it; make sure that the training used this value"
    )
}

/// Keeps one of several checkpoints that contain the same last update: they are the same average.
///
/// # Errors
/// [`Error::Unexpected`] if their values differ: the updates were not those of the options.
fn drop_repeated(
    import: &Import,
    snapshots: Vec<PlannedSnapshot>,
    tensors: &ImportTensors,
    warnings: &mut Vec<String>,
) -> Result<Vec<PlannedSnapshot>> {
    let mut kept: Vec<PlannedSnapshot> = Vec::with_capacity(snapshots.len());
    let mut places: BTreeMap<SnapshotId, usize> = BTreeMap::new();
    for snapshot in snapshots {
        let Some(&place) = places.get(&snapshot.id) else {
            places.insert(snapshot.id, kept.len());
            kept.push(snapshot);
            continue;
        };
        let first = &kept[place].file;
        check_same(import, &snapshot.file, first, tensors)?;
        warnings.push(format!(
            "{} is left out: it is the average of {}, both of the update at {}",
            snapshot.file.name(),
            first.name(),
            snapshot.id.step
        ));
    }
    Ok(kept)
}

fn check_same(import: &Import, file: &CheckpointFile, first: &CheckpointFile, tensors: &ImportTensors) -> Result<()> {
    let checkpoint = Checkpoint::open(&file.path)?;
    let first_checkpoint = Checkpoint::open(&first.path)?;
    for (spec, key) in tensors.iter() {
        if !checkpoint.equals(&first_checkpoint, key) {
            let why = format!(
                "tensor `{}` differs from that of {}, though with update_every {} no update is between them: check \
                 update_every",
                spec.name,
                first.name(),
                import.update_every
            );
            return Err(Error::unexpected(&file.path, why));
        }
    }
    Ok(())
}
