//! When each checkpoint was written: as given, or as metadata, the trainer's state or names tell.

use std::fs;

use super::find::{Input, is_usual, name};
use super::model::Model;
use crate::error::{Error, Result};

/// The entries of metadata, and of PyTorch's files, that tell the step; the last is what kohya's scripts write.
const KEYS: [&str; 4] = ["step", "global_step", "steps", "ss_steps"];

/// What a trainer of Hugging Face leaves beside the weights.
const TRAINER_STATE: &str = "trainer_state.json";

/// Words that stand before the step in a name, the surest first.
const WORDS: [&str; 6] = ["step", "steps", "iteration", "iter", "checkpoint", "ckpt"];

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
    if let Some(steps) = by(&|model| from_trainer(&model.input)) {
        return Ok(steps);
    }
    let by_name = |model: &Model| {
        let silent = || {
            let why = format!("no step can be read from its name, nor from metadata: {REMEDY}");
            Error::unexpected(&model.input.path, why)
        };
        named(&model.input).ok_or_else(silent)
    };
    models.iter().map(by_name).collect()
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
fn from_trainer(input: &Input) -> Option<u64> {
    let folder = input.folder.as_deref().or_else(|| is_usual(&input.path).then(|| input.path.parent()).flatten())?;
    let state: serde_json::Value = serde_json::from_slice(&fs::read(folder.join(TRAINER_STATE)).ok()?).ok()?;
    state["global_step"].as_u64()
}

/// The step that names tell: that of the folder where the file is called as in every checkpoint, and the one above where a
/// folder is but a part of the checkpoint, such as `checkpoint-1000/unet`.
fn named(input: &Input) -> Option<u64> {
    let mut path = input.path.as_path();
    if is_usual(path) {
        path = path.parent().unwrap_or(path);
    }
    // `.` and links are called something, too.
    let path = if path.file_name().is_some() { path.to_owned() } else { path.canonicalize().ok()? };
    let above = || path.parent().filter(|_| input.folder.is_some()).and_then(|above| in_name(&name(above)));
    in_name(&name(&path)).or_else(above)
}

/// A number in a name, and the word before it.
struct Found<'a> {
    word: &'a str,
    value: u64,
}

/// The step that a name tells: the number after a word that says so, or the last one.
pub(super) fn in_name(name: &str) -> Option<u64> {
    let lower = name.to_ascii_lowercase();
    let numbers = numbers(without_shard(&lower));
    let after = |word: &str| numbers.iter().rev().find(|found| found.word == word);
    WORDS.iter().find_map(|word| after(word)).or(numbers.last()).map(|found| found.value)
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
            found.push(Found { word, value });
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
            assert_eq!(in_name(name), step, "{name}");
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
            assert_eq!(named(&input), step, "{path}");
        }
    }
}
