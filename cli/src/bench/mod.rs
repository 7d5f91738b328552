//! Measures update and blend on this machine beside the machine's limits.
//!
//! A rate alone says little: machines differ, and on a shared one the same work takes twice as long an hour later. So
//! each piece of work is timed in turns with a loop that moves the same bytes and does nothing else, and their medians
//! are compared. Every answer is checked before anything is timed.

mod cases;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod find;
mod machine;
mod session;

use clap::Args;
use posthoc_ema::{Device, Error, Result};
use serde::Serialize;

use cases::Sizes;
use device::BenchDevice;
pub use machine::Machine;
use session::Session;

/// Running averages of an update: two, the default of a run.
const PROFILES: usize = 2;

/// Default number of parameters on the CPU: arrays far larger than caches, below 2 GB and half a minute on two cores.
const CPU_PARAMETERS: usize = 20_000_000;

/// Sizes of the measured work.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Options {
    /// Parameters of the model [default: 20 million on the CPU, 200 million, or what fits, on a GPU]
    #[arg(long, value_name = "N")]
    pub parameters: Option<usize>,
    /// Tensors of the model that has many small ones
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub tensors: usize,
    /// Snapshots that are blended
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub snapshots: usize,
    /// Targets that they are blended into in one pass, beside a pass for one
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub targets: usize,
    /// Repetitions of each piece of work; medians are shown
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub repeats: usize,
    /// Device to measure: auto (the CPU and every CUDA device), cpu, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Auto)]
    #[serde(skip)]
    pub device: Device,
}

impl Options {
    /// Checks that the numbers are in range and fit together.
    ///
    /// # Errors
    /// [`Error::Setting`] for a number of zero, and for more tensors than parameters.
    pub fn check(&self) -> Result<()> {
        let parameters = self.parameters.unwrap_or(CPU_PARAMETERS);
        let counts = [
            ("parameters", parameters),
            ("tensors", self.tensors),
            ("snapshots", self.snapshots),
            ("targets", self.targets),
            ("repeats", self.repeats),
        ];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::Setting { option, reason: "0 leaves nothing to measure: give 1 or more".into() });
        }
        if self.tensors > parameters {
            let tensors = self.tensors;
            let reason = format!("{parameters} parameters do not make {tensors} tensors: give at most {parameters}");
            return Err(Error::Setting { option: "tensors", reason });
        }
        Ok(())
    }
}

/// Kind of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Work {
    /// Highest rate of the machine.
    Limit,
    /// Folding new parameters into running averages.
    Update,
    /// Copying parameters from a device to averages on the host.
    Offload,
    /// Blending snapshots into targets.
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

/// The measured rate of one piece of work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// Name of the device: `cpu` or `cuda:N`.
    pub device: String,
    /// Name of the work, unique among the measurements of a device.
    pub name: String,
    /// Kind of the work.
    pub work: Work,
    /// Bytes to read and write, each counted once.
    pub bytes: u64,
    /// Median of the times, in seconds.
    pub seconds_median: f64,
    /// All times in seconds, in the order of the rounds.
    pub seconds_all: Vec<f64>,
    /// Bytes divided by the median time.
    pub bytes_per_second: f64,
    /// Name of the limit that the rate is compared with, on the same device.
    pub limit: Option<String>,
    /// Rate as a share of the limit's rate.
    pub share_of_limit: Option<f64>,
}

/// A measured device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MeasuredDevice {
    /// Name of the device: `cpu` or `cuda:N`.
    pub device: String,
    /// Name of the model by its maker.
    pub model: String,
    /// Parameters of the updated model and of each blended snapshot.
    pub parameters: usize,
}

/// All measurements of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurements {
    /// Measured devices.
    pub devices: Vec<MeasuredDevice>,
    /// Measurements, device by device.
    pub rows: Vec<Measurement>,
    /// Reason why [`Device::Auto`] found no CUDA device.
    pub without_cuda: Option<String>,
}

/// Progress of a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Names of the device and the task.
    pub task: String,
    /// Rounds done.
    pub done: usize,
    /// Rounds in total.
    pub total: usize,
}

/// Measures everything and reports the progress.
///
/// # Errors
/// [`Error::Setting`] for options out of range, for a missing device and for more memory than is free, [`Error::Io`] if
/// the temporary file of snapshots cannot be written, and [`Error::Wrong`] for a wrong answer.
pub fn run(options: &Options, progress: &mut dyn FnMut(&Progress)) -> Result<Measurements> {
    options.check()?;
    let find::Found { devices: found, without_cuda } = find::find(options.device)?;
    let mut devices = Vec::new();
    let mut rows = Vec::new();
    for device in found {
        let sizes = sizes(options, &*device)?;
        let mut session = Session::new(device.name(), options.repeats, progress);
        device.run(&sizes, &mut session)?;
        rows.append(&mut session.into_measurements());
        let parameters = sizes.parameters;
        devices.push(MeasuredDevice { device: device.name(), model: device.model(), parameters });
    }
    Ok(Measurements { devices, rows, without_cuda })
}

/// Returns the sizes of the options, with the default number of parameters of the device.
fn sizes(options: &Options, device: &dyn BenchDevice) -> Result<Sizes> {
    let Options { parameters, tensors, snapshots, targets, .. } = *options;
    let sizes = Sizes { parameters: parameters.unwrap_or_default(), tensors, snapshots, targets };
    Ok(Sizes { parameters: parameters.map_or_else(|| device.default_parameters(&sizes), Ok)?, ..sizes })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns small sizes without common divisors.
    fn small() -> Options {
        Options { parameters: Some(70_001), tensors: 37, snapshots: 5, targets: 3, repeats: 3, device: Device::Cpu }
    }

    #[test]
    fn every_row_is_a_limit_or_names_one_of_its_device() {
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
        assert!(rounds.iter().any(|p| p.task == "cpu: update" && p.done == 3 && p.total == 3), "{rounds:?}");
    }

    #[test]
    fn equal_cases_are_measured_once() {
        let options = Options { parameters: Some(3), tensors: 3, snapshots: 1, targets: 1, ..small() };
        let rows = run(&options, &mut |_| {}).unwrap().rows;
        let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), 2 + 4 + 2 + 3);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn options_out_of_range_are_refused() {
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
