//! Flags to profiles.

use std::path::Path;

use posthoc_ema::{At, Error, Forecast, Noise, Plan, Profile, Run, Shape, math::Schedule};

use super::Failure;
use super::args::{Before, Families, Targets};
use super::list::{Numbers, window};

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

/// A table of `(tau/T, F)` pairs; a first line without numbers is a header.
fn read_table(path: &Path) -> Result<Profile, Failure> {
    let wrong = |why: String| Failure::Failed(Error::Unexpected { path: path.to_owned(), reason: why });
    let mut format = csv::ReaderBuilder::new();
    format.has_headers(false).flexible(true).trim(csv::Trim::All).comment(Some(b'#'));
    let mut reader = format.from_path(path).map_err(|e| wrong(e.to_string()))?;
    let mut points = Vec::new();
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(|e| wrong(e.to_string()))?;
        let pair: Vec<Option<f64>> = record.iter().map(|field| field.parse().ok()).collect();
        match pair.as_slice() {
            [Some(time), Some(share)] => points.push((*time, *share)),
            [None, None] if i == 0 => {}
            _ => return Err(wrong(format!("row {}: two numbers are expected, tau/T and the cumulative share", i + 1))),
        }
    }
    Profile::table(points).map_err(|error| wrong(error.to_string()))
}

/// Solves targets on a run, or before training.
pub fn plans(
    run: Option<&Path>,
    before: &Before,
    targets: &[Profile],
    at: Option<u64>,
    noise: Noise,
) -> Result<Vec<Plan>, Failure> {
    let at = at.map_or(At::Latest, At::Step);
    match (run, before.steps) {
        (Some(run), _) => Ok(Run::open(run)?.plans_with(targets, at, noise)?),
        (None, Some(steps)) => before.forecast(steps)?.plans_with(targets, at, rho_before(noise)?).map_err(usage),
        (None, None) => {
            Err(Failure::Usage("name the directory of a run, or give --steps to plan before training".into()))
        }
    }
}

/// The regularisation of a plan before training.
fn rho_before(noise: Noise) -> Result<f64, Failure> {
    match noise {
        Noise::Off => Ok(0.0),
        Noise::Rho(rho) => Ok(rho),
        Noise::Auto => {
            let why = "--noise auto looks at stored snapshots, and before training there are none: give a number";
            Err(Failure::Usage(why.into()))
        }
    }
}

impl Before {
    fn forecast(&self, steps: u64) -> Result<Forecast, Failure> {
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
        Ok(Forecast { schedule, steps, keep: self.keep, tracked })
    }
}
