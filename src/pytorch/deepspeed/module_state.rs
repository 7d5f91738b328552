//! State of a module in the file of one process, and the shapes of its parameters.

use std::path::Path;

use crate::error::{Error, Result};
use crate::pytorch::file::PickledFile;
use crate::pytorch::pickle::NodeId;
use crate::pytorch::tensor::{NotRead, PickledTensor};

/// Names and shapes of parameters, in the order of their elements.
pub(super) type Parameters = Vec<(String, Vec<usize>)>;

/// File of one process whose pickle is parsed.
pub(super) struct ModuleState {
    pub file: PickledFile,
    /// Parameters of each group of the optimizer.
    pub groups: Vec<Parameters>,
}

impl ModuleState {
    /// Opens the file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Damaged`], and [`Error::Unexpected`] if the model is cut among several ranks.
    pub(super) fn open(path: &Path) -> Result<ModuleState> {
        let file = PickledFile::open(path)?;
        let mut state = ModuleState { file, groups: Vec::new() };
        let model_ranks = state.int("mp_world_size").unwrap_or(1);
        if model_ranks > 1 {
            let why = format!(
                "its model is cut among {model_ranks} model-parallel ranks, and only the training knows how: merge \
                 the ranks there, and average the whole models"
            );
            return Err(Error::unexpected(path, why));
        }
        if let Some(shapes) = state.entry("param_shapes") {
            let list = state.file.pickle.items(shapes).map(<[NodeId]>::to_vec);
            for dict in list.unwrap_or_else(|| vec![shapes]) {
                let group = state.shapes(dict)?;
                state.groups.push(group);
            }
        }
        Ok(state)
    }

    /// Returns an entry at the top level that is not None.
    pub(super) fn entry(&self, key: &str) -> Option<NodeId> {
        let pickle = &self.file.pickle;
        pickle.get(pickle.root(), key).filter(|id| !pickle.is_none(*id))
    }

    /// Returns an integer at the top level.
    pub(super) fn int(&self, key: &str) -> Option<i64> {
        self.file.pickle.int(self.entry(key)?)
    }

    /// Returns the names of tied parameters, each with the name that has the elements.
    pub(super) fn aliases(&self) -> Vec<(String, String)> {
        let pickle = &self.file.pickle;
        let entries = self.entry("shared_params").and_then(|dict| pickle.entries(dict)).unwrap_or_default();
        let text = |id: NodeId| pickle.text(id).map(str::to_owned);
        entries.iter().filter_map(|(alias, name)| Some((text(*alias)?, text(*name)?))).collect()
    }

    /// Returns the parameters that no optimizer has.
    pub(super) fn frozen(&self) -> Result<Parameters> {
        self.entry("frozen_param_shapes").map_or(Ok(Vec::new()), |dict| self.shapes(dict))
    }

    /// Returns this process's part of a frozen parameter.
    pub(super) fn frozen_part(&self, name: &str) -> Result<PickledTensor> {
        let part = self.entry("frozen_param_fragments").and_then(|dict| self.file.pickle.get(dict, name));
        let read = part.ok_or(NotRead::Other).and_then(|id| self.file.with_tensors(|tensors| tensors.read(id)));
        read.map_err(|_| Error::damaged(&self.file.path, format!("it has no part of the frozen parameter `{name}`")))
    }

    /// Reads a dict of shapes.
    fn shapes(&self, dict: NodeId) -> Result<Parameters> {
        let pickle = &self.file.pickle;
        let wrong = || Error::damaged(&self.file.path, "its shapes of parameters are not sizes by names");
        let mut shapes = Vec::new();
        if pickle.entries(dict).ok_or_else(wrong)?.iter().any(|(key, _)| pickle.text(*key).is_none()) {
            return Err(wrong());
        }
        for (name, shape) in pickle.named(dict) {
            shapes.push((name.to_owned(), pickle.sizes(shape).ok_or_else(wrong)?));
        }
        Ok(shapes)
    }
}
