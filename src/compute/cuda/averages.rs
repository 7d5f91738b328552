//! Running averages on a device. An update is one fused launch on the stream that trains.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use safetensors::Dtype;

use super::arenas::Arenas;
use super::chunks::{ChunkTable, TensorSpan, chunk_size, split_into_chunks};
use super::device::Event;
use super::kernels::{Chunk, KIND_BYTES, MAX_PROFILES, UpdateArgs, kind};
use super::look::Look;
use super::replays::{Replays, free_unused};
use super::staging::Staging;
use super::{AveragesReader, BlendInput, Buffer, CudaDevice};
use crate::compute::cpu::{Averages, Layout, Precision, UpdateWeights};
use crate::error::{Error, Result};
use crate::tensor::{CudaMemory, NonFiniteElement};

/// Bytes of a copied tensor's chunk for each element of an averaged tensor's.
const COPIED_CHUNK: usize = 4;

/// Running averages of several profiles on a device, and the newest values of tensors that are copied.
#[derive(Debug)]
pub struct DeviceAverages {
    pub(super) arenas: Arc<Arenas>,
    table: ChunkTable,
    /// Number of chunks of averaged tensors, the first in `table`.
    averaged_chunks: usize,
    /// Address and dtype of each tensor in `table`: averaged tensors, then copied ones.
    tabulated: Vec<(u64, Dtype)>,
    look: Look,
    pub(super) newest: NewestLook,
    /// Event that passes when the newest update has run.
    pub(super) updated: Event,
    /// True if an update was queued only in part, so that the averages are unusable.
    pub(super) incomplete: bool,
    /// State of updates in CUDA graphs, after the first capture.
    pub(super) replays: Option<Replays>,
}

/// Looks on which an update depends.
#[derive(Clone, Copy, Debug)]
enum Looking<'a> {
    None,
    /// One of the update itself.
    Here,
    /// One before the update, and those of other devices.
    Joined(&'a [&'a Look]),
}

/// Place of the result of the newest look at parameters.
#[derive(Clone, Copy, Debug)]
pub(super) enum NewestLook {
    /// The newest update did not look.
    None,
    /// It is in [`DeviceAverages::look`].
    Update,
    /// It is in [`DeviceAverages::replays`].
    Replay,
}

impl Drop for DeviceAverages {
    fn drop(&mut self) {
        // NVIDIA does not promise that a free waits for kernels. An error here was already reported.
        let _ = self.wait();
        let _ = self.replays.as_ref().map(Replays::wait);
    }
}

/// Returns the common device and stream of all tensors, or none for an empty list.
///
/// # Errors
/// [`Error::Cuda`] if the tensors are on several devices or have several streams.
pub(super) fn common_stream<'a>(
    mut tensors: impl Iterator<Item = &'a CudaMemory<'a>>,
) -> Result<Option<(usize, usize)>> {
    let Some(first) = tensors.next() else { return Ok(None) };
    let reason = match tensors.find(|memory| (memory.device, memory.stream) != (first.device, first.stream)) {
        None => return Ok(Some((first.device, first.stream))),
        Some(other) if other.device != first.device => {
            format!("the model has tensors on cuda:{} too: move all to one device", other.device)
        }
        Some(_) => "the tensors come with several streams: pass the stream that trains with each of them".into(),
    };
    Err(Error::Cuda { device: first.device, action: "read the parameters".into(), reason })
}

impl DeviceAverages {
    /// Creates averages of zeros for the tensors of a layout, and room for copied tensors of these sizes in bytes.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if the device has too little memory.
    pub fn zeros(
        device: &Arc<CudaDevice>,
        layout: &Layout,
        profiles: usize,
        precision: Precision,
        copied: &[usize],
    ) -> Result<DeviceAverages> {
        free_unused();
        let arenas = Arenas::new(device, layout, profiles, precision, copied)?;
        let stream = device.stream()?;
        for buffer in arenas.high.iter().chain(&arenas.low).chain([&arenas.copies]) {
            buffer.clear(&stream)?;
        }
        let most = chunk_size(device, layout.total())?;
        let averaged = (0..layout.len()).map(|i| layout.range(i).len().div_ceil(most));
        let chunks = averaged.chain(copied.iter().map(|bytes| bytes.div_ceil(most * COPIED_CHUNK))).sum();
        let averages = DeviceAverages {
            arenas: Arc::new(arenas),
            table: ChunkTable::new(device, chunks)?,
            averaged_chunks: 0,
            tabulated: Vec::new(),
            look: Look::new(device)?,
            newest: NewestLook::None,
            // The host waits for it if the next update comes soon.
            updated: device.event()?,
            incomplete: false,
            replays: None,
        };
        averages.mark_updated(&stream)?;
        averages.wait()?;
        Ok(averages)
    }

    /// Creates averages with the values of `averages`, and copied tensors with the values of `copies`.
    ///
    /// # Errors
    /// [`Error::DeviceMemory`] if the device has too little memory.
    pub fn upload(
        device: &Arc<CudaDevice>,
        layout: &Layout,
        averages: &[Averages],
        precision: Precision,
        copies: &[Vec<u8>],
    ) -> Result<DeviceAverages> {
        let sizes: Vec<usize> = copies.iter().map(Vec::len).collect();
        let uploaded = DeviceAverages::zeros(device, layout, averages.len(), precision, &sizes)?;
        let arenas = &uploaded.arenas;
        let stream = device.stream()?;
        let mut staging = Staging::new(device, 4 * layout.total())?;
        // SAFETY: we own the destinations, and they are as long: both sides come from one layout and the same sizes.
        let mut send = |to: u64, bytes: &[u8]| unsafe { staging.send(&stream, to, bytes) };
        for (values, buffer) in averages.iter().zip(&arenas.high) {
            send(buffer.address(), bytemuck::cast_slice(&values.high))?;
        }
        for (values, buffer) in averages.iter().zip(&arenas.low) {
            send(buffer.address(), bytemuck::cast_slice(values.low.as_deref().unwrap_or_default()))?;
        }
        for (copy, range) in copies.iter().zip(&arenas.copy_ranges) {
            send(arenas.copies.address() + range.start as u64, copy)?;
        }
        uploaded.mark_updated(&stream)?;
        uploaded.wait()?;
        Ok(uploaded)
    }

    /// Returns the device.
    pub fn device(&self) -> &Arc<CudaDevice> {
        &self.arenas.device
    }

    pub(super) fn arenas(&self) -> &Arenas {
        &self.arenas
    }

    /// Returns the number of profiles.
    pub fn profiles(&self) -> usize {
        self.arenas.high.len()
    }

    /// Does the same as [`DeviceAverages::update_if_finite`], but takes NaN and infinity into the averages.
    ///
    /// # Errors
    /// Those of [`DeviceAverages::update_if_finite`].
    pub fn update(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
        weights: UpdateWeights<'_>,
    ) -> Result<()> {
        self.queue(averaged, copied, weights, Looking::None)
    }

    /// Queues an update of all averages and copied tensors on the stream of the parameters. It changes nothing if an
    /// averaged tensor has NaN or infinity, as [`DeviceAverages::refused`] returns later.
    ///
    /// # Errors
    /// [`Error::Cuda`] if tensors are on another device, have several streams or have other sizes. The averages are
    /// then unchanged. [`Error::Cuda`] too if the driver rejects the launch.
    pub fn update_if_finite(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
        weights: UpdateWeights<'_>,
    ) -> Result<()> {
        self.queue(averaged, copied, weights, Looking::Here)
    }

    /// Queues an update after a [`DeviceAverages::look`] at the same parameters here and at those of other devices. It
    /// changes nothing if any of these looks has found an element. The others look again only after it has run.
    ///
    /// # Errors
    /// Those of [`DeviceAverages::update_if_finite`].
    pub fn update_after_looks(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
        weights: UpdateWeights<'_>,
        others: &[&DeviceAverages],
    ) -> Result<()> {
        let others: Vec<&Look> = others.iter().map(|averages| &averages.look).collect();
        self.queue(averaged, copied, weights, Looking::Joined(&others))
    }

    /// Queues a look at the parameters without an update. [`DeviceAverages::refused`] returns what it has found.
    ///
    /// It is for a model on several devices, where every device looks before any average changes.
    ///
    /// # Errors
    /// Those of [`DeviceAverages::update_if_finite`].
    pub fn look(&mut self, averaged: &[(Dtype, CudaMemory<'_>)], copied: &[CudaMemory<'_>]) -> Result<()> {
        let device = self.device().clone();
        let _bound = device.bind()?;
        self.newest = NewestLook::None;
        let Some(stream) = self.begin(averaged, copied)? else { return Ok(()) };
        // SAFETY: the parameters are borrowed in the order of the stream.
        let looked = unsafe { self.look.queue(&stream, self.table.address(), self.averaged_chunks) };
        let looked = looked.and_then(|()| self.look.publish(&stream)).and_then(|()| self.mark_updated(&stream));
        if looked.is_err() {
            // No event covers the queued work, so it is waited for.
            let _ = stream.synchronize();
        }
        self.newest = if looked.is_ok() { NewestLook::Update } else { NewestLook::None };
        looked
    }

    /// Checks that an update with these parameters can be queued, without a change.
    ///
    /// # Errors
    /// Those of [`DeviceAverages::update_if_finite`] that leave the averages unchanged.
    pub fn check(&self, averaged: &[(Dtype, CudaMemory<'_>)], copied: &[CudaMemory<'_>]) -> Result<()> {
        self.checked_stream(averaged, copied).map(drop)
    }

    /// Checks the parameters of an update, and returns their stream; none if there are none.
    fn checked_stream(
        &self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
    ) -> Result<Option<Arc<CudaStream>>> {
        let tensors = averaged.iter().map(|(_, memory)| memory).chain(copied);
        let Some((number, stream)) = common_stream(tensors)? else { return Ok(None) };
        self.device().check_number(number)?;
        self.check_tensors(averaged, copied)?;
        self.device().borrow_stream(stream).map(Some)
    }

    /// Checks the parameters of an update, and prepares their stream and the table. Returns none if there are none.
    fn begin(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
    ) -> Result<Option<Arc<CudaStream>>> {
        let Some(borrowed) = self.checked_stream(averaged, copied)? else { return Ok(None) };
        // Needed even if the handle is that of the last update. A handle may be reused for another stream, and the one
        // of the per-thread default stream means another stream on each thread.
        borrowed.wait(&self.updated).map_err(self.device().driver_error("order two streams"))?;
        self.refresh_table(&borrowed, averaged, copied)?;
        Ok(Some(borrowed))
    }

    fn queue(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
        weights: UpdateWeights<'_>,
        looking: Looking<'_>,
    ) -> Result<()> {
        let device = self.device().clone();
        let _bound = device.bind()?;
        if weights.each.len() != self.profiles() {
            return Err(self.error("update the averages", "there is not one weight for each profile"));
        }
        let Some(borrowed) = self.begin(averaged, copied)? else { return Ok(()) };
        let queued = self.queue_launches(&borrowed, weights, looking);
        if queued.is_err() {
            // No event covers the queued work, so it is waited for.
            let _ = borrowed.synchronize();
        }
        queued
    }

    /// Queues the look and the launches of an update, and records their end.
    fn queue_launches(&mut self, stream: &CudaStream, weights: UpdateWeights<'_>, looking: Looking<'_>) -> Result<()> {
        match looking {
            Looking::None => self.look.reset(stream)?,
            // SAFETY: the parameters are borrowed in the order of the stream.
            Looking::Here => unsafe { self.look.queue(stream, self.table.address(), self.averaged_chunks) }?,
            Looking::Joined(others) => self.look.join(stream, others)?,
        }
        for (group, each) in weights.each.chunks(MAX_PROFILES).enumerate() {
            let launched = self.launch(stream, group * MAX_PROFILES, UpdateWeights { each, ..weights });
            self.incomplete |= launched.is_err() && group > 0;
            launched?;
        }
        let fetched = if matches!(looking, Looking::Here) { self.look.fetch(stream) } else { Ok(()) };
        let marked = fetched.and_then(|()| self.mark_updated(stream));
        self.incomplete |= marked.is_err();
        self.newest = if matches!(looking, Looking::None) { NewestLook::None } else { NewestLook::Update };
        marked
    }

    /// Waits for the newest update, and returns the first element for which it was refused, if it was.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the update failed.
    pub fn refused(&self) -> Result<Option<NonFiniteElement>> {
        let found = match (self.newest, &self.replays) {
            (NewestLook::None, _) => return Ok(None),
            (NewestLook::Replay, Some(replays)) => {
                self.wait()?;
                replays.found()?
            }
            _ => {
                self.wait()?;
                // SAFETY: the event that was waited for follows the copy.
                unsafe { self.look.found() }?
            }
        };
        let Some(found) = found else { return Ok(None) };
        let layout = &self.arenas.layout;
        let table = self.replays.as_ref().filter(|_| matches!(self.newest, NewestLook::Replay));
        let offset = table.map_or_else(|| self.table.offset(found.chunk), |replays| replays.offset(found.chunk));
        let position = offset.map(|offset| offset as usize + found.element);
        let place = |at: usize| Some((at, (0..layout.len()).find(|&i| layout.range(i).contains(&at))?));
        let Some((at, tensor)) = position.and_then(place) else {
            return Err(Error::Internal(format!("{found:?} is outside of the parameters")));
        };
        let element = at - layout.range(tensor).start;
        Ok(Some(NonFiniteElement { tensor, element, value: found.value }))
    }

    /// Checks that the tensors have the sizes that the averages were created for.
    pub(super) fn check_tensors(&self, averaged: &[(Dtype, CudaMemory<'_>)], copied: &[CudaMemory<'_>]) -> Result<()> {
        let arenas = &self.arenas;
        let layout = &arenas.layout;
        let counts_match = averaged.len() == layout.len() && copied.len() == arenas.copy_ranges.len();
        let averaged_match = averaged.iter().enumerate().all(|(i, (dtype, memory))| {
            i < layout.len() && memory.bytes == layout.range(i).len() * dtype.bitsize() / 8
        });
        let copied_match = copied.iter().zip(&arenas.copy_ranges).all(|(memory, range)| memory.bytes == range.len());
        if !(counts_match && averaged_match && copied_match) {
            let reason = "the tensors differ from those that the averages were created for";
            return Err(self.error("update the averages", reason));
        }
        self.check_complete("update the averages")
    }

    pub(super) fn check_complete(&self, action: &str) -> Result<()> {
        if self.incomplete {
            return Err(self.error(action, "part of an update was lost: restart the process and resume the run"));
        }
        Ok(())
    }

    pub(super) fn error(&self, action: &str, reason: &str) -> Error {
        Error::Cuda { device: self.device().number(), action: action.into(), reason: reason.into() }
    }

    /// Rebuilds the table of chunks if a tensor has another address or dtype than at the last update.
    fn refresh_table(
        &mut self,
        stream: &CudaStream,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
    ) -> Result<()> {
        let tensors = averaged.iter().map(|&(dtype, memory)| (memory.address, dtype));
        let tensors = tensors.chain(copied.iter().map(|memory| (memory.address, Dtype::U8)));
        if tensors.clone().eq(self.tabulated.iter().copied()) {
            return Ok(());
        }
        let tensors: Vec<(u64, Dtype)> = tensors.collect();
        let (chunks, averaged_chunks) = self.chunks_of(averaged, copied)?;
        self.averaged_chunks = averaged_chunks;
        self.tabulated.clear();
        self.table.set(stream, chunks)?;
        self.tabulated = tensors;
        Ok(())
    }

    /// Returns the chunks of all tensors, and the number of those of averaged ones, which come first.
    ///
    /// # Errors
    /// Those of [`chunk_size`].
    pub(super) fn chunks_of(
        &self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
    ) -> Result<(Vec<Chunk>, usize)> {
        let most = chunk_size(&self.arenas.device, self.arenas.layout.total())?;
        let mut chunks = Vec::new();
        for (i, (dtype, memory)) in averaged.iter().enumerate() {
            let range = self.arenas.layout.range(i);
            let span = TensorSpan {
                address: memory.address,
                offset: range.start as u64,
                elements: range.len(),
                kind: kind(*dtype),
            };
            split_into_chunks(&mut chunks, span, dtype.bitsize() / 8, 1, most);
        }
        let averaged_chunks = chunks.len();
        for (memory, range) in copied.iter().zip(&self.arenas.copy_ranges) {
            let span = TensorSpan {
                address: memory.address,
                offset: range.start as u64,
                elements: range.len(),
                kind: KIND_BYTES,
            };
            split_into_chunks(&mut chunks, span, 1, 1, most * COPIED_CHUNK);
        }
        Ok((chunks, averaged_chunks))
    }

    /// Queues the update of the profiles from `first` on, one for each weight.
    fn launch(&self, stream: &CudaStream, first: usize, weights: UpdateWeights<'_>) -> Result<()> {
        let arenas = &self.arenas;
        let mut args = UpdateArgs {
            chunks: self.table.address(),
            copies: arenas.copies.address(),
            found: self.look.address(),
            threshold: weights.threshold,
            ..Default::default()
        };
        for (i, &weight) in weights.each.iter().enumerate() {
            args.weights[i] = weight;
            args.high[i] = arenas.high[first + i].address();
            args.low[i] = arenas.low.get(first + i).map_or(0, Buffer::address);
        }
        let compensated = !arenas.low.is_empty();
        // SAFETY: we own arenas and table, which are freed after the update has run. The parameters are borrowed in the
        // order of the stream.
        unsafe { arenas.device.kernels.update(stream, &args, weights.each.len(), compensated, self.table.len()) }
            .map_err(arenas.device.driver_error("launch the update"))
    }

    /// Records the end of an update.
    pub(super) fn mark_updated(&self, stream: &CudaStream) -> Result<()> {
        let _bound = self.device().bind()?;
        self.updated.record(stream).map_err(self.device().driver_error("record an event"))
    }

    /// Waits until all updates have run.
    ///
    /// # Errors
    /// [`Error::Cuda`] if one of them failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device().bind()?;
        self.updated.synchronize().map_err(self.device().driver_error("finish the update"))
    }

    /// Returns a reader of the averages after the newest update, usable from any thread.
    ///
    /// The caller must not start the next update before the reader is done.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver creates no stream.
    pub fn reader(&self) -> Result<AveragesReader> {
        let reader = AveragesReader::new(self.arenas.clone(), self.device().stream()?);
        self.follow(&reader)?;
        Ok(reader)
    }

    /// Orders later reads of a reader of these averages after the newest update.
    ///
    /// # Errors
    /// [`Error::Cuda`] if part of an update was lost, or if the driver fails.
    pub fn follow(&self, reader: &AveragesReader) -> Result<()> {
        self.check_complete("read the averages")?;
        reader.wait_for(&self.updated)
    }

    /// Returns the memory of an averaged tensor of one profile, as an input of a blend.
    pub fn input(&self, profile: usize, tensor: usize) -> BlendInput<'_> {
        let range = self.arenas.layout.range(tensor);
        BlendInput::Device { address: self.arenas.address(profile, range.start), bytes: 4 * range.len() }
    }
}
