//! The CPU, with all threads.

mod blend;
mod update;

use posthoc_ema::{Device, Error, Result};

use super::cases::Sizes;
use super::device::BenchDevice;
use super::machine::{Machine, free_memory};
use super::session::Session;
use super::{CPU_PARAMETERS, PROFILES};

/// The CPU.
pub(super) struct Cpu;

impl BenchDevice for Cpu {
    fn name(&self) -> String {
        Device::Cpu.to_string()
    }

    fn model(&self) -> String {
        let Machine { cpu, threads, .. } = Machine::this();
        format!("{cpu}, {threads} threads")
    }

    fn default_parameters(&self, _: &Sizes) -> Result<usize> {
        Ok(CPU_PARAMETERS)
    }

    fn run(&self, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
        check_memory(sizes)?;
        update::measure(sizes, session)?;
        blend::measure(sizes, session)
    }
}

/// Returns the peak memory in bytes: parameters and averages, or snapshots in the page cache and results.
fn peak_bytes(sizes: &Sizes) -> u128 {
    let update = size_of::<f32>() + size_of::<u16>() + PROFILES * (size_of::<f32>() + size_of::<u16>());
    let blend = size_of::<f32>() as u128 * (sizes.snapshots as u128 + sizes.targets as u128);
    (update as u128).max(blend) * sizes.parameters as u128
}

/// Refuses sizes that would swap or be killed for their memory.
fn check_memory(sizes: &Sizes) -> Result<()> {
    let needed = peak_bytes(sizes);
    let gb = |bytes: u128| bytes as f64 / 1e9;
    let free = free_memory().map_or(isize::MAX as u128, u128::from);
    if needed <= free {
        return Ok(());
    }
    let Sizes { parameters, snapshots, targets, .. } = sizes;
    let reason = format!(
        "{parameters} parameters with {snapshots} snapshots and {targets} targets take {:.1} GB of memory, \
         and {:.1} GB are free: ask for fewer parameters",
        gb(needed),
        gb(free)
    );
    Err(Error::Setting { option: "parameters", reason })
}
