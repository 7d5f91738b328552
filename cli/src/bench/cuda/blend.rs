//! Blends of snapshots in device memory, compared with the bits of the CPU.

use std::ops::Range;
use std::sync::Arc;

use posthoc_ema::compute::cpu;
use posthoc_ema::compute::cuda::{BlendWorkspace, Buffer, CudaDevice, TimedStream};
use posthoc_ema::{Error, Result};
use safetensors::Dtype;

use super::super::cases::{BlendCase, Sizes, word};
use super::super::session::{Session, Task, TaskInfo};
use super::copy::{CopyMemory, DeviceCopy};
use super::{pieces, windows};

/// Name of the limit of the blends.
const COPY: &str = "copy within the device, beside the blends";

/// Period of the snapshots in words: a prime, so that snapshots of usual sizes begin at different words.
const WORDS: usize = 1_048_573;

/// Alignment of sources and results in bytes.
const ALIGNMENT: usize = 16;

/// Compared windows of an answer: few, since the CPU is slow.
const WINDOWS: usize = 32;

/// Times all cases.
pub(super) fn measure(device: &Arc<CudaDevice>, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let mut state = DeviceSnapshots::new(device, sizes)?;
    let bytes = state.snapshots.len().min(state.results.len());
    let mut tasks: Vec<Box<dyn Task<DeviceSnapshots>>> = vec![Box::new(DeviceCopy { name: COPY, bytes })];
    for case in BlendCase::all(sizes) {
        tasks.push(Box::new(DeviceBlend(case)));
    }
    session.measure("blend", &mut state, &tasks)
}

/// Returns the device memory in bytes.
pub(super) fn bytes(sizes: &Sizes) -> u128 {
    let each = (size_of::<f32>() * sizes.parameters).next_multiple_of(ALIGNMENT) as u128;
    let sums = BlendWorkspace::bytes(sizes.snapshots, sizes.targets, sizes.parameters) as u128;
    each * (sizes.snapshots as u128 + sizes.targets as u128) + sums
}

/// Snapshots and results on the device.
struct DeviceSnapshots {
    stream: TimedStream,
    snapshots: Buffer,
    results: Buffer,
    sums: BlendWorkspace,
    pattern: Vec<u8>,
}

impl DeviceSnapshots {
    fn new(device: &Arc<CudaDevice>, sizes: &Sizes) -> Result<DeviceSnapshots> {
        let Sizes { parameters, snapshots, targets, .. } = *sizes;
        let each = (size_of::<f32>() * parameters).next_multiple_of(ALIGNMENT);
        let stream = TimedStream::new(device)?;
        let mut all = Buffer::new(device, each * snapshots, "snapshots")?;
        let pattern: Vec<u8> = (0..WORDS).flat_map(|i| word(i).to_le_bytes()).collect();
        stream.repeat(&mut all, &pattern)?;
        Ok(DeviceSnapshots {
            stream,
            snapshots: all,
            results: Buffer::new(device, each * targets, "results")?,
            sums: BlendWorkspace::new(device, snapshots, targets, parameters)?,
            pattern,
        })
    }
}

impl CopyMemory for DeviceSnapshots {
    fn copy_buffers(&mut self) -> (&TimedStream, &mut Buffer, &Buffer) {
        (&self.stream, &mut self.results, &self.snapshots)
    }

    fn pattern(&self) -> &[u8] {
        &self.pattern
    }
}

/// A blend on the device.
struct DeviceBlend(BlendCase);

impl DeviceBlend {
    fn dtypes(&self) -> Vec<Dtype> {
        vec![self.0.dtype; self.0.sources]
    }

    /// Returns the distance from one source, or result, to the next in bytes.
    fn pitch(&self) -> usize {
        self.0.result_bytes().next_multiple_of(ALIGNMENT)
    }

    /// Blends a window of elements on the CPU.
    fn expected(&self, pattern: &[u8], window: Range<usize>) -> Result<Vec<Vec<u8>>> {
        let size = self.0.dtype.bitsize() / 8;
        let weights = self.0.weights();
        let dtypes = self.dtypes();
        let mut sources: Vec<Vec<u8>> = Vec::new();
        for source in 0..self.0.sources {
            let start = source * self.pitch();
            let range = start + size * window.start..start + size * window.end;
            sources.push(pieces(pattern, range).flatten().copied().collect());
        }
        let sources: Vec<&[u8]> = sources.iter().map(Vec::as_slice).collect();
        let mut results = vec![vec![0; size * window.len()]; self.0.targets];
        let mut dst: Vec<&mut [u8]> = results.iter_mut().map(Vec::as_mut_slice).collect();
        let blend = cpu::Blend { dtypes: &dtypes, weights: &weights, output: self.0.dtype };
        cpu::blend(&mut dst, &sources, &blend)
            .map_err(|overflow| self.wrong(format!("a sum is {}", overflow.value)))?;
        Ok(results)
    }

    /// Returns the windows that are compared.
    fn windows(&self) -> Vec<Range<usize>> {
        let all = windows(self.0.parameters);
        let mut some: Vec<Range<usize>> = all.iter().step_by(all.len().div_ceil(WINDOWS)).cloned().collect();
        some.extend(all.last().cloned());
        some.dedup();
        some
    }

    fn compare(&self, state: &DeviceSnapshots) -> Result<()> {
        let size = self.0.dtype.bitsize() / 8;
        for window in self.windows() {
            let expected = self.expected(&state.pattern, window.clone())?;
            for (target, expected) in expected.iter().enumerate() {
                let start = target * self.pitch();
                let range = start + size * window.start..start + size * window.end;
                let got = state.stream.read_range(&state.results, range)?;
                if let Some(i) = got.chunks(size).zip(expected.chunks(size)).position(|(got, bits)| got != bits) {
                    let got = &got[size * i..][..size];
                    let expected = &expected[size * i..][..size];
                    let element = window.start + i;
                    let reason = format!("target {target}, element {element} is {got:x?}, not {expected:x?}");
                    return Err(self.wrong(reason));
                }
            }
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Wrong { what: format!("cuda, blend, {}", self.info().name), reason }
    }
}

impl Task<DeviceSnapshots> for DeviceBlend {
    fn info(&self) -> TaskInfo {
        self.0.info(COPY.into())
    }

    fn check(&self, state: &mut DeviceSnapshots) -> Result<()> {
        state.stream.poison(&mut state.results)?;
        self.seconds(state)?;
        self.compare(state)
    }

    fn seconds(&self, state: &mut DeviceSnapshots) -> Result<f64> {
        let DeviceSnapshots { stream, snapshots, results, sums, .. } = state;
        let dtypes = self.dtypes();
        let weights = self.0.weights();
        stream.seconds(&mut || stream.blend(results, snapshots, sums, &dtypes, self.0.parameters, &weights))
    }
}
