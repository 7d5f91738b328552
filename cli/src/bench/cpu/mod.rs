//! The CPU, with all threads.

mod blend;
mod update;

use super::cases::Sizes;
use super::devices::Bench;
use super::machine::{Machine, free_memory};
use super::session::Session;
use super::{CPU_PARAMETERS, PROFILES};
use posthoc_ema::Device;
use posthoc_ema::{Error, Result};

/// The CPU.
pub(super) struct Cpu;

impl Bench for Cpu {
    fn device(&self) -> String {
        Device::Cpu.to_string()
    }

    fn model(&self) -> String {
        let Machine { cpu, threads, .. } = Machine::this();
        format!("{cpu}, {threads} threads")
    }

    fn parameters(&self, _: &Sizes) -> Result<usize> {
        Ok(CPU_PARAMETERS)
    }

    fn run(&self, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
        check_memory(sizes)?;
        update::measure(sizes, session)?;
        blend::measure(sizes, session)
    }
}

/// The bytes that are held at most: parameters and averages, then snapshots in the page cache and results.
fn most_bytes(sizes: &Sizes) -> u128 {
    let update = size_of::<f32>() + size_of::<u16>() + PROFILES * (size_of::<f32>() + size_of::<u16>());
    let blend = size_of::<f32>() as u128 * (sizes.snapshots as u128 + sizes.targets as u128);
    (update as u128).max(blend) * sizes.parameters as u128
}

/// What does not fit would be timed against the disk, or end with the process.
fn check_memory(sizes: &Sizes) -> Result<()> {
    let (needed, gb) = (most_bytes(sizes), |bytes: u128| bytes as f64 / 1e9);
    let free = free_memory().map_or(isize::MAX as u128, u128::from);
    if needed <= free {
        return Ok(());
    }
    let Sizes { parameters, snapshots, targets, .. } = sizes;
    let reason = format!(
        "{parameters} parameters with {snapshots} snapshots and {targets} targets take {:.1} GB of memory, and {:.1} GB \
         are free: ask for fewer parameters",
        gb(needed),
        gb(free)
    );
    Err(Error::Setting { option: "parameters", reason })
}
