//! `posthoc-ema sweep`.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use posthoc_ema::sweep::{Candidate, Command, Edge, Goal, Metric, Observer, Sweep, SweepLine, Trial, TrialOutcome};
use posthoc_ema::{At, OutputForm, Plan, Profile, Run, SweepOptions, SweepResult, shown};
use serde_json::{Value, json};

use super::args::{AtArgs, BlendArgs, NoiseArgs};
use super::form::{FormArgs, LikeArgs};
use super::open::OpenArgs;
use super::output::{
    byte_bar, print, print_json, print_report, print_warning, print_warnings, redraw_every, round_bar,
};
use super::plot::PlotArgs;
use super::sweep_errors::KeptErrors;
use super::targets::TargetArgs;
use super::{Failure, Outcome};
use crate::numbers::{exact, number};
use crate::pictures::{self, SweepCurve};
use crate::trials;

/// Evaluate averages of many lengths with a command, and keep the best
///
/// All targets are synthesized in one pass over the snapshots and evaluated one after the other. Golden-section steps
/// around the best of them follow, in its own family. If the best is at an edge of the list, the steps go outwards
/// first, as far as the run makes averages with a relative error below 5%.
///
/// The best average is kept as best.safetensors in --out-dir, or as the folder best; the others are removed. Scores are
/// recorded in sweep.json there after each evaluation: the same command goes on where it was interrupted, and tries
/// again what failed.
#[derive(Args)]
pub struct Arguments {
    /// Directory of the run
    run: PathBuf,
    /// Shell command that evaluates the safetensors file {}, or the folder {} with --like or --shard-size. Its last
    /// line of output ends in a number, the score: loss 0.31. {} becomes the path, quoted for the shell: inside quotes,
    /// write "$POSTHOC_EMA_WEIGHTS" instead. POSTHOC_EMA_PROFILE holds the profile as JSON. {repeat} and
    /// POSTHOC_EMA_REPEAT are the number of the repeat, {job} and POSTHOC_EMA_JOB that of the job
    #[arg(long, value_name = "COMMAND")]
    eval: String,
    /// Directory of the sweep, which is made if it is missing
    #[arg(long, value_name = "DIR")]
    out_dir: PathBuf,
    #[command(flatten)]
    at: AtArgs,
    /// The largest score is the best [default: the smallest]
    #[arg(long, conflicts_with = "metric")]
    maximize: bool,
    /// Take this metric from the last line of output that begins with its name: fid: 2.1. Several numbers in the line
    /// are several measurements. Small values are better, or with NAME:max large ones. May be given more than once:
    /// each metric has its own best, and its own refinement
    #[arg(long, value_name = "NAME[:min|max]", value_parser = Metric::parse)]
    metric: Vec<Metric>,
    /// Give the tensors of this glob, such as decoder.*, a length of their own; may be given more than once. All
    /// tensors begin with one length. Then that of the other tensors and that of each group are swept in turns
    #[arg(long, value_name = "GLOB")]
    group: Vec<String>,
    /// Evaluate each average together with one of this run, such as a guiding model's: {with} becomes its path, and
    /// POSTHOC_EMA_WITH holds it. Its length is swept in turns with the other one, at its newest snapshot
    #[arg(long, value_name = "RUN")]
    with: Option<PathBuf>,
    /// With --with: folder of the second run's model, which its averages are written like [default: that of --like]
    #[arg(long, value_name = "MODEL_DIR", requires = "with")]
    with_like: Option<PathBuf>,
    /// Turns in which each length is swept at most, with --group or --with; for each metric
    #[arg(long, value_name = "N", default_value_t = 2)]
    rounds: usize,
    /// Evaluations of each average, for a standard error. The command should seed what is random by {repeat}
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Evaluations at a time, such as one for each GPU: CUDA_VISIBLE_DEVICES={job}. Targets, repeats and refinements
    /// run side by side. Refinements at a time cut the range around the best evenly
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: u32,
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
    form: FormArgs,
    #[command(flatten)]
    like: LikeArgs,
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
    let command = command(arguments)?;
    let (run, _) = arguments.open.open(&arguments.run)?;
    let second = arguments.with.as_ref().map(|path| arguments.open.open(path)).transpose()?;
    let form = arguments.form.of_run(&arguments.like)?;
    let with_form = arguments.form.of_second_run(arguments.with_like.as_ref(), &arguments.like)?;
    let plans = run.plans_with(&profiles, arguments.at.at(), arguments.noise.noise)?;
    print_warnings(&plans);
    check_form(&run, &plans, &form)?;
    if let Some((second, _)) = &second {
        check_form(second, &second.plans_with(&profiles, At::Latest, arguments.noise.noise)?, &with_form)?;
    }
    let bars = ProgressBars::default();
    let options = SweepOptions {
        at: arguments.at.at(),
        evaluation: &arguments.eval,
        goal: if arguments.maximize { Goal::Maximize } else { Goal::Minimize },
        metrics: &arguments.metric,
        groups: &arguments.group,
        with: second.as_ref().map(|(run, _)| run),
        rounds: arguments.rounds,
        repeats: arguments.repeats,
        refine: arguments.refine,
        batch: arguments.batch as usize,
        noise: arguments.noise.noise,
        dtype: arguments.blend.dtype(),
        form: Some(&form),
        with_form: Some(&with_form),
        device: arguments.blend.device,
        keep_all: arguments.keep_all,
        observer: &bars,
        ..SweepOptions::new(&arguments.out_dir, &profiles)
    };
    let swept = if arguments.jobs == 1 {
        run.sweep(&options, |candidate| command.evaluate(candidate, &|bytes| bars.relay(bytes)))
    } else {
        let evaluate = |candidate: &Candidate<'_>| {
            let place = bars.errors.begin(candidate);
            command.evaluate(candidate, &|bytes| bars.errors.append(&place, bytes))
        };
        run.sweep_parallel(&options, arguments.jobs, evaluate)
    };
    bars.clear();
    let swept = swept?;
    show(arguments, &swept);
    let failed = swept.trials.iter().filter(|trial| trial.score().is_none()).count();
    if swept.best.is_empty() {
        return Err(Failure::Unhealthy(format!("no evaluation succeeded: all {failed} failed, see the warnings")));
    }
    let title = format!("{}, at step {}", arguments.eval, swept.at);
    let curves = if swept.lines.is_empty() {
        SweepCurve::all_of(&swept.sweep, &title)
    } else {
        SweepCurve::of_lines(&swept.lines, &title)
    };
    Ok(arguments.plot.draw(|path| pictures::draw_sweep(path, &curves))?)
}

fn command(arguments: &Arguments) -> Result<Command, Failure> {
    let command = Command::new(&arguments.eval, timeout(arguments.timeout)?).map_err(Failure::of_argument)?;
    let command = command.with_metrics(&arguments.metric);
    if arguments.with.is_some() { command.with_second().map_err(Failure::of_argument) } else { Ok(command) }
}

/// Checks that averages fit a form, and prints notes on it.
fn check_form(run: &Run, plans: &[Plan], form: &OutputForm) -> Outcome {
    run.check_form(plans, form).map_err(Failure::of_argument)?.iter().for_each(|note| print_report(note));
    Ok(())
}

fn timeout(seconds: Option<f64>) -> Result<Option<Duration>, Failure> {
    let Some(seconds) = seconds else { return Ok(None) };
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    let wrong = || Failure::Usage(format!("--timeout {seconds}: give a number of seconds above 0"));
    duration.map(Some).ok_or_else(wrong)
}

fn show(arguments: &Arguments, swept: &SweepResult) {
    for trial in &swept.trials {
        if let TrialOutcome::Error(why) = &trial.outcome {
            print_warning(&format!("{}: {why}", trials::targets(trial)));
        }
    }
    if arguments.json {
        print_json(&document(swept));
        return;
    }
    let sweep = &swept.sweep;
    if !arguments.group.is_empty() || arguments.with.is_some() {
        return show_joint(swept);
    }
    print(&trials::trials(sweep).to_string());
    if sweep.metrics().len() > 1 && !sweep.unbeaten().is_empty() {
        print("no other average is as good as these in all metrics and better in one:");
        print(&trials::unbeaten(sweep).to_string());
    }
    for (metric, path) in swept.best.iter().enumerate() {
        let Some(best) = sweep.best_by(metric) else { continue };
        let by =
            if sweep.metrics().len() == 1 { String::new() } else { format!(" by {}", sweep.metrics()[metric].name) };
        print(&format!("best{by} at step {}: {}, kept as {}", swept.at, best.profile, shown(path)));
        if sweep.is_flat_by(metric) {
            print(&flat(sweep, metric));
        } else if let Some(as_good) = trials::as_good(sweep, metric) {
            print(&as_good);
        }
    }
    if let Some(remark) = remark(swept) {
        print(&remark);
    }
}

/// Prints the trials of a joint sweep, and the best length of each part by each metric.
fn show_joint(swept: &SweepResult) {
    let names: Vec<&str> = swept.sweep.metrics().iter().map(|metric| metric.name.as_str()).collect();
    print(&trials::joint(swept, &swept.trials).to_string());
    if names.len() > 1 && !swept.unbeaten.is_empty() {
        print("no other average is as good as these in all metrics and better in one:");
        print(&trials::joint(swept, &swept.unbeaten).to_string());
    }
    for (metric, best) in swept.best_trials.iter().enumerate() {
        let by = if names.len() == 1 { String::new() } else { format!(" by {}", names[metric]) };
        let paths = [&swept.best, &swept.best_with].into_iter().filter_map(|paths| paths.get(metric));
        let paths: Vec<String> = paths.map(|path| shown(path).to_string()).collect();
        let targets = trials::targets(best);
        print(&format!("best{by} at step {}: {targets}, kept as {}", swept.at, paths.join(" and ")));
        for SweepLine { part, sweep, .. } in swept.lines.iter().filter(|line| line.metric == metric) {
            let remark =
                if sweep.is_flat_by(metric) { Some(flat(sweep, metric)) } else { trials::as_good(sweep, metric) };
            if let Some(remark) = remark {
                print(&format!("{}: {remark}", trials::part_name(part.as_deref())));
            }
        }
    }
    if !swept.settled {
        print("the lengths still changed in the last turn: more turns (--rounds) may do better");
    }
}

/// Describes a flat curve.
fn flat(sweep: &Sweep, metric: usize) -> String {
    match sweep.comparison(metric) {
        Some(comparison) if comparison.standard_error > 0.0 => format!(
            "the curve is flat: the lengths differ by no more than the noise (standard error {}); more repeats may \
             tell them apart",
            number(comparison.standard_error)
        ),
        _ => "the curve is flat: all lengths have the same score".into(),
    }
}

/// Returns a remark on a best average at the edge of the evaluated ones.
fn remark(swept: &SweepResult) -> Option<String> {
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
    let sweep = &swept.sweep;
    let failed = swept.trials.iter().filter(|trial| trial.score().is_none()).count();
    let mut document = json!({
        "at": swept.at,
        "goal": sweep.goal(),
        "best": swept.best_trials.first().map(trial_json),
        "path": swept.best.first(),
        "edge": sweep.edge(),
        "at_limit": swept.at_limit,
        "flat": sweep.is_flat(),
        "evaluated": swept.evaluated,
        "failed": failed,
        "metrics": (0..sweep.metrics().len()).map(|metric| metric_json(swept, metric)).collect::<Vec<_>>(),
        "trials": swept.trials.iter().map(trial_json).collect::<Vec<_>>(),
    });
    if sweep.metrics().len() > 1 {
        document["unbeaten"] = swept.unbeaten.iter().map(trial_json).collect();
    }
    if !swept.lines.is_empty() {
        document["lines"] = swept.lines.iter().map(line_json).collect();
        document["settled"] = swept.settled.into();
    }
    document
}

/// Returns the best profile along one length of a joint sweep, and those that are as good.
fn line_json(line: &SweepLine) -> Value {
    let SweepLine { metric, part, sweep } = line;
    let comparison = sweep.comparison(*metric);
    json!({
        "metric": sweep.metrics()[*metric].name,
        "part": part,
        "best": sweep.best_by(*metric).map(|best| length_json(&best.profile)),
        "flat": sweep.is_flat_by(*metric),
        "edge": sweep.edge_by(*metric),
        "standard_error": comparison.as_ref().map(|comparison| comparison.standard_error),
        "as_good": comparison.map(|comparison| comparison.as_good.iter().map(length_json).collect::<Vec<_>>()),
    })
}

/// Returns the best trial by a metric, and the profiles that are as good if the evaluations were repeated.
fn metric_json(swept: &SweepResult, metric: usize) -> Value {
    let sweep = &swept.sweep;
    let best = swept.best_trials.get(metric);
    let mut object = json!({
        "name": sweep.metrics()[metric].name,
        "goal": sweep.metrics()[metric].goal,
        "best": best.map(trial_json),
        "score": best.and_then(|best| best.mean(metric)),
        "path": swept.best.get(metric),
    });
    // Along the lines of a joint sweep there is one comparison each.
    if swept.lines.is_empty() {
        let comparison = sweep.comparison(metric);
        object["flat"] = sweep.is_flat_by(metric).into();
        object["standard_error"] = json!(comparison.as_ref().map(|comparison| comparison.standard_error));
        object["as_good"] = json!(comparison.map(|c| c.as_good.iter().map(length_json).collect::<Vec<_>>()));
    }
    object
}

/// Returns a recorded trial with its length, since the JSON of a profile has `gamma` but not `sigma_rel`.
fn trial_json(trial: &Trial) -> Value {
    let mut object = json!(trial);
    object["length"] = length_json(&trial.profile);
    if !trial.groups.is_empty() {
        let lengths = trial.groups.iter().map(|(group, profile)| (group.clone(), length_json(profile)));
        object["group_lengths"] = lengths.collect();
    }
    object
}

fn length_json(profile: &Profile) -> Value {
    profile.family().map_or(Value::Null, |(family, length)| {
        let length: f64 = exact(length).parse().unwrap_or(length);
        json!({ family.length_name(): length })
    })
}

/// Bars on stderr: bytes during a synthesis, and evaluations with the best score so far.
#[derive(Default)]
struct ProgressBars {
    bytes: Mutex<Option<ProgressBar>>,
    evaluations: Mutex<Option<ProgressBar>>,
    errors: KeptErrors,
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
        let bar = round_bar().with_message(message).with_position(sweep.done() as u64);
        bar.set_length(sweep.planned() as u64);
        redraw_every(Duration::from_millis(500), &bar);
        if let Ok(mut current) = self.evaluations.lock() {
            *current = Some(bar);
        }
    }

    fn evaluated(&self, trial: &Trial, sweep: &Sweep) {
        self.relay(&self.errors.take(&trial.profile));
        if trial.score().is_some() && !sweep.missing(&trial.profile).is_empty() {
            return self.clear();
        }
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
