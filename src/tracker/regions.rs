//! Snapshots cut to the parts that a process of a sharded run holds.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use safetensors::Dtype;

use super::registry::TensorRegistry;
use crate::error::Result;
use crate::snapshot::{Region, Snapshot};
use crate::synthesis::{Elements, TensorSource};

/// Snapshot of the whole model, of which only the parts of this process are read.
pub(super) struct RegionSource<'a> {
    snapshot: &'a Snapshot,
    registry: &'a TensorRegistry,
    /// Part of each tensor, once a synthesis uses the snapshot.
    regions: OnceLock<BTreeMap<&'a str, Region>>,
}

impl<'a> RegionSource<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, registry: &'a TensorRegistry) -> RegionSource<'a> {
        RegionSource { snapshot, registry, regions: OnceLock::new() }
    }

    fn cut(&self) -> Result<BTreeMap<&'a str, Region>> {
        let mut regions = BTreeMap::new();
        for entry in self.registry.averaged().iter().chain(self.registry.copied()) {
            // A tensor of another shape ended in an extension, and no plan reads it here.
            if self.snapshot.stored(&entry.name).is_some_and(|stored| stored.shape != entry.global) {
                continue;
            }
            if let Some(region) = self.snapshot.set().region(&entry.name, &entry.place(), &entry.shape)? {
                regions.insert(entry.name.as_str(), region);
            }
        }
        Ok(regions)
    }
}

impl TensorSource for RegionSource<'_> {
    fn prepare(&self) -> Result<()> {
        if self.regions.get().is_none() {
            // Another thread may have been faster, with the same parts.
            let _ = self.regions.set(self.cut()?);
        }
        Ok(())
    }

    fn stored(&self, name: &str) -> Option<(Dtype, Elements<'_>)> {
        let Region { dtype, elements } = self.regions.get()?.get(name)?;
        let piece = elements.piece(0..elements.len()).map(Elements::Host);
        Some((*dtype, piece.unwrap_or(Elements::Scattered(&**elements))))
    }

    fn will_need(&self, bytes: &[u8]) {
        self.snapshot.will_need(bytes);
    }
}
