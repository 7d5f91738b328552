//! The steps of checkpoints: given, or read from metadata, the trainer's state or names.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::find::{FoundCheckpoint, file_name, has_usual_name, without_extension};
use super::json;
use super::model::CheckpointModel;
use super::repeated::{self, SteppedModels};
use super::set_aside::without_odd;
use super::weight_file::{EPOCH_KEY, STEP_KEYS};
use crate::error::{Error, Result, shown};

/// File that Hugging Face's trainer writes beside the weights.
const TRAINER_STATE: &str = "trainer_state.json";

/// Words before the step in a name, the most reliable first.
const STEP_WORDS: [&str; 6] = ["step", "steps", "iteration", "iter", "checkpoint", "ckpt"];

/// Words before the epoch in a name, which replaces the step if no name has one.
const EPOCH_WORDS: [&str; 2] = ["epoch", "epochs"];

const REMEDY: &str = "give the steps of all, in the order of the checkpoints, with --steps 1000,2000,... (`steps`)";

/// Returns the step of each checkpoint, all from one source: the first that has the steps of all.
///
/// # Errors
/// [`Error::Setting`] for another number of given steps; [`Error::Unexpected`] for a file without a step, with step 0
/// or with the step of another file.
pub(super) fn steps(models: Vec<CheckpointModel>, given: Option<&[u64]>) -> Result<SteppedModels> {
    let stepped = match given {
        Some(given) if given.len() != models.len() => {
            let reason = format!("{} are given for {} checkpoints: give one for each", given.len(), models.len());
            return Err(Error::Setting { option: "steps", reason });
        }
        Some(given) => SteppedModels { models: given.iter().copied().zip(models).collect(), notes: Vec::new() },
        None => read_steps(models)?,
    };
    check(&stepped.models)?;
    Ok(stepped)
}

/// Reads the steps. A checkpoint without one may repeat another.
fn read_steps(models: Vec<CheckpointModel>) -> Result<SteppedModels> {
    let (mut models, notes) = without_odd(models);
    let mut odd = Vec::new();
    let steps = loop {
        match read_all(&models)? {
            Ok(steps) => break steps,
            Err(i) => odd.push(models.remove(i)),
        }
    };
    let (steps, from_zero) = after_epochs(steps, &models);
    let numbered = steps.into_iter().zip(models).collect();
    let settled = repeated::settle(numbered, odd).map_err(|path| {
        let why = format!("no step can be read from its name as from the others', nor from metadata: {REMEDY}");
        Error::unexpected(&path, why)
    });
    let mut stepped = settled?;
    stepped.notes.extend(notes.into_iter().chain(from_zero));
    Ok(stepped)
}

/// Reads the steps of all checkpoints, or finds the first whose name is unlike the others.
///
/// # Errors
/// [`Error::Io`] and [`Error::Damaged`] for the state of a trainer that cannot be read.
fn read_all(models: &[CheckpointModel]) -> Result<std::result::Result<Vec<u64>, usize>> {
    for key in STEP_KEYS {
        if let Some(steps) = models.iter().map(|model| model.number(key)).collect() {
            return Ok(Ok(steps));
        }
    }
    let states: Vec<Option<u64>> = models.iter().map(|model| trainer_step(&model.found)).collect::<Result<_>>()?;
    if let Some(steps) = states.into_iter().collect() {
        return Ok(Ok(steps));
    }
    let found: Vec<&FoundCheckpoint> = models.iter().map(|model| &model.found).collect();
    Ok(steps_of_names(&found))
}

/// Returns the steps after epochs that are counted from 0, as timm counts them, with a note.
fn after_epochs(steps: Vec<u64>, models: &[CheckpointModel]) -> (Vec<u64>, Option<String>) {
    let is_epoch = |(step, model): (&u64, &CheckpointModel)| match model.number(EPOCH_KEY) {
        Some(epoch) => epoch == *step,
        None => label(&identifying_path(&model.found)).contains(EPOCH_WORDS[0]),
    };
    if !steps.contains(&0) || !steps.iter().zip(models).all(is_epoch) {
        return (steps, None);
    }
    let note = "epochs are counted from 0 in the names, so the first is step 1".to_owned();
    (steps.into_iter().map(|step| step.saturating_add(1)).collect(), Some(note))
}

/// Checks that steps are positive and distinct.
fn check(models: &[(u64, CheckpointModel)]) -> Result<()> {
    for (i, (step, model)) in models.iter().enumerate() {
        if *step == 0 {
            let why = format!("its step is 0, before any training: leave it out, or {REMEDY}");
            return Err(Error::unexpected(&model.found.path, why));
        }
        if let Some((_, other)) = models[..i].iter().find(|(earlier, _)| earlier == step) {
            let other = shown(&other.found.path);
            let why = format!("its step is {step}, and so is that of {other}: leave one out, or {REMEDY}");
            return Err(Error::unexpected(&model.found.path, why));
        }
    }
    Ok(())
}

/// Reads `global_step` from the trainer's state in the checkpoint's folder; `None` without a state.
///
/// # Errors
/// [`Error::Io`] and [`Error::Damaged`] for a state that cannot be read.
fn trainer_step(found: &FoundCheckpoint) -> Result<Option<u64>> {
    let Some(path) = found.beside(TRAINER_STATE) else { return Ok(None) };
    let state = json::read(&path)?;
    Ok(state.and_then(|state| state["global_step"].as_u64()))
}

/// Reads steps from the names of checkpoints, or else from those of the folders above.
///
/// The folders above count if each checkpoint is a folder in one, such as `checkpoint-1000/unet`, or if all have one
/// name, such as `step-1000/model.pth`.
///
/// # Errors
/// The index of a checkpoint whose name is unlike the others.
fn steps_of_names(found: &[&FoundCheckpoint]) -> std::result::Result<Vec<u64>, usize> {
    let paths: Vec<PathBuf> = found.iter().map(|found| identifying_path(found)).collect();
    let labels: Vec<String> = paths.iter().map(|path| label(path)).collect();
    let odd = match steps_in_labels(&labels) {
        Ok(steps) => return Ok(steps),
        Err(odd) => odd,
    };
    let have_one_name = labels.len() > 1 && labels.iter().all(|label| *label == labels[0]);
    if !have_one_name && found.iter().any(|found| found.folder.is_none()) {
        return Err(odd);
    }
    let labels: Vec<String> = paths.iter().map(|path| label(path.parent().unwrap_or(path))).collect();
    steps_in_labels(&labels).map_err(|_| odd)
}

/// Returns the path whose name identifies a checkpoint: the folder's if the file's name is a usual one.
fn identifying_path(found: &FoundCheckpoint) -> PathBuf {
    let mut path = found.path.as_path();
    if has_usual_name(path) {
        path = path.parent().unwrap_or(path);
    }
    match path.file_name() {
        Some(_) => path.to_owned(),
        // `.` and `..` have no name of their own.
        None => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
    }
}

/// Returns a name in lower case, without shard and extension, in which names of one list may differ.
fn label(path: &Path) -> String {
    let lower = file_name(path).to_ascii_lowercase();
    without_shard(without_extension(&lower)).to_owned()
}

/// Number in a label, and the word before it.
struct LabelNumber<'a> {
    word: &'a str,
    value: u64,
    range: Range<usize>,
}

/// Reads steps from labels, from all in the same way.
///
/// The step is the number after the same word in each label, or else the last number if the labels differ in nothing
/// else, or else the epoch.
///
/// # Errors
/// The index of the first label that is unlike most others.
fn steps_in_labels(labels: &[String]) -> std::result::Result<Vec<u64>, usize> {
    let numbers: Vec<Vec<LabelNumber<'_>>> = labels.iter().map(|label| numbers(label)).collect();
    if let Some(steps) = after_common_word(&numbers, &STEP_WORDS) {
        return Ok(steps);
    }
    let odd = match last_numbers(labels, &numbers) {
        Ok(steps) => return Ok(steps),
        Err(odd) => odd,
    };
    after_common_word(&numbers, &EPOCH_WORDS).ok_or_else(|| first_without_step_word(&numbers).unwrap_or(odd))
}

/// Returns the number in each label after the first of the words that is in all labels.
fn after_common_word(numbers: &[Vec<LabelNumber<'_>>], words: &[&str]) -> Option<Vec<u64>> {
    words.iter().find_map(|word| after_word(numbers, word).into_iter().collect())
}

/// Returns the last number in each label that follows a word.
fn after_word(numbers: &[Vec<LabelNumber<'_>>], word: &str) -> Vec<Option<u64>> {
    let last = |numbers: &Vec<LabelNumber<'_>>| {
        let found = numbers.iter().rev().find(|number| number.word == word);
        found.map(|number| number.value)
    };
    numbers.iter().map(last).collect()
}

/// Returns the index of the first label that lacks the step word of most other labels, if there is such a word.
fn first_without_step_word(numbers: &[Vec<LabelNumber<'_>>]) -> Option<usize> {
    let usual = STEP_WORDS
        .iter()
        .map(|word| after_word(numbers, word))
        .find(|values| 2 * values.iter().flatten().count() > values.len())?;
    usual.iter().position(Option::is_none)
}

/// Returns the last number of each label, if the labels differ in nothing else.
///
/// # Errors
/// The index of the first label that has no number or differs from most others.
fn last_numbers(labels: &[String], numbers: &[Vec<LabelNumber<'_>>]) -> std::result::Result<Vec<u64>, usize> {
    let mut steps = Vec::with_capacity(labels.len());
    let mut frames: Vec<Option<(&str, &str)>> = Vec::with_capacity(labels.len());
    for (label, numbers) in labels.iter().zip(numbers) {
        let last = numbers.last();
        steps.extend(last.map(|number| number.value));
        frames.push(last.map(|number| (&label[..number.range.start], &label[number.range.end..])));
    }
    let count = |frame: &&Option<(&str, &str)>| frames.iter().filter(|other| other == frame).count();
    // The first of the most frequent: `max_by_key` returns the last of several.
    let usual = frames.iter().filter(|frame| frame.is_some()).rev().max_by_key(count);
    match frames.iter().position(|frame| frame.is_none() || Some(frame) != usual) {
        Some(odd) => Err(odd),
        None => Ok(steps),
    }
}

/// Cuts off `00001-of-00003` and all that follows.
fn without_shard(name: &str) -> &str {
    let Some((before, after)) = name.split_once("-of-") else { return name };
    let stem = before.trim_end_matches(is_digit);
    let numbered = stem.len() < before.len() && (stem.is_empty() || stem.ends_with('-'));
    if numbered && after.starts_with(is_digit) { stem } else { name }
}

/// Finds all whole numbers in a label, except the bits of a dtype (`fp16`) and digits after a decimal point.
fn numbers(label: &str) -> Vec<LabelNumber<'_>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = label[at..].find(is_digit).map(|i| at + i) {
        let end = label[start..].find(|c| !is_digit(c)).map_or(label.len(), |i| start + i);
        let before = &label[..start];
        let digits = &label[start..end];
        if !is_fraction(before)
            && !is_dtype(before, digits)
            && let Ok(value) = digits.parse()
        {
            found.push(LabelNumber { word: word_before(before), value, range: start..end });
        }
        at = end;
    }
    found
}

/// Returns true if a decimal point precedes a number.
fn is_fraction(before: &str) -> bool {
    before.strip_suffix('.').is_some_and(|whole| whole.ends_with(is_digit))
}

/// Returns true if a number is the bits of a dtype.
fn is_dtype(before: &str, digits: &str) -> bool {
    let word = word_before(before);
    matches!(word, "fp" | "bf" | "f" | "int") && before.ends_with(word) && matches!(digits, "8" | "16" | "32" | "64")
}

/// Returns the word at the end of a text, without separators after it.
fn word_before(text: &str) -> &str {
    let text = text.trim_end_matches(['-', '_', '=', '.', ' ']);
    text.rsplit(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or(text)
}

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_read_from_single_names() {
        for (name, step) in [
            ("checkpoint-1000", Some(1000)),
            ("step_2000.safetensors", Some(2000)),
            ("lora-000010.safetensors", Some(10)),
            ("epoch=3-step=900.ckpt", Some(900)),
            ("step=900-epoch=3.ckpt", Some(900)),
            ("epoch=3-step=900-v1.ckpt", Some(900)),
            ("model_2000_fp16.safetensors", Some(2000)),
            ("checkpoint-500-ema0.999", Some(500)),
            ("iter_0001000", Some(1000)),
            ("global_step1234.pt", Some(1234)),
            ("llama-7b-3000.safetensors", Some(3000)),
            ("lora_1000_steps.safetensors", Some(1000)),
            ("step300-00001-of-00003.safetensors", Some(300)),
            ("model-00001-of-00003.safetensors", None),
            ("é7é.safetensors", Some(7)),
            ("model.safetensors", None),
            ("step99999999999999999999.pt", None),
        ] {
            let label = label(Path::new(name));
            assert_eq!(steps_in_labels(&[label]).ok(), step.map(|step| vec![step]), "{name}");
        }
    }

    /// A number with another meaning must not be taken for a step.
    #[test]
    fn steps_are_read_from_all_names_in_the_same_way() {
        let numbered: Vec<String> = (1..=12).map(|i| format!("epoch{i}.pt")).collect();
        let numbered: Vec<&str> = numbered.iter().map(String::as_str).collect();
        for (names, steps) in [
            (&["style-v2-step1000", "style-v2-step2000", "style-v2"][..], Err(2)),
            (&["style-v2", "style-v2-step1000", "style-v2-step2000"], Err(0)),
            (&["style-v2-000004", "style-v2-000008", "style-v2"], Err(2)),
            (&["global_step20.pt", "x-step-10.safetensors"], Ok(vec![20, 10])),
            (&["lora_100_steps.pt", "lora_200_steps.safetensors"], Ok(vec![100, 200])),
            (&["epoch_1_500", "epoch_2_1000"], Ok(vec![1, 2])),
            (&["epoch=1-loss=0.52.ckpt", "epoch=2-loss=0.48.ckpt"], Ok(vec![1, 2])),
            (&["epoch=1-step=50.ckpt", "epoch=1-step=90-v1.ckpt", "last.ckpt"], Err(2)),
            (&["a-1", "b-2"], Err(1)),
            (&["a-1", "b-2", "b-3"], Err(0)),
            (&["checkpoint-5", "final"], Err(1)),
            (&numbered, Ok((1..=12).collect())),
        ] {
            let labels: Vec<String> = names.iter().map(|name| label(Path::new(name))).collect();
            assert_eq!(steps_in_labels(&labels), steps, "{names:?}");
        }
    }

    #[test]
    fn steps_of_files_with_usual_names_come_from_their_folders() {
        for (path, folder, step) in [
            ("runs/checkpoint-70/model.safetensors", false, Some(70)),
            ("runs/checkpoint-70/adapter_model.bin", false, Some(70)),
            ("runs7/checkpoint-70", true, Some(70)),
            ("runs/checkpoint-70/unet", true, Some(70)),
            ("runs7/lora-10.safetensors", false, Some(10)),
            ("runs7/lora.safetensors", false, None),
        ] {
            let folder = folder.then(|| path.into());
            let found = FoundCheckpoint { path: path.into(), folder, files: vec![], own_files: 0, index: None };
            assert_eq!(steps_of_names(&[&found]).ok(), step.map(|step| vec![step]), "{path}");
        }
    }
}
