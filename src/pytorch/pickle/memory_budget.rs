//! Memory that the values of a pickle take.

use super::PickleError;

/// Bytes that may still be taken.
#[derive(Debug)]
pub(in crate::pytorch) struct MemoryBudget {
    left: usize,
}

impl MemoryBudget {
    pub(in crate::pytorch) fn new(limit: usize) -> MemoryBudget {
        MemoryBudget { left: limit }
    }

    /// Counts some bytes before they are allocated.
    ///
    /// # Errors
    /// [`PickleError::TooLarge`] if too few are left.
    pub(in crate::pytorch) fn take(&mut self, bytes: usize) -> Result<(), PickleError> {
        self.left = self.left.checked_sub(bytes).ok_or(PickleError::TooLarge)?;
        Ok(())
    }
}
