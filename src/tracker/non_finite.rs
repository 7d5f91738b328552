//! Reaction to NaN and infinity in the parameters, so that they do not spoil the averages.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Error, Result, shown};
use crate::tensor::NonFiniteElement;

/// Reaction of an update to parameters with NaN or infinity. Only tensors that are averaged are looked at.
///
/// For parameters on a device, the look ends after the call. A later call then reports it: the next that is due, or
/// before it one that needs the averages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNonFinite {
    /// Returns [`Error::NonFiniteParameter`]. The call counts a step, but the averages do not change and the history
    /// has no such update, so the training can repair its model and go on.
    #[default]
    Raise,
    /// Leaves out the update, as [`OnNonFinite::Raise`] does, and logs a warning at the first of several such updates
    /// in a row.
    Skip,
    /// Does not look. The averages take the value, and the next snapshot is [`Error::NonFinite`].
    Ignore,
}

/// Chosen reaction, with the state of its reports.
#[derive(Debug, Default)]
pub(super) struct NonFinitePolicy {
    reaction: OnNonFinite,
    /// True if the newest update was left out.
    has_left_out: AtomicBool,
    /// True in a sharded run: an update that this process leaves out parts it from the others.
    is_shared: bool,
    /// Tensor and step of the first such update.
    parting: OnceLock<(String, u64)>,
    /// Errors that no call has returned yet, the oldest first. A call may find that of two updates.
    errors: Mutex<VecDeque<Error>>,
}

impl NonFinitePolicy {
    /// `is_shared` is true in a sharded run.
    pub(super) fn new(reaction: OnNonFinite, is_shared: bool) -> NonFinitePolicy {
        NonFinitePolicy { reaction, is_shared, ..NonFinitePolicy::default() }
    }

    /// Checks that this process of a sharded run has left out no update that the others may have done. If it has, its
    /// averages must not be stored or used beside theirs.
    ///
    /// # Errors
    /// The error of the update, once, and then [`Error::Tensor`].
    pub(super) fn check_shared(&self) -> Result<()> {
        let Some((tensor, step)) = self.parting.get() else { return Ok(()) };
        self.take_error()?;
        let reason = format!(
            "it was NaN or infinite at step {step}, so that this process left out an update that the others of the \
             sharded run may have done: it stores nothing more. Stop all processes, repair the model, and resume"
        );
        Err(Error::tensor(tensor, reason))
    }

    /// Returns true if updates look at their parameters.
    pub(super) fn looks(&self) -> bool {
        self.reaction != OnNonFinite::Ignore
    }

    /// Takes note of an update that was done.
    pub(super) fn note_update(&self) {
        self.has_left_out.store(false, Ordering::Relaxed);
    }

    /// Warns of an update that was left out, or keeps its error for [`NonFinitePolicy::take_error`].
    pub(super) fn note_refusal(
        &self,
        step: u64,
        tensor: &str,
        NonFiniteElement { element, value, .. }: NonFiniteElement,
    ) {
        let is_first = !self.has_left_out.swap(true, Ordering::Relaxed);
        if self.is_shared {
            self.parting.get_or_init(|| (tensor.to_owned(), step));
        }
        if self.reaction == OnNonFinite::Raise {
            let error = Error::NonFiniteParameter { tensor: tensor.to_owned(), element, value, step };
            self.errors.lock().unwrap_or_else(PoisonError::into_inner).push_back(error);
        } else if is_first {
            let tensor = shown(tensor);
            tracing::warn!(
                "the update of step {step} is left out: the parameter `{tensor}` is {value} at element {element}. The \
                 next warning comes after an update without NaN"
            );
        }
    }

    /// Keeps an error of an update that was left out for another reason.
    #[cfg(feature = "cuda")]
    pub(super) fn note_error(&self, error: Error) {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).push_back(error);
    }

    /// Returns the oldest error of an update that was left out, once.
    pub(super) fn take_error(&self) -> Result<()> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).pop_front().map_or(Ok(()), Err)
    }
}
