//! Description of the machine.

use std::fs;

use serde::Serialize;

/// The machine on which something was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Model of the CPU, or its architecture if the model is unknown.
    pub cpu: String,
    /// Number of working threads.
    pub threads: usize,
    /// Operating system and kernel.
    pub os: String,
    /// Memory in bytes, if the system reports it.
    pub memory: Option<u64>,
}

impl Machine {
    /// Returns the description of this machine.
    pub fn this() -> Machine {
        let cpu = field("/proc/cpuinfo", "model name", ':').unwrap_or_else(|| std::env::consts::ARCH.into());
        let system = field("/etc/os-release", "PRETTY_NAME", '=').unwrap_or_else(|| std::env::consts::OS.into());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let os = format!("{}, kernel {}", system.trim_matches('"'), kernel.trim());
        let os = os.trim_end_matches(", kernel ").to_owned();
        Machine { cpu, threads: rayon::current_num_threads(), os, memory: memory("MemTotal") }
    }
}

/// Returns the bytes of memory available without swapping, if the system reports them.
pub(super) fn free_memory() -> Option<u64> {
    memory("MemAvailable")
}

fn memory(key: &str) -> Option<u64> {
    let text = field("/proc/meminfo", key, ':')?;
    text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Returns the value of the first line with a key in a system file.
fn field(path: &str, key: &str, separator: char) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let mut pairs = text.lines().filter_map(|line| line.split_once(separator));
    pairs.find(|(k, _)| k.trim() == key).map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_has_a_cpu_and_threads() {
        let machine = Machine::this();
        assert!(!machine.cpu.is_empty() && !machine.os.is_empty() && machine.threads > 0, "{machine:?}");
        assert!(!machine.os.ends_with(' '), "{machine:?}");
        assert!(machine.memory.is_none_or(|total| free_memory().is_some_and(|free| free <= total)));
    }
}
