//! Look at the parameters before an update, so that one NaN does not spoil the averages.

use super::PostHocEma;
use super::registry::OrderedViews;
use crate::error::{Error, Result};
use crate::tensor::{TensorView, first_non_finite_of};

/// Reaction of an update to parameters with NaN or infinity. Only tensors that are averaged are looked at.
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

/// Chosen reaction, with the state of its warnings.
#[derive(Debug)]
pub(super) struct NonFinitePolicy {
    reaction: OnNonFinite,
    /// True if the newest due update was left out.
    has_left_out: bool,
}

impl NonFinitePolicy {
    /// Returns the policy for a model on a device, or on the host if `model_device` is none.
    ///
    /// # Errors
    /// [`Error::Setting`] for a look at parameters on a device.
    pub(super) fn new(chosen: Option<OnNonFinite>, model_device: Option<usize>) -> Result<NonFinitePolicy> {
        let reaction = match (chosen, model_device) {
            (None, None) => OnNonFinite::default(),
            (None | Some(OnNonFinite::Ignore), _) => OnNonFinite::Ignore,
            (Some(reaction), None) => reaction,
            (Some(_), Some(number)) => {
                let reason = format!(
                    "the parameters are on cuda:{number}, where no update looks at them: leave the option out or \
                     choose `ignore`; the error then comes with the next snapshot"
                );
                return Err(Error::Setting { option: "on_nonfinite", reason });
            }
        };
        Ok(NonFinitePolicy { reaction, has_left_out: false })
    }
}

impl PostHocEma {
    /// Returns true if the parameters of an update at `time` may be folded in.
    ///
    /// # Errors
    /// [`Error::NonFiniteParameter`] with [`OnNonFinite::Raise`].
    pub(super) fn look(&mut self, time: u64, views: &OrderedViews<'_, '_>) -> Result<bool> {
        let policy = &mut self.non_finite;
        if policy.reaction == OnNonFinite::Ignore {
            return Ok(true);
        }
        let tensors: Vec<_> = views.averaged.iter().filter_map(|view| elements(view)).collect();
        let Some((tensor, element, value)) = first_non_finite_of(&tensors) else {
            policy.has_left_out = false;
            return Ok(true);
        };
        let tensor = views.averaged[tensor].name;
        if policy.reaction == OnNonFinite::Raise {
            return Err(Error::NonFiniteParameter { tensor: tensor.to_owned(), element, value, step: time });
        }
        if !policy.has_left_out {
            let tensor = crate::error::shown(tensor);
            tracing::warn!(
                "the update of step {time} is left out: the parameter `{tensor}` is {value} at element {element}. The \
                 next warning comes after an update without NaN"
            );
        }
        policy.has_left_out = true;
        Ok(false)
    }
}

/// Returns a view's elements; none on a device, where [`NonFinitePolicy::new`] allows no look.
fn elements<'a>(view: &TensorView<'a>) -> Option<(safetensors::Dtype, &'a [u8])> {
    Some((view.dtype, view.host_bytes()?))
}
