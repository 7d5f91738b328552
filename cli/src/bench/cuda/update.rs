//! The update on a device, against the CPU's bits.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use safetensors::Dtype;

use super::super::PROFILES;
use super::super::cases::{PERIOD, Sizes, Update, WEIGHTS, parameter, split, tensor_counts};
use super::super::session::{Row, Session, Task};
use super::copy::{Copy, Lanes};
use super::windows;
use posthoc_ema::CudaMemory;
use posthoc_ema::compute::cpu::{Averages, Incoming, Layout, Precision, update};
use posthoc_ema::compute::cuda::{Buffer, Device, DeviceAverages, TimedStream};
use posthoc_ema::{Error, Result};

const COPY: &str = "copy within the device";

/// Elements to which a tensor's place among the parameters is rounded up, as frameworks allocate them: at 256 bytes.
const ALIGNMENT: usize = 128;

/// Repetitions of the parameters that are written by the host; the device makes the others.
const REPETITIONS: usize = 1 << 12;

/// Times all cases.
pub(super) fn measure(device: &Arc<Device>, sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let mut state = State::new(device, sizes)?;
    let mut tasks: Vec<Box<dyn Task<State>>> = vec![Box::new(Copy { name: COPY, bytes: state.f32s.len() })];
    tasks.extend(Update::all(sizes).into_iter().map(|case| Box::new(Case::new(case)) as _));
    session.measure("update", &mut state, &tasks)
}

/// The bytes that are held: parameters in both dtypes, the copy's destination, and averages of every kind.
pub(super) fn bytes(sizes: &Sizes) -> u128 {
    let of_averages = PROFILES * (size_of::<f32>() + size_of::<f32>() + size_of::<bf16>());
    let counts = tensor_counts(sizes);
    let padding = ALIGNMENT as u128 * counts.iter().copied().max().unwrap_or(0) as u128;
    let parameters = 2 * size_of::<f32>() + size_of::<bf16>();
    (parameters + of_averages * counts.len()) as u128 * (sizes.parameters as u128 + padding)
}

/// Where each tensor begins among the parameters, and where the last ends.
fn places(elements: &[usize]) -> (Vec<usize>, usize) {
    let mut end = 0;
    let place = |n: &usize| {
        let start = end;
        end += n.next_multiple_of(ALIGNMENT);
        start
    };
    let places = elements.iter().map(place).collect();
    (places, end)
}

/// The model in both dtypes, and averages of every kind.
struct State {
    trial: TimedStream,
    f32s: Buffer,
    bf16s: Buffer,
    /// The destination of the copy.
    copy: Buffer,
    pattern: Vec<u8>,
    averages: Vec<(usize, Precision, DeviceAverages)>,
}

impl State {
    fn new(device: &Arc<Device>, sizes: &Sizes) -> Result<State> {
        let ends = tensor_counts(sizes).into_iter().map(|tensors| places(&split(sizes.parameters, tensors)).1);
        let elements = ends.max().unwrap_or(0);
        let buffer = |size: usize| Buffer::new(device, size * elements, "parameters");
        let (trial, mut f32s, mut bf16s, copy) = (TimedStream::new(device)?, buffer(4)?, buffer(2)?, buffer(4)?);
        let values = || (0..PERIOD * REPETITIONS).map(parameter);
        let pattern: Vec<u8> = values().flat_map(f32::to_le_bytes).collect();
        trial.repeat(&mut f32s, &pattern)?;
        let halves: Vec<u8> = values().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        trial.repeat(&mut bf16s, &halves)?;
        let mut averages = Vec::new();
        for tensors in tensor_counts(sizes) {
            let layout = Layout::new(split(sizes.parameters, tensors));
            for precision in [Precision::Plain, Precision::Compensated] {
                let zeros = DeviceAverages::zeros(device, &layout, PROFILES, precision, &[])?;
                averages.push((tensors, precision, zeros));
            }
        }
        Ok(State { trial, f32s, bf16s, copy, pattern, averages })
    }
}

impl Lanes for State {
    fn lanes(&mut self) -> (&TimedStream, &mut Buffer, &Buffer) {
        (&self.trial, &mut self.copy, &self.f32s)
    }

    fn pattern(&self) -> &[u8] {
        &self.pattern
    }
}

/// A case, and where its tensors begin among the parameters.
struct Case {
    case: Update,
    places: Vec<usize>,
}

impl Case {
    fn new(case: Update) -> Case {
        Case { places: places(&case.elements).0, case }
    }

    /// The averages of the case's kind, the stream, and the parameters.
    fn parts<'s>(&self, state: &'s mut State) -> Result<Parts<'s>> {
        let State { trial, f32s, bf16s, averages, .. } = state;
        let (dtype, size) = (self.case.dtype, self.case.dtype.bitsize() / 8);
        let buffer = if dtype == Dtype::F32 { f32s } else { bf16s };
        let kind = (self.case.elements.len(), self.case.precision);
        let found = averages.iter_mut().find(|(tensors, precision, _)| (*tensors, *precision) == kind);
        let Some((_, _, averages)) = found else { return Err(self.wrong("no averages were made for it".into())) };
        let (trial, buffer): (&TimedStream, &Buffer) = (trial, buffer);
        let lend = |(&start, &n): (&usize, &usize)| (dtype, trial.lend(buffer, size * start..size * (start + n)));
        let tensors = self.places.iter().zip(&self.case.elements).map(lend).collect();
        Ok(Parts { trial, averages, tensors })
    }

    /// What the CPU makes of the parameters, which repeat after so many, in two updates from zeros.
    fn expected(&self) -> Vec<Averages> {
        let values = (0..PERIOD).map(parameter);
        let bytes: Vec<u8> = match self.case.dtype {
            Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        };
        let layout = Layout::new([PERIOD]);
        let mut averages = vec![Averages::zeros(&layout, self.case.precision); PROFILES];
        let incoming = [Incoming { dtype: self.case.dtype, bytes: &bytes }];
        (0..2).for_each(|_| update(&mut averages, &incoming, &layout, &WEIGHTS));
        averages
    }

    /// Compares a stretch of the averages of one profile, tensor by tensor.
    fn compare(&self, layout: &Layout, stretch: Range<usize>, got: &Averages, expected: &Averages) -> Result<()> {
        for (tensor, &begin) in self.places.iter().enumerate() {
            let place = layout.place(tensor);
            for i in place.start.max(stretch.start)..place.end.min(stretch.end) {
                let (at, from) = (i - stretch.start, (begin + i - place.start) % PERIOD);
                let low = |averages: &Averages, i: usize| averages.low.as_ref().map(|low| low[i].to_bits());
                if got.high[at].to_bits() != expected.high[from].to_bits() || low(got, at) != low(expected, from) {
                    let element = i - place.start;
                    let (got, expected) = (got.high[at], expected.high[from]);
                    return Err(self.wrong(format!("tensor {tensor}, element {element} is {got}, not {expected}")));
                }
            }
        }
        Ok(())
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Wrong { what: format!("cuda, update, {}", Task::row(self).name), reason }
    }
}

/// What an update works on.
struct Parts<'s> {
    trial: &'s TimedStream,
    averages: &'s mut DeviceAverages,
    tensors: Vec<(Dtype, CudaMemory<'s>)>,
}

impl Task<State> for Case {
    fn row(&self) -> Row {
        self.case.row(COPY.into())
    }

    fn check(&self, state: &mut State) -> Result<()> {
        let Parts { trial, averages, tensors } = self.parts(state)?;
        trial.clear(averages)?;
        (0..2).try_for_each(|_| averages.update(&tensors, &[], &WEIGHTS))?;
        let (layout, expected) = (self.case.layout(), self.expected());
        for window in windows(layout.total()) {
            for (profile, expected) in expected.iter().enumerate() {
                let got = trial.averages(averages, profile, window.clone())?;
                self.compare(&layout, window.clone(), &got, expected)?;
            }
        }
        Ok(())
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let Parts { trial, averages, tensors } = self.parts(state)?;
        trial.seconds(&mut || averages.update(&tensors, &[], &WEIGHTS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_element_is_found() {
        let case = Case::new(Update { dtype: Dtype::BF16, precision: Precision::Compensated, elements: split(100, 3) });
        assert_eq!(case.places, [0, 128, 256]);
        let (layout, expected) = (case.case.layout(), &case.expected()[1]);
        let mut got = Averages::zeros(&layout, Precision::Compensated);
        for tensor in 0..3 {
            let place = layout.place(tensor);
            let from = case.places[tensor] % PERIOD;
            let values = expected.high.iter().cycle().skip(from).take(place.len());
            got.high[place.clone()].iter_mut().zip(values).for_each(|(to, value)| *to = *value);
            let terms = expected.low.as_ref().unwrap().iter().cycle().skip(from).take(place.len());
            got.low.as_mut().unwrap()[place].iter_mut().zip(terms).for_each(|(to, term)| *to = *term);
        }
        let all = 0..layout.total();
        case.compare(&layout, all.clone(), &got, expected).unwrap();
        let last = layout.place(2).end - 1;
        let mut wrong = got.clone();
        wrong.high[last] = f32::NAN;
        let text = case.compare(&layout, all.clone(), &wrong, expected).unwrap_err().to_string();
        assert!(
            text.contains("tensor 2, element 32 is NaN") && text.contains("bf16, compensated, 3 tensors"),
            "{text}"
        );
        got.low.as_mut().unwrap()[last] = bf16::ONE;
        assert!(case.compare(&layout, all, &got, expected).is_err());
    }
}
