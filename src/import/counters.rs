//! Batch counters of norms, which tools round to floating point.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::Dtype;

use super::layout::ParsedCheckpoint;
use super::messages::join_names;
use crate::error::Result;
use crate::pytorch::{self, Checkpoint, Number};
use crate::tensor::is_averaged;

/// Last part of the name of a batch counter.
const COUNTER: &str = "num_batches_tracked";

/// Batch counters that were found in the checkpoints.
#[derive(Default)]
pub(super) struct BatchCounters {
    /// True for each counter that was a whole number, or beyond the dtype, in every checkpoint so far.
    whole: BTreeMap<String, bool>,
    /// Counters beyond the dtype in some checkpoint.
    overflown: BTreeSet<String>,
}

impl BatchCounters {
    /// Reads the counters of a checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub(super) fn add(&mut self, checkpoint: &Checkpoint, parsed: &ParsedCheckpoint) -> Result<()> {
        for (name, key) in parsed.keys.iter().filter(|(name, _)| name.rsplit('.').next() == Some(COUNTER)) {
            let spec = checkpoint.spec(key)?;
            if !spec.shape.is_empty() || !is_averaged(spec.dtype) {
                continue;
            }
            let count = Count::parse(&checkpoint.read(key)?, spec.dtype);
            *self.whole.entry(name.clone()).or_insert(true) &= count.is_some();
            if count == Some(Count::Overflown) {
                self.overflown.insert(name.clone());
            }
        }
        Ok(())
    }

    /// Returns the names of counters that become whole numbers again.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.whole.iter().filter(|(_, whole)| **whole).map(|(name, _)| name.clone()).collect()
    }

    /// Returns the warning about counts beyond the dtype, if there are any.
    pub(super) fn warning(&self) -> Option<String> {
        let overflown: Vec<&str> = self.overflown.iter().filter(|name| self.whole[*name]).map(String::as_str).collect();
        if overflown.is_empty() {
            return None;
        }
        let names = join_names(&overflown);
        Some(format!("{names} infinite where the count is beyond the dtype: the step of the last update replaces it"))
    }
}

/// Count as a tool stored it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Count {
    Known(i64),
    /// Infinite, as the dtype cannot hold it.
    Overflown,
}

impl Count {
    /// Parses a tensor of one element; `None` if it is not a whole number.
    pub(super) fn parse(bytes: &[u8], dtype: Dtype) -> Option<Count> {
        match pytorch::number(dtype, bytes)? {
            Number::Whole(value) => Some(Count::Known(value)),
            Number::Rounded(f64::INFINITY, _) => Some(Count::Overflown),
            Number::Rounded(value, _) => {
                let whole = value >= 0.0 && value < 2f64.powi(63) && value.fract() == 0.0;
                whole.then_some(Count::Known(value as i64))
            }
        }
    }
}
