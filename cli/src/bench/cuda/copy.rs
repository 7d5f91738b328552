//! The limit of all work on a device: its own copy within its memory.

use posthoc_ema::compute::cuda::{Buffer, TimedStream};
use posthoc_ema::{Error, Result};

use super::super::session::{Task, TaskInfo};
use super::{difference, windows};

/// Memory of several tasks that a [`DeviceCopy`] uses.
pub(super) trait CopyMemory {
    /// Returns the stream, the destination and the source.
    fn copy_buffers(&mut self) -> (&TimedStream, &mut Buffer, &Buffer);

    /// Returns the pattern that fills the source repeatedly.
    fn pattern(&self) -> &[u8];
}

/// The limit that copies bytes within the device. Bytes read and bytes written both count.
pub(super) struct DeviceCopy {
    pub name: &'static str,
    pub bytes: usize,
}

impl<S: CopyMemory> Task<S> for DeviceCopy {
    fn info(&self) -> TaskInfo {
        TaskInfo::limit(self.name, 2 * self.bytes)
    }

    fn check(&self, state: &mut S) -> Result<()> {
        let (stream, to, from) = state.copy_buffers();
        assert_eq!(to.len().min(from.len()), self.bytes, "the rate counts the copied bytes");
        stream.poison(to)?;
        stream.copy(to, from)?;
        check_copy(state, self.name, self.bytes)
    }

    fn seconds(&self, state: &mut S) -> Result<f64> {
        let (stream, to, from) = state.copy_buffers();
        stream.seconds(&mut || stream.copy(to, from))
    }
}

/// Checks that the destination has the pattern.
pub(super) fn check_copy<S: CopyMemory>(state: &mut S, name: &str, bytes: usize) -> Result<()> {
    for window in windows(bytes) {
        let (stream, to, _) = state.copy_buffers();
        let got = stream.read_range(to, window.clone())?;
        check_pattern(&got, state.pattern(), window.start, name)?;
    }
    Ok(())
}

/// Checks that bytes are those of the pattern, from `start` on.
pub(super) fn check_pattern(bytes: &[u8], pattern: &[u8], start: usize, name: &str) -> Result<()> {
    let Some(at) = difference(bytes, pattern, start) else { return Ok(()) };
    let got = bytes[at];
    let expected = pattern[(start + at) % pattern.len()];
    let reason = format!("byte {} is {got:#x}, not {expected:#x}", start + at);
    Err(Error::Wrong { what: format!("cuda, {name}"), reason })
}
