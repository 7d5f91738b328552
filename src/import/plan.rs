//! Everything that an import will write, checked as far as it can be without the values of the averages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::Dtype;

use super::clock::{Clock, stands_for, tells};
use super::copied::Copied;
use super::layout::{Layout, ParsedCheckpoint};
use super::listing::{self, File};
use super::write::are;
use super::{Import, Tool};
use crate::error::{Difference, Error, Result};
use crate::math::{Chain, History, Profile};
use crate::pytorch::{self, Checkpoint, Number};
use crate::snapshot::SnapshotId;

use crate::tensor::is_averaged;
use crate::tensor::{TensorSpec, compare_tensors};

/// How the name of a tensor ends that counts batches, which tools round to floating point.
const COUNTER: &str = "num_batches_tracked";

/// What is to be written.
pub(super) struct Plan {
    pub profiles: Vec<Profile>,
    /// Of each profile.
    pub chains: Vec<Chain>,
    /// The oldest first.
    pub sources: Vec<Source>,
    pub tensors: Tensors,
    pub warnings: Vec<String>,
}

/// A checkpoint that becomes a snapshot.
pub(super) struct Source {
    pub file: File,
    /// Its name in the run: the step is that of the last update contained.
    pub stem: SnapshotId,
    pub updates: History,
}

/// The tensors that every checkpoint of a run holds.
pub(super) struct Tensors {
    pub layout: Layout,
    /// As they lie in the files, in the model's names.
    pub specs: Vec<TensorSpec>,
    /// The name of each in the files.
    pub keys: Vec<String>,
    /// Those that count, and are whole numbers in the model.
    pub counters: BTreeSet<String>,
    /// Those that were not averaged.
    pub copied: BTreeSet<String>,
}

impl Plan {
    /// Reads the headers of all checkpoints, and of their tensors those of one element and those that tell what was copied.
    ///
    /// # Errors
    /// As [`Import::write`].
    pub(super) fn new(import: &Import, dir: &Path) -> Result<Plan> {
        let (files, others) = listing::list(import.from, dir, import.profiles.len())?;
        let mut warnings: Vec<String> =
            others.iter().map(|name| format!("{name} is left out: its name is not INDEX.STEP.pt")).collect();
        let (mut tensors, mut sources, mut told) = (None::<Tensors>, Vec::new(), false);
        let (mut counters, mut left_out, mut doubtful) = (Counters::default(), BTreeSet::new(), None);
        for file in &files {
            let checkpoint = Checkpoint::open(&file.path)?;
            let laid = ParsedCheckpoint::new(import.from, &checkpoint)?;
            let own = Tensors::new(&checkpoint, &laid)?;
            match &tensors {
                Some(first) => own.check_sibling(first, &file.path, &files[0].path)?,
                None => tensors = Some(own),
            }
            sources.push(Source::new(import, file, &laid)?);
            counters.look(&checkpoint, &laid)?;
            let clock = import.clock(laid.layout);
            told |= tells(laid.counted, clock.counted(file.call), apart(clock));
            left_out.extend(laid.left_out);
            doubtful = laid.doubtful;
        }
        let mut tensors = tensors.ok_or_else(|| Error::NoSource {
            wanted: "checkpoint to import".into(),
            remedy: "name a directory that holds some",
        })?;
        tensors.counters = counters.whole();
        warnings.extend(left_out.iter().map(|key| format!("the entry `{key}` is left out: it is no tensor")));
        warnings.extend(counters.warning());
        warnings.extend(doubtful.map(|tool| {
            format!("all names begin with `ema_model.`, as {tool} has them: where it wrote the files, import them as its own")
        }));
        warnings.extend((!told).then(|| untold(import, &tensors)).flatten());
        let sources = drop_repeated(import, sources, &tensors, &mut warnings)?;
        let copied = Copied::find(&sources, &tensors)?;
        tensors.leave_out(&copied.left_out);
        tensors.copied = copied.names;
        warnings.extend(copied.warnings);
        let profiles = import.profiles.clone();
        Ok(Plan { chains: profiles.iter().map(|p| import.chain(p)).collect(), profiles, sources, tensors, warnings })
    }
}

impl Source {
    fn new(import: &Import, file: &File, laid: &ParsedCheckpoint) -> Result<Source> {
        let clock = import.clock(laid.layout);
        check_count(import, clock, file, laid)?;
        let last = clock.last_update(file.call).ok_or_else(|| before_the_first(clock, file))?;
        let updates = clock.updates(last).map_err(|error| Error::unexpected(&file.path, error.to_string()))?;
        Ok(Source { file: file.clone(), stem: SnapshotId { index: file.index, step: last }, updates })
    }
}

/// Compares what the tool had counted with the file's name.
fn check_count(import: &Import, clock: Clock, file: &File, laid: &ParsedCheckpoint) -> Result<()> {
    let (call, expected) = (file.call, clock.counted(file.call));
    if stands_for(laid.counted, expected) {
        return Ok(());
    }
    let value = match laid.counted {
        Number::Whole(value) => value as f64,
        Number::Rounded(value, _) => value,
    };
    let told = format!("its `step` is {value}, and at step {call} it would be {expected}");
    let why = if let Some(tool) = laid.doubtful {
        format!("{told}; it is laid out as those of {tool}: import it as such")
    } else if import.from == Tool::PytorchPosthocEma && value >= 1.0 && value <= call as f64 {
        let (after, fits) = (clock.first, call.saturating_add(1) - value as u64);
        // A first update at step 1 is what an update_after_step of 0 means.
        let plain = |first: u64| if first == 1 { 0 } else { first };
        let about = if matches!(laid.counted, Number::Rounded(..)) { "about " } else { "" };
        format!("{told} with update_after_step {}: {about}{} would fit", plain(after), plain(fits))
    } else {
        format!("{told}: give the file its own name back, or move it out of the directory")
    };
    Err(Error::unexpected(&file.path, why))
}

/// By how much an update_after_step must be wrong for the counts to show it: the defaults are 100 apart.
fn apart(clock: Clock) -> u64 {
    clock.every.max(100)
}

/// What is said where no count shows whether the update_after_step is right.
fn untold(import: &Import, tensors: &Tensors) -> Option<String> {
    let first = import.clock(tensors.layout).first;
    let after = import.update_after_step.unwrap_or(if first == 1 { 0 } else { first });
    let source = if import.update_after_step.is_some() { "as given" } else { "the default" };
    (import.from == Tool::PytorchPosthocEma).then(|| {
        format!(
            "update_after_step is taken to be {after}, {source}: the tool rounded `step` so far in every checkpoint that it \
             does not tell; make sure that the training used this value"
        )
    })
}

fn before_the_first(clock: Clock, file: &File) -> Error {
    let why = format!("step {} is before the first update, at {}: check update_after_step", file.call, clock.first);
    Error::unexpected(&file.path, why)
}

impl Tensors {
    pub(super) fn new(checkpoint: &Checkpoint, laid: &ParsedCheckpoint) -> Result<Tensors> {
        let spec = |(name, key): (&String, &String)| Ok(TensorSpec { name: name.clone(), ..checkpoint.spec(key)? });
        Ok(Tensors {
            layout: laid.layout,
            specs: laid.keys.iter().map(spec).collect::<Result<_>>()?,
            keys: laid.keys.values().cloned().collect(),
            counters: BTreeSet::new(),
            copied: BTreeSet::new(),
        })
    }

    /// # Errors
    /// [`Error::Mismatch`] for other names, shapes or dtypes than a sibling's.
    pub(super) fn check_sibling(&self, other: &Tensors, path: &Path, its: &Path) -> Result<()> {
        if self.layout != other.layout {
            let difference = Difference::new("the layout of the entries", "another", format!("{:?}", self.layout));
            return Err(Error::mismatch(path, its, difference));
        }
        match compare_tensors(specs(&self.specs), specs(&other.specs)) {
            Some(difference) => Err(Error::mismatch(path, its, difference)),
            None => Ok(()),
        }
    }

    fn leave_out(&mut self, names: &BTreeSet<String>) {
        let (specs, keys) = (std::mem::take(&mut self.specs), std::mem::take(&mut self.keys));
        (self.specs, self.keys) = specs.into_iter().zip(keys).filter(|(spec, _)| !names.contains(&spec.name)).unzip();
    }

    /// What a snapshot holds.
    pub(super) fn stored_specs(&self) -> Vec<TensorSpec> {
        let mut specs = self.specs.clone();
        for spec in specs.iter_mut().filter(|spec| self.counters.contains(&spec.name)) {
            spec.dtype = Dtype::I64;
        }
        specs
    }
}

fn specs(specs: &[TensorSpec]) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
    specs.iter().map(|spec| (spec.name.as_str(), spec.dtype, spec.shape.as_slice()))
}

/// Tensors that count batches, rounded to floating point.
#[derive(Default)]
struct Counters {
    /// Whether each was a whole number, or beyond the dtype, in every checkpoint.
    seen: BTreeMap<String, bool>,
    beyond: BTreeSet<String>,
}

impl Counters {
    fn look(&mut self, checkpoint: &Checkpoint, laid: &ParsedCheckpoint) -> Result<()> {
        for (name, key) in laid.keys.iter().filter(|(name, _)| name.rsplit('.').next() == Some(COUNTER)) {
            let spec = checkpoint.spec(key)?;
            if !spec.shape.is_empty() || !is_averaged(spec.dtype) {
                continue;
            }
            let whole = counted(&checkpoint.read(key)?, spec.dtype);
            *self.seen.entry(name.clone()).or_insert(true) &= whole.is_some();
            if whole == Some(None) {
                self.beyond.insert(name.clone());
            }
        }
        Ok(())
    }

    fn whole(&self) -> BTreeSet<String> {
        self.seen.iter().filter(|(_, whole)| **whole).map(|(name, _)| name.clone()).collect()
    }

    fn warning(&self) -> Option<String> {
        let beyond: Vec<&str> = self.beyond.iter().filter(|name| self.seen[*name]).map(String::as_str).collect();
        let why = "infinite where the count is beyond the dtype: the step of the last update takes its place";
        (!beyond.is_empty()).then(|| format!("{} {why}", are(&beyond)))
    }
}

/// The whole number that a rounded count stands for: some number, none within where it is beyond the dtype, and none at all
/// where it is no count.
pub(super) fn counted(bytes: &[u8], dtype: Dtype) -> Option<Option<i64>> {
    match pytorch::number(dtype, bytes)? {
        Number::Whole(value) => Some(Some(value)),
        Number::Rounded(f64::INFINITY, _) => Some(None),
        Number::Rounded(value, _) => {
            (value >= 0.0 && value < 2f64.powi(63) && value.fract() == 0.0).then_some(Some(value as i64))
        }
    }
}

/// Keeps one of several checkpoints that contain the same last update: they are the same average.
///
/// # Errors
/// [`Error::Unexpected`] where their values differ: then the updates were others than the options say.
fn drop_repeated(
    import: &Import,
    sources: Vec<Source>,
    tensors: &Tensors,
    warnings: &mut Vec<String>,
) -> Result<Vec<Source>> {
    let mut kept: Vec<Source> = Vec::with_capacity(sources.len());
    let mut places: BTreeMap<SnapshotId, usize> = BTreeMap::new();
    for source in sources {
        let Some(&place) = places.get(&source.stem) else {
            places.insert(source.stem, kept.len());
            kept.push(source);
            continue;
        };
        let (first, name) = (&kept[place].file, source.file.name());
        check_same(import, &source, first, tensors)?;
        let step = source.stem.step;
        warnings
            .push(format!("{name} is left out: it is the average of {}, both of the update at {step}", first.name()));
    }
    Ok(kept)
}

fn check_same(import: &Import, source: &Source, first: &File, tensors: &Tensors) -> Result<()> {
    let (own, its) = (Checkpoint::open(&source.file.path)?, Checkpoint::open(&first.path)?);
    for (spec, key) in tensors.specs.iter().zip(&tensors.keys) {
        if own.read(key)? != its.read(key)? {
            let why = format!(
                "tensor `{}` differs from that of {}, though with update_every {} no update lies between them: check \
                 update_every",
                spec.name,
                first.name(),
                import.update_every
            );
            return Err(Error::unexpected(&source.file.path, why));
        }
    }
    Ok(())
}
