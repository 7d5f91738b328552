//! What the machine is.

use std::fs;

use serde::Serialize;

/// The machine on which something was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The CPU's model, or its architecture where the system does not tell.
    pub cpu: String,
    /// Threads that work.
    pub threads: usize,
    /// The operating system and its kernel.
    pub os: String,
    /// Memory in bytes, where the system tells.
    pub memory: Option<u64>,
}

impl Machine {
    /// This one.
    pub fn this() -> Machine {
        let cpu = field("/proc/cpuinfo", "model name", ':').unwrap_or_else(|| std::env::consts::ARCH.into());
        let system = field("/etc/os-release", "PRETTY_NAME", '=').unwrap_or_else(|| std::env::consts::OS.into());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let os = format!("{}, kernel {}", system.trim_matches('"'), kernel.trim());
        let os = os.trim_end_matches(", kernel ").to_owned();
        Machine { cpu, threads: rayon::current_num_threads(), os, memory: memory("MemTotal") }
    }
}

/// Memory that can be had without swapping, in bytes, where the system tells.
pub(super) fn free_memory() -> Option<u64> {
    memory("MemAvailable")
}

fn memory(key: &str) -> Option<u64> {
    let text = field("/proc/meminfo", key, ':')?;
    text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The value of the first line of a system's file that has this key.
fn field(path: &str, key: &str, separator: char) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let mut pairs = text.lines().filter_map(|line| line.split_once(separator));
    pairs.find(|(k, _)| k.trim() == key).map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_a_processor_and_threads() {
        let machine = Machine::this();
        assert!(!machine.cpu.is_empty() && !machine.os.is_empty() && machine.threads > 0, "{machine:?}");
        assert!(!machine.os.ends_with(' '), "{machine:?}");
        assert!(machine.memory.is_none_or(|total| free_memory().is_some_and(|free| free <= total)));
    }
}
