//! The CPU, with all threads.

mod blend;
mod update;

use super::devices::Bench;
use super::machine::free_memory;
use super::session::Session;
use super::{Options, PROFILES};
use crate::device::Device;
use crate::error::{Error, Result};

/// The CPU.
pub(super) struct Cpu;

impl Bench for Cpu {
    fn device(&self) -> String {
        Device::Cpu.to_string()
    }

    fn run(&self, options: &Options, session: &mut Session<'_>) -> Result<()> {
        check_memory(options)?;
        update::measure(options, session)?;
        blend::measure(options, session)
    }
}

/// The bytes that are held at most: parameters and averages, then snapshots in the page cache and results.
fn most_bytes(options: &Options) -> u128 {
    let update = size_of::<f32>() + size_of::<u16>() + PROFILES * (size_of::<f32>() + size_of::<u16>());
    let blend = size_of::<f32>() as u128 * (options.snapshots as u128 + options.targets as u128);
    (update as u128).max(blend) * options.parameters as u128
}

/// What does not fit would be timed against the disk, or end with the process.
fn check_memory(options: &Options) -> Result<()> {
    let (needed, gb) = (most_bytes(options), |bytes: u128| bytes as f64 / 1e9);
    let free = free_memory().map_or(isize::MAX as u128, u128::from);
    if needed <= free {
        return Ok(());
    }
    let Options { parameters, snapshots, targets, .. } = options;
    let reason = format!(
        "{parameters} parameters with {snapshots} snapshots and {targets} targets take {:.1} GB of memory, and {:.1} GB \
         are free: ask for fewer parameters",
        gb(needed),
        gb(free)
    );
    Err(Error::Setting { option: "parameters", reason })
}
