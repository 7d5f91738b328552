//! `posthoc-ema bench`.

use crate::bench::{self, Machine, Measured, Measurements, Options, Progress};
use crate::report;
use clap::Args;
use indicatif::HumanCount;
use posthoc_ema::Device;
use serde_json::json;

use super::output::{print, print_json, round_bar};
use super::picture::Plot;
use super::{Failure, Outcome};

/// Measure update and blend on this machine, beside the machine's limits
///
/// Every piece of work is compared with a loop that moves the same bytes and does next to nothing else, timed in turns
/// with it; on a GPU with a copy within it, or over the bus. Answers are checked before anything is timed. The
/// snapshots that the CPU blends lie in a temporary file.
#[derive(Args)]
pub struct Arguments {
    /// Parameters of the model [default: 20 million on the CPU, 200 million, or what fits, on a GPU]
    #[arg(long, value_name = "N")]
    pub parameters: Option<usize>,
    /// Tensors of the model that has many small ones
    #[arg(long, value_name = "N", default_value_t = Options::default().tensors)]
    pub tensors: usize,
    /// Snapshots that are blended
    #[arg(long, value_name = "N", default_value_t = Options::default().snapshots)]
    pub snapshots: usize,
    /// Targets that they are blended into in one pass, beside a pass for one
    #[arg(long, value_name = "N", default_value_t = Options::default().targets)]
    pub targets: usize,
    /// How often each piece of work is timed; medians are shown
    #[arg(long, value_name = "N", default_value_t = Options::default().repeats)]
    pub repeats: usize,
    /// Where: auto (the CPU and every CUDA device), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Options::default().device)]
    pub device: Device,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub plot: Plot,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Measures, shows what was measured, and draws it where a file is named.
pub fn run(arguments: &Arguments) -> Outcome {
    let options = options(arguments);
    options.check().map_err(|error| Failure::Usage(error.to_string()))?;
    let Measurements { devices, rows, without_cuda } = measure(&options)?;
    if let Some(why) = without_cuda {
        eprintln!("no CUDA device was measured: {why}");
    }
    if arguments.json {
        print_json(&json!({
            "version": VERSION,
            "machine": Machine::this(),
            "options": options,
            "devices": devices,
            "measurements": rows,
        }));
    } else {
        print(&report::measurements(&rows).to_string());
    }
    Ok(arguments.plot.draw(|path| report::bench(path, &rows, &title(&devices)))?)
}

fn options(arguments: &Arguments) -> Options {
    let Arguments { parameters, tensors, snapshots, targets, repeats, device, .. } = *arguments;
    Options { parameters, tensors, snapshots, targets, repeats, device }
}

fn measure(options: &Options) -> Result<Measurements, Failure> {
    let bar = round_bar();
    let measured = bench::run(options, &mut |Progress { what, done, of }| {
        bar.set_message(what.clone());
        bar.set_length(*of as u64);
        bar.set_position(*done as u64);
    });
    bar.finish_and_clear();
    Ok(measured?)
}

fn title(devices: &[Measured]) -> String {
    let about = |Measured { model, parameters, .. }: &Measured| {
        format!("{} parameters on {model}", HumanCount(*parameters as u64))
    };
    let about: Vec<String> = devices.iter().map(about).collect();
    format!("posthoc-ema {VERSION}: {}", about.join(", "))
}
