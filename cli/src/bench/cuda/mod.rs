//! Measurements of a CUDA device.
//!
//! The limit of the device is its own copy within its memory, of which bytes read and bytes written both count. Work on
//! the device is timed by the device's clock. If the host takes part, the host's clock is used.

mod blend;
mod bus;
mod copy;
mod update;

use std::ops::Range;
use std::sync::Arc;

use posthoc_ema::compute::cuda::CudaDevice;
use posthoc_ema::{Device, Result};

use super::cases::Sizes;
use super::device::BenchDevice;
use super::session::Session;

/// A CUDA device.
pub(super) struct Cuda(pub Arc<CudaDevice>);

/// Default number of parameters: hundreds of megabytes in every stream, beside caches of tens.
const PARAMETERS: usize = 200_000_000;

impl BenchDevice for Cuda {
    fn name(&self) -> String {
        Device::Cuda(self.0.number()).to_string()
    }

    fn model(&self) -> String {
        self.0.description()
    }

    fn default_parameters(&self, sizes: &Sizes) -> Result<usize> {
        let (free, _) = self.0.memory()?;
        let each = peak_bytes(&Sizes { parameters: PARAMETERS, ..*sizes }).div_ceil(PARAMETERS as u128);
        // A tenth stays free.
        let fit = free as u128 * 9 / 10 / each;
        Ok(PARAMETERS.min(fit as usize).max(sizes.tensors))
    }

    fn run(&self, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
        let (free, _) = self.0.memory()?;
        sizes.check_memory(peak_bytes(sizes), free as u128, &format!("the memory of {}", self.name()))?;
        update::measure(&self.0, sizes, session)?;
        blend::measure(&self.0, sizes, session)?;
        bus::measure(&self.0, sizes, session)
    }
}

/// Returns the peak memory of the device in bytes.
fn peak_bytes(sizes: &Sizes) -> u128 {
    update::bytes(sizes).max(blend::bytes(sizes)).max(bus::bytes(sizes))
}

/// Elements of a compared window.
const WINDOW: usize = 1 << 16;

/// Most windows of an array.
const WINDOWS: usize = 512;

/// Returns the windows that are compared: all of a small array, and samples of a large one that include its end.
fn windows(elements: usize) -> Vec<Range<usize>> {
    let step = elements.div_ceil(WINDOWS).max(WINDOW);
    let end = |start: usize| elements.min(start + WINDOW);
    let mut windows: Vec<Range<usize>> = (0..elements).step_by(step).map(|start| start..end(start)).collect();
    let last = elements.saturating_sub(WINDOW)..elements;
    if windows.last().is_some_and(|window| window.end < elements) {
        windows.push(last);
    }
    windows
}

/// Returns the bytes of a range of an endless repetition of a pattern, in contiguous pieces.
fn pieces(pattern: &[u8], range: Range<usize>) -> impl Iterator<Item = &[u8]> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let from = at % pattern.len();
        let piece = &pattern[from..pattern.len().min(from + range.end - at)];
        at += piece.len();
        (!piece.is_empty()).then_some(piece)
    })
}

/// Returns the first byte that differs from an endless repetition of a pattern, from `start` on.
fn difference(bytes: &[u8], pattern: &[u8], start: usize) -> Option<usize> {
    let mut rest = bytes;
    for piece in pieces(pattern, start..start + bytes.len()) {
        let own = rest.split_off(..piece.len()).unwrap_or_default();
        if own != piece {
            let within = own.iter().zip(piece).position(|(a, b)| a != b)?;
            return Some(bytes.len() - rest.len() - piece.len() + within);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_reach_the_end() {
        assert!(windows(0).is_empty());
        assert!(matches!(&windows(7)[..], [only] if *only == (0..7)));
        let small = windows(3 * WINDOW + 5);
        assert!(small.windows(2).all(|pair| pair[0].end == pair[1].start));
        let large = windows(1_000_000_007);
        assert_eq!(large.last().unwrap().end, 1_000_000_007);
        assert!(large.len() <= WINDOWS + 1 && large.iter().all(|window| window.len() == WINDOW));
    }

    #[test]
    fn patterns_continue_across_pieces() {
        assert_eq!(pieces(&[1, 2, 3], 4..9).collect::<Vec<_>>(), [&[2, 3][..], &[1, 2, 3]]);
        assert_eq!(pieces(&[1, 2, 3], 4..4).count(), 0);
        assert_eq!(difference(&[2, 3, 1, 2, 3], &[1, 2, 3], 4), None);
        assert_eq!(difference(&[2, 3, 1, 2, 4], &[1, 2, 3], 4), Some(4));
        assert_eq!(difference(&[0], &[1, 2, 3], 300), Some(0));
    }
}
