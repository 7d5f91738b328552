//! Memory for the copy of a checkpoint's values, reused by the next checkpoint.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::compute::cpu::{Layout, Spare, SpareAverages, ValueRange};
use crate::error::shown;
use crate::tracker::checkpoint_meta::{CheckpointMeta, Failure};
use crate::tracker::values::{OwnedValues, Values};
use crate::tracker::writer::Recycle;

/// Buffer for one copy of an engine's values.
#[derive(Clone, Default)]
pub(in crate::tracker) struct CopyBuffer {
    kept: Arc<Mutex<Option<BufferMemory>>>,
    /// True if a test simulates missing memory.
    #[cfg(test)]
    refused: bool,
}

struct BufferMemory {
    averages: Vec<SpareAverages>,
    copies: Vec<Spare<u8>>,
}

impl CopyBuffer {
    /// Allocates memory for copies of such values, so that not even the first copy waits for it.
    ///
    /// If the system has none, the first copy tries again and warns.
    pub(super) fn prepare(&self, values: &Values<'_>) {
        *self.lock() = BufferMemory::for_copy_of(values).map(BufferMemory::prefault);
    }

    /// Copies the values of a checkpoint for another thread. Warns and returns none if there is not enough memory.
    ///
    /// # Errors
    /// [`Failure::Values`] for NaN or infinity, which is never stored.
    pub(super) fn copy_of(&self, values: &Values<'_>, meta: &CheckpointMeta) -> Result<Option<OwnedValues>, Failure> {
        let Some((mut copy, ranges)) = self.copy(values, meta.registry.layout()) else {
            tracing::warn!(
                "{}: no memory for a copy of the averages: training waits for the snapshot of step {}",
                shown(&meta.dir),
                meta.step()
            );
            return Ok(None);
        };
        match meta.choose_dtypes(&copy.as_values(), &ranges) {
            Ok(dtypes) => {
                copy.dtypes = Some(dtypes);
                Ok(Some(copy))
            }
            Err(error) => {
                self.put_back(copy);
                Err(Failure::Values(error))
            }
        }
    }

    /// Copies the values, and returns the range of every averaged tensor of each profile.
    fn copy(&self, values: &Values<'_>, layout: &Layout) -> Option<(OwnedValues, Vec<Vec<ValueRange>>)> {
        #[cfg(test)]
        if self.refused {
            return None;
        }
        let kept = self.lock().take();
        let memory = match kept {
            Some(memory) => memory,
            None => BufferMemory::for_copy_of(values)?,
        };
        let profiles = memory.averages.into_iter().zip(values.averages);
        let (averages, ranges) = profiles.map(|(spare, averages)| spare.copy(averages, layout)).unzip();
        let tensors = memory.copies.into_iter().zip(values.copies);
        let copies = tensors.map(|(spare, bytes)| spare.fill_with(|copy| copy.copy_from_slice(bytes))).collect();
        Some((OwnedValues { averages, copies, ..OwnedValues::default() }, ranges))
    }

    /// Keeps the memory of a copy for the next one. Until then, the system may reclaim its pages.
    fn put_back(&self, copy: OwnedValues) {
        let averages = copy.averages.into_iter().map(SpareAverages::release).collect();
        let copies = copy.copies.into_iter().map(Spare::release).collect();
        *self.lock() = Some(BufferMemory { averages, copies });
    }

    /// Returns the callback that puts back a copy given to another thread.
    pub(super) fn recycle(&self) -> Recycle {
        let buffer = self.clone();
        Box::new(move |copy| buffer.put_back(copy))
    }

    /// Locks the memory; nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, Option<BufferMemory>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl CopyBuffer {
    /// Simulates missing memory from now on.
    pub(in crate::tracker) fn refuse(&mut self) {
        self.refused = true;
    }

    /// Returns true if there is memory for the next copy.
    pub(in crate::tracker) fn is_ready(&self) -> bool {
        self.lock().is_some()
    }
}

impl BufferMemory {
    fn for_copy_of(values: &Values<'_>) -> Option<BufferMemory> {
        let averages = values.averages.iter().map(SpareAverages::for_copy_of).collect::<Option<_>>()?;
        let copies = values.copies.iter().map(|copy| Spare::new(copy.len())).collect::<Option<_>>()?;
        Some(BufferMemory { averages, copies })
    }

    fn prefault(self) -> BufferMemory {
        let averages = self.averages.into_iter().map(SpareAverages::prefault).collect();
        BufferMemory { averages, copies: self.copies.into_iter().map(Spare::prefault).collect() }
    }
}
