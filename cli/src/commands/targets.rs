//! Options that name profiles and targets.

use std::fs::File;
use std::path::{Path, PathBuf};

use clap::Args;
use posthoc_ema::{Error, Profile, Shape};

use super::list::{Numbers, Windows, window};
use super::{Failure, profile_csv};

/// Profiles that one running average can track, in each of their parametrisations.
#[derive(Args)]
pub struct FamilyArgs {
    /// Power-function profiles by relative standard deviation, above 0 and at most 0.288675
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    sigma_rel: Vec<Numbers>,
    /// Power-function profiles by exponent
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    gamma: Vec<Numbers>,
    /// Exponential profiles (classical EMA) by decay per step
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    beta: Vec<Numbers>,
    /// Exponential profiles by half-life in steps
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    half_life: Vec<Numbers>,
}

impl FamilyArgs {
    /// Returns all profiles, in the order of the flags' documentation.
    pub fn profiles(&self) -> Result<Vec<Profile>, Failure> {
        profiles(&self.sigma_rel, Profile::sigma_rel)
            .chain(profiles(&self.gamma, Profile::gamma))
            .chain(profiles(&self.beta, Profile::beta))
            .chain(profiles(&self.half_life, Profile::half_life))
            .collect()
    }
}

/// Profiles of the averages to synthesize.
#[derive(Args)]
#[command(next_help_heading = "Targets (in lists ... is an evenly spaced rest: 0.05,0.06,...,0.28)")]
pub struct TargetArgs {
    #[command(flatten)]
    families: FamilyArgs,
    /// Plain means over a window in steps, or in percent of the time: 5000,20%
    #[arg(long, value_name = "LIST")]
    uniform: Vec<Windows>,
    /// Linearly growing weights over a window
    #[arg(long, value_name = "LIST")]
    linear: Vec<Windows>,
    /// Stand-ins for learning-rate decay over a window; shapes: linear, cosine, 1-sqrt
    #[arg(long, value_name = "SHAPE:WINDOW", value_delimiter = ',')]
    lr_decay: Vec<String>,
    /// Profiles from two-column CSV files: time as a share of the whole, cumulative share
    #[arg(long, value_name = "FILE")]
    profile_csv: Vec<PathBuf>,
}

const NO_TARGET: &str = "no target: name at least one, such as --uniform 100% for the plain mean of the whole time, \
                         or --sigma-rel 0.15 for an average whose weights grow towards its end";

impl TargetArgs {
    /// Returns all targets, in the order of the flags' documentation.
    pub fn profiles(&self) -> Result<Vec<Profile>, Failure> {
        let mut targets = self.families.profiles()?;
        for (windows, make) in [(&self.uniform, Profile::uniform as fn(_) -> _), (&self.linear, Profile::linear)] {
            for window in windows.iter().flat_map(|windows| &windows.0) {
                targets.push(make(*window).map_err(Failure::of_argument)?);
            }
        }
        for text in &self.lr_decay {
            targets.push(lr_decay(text)?);
        }
        for path in &self.profile_csv {
            targets.push(read_profile(path)?);
        }
        if targets.is_empty() {
            return Err(Failure::Usage(NO_TARGET.into()));
        }
        Ok(targets)
    }
}

/// Returns every number of several lists.
pub fn numbers(lists: &[Numbers]) -> impl Iterator<Item = f64> {
    lists.iter().flat_map(|list| list.0.iter().copied())
}

/// Makes a profile of each number of several lists.
pub fn profiles(
    lists: &[Numbers],
    make: fn(f64) -> posthoc_ema::Result<Profile>,
) -> impl Iterator<Item = Result<Profile, Failure>> {
    numbers(lists).map(move |value| make(value).map_err(Failure::of_argument))
}

/// Converts the steps of `--steps` to whole numbers.
pub fn whole_steps(list: &Numbers) -> Result<Vec<u64>, Failure> {
    let mut steps = Vec::new();
    for &step in &list.0 {
        // Above 2^53 an f64 does not hold every whole number.
        if !(step >= 1.0 && step <= 2f64.powi(53) && step.fract() == 0.0) {
            let why = format!("--steps: {step} is not a step: steps are whole numbers above 0");
            return Err(Failure::Usage(why));
        }
        steps.push(step as u64);
    }
    Ok(steps)
}

/// Names a target's file: `sigma_rel-0.15.step-20000`. The name of a table has its number among the targets.
pub fn target_name(index: usize, profile: &Profile, at: u64) -> String {
    let target = profile.to_string().replace(' ', "-");
    let number = if target.starts_with("table") { format!("-{}", index + 1) } else { String::new() };
    format!("{target}{number}.step-{at}")
}

fn lr_decay(text: &str) -> Result<Profile, Failure> {
    let wrong = |why: &str| Failure::Usage(format!("--lr-decay {text}: {why}"));
    let (shape, steps) = text.split_once(':').ok_or_else(|| wrong("write it as SHAPE:WINDOW, such as cosine:20%"))?;
    let shape = match shape {
        "linear" => Shape::Linear,
        "cosine" => Shape::Cosine,
        "1-sqrt" => Shape::OneMinusSqrt,
        _ => return Err(wrong("the shapes are linear, cosine and 1-sqrt")),
    };
    let window = window(steps).map_err(|why| wrong(&why))?;
    Profile::lr_decay(shape, window).map_err(Failure::of_argument)
}

fn read_profile(path: &Path) -> Result<Profile, Failure> {
    let file = File::open(path).map_err(|source| Error::Io { action: "read", path: path.to_owned(), source })?;
    profile_csv::read(file).map_err(|reason| Failure::Failed(Error::Unexpected { path: path.to_owned(), reason }))
}
