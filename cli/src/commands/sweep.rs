//! `posthoc-ema sweep`.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use crate::report;
use clap::Args;
use indicatif::ProgressBar;
use posthoc_ema::sweep::{Command, Edge, Goal, Observer, Sweep, Trial};
use posthoc_ema::{At, Profile, SweepOptions, SweepResult};
use serde_json::{Value, json};

use super::args::{Blending, Rounding, Targets};
use super::output::{byte_bar, print, print_json, round_bar, tell};
use super::picture::Plot;
use super::reading::Reading;
use super::{Failure, Outcome, targets};

/// Evaluate averages of many lengths with a command, and keep the best
///
/// All targets are synthesized in one pass over the snapshots and evaluated one after the other. Golden-section steps around
/// the best of them follow, in its own family. The best average is kept as best.safetensors in --out-dir, the others are
/// removed. Scores are recorded in sweep.json there after each evaluation: the same command goes on where it was
/// interrupted, and tries again what failed.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    pub run: PathBuf,
    /// Shell command that evaluates the safetensors file {}, and whose last line of output ends in a number, the
    /// score: loss 0.31. {} becomes the path, quoted for the shell: inside quotes, write "$POSTHOC_EMA_WEIGHTS"
    /// instead. POSTHOC_EMA_PROFILE holds the profile as JSON
    #[arg(long, value_name = "COMMAND")]
    pub eval: String,
    /// Directory of the sweep, which is made where it is missing
    #[arg(long, value_name = "DIR")]
    pub out_dir: PathBuf,
    /// Time of the targets [default: the newest snapshot]
    #[arg(long, value_name = "STEP")]
    pub at: Option<u64>,
    /// The largest score is the best [default: the smallest]
    #[arg(long)]
    pub maximize: bool,
    /// Evaluations around the best of the targets
    #[arg(long, value_name = "N", default_value_t = 6)]
    pub refine: usize,
    /// Seconds after which an evaluation is ended, and has failed [default: none]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// Averages that are synthesized in one pass, and lie in --out-dir at a time
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batch: u32,
    /// Keep every average, in the folder candidates in --out-dir
    #[arg(long)]
    pub keep_all: bool,
    #[command(flatten)]
    pub blending: Blending,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub reading: Reading,
    #[command(flatten)]
    pub rounding: Rounding,
    #[command(flatten)]
    pub plot: Plot,
    #[command(flatten)]
    pub targets: Targets,
}

/// Evaluates all targets and the steps around the best.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    let command = Command::new(&arguments.eval, timeout(arguments.timeout)?).map_err(targets::usage)?;
    let (run, _) = arguments.reading.open(&arguments.run)?;
    let progress = Progress::default();
    let options = SweepOptions {
        at: arguments.at.map_or(At::Latest, At::Step),
        evaluation: &arguments.eval,
        goal: if arguments.maximize { Goal::Maximize } else { Goal::Minimize },
        refine: arguments.refine,
        batch: arguments.batch as usize,
        noise: arguments.rounding.noise,
        dtype: arguments.blending.dtype(),
        device: arguments.blending.device,
        keep_all: arguments.keep_all,
        observer: &progress,
        ..SweepOptions::new(&arguments.out_dir, &profiles)
    };
    let swept = run.sweep(&options, |candidate| command.evaluate(candidate, &|bytes| progress.relay(bytes)));
    progress.clear();
    let swept = swept?;
    show(arguments, &swept);
    let failed = swept.sweep.failures().count();
    if swept.best.is_none() {
        return Err(Failure::Unhealthy(format!("no evaluation succeeded: all {failed} failed, as said above")));
    }
    let title = format!("{}, at step {}", arguments.eval, swept.at);
    Ok(arguments.plot.draw(|path| report::sweep_curve(path, &report::SweepCurve::of(&swept.sweep, title.clone())))?)
}

fn timeout(seconds: Option<f64>) -> Result<Option<Duration>, Failure> {
    let Some(seconds) = seconds else { return Ok(None) };
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    let wrong = || Failure::Usage(format!("--timeout {seconds}: give a number of seconds above 0"));
    duration.map(Some).ok_or_else(wrong)
}

fn show(arguments: &Arguments, swept: &SweepResult) {
    for (trial, why) in swept.sweep.failures() {
        tell(&format!("warning: {}: {why}", trial.profile));
    }
    if arguments.json {
        print_json(&document(swept));
        return;
    }
    print(&report::trials(&swept.sweep).to_string());
    if let (Some(best), Some(path)) = (swept.sweep.best(), &swept.best) {
        print(&format!("best at step {}: {}, kept as {}", swept.at, best.profile, path.display()));
    }
    match swept.sweep.edge() {
        Some(Edge::Shortest) => print("nothing shorter was evaluated: a list that goes on there may do better"),
        Some(Edge::Longest) => print("nothing longer was evaluated: a list that goes on there may do better"),
        None => {}
    }
}

fn document(swept: &SweepResult) -> Value {
    json!({
        "at": swept.at,
        "goal": swept.sweep.goal(),
        "best": swept.sweep.best().map(trial_json),
        "path": swept.best,
        "edge": swept.sweep.edge(),
        "evaluated": swept.evaluated,
        "failed": swept.sweep.failures().count(),
        "trials": swept.sweep.trials().iter().map(trial_json).collect::<Vec<_>>(),
    })
}

/// A trial as it is recorded, with its length: a profile's JSON tells `sigma_rel` by way of `gamma` only.
fn trial_json(trial: &Trial) -> Value {
    let mut object = json!(trial);
    object["length"] = trial.profile.family().map_or(Value::Null, |(family, length)| {
        let length: f64 = report::exact(length).parse().unwrap_or(length);
        json!({ family.length_name(): length })
    });
    object
}

/// Bars on stderr: bytes while averages are synthesized, and evaluations with the best so far.
#[derive(Default)]
struct Progress {
    bytes: Mutex<Option<ProgressBar>>,
    evaluations: Mutex<Option<ProgressBar>>,
}

impl Progress {
    /// What an evaluation writes to its stderr goes to ours, between the bars.
    fn relay(&self, bytes: &[u8]) {
        let write = || {
            // Nobody is left to be told where stderr is closed.
            let _ = std::io::stderr().write_all(bytes);
        };
        match self.evaluations.lock().ok().and_then(|bar| bar.clone()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn clear(&self) {
        for bar in [&self.bytes, &self.evaluations] {
            if let Some(bar) = bar.lock().ok().and_then(|mut bar| bar.take()) {
                bar.finish_and_clear();
            }
        }
    }
}

impl Observer for Progress {
    fn synthesizing(&self, _targets: usize, bytes: u64) {
        self.clear();
        if let Ok(mut bar) = self.bytes.lock() {
            *bar = Some(byte_bar(bytes, "synthesizing"));
        }
    }

    fn read(&self, bytes: u64) {
        if let Some(bar) = self.bytes.lock().ok().and_then(|bar| bar.clone()) {
            bar.inc(bytes);
        }
    }

    fn evaluating(&self, profile: &Profile, sweep: &Sweep) {
        self.clear();
        // Complete before it is drawn.
        let message = format!("evaluating {profile}{}", best_so_far(sweep));
        let bar = round_bar().with_message(message).with_position(sweep.trials().len() as u64);
        bar.set_length(sweep.planned() as u64);
        bar.enable_steady_tick(Duration::from_millis(500));
        if let Ok(mut current) = self.evaluations.lock() {
            *current = Some(bar);
        }
    }

    fn evaluated(&self, trial: &Trial, sweep: &Sweep) {
        let score = trial.score().map_or("failed".into(), report::exact);
        if let Some(bar) = self.evaluations.lock().ok().and_then(|bar| bar.clone()) {
            bar.println(format!("{}: {score}{}", trial.profile, best_so_far(sweep)));
        }
        self.clear();
    }
}

fn best_so_far(sweep: &Sweep) -> String {
    let best = sweep.best().and_then(|best| Some((best.score()?, &best.profile)));
    best.map_or(String::new(), |(score, profile)| format!(" (best so far {} at {profile})", report::exact(score)))
}
