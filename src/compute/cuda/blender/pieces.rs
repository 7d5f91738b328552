//! Blend of a block in pieces, on a device that has too little memory for a whole one.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::job::BlendJob;
use super::on_host::HOST_PIECE;
use super::{BlendPart, Blender};
use crate::compute::cpu::Overflow;
use crate::compute::cuda::device::format_bytes;
use crate::error::{Error, Result};
use crate::tensor::CudaMemory;

/// Fewest elements of a piece on the device. If not even these fit, the CPU blends.
const MIN_PIECE: usize = 1 << 9;

impl<'a> BlendPart<'a> {
    /// Returns a range of the elements.
    fn slice(&self, elements: Range<usize>) -> BlendPart<'a> {
        let slice = |(source, dtype): (&super::BlendInput<'a>, &safetensors::Dtype)| {
            let size = dtype.bitsize() / 8;
            source.slice(elements.start * size..elements.end * size)
        };
        let sources = self.sources.iter().zip(&self.dtypes).map(slice).collect();
        BlendPart { sources, dtypes: self.dtypes.clone(), output: self.output, elements: elements.len() }
    }
}

impl<'a> Blender<'a> {
    /// Chooses pieces of half a block, and says why.
    pub(super) fn warn_of_pieces(&mut self, job: &BlendJob<'_>, reason: &str) {
        let largest = job.parts.iter().map(|part| part.elements).max().unwrap_or(0);
        self.piece = Some((largest / 2).max(MIN_PIECE));
        tracing::warn!(
            "cuda:{}: too little memory for blocks of {}: the blend goes in smaller ones, which takes longer: {reason}",
            self.device.number(),
            format_bytes(job.input_bytes() + job.packed * job.targets),
        );
    }

    /// Blends a job piece by piece, each of which is awaited. A piece is halved until it fits.
    pub(super) fn blend_in_pieces(&mut self, job: BlendJob<'a>, to: &[CudaMemory<'_>]) -> Result<()> {
        let BlendJob { parts, weights, targets, deliver, on_overflow, .. } = job;
        self.slots.iter_mut().for_each(super::BlendSlot::release);
        let arrived = Rc::new(RefCell::new(vec![Vec::new(); targets]));
        for (i, part) in parts.iter().enumerate() {
            let size = part.output.bitsize() / 8;
            let mut start = 0;
            while start < part.elements {
                let most = if self.is_on_host { HOST_PIECE } else { self.piece.unwrap_or(MIN_PIECE) };
                let elements = start..part.elements.min(start + most);
                let place = to.get(i).map(|memory| CudaMemory {
                    address: memory.address + (start * size) as u64,
                    bytes: elements.len() * size,
                    ..*memory
                });
                let arrived = deliver.is_some().then(|| arrived.clone());
                match self.blend_piece(part.slice(elements.clone()), weights, targets, place, arrived) {
                    Err(Error::DeviceMemory { reason, .. }) => {
                        self.slots[0].release();
                        self.piece = Some((most / 2).max(MIN_PIECE));
                        if most <= MIN_PIECE {
                            self.warn_of_host(&reason);
                        }
                    }
                    Ok(None) => start = elements.end,
                    Ok(Some(overflow)) => {
                        return Err(on_overflow(i, Overflow { element: start + overflow.element, ..overflow }));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let Some(deliver) = deliver else { return Ok(()) };
        let arrived = arrived.take();
        deliver(&arrived.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    /// Chooses the CPU for the rest, and says why.
    fn warn_of_host(&mut self, reason: &str) {
        self.is_on_host = true;
        tracing::warn!(
            "cuda:{}: no memory for {MIN_PIECE} elements of a blend: the CPU blends, which takes longer: {reason}",
            self.device.number(),
        );
    }

    /// Blends one piece and waits. Returns an overflow, if there is one.
    fn blend_piece(
        &mut self,
        part: BlendPart<'a>,
        weights: &'a [f64],
        targets: usize,
        to: Option<CudaMemory<'_>>,
        arrived: Option<Rc<RefCell<Vec<Vec<u8>>>>>,
    ) -> Result<Option<Overflow>> {
        if self.is_on_host {
            return Ok(match self.blend_on_host(&part, weights, targets, to)? {
                Err(overflow) => Some(overflow),
                Ok(results) => {
                    if let Some(arrived) = arrived {
                        let mut arrived = arrived.borrow_mut();
                        arrived.iter_mut().zip(&results).for_each(|(all, piece)| all.extend_from_slice(piece));
                    }
                    None
                }
            });
        }
        let device = self.device.clone();
        let deliver = arrived.map(|arrived| -> super::Deliver<'a> {
            Box::new(move |results| {
                arrived.borrow_mut().iter_mut().zip(results).for_each(|(all, piece)| all.extend_from_slice(piece));
                Ok(())
            })
        });
        let found = Rc::new(Cell::new(None));
        let report = found.clone();
        let on_overflow: super::OverflowHandler<'a> = Box::new(move |_, overflow| {
            let value = overflow.value;
            report.set(Some(overflow));
            Error::Internal(format!("a sum is {value}"))
        });
        let job = BlendJob::new(vec![part], weights, targets, deliver, on_overflow);
        let slot = &mut self.slots[0];
        slot.prepare(&device, &job)?;
        slot.fill(&job, || Ok(()))?;
        slot.queue(&device, job, to.as_slice())?;
        let finished = slot.finish(&device);
        found.take().map_or(finished.map(|()| None), |overflow| Ok(Some(overflow)))
    }
}
