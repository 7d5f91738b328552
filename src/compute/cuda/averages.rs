//! Running averages on a device: one fused launch per update, on the stream of whoever trains.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use safetensors::Dtype;

use super::chunks::{Chunk64, Table, chunk_size, cut};
use super::device::Event;
use super::kernels::{KIND_BYTES, PROFILES, UpdateArgs, kind};
use super::staging::Staging;
use super::{Buffer, Device, Reader};
use crate::compute::cpu::{Averages, Layout, Precision};
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// The memory of all averages, shared with whoever reads them in the background.
#[derive(Debug)]
pub(super) struct Arenas {
    pub(super) device: Arc<Device>,
    pub(super) layout: Layout,
    /// Of each profile, the f32 part and the low-order terms, by the layout.
    pub(super) high: Vec<Buffer>,
    pub(super) low: Vec<Buffer>,
    /// The tensors that are copied, one after the other, each at 16 bytes.
    pub(super) copies: Buffer,
    /// Where each lies.
    pub(super) places: Vec<std::ops::Range<usize>>,
}

/// The running averages of several profiles on a device, and the newest values of tensors that are copied.
#[derive(Debug)]
pub struct DeviceAverages {
    arenas: Arc<Arenas>,
    table: Table,
    /// What the table was made for, in order: averaged tensors, then copied ones.
    lent: Vec<(u64, Dtype)>,
    /// Passes when the newest update has run.
    updated: Event,
    /// Whether an update was queued in part: the averages are then of no use.
    torn: bool,
}

/// The one device and stream of all tensors.
pub(super) fn common<'a>(mut lent: impl Iterator<Item = &'a CudaMemory<'a>>) -> Result<Option<(usize, usize)>> {
    let Some(first) = lent.next() else { return Ok(None) };
    match lent.find(|memory| (memory.device, memory.stream) != (first.device, first.stream)) {
        Some(other) if other.device != first.device => {
            let reason = format!("the model's tensors lie on cuda:{} too: lend those of one device", other.device);
            Err(Error::Cuda { device: first.device, action: "read the parameters".into(), reason })
        }
        Some(_) => {
            let reason = "the model's tensors come with several streams: lend all with the one that trains".into();
            Err(Error::Cuda { device: first.device, action: "read the parameters".into(), reason })
        }
        None => Ok(Some((first.device, first.stream))),
    }
}

impl DeviceAverages {
    /// Averages of zeros for tensors of a layout, and room for copied tensors of these sizes in bytes.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the device has too little memory.
    pub fn zeros(
        device: &Arc<Device>,
        layout: &Layout,
        profiles: usize,
        precision: Precision,
        copied: &[usize],
    ) -> Result<DeviceAverages> {
        let arena = |size: usize| Buffer::new(device, layout.total() * size, "running averages");
        let high = (0..profiles).map(|_| arena(4)).collect::<Result<Vec<_>>>()?;
        let terms = if precision == Precision::Compensated { profiles } else { 0 };
        let low = (0..terms).map(|_| arena(2)).collect::<Result<Vec<_>>>()?;
        let mut places = Vec::with_capacity(copied.len());
        let mut end = 0;
        for &bytes in copied {
            places.push(end..end + bytes);
            end += bytes.next_multiple_of(16);
        }
        let copies = Buffer::new(device, end, "copied tensors")?;
        let arenas = Arenas { device: device.clone(), layout: layout.clone(), high, low, copies, places };
        let stream = device.stream()?;
        for buffer in arenas.high.iter().chain(&arenas.low).chain([&arenas.copies]) {
            buffer.clear(&stream)?;
        }
        let averages = DeviceAverages {
            arenas: Arc::new(arenas),
            table: Table::new(device)?,
            lent: Vec::new(),
            updated: device.order_event()?,
            torn: false,
        };
        averages.mark(&stream)?;
        averages.wait()?;
        Ok(averages)
    }

    /// Averages with the values of others, and of tensors that are copied.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the device has too little memory.
    pub fn upload(
        device: &Arc<Device>,
        layout: &Layout,
        averages: &[Averages],
        precision: Precision,
        copies: &[Vec<u8>],
    ) -> Result<DeviceAverages> {
        let sizes: Vec<usize> = copies.iter().map(Vec::len).collect();
        let made = DeviceAverages::zeros(device, layout, averages.len(), precision, &sizes)?;
        let (stream, arenas) = (device.stream()?, &made.arenas);
        let mut staging = Staging::new(device, 4 * layout.total())?;
        // SAFETY: the destinations are ours, and as long: both sides come from one layout and the same sizes.
        let mut write = |to: u64, bytes: &[u8]| unsafe { staging.send(&stream, to, bytes) };
        for (values, buffer) in averages.iter().zip(&arenas.high) {
            write(buffer.address(), bytemuck::cast_slice(&values.high))?;
        }
        for (values, buffer) in averages.iter().zip(&arenas.low) {
            write(buffer.address(), bytemuck::cast_slice(values.low.as_deref().unwrap_or_default()))?;
        }
        for (copy, place) in copies.iter().zip(&arenas.places) {
            write(arenas.copies.address() + place.start as u64, copy)?;
        }
        made.mark(&stream)?;
        made.wait()?;
        Ok(made)
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.arenas.device
    }

    pub(super) fn arenas(&self) -> &Arenas {
        &self.arenas
    }

    /// The number of profiles.
    pub fn profiles(&self) -> usize {
        self.arenas.high.len()
    }

    /// Queues the folding of new parameters into all averages, and the copying of the others, on the parameters' stream.
    ///
    /// # Errors
    /// [`Error::Cuda`] where tensors lie on another device, come with several streams, or are of other sizes: nothing is
    /// changed then; and where the driver refuses the launch.
    pub fn update(
        &mut self,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
        weights: &[f32],
    ) -> Result<()> {
        let Some((number, stream)) = common(averaged.iter().map(|(_, memory)| memory).chain(copied))? else {
            return Ok(());
        };
        let device = self.device().clone();
        device.check_is(number)?;
        self.check(averaged, copied, weights)?;
        let _bound = device.bind()?;
        let borrowed = device.borrow_stream(stream);
        // Also where the number is that of the last update: one number may stand for several streams, one after the
        // other or, the default stream of each thread, at the same time.
        borrowed.wait(&self.updated).map_err(device.driver_error("order two streams"))?;
        self.tabulate(&borrowed, averaged, copied)?;
        for (group, weights) in weights.chunks(PROFILES).enumerate() {
            let launched = self.launch(&borrowed, group * PROFILES, weights);
            self.torn |= launched.is_err() && group > 0;
            launched?;
        }
        let marked = self.mark(&borrowed);
        self.torn |= marked.is_err();
        marked
    }

    /// Checks that the tensors are as long as their places.
    fn check(&self, averaged: &[(Dtype, CudaMemory<'_>)], copied: &[CudaMemory<'_>], weights: &[f32]) -> Result<()> {
        let arenas = &self.arenas;
        let fits = |(i, (dtype, memory)): (usize, &(Dtype, CudaMemory<'_>))| {
            memory.bytes == arenas.layout.place(i).len() * dtype.bitsize() / 8
        };
        let counts = averaged.len() == arenas.layout.len() && copied.len() == arenas.places.len();
        let averaged = averaged.iter().enumerate().take(arenas.layout.len()).all(fits);
        let copied = copied.iter().zip(&arenas.places).all(|(memory, place)| memory.bytes == place.len());
        if !(counts && averaged && copied && weights.len() == self.profiles()) {
            return Err(self.unusable("update the averages", "the tensors are not those that they were made for"));
        }
        self.check_whole("update the averages")
    }

    fn check_whole(&self, action: &str) -> Result<()> {
        if self.torn {
            return Err(self.unusable(action, "an update was lost in part: start again and resume the run"));
        }
        Ok(())
    }

    fn unusable(&self, action: &str, reason: &str) -> Error {
        Error::Cuda { device: self.device().number(), action: action.into(), reason: reason.into() }
    }

    /// Makes the table of chunks anew where the tensors lie elsewhere than at the last update.
    fn tabulate(
        &mut self,
        stream: &CudaStream,
        averaged: &[(Dtype, CudaMemory<'_>)],
        copied: &[CudaMemory<'_>],
    ) -> Result<()> {
        let lent = averaged.iter().map(|&(dtype, memory)| (memory.address, dtype));
        let lent = lent.chain(copied.iter().map(|memory| (memory.address, Dtype::U8)));
        if lent.clone().eq(self.lent.iter().copied()) {
            return Ok(());
        }
        let lent: Vec<(u64, Dtype)> = lent.collect();
        let most = chunk_size(&self.arenas.device, self.arenas.layout.total());
        let mut chunks = Vec::new();
        for (i, (dtype, memory)) in averaged.iter().enumerate() {
            let place = self.arenas.layout.place(i);
            let (elements, offset) = (place.len(), place.start as u64);
            let tensor = Chunk64 { address: memory.address, offset, elements, kind: kind(*dtype) };
            cut(&mut chunks, tensor, dtype.bitsize() / 8, 1, most);
        }
        for (memory, place) in copied.iter().zip(&self.arenas.places) {
            let (elements, offset) = (place.len(), place.start as u64);
            cut(&mut chunks, Chunk64 { address: memory.address, offset, elements, kind: KIND_BYTES }, 1, 1, most * 4);
        }
        self.lent.clear();
        self.table.set(stream, chunks)?;
        self.lent = lent;
        Ok(())
    }

    fn launch(&self, stream: &CudaStream, first: usize, weights: &[f32]) -> Result<()> {
        let arenas = &self.arenas;
        let mut args =
            UpdateArgs { chunks: self.table.address(), copies: arenas.copies.address(), ..Default::default() };
        for (i, &weight) in weights.iter().enumerate() {
            args.weights[i] = weight;
            args.high[i] = arenas.high[first + i].address();
            args.low[i] = arenas.low.get(first + i).map_or(0, Buffer::address);
        }
        let compensated = !arenas.low.is_empty();
        // SAFETY: arenas and table are ours and live longer than the stream's work on them: freeing them waits. The
        // parameters are lent for the stream's order.
        unsafe { arenas.device.kernels.update(stream, &args, weights.len(), compensated, self.table.len()) }
            .map_err(arenas.device.driver_error("launch the update"))
    }

    fn mark(&self, stream: &CudaStream) -> Result<()> {
        let _bound = self.device().bind()?;
        self.updated.record(stream).map_err(self.device().driver_error("record an event"))
    }

    /// Waits until all updates have run.
    ///
    /// # Errors
    /// [`Error::Cuda`] where one of them failed.
    pub fn wait(&self) -> Result<()> {
        let _bound = self.device().bind()?;
        self.updated.synchronize().map_err(self.device().driver_error("finish the update"))
    }

    /// What reads the averages as the newest update leaves them, from any thread. The next update waits until it is done:
    /// that is the caller's to see to.
    ///
    /// # Errors
    /// [`Error::Cuda`] where the driver refuses a stream.
    pub fn reader(&self) -> Result<Reader> {
        let reader = Reader::new(self.arenas.clone(), self.device().stream()?);
        self.follow(&reader)?;
        Ok(reader)
    }

    /// Has a reader of these averages read them as the newest update leaves them.
    ///
    /// # Errors
    /// [`Error::Cuda`] where an update was lost in part, or the driver refuses.
    pub fn follow(&self, reader: &Reader) -> Result<()> {
        self.check_whole("read the averages")?;
        reader.wait_for(&self.updated)
    }

    /// The place of an averaged tensor of one profile on the device.
    pub fn place(&self, profile: usize, tensor: usize) -> super::Input<'_> {
        let place = self.arenas.layout.place(tensor);
        super::Input::Device {
            address: self.arenas.high[profile].address() + 4 * place.start as u64,
            bytes: 4 * place.len(),
        }
    }
}
