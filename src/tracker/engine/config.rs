//! Sizes and initial values of an engine.

use super::averages::HostAverages;
use crate::compute::cpu::{Averages, Layout, Precision};
use crate::run::Settings;
use crate::tracker::registry::TensorRegistry;

/// Sizes and initial values of an engine.
pub(in crate::tracker) struct EngineConfig {
    pub profiles: usize,
    pub precision: Precision,
    /// Sizes in bytes of the averaged tensors.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices need them"))]
    pub averaged: Vec<usize>,
    /// Sizes in bytes of the copied tensors.
    pub copied: Vec<usize>,
    /// Choice of a copy of the parameters on their device at each update; automatic if none.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "only devices need it"))]
    pub device_copy: Option<bool>,
    /// Averages and copies of a resumed run.
    pub values: Option<(Vec<Averages>, Vec<Vec<u8>>)>,
}

impl EngineConfig {
    pub(in crate::tracker) fn new(registry: &TensorRegistry, settings: &Settings) -> EngineConfig {
        EngineConfig {
            profiles: settings.profiles.len(),
            precision: settings.precision,
            averaged: registry.averaged().iter().map(|entry| entry.bytes).collect(),
            copied: registry.copied().iter().map(|entry| entry.bytes).collect(),
            device_copy: None,
            values: None,
        }
    }

    /// Allocates the averages in host memory: those of a resumed run, or zeros, which the first update replaces.
    pub(super) fn host(self, layout: &Layout) -> HostAverages {
        let (averages, copies) = self.values.unwrap_or_else(|| {
            let averages = vec![Averages::zeros(layout, self.precision); self.profiles];
            (averages, self.copied.iter().map(|&bytes| vec![0; bytes]).collect())
        });
        HostAverages::new(averages, copies)
    }

    /// Returns the bytes of memory that the averages take.
    #[cfg(feature = "cuda")]
    pub(super) fn bytes(&self, layout: &Layout) -> usize {
        self.bytes_of_averages(layout) + self.copied.iter().sum::<usize>()
    }

    /// Returns the bytes of memory that the averages of some tensors take, without copied tensors.
    #[cfg(feature = "cuda")]
    pub(super) fn bytes_of_averages(&self, layout: &Layout) -> usize {
        let each = if self.precision == Precision::Compensated { 6 } else { 4 };
        self.profiles * layout.total() * each
    }
}
