//! The CPU, with all threads.

mod blend;
mod update;

use posthoc_ema::{Device, Result};

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
        // Without enough memory the disk would be timed, or the process killed.
        let free = free_memory().map_or(isize::MAX as u128, u128::from);
        sizes.check_memory(peak_bytes(sizes), free, "memory")?;
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
