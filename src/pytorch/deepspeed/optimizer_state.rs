//! State of one process's part of an optimizer: its stretches of the weights in f32.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::fs::Mapping;
use crate::pytorch::file::PickledFile;
use crate::pytorch::pickle::{NodeId, Pickle};
use crate::pytorch::tensor::PickledTensor;

/// Entries of the state with the weights: up to stage 2, and of stage 3.
const GROUPS: [&str; 2] = ["single_partition_of_fp32_groups", "fp32_flat_groups"];

/// Stage in which the module is in parts too.
const PARTS_STAGE: i64 = 3;

/// Part of one process.
pub(super) struct OptimizerState {
    pub path: PathBuf,
    pub map: Mapping,
    /// True if each process has a stretch of every parameter.
    pub is_of_parts: bool,
    /// Number of processes among which the weights are cut.
    pub processes: usize,
    /// List of elements of each group.
    pub groups: Vec<PickledTensor>,
    /// Elements after each parameter of each group that belong to none; empty if there are none.
    pub paddings: Vec<Vec<usize>>,
}

impl OptimizerState {
    /// Opens the file of one process.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Damaged`] if it is not the state of such an optimizer.
    pub(super) fn open(path: &Path) -> Result<OptimizerState> {
        let file = PickledFile::open(path)?;
        let pickle = &file.pickle;
        let damaged = |why: &str| Error::damaged(path, why);
        let state = pickle.get(pickle.root(), "optimizer_state_dict");
        let entry = |key: &str| pickle.get(state?, key);
        let stage = entry("zero_stage").and_then(|id| whole(pickle, id));
        let stage = stage.ok_or_else(|| damaged("it names no stage of ZeRO, as the state of its optimizer does"))?;
        let is_of_parts = stage >= PARTS_STAGE;
        let key = GROUPS[usize::from(is_of_parts)];
        let list = entry(key).and_then(|id| pickle.items(id));
        let mut groups = Vec::new();
        for &id in list.ok_or_else(|| damaged(&format!("it has no list `{key}`")))? {
            let read = file.with_tensors(|tensors| tensors.read(id));
            groups.push(read.map_err(|_| damaged(&format!("an entry of `{key}` is not a tensor")))?);
        }
        let processes = entry("partition_count").and_then(|id| largest(pickle, id));
        let processes = processes.ok_or_else(|| damaged("it has no `partition_count`, the number of processes"))?;
        let mut paddings = Vec::new();
        let lists = entry("param_alignment_paddings").filter(|id| !pickle.is_none(*id));
        for &group in lists.and_then(|id| pickle.items(id)).unwrap_or_default() {
            let wrong = || damaged("its `param_alignment_paddings` are not lists of sizes");
            paddings.push(pickle.sizes(group).ok_or_else(wrong)?);
        }
        let PickledFile { path, map, .. } = file;
        Ok(OptimizerState { path, map, is_of_parts, processes, groups, paddings })
    }
}

/// Returns a whole number, or that of an enumeration's value.
fn whole(pickle: &Pickle, id: NodeId) -> Option<i64> {
    match pickle.call(id) {
        Some((_, [value])) => pickle.int(*value),
        _ => pickle.int(id),
    }
}

/// Returns a number of processes, or the largest of a list of them.
fn largest(pickle: &Pickle, id: NodeId) -> Option<usize> {
    let numbers = match pickle.items(id) {
        Some(_) => pickle.sizes(id)?,
        None => vec![pickle.int(id)?.try_into().ok()?],
    };
    numbers.into_iter().max()
}
