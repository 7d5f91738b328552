//! When each checkpoint was written: as given, or as metadata, the trainer's state or names tell.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::find::{Input, is_usual, name, without_ending};
use super::json;
use super::model::Model;
use crate::error::{Error, Result};

/// The entries of metadata, and of PyTorch's files, that tell the step; the last is what kohya's scripts write.
const KEYS: [&str; 4] = ["step", "global_step", "steps", "ss_steps"];

/// What a trainer of Hugging Face leaves beside the weights.
const TRAINER_STATE: &str = "trainer_state.json";

/// Words that stand before the step in a name, the surest first.
const WORDS: [&str; 6] = ["step", "steps", "iteration", "iter", "checkpoint", "ckpt"];

/// Words that stand before a time of another clock, which will do where no step is told.
const EPOCHS: [&str; 2] = ["epoch", "epochs"];

const REMEDY: &str = "give the steps of all, in the order of the checkpoints, with --steps 1000,2000,... (`steps`)";

/// The step of each checkpoint. All come from one source, the first that tells every one of them.
///
/// # Errors
/// [`Error::Setting`] for steps that were given and do not fit; [`Error::Unexpected`] with the file that does not tell, or
/// whose step is 0 or another's, too.
pub(super) fn steps(models: &[Model], given: Option<&[u64]>) -> Result<Vec<u64>> {
    let steps = match given {
        Some(given) if given.len() != models.len() => {
            let reason = format!("{} are given for {} checkpoints: give one for each", given.len(), models.len());
            return Err(Error::Setting { option: "steps", reason });
        }
        Some(given) => given.to_vec(),
        None => told(models)?,
    };
    check(models, &steps)?;
    Ok(steps)
}

fn told(models: &[Model]) -> Result<Vec<u64>> {
    let by = |tell: &dyn Fn(&Model) -> Option<u64>| models.iter().map(tell).collect::<Option<Vec<u64>>>();
    for key in KEYS {
        if let Some(steps) = by(&|model| model.number(key)) {
            return Ok(steps);
        }
    }
    let states: Vec<Option<u64>> = models.iter().map(|model| from_trainer(&model.input)).collect::<Result<_>>()?;
    if let Some(steps) = states.into_iter().collect() {
        return Ok(steps);
    }
    let inputs: Vec<&Input> = models.iter().map(|model| &model.input).collect();
    named(&inputs).map_err(|odd| {
        let why = format!("no step can be read from its name as from the others', nor from metadata: {REMEDY}");
        Error::unexpected(&inputs[odd].path, why)
    })
}

fn check(models: &[Model], steps: &[u64]) -> Result<()> {
    for (i, (model, step)) in models.iter().zip(steps).enumerate() {
        if *step == 0 {
            let why = format!("its step is 0, before any training: leave it out, or {REMEDY}");
            return Err(Error::unexpected(&model.input.path, why));
        }
        if let Some(other) = steps[..i].iter().position(|earlier| earlier == step) {
            let other = models[other].input.path.display();
            let why = format!("its step is {step}, and so is that of {other}: leave one out, or {REMEDY}");
            return Err(Error::unexpected(&model.input.path, why));
        }
    }
    Ok(())
}

/// `global_step` of the trainer's state in the checkpoint's folder.
///
/// # Errors
/// [`Error::Io`] and [`Error::Damaged`] for a state that is there and cannot be read.
fn from_trainer(input: &Input) -> Result<Option<u64>> {
    let state = input.beside(TRAINER_STATE).map(|path| json::read(&path)).transpose()?.flatten();
    Ok(state.and_then(|state| state["global_step"].as_u64()))
}

/// The steps that names tell: those of the folders where the files are called as in every checkpoint, and those above where
/// folders are but a part of each checkpoint, such as `checkpoint-1000/unet`.
///
/// # Errors
/// The index of one that does not tell as the others do.
fn named(inputs: &[&Input]) -> std::result::Result<Vec<u64>, usize> {
    let paths: Vec<PathBuf> = inputs.iter().map(|input| named_path(input)).collect();
    let labels = |paths: &mut dyn Iterator<Item = &Path>| paths.map(label).collect::<Vec<String>>();
    let odd = match in_names(&labels(&mut paths.iter().map(PathBuf::as_path))) {
        Ok(steps) => return Ok(steps),
        Err(odd) => odd,
    };
    if inputs.iter().any(|input| input.folder.is_none()) {
        return Err(odd);
    }
    in_names(&labels(&mut paths.iter().map(|path| path.parent().unwrap_or(path)))).map_err(|_| odd)
}

/// What a checkpoint is called by.
fn named_path(input: &Input) -> PathBuf {
    let mut path = input.path.as_path();
    if is_usual(path) {
        path = path.parent().unwrap_or(path);
    }
    // `.` and links are called something, too.
    match path.file_name() {
        Some(_) => path.to_owned(),
        None => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
    }
}

/// A name without shards and endings, which may differ.
fn label(path: &Path) -> String {
    let lower = name(path).to_ascii_lowercase();
    without_shard(without_ending(&lower)).to_owned()
}

/// A number in a name, and the word before it.
struct Found<'a> {
    word: &'a str,
    value: u64,
    range: Range<usize>,
}

/// The steps that names tell, all in one way: the number after the same word in each, or the last one where the names are
/// alike but for it.
///
/// # Errors
/// The index of the first that does not tell as the most others do.
pub(super) fn in_names(names: &[String]) -> std::result::Result<Vec<u64>, usize> {
    let all: Vec<Vec<Found<'_>>> = names.iter().map(|name| numbers(name)).collect();
    let after = |word: &str| -> Vec<Option<u64>> {
        let last =
            |found: &Vec<Found<'_>>| found.iter().rev().find(|found| found.word == word).map(|found| found.value);
        all.iter().map(last).collect()
    };
    let whole = |values: Vec<Option<u64>>| values.into_iter().collect::<Option<Vec<u64>>>();
    let by_word = |words: &[&str]| words.iter().find_map(|word| whole(after(word)));
    let last = || alike(names, &all).map(|()| all.iter().map(|found| found[found.len() - 1].value).collect());
    let odd = match by_word(&WORDS).map_or_else(last, Ok) {
        Ok(steps) => return Ok(steps),
        Err(odd) => odd,
    };
    let half = |values: &Vec<Option<u64>>| 2 * values.iter().flatten().count() > values.len();
    let silent = || WORDS.iter().map(|word| after(word)).find(half)?.iter().position(Option::is_none);
    by_word(&EPOCHS).ok_or_else(|| silent().unwrap_or(odd))
}

/// Checks that names differ by their last numbers alone.
///
/// # Errors
/// The index of one without a number, or else of the first that is not like the most others.
fn alike(names: &[String], numbers: &[Vec<Found<'_>>]) -> std::result::Result<(), usize> {
    let around = |(name, found): (&'_ String, &Vec<Found<'_>>)| -> Option<(String, String)> {
        let range = found.last()?.range.clone();
        Some((name[..range.start].to_owned(), name[range.end..].to_owned()))
    };
    let texts: Vec<Option<(String, String)>> = names.iter().zip(numbers).map(around).collect();
    let count = |text: &Option<(String, String)>| texts.iter().filter(|other| *other == text).count();
    // Of as many, the first.
    let usual = texts.iter().flatten().cloned().map(Some).rev().max_by_key(count);
    match texts.iter().position(|text| text.is_none() || Some(text) != usual.as_ref()) {
        Some(odd) => Err(odd),
        None => Ok(()),
    }
}

/// Without `-00001-of-00003` and what follows.
fn without_shard(name: &str) -> &str {
    let start = |at: usize| {
        let (before, after) = (&name[..at], &name[at + 4..]);
        let digits = before.rsplit('-').next().filter(|part| !part.is_empty() && all_digits(part))?;
        after.starts_with(|c: char| c.is_ascii_digit()).then(|| before.len() - digits.len())
    };
    name.find("-of-").and_then(start).map_or(name, |start| &name[..start])
}

/// All whole numbers, but for the bits of a dtype (`fp16`), decimals and endings of files such as `.8bit`.
fn numbers(name: &str) -> Vec<Found<'_>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(start) = name[at..].find(|c: char| c.is_ascii_digit()).map(|i| at + i) {
        let end = name[start..].find(|c: char| !c.is_ascii_digit()).map_or(name.len(), |i| start + i);
        let word = word_before(&name[..start]);
        let dtype = matches!(word, "fp" | "bf" | "f" | "int") && name[..start].ends_with(word);
        let decimal =
            name[..start].strip_suffix('.').is_some_and(|whole| whole.ends_with(|c: char| c.is_ascii_digit()));
        let bits = dtype && matches!(&name[start..end], "8" | "16" | "32" | "64");
        if let (false, false, Ok(value)) = (bits, decimal, name[start..end].parse()) {
            found.push(Found { word, value, range: start..end });
        }
        at = end;
    }
    found
}

/// The word that ends a text, but for what parts it from a number.
fn word_before(text: &str) -> &str {
    let text = text.trim_end_matches(['-', '_', '=', '.', ' ']);
    let start = text
        .rfind(|c: char| !c.is_ascii_alphabetic())
        .map_or(0, |i| i + text[i..].chars().next().map_or(1, char::len_utf8));
    &text[start..]
}

fn all_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A step as text of metadata has it.
pub(super) fn parse(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_steps() {
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
            assert_eq!(in_names(&[label]).ok(), step.map(|step| vec![step]), "{name}");
        }
    }

    /// No number may be taken for a step that means something else in that name.
    #[test]
    fn all_names_tell_in_one_way() {
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
            assert_eq!(in_names(&labels), steps, "{names:?}");
        }
    }

    #[test]
    fn files_that_are_called_alike_are_told_apart_by_their_folders() {
        for (path, folder, step) in [
            ("runs/checkpoint-70/model.safetensors", false, Some(70)),
            ("runs/checkpoint-70/adapter_model.bin", false, Some(70)),
            ("runs7/checkpoint-70", true, Some(70)),
            ("runs/checkpoint-70/unet", true, Some(70)),
            ("runs7/lora-10.safetensors", false, Some(10)),
            ("runs7/lora.safetensors", false, None),
        ] {
            let folder = folder.then(|| path.into());
            let input = Input { path: path.into(), folder, parts: vec![], index: None };
            assert_eq!(named(&[&input]).ok(), step.map(|step| vec![step]), "{path}");
        }
    }
}
