//! Decay of an average, as trainers record it among the arguments of the training. They are read as data.

use std::path::PathBuf;

use crate::checkpoint::is_pytorch_file;
use crate::error::{Result, listed};
use crate::math::{EmaDecay, Ramp};
use crate::pytorch::Checkpoint;

/// Entries of training checkpoints with the arguments of the training: a namespace, or a dict.
const ARGUMENTS: [&str; 5] = ["args", "hyper_parameters", "config", "cfg", "opt"];

/// Arguments with the decay per update, as timm's training and others call it.
const DECAYS: [&str; 2] = ["model_ema_decay", "ema_decay"];

/// Argument of timm for the warm-up of its `ModelEmaV3`.
const WARMUP: &str = "model_ema_warmup";

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
}

/// Arguments of a training that concern its average.
#[derive(Debug, PartialEq)]
struct Arguments {
    /// Keys that lead to the decay, joined by a dot.
    place: String,
    decay: f64,
    warmup: bool,
    /// Further arguments of the average.
    unknown: Vec<String>,
}

impl Arguments {
    fn find(values: &Checkpoint) -> Option<Arguments> {
        let entry = |entry: &'static str| DECAYS.iter().map(move |name| (entry, *name));
        let mut places = ARGUMENTS.iter().flat_map(|name| entry(name));
        let (entry, name, decay) =
            places.find_map(|(entry, name)| Some((entry, name, values.float(&[entry, name])?)))?;
        let is_known = |other: &str| other == name || other == WARMUP || OTHERS.contains(&other);
        let fields = values.fields(entry).into_iter();
        let of_ema = fields.filter(|other| other.split(['_', '-', '.']).any(|word| word == "ema"));
        let unknown = of_ema.filter(|other| !is_known(other)).map(|other| format!("{entry}.{other}")).collect();
        let warmup = values.bool(&[entry, WARMUP]).unwrap_or(false);
        Some(Arguments { place: format!("{entry}.{name}"), decay, warmup, unknown })
    }

    fn decay(self) -> RecordedDecay {
        let Arguments { place, decay, warmup, unknown } = self;
        if !unknown.is_empty() {
            let why = format!(
                "the files record `{place}` {decay}, but also {}, which may change the decay of an update",
                listed(&unknown)
            );
            return RecordedDecay::Unclear(why);
        }
        let (ramp, how) = match warmup {
            true => (Ramp::InverseGamma { gamma: 1.0, power: 2.0 / 3.0 }, " with timm's warm-up"),
            false => (Ramp::Constant, ""),
        };
        let decay = EmaDecay { beta: decay, floor: 0.0, ramp };
        if let Err(why) = decay.check() {
            return RecordedDecay::Unclear(format!("the files record `{place}`: {why}"));
        }
        let note =
            format!("the decay {}{how} is that of `{place}` in the files; --beta (`beta`) gives another", decay.beta);
        RecordedDecay::Known(decay, note)
    }
}
