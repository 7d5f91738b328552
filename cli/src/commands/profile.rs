//! `posthoc-ema profile`.

use clap::Args;
use posthoc_ema::Profile;
use posthoc_ema::math::{MAX_SIGMA_REL, sigma_rel_to_beta, sigma_rel_to_half_life};

use super::output::{print, print_json};
use super::targets::FamilyArgs;
use super::{Failure, Outcome};
use crate::numbers::{exact, number};
use crate::tables;

/// Convert between the parametrisations of profiles
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    families: FamilyArgs,
    /// Training length at which the two families are compared
    #[arg(long, value_name = "T")]
    steps: Option<u64>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// A profile in each of its parametrisations.
struct Conversion {
    profile: Profile,
    gamma: Option<f64>,
    sigma_rel: Option<f64>,
    beta: Option<f64>,
    half_life: Option<f64>,
    /// Standard deviation in steps.
    deviation: Option<f64>,
}

/// Converts profiles. Between the two families that needs `--steps`: they match at one training length only.
pub fn run(arguments: &Arguments) -> Outcome {
    let all = arguments.families.profiles()?;
    if all.is_empty() {
        return Err(Failure::Usage("no profile: name one by --sigma-rel, --gamma, --beta or --half-life".into()));
    }
    let steps = arguments.steps.map(|steps| steps as f64);
    let conversions: Vec<Conversion> = all.into_iter().map(|profile| convert(profile, steps)).collect();
    if arguments.json {
        let profiles: Vec<_> = conversions.iter().map(Conversion::json).collect();
        print_json(&serde_json::json!({ "steps": arguments.steps, "profiles": profiles }));
        return Ok(());
    }
    let mut table = tables::table(&["profile", "gamma", "sigma_rel", "beta", "half-life", "deviation in steps"]);
    for conversion in &conversions {
        table.add_row(conversion.row());
    }
    print(&table.to_string());
    if steps.is_none() {
        print("Give --steps T to compare the two families: they match at one training length only.");
    }
    Ok(())
}

fn convert(profile: Profile, steps: Option<f64>) -> Conversion {
    let sigma_rel = profile.as_sigma_rel().or_else(|| {
        // Wider than the plain mean, no power function matches.
        profile.sigma_rel_at(steps?).filter(|&sigma_rel| sigma_rel <= MAX_SIGMA_REL)
    });
    let gamma = profile.as_gamma().or_else(|| Profile::sigma_rel(sigma_rel?).ok()?.as_gamma());
    let beta = profile.as_beta().or_else(|| sigma_rel_to_beta(sigma_rel?, steps?).ok());
    let half_life = profile.as_half_life().or_else(|| sigma_rel_to_half_life(sigma_rel?, steps?).ok());
    let deviation = match profile.as_beta() {
        Some(_) => profile.sigma_rel_at(1.0),
        None => sigma_rel.zip(steps).map(|(sigma_rel, steps)| sigma_rel * steps),
    };
    Conversion { profile, gamma, sigma_rel, beta, half_life, deviation }
}

impl Conversion {
    fn row(&self) -> [String; 6] {
        let show = |value: Option<f64>| value.map_or("-".into(), exact);
        let short = |value: Option<f64>| value.map_or("-".into(), number);
        [
            self.profile.to_string(),
            show(self.gamma),
            show(self.sigma_rel),
            show(self.beta),
            short(self.half_life),
            short(self.deviation),
        ]
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "profile": self.profile,
            "gamma": self.gamma,
            "sigma_rel": self.sigma_rel,
            "beta": self.beta,
            "half_life": self.half_life,
            "deviation": self.deviation,
        })
    }
}
