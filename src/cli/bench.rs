//! `posthoc-ema bench`.

use indicatif::HumanCount;
use posthoc_ema::bench::{self, Machine, Measured, Measurements, Options, Progress};
use posthoc_ema::report;
use serde_json::json;

use super::args::Bench;
use super::output::{print, print_json, round_bar};
use super::{Failure, Outcome};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Measures, shows what was measured, and draws it where a file is named.
pub fn run(arguments: &Bench) -> Outcome {
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
    if let Some(path) = &arguments.plot {
        report::plot(path, &rows, &title(&devices))?;
    }
    Ok(())
}

fn options(arguments: &Bench) -> Options {
    let Bench { parameters, tensors, snapshots, targets, repeats, device, .. } = *arguments;
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
