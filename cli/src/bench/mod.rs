//! Update and blend on this machine, beside the machine's limits measured in the same run.
//!
//! A rate alone says little: machines differ, and on a shared one the same work takes twice as long an hour later. So
//! each piece of work is compared with a loop that moves the same bytes and does nothing else, the two are timed in turns,
//! and medians are compared. Nothing is timed before its answer was checked.

mod cases;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod devices;
mod machine;
mod session;

use serde::Serialize;

use posthoc_ema::Device;
use posthoc_ema::{Error, Result};

use cases::Sizes;
use devices::Bench;
pub use machine::Machine;
use session::Session;

/// The running averages that an update folds parameters into: two, as a run tracks them by default.
const PROFILES: usize = 2;

/// Parameters on the CPU by default: arrays far larger than caches, below 2 GB and half a minute on two cores.
const CPU_PARAMETERS: usize = 20_000_000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Options {
    /// Parameters of the model; by default 20 million on the CPU, and on a GPU, which is done with those in no time,
    /// 200 million, or as many as fit.
    pub parameters: Option<usize>,
    /// Tensors of the model that has many small ones.
    pub tensors: usize,
    /// Snapshots that are blended.
    pub snapshots: usize,
    /// Targets that they are blended into in one pass; one target is measured beside it.
    pub targets: usize,
    /// How often each piece of work is timed.
    pub repeats: usize,
    /// Where: [`Device::Auto`] is the CPU and every CUDA device.
    #[serde(skip)]
    pub device: Device,
}

impl Default for Options {
    fn default() -> Options {
        let (tensors, snapshots, targets, repeats) = (1000, 12, 8, 7);
        Options { parameters: None, tensors, snapshots, targets, repeats, device: Device::Auto }
    }
}

impl Options {
    /// Whether the numbers make sense together.
    ///
    /// # Errors
    /// [`Error::Setting`] for a number of zero, and for more tensors than parameters.
    pub fn check(&self) -> Result<()> {
        let Options { tensors, snapshots, targets, repeats, .. } = *self;
        let parameters = self.parameters.unwrap_or(CPU_PARAMETERS);
        let counts = [
            ("parameters", parameters),
            ("tensors", tensors),
            ("snapshots", snapshots),
            ("targets", targets),
            ("repeats", repeats),
        ];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::Setting { option, reason: "0 leaves nothing to measure: give 1 or more".into() });
        }
        if tensors > parameters {
            let reason = format!("{parameters} parameters do not make {tensors} tensors: give at most {parameters}");
            return Err(Error::Setting { option: "tensors", reason });
        }
        Ok(())
    }
}

/// The kind of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Work {
    /// What the machine does at most.
    Limit,
    /// New parameters folded into running averages.
    Update,
    /// Parameters on their way from a device to averages on the host.
    Offload,
    /// Snapshots blended into targets.
    Blend,
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Work::Limit => "limit",
            Work::Update => "update",
            Work::Offload => "offload",
            Work::Blend => "blend",
        })
    }
}

/// How fast something went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// Where: `cpu` or `cuda:N`.
    pub device: String,
    /// What, unique among the measurements of a device.
    pub name: String,
    /// Of which kind.
    pub work: Work,
    /// The bytes that have to be read and written, each once.
    pub bytes: u64,
    /// The median of the times, in seconds.
    pub seconds_median: f64,
    /// All times, in the order in which they were taken.
    pub seconds_all: Vec<f64>,
    /// Bytes over the median time.
    pub bytes_per_second: f64,
    /// The name of the limit that it is compared with, on the same device.
    pub limit: Option<String>,
    /// Its rate as a share of that limit's.
    pub share_of_limit: Option<f64>,
}

/// A device that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// Its name here: `cpu` or `cuda:N`.
    pub device: String,
    /// Its name by its maker.
    pub model: String,
    /// The parameters of the model that was updated on it, and of each snapshot that was blended.
    pub parameters: usize,
}

/// All that was measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurements {
    /// The devices.
    pub devices: Vec<Measured>,
    /// Device by device.
    pub rows: Vec<Measurement>,
    /// Why no CUDA device is among them, where they were asked for by [`Device::Auto`] alone.
    pub without_cuda: Option<String>,
}

/// What is being done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The device and the work.
    pub what: String,
    /// The rounds done.
    pub done: usize,
    /// The rounds to do.
    pub of: usize,
}

/// Measures everything and tells of the progress.
///
/// # Errors
/// [`Error::Setting`] for options out of range, for a device that is not there and for more memory than is free,
/// [`Error::Io`] where the temporary file of snapshots cannot be written, and [`Error::Wrong`] for a wrong answer.
pub fn run(options: &Options, progress: &mut dyn FnMut(&Progress)) -> Result<Measurements> {
    options.check()?;
    let devices::Found { benches, without_cuda } = devices::find(options.device)?;
    let (mut devices, mut rows) = (Vec::new(), Vec::new());
    for bench in benches {
        let sizes = sizes(options, &*bench)?;
        let (device, model) = (bench.device(), bench.model());
        let mut session = Session::new(device.clone(), options.repeats, progress);
        bench.run(&sizes, &mut session)?;
        rows.append(&mut session.into_measurements());
        devices.push(Measured { device, model, parameters: sizes.parameters });
    }
    Ok(Measurements { devices, rows, without_cuda })
}

fn sizes(options: &Options, bench: &dyn Bench) -> Result<Sizes> {
    let Options { parameters, tensors, snapshots, targets, .. } = *options;
    let asked = Sizes { parameters: parameters.unwrap_or_default(), tensors, snapshots, targets };
    Ok(Sizes { parameters: parameters.map_or_else(|| bench.parameters(&asked), Ok)?, ..asked })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small, and of sizes that nothing divides.
    fn small() -> Options {
        Options { parameters: Some(70_001), tensors: 37, snapshots: 5, targets: 3, repeats: 3, device: Device::Cpu }
    }

    #[test]
    fn every_row_names_a_limit_of_its_device_or_is_one() {
        let mut rounds = Vec::new();
        let measured = run(&small(), &mut |progress| rounds.push(progress.clone())).unwrap();
        let limits: Vec<&str> =
            measured.rows.iter().filter(|row| row.work == Work::Limit).map(|row| row.name.as_str()).collect();
        assert_eq!((measured.rows.len(), limits.len()), (2 + 8 + 3 + 6, 5));
        for row in &measured.rows {
            assert_eq!(row.seconds_all.len(), 3);
            assert_eq!(row.bytes_per_second, row.bytes as f64 / row.seconds_median);
            assert_eq!(row.limit.is_none(), row.work == Work::Limit);
            assert_eq!(row.limit.is_none(), row.share_of_limit.is_none());
            assert!(row.limit.iter().all(|limit| limits.contains(&limit.as_str())), "{row:?}");
        }
        assert_eq!(measured.without_cuda, None);
        assert!(matches!(&measured.devices[..], [cpu] if cpu.device == "cpu" && cpu.parameters == 70_001));
        assert!(rounds.iter().any(|p| p.what == "cpu: update" && p.done == 3 && p.of == 3), "{rounds:?}");
    }

    #[test]
    fn nothing_is_measured_twice_where_many_are_few() {
        let options = Options { parameters: Some(3), tensors: 3, snapshots: 1, targets: 1, ..small() };
        let rows = run(&options, &mut |_| {}).unwrap().rows;
        let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), 2 + 4 + 2 + 3);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        for (options, part) in [
            (Options { parameters: Some(0), ..small() }, "parameters"),
            (Options { repeats: 0, ..small() }, "repeats"),
            (Options { tensors: 70_002, ..small() }, "at most 70001"),
            (Options { parameters: None, tensors: 20_000_001, ..small() }, "at most 20000000"),
            (Options { parameters: Some(usize::MAX), ..small() }, "fewer parameters"),
        ] {
            let text = run(&options, &mut |_| {}).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
    }
}
