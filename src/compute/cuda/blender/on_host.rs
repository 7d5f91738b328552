//! Blend of a piece on the CPU, for a device without any memory for it.
//!
//! Sources on the device are copied to the host, and results for it are copied there. Neither needs memory of the
//! device.

use std::borrow::Cow;

use cudarc::driver::{CudaStream, result};
use rayon::prelude::*;
use safetensors::Dtype;

use super::{BlendInput, BlendPart, Blender, CudaDevice};
use crate::compute::cpu::{self, Blend, CHUNK, Overflow};
use crate::error::Result;
use crate::tensor::CudaMemory;

/// Elements of a piece.
pub(super) const HOST_PIECE: usize = 16 * CHUNK;

impl Blender<'_> {
    /// Blends one piece on the CPU, with the bits of the device. Returns the results of each target, or an overflow.
    ///
    /// If `to` is the memory of the only target, the results are copied there.
    pub(super) fn blend_on_host(
        &self,
        part: &BlendPart<'_>,
        weights: &[f64],
        targets: usize,
        to: Option<CudaMemory<'_>>,
    ) -> Result<std::result::Result<Vec<Vec<u8>>, Overflow>> {
        let _bound = self.device.bind()?;
        let stream = &self.slots[0].stream;
        let bytes = part.sources.iter().map(|source| bytes_of(&self.device, stream, *source));
        let sources = bytes.collect::<Result<Vec<_>>>()?;
        let size = part.output.bitsize() / 8;
        let mut results = vec![vec![0u8; part.elements * size]; targets];
        if let Err(overflow) = blend_chunks(&mut results, &sources, &part.dtypes, weights, part.output) {
            return Ok(Err(overflow));
        }
        if let (Some(memory), Some(result)) = (to, results.first().filter(|result| !result.is_empty())) {
            let owner = self.device.borrow_stream(memory.stream)?;
            // SAFETY: the memory is lent for writing and as long as the result, which has been read when the call
            // returns because it is pageable.
            unsafe { result::memcpy_htod_async(memory.address, result, owner.cu_stream()) }
                .map_err(self.device.driver_error("copy to the device"))?;
        }
        Ok(Ok(results))
    }
}

/// Returns the bytes of a source, copied to the host unless they are there in one piece.
fn bytes_of<'a>(device: &CudaDevice, stream: &CudaStream, source: BlendInput<'a>) -> Result<Cow<'a, [u8]>> {
    match source {
        BlendInput::Host(bytes) => Ok(bytes.into()),
        BlendInput::Scattered { elements, start, bytes } => {
            let mut copy = vec![0; bytes];
            elements.copy(&mut copy, start);
            Ok(copy.into())
        }
        BlendInput::Device { address, bytes } => {
            let mut copy = vec![0; bytes];
            if bytes > 0 {
                // Not by the synchronous call, which uses the default stream: it breaks captures of blocking streams.
                // SAFETY: the source's owner keeps that many bytes allocated, and no pending work writes them.
                unsafe { result::memcpy_dtoh_async(&mut copy, address, stream.cu_stream()) }
                    .and_then(|()| stream.synchronize())
                    .map_err(device.driver_error("copy to the host"))?;
            }
            Ok(copy.into())
        }
    }
}

/// Blends all elements with all threads. Returns the first overflow, if there is one.
fn blend_chunks(
    results: &mut [Vec<u8>],
    sources: &[Cow<'_, [u8]>],
    dtypes: &[Dtype],
    weights: &[f64],
    output: Dtype,
) -> std::result::Result<(), Overflow> {
    let mut chunks: Vec<Vec<&mut [u8]>> = Vec::new();
    for result in results {
        for (i, chunk) in result.chunks_mut(CHUNK * (output.bitsize() / 8)).enumerate() {
            if i == chunks.len() {
                chunks.push(Vec::new());
            }
            chunks[i].push(chunk);
        }
    }
    let blend = Blend { dtypes, weights, output };
    let blended = chunks.into_par_iter().enumerate().map(|(i, mut dst)| {
        let cut = |(source, dtype): (&'_ Cow<'_, [u8]>, &Dtype)| {
            let size = dtype.bitsize() / 8;
            let end = source.len().min((i + 1) * CHUNK * size);
            i * CHUNK * size..end
        };
        let sources: Vec<&[u8]> = sources.iter().zip(dtypes).map(|pair| &pair.0[cut(pair)]).collect();
        let outcome = cpu::blend(&mut dst, &sources, &blend);
        outcome.map_err(|overflow| Overflow { element: i * CHUNK + overflow.element, ..overflow })
    });
    blended.collect::<Vec<_>>().into_iter().collect()
}
