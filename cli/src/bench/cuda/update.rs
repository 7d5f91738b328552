//! Updates of averages on a device, compared with the bits of the CPU.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use posthoc_ema::compute::cpu::{Averages, Incoming, Layout, Precision, UpdateWeights, update};
use posthoc_ema::compute::cuda::{Buffer, CudaDevice, DeviceAverages, TimedStream};
use posthoc_ema::{CudaMemory, Error, Result};
use safetensors::Dtype;

use super::super::PROFILES;
use super::super::cases::{PERIOD, Sizes, UpdateCase, WEIGHTS, parameter, split, tensor_counts};
use super::super::session::{Session, Task, TaskInfo};
use super::copy::{CopyMemory, DeviceCopy};
use super::windows;

/// Name of the limit of the updates.
const COPY: &str = "copy within the device";

/// Alignment of tensors in elements, at least 256 bytes as in frameworks.
const ALIGNMENT: usize = 128;

/// Repetitions of the parameters that the host writes. The device makes the others.
const REPETITIONS: usize = 1 << 12;

/// Times all cases.
pub(super) fn measure(device: &Arc<CudaDevice>, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let mut state = DeviceModel::new(device, sizes)?;
    let mut tasks: Vec<Box<dyn Task<DeviceModel>>> = vec![Box::new(DeviceCopy { name: COPY, bytes: state.f32s.len() })];
    for case in UpdateCase::all(sizes) {
        // Compensated averages are the default, and so is the look.
        if case.precision == Precision::Compensated {
            tasks.push(Box::new(DeviceUpdate::new(case.clone(), true)));
        }
        tasks.push(Box::new(DeviceUpdate::new(case, false)));
    }
    session.measure("update", &mut state, &tasks)
}

/// Returns the device memory in bytes: parameters in both dtypes, the destination of the copy, and averages of every
/// kind.
pub(super) fn bytes(sizes: &Sizes) -> u128 {
    let of_averages = PROFILES * (size_of::<f32>() + size_of::<f32>() + size_of::<bf16>());
    let counts = tensor_counts(sizes);
    let padding = ALIGNMENT as u128 * counts.iter().copied().max().unwrap_or(0) as u128;
    let parameters = 2 * size_of::<f32>() + size_of::<bf16>();
    (parameters + of_averages * counts.len()) as u128 * (sizes.parameters as u128 + padding)
}

/// Returns the first element of each tensor in the parameters, and the end of the last.
fn places(elements: &[usize]) -> (Vec<usize>, usize) {
    let mut places = Vec::new();
    let mut end = 0;
    for n in elements {
        places.push(end);
        end += n.next_multiple_of(ALIGNMENT);
    }
    (places, end)
}

/// The model in both dtypes and averages of every kind on the device.
struct DeviceModel {
    stream: TimedStream,
    f32s: Buffer,
    bf16s: Buffer,
    /// Destination of the copy.
    copy: Buffer,
    pattern: Vec<u8>,
    averages: Vec<(usize, Precision, DeviceAverages)>,
}

impl DeviceModel {
    fn new(device: &Arc<CudaDevice>, sizes: &Sizes) -> Result<DeviceModel> {
        let ends = tensor_counts(sizes).into_iter().map(|tensors| places(&split(sizes.parameters, tensors)).1);
        let elements = ends.max().unwrap_or(0);
        let buffer = |size: usize| Buffer::new(device, size * elements, "parameters");
        let stream = TimedStream::new(device)?;
        let mut f32s = buffer(4)?;
        let mut bf16s = buffer(2)?;
        let copy = buffer(4)?;
        let values = || (0..PERIOD * REPETITIONS).map(parameter);
        let pattern: Vec<u8> = values().flat_map(f32::to_le_bytes).collect();
        stream.repeat(&mut f32s, &pattern)?;
        let halves: Vec<u8> = values().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        stream.repeat(&mut bf16s, &halves)?;
        let mut averages = Vec::new();
        for tensors in tensor_counts(sizes) {
            let layout = Layout::new(split(sizes.parameters, tensors));
            for precision in [Precision::Plain, Precision::Compensated] {
                let zeros = DeviceAverages::zeros(device, &layout, PROFILES, precision, &[])?;
                averages.push((tensors, precision, zeros));
            }
        }
        Ok(DeviceModel { stream, f32s, bf16s, copy, pattern, averages })
    }
}

impl CopyMemory for DeviceModel {
    fn copy_buffers(&mut self) -> (&TimedStream, &mut Buffer, &Buffer) {
        (&self.stream, &mut self.copy, &self.f32s)
    }

    fn pattern(&self) -> &[u8] {
        &self.pattern
    }
}

/// An update on the device.
struct DeviceUpdate {
    case: UpdateCase,
    /// True if it looks for NaN in the parameters first.
    looks: bool,
    /// First element of each tensor in the parameters.
    places: Vec<usize>,
}

impl DeviceUpdate {
    fn new(case: UpdateCase, looks: bool) -> DeviceUpdate {
        DeviceUpdate { places: places(&case.elements).0, looks, case }
    }

    /// Returns the stream, the averages of the case's kind, and the parameters.
    fn inputs<'s>(&self, state: &'s mut DeviceModel) -> Result<UpdateInputs<'s>> {
        let DeviceModel { stream, f32s, bf16s, averages, .. } = state;
        let dtype = self.case.dtype;
        let size = dtype.bitsize() / 8;
        let stream: &TimedStream = stream;
        let buffer: &Buffer = if dtype == Dtype::F32 { f32s } else { bf16s };
        let kind = (self.case.elements.len(), self.case.precision);
        let found = averages.iter_mut().find(|(tensors, precision, _)| (*tensors, *precision) == kind);
        let Some((_, _, averages)) = found else { return Err(self.wrong("no averages were made for it".into())) };
        let mut tensors = Vec::new();
        for (start, n) in self.places.iter().zip(&self.case.elements) {
            tensors.push((dtype, stream.lend(buffer, size * start..size * (start + n))));
        }
        Ok(UpdateInputs { stream, averages, tensors })
    }

    fn update(&self, averages: &mut DeviceAverages, tensors: &[(Dtype, CudaMemory<'_>)]) -> Result<()> {
        match self.looks {
            true => averages.update_if_finite(tensors, &[], UpdateWeights::at(1, &WEIGHTS)),
            false => averages.update(tensors, &[], UpdateWeights::at(1, &WEIGHTS)),
        }
    }

    /// Updates zeros twice on the CPU, with one period of the parameters.
    fn expected(&self) -> Vec<Averages> {
        let values = (0..PERIOD).map(parameter);
        let bytes: Vec<u8> = match self.case.dtype {
            Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        };
        let layout = Layout::new([PERIOD]);
        let mut averages = vec![Averages::zeros(&layout, self.case.precision); PROFILES];
        let incoming = [Incoming { dtype: self.case.dtype, bytes: &bytes }];
        (0..2).for_each(|_| update(&mut averages, &incoming, &layout, UpdateWeights::at(1, &WEIGHTS)));
        averages
    }

    /// Compares a stretch of the averages of one profile, tensor by tensor.
    fn compare(&self, layout: &Layout, stretch: Range<usize>, got: &Averages, expected: &Averages) -> Result<()> {
        for (tensor, &begin) in self.places.iter().enumerate() {
            let place = layout.range(tensor);
            for i in place.start.max(stretch.start)..place.end.min(stretch.end) {
                let at = i - stretch.start;
                let from = (begin + i - place.start) % PERIOD;
                let low = |averages: &Averages, i: usize| averages.low.as_ref().map(|low| low[i]);
                if got.high[at].to_bits() != expected.high[from].to_bits() || low(got, at) != low(expected, from) {
                    let element = i - place.start;
                    let got = got.high[at];
                    let expected = expected.high[from];
                    return Err(self.wrong(format!("tensor {tensor}, element {element} is {got}, not {expected}")));
                }
            }
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Wrong { what: format!("cuda, update, {}", self.info().name), reason }
    }
}

/// Inputs of an update.
struct UpdateInputs<'s> {
    stream: &'s TimedStream,
    averages: &'s mut DeviceAverages,
    tensors: Vec<(Dtype, CudaMemory<'s>)>,
}

impl Task<DeviceModel> for DeviceUpdate {
    fn info(&self) -> TaskInfo {
        let mut info = self.case.info(COPY.into());
        if self.looks {
            info.name += ", with a look";
            info.bytes += (self.case.dtype.bitsize() / 8 * self.case.elements.iter().sum::<usize>()) as u64;
        }
        info
    }

    fn check(&self, state: &mut DeviceModel) -> Result<()> {
        let UpdateInputs { stream, averages, tensors } = self.inputs(state)?;
        stream.clear(averages)?;
        (0..2).try_for_each(|_| self.update(averages, &tensors))?;
        let layout = self.case.layout();
        let expected = self.expected();
        for window in windows(layout.total()) {
            for (profile, expected) in expected.iter().enumerate() {
                let got = stream.averages(averages, profile, window.clone())?;
                self.compare(&layout, window.clone(), &got, expected)?;
            }
        }
        Ok(())
    }

    fn seconds(&self, state: &mut DeviceModel) -> Result<f64> {
        let UpdateInputs { stream, averages, tensors } = self.inputs(state)?;
        stream.seconds(&mut || self.update(averages, &tensors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_finds_a_wrong_element() {
        let elements = split(100, 3);
        let case = UpdateCase { dtype: Dtype::BF16, precision: Precision::Compensated, elements };
        let task = DeviceUpdate::new(case, false);
        assert_eq!(task.places, [0, 128, 256]);
        let layout = task.case.layout();
        let expected = &task.expected()[1];
        let mut got = Averages::zeros(&layout, Precision::Compensated);
        for tensor in 0..3 {
            let place = layout.range(tensor);
            let from = task.places[tensor] % PERIOD;
            let values = expected.high.iter().cycle().skip(from).take(place.len());
            got.high[place.clone()].iter_mut().zip(values).for_each(|(to, value)| *to = *value);
            let terms = expected.low.as_ref().unwrap().iter().cycle().skip(from).take(place.len());
            got.low.as_mut().unwrap()[place].iter_mut().zip(terms).for_each(|(to, term)| *to = *term);
        }
        let all = 0..layout.total();
        task.compare(&layout, all.clone(), &got, expected).unwrap();
        let last = layout.range(2).end - 1;
        let mut wrong = got.clone();
        wrong.high[last] = f32::NAN;
        let text = task.compare(&layout, all.clone(), &wrong, expected).unwrap_err().to_string();
        assert!(
            text.contains("tensor 2, element 32 is NaN") && text.contains("bf16, compensated, 3 tensors"),
            "{text}"
        );
        got.low.as_mut().unwrap()[last] = i16::MAX;
        assert!(task.compare(&layout, all, &got, expected).is_err());
    }
}
