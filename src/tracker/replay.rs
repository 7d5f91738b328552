//! Updates in CUDA graphs: one is captured with the training step, and done in the replays in which it is due.

use super::engine::cuda_tensors;
use super::settle::NewestUpdate;
use super::{PostHocEma, UpdateOutcome};
use crate::compute::cpu::UpdateWeights;
use crate::compute::cuda::GraphStream;
use crate::error::{Error, Result};
use crate::tensor::Parameters;

impl PostHocEma {
    /// Adds an update to the CUDA graph that `stream` is captured into, in the place of [`PostHocEma::update`].
    ///
    /// Call it once in each graph, after the optimiser's step, with the parameters lent on that stream. It counts no
    /// step. Launch the graph by [`PostHocEma::replay`], which decides if the update is due. An update outside of the
    /// graph is possible too, also of parameters at other places.
    ///
    /// # Errors
    /// [`Error::Setting`] if the averages are not on the device of the parameters. [`Error::Cuda`] if the stream is not
    /// captured, or if the driver is older than CUDA 12.3. [`Error::Changed`] as for [`PostHocEma::update`].
    pub fn capture_update(&mut self, params: &(impl Parameters + ?Sized), stream: GraphStream<'_>) -> Result<()> {
        let looks = self.non_finite.looks();
        let averages = self.engine.in_graphs(false)?;
        params.with_tensors(&mut |views| {
            let (averaged, copied) = cuda_tensors(&self.registry.order_views(views)?)?;
            averages.capture(&averaged, &copied, stream, looks)
        })
    }

    /// Counts a step and calls `launch`, which launches a graph with a captured update on `stream`.
    ///
    /// The averages have the bits of [`PostHocEma::update`] at the same steps. An update that is due first waits until
    /// the one before it has run. A graph that is launched otherwise changes no average; a later call then returns
    /// [`Error::Cuda`].
    ///
    /// # Errors
    /// Those of [`PostHocEma::update`] and of `launch`, and [`Error::Cuda`] if no graph has captured an update. The
    /// step is not counted then, unless the graph was launched all the same. If the graph of an earlier step had no
    /// update, the error names that step.
    pub fn replay<E: From<Error>>(
        &mut self,
        stream: GraphStream<'_>,
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<UpdateOutcome, E> {
        let time = self.clock.checked_add(1).ok_or(Error::Time { time: self.clock, last: self.clock })?;
        self.replay_at(time, stream, launch)
    }

    /// Does the same as [`PostHocEma::replay`] on the caller's own clock, as [`PostHocEma::update_at`] does.
    ///
    /// # Errors
    /// Those of [`PostHocEma::replay`], and [`Error::Time`] unless `time` grows from call to call.
    pub fn replay_at<E: From<Error>>(
        &mut self,
        time: u64,
        stream: GraphStream<'_>,
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<UpdateOutcome, E> {
        let mut launched = Ok(());
        let outcome = self.step_to(time, |tracker, is_due| {
            let weights = tracker.weights(time);
            let weights = is_due.then(|| UpdateWeights::at(time, &weights));
            let averages = tracker.engine.in_graphs(is_due)?;
            launched = averages.replay(stream, weights, launch)?;
            // A launch that has failed may have done the update.
            let has_update = is_due && (launched.is_ok() || averages.end_of_replay()?.is_some_and(|end| end.has_run));
            if has_update {
                tracker.newest = Some(NewestUpdate::new(time));
            }
            Ok(launched.is_ok() || has_update)
        })?;
        launched.map(|()| outcome)
    }

    /// Returns false if the newest update was to be done by a graph that has none, and notes the errors of replays.
    pub(super) fn has_run(&self, time: u64) -> Result<bool> {
        let Some(averages) = self.engine.on_device() else { return Ok(true) };
        let Some(end) = averages.end_of_replay()? else { return Ok(true) };
        if !end.has_run {
            let reason = "the graph that was launched has no captured update of these averages, or was not launched on \
                          the stream of the call: the update is left out";
            self.note_replay_error(&format!("do the update of step {time} in a CUDA graph"), reason.to_owned());
        }
        self.note_stray_count(end.strays);
        Ok(end.has_run)
    }

    /// Notes an error if graphs were launched without a call of [`PostHocEma::replay`].
    pub(super) fn note_strays(&self) -> Result<()> {
        let strays = self.engine.on_device().map_or(Ok(0), |averages| averages.stray_replays())?;
        self.note_stray_count(strays);
        Ok(())
    }

    fn note_stray_count(&self, strays: u64) {
        if strays > 0 {
            let times = if strays == 1 { "once".to_owned() } else { format!("{strays} times") };
            let reason = format!(
                "a captured update has run {times} outside of `replay`, or a graph has more than one: its averages did \
                 not change, and no step was counted: launch the graph through the tracker in each step"
            );
            self.note_replay_error("count the steps of a CUDA graph", reason);
        }
    }

    fn note_replay_error(&self, action: &str, reason: String) {
        let device = self.engine.on_device().map_or(0, |averages| averages.device().number());
        self.non_finite.note_error(Error::Cuda { device, action: action.into(), reason });
    }
}
