//! The memory of a checkpoint's copy, from one checkpoint to the next.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::compute::cpu::{Layout, Range, Spare, SpareAverages};
use crate::tracker::moment::{CheckpointMeta, Failure};
use crate::tracker::values::{OwnedValues, Values};
use crate::tracker::writer::Home;

/// Memory for one copy of an engine's values, while it is not used for one.
#[derive(Clone, Default)]
pub(in crate::tracker) struct CopyBuffer {
    kept: Arc<Mutex<Option<Memory>>>,
    /// Whether memory is to be missing.
    #[cfg(test)]
    refused: bool,
}

struct Memory {
    averages: Vec<SpareAverages>,
    copies: Vec<Spare<u8>>,
}

impl CopyBuffer {
    /// Takes the memory for copies of such values, so that not even the first has to wait for it; where there is none, the
    /// first will tell.
    pub(super) fn prepare(&self, values: &Values<'_>) {
        *self.lock() = Memory::for_copy_of(values).map(Memory::touched);
    }

    /// Copies the values of a moment, to be stored by another thread; none where there is no memory, which is warned of.
    ///
    /// # Errors
    /// [`Failure::Values`] for what is never stored.
    pub(super) fn copy_of(&self, values: &Values<'_>, moment: &CheckpointMeta) -> Result<Option<OwnedValues>, Failure> {
        let Some((mut copy, ranges)) = self.copy(values, moment.table.layout()) else {
            let (dir, step) = (moment.dir.display(), moment.step());
            tracing::warn!(
                "{dir}: no memory for a copy of the averages: all wait until the snapshot of step {step} is written"
            );
            return Ok(None);
        };
        match moment.choose_all_dtypes(&copy.as_values(), &ranges) {
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

    /// Copies the values, and tells the range of every averaged tensor of each profile.
    fn copy(&self, values: &Values<'_>, layout: &Layout) -> Option<(OwnedValues, Vec<Vec<Range>>)> {
        #[cfg(test)]
        if self.refused {
            return None;
        }
        let kept = self.lock().take();
        let memory = match kept {
            Some(memory) => memory,
            None => Memory::for_copy_of(values)?,
        };
        let profiles = memory.averages.into_iter().zip(values.averages);
        let (averages, ranges) = profiles.map(|(spare, averages)| spare.copy(averages, layout)).unzip();
        let tensors = memory.copies.into_iter().zip(values.copies);
        let copies = tensors.map(|(spare, bytes)| spare.written(|copy| copy.copy_from_slice(bytes))).collect();
        Some((OwnedValues { averages, copies, ..OwnedValues::default() }, ranges))
    }

    /// Keeps the memory of a copy for the next one; the system may use it meanwhile.
    fn put_back(&self, copy: OwnedValues) {
        let averages = copy.averages.into_iter().map(SpareAverages::lend_back).collect();
        let copies = copy.copies.into_iter().map(Spare::lend_back).collect();
        *self.lock() = Some(Memory { averages, copies });
    }

    /// The way back for a copy that is handed to another thread.
    pub(super) fn home(&self) -> Home {
        let spare = self.clone();
        Box::new(move |copy| spare.put_back(copy))
    }

    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, Option<Memory>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl CopyBuffer {
    /// From now on there is no memory.
    pub(in crate::tracker) fn refuse(&mut self) {
        self.refused = true;
    }

    /// Whether there is memory for the next copy.
    pub(in crate::tracker) fn is_ready(&self) -> bool {
        self.lock().is_some()
    }
}

impl Memory {
    fn for_copy_of(values: &Values<'_>) -> Option<Memory> {
        let averages = values.averages.iter().map(SpareAverages::for_copy_of).collect::<Option<_>>()?;
        let copies = values.copies.iter().map(|copy| Spare::new(copy.len())).collect::<Option<_>>()?;
        Some(Memory { averages, copies })
    }

    fn touched(self) -> Memory {
        let averages = self.averages.into_iter().map(SpareAverages::touched).collect();
        Memory { averages, copies: self.copies.into_iter().map(Spare::touched).collect() }
    }
}
