//! Blends of snapshots in a mapped file, as synthesis reads them, into results in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use posthoc_ema::compute::cpu::limits::{self, split_streams};
use posthoc_ema::compute::cpu::{self, CHUNK};
use posthoc_ema::snapshot::{FileLayout, StoredFile};
use posthoc_ema::{Error, Result, TensorSpec};
use rayon::prelude::*;
use safetensors::Dtype;

use super::super::cases::{BlendCase, Sizes, target_counts, word};
use super::super::session::{Session, Task, TaskInfo, timed};

/// Distance of compared elements: a prime, so that every position of a chunk is compared.
const SAMPLE_STEP: usize = 9973;

/// Words written to the file at a time.
const BLOCK: usize = 1 << 20;

/// Name of the only tensor of the file.
const TENSOR: &str = "snapshots";

/// Name of the limit [`FileScan`].
const SCAN: &str = "mapped file read";

/// Times all cases.
pub(super) fn measure(sizes: &Sizes, session: &mut Session<'_>) -> Result<()> {
    let Sizes { parameters, snapshots, targets, .. } = *sizes;
    let file = write_snapshots(parameters * snapshots * size_of::<f32>(), session)?;
    let bytes = file.tensors().get(TENSOR).map_or(&[][..], |tensor| file.bytes(tensor));
    let mut tasks: Vec<Box<dyn Task<BlendResults> + '_>> = vec![Box::new(FileScan(bytes))];
    for targets in target_counts(sizes) {
        let case = BlendCase { dtype: Dtype::F32, sources: snapshots, targets, parameters };
        tasks.push(Box::new(BlendLoop(BlendTask::new(case, bytes))));
    }
    for case in BlendCase::all(sizes) {
        tasks.push(Box::new(BlendTask::new(case, bytes)));
    }
    let mut state = BlendResults { results: (0..targets).map(|_| vec![0; parameters * size_of::<f32>()]).collect() };
    session.measure("blend", &mut state, &tasks)
}

/// Writes a file of at least `bytes` bytes, in whole words, and maps it from the page cache.
///
/// The file is unlinked at once, so that nothing is left behind if the process is killed.
fn write_snapshots(bytes: usize, session: &mut Session<'_>) -> Result<StoredFile> {
    let folder = std::env::temp_dir();
    let temp = tempfile::tempdir_in(&folder).map_err(Error::io("create a temporary folder in", &folder))?;
    let path = temp.path().join("snapshots.safetensors");
    let words = bytes.div_ceil(size_of::<u64>());
    let spec = TensorSpec { name: TENSOR.into(), dtype: Dtype::U64, shape: vec![words] };
    let header = FileLayout::new(vec![spec])?.header(&BTreeMap::new())?;
    let mut file = create(&path, &header)?;
    let blocks = words.div_ceil(BLOCK);
    for i in 0..blocks {
        let block: Vec<u64> = (i * BLOCK..words.min((i + 1) * BLOCK)).into_par_iter().map(word).collect();
        file.write_all(bytemuck::cast_slice(&block)).map_err(Error::io("write", &path))?;
        session.progress("snapshots into the page cache", i + 1, blocks);
    }
    StoredFile::open(&path)
}

fn create(path: &Path, header: &[u8]) -> Result<File> {
    let file = File::create_new(path).and_then(|mut file| file.write_all(header).map(|()| file));
    file.map_err(Error::io("write", path))
}

/// Cuts the bytes into the snapshots of a case.
fn cut<'a>(bytes: &'a [u8], case: &BlendCase) -> Vec<&'a [u8]> {
    bytes.chunks_exact(case.result_bytes()).take(case.sources).collect()
}

/// Memory of the results.
struct BlendResults {
    results: Vec<Vec<u8>>,
}

impl BlendResults {
    fn dst(&mut self, targets: usize, bytes: usize) -> Vec<&mut [u8]> {
        self.results[..targets].iter_mut().map(|result| &mut result[..bytes]).collect()
    }

    /// Fills the results with bytes that no answer has, on the threads that will work on them.
    fn poison(&mut self) {
        self.results.iter_mut().for_each(|result| result.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0xff)));
    }
}

/// The limit that reads the whole file and writes nothing.
struct FileScan<'a>(&'a [u8]);

impl Task<BlendResults> for FileScan<'_> {
    fn info(&self) -> TaskInfo {
        TaskInfo::limit(SCAN, self.0.len())
    }

    fn check(&self, _: &mut BlendResults) -> Result<()> {
        let expected = (0..self.0.len() / size_of::<u64>()).into_par_iter().map(word).reduce(|| 0, u64::wrapping_add);
        let got = limits::scan(&[self.0]);
        if got == expected { Ok(()) } else { Err(wrong(SCAN, format!("the sum is {got:#x}, not {expected:#x}"))) }
    }

    fn seconds(&self, _: &mut BlendResults) -> Result<f64> {
        Ok(timed(|| {
            std::hint::black_box(limits::scan(&[self.0]));
        }))
    }
}

/// The limit that moves the streams of a blend with next to no arithmetic.
struct BlendLoop<'a>(BlendTask<'a>);

impl Task<BlendResults> for BlendLoop<'_> {
    fn info(&self) -> TaskInfo {
        TaskInfo::limit(self.0.loop_name(), self.0.case.bytes())
    }

    fn check(&self, state: &mut BlendResults) -> Result<()> {
        state.poison();
        self.seconds(state)?;
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        let at = |i: usize| 8 * i..8 * i + 8;
        for i in (0..self.0.case.result_bytes() / 8).step_by(SAMPLE_STEP) {
            let sources = self.0.sources.iter().map(|source| word(&source[at(i)]));
            let expected = sources.fold(0, u64::wrapping_add);
            for result in &state.results[..self.0.case.targets] {
                let got = word(&result[at(i)]);
                if got != expected {
                    return Err(wrong(&self.info().name, format!("sum {i} is {got:#x}, not {expected:#x}")));
                }
            }
        }
        Ok(())
    }

    fn seconds(&self, state: &mut BlendResults) -> Result<f64> {
        let mut dst = state.dst(self.0.case.targets, self.0.case.result_bytes());
        Ok(timed(|| limits::blend(&mut dst, &self.0.sources)))
    }
}

/// A blend and its snapshots.
struct BlendTask<'a> {
    case: BlendCase,
    sources: Vec<&'a [u8]>,
}

impl<'a> BlendTask<'a> {
    fn new(case: BlendCase, bytes: &'a [u8]) -> BlendTask<'a> {
        BlendTask { sources: cut(bytes, &case), case }
    }

    /// Returns the name of the [`BlendLoop`] over the same streams.
    fn loop_name(&self) -> String {
        format!("{} streams added up, {} written", self.case.sources, self.case.targets)
    }

    fn blend(&self, dst: &mut [&mut [u8]]) -> Result<()> {
        let dtype = self.case.dtype;
        let size = dtype.bitsize() / 8;
        let dtypes = vec![dtype; self.sources.len()];
        let weights = self.case.weights();
        let blend = cpu::Blend { dtypes: &dtypes, weights: &weights, output: dtype };
        split_streams(dst, CHUNK * size).into_par_iter().enumerate().try_for_each(|(i, mut dst)| {
            let range = i * CHUNK * size..i * CHUNK * size + dst[0].len();
            let sources: Vec<&[u8]> = self.sources.iter().map(|source| &source[range.clone()]).collect();
            cpu::blend(&mut dst, &sources, &blend)
                .map_err(|overflow| wrong(&self.info().name, format!("a sum is {}", overflow.value)))
        })
    }

    /// Compares with sums in f64. The tolerance is half a unit in the last place, and a little for sums near zero.
    fn compare(&self, results: &[Vec<u8>]) -> Result<()> {
        let weights = self.case.weights();
        let precision = match self.case.dtype {
            Dtype::F16 => f64::from(f16::EPSILON),
            Dtype::BF16 => f64::from(bf16::EPSILON),
            _ => f64::from(f32::EPSILON),
        };
        for i in (0..self.case.parameters).step_by(SAMPLE_STEP).chain([self.case.parameters - 1]) {
            let values: Vec<f64> = self.sources.iter().map(|source| element(source, self.case.dtype, i)).collect();
            for (result, weights) in results.iter().zip(weights.chunks(values.len())) {
                let expected: f64 = weights.iter().zip(&values).map(|(w, x)| w * x).sum();
                let got = element(result, self.case.dtype, i);
                if !((got - expected).abs() <= 0.5 * precision * (expected.abs() + 0.01)) {
                    return Err(wrong(&self.info().name, format!("element {i} is {got}, not {expected}")));
                }
            }
        }
        Ok(())
    }
}

impl Task<BlendResults> for BlendTask<'_> {
    fn info(&self) -> TaskInfo {
        self.case.info(self.loop_name())
    }

    fn check(&self, state: &mut BlendResults) -> Result<()> {
        state.poison();
        self.seconds(state)?;
        self.compare(&state.results[..self.case.targets])
    }

    fn seconds(&self, state: &mut BlendResults) -> Result<f64> {
        let mut dst = state.dst(self.case.targets, self.case.result_bytes());
        let mut blended = Ok(());
        let seconds = timed(|| blended = self.blend(&mut dst));
        blended.map(|()| seconds)
    }
}

/// Decodes one element, without the code that is timed.
fn element(bytes: &[u8], dtype: Dtype, i: usize) -> f64 {
    let two = || [bytes[2 * i], bytes[2 * i + 1]];
    match dtype {
        Dtype::F16 => f16::from_le_bytes(two()).to_f64(),
        Dtype::BF16 => bf16::from_le_bytes(two()).to_f64(),
        _ => <[u8; 4]>::try_from(&bytes[4 * i..][..4]).map_or(f64::NAN, |bytes| f32::from_le_bytes(bytes).into()),
    }
}

fn wrong(name: &str, reason: String) -> Error {
    Error::Wrong { what: format!("cpu, blend, {name}"), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compare_finds_a_wrong_element() {
        let words: Vec<u64> = (0..30).map(word).collect();
        let bytes = bytemuck::cast_slice(&words);
        for (dtype, size) in [(Dtype::F16, 2), (Dtype::BF16, 2), (Dtype::F32, 4)] {
            let case = BlendCase { dtype, sources: 3, targets: 2, parameters: 20 };
            let task = BlendTask::new(case, bytes);
            let mut results = vec![vec![0; case.result_bytes()]; 2];
            let mut dst: Vec<&mut [u8]> = results.iter_mut().map(Vec::as_mut_slice).collect();
            task.blend(&mut dst).unwrap();
            task.compare(&results).unwrap();
            // An error of two units in the last place, and NaN.
            let last = 19 * size;
            for wrong in [results[1][last] ^ 2, 0xff] {
                let mut results = results.clone();
                results[1][last] = wrong;
                results[1][last + 1..].iter_mut().filter(|_| wrong == 0xff).for_each(|byte| *byte = 0xff);
                assert!(task.compare(&results).unwrap_err().to_string().contains("element 19"));
            }
        }
    }
}
