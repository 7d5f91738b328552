//! Updates of f32 and bf16 parameters, plain and compensated averages, few large and many small tensors.

use half::bf16;
use posthoc_ema::compute::cpu::{Averages, CHUNK, Incoming, Layout, Precision, UpdateWeights, limits, update};
use posthoc_ema::{Error, Result};
use rayon::prelude::*;
use safetensors::Dtype;

use super::super::PROFILES;
use super::super::cases::{Sizes, UpdateCase, WEIGHTS, parameter, split, tensor_counts};
use super::super::session::{Session, Task, TaskInfo, timed};

/// Distance of compared elements: a prime, so that every position of a chunk is compared.
const SAMPLE_STEP: usize = 997;

/// Name of the limit [`StreamCopy`].
const COPY: &str = "copy";

/// Times all cases.
pub(super) fn measure(sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let n = sizes.parameters;
    let mut tasks: Vec<Box<dyn Task<UpdateMemory>>> = vec![Box::new(StreamCopy(n)), Box::new(UpdateLoop(n))];
    for case in UpdateCase::all(sizes) {
        tasks.push(Box::new(UpdateTask(case)));
    }
    let totals = tensor_counts(sizes).into_iter().map(|tensors| Layout::new(split(n, tensors)).total());
    session.measure("update", &mut UpdateMemory::new(n, totals.max().unwrap_or(n)), &tasks)
}

/// The model in both dtypes, and averages with room for every layout.
struct UpdateMemory {
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    averages: Vec<Averages>,
}

impl UpdateMemory {
    fn new(n: usize, total: usize) -> UpdateMemory {
        let f32s = (0..n).into_par_iter().map(parameter).collect();
        let bf16s = (0..n).into_par_iter().map(|i| bf16::from_f32(parameter(i))).collect();
        let layout = Layout::new([total]);
        UpdateMemory {
            f32s,
            bf16s,
            averages: (0..PROFILES).map(|_| Averages::zeros(&layout, Precision::Compensated)).collect(),
        }
    }

    /// Fills the averages with zeros, on the threads that will work on them.
    fn clear(&mut self) {
        for Averages { high, low } in &mut self.averages {
            high.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0.0));
            low.iter_mut().for_each(|low| low.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0)));
        }
    }
}

/// The limit that copies one stream to another.
struct StreamCopy(usize);

impl Task<UpdateMemory> for StreamCopy {
    fn info(&self) -> TaskInfo {
        TaskInfo::limit(COPY, 2 * size_of::<f32>() * self.0)
    }

    fn check(&self, state: &mut UpdateMemory) -> Result<()> {
        state.clear();
        self.seconds(state)?;
        check_parameters(COPY, &state.averages[0].high[..self.0])
    }

    fn seconds(&self, state: &mut UpdateMemory) -> Result<f64> {
        let dst = &mut state.averages[0].high[..self.0];
        Ok(timed(|| limits::copy(dst, &state.f32s)))
    }
}

/// The limit that moves the streams of an update with next to no arithmetic.
struct UpdateLoop(usize);

/// Returns the name of the limit [`UpdateLoop`].
fn loop_name() -> String {
    format!("1 stream read, {PROFILES} updated in place")
}

impl Task<UpdateMemory> for UpdateLoop {
    fn info(&self) -> TaskInfo {
        TaskInfo::limit(loop_name(), (1 + 2 * PROFILES) * size_of::<f32>() * self.0)
    }

    fn check(&self, state: &mut UpdateMemory) -> Result<()> {
        state.clear();
        self.seconds(state)?;
        state.averages.iter().try_for_each(|averages| check_parameters(&loop_name(), &averages.high[..self.0]))
    }

    fn seconds(&self, state: &mut UpdateMemory) -> Result<f64> {
        let averages = state.averages.iter_mut();
        let mut updated: Vec<&mut [f32]> = averages.map(|a| &mut a.high[..self.0]).collect();
        Ok(timed(|| limits::update(&mut updated, &state.f32s)))
    }
}

/// An update of every profile.
struct UpdateTask(UpdateCase);

impl UpdateTask {
    /// Returns the seconds of one update.
    fn update(&self, averages: &mut [Averages], parameters: &[u8], layout: &Layout) -> f64 {
        let size = self.0.dtype.bitsize() / 8;
        let mut rest = parameters;
        let tensors = self.0.elements.iter().map(|n| rest.split_off(..n * size).unwrap_or_default());
        let incoming: Vec<Incoming<'_>> = tensors.map(|bytes| Incoming { dtype: self.0.dtype, bytes }).collect();
        timed(|| update(averages, &incoming, layout, UpdateWeights::at(1, &WEIGHTS)))
    }

    /// Compares with the closed form: from zeros, two updates leave `1 - (1 - w)^2` of a parameter.
    fn compare(&self, averages: &[Averages], layout: &Layout) -> Result<()> {
        let mut before = 0;
        for (tensor, &elements) in self.0.elements.iter().enumerate() {
            let place = layout.range(tensor);
            for i in (0..elements).step_by(SAMPLE_STEP).chain(elements.checked_sub(1)) {
                for (averages, &weight) in averages.iter().zip(&WEIGHTS) {
                    let p = f64::from(parameter(before + i));
                    let weight = f64::from(weight);
                    let expected = p * (1.0 - (1.0 - weight) * (1.0 - weight));
                    let got = f64::from(averages.high[place.start + i]);
                    if !((got - expected).abs() <= 1e-6 * p.abs()) {
                        return Err(wrong_at(&self.info().name, before + i, got, expected));
                    }
                }
            }
            before += elements;
        }
        Ok(())
    }
}

impl Task<UpdateMemory> for UpdateTask {
    fn info(&self) -> TaskInfo {
        self.0.info(loop_name())
    }

    fn check(&self, state: &mut UpdateMemory) -> Result<()> {
        state.clear();
        self.seconds(state)?;
        self.seconds(state)?;
        self.compare(&state.averages, &self.0.layout())
    }

    fn seconds(&self, state: &mut UpdateMemory) -> Result<f64> {
        let UpdateMemory { f32s, bf16s, averages } = state;
        let parameters =
            if self.0.dtype == Dtype::F32 { bytemuck::cast_slice(f32s) } else { bytemuck::cast_slice(bf16s) };
        let layout = self.0.layout();
        if self.0.precision == Precision::Compensated {
            return Ok(self.update(averages, parameters, &layout));
        }
        // Plain averages are compensated ones without their low-order terms.
        let aside: Vec<_> = averages.iter_mut().map(|averages| averages.low.take()).collect();
        let seconds = self.update(averages, parameters, &layout);
        averages.iter_mut().zip(aside).for_each(|(averages, low)| averages.low = low);
        Ok(seconds)
    }
}

/// Checks that sampled values are the parameters.
fn check_parameters(name: &str, values: &[f32]) -> Result<()> {
    for (i, &value) in values.iter().enumerate().step_by(SAMPLE_STEP) {
        if value != parameter(i) {
            return Err(wrong_at(name, i, value.into(), parameter(i).into()));
        }
    }
    Ok(())
}

fn wrong_at(name: &str, element: usize, got: f64, expected: f64) -> Error {
    let reason = format!("element {element} is {got}, not {expected}");
    Error::Wrong { what: format!("cpu, update, {name}"), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_finds_a_wrong_element() {
        let elements = split(100, 3);
        assert_eq!(elements, [34, 33, 33]);
        let task = UpdateTask(UpdateCase { dtype: Dtype::BF16, precision: Precision::Plain, elements });
        let layout = task.0.layout();
        let mut state = UpdateMemory::new(100, layout.total());
        task.check(&mut state).unwrap();
        let last = layout.range(2).end - 1;
        for wrong in [1.0001, f32::NAN] {
            let mut averages = state.averages.clone();
            averages[1].high[last] *= wrong;
            let text = task.compare(&averages, &layout).unwrap_err().to_string();
            assert!(text.contains("element 99") && text.contains("bf16, plain, 3 tensors"), "{text}");
        }
    }
}
