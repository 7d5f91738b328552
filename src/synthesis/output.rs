//! Where blends go: files, memory, a live model.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;

use super::blend::TensorBlend;
use super::plan::Plan;
use super::pool::{Pool, PoolTensor, Selection};
use super::stored::profile_json;
use crate::error::{Error, Result};
use crate::snapshot::{AtomicFile, FileLayout, Meta, PROFILE, STEP, TensorSpec};
use crate::tensor::{ParametersMut, Tensor, TensorViewMut, Tensors, byte_size, is_averaged};

/// Bytes of results that all threads together hold at a time.
const BUFFERED: usize = 64 << 20;

/// The most elements that a thread blends before it writes.
const MOST_ELEMENTS: usize = 1 << 18;

/// A plan and the file that its result goes to.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The solved target.
    pub plan: &'a Plan,
    /// The file; one of that name is replaced when the new one is whole.
    pub path: &'a Path,
}

/// How results are written.
#[derive(Clone, Copy, Default)]
pub struct WriteOptions<'a> {
    /// The dtype of averaged tensors; the model's own where it is not given.
    pub dtype: Option<Dtype>,
    /// Called with the bytes of snapshots that were read since the last call, from any thread.
    pub progress: Option<&'a (dyn Fn(u64) + Sync)>,
}

impl Pool<'_> {
    /// Blends all plans into memory of their own.
    pub(crate) fn load(&self, plan: &Plan) -> Result<Tensors> {
        let selection = self.select(&[plan])?;
        let load = |tensor: &PoolTensor| {
            let mut bytes = vec![0; byte_size(&tensor.name, tensor.dtype, &tensor.shape)?];
            if tensor.averaged {
                TensorBlend::new(&selection, tensor, tensor.dtype)?.whole(&mut bytes)?;
            } else {
                bytes.copy_from_slice(copied(&selection, 0, tensor)?);
            }
            Ok((tensor.name.clone(), Tensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes }))
        };
        let mut tensors: Tensors = self.tensors.par_iter().map(load).collect::<Result<Vec<_>>>()?.into_iter().collect();
        for (dropped, kept) in &self.tied {
            if let Some(tensor) = tensors.get(kept).cloned() {
                tensors.insert(dropped.clone(), tensor);
            }
        }
        Ok(tensors)
    }

    /// Blends a plan into a live model, in the model's own dtypes; tensors that are not averaged stay as they are.
    ///
    /// Everything that can fail is tried before the first byte is written.
    pub(crate) fn write_into(&self, plan: &Plan, params: &mut (impl ParametersMut + ?Sized)) -> Result<()> {
        let selection = self.select(&[plan])?;
        params.with_tensors(&mut |views| {
            for view in views {
                if let Some(tensor) = self.averaged(view.name) {
                    check_target(tensor, view.dtype, view.shape)?;
                    TensorBlend::new(&selection, tensor, view.dtype)?.check(view.elements())?;
                }
            }
            self.check_complete(views.iter().map(|view| view.name).collect())
        })?;
        params.for_each_mut(&mut |view: TensorViewMut<'_>| match self.averaged(view.name) {
            Some(tensor) => TensorBlend::new(&selection, tensor, view.dtype)?.whole(view.bytes),
            None => Ok(()),
        })
    }

    /// The averaged tensor that a name stands for, tied names included.
    fn averaged(&self, name: &str) -> Option<&PoolTensor> {
        let kept = self.tied.get(name).map_or(name, String::as_str);
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(kept)).ok()?;
        Some(&self.tensors[found]).filter(|tensor| tensor.averaged)
    }

    fn check_complete(&self, given: std::collections::BTreeSet<&str>) -> Result<()> {
        match self.tensors.iter().find(|tensor| tensor.averaged && !given.contains(tensor.name.as_str())) {
            Some(missing) => Err(Error::changed(&missing.name, "the model lacks it")),
            None => Ok(()),
        }
    }

    /// Blends several plans into files in one pass over the sources.
    pub(crate) fn write(&self, outputs: &[Output<'_>], options: &WriteOptions<'_>) -> Result<()> {
        check_distinct(outputs)?;
        if let Some(dtype) = options.dtype.filter(|&dtype| !is_averaged(dtype)) {
            let reason = format!("{dtype} is no dtype for averages: choose f32, bf16, f16 or f64");
            return Err(Error::Setting { option: "dtype", reason });
        }
        let plans: Vec<&Plan> = outputs.iter().map(|output| output.plan).collect();
        let selection = self.select(&plans)?;
        let layout = FileLayout::new(self.tensors.iter().map(|tensor| spec(tensor, options.dtype)).collect())?;
        let mut files = Vec::with_capacity(outputs.len());
        for output in outputs {
            let file = AtomicFile::create(output.path)?;
            let header = layout.header(&self.metadata(output.plan))?;
            file.write_at(0, &header)?;
            files.push((file, header.len() as u64));
        }
        Streaming { pool: self, selection: &selection, layout: &layout, files: &files, options }.run()?;
        files.into_iter().try_for_each(|(file, _)| file.commit())
    }

    fn metadata(&self, plan: &Plan) -> BTreeMap<String, String> {
        let mut strings = Meta { tied: self.tied.clone(), ..Meta::default() }.to_strings();
        strings.insert(PROFILE.into(), profile_json(&plan.profile));
        strings.insert(STEP.into(), plan.at.to_string());
        strings
    }
}

/// What a tensor becomes in a file: averaged ones in the dtype asked for, copies as they are.
fn spec(tensor: &PoolTensor, dtype: Option<Dtype>) -> TensorSpec {
    let dtype = if tensor.averaged { dtype.unwrap_or(tensor.dtype) } else { tensor.dtype };
    TensorSpec { name: tensor.name.clone(), dtype, shape: tensor.shape.clone() }
}

fn copied<'a>(selection: &Selection<'a>, target: usize, tensor: &PoolTensor) -> Result<&'a [u8]> {
    let stored = selection.newest[target].stored(&tensor.name);
    stored.map(|(_, bytes)| bytes).ok_or_else(|| Error::tensor(&tensor.name, "the newest snapshot lacks it"))
}

fn check_target(tensor: &PoolTensor, dtype: Dtype, shape: &[usize]) -> Result<()> {
    if shape != tensor.shape {
        return Err(Error::changed(&tensor.name, format!("its shape is {shape:?}, in the run {:?}", tensor.shape)));
    }
    if !is_averaged(dtype) {
        return Err(Error::changed(&tensor.name, format!("its dtype is {dtype}, in the run {}", tensor.dtype)));
    }
    Ok(())
}

fn check_distinct(outputs: &[Output<'_>]) -> Result<()> {
    let mut paths: Vec<PathBuf> = outputs.iter().map(|output| output.path.to_owned()).collect();
    paths.sort_unstable();
    match paths.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => {
            Err(Error::unexpected(&pair[0], "two targets are to be written to this one file: name them apart"))
        }
        None => Ok(()),
    }
}

fn take<'a>(rest: &mut &'a mut [u8], n: usize) -> &'a mut [u8] {
    rest.split_off_mut(..n).unwrap_or_default()
}

/// One pass over the sources, a block of the output at a time.
struct Streaming<'a> {
    pool: &'a Pool<'a>,
    selection: &'a Selection<'a>,
    layout: &'a FileLayout,
    /// Each target's file and where its data section begins.
    files: &'a [(AtomicFile, u64)],
    options: &'a WriteOptions<'a>,
}

/// A stretch of one tensor and where it goes in the data section.
struct Stretch {
    tensor: usize,
    elements: Range<usize>,
    offset: usize,
}

impl Streaming<'_> {
    fn run(&self) -> Result<()> {
        self.copy()?;
        let blends = self.pool.tensors.iter().enumerate().map(|(i, tensor)| {
            let dtype = self.layout.specs()[i].dtype;
            tensor.averaged.then(|| TensorBlend::new(self.selection, tensor, dtype)).transpose()
        });
        let blends: Vec<Option<TensorBlend<'_>>> = blends.collect::<Result<_>>()?;
        let blocks = self.blocks();
        blocks.par_iter().try_for_each_init(
            || vec![Vec::new(); self.files.len()],
            |buffers, block| self.block(&blends, block, buffers),
        )
    }

    /// Copies the tensors that are not averaged.
    fn copy(&self) -> Result<()> {
        for place in self.layout.places() {
            let tensor = &self.pool.tensors[place.index];
            if tensor.averaged {
                continue;
            }
            for (target, (file, data)) in self.files.iter().enumerate() {
                file.write_block_at(data + place.range.start as u64, copied(self.selection, target, tensor)?)?;
            }
        }
        Ok(())
    }

    /// Cuts the averaged tensors, in the order of the file, into blocks of adjacent stretches.
    fn blocks(&self) -> Vec<Vec<Stretch>> {
        let held = self.files.len() * 8 * rayon::current_num_threads();
        let most = (BUFFERED / held).clamp(1 << 12, MOST_ELEMENTS);
        let mut blocks: Vec<Vec<Stretch>> = vec![Vec::new()];
        let (mut filled, mut end) = (0, 0);
        for place in self.layout.places().iter().filter(|place| self.pool.tensors[place.index].averaged) {
            let size = self.layout.specs()[place.index].dtype.bitsize() / 8;
            let total = place.range.len() / size;
            let mut start = 0;
            while start < total {
                if filled >= most || place.range.start + start * size != end {
                    blocks.push(Vec::new());
                    filled = 0;
                }
                let n = (most - filled).min(total - start);
                let offset = place.range.start + start * size;
                let stretch = Stretch { tensor: place.index, elements: start..start + n, offset };
                blocks.last_mut().expect("there is one").push(stretch);
                (start, filled, end) = (start + n, filled + n, offset + n * size);
            }
        }
        blocks
    }

    fn block(&self, blends: &[Option<TensorBlend<'_>>], block: &[Stretch], buffers: &mut [Vec<u8>]) -> Result<()> {
        let Some(first) = block.first() else { return Ok(()) };
        let size = |stretch: &Stretch| stretch.elements.len() * self.layout.specs()[stretch.tensor].dtype.bitsize() / 8;
        let total = block.iter().map(size).sum();
        buffers.iter_mut().for_each(|buffer| buffer.resize(total, 0));
        let mut rest: Vec<&mut [u8]> = buffers.iter_mut().map(|buffer| &mut buffer[..total]).collect();
        for stretch in block {
            let mut dst: Vec<&mut [u8]> = rest.iter_mut().map(|rest| take(rest, size(stretch))).collect();
            if let Some(blend) = &blends[stretch.tensor] {
                blend.stretch(&mut dst, stretch.elements.clone())?;
                self.report(blend.bytes_read(stretch.elements.len()));
            }
        }
        for (buffer, (file, data)) in buffers.iter().zip(self.files) {
            file.write_at(data + first.offset as u64, &buffer[..total])?;
        }
        Ok(())
    }

    fn report(&self, bytes: u64) {
        if let Some(progress) = self.options.progress {
            progress(bytes);
        }
    }
}
