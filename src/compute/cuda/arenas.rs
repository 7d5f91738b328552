//! Device memory of the running averages of all profiles, shared by updates and background reads.

use std::ops::Range;
use std::sync::Arc;

use super::{Buffer, CudaDevice};
use crate::compute::cpu::{Layout, Precision};
use crate::error::Result;

/// Arenas of all profiles, and the newest values of tensors that are copied.
#[derive(Debug)]
pub(super) struct Arenas {
    pub device: Arc<CudaDevice>,
    pub layout: Layout,
    /// F32 parts of each profile, in the order of the layout.
    pub high: Vec<Buffer>,
    /// Low-order terms of each profile in the same order, or empty if the averages are not compensated.
    pub low: Vec<Buffer>,
    /// Tensors that are copied, one after the other, each aligned to 16 bytes.
    pub copies: Buffer,
    /// Range of each copied tensor in `copies`.
    pub copy_ranges: Vec<Range<usize>>,
}

impl Arenas {
    /// Allocates arenas of undefined content, and room for copied tensors of these sizes in bytes.
    pub fn new(
        device: &Arc<CudaDevice>,
        layout: &Layout,
        profiles: usize,
        precision: Precision,
        copied: &[usize],
    ) -> Result<Arenas> {
        let arena = |size: usize| Buffer::new(device, layout.total() * size, "running averages");
        let high = (0..profiles).map(|_| arena(4)).collect::<Result<Vec<_>>>()?;
        let terms = if precision == Precision::Compensated { profiles } else { 0 };
        let low = (0..terms).map(|_| arena(2)).collect::<Result<Vec<_>>>()?;
        let mut copy_ranges = Vec::with_capacity(copied.len());
        let mut end = 0;
        for &bytes in copied {
            copy_ranges.push(end..end + bytes);
            end += bytes.next_multiple_of(16);
        }
        let copies = Buffer::new(device, end, "copied tensors")?;
        Ok(Arenas { device: device.clone(), layout: layout.clone(), high, low, copies, copy_ranges })
    }

    /// Returns the address of an element of the f32 part of a profile.
    pub fn address(&self, profile: usize, element: usize) -> u64 {
        self.high[profile].address() + 4 * element as u64
    }
}
