//! The limit of everything on a device: its own copy from one part of its memory to another.

use super::super::session::{Row, Task};
use super::{difference, windows};
use posthoc_ema::compute::cuda::{Buffer, TimedStream};
use posthoc_ema::{Error, Result};

/// What a copy needs of the memory that several tasks share.
pub(super) trait Lanes {
    /// The stream, where to, and where from.
    fn lanes(&mut self) -> (&TimedStream, &mut Buffer, &Buffer);

    /// What the source is filled with, over and over.
    fn pattern(&self) -> &[u8];
}

/// The copy, by a name, of so many bytes: both the bytes read and the bytes written count.
pub(super) struct Copy {
    pub name: &'static str,
    pub bytes: usize,
}

impl<S: Lanes> Task<S> for Copy {
    fn row(&self) -> Row {
        Row::limit(self.name, 2 * self.bytes)
    }

    fn check(&self, state: &mut S) -> Result<()> {
        let (trial, to, from) = state.lanes();
        assert_eq!(to.len().min(from.len()), self.bytes, "the row says what is copied");
        trial.poison(to)?;
        trial.copy(to, from)?;
        compare(state, self.name, self.bytes)
    }

    fn seconds(&self, state: &mut S) -> Result<f64> {
        let (trial, to, from) = state.lanes();
        trial.seconds(&mut || trial.copy(to, from))
    }
}

/// Whether the destination has the pattern.
pub(super) fn compare<S: Lanes>(state: &mut S, name: &str, bytes: usize) -> Result<()> {
    for window in windows(bytes) {
        let (trial, to, _) = state.lanes();
        let got = trial.part(to, window.clone())?;
        same(&got, state.pattern(), window.start, name)?;
    }
    Ok(())
}

/// Whether bytes are those of the pattern, from `start` on.
pub(super) fn same(bytes: &[u8], pattern: &[u8], start: usize, name: &str) -> Result<()> {
    let Some(at) = difference(bytes, pattern, start) else { return Ok(()) };
    let (got, expected) = (bytes[at], pattern[(start + at) % pattern.len()]);
    let reason = format!("byte {} is {got:#x}, not {expected:#x}", start + at);
    Err(Error::Wrong { what: format!("cuda, {name}"), reason })
}
