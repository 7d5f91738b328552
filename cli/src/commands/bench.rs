//! `posthoc-ema bench`.

use clap::Args;
use indicatif::HumanCount;
use serde_json::json;

use super::output::{print, print_json, print_report, round_bar};
use super::plot::PlotArgs;
use super::{Failure, Outcome};
use crate::bench::{self, Machine, MeasuredDevice, Measurements, Options, Progress};
use crate::{pictures, tables};

/// Measure update and blend on this machine, beside the machine's limits
///
/// Every piece of work is compared with a loop that moves the same bytes and does next to nothing else, timed in turns
/// with it; on a GPU with a copy within it, or over the bus. Answers are checked before anything is timed. The
/// snapshots that the CPU blends are in a temporary file.
#[derive(Args)]
pub struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    plot: PlotArgs,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Measures, and prints and draws the measurements.
pub fn run(arguments: &Arguments) -> Outcome {
    arguments.options.check().map_err(|error| Failure::Usage(error.to_string()))?;
    arguments.plot.check()?;
    posthoc_ema::fs::start_threads()?;
    let Measurements { devices, rows, without_cuda } = measure(&arguments.options)?;
    if let Some(why) = without_cuda {
        print_report(&format!("no CUDA device was measured: {why}"));
    }
    if arguments.json {
        print_json(&json!({
            "version": VERSION,
            "machine": Machine::this(),
            "options": arguments.options,
            "devices": devices,
            "measurements": rows,
        }));
    } else {
        print(&tables::measurements(&rows).to_string());
    }
    Ok(arguments.plot.draw(|path| pictures::draw_measurements(path, &rows, &title(&devices)))?)
}

fn measure(options: &Options) -> Result<Measurements, Failure> {
    let bar = round_bar();
    let measured = bench::run(options, &mut |Progress { task, done, total }| {
        bar.set_message(task.clone());
        bar.set_length(*total as u64);
        bar.set_position(*done as u64);
    });
    bar.finish_and_clear();
    Ok(measured?)
}

fn title(devices: &[MeasuredDevice]) -> String {
    let models: Vec<String> = devices
        .iter()
        .map(|device| format!("{} parameters on {}", HumanCount(device.parameters as u64), device.model))
        .collect();
    format!("posthoc-ema {VERSION}: {}", models.join(", "))
}
