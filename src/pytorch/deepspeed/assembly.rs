//! Tensors put together from the files of a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::files::{CheckpointFiles, all_of};
use super::flat_list::FlatList;
use super::module_state::{ModuleState, Parameters};
use super::optimizer_state::OptimizerState;
use crate::error::{Error, Result};
use crate::fs::Mapping;
use crate::pytorch::entries::{check_growth, read_entries};
use crate::pytorch::file::PickledFile;
use crate::pytorch::tensor::PickledTensor;
use crate::pytorch::tensor_file::TensorFile;
use crate::pytorch::tiled::{TensorPart, TiledTensor};
use crate::tensor::NamePatterns;

/// Tensors, and the files that they are in.
#[derive(Default)]
pub(super) struct Assembly {
    maps: Vec<Mapping>,
    /// Shape of each tensor, and its parts as stretches of the list of its elements.
    cut: BTreeMap<String, (Vec<usize>, Vec<TensorPart>)>,
    /// Tensors in one piece, with the index of their file.
    whole: BTreeMap<String, (usize, PickledTensor)>,
    /// Names of tied tensors, each with the name that has the elements.
    aliases: Vec<(String, String)>,
    left_out: BTreeSet<String>,
    /// Names of the module's entries that are None.
    pub nones: Vec<String>,
}

impl Assembly {
    /// Adds the parameters, from the optimizer's files of all processes.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Damaged`] for files that are missing or do not fit.
    pub(super) fn add_optimizer(&mut self, folder: &Path, files: &CheckpointFiles, module: &ModuleState) -> Result<()> {
        let remedy = match files.is_in_parts() {
            true => "",
            false => ", but --key module (`key`) averages the module's own weights",
        };
        let first = files.optimizer.values().next().ok_or_else(|| {
            let why = "its `*_optim_states.pt`, which have the weights in f32, are missing: the checkpoint is \
                       incomplete";
            Error::damaged(folder, format!("{why}{remedy}"))
        })?;
        let count = OptimizerState::open(first)?.processes;
        let mut states = Vec::with_capacity(files.optimizer.len());
        for path in all_of(folder, &files.optimizer, count, remedy)? {
            states.push(OptimizerState::open(path)?);
        }
        if let Some(other) = states.iter().find(|state| state.is_of_parts != files.is_in_parts()) {
            return Err(Error::damaged(&other.path, "it is of another stage of ZeRO than the module's state"));
        }
        if files.is_in_parts() {
            self.add_frozen(folder, files, module, count)?;
            self.add_stretches(states, &module.groups)
        } else {
            self.add_groups(states, &module.groups)
        }
    }

    /// Adds the parameters of each group, which follow each other in one list that the processes share.
    fn add_groups(&mut self, states: Vec<OptimizerState>, groups: &[Parameters]) -> Result<()> {
        let paddings = states.first().map(|state| state.paddings.clone()).unwrap_or_default();
        let alignment = 2 * states.len();
        let path = states.first().map(|state| state.path.clone()).unwrap_or_default();
        let mut lists: Vec<FlatList> = groups.iter().map(|_| FlatList::default()).collect();
        for state in states {
            if state.groups.len() != groups.len() {
                let why = format!("it has {} groups, but the module's state {}", state.groups.len(), groups.len());
                return Err(Error::damaged(&state.path, why));
            }
            for (list, tensor) in lists.iter_mut().zip(state.groups) {
                push(list, self.maps.len(), tensor, &state.path)?;
            }
            self.maps.push(state.map);
        }
        for (i, (list, group)) in lists.iter().zip(groups).enumerate() {
            let mut at = 0usize;
            for (k, (name, shape)) in group.iter().enumerate() {
                let size = volume(&path, name, shape)?;
                let parts = at.checked_add(size).and_then(|end| list.cut(at..end, 0));
                self.add_cut(&path, name, shape, parts)?;
                let padding = paddings.get(i).and_then(|group| group.get(k)).copied().unwrap_or(0);
                at = at.saturating_add(size).saturating_add(padding);
            }
            // The list is filled up to a multiple, and where that is done differs between versions.
            let filled = |size: usize| size.div_ceil(alignment);
            if filled(at) != filled(list.len()) {
                return Err(wrong_size(&path, at, list.len()));
            }
        }
        Ok(())
    }

    /// Adds the parameters of which each process has a stretch, one after the other in a list of its own.
    fn add_stretches(&mut self, states: Vec<OptimizerState>, groups: &[Parameters]) -> Result<()> {
        let mut lists = Vec::with_capacity(states.len());
        for state in states {
            let mut list = FlatList::default();
            for tensor in state.groups {
                push(&mut list, self.maps.len(), tensor, &state.path)?;
            }
            self.maps.push(state.map);
            lists.push((state.path, list));
        }
        let mut at = 0usize;
        for (name, shape) in groups.iter().flatten() {
            let Some((path, _)) = lists.first() else { break };
            let size = volume(path, name, shape)?;
            let each = size.div_ceil(lists.len());
            let mut parts = Some(Vec::new());
            for (rank, (_, list)) in lists.iter().enumerate() {
                let start = size.min(rank.saturating_mul(each));
                let own = size.min(start.saturating_add(each)) - start;
                let cut = at.checked_add(own).and_then(|end| list.cut(at..end, start));
                parts = parts.zip(cut).map(|(parts, cut)| [parts, cut].concat());
            }
            self.add_cut(path, name, shape, parts)?;
            at = at.saturating_add(each);
        }
        match lists.iter().find(|(_, list)| list.len() != at) {
            Some((path, list)) => Err(wrong_size(path, at, list.len())),
            None => Ok(()),
        }
    }

    /// Adds the parameters that no optimizer has, of which each process has a stretch in its state of the module.
    fn add_frozen(
        &mut self,
        folder: &Path,
        files: &CheckpointFiles,
        module: &ModuleState,
        processes: usize,
    ) -> Result<()> {
        let frozen = module.frozen()?;
        if frozen.is_empty() {
            return Ok(());
        }
        let mut lists: Vec<FlatList> = frozen.iter().map(|_| FlatList::default()).collect();
        for path in all_of(folder, &files.module_parts, processes, "")? {
            let state = ModuleState::open(path)?;
            for (list, (name, _)) in lists.iter_mut().zip(&frozen) {
                push(list, self.maps.len(), state.frozen_part(name)?, path)?;
            }
            self.maps.push(state.file.map);
        }
        for (list, (name, shape)) in lists.iter().zip(&frozen) {
            let size = volume(folder, name, shape)?;
            // Each process's stretch has the same length, so the last one may be filled up.
            if list.len() >= size.saturating_add(processes) {
                return Err(wrong_shape(folder, name, shape, &format!("{} elements in its parts", list.len())));
            }
            self.add_cut(folder, name, shape, list.cut(0..size, 0))?;
        }
        Ok(())
    }

    /// Checks that a tensor of the whole module has the shape by which the optimizer's lists were cut.
    fn check_shape(&self, path: &Path, name: &str, found: &[usize]) -> Result<()> {
        match self.cut.get(name) {
            Some((shape, _)) if shape != found => {
                Err(wrong_shape(path, name, shape, &format!("the shape {found:?} in `module`")))
            }
            _ => Ok(()),
        }
    }

    /// Adds the tensors of the module that are not there yet. Those of a module in parts are empty.
    ///
    /// # Errors
    /// [`Error::Damaged`], and [`Error::Unexpected`] for entries that are not tensors.
    pub(super) fn add_module(
        &mut self,
        module: ModuleState,
        is_in_parts: bool,
        leave_out: &NamePatterns,
    ) -> Result<()> {
        let id = module.entry("module").ok_or_else(|| {
            let why = "it has no weights of a module, as those of a pipeline are in other files: save the whole model \
                       in the training, and average that";
            Error::unexpected(&module.file.path, why)
        })?;
        let entries = read_entries(&module.file, id, true, leave_out)?;
        if !is_in_parts {
            for (name, tensor) in &entries.tensors {
                self.check_shape(&module.file.path, name, &tensor.shape)?;
            }
        }
        self.left_out.extend(entries.left_out);
        self.nones = entries.nones;
        self.aliases = module.aliases();
        // Tied names have the elements of the name that was put together.
        let is_tied =
            |name: &str| self.aliases.iter().any(|(alias, kept)| alias == name && self.cut.contains_key(kept));
        for (name, tensor) in entries.tensors {
            if !self.cut.contains_key(&name) && !is_tied(&name) {
                self.whole.insert(name, (self.maps.len(), tensor));
            }
        }
        let PickledFile { map, .. } = module.file;
        self.maps.push(map);
        Ok(())
    }

    /// Puts the tensors together. Returns them, and the names of those that were left out.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a tensor whose parts do not cover it.
    pub(super) fn finish(self, folder: &Path, leave_out: &NamePatterns) -> Result<(TensorFile, Vec<String>)> {
        let Assembly { maps, cut, whole, aliases, mut left_out, .. } = self;
        let maps = Arc::new(maps);
        let mut tensors = BTreeMap::new();
        for (name, (file, tensor)) in whole {
            tensors.insert(name, TiledTensor::whole(tensor, file, &maps));
        }
        for (name, (shape, parts)) in cut {
            let grid = vec![volume(folder, &name, &shape)?];
            let wrong = |why| Error::damaged(folder, format!("the parts of tensor `{name}` {why}"));
            let tensor = TiledTensor::new(shape, grid, parts, &maps).map_err(wrong)?;
            tensors.insert(name, tensor);
        }
        for (alias, name) in aliases {
            if let Some(tensor) = tensors.get(&name).cloned() {
                tensors.entry(alias).or_insert(tensor);
            }
        }
        left_out.extend(tensors.keys().filter(|name| leave_out.contains(name)).cloned());
        tensors.retain(|name, _| !left_out.contains(name));
        let file = TensorFile { path: folder.to_owned(), maps, tensors };
        check_growth(&file)?;
        Ok((file, left_out.into_iter().collect()))
    }

    fn add_cut(&mut self, path: &Path, name: &str, shape: &[usize], parts: Option<Vec<TensorPart>>) -> Result<()> {
        let parts = parts.ok_or_else(|| {
            Error::damaged(path, format!("tensor `{name}` of shape {shape:?} leads out of the processes' parts"))
        })?;
        match self.cut.insert(name.to_owned(), (shape.to_vec(), parts)) {
            Some(_) => Err(Error::damaged(path, format!("tensor `{name}` is in two groups of the optimizer"))),
            None => Ok(()),
        }
    }
}

/// Adds a tensor of a file to a list.
fn push(list: &mut FlatList, file: usize, tensor: PickledTensor, path: &Path) -> Result<()> {
    list.push(file, tensor).ok_or_else(|| Error::damaged(path, "its part of the weights is not a list of elements"))
}

fn wrong_size(path: &Path, wanted: usize, found: usize) -> Error {
    let why = format!(
        "the parameters have {wanted} elements in it, but its lists {found}: the files are of different checkpoints"
    );
    Error::damaged(path, why)
}

fn wrong_shape(path: &Path, name: &str, listed: &[usize], found: &str) -> Error {
    let why = format!(
        "parameter `{name}` has the shape {listed:?} in the list of shapes, but {found}: the files are of different \
         saves; copy all files of one save, or save again"
    );
    Error::unexpected(path, why)
}

/// Returns the number of elements of a shape.
fn volume(path: &Path, name: &str, shape: &[usize]) -> Result<usize> {
    let product = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    product.ok_or_else(|| Error::damaged(path, format!("the shape {shape:?} of `{name}` is too large")))
}
