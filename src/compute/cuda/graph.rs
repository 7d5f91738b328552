//! Updates in CUDA graphs: a graph captures one, and each launch does it or not, as the host has prepared it.
//!
//! A graph fixes the arguments of its kernels. So it has a table of chunks of its own, and reads weights from a state
//! that a small kernel sets before a launch that is due. The last kernel of the update takes that back. A launch that
//! was not announced therefore changes nothing, and is counted.

use cudarc::driver::CudaStream;
use safetensors::Dtype;

use super::averages::{DeviceAverages, NewestLook, common_stream};
use super::kernels::{GraphUpdateArgs, MAX_GRAPH_PROFILES, UpdateArgs};
use super::replays::{ReplayEnd, Replays, free_unused};
use super::{Buffer, GraphStream};
use crate::compute::cpu::UpdateWeights;
use crate::error::Result;
use crate::tensor::CudaMemory;

/// Action of errors about captures.
const CAPTURE: &str = "capture the update";

impl DeviceAverages {
    /// Adds an update of all averages and copied tensors to the graph that a stream is captured into. With `looks`, it
    /// changes nothing if an averaged tensor has NaN or infinity.
    ///
    /// The graph keeps the memory of the averages, also if they are dropped before it.
    ///
    /// # Errors
    /// Those of [`DeviceAverages::update_if_finite`], and [`Error::Cuda`](crate::Error::Cuda) if the stream is not
    /// captured or the driver is older than CUDA 12.3.
    pub fn capture(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
        stream: GraphStream<'_>,
        looks: bool,
    ) -> Result<()> {
        let tensors = averaged.iter().map(|(_, memory)| memory).chain(copied);
        let on = common_stream(tensors)?.unwrap_or((stream.device, stream.stream));
        let device = self.device().clone();
        device.check_number(on.0)?;
        if on != (stream.device, stream.stream) {
            let reason = "the parameters come with another stream: lend them on the stream that is captured";
            return Err(self.error(CAPTURE, reason));
        }
        self.check_tensors(averaged, copied)?;
        free_unused();
        let _bound = device.bind()?;
        let captured = device.borrow_captured_stream(stream.stream)?;
        let (chunks, averaged_chunks) = self.chunks_of(averaged, copied)?;
        let mut replays = match self.replays.take() {
            Some(replays) => replays,
            None => Replays::new(&self.arenas)?,
        };
        let count = chunks.len();
        let table = replays.add_table(&captured, chunks);
        let replays = self.replays.insert(replays);
        let table = table?;
        if looks {
            // SAFETY: by the contract of `GraphStream`.
            unsafe { replays.look(&captured, table, averaged_chunks) }?;
        }
        for first in (0..self.profiles()).step_by(MAX_GRAPH_PROFILES) {
            self.capture_launch(&captured, table, count, first)?;
        }
        self.replays.as_ref().map_or(Ok(()), |replays| replays.end(&captured))
    }

    /// Captures the update of up to 4 profiles, from `first` on.
    fn capture_launch(&self, stream: &CudaStream, table: u64, chunks: usize, first: usize) -> Result<()> {
        let Some(replays) = &self.replays else { return Ok(()) };
        let arenas = &self.arenas;
        let count = MAX_GRAPH_PROFILES.min(self.profiles() - first);
        let mut update = UpdateArgs {
            chunks: table,
            copies: arenas.copies.address(),
            found: replays.found_address(),
            ..Default::default()
        };
        for i in 0..count {
            update.high[i] = arenas.high[first + i].address();
            update.low[i] = arenas.low.get(first + i).map_or(0, Buffer::address);
        }
        let (weights, threshold) = (replays.weights_address(first), replays.threshold_address());
        let args = GraphUpdateArgs { update, weights, threshold };
        // SAFETY: the graph keeps arenas, table and state. The parameters are borrowed by the contract of
        // `GraphStream`.
        unsafe { arenas.device.kernels.update_in_graph(stream, &args, count, !arenas.low.is_empty(), chunks) }
            .map_err(arenas.device.driver_error(CAPTURE))
    }

    /// Calls `launch`, which launches a graph with a captured update on a stream. The update is done if there are
    /// weights.
    ///
    /// The inner result is that of `launch`.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if nothing was captured, if the stream itself is captured, or if the driver
    /// fails. Nothing was launched then, unless the error says that an update was lost.
    pub fn replay<E>(
        &mut self,
        stream: GraphStream<'_>,
        weights: Option<UpdateWeights<'_>>,
        launch: impl FnOnce() -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        const ACTION: &str = "replay the update";
        self.check_complete(ACTION)?;
        let device = self.device().clone();
        device.check_number(stream.device)?;
        let borrowed = device.borrow_stream(stream.stream)?;
        let Some(replays) = &mut self.replays else {
            return Err(self.error(ACTION, "no graph has captured one: capture it first"));
        };
        {
            let _bound = device.bind()?;
            let order = || device.driver_error("order two streams");
            borrowed.wait(&self.updated).map_err(order())?;
            borrowed.wait(&replays.replayed).map_err(order())?;
            if let Some(weights) = weights {
                replays.prepare(&borrowed, weights)?;
            }
        }
        // With the context and the capture mode of the caller.
        let launched = launch();
        let _bound = device.bind()?;
        // The graph has done so itself, unless it was not launched or has no update.
        let taken_back = if weights.is_some() { replays.take_back(&borrowed) } else { Ok(()) };
        replays.note_launch(weights.is_some(), launched.is_err());
        let recorded = replays.replayed.record(&borrowed).map_err(device.driver_error("record an event"));
        let mut marked = taken_back.and(recorded);
        if weights.is_some() {
            self.newest = NewestLook::Replay;
            marked = marked.and_then(|()| self.mark_updated(&borrowed));
        }
        if marked.is_err() {
            // No event covers the launch, so it is waited for.
            self.incomplete = true;
            let _ = borrowed.synchronize();
        }
        marked.map(|()| launched)
    }

    /// Waits for the newest update if a graph did it, and returns its end. None if it was not in a graph.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if the update failed.
    pub fn end_of_replay(&self) -> Result<Option<ReplayEnd>> {
        match (&self.replays, self.newest) {
            (Some(replays), NewestLook::Replay) => self.wait().map(|()| Some(replays.end_of_newest())),
            _ => Ok(None),
        }
    }

    /// Waits for the newest replay, and returns the number of launches since the last report that were not announced.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) if the graph failed.
    pub fn stray_replays(&self) -> Result<u64> {
        self.replays.as_ref().map_or(Ok(0), Replays::strays)
    }
}
