//! Flags to profiles.

use std::fs::File;
use std::path::Path;

use posthoc_ema::{Error, Forecast, Profile, Shape, math::Schedule};

use super::args::{Before, Families, Targets};
use super::list::{Numbers, window};
use super::{Failure, table};

/// A value out of range on the command line is bad usage.
pub fn usage(error: Error) -> Failure {
    match error {
        Error::Parameter { .. } | Error::NotTrackable { .. } | Error::Setting { .. } => {
            Failure::Usage(error.to_string())
        }
        other => Failure::Failed(other),
    }
}

/// Every number of several lists.
pub fn numbers(lists: &[Numbers]) -> impl Iterator<Item = f64> {
    lists.iter().flat_map(|list| list.0.iter().copied())
}

/// Makes a profile of each number.
pub fn profiles(
    lists: &[Numbers],
    make: fn(f64) -> posthoc_ema::Result<Profile>,
) -> impl Iterator<Item = Result<Profile, Failure>> {
    numbers(lists).map(move |value| make(value).map_err(usage))
}

impl Families {
    /// All profiles, in the order of the flags' documentation.
    pub fn profiles(&self) -> Result<Vec<Profile>, Failure> {
        profiles(&self.sigma_rel, Profile::sigma_rel)
            .chain(profiles(&self.gamma, Profile::gamma))
            .chain(profiles(&self.beta, Profile::beta))
            .chain(profiles(&self.half_life, Profile::half_life))
            .collect()
    }
}

impl Targets {
    /// All targets, in the order of the flags' documentation.
    pub fn profiles(&self) -> Result<Vec<Profile>, Failure> {
        let mut targets = self.families.profiles()?;
        for (windows, make) in [(&self.uniform, Profile::uniform as fn(_) -> _), (&self.linear, Profile::linear)] {
            for window in windows.iter().flat_map(|windows| &windows.0) {
                targets.push(make(*window).map_err(usage)?);
            }
        }
        for text in &self.lr_decay {
            targets.push(lr_decay(text)?);
        }
        for path in &self.profile_csv {
            targets.push(read_table(path)?);
        }
        if targets.is_empty() {
            return Err(Failure::Usage("no target: name at least one, such as --sigma-rel 0.15".into()));
        }
        Ok(targets)
    }
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
    Profile::lr_decay(shape, window(steps).map_err(|why| wrong(&why))?).map_err(usage)
}

fn read_table(path: &Path) -> Result<Profile, Failure> {
    let file = File::open(path).map_err(|source| Error::Io { action: "read", path: path.to_owned(), source })?;
    table::read(file).map_err(|reason| Failure::Failed(Error::Unexpected { path: path.to_owned(), reason }))
}

impl Before {
    /// The training that the flags tell of.
    pub fn forecast(&self, steps: u64) -> Result<Forecast, Failure> {
        let tracked = profiles(&self.track, Profile::sigma_rel).chain(profiles(&self.track_beta, Profile::beta));
        let mut tracked: Vec<Profile> = tracked.collect::<Result<_, _>>()?;
        if tracked.is_empty() {
            tracked = [0.05, 0.28].map(Profile::sigma_rel).into_iter().collect::<Result<_, _>>()?;
        }
        let schedule = Schedule {
            update_every: self.update_every,
            update_after_step: self.update_after_step,
            checkpoint_every: self.checkpoint_every,
        };
        Ok(Forecast { schedule, steps, keep: self.keep, retention: self.retention.0.clone(), tracked })
    }
}
