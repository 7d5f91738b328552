//! `posthoc-ema sweep`.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use posthoc_ema::sweep::{Command, Edge, Goal, Observer, Sweep, Trial};
use posthoc_ema::{Profile, SweepOptions, SweepResult, shown};
use serde_json::{Value, json};

use super::args::{AtArgs, BlendArgs, NoiseArgs};
use super::open::OpenArgs;
use super::output::{byte_bar, print, print_json, print_warning, print_warnings, redraw_every, round_bar};
use super::plot::PlotArgs;
use super::targets::TargetArgs;
use super::{Failure, Outcome};
use crate::numbers::exact;
use crate::pictures::{self, SweepCurve};
use crate::tables;

/// Evaluate averages of many lengths with a command, and keep the best
///
/// All targets are synthesized in one pass over the snapshots and evaluated one after the other. Golden-section steps
/// around the best of them follow, in its own family. If the best is at an edge of the list, the steps go outwards
/// first, as far as the run makes averages with a relative error below 5%.
///
/// The best average is kept as best.safetensors in --out-dir, the others are removed. Scores are recorded in sweep.json
/// there after each evaluation: the same command goes on where it was interrupted, and tries again what failed.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: PathBuf,
    /// Shell command that evaluates the safetensors file {}, and whose last line of output ends in a number, the
    /// score: loss 0.31. {} becomes the path, quoted for the shell: inside quotes, write "$POSTHOC_EMA_WEIGHTS"
    /// instead. POSTHOC_EMA_PROFILE holds the profile as JSON
    #[arg(long, value_name = "COMMAND")]
    eval: String,
    /// Directory of the sweep, which is made if it is missing
    #[arg(long, value_name = "DIR")]
    out_dir: PathBuf,
    #[command(flatten)]
    at: AtArgs,
    /// The largest score is the best [default: the smallest]
    #[arg(long)]
    maximize: bool,
    /// Evaluations around the best of the targets
    #[arg(long, value_name = "N", default_value_t = 6)]
    refine: usize,
    /// Seconds after which an evaluation is ended, and has failed [default: none]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// Averages that are synthesized in one pass, and are in --out-dir at a time
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: u32,
    /// Keep every average, in the folder candidates in --out-dir
    #[arg(long)]
    keep_all: bool,
    #[command(flatten)]
    blend: BlendArgs,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    noise: NoiseArgs,
    #[command(flatten)]
    plot: PlotArgs,
    #[command(flatten)]
    targets: TargetArgs,
}

/// Evaluates all targets and the steps around the best.
pub fn run(arguments: &Arguments) -> Outcome {
    let profiles = arguments.targets.profiles()?;
    arguments.plot.check()?;
    let command = Command::new(&arguments.eval, timeout(arguments.timeout)?).map_err(Failure::of_argument)?;
    let (run, _) = arguments.open.open(&arguments.run)?;
    print_warnings(&run.plans_with(&profiles, arguments.at.at(), arguments.noise.noise)?);
    let bars = ProgressBars::default();
    let options = SweepOptions {
        at: arguments.at.at(),
        evaluation: &arguments.eval,
        goal: if arguments.maximize { Goal::Maximize } else { Goal::Minimize },
        refine: arguments.refine,
        batch: arguments.batch as usize,
        noise: arguments.noise.noise,
        dtype: arguments.blend.dtype(),
        device: arguments.blend.device,
        keep_all: arguments.keep_all,
        observer: &bars,
        ..SweepOptions::new(&arguments.out_dir, &profiles)
    };
    let swept = run.sweep(&options, |candidate| command.evaluate(candidate, &|bytes| bars.relay(bytes)));
    bars.clear();
    let swept = swept?;
    show(arguments, &swept);
    let failed = swept.sweep.failures().count();
    if swept.best.is_none() {
        return Err(Failure::Unhealthy(format!("no evaluation succeeded: all {failed} failed, see the warnings")));
    }
    let title = format!("{}, at step {}", arguments.eval, swept.at);
    let curve = SweepCurve::of(&swept.sweep, title);
    Ok(arguments.plot.draw(|path| pictures::draw_sweep(path, &curve))?)
}

fn timeout(seconds: Option<f64>) -> Result<Option<Duration>, Failure> {
    let Some(seconds) = seconds else { return Ok(None) };
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    let wrong = || Failure::Usage(format!("--timeout {seconds}: give a number of seconds above 0"));
    duration.map(Some).ok_or_else(wrong)
}

fn show(arguments: &Arguments, swept: &SweepResult) {
    for (trial, why) in swept.sweep.failures() {
        print_warning(&format!("{}: {why}", trial.profile));
    }
    if arguments.json {
        print_json(&document(swept));
        return;
    }
    print(&tables::trials(&swept.sweep).to_string());
    if let (Some(best), Some(path)) = (swept.sweep.best(), &swept.best) {
        print(&format!("best at step {}: {}, kept as {}", swept.at, best.profile, shown(path)));
    }
    if let Some(remark) = remark(swept) {
        print(&remark);
    }
}

/// Returns a remark on a flat curve, or on a best average at the edge of the evaluated ones.
fn remark(swept: &SweepResult) -> Option<String> {
    if swept.sweep.is_flat() {
        return Some("the curve is flat: all lengths have the same score".into());
    }
    let side = match swept.sweep.edge()? {
        Edge::Shortest => "shorter",
        Edge::Longest => "longer",
    };
    Some(if swept.at_limit {
        format!(
            "this run makes nothing {side} with a relative error below 5%: track other profiles in the next training"
        )
    } else {
        format!("nothing {side} was evaluated: more steps (--refine), or a list that goes on there, may do better")
    })
}

fn document(swept: &SweepResult) -> Value {
    json!({
        "at": swept.at,
        "goal": swept.sweep.goal(),
        "best": swept.sweep.best().map(trial_json),
        "path": swept.best,
        "edge": swept.sweep.edge(),
        "at_limit": swept.at_limit,
        "flat": swept.sweep.is_flat(),
        "evaluated": swept.evaluated,
        "failed": swept.sweep.failures().count(),
        "trials": swept.sweep.trials().iter().map(trial_json).collect::<Vec<_>>(),
    })
}

/// Returns a recorded trial with its length, since the JSON of a profile has `gamma` but not `sigma_rel`.
fn trial_json(trial: &Trial) -> Value {
    let mut object = json!(trial);
    object["length"] = trial.profile.family().map_or(Value::Null, |(family, length)| {
        let length: f64 = exact(length).parse().unwrap_or(length);
        json!({ family.length_name(): length })
    });
    object
}

/// Bars on stderr: bytes during a synthesis, and evaluations with the best score so far.
#[derive(Default)]
struct ProgressBars {
    bytes: Mutex<Option<ProgressBar>>,
    evaluations: Mutex<Option<ProgressBar>>,
}

impl ProgressBars {
    /// Passes an evaluation's stderr through to ours, between the bars.
    fn relay(&self, bytes: &[u8]) {
        let write = || {
            // An error means that stderr is closed.
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

impl Observer for ProgressBars {
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
        // The bar is complete before it is drawn.
        let message = format!("evaluating {profile}{}", best_so_far(sweep));
        let bar = round_bar().with_message(message).with_position(sweep.trials().len() as u64);
        bar.set_length(sweep.planned() as u64);
        redraw_every(Duration::from_millis(500), &bar);
        if let Ok(mut current) = self.evaluations.lock() {
            *current = Some(bar);
        }
    }

    fn evaluated(&self, trial: &Trial, sweep: &Sweep) {
        let score = trial.score().map_or("failed".into(), exact);
        if let Some(bar) = self.evaluations.lock().ok().and_then(|bar| bar.clone()) {
            bar.println(format!("{}: {score}{}", trial.profile, best_so_far(sweep)));
        }
        self.clear();
    }
}

fn best_so_far(sweep: &Sweep) -> String {
    let best = sweep.best().and_then(|best| Some((best.score()?, &best.profile)));
    best.map_or(String::new(), |(score, profile)| format!(" (best so far {} at {profile})", exact(score)))
}
