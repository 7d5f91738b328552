//! The blend of snapshots that lie on the device, against the CPU's bits.

use std::ops::Range;
use std::sync::Arc;

use safetensors::Dtype;

use super::super::cases::{Blend, Sizes, word};
use super::super::session::{Row, Session, Task};
use super::copy::{Copy, Lanes};
use super::{pieces, windows};
use posthoc_ema::compute::cpu;
use posthoc_ema::compute::cuda::{Buffer, Device, Sums, TimedStream};
use posthoc_ema::{Error, Result};

const COPY: &str = "copy within the device, beside the blends";

/// Words after which the snapshots repeat: a prime, so that snapshots of usual sizes begin at different ones.
const WORDS: usize = 1_048_573;

/// Sources and results begin at multiples of this.
const ALIGNMENT: usize = 16;

/// Windows of an answer that are looked at: the CPU takes its time for each.
const WINDOWS: usize = 32;

/// Times all cases.
pub(super) fn measure(device: &Arc<Device>, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let mut state = State::new(device, sizes)?;
    let bytes = state.snapshots.len().min(state.results.len());
    let mut tasks: Vec<Box<dyn Task<State>>> = vec![Box::new(Copy { name: COPY, bytes })];
    tasks.extend(Blend::all(sizes).into_iter().map(|case| Box::new(Case(case)) as _));
    session.measure("blend", &mut state, &tasks)
}

/// The bytes that are held.
pub(super) fn bytes(sizes: &Sizes) -> u128 {
    let each = (size_of::<f32>() * sizes.parameters).next_multiple_of(ALIGNMENT) as u128;
    let sums = Sums::bytes(sizes.snapshots, sizes.targets, sizes.parameters) as u128;
    each * (sizes.snapshots as u128 + sizes.targets as u128) + sums
}

struct State {
    trial: TimedStream,
    snapshots: Buffer,
    results: Buffer,
    sums: Sums,
    pattern: Vec<u8>,
}

impl State {
    fn new(device: &Arc<Device>, sizes: &Sizes) -> Result<State> {
        let Sizes { parameters, snapshots, targets, .. } = *sizes;
        let each = (size_of::<f32>() * parameters).next_multiple_of(ALIGNMENT);
        let trial = TimedStream::new(device)?;
        let mut all = Buffer::new(device, each * snapshots, "snapshots")?;
        let pattern: Vec<u8> = (0..WORDS).flat_map(|i| word(i).to_le_bytes()).collect();
        trial.repeat(&mut all, &pattern)?;
        Ok(State {
            trial,
            snapshots: all,
            results: Buffer::new(device, each * targets, "results")?,
            sums: Sums::new(device, snapshots, targets, parameters)?,
            pattern,
        })
    }
}

impl Lanes for State {
    fn lanes(&mut self) -> (&TimedStream, &mut Buffer, &Buffer) {
        (&self.trial, &mut self.results, &self.snapshots)
    }

    fn pattern(&self) -> &[u8] {
        &self.pattern
    }
}

struct Case(Blend);

impl Case {
    fn dtypes(&self) -> Vec<Dtype> {
        vec![self.0.dtype; self.0.sources]
    }

    /// The distance from one source, or result, to the next.
    fn pitch(&self) -> usize {
        self.0.result_bytes().next_multiple_of(ALIGNMENT)
    }

    /// What the CPU makes of a window of elements.
    fn expected(&self, pattern: &[u8], window: Range<usize>) -> Result<Vec<Vec<u8>>> {
        let (size, weights, dtypes) = (self.0.dtype.bitsize() / 8, self.0.weights(), self.dtypes());
        let place = |k: usize| k * self.pitch() + size * window.start..k * self.pitch() + size * window.end;
        let source = |k| pieces(pattern, place(k)).flatten().copied().collect();
        let sources: Vec<Vec<u8>> = (0..self.0.sources).map(source).collect();
        let sources: Vec<&[u8]> = sources.iter().map(Vec::as_slice).collect();
        let mut results = vec![vec![0; size * window.len()]; self.0.targets];
        let mut dst: Vec<&mut [u8]> = results.iter_mut().map(Vec::as_mut_slice).collect();
        let blend = cpu::Blend { dtypes: &dtypes, weights: &weights, output: self.0.dtype };
        cpu::blend(&mut dst, &sources, &blend).map_err(|unfit| self.wrong(format!("a sum is {}", unfit.value)))?;
        Ok(results)
    }

    /// Where answers are compared.
    fn windows(&self) -> Vec<Range<usize>> {
        let all = windows(self.0.parameters);
        let mut some: Vec<Range<usize>> = all.iter().step_by(all.len().div_ceil(WINDOWS)).cloned().collect();
        some.extend(all.last().cloned());
        some.dedup();
        some
    }

    fn compare(&self, state: &State) -> Result<()> {
        let size = self.0.dtype.bitsize() / 8;
        for window in self.windows() {
            let expected = self.expected(&state.pattern, window.clone())?;
            for (target, expected) in expected.iter().enumerate() {
                let start = target * self.pitch();
                let range = start + size * window.start..start + size * window.end;
                let got = state.trial.part(&state.results, range)?;
                if let Some(i) = got.chunks(size).zip(expected.chunks(size)).position(|(got, bits)| got != bits) {
                    let (got, expected) = (&got[size * i..][..size], &expected[size * i..][..size]);
                    let element = window.start + i;
                    let reason = format!("target {target}, element {element} is {got:x?}, not {expected:x?}");
                    return Err(self.wrong(reason));
                }
            }
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Wrong { what: format!("cuda, blend, {}", self.row().name), reason }
    }
}

impl Task<State> for Case {
    fn row(&self) -> Row {
        self.0.row(COPY.into())
    }

    fn check(&self, state: &mut State) -> Result<()> {
        state.trial.poison(&mut state.results)?;
        self.seconds(state)?;
        self.compare(state)
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let State { trial, snapshots, results, sums, .. } = state;
        let (dtypes, weights) = (self.dtypes(), self.0.weights());
        trial.seconds(&mut || trial.blend(results, snapshots, sums, &dtypes, self.0.parameters, &weights))
    }
}
