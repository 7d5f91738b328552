//! End of an update: a look at its parameters may end later than the call, and decides if the update was done.

use std::sync::OnceLock;

use super::PostHocEma;
use crate::error::Result;
use crate::math::History;

/// Update that may still turn out to have changed nothing.
#[derive(Debug)]
pub(super) struct NewestUpdate {
    time: u64,
    /// True if the update was done, once that is known.
    is_done: OnceLock<bool>,
    /// History with this update, made when it is asked for.
    history: OnceLock<History>,
}

impl NewestUpdate {
    pub(super) fn new(time: u64) -> NewestUpdate {
        NewestUpdate { time, is_done: OnceLock::new(), history: OnceLock::new() }
    }
}

impl PostHocEma {
    /// Returns the times of all updates so far.
    ///
    /// For parameters on a device it waits until the newest update has looked at them
    /// ([`Options::on_non_finite`](crate::Options::on_non_finite)).
    pub fn history(&self) -> &History {
        match &self.newest {
            // If the device failed, this is the last history without an error; all other calls return one.
            Some(newest) if self.is_done(newest).unwrap_or(true) => newest.history.get_or_init(|| {
                let mut history = self.settled.clone();
                // Cannot fail: the time is after that of every earlier call.
                let _ = history.push(newest.time);
                history
            }),
            _ => &self.settled,
        }
    }

    /// Waits until it is known if the newest update was done.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if its device failed.
    pub(super) fn settle(&self) -> Result<()> {
        self.newest.as_ref().map_or(Ok(()), |newest| self.is_done(newest).map(drop))
    }

    /// Does the same as [`PostHocEma::settle`], and looks for replays of CUDA graphs that changed nothing.
    pub(super) fn settle_replays(&self) -> Result<()> {
        self.settle()?;
        #[cfg(feature = "cuda")]
        self.note_strays()?;
        Ok(())
    }

    /// Does the same as [`PostHocEma::settle`], and adds the update to the history if it was done.
    pub(super) fn settle_history(&mut self) -> Result<()> {
        self.settle()?;
        match self.newest.take() {
            Some(NewestUpdate { time, is_done, .. }) if is_done.get() == Some(&true) => self.settled.push(time),
            _ => Ok(()),
        }
    }

    fn is_done(&self, newest: &NewestUpdate) -> Result<bool> {
        if let Some(&is_done) = newest.is_done.get() {
            return Ok(is_done);
        }
        #[cfg(feature = "cuda")]
        if !self.has_run(newest.time)? {
            let _ = newest.is_done.set(false);
            return Ok(false);
        }
        let refused = self.engine.refused()?;
        // Another thread may have been faster, and has reported it.
        if newest.is_done.set(refused.is_none()).is_ok() {
            match refused {
                Some(found) => {
                    let tensor = self.registry.averaged().get(found.tensor).map_or("", |entry| entry.name.as_str());
                    self.non_finite.note_refusal(newest.time, tensor, found);
                }
                None => self.non_finite.note_update(),
            }
        }
        Ok(refused.is_none())
    }
}
