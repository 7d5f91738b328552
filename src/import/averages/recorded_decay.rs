//! Decay of an average, as trainers record it among the arguments of the training. They are read as data.

use std::path::PathBuf;

use crate::checkpoint::{file_name, is_pytorch_file};
use crate::error::{Result, listed};
use crate::math::{EmaDecay, Ramp};
use crate::pytorch::Checkpoint;

/// Entries of training checkpoints with the arguments of the training: a namespace, or a dict.
const ARGUMENTS: [&str; 5] = ["args", "hyper_parameters", "config", "cfg", "opt"];

/// Arguments with the decay per update, as timm's training and others call it.
const DECAYS: [&str; 2] = ["model_ema_decay", "ema_decay"];

/// Argument of timm for the warm-up of its `ModelEmaV3`.
const WARMUP: &str = "model_ema_warmup";

/// Argument of torchvision's training with the steps between updates, by which it also adjusts the decay.
const EMA_STEPS: &str = "model_ema_steps";

/// Arguments that do not change the decay of an update.
const OTHERS: [&str; 7] =
    ["model_ema", "ema", "use_ema", "with_ema", "model_ema_force_cpu", "model_ema_eval", "resume_ema"];

/// Decay in the files of a training.
pub(super) enum RecordedDecay {
    /// Decay, and a note that says where it is from.
    Known(EmaDecay, String),
    /// Reason why the recorded decay may not be that of an update.
    Unclear(String),
    Missing,
}

impl RecordedDecay {
    /// Reads the decay from all files, which must agree.
    ///
    /// # Errors
    /// As [`Checkpoint::open_values`].
    pub(super) fn read(paths: &[PathBuf]) -> Result<RecordedDecay> {
        let mut first: Option<Arguments> = None;
        for path in paths {
            if !is_pytorch_file(path) {
                return Ok(RecordedDecay::Missing);
            }
            let Some(found) = Arguments::find(&Checkpoint::open_values(path)?) else {
                return Ok(RecordedDecay::Missing);
            };
            match &first {
                Some(first) if *first != found => {
                    let why = format!("the files record different decays, {} and {}", first.decay, found.decay);
                    return Ok(RecordedDecay::Unclear(why));
                }
                _ => first = Some(found),
            }
        }
        Ok(first.map_or(RecordedDecay::Missing, Arguments::decay))
    }

    /// Reads the decay from the names of files or folders, which must agree: `ema_0.9999-step1000`.
    pub(super) fn of_names(paths: &[PathBuf]) -> RecordedDecay {
        let names: Vec<String> = paths.iter().map(|path| file_name(path)).collect();
        let Some(found) = names.iter().map(|name| decay_in(name)).collect::<Option<Vec<&str>>>() else {
            return RecordedDecay::Missing;
        };
        let Some((first, others)) = found.split_first() else { return RecordedDecay::Missing };
        if let Some(other) = others.iter().find(|other| other != &first) {
            let why = format!(
                "the names have different decays, {first} and {other}: move the files of each average into a folder \
                 of its own, or"
            );
            return RecordedDecay::Unclear(why);
        }
        let decay = EmaDecay::constant(first.parse().unwrap_or(f64::NAN));
        match decay.check() {
            Ok(()) => {
                let note =
                    format!("the decay {first} is that in the names of the files; --beta (`beta`) gives another");
                RecordedDecay::Known(decay, note)
            }
            Err(why) => RecordedDecay::Unclear(format!("the names have a decay: {why}")),
        }
    }
}

/// Returns the text of the decay after `ema` in a name.
fn decay_in(name: &str) -> Option<&str> {
    let mut at = 0;
    while let Some(start) = name[at..].find("ema").map(|i| at + i) {
        at = start + 3;
        let is_word = !name[..start].ends_with(|c: char| c.is_alphanumeric());
        let rest = name[at..].trim_start_matches(['-', '_', '=']);
        let digits = rest.strip_prefix("0.").unwrap_or_default();
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        if is_word && end > 0 {
            return Some(&rest[..2 + end]);
        }
    }
    None
}

/// Arguments of a training that concern its average.
#[derive(Debug, PartialEq)]
struct Arguments {
    /// Keys that lead to the decay, joined by a dot.
    place: String,
    decay: f64,
    warmup: bool,
    /// Decay after torchvision's adjustment.
    adjusted: Option<f64>,
    /// Further arguments of the average.
    unknown: Vec<String>,
}

impl Arguments {
    fn find(values: &Checkpoint) -> Option<Arguments> {
        let entry = |entry: &'static str| DECAYS.iter().map(move |name| (entry, *name));
        let mut places = ARGUMENTS.iter().flat_map(|name| entry(name));
        let (entry, name, decay) =
            places.find_map(|(entry, name)| Some((entry, name, values.float(&[entry, name])?)))?;
        let adjusted = adjusted(values, entry, decay);
        let is_known = |other: &str| {
            other == name || other == WARMUP || OTHERS.contains(&other) || (adjusted.is_some() && other == EMA_STEPS)
        };
        let fields = values.fields(entry).into_iter();
        let of_ema = fields.filter(|other| other.split(['_', '-', '.']).any(|word| word == "ema"));
        let unknown = of_ema.filter(|other| !is_known(other)).map(|other| format!("{entry}.{other}")).collect();
        let warmup = values.bool(&[entry, WARMUP]).unwrap_or(false);
        Some(Arguments { place: format!("{entry}.{name}"), decay, warmup, adjusted, unknown })
    }

    fn decay(self) -> RecordedDecay {
        let Arguments { place, decay, warmup, adjusted, unknown } = self;
        if !unknown.is_empty() {
            let why = format!(
                "the files record `{place}` {decay}, but also {}, which may change the decay of an update",
                listed(&unknown)
            );
            return RecordedDecay::Unclear(why);
        }
        let (ramp, how) = match (warmup, adjusted) {
            (true, _) => (Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 }, " with timm's warm-up".to_owned()),
            (false, Some(_)) => (Ramp::Constant, format!(", by torchvision's adjustment of {decay},")),
            (false, None) => (Ramp::Constant, String::new()),
        };
        let decay = EmaDecay { beta: adjusted.unwrap_or(decay), floor: 0.0, ramp };
        if let Err(why) = decay.check() {
            return RecordedDecay::Unclear(format!("the files record `{place}`: {why}"));
        }
        let note =
            format!("the decay {}{how} is that of `{place}` in the files; --beta (`beta`) gives another", decay.beta);
        RecordedDecay::Known(decay, note)
    }
}

/// Returns the decay of an update as torchvision's training adjusts it (`references/classification/train.py`):
/// `1 - min(1, (1 - decay) adjust)`, where `adjust` is processes times batch size times steps, divided by epochs.
fn adjusted(values: &Checkpoint, entry: &str, decay: f64) -> Option<f64> {
    let argument = |name| values.float(&[entry, name]);
    let images = argument("world_size")? * argument("batch_size")? * argument(EMA_STEPS)?;
    let adjust = images / argument("epochs")?;
    Some(1.0 - ((1.0 - decay) * adjust).min(1.0))
}
