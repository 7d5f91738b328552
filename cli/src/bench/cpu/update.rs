//! The update: f32 and bf16 parameters, plain and compensated averages, few large tensors and many small ones.

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;

use super::super::PROFILES;
use super::super::cases::{Sizes, Update, WEIGHTS, parameter, split, tensor_counts};
use super::super::session::{Row, Session, Task, timed};
use posthoc_ema::compute::cpu::limits;
use posthoc_ema::compute::cpu::{Averages, CHUNK, Incoming, Layout, Precision, update};
use posthoc_ema::{Error, Result};

/// Elements between those whose answers are compared; a prime, so that no place in a chunk is left out.
const SAMPLED: usize = 997;

const COPY: &str = "copy";

/// Times all cases.
pub(super) fn measure(sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let n = sizes.parameters;
    let mut tasks: Vec<Box<dyn Task<State>>> = vec![Box::new(Copy(n)), Box::new(Loop(n))];
    tasks.extend(Update::all(sizes).into_iter().map(|case| Box::new(Case(case)) as _));
    let totals = tensor_counts(sizes).into_iter().map(|tensors| Layout::new(split(n, tensors)).total());
    session.measure("update", &mut State::new(n, totals.max().unwrap_or(n)), &tasks)
}

/// The model in both dtypes, and averages that have room for every layout.
struct State {
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    averages: Vec<Averages>,
}

impl State {
    fn new(n: usize, total: usize) -> State {
        let f32s = (0..n).into_par_iter().map(parameter).collect();
        let bf16s = (0..n).into_par_iter().map(|i| bf16::from_f32(parameter(i))).collect();
        let layout = Layout::new([total]);
        State {
            f32s,
            bf16s,
            averages: (0..PROFILES).map(|_| Averages::zeros(&layout, Precision::Compensated)).collect(),
        }
    }

    /// Zeros, written by the threads that will work on them.
    fn clear(&mut self) {
        for Averages { high, low } in &mut self.averages {
            high.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0.0));
            low.iter_mut().for_each(|low| low.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(bf16::ZERO)));
        }
    }
}

/// One stream copied to another.
struct Copy(usize);

impl Task<State> for Copy {
    fn row(&self) -> Row {
        Row::limit(COPY, 2 * size_of::<f32>() * self.0)
    }

    fn check(&self, state: &mut State) -> Result<()> {
        state.clear();
        self.seconds(state)?;
        let wrong = |i: &usize| state.averages[0].high[*i] != parameter(*i);
        match (0..self.0).step_by(SAMPLED).find(wrong) {
            Some(i) => Err(wrong_at(COPY, i, state.averages[0].high[i].into(), parameter(i).into())),
            None => Ok(()),
        }
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let dst = &mut state.averages[0].high[..self.0];
        Ok(timed(|| limits::copy(dst, &state.f32s)))
    }
}

/// The streams of an update, with next to no arithmetic.
struct Loop(usize);

/// The name of [`Loop`].
fn loop_name() -> String {
    format!("1 stream read, {PROFILES} updated in place")
}

impl Task<State> for Loop {
    fn row(&self) -> Row {
        Row::limit(loop_name(), (1 + 2 * PROFILES) * size_of::<f32>() * self.0)
    }

    fn check(&self, state: &mut State) -> Result<()> {
        state.clear();
        self.seconds(state)?;
        for averages in &state.averages {
            let wrong = |i: &usize| averages.high[*i] != parameter(*i);
            if let Some(i) = (0..self.0).step_by(SAMPLED).find(wrong) {
                return Err(wrong_at(&loop_name(), i, averages.high[i].into(), parameter(i).into()));
            }
        }
        Ok(())
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let averages = state.averages.iter_mut();
        let mut updated: Vec<&mut [f32]> = averages.map(|a| &mut a.high[..self.0]).collect();
        Ok(timed(|| limits::update(&mut updated, &state.f32s)))
    }
}

struct Case(Update);

impl Case {
    /// The seconds of one update of every profile.
    fn update(&self, averages: &mut [Averages], parameters: &[u8], layout: &Layout) -> f64 {
        let size = self.0.dtype.bitsize() / 8;
        let mut rest = parameters;
        let tensors = self.0.elements.iter().map(|n| rest.split_off(..n * size).unwrap_or_default());
        let incoming: Vec<Incoming<'_>> = tensors.map(|bytes| Incoming { dtype: self.0.dtype, bytes }).collect();
        timed(|| update(averages, &incoming, layout, &WEIGHTS))
    }

    /// From zeros, two updates leave `1 - (1 - w)^2` of a parameter.
    fn compare(&self, averages: &[Averages], layout: &Layout) -> Result<()> {
        let mut before = 0;
        for (tensor, &elements) in self.0.elements.iter().enumerate() {
            let place = layout.place(tensor);
            for i in (0..elements).step_by(SAMPLED).chain(elements.checked_sub(1)) {
                for (averages, &weight) in averages.iter().zip(&WEIGHTS) {
                    let (p, weight) = (f64::from(parameter(before + i)), f64::from(weight));
                    let expected = p * (1.0 - (1.0 - weight) * (1.0 - weight));
                    let got = f64::from(averages.high[place.start + i]);
                    if !((got - expected).abs() <= 1e-6 * p.abs()) {
                        return Err(wrong_at(&self.row().name, before + i, got, expected));
                    }
                }
            }
            before += elements;
        }
        Ok(())
    }
}

impl Task<State> for Case {
    fn row(&self) -> Row {
        self.0.row(loop_name())
    }

    fn check(&self, state: &mut State) -> Result<()> {
        state.clear();
        self.seconds(state)?;
        self.seconds(state)?;
        self.compare(&state.averages, &self.0.layout())
    }

    fn seconds(&self, state: &mut State) -> Result<f64> {
        let State { f32s, bf16s, averages } = state;
        let parameters =
            if self.0.dtype == Dtype::F32 { bytemuck::cast_slice(f32s) } else { bytemuck::cast_slice(bf16s) };
        let layout = self.0.layout();
        if self.0.precision == Precision::Compensated {
            return Ok(self.update(averages, parameters, &layout));
        }
        // Plain averages are compensated ones whose low-order terms lie aside.
        let aside: Vec<_> = averages.iter_mut().map(|averages| averages.low.take()).collect();
        let seconds = self.update(averages, parameters, &layout);
        averages.iter_mut().zip(aside).for_each(|(averages, low)| averages.low = low);
        Ok(seconds)
    }
}

fn wrong_at(name: &str, element: usize, got: f64, expected: f64) -> Error {
    let reason = format!("element {element} is {got}, not {expected}");
    Error::Wrong { what: format!("cpu, update, {name}"), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_element_is_found() {
        let elements = split(100, 3);
        assert_eq!(elements, [34, 33, 33]);
        let case = Case(Update { dtype: Dtype::BF16, precision: Precision::Plain, elements });
        let layout = case.0.layout();
        let mut state = State::new(100, layout.total());
        case.check(&mut state).unwrap();
        let last = layout.place(2).end - 1;
        for wrong in [1.0001, f32::NAN] {
            let mut averages = state.averages.clone();
            averages[1].high[last] *= wrong;
            let text = case.compare(&averages, &layout).unwrap_err().to_string();
            assert!(text.contains("element 99") && text.contains("bf16, plain, 3 tensors"), "{text}");
        }
    }
}
