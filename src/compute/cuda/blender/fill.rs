//! Copies the inputs of a block that are on the host into pinned memory, and lists their places there.

use std::ops::Range;

use rayon::prelude::*;

use super::job::{ALIGNMENT, LaunchGroup, for_each_input};
use super::{BlendInput, BlendPart};

/// Bytes per task.
pub(super) const PIECE: usize = 1 << 20;

/// Copies the inputs on the host to their places in `to`, with all threads.
pub(super) fn fill(groups: &[LaunchGroup], parts: &[BlendPart<'_>], to: &mut [u8]) {
    let mut rest = to;
    let mut end = 0;
    let mut pieces = Vec::new();
    for_each_input(groups, parts, |_, at, input| {
        if matches!(input, BlendInput::Device { .. }) {
            return;
        }
        let (_, tail) = std::mem::take(&mut rest).split_at_mut(at - end);
        let (place, tail) = tail.split_at_mut(input.len());
        rest = tail;
        end = at + input.len();
        for (i, to) in place.chunks_mut(PIECE).enumerate() {
            pieces.push((input.slice(i * PIECE..i * PIECE + to.len()), to));
        }
    });
    let copy = |(from, to): (BlendInput<'_>, &mut [u8])| match from {
        BlendInput::Host(bytes) => to.copy_from_slice(bytes),
        BlendInput::Scattered { elements, start, .. } => elements.copy(to, start),
        BlendInput::Device { .. } => {}
    };
    if end < PIECE { pieces.into_iter().for_each(copy) } else { pieces.into_par_iter().for_each(copy) }
}

/// Returns the ranges of the inputs on the host. Those that only an alignment separates are one range.
pub(super) fn host_ranges(groups: &[LaunchGroup], parts: &[BlendPart<'_>]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for_each_input(groups, parts, |_, at, input| {
        if matches!(input, BlendInput::Device { .. }) || input.is_empty() {
            return;
        }
        match ranges.last_mut() {
            Some(last) if at < last.end + ALIGNMENT => last.end = at + input.len(),
            _ => ranges.push(at..at + input.len()),
        }
    });
    ranges
}
