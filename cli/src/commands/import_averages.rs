//! `posthoc-ema import --from averages`.

use std::path::Path;
use std::time::Instant;

use clap::Args;
use posthoc_ema::{AverageDecay, EmaDecay, ImportAverages, ImportReport, Ramp};

use super::list::Numbers;
use super::output::{byte_bar, print_report};
use super::targets::{numbers, whole_steps};
use super::{Failure, Outcome};

/// Options of averages that a training kept itself.
#[derive(Args)]
#[command(next_help_heading = "Averages that a training kept (--from averages)")]
pub struct AveragesArgs {
    /// Decay per update of each average, in the order of --key; --sigma-rels and --gammas give those of power functions
    /// [default: as recorded by diffusers, in the names of files, or by trainings that store their arguments, such as
    /// timm's and torchvision's]
    #[arg(long, value_name = "LIST", allow_negative_numbers = true)]
    beta: Vec<Numbers>,
    /// Growth of the decay at the start: ratio[:OFFSET] is (1+k)/(OFFSET+k) with 10 as in diffusers,
    /// inverse-gamma[:GAMMA[:POWER]] is 1-(1+k/GAMMA)^-POWER with 1 and 2/3 as in timm, exponential:TAU is
    /// BETA(1-exp(-k/TAU)) as in ultralytics, where TAU is 2000; k counts the updates
    #[arg(long, value_name = "RAMP")]
    ramp: Option<Ramp>,
    /// Entry of each checkpoint that holds an average, or folder of this name in each checkpoint's folder; may be given
    /// several times [default: found by the names that timm, torchvision, Lightning, ultralytics, diffusers, OpenAI and
    /// EDM2 use]
    #[arg(long, value_name = "NAME")]
    key: Vec<String>,
    /// Entry, or folder, of the raw weights, which join as averages of their own step [default: found for timm,
    /// torchvision, Lightning, OpenAI and diffusers, unless --key is given]
    #[arg(long, value_name = "NAME")]
    raw: Option<String>,
    /// Steps of the checkpoints, in the order of their names [default: from metadata or names]
    #[arg(long, value_name = "LIST")]
    steps: Option<Numbers>,
    /// Tensors that the training copied instead of averaging: a name or a glob; may be given several times
    #[arg(long, value_name = "GLOB")]
    copy: Vec<String>,
    /// Leave these tensors out: a name or a glob; may be given several times
    #[arg(long, value_name = "GLOB")]
    leave_out: Vec<String>,
    /// Accept checkpoints whose config.json differ in this setting: a key, joined by dots if nested, or a glob; may be
    /// given several times
    #[arg(long, value_name = "KEY")]
    ignore_config: Vec<String>,
}

impl AveragesArgs {
    /// Checks that no option of averages is given for another tool.
    pub fn check_unused(&self) -> Outcome {
        let given = [
            ("--beta", !self.beta.is_empty()),
            ("--ramp", self.ramp.is_some()),
            ("--key", !self.key.is_empty()),
            ("--raw", self.raw.is_some()),
            ("--steps", self.steps.is_some()),
            ("--copy", !self.copy.is_empty()),
            ("--leave-out", !self.leave_out.is_empty()),
            ("--ignore-config", !self.ignore_config.is_empty()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(Failure::Usage(format!("{option} is for --from averages: leave it out"))),
            None => Ok(()),
        }
    }
}

/// Options of an import that other tools have too.
pub struct ImportPaths<'a> {
    pub dir: &'a Path,
    pub run: &'a Path,
    /// True if notes go to stderr.
    pub notes: bool,
}

impl AveragesArgs {
    /// Writes averages that a training kept as a run. Returns the summary and the seconds that it took.
    ///
    /// `common` has the options that other tools have too, and the decays of power functions.
    pub fn import(&self, paths: &ImportPaths<'_>, common: ImportAverages) -> Result<(ImportReport, f64), Failure> {
        let found = self.options(common)?.open(paths.dir).map_err(Failure::of_argument)?;
        if paths.notes {
            found.notes().iter().for_each(|note| print_report(note));
        }
        let bar = byte_bar(found.bytes(), "importing");
        let start = Instant::now();
        let imported = found.write(paths.run, Some(&|bytes| bar.inc(bytes)));
        bar.finish_and_clear();
        Ok((imported?, start.elapsed().as_secs_f64()))
    }

    fn options(&self, common: ImportAverages) -> Result<ImportAverages, Failure> {
        let ramp = self.ramp.unwrap_or_default();
        if self.ramp.is_some() && self.beta.is_empty() {
            return Err(Failure::Usage("--ramp is the start of an EMA: give its decay with --beta".into()));
        }
        let betas = numbers(&self.beta).map(|beta| AverageDecay::Ema(EmaDecay { beta, floor: 0.0, ramp }));
        Ok(ImportAverages {
            keys: self.key.clone(),
            decays: betas.chain(common.decays).collect(),
            raw: self.raw.clone(),
            steps: self.steps.as_ref().map(whole_steps).transpose()?,
            copy: self.copy.clone(),
            leave_out: self.leave_out.clone(),
            ignore_config: self.ignore_config.clone(),
            ..common
        })
    }
}
