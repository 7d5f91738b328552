//! Trains a small generator of handwritten digits, tracks averages of its weights, and finds the best length
//! afterwards: `cargo run --release -p posthoc-ema-candle --example digits`.

mod agreement;
mod data;
mod draw;
mod evaluate;
mod folder;
mod model;
mod progress;
mod sheet;
mod table;
#[cfg(test)]
mod tests;
mod track;
mod train;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_nn::VarMap;
use clap::Parser;
use posthoc_ema::{At, Output, Profile, Run, WriteOptions};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use agreement::Agreement;
use data::Split;
use evaluate::{Average, HeldOut, Losses};
use folder::Folder;
use sheet::Grid;
use track::{Tracked, Trackers};

/// Number of steps at which the result is checked.
const STEPS: u64 = 10_000;
/// Share of the last weights' loss by which the best average must lower it.
const IMPROVEMENT: f64 = 0.05;
const TRAINED_ON: usize = 1_400;
/// Digits of each class on the sheet.
const COLUMNS: usize = 8;

/// Trains a generator of handwritten digits and chooses the length of its averaged weights afterwards.
#[derive(Parser)]
struct Args {
    /// Directory for the run, the averages and the pictures
    #[arg(long, value_name = "DIR", default_value = "runs/digits")]
    out: PathBuf,
    /// Steps of training; the result is checked for the default only
    #[arg(long, value_name = "N", default_value_t = STEPS, value_parser = clap::value_parser!(u64).range(100..))]
    steps: u64,
    /// Seed of the initial weights, the batches and their noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace the output of an earlier run
    #[arg(long)]
    force: bool,
    /// Do not train: print the held-out loss of the weights in this file, as an evaluation for `posthoc-ema sweep`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["steps", "seed", "force"])]
    evaluate: Option<PathBuf>,
    /// Draws of noise and time with which each held-out digit is evaluated
    #[arg(long, value_name = "N", default_value_t = 16, hide = true)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    draws: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(weights) = &args.evaluate {
        return print_loss(weights, args.draws);
    }
    let start = Instant::now();
    let losses = run(&args)?;
    println!("\n{:.0} s in all", start.elapsed().as_secs_f64());
    if args.steps == STEPS { check(&losses) } else { Ok(()) }
}

fn print_loss(weights: &Path, draws: u64) -> Result<()> {
    let held_out = held_out(&data::load(TRAINED_ON, 0)?, draws)?;
    println!("{}", held_out.loss(&model::read(weights)?)?);
    Ok(())
}

fn held_out(split: &Split, draws: u64) -> Result<HeldOut> {
    HeldOut::new(&split.held_out, draws, 1)
}

fn run(args: &Args) -> Result<Losses> {
    let folder = Folder::prepare(&args.out, args.force)?;
    let split = data::load(TRAINED_ON, 0)?;
    let held_out = held_out(&split, args.draws)?;
    let (vars, tracked) = train(args, &folder, &split)?;

    let run = Run::open(folder.run())?;
    let averages = synthesize(&run, &folder)?;
    let losses = evaluate::losses(&held_out, &vars, averages)?;
    println!("\n{}", table::losses(&losses));

    let agreements = agreement::measure(&run, &tracked, &vars)?;
    println!("\n{}", table::agreements(&agreements));
    agreements.iter().try_for_each(Agreement::check)?;

    draw::loss_chart(&folder.chart(), &losses)?;
    draw_digits(&folder, &vars, &losses)?;
    println!("\n{folder}");
    Ok(losses)
}

/// Trains on one thread: for matrices of this size a second thread costs more than it gains.
fn train(args: &Args, folder: &Folder, split: &Split) -> Result<(VarMap, Tracked)> {
    let settings = train::Settings::new(args.seed, args.steps);
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let start = Instant::now();
    let trained = one_thread.install(|| {
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let (vars, network) = model::init(&mut rng)?;
        let mut trackers = Trackers::create(folder, settings.steps, &vars)?;
        let on_step = || trackers.update(&vars);
        train::train(&vars, &network, &split.train, &settings, &mut rng, on_step)?;
        anyhow::Ok((vars, trackers.finish()?))
    })?;
    println!("trained {} steps in {:.0} s", settings.steps, start.elapsed().as_secs_f64());
    Ok(trained)
}

/// Returns the lengths to evaluate, evenly spaced on a logarithmic scale.
fn lengths() -> Vec<f64> {
    const LENGTHS: u32 = 32;
    const SHORTEST: f64 = 0.01;
    const LONGEST: f64 = 0.288;
    let step = (LONGEST / SHORTEST).ln() / f64::from(LENGTHS - 1);
    (0..LENGTHS).map(|i| SHORTEST * (step * f64::from(i)).exp()).collect()
}

/// Synthesizes an average of each length in one pass over the snapshots, and writes each to a file.
fn synthesize(run: &Run, folder: &Folder) -> Result<Vec<Average>> {
    let lengths = lengths();
    let profiles = lengths.iter().map(|&sigma_rel| Profile::sigma_rel(sigma_rel)).collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    let plans = run.plans(&profiles, At::Latest)?;
    let averages: Vec<Average> = lengths
        .iter()
        .zip(&plans)
        .map(|(&sigma_rel, plan)| Average::new(sigma_rel, plan, folder.average(sigma_rel)))
        .collect();
    let outputs: Vec<Output<'_>> =
        plans.iter().zip(&averages).map(|(plan, average)| Output { plan, path: &average.path }).collect();
    run.write_all(&outputs, &WriteOptions::default())?;
    let megabytes = run.bytes_to_read(&plans) as f64 / 1e6;
    let seconds = start.elapsed().as_secs_f64();
    println!("synthesized {} averages from {megabytes:.0} MB of snapshots in {seconds:.2} s", plans.len());
    Ok(averages)
}

/// Draws digits by the last weights and, from the same noise, by the best average.
fn draw_digits(folder: &Folder, vars: &VarMap, losses: &Losses) -> Result<()> {
    const HEUN_STEPS: usize = 32;
    let (best, _) = losses.best().context("no averages to draw with")?;
    let class: Vec<u32> = (0..data::CLASSES as u32).flat_map(|class| [class; COLUMNS]).collect();
    let noise = evaluate::noise(class.len(), 2)?;
    let last = evaluate::sample(&model::last(vars)?, &noise, &class, HEUN_STEPS)?;
    let average = evaluate::sample(&model::read(&best.path)?, &noise, &class, HEUN_STEPS)?;
    let caption = format!("best average, σ_rel {:.3}", best.sigma_rel);
    let left = Grid { caption: "last weights", images: &last };
    let right = Grid { caption: &caption, images: &average };
    sheet::write(&folder.sheet(), &left, &right, COLUMNS)
}

/// Checks that the best average is clearly better than the last weights, and that its length is inside the range.
fn check(losses: &Losses) -> Result<()> {
    let (best, loss) = losses.best().context("no averages to compare")?;
    let last = losses.last;
    ensure!(
        *loss <= (1.0 - IMPROVEMENT) * last,
        "the best average has a loss of {loss:.4}, not {:.0}% below the {last:.4} of the last weights",
        100.0 * IMPROVEMENT
    );
    let ends = [losses.averages.first(), losses.averages.last()].map(|end| end.map(|(average, _)| average.sigma_rel));
    ensure!(
        !ends.contains(&Some(best.sigma_rel)),
        "the best length, sigma_rel {:.3}, is at an end of the evaluated range: the loss has no minimum inside it",
        best.sigma_rel
    );
    Ok(())
}
