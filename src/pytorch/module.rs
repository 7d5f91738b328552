//! Models that were pickled whole, read as the state dict that they would give.

use super::pickle::{MemoryBudget, Node, NodeId, Pickle, PickleError};

/// Most modules within each other.
const MAX_DEPTH: usize = 200;

/// Returns true for an object that is a module of PyTorch.
pub(super) fn is_module(pickle: &Pickle, id: NodeId) -> bool {
    attributes(pickle, id).is_some()
}

/// Returns the attributes of a module.
fn attributes(pickle: &Pickle, id: NodeId) -> Option<NodeId> {
    let Node::Object(object) = pickle.node(id) else { return None };
    let is_module =
        |id: &NodeId| ["_parameters", "_buffers", "_modules"].iter().all(|key| pickle.get(*id, key).is_some());
    // An object with slots has a pair of states. An object that a function makes may get its attributes as `state`.
    let mut candidates: Vec<NodeId> = Vec::new();
    if let Some(state) = object.state {
        candidates.push(state);
        candidates.extend(pickle.items(state).and_then(|pair| pair.first()));
    }
    if let Some(first) = pickle.items(object.arguments).and_then(|arguments| arguments.first()) {
        candidates.extend(pickle.get(*first, "state"));
    }
    candidates.into_iter().find(|id| is_module(id))
}

/// Lists the entries of a module's state dict: its parameters, its persistent buffers, then those of its modules.
///
/// # Errors
/// [`PickleError::TooLarge`] if the names take more than is left of `memory`, as those of modules that hold each other.
pub(super) fn state_dict(
    pickle: &Pickle,
    module: NodeId,
    memory: &mut MemoryBudget,
) -> Result<Vec<(String, NodeId)>, PickleError> {
    let mut entries = Vec::new();
    collect(pickle, module, "", &mut entries, memory, 0)?;
    Ok(entries)
}

fn collect(
    pickle: &Pickle,
    module: NodeId,
    prefix: &str,
    entries: &mut Vec<(String, NodeId)>,
    memory: &mut MemoryBudget,
    depth: usize,
) -> Result<(), PickleError> {
    let Some(attributes) = attributes(pickle, module) else { return Ok(()) };
    if depth > MAX_DEPTH {
        return Err(PickleError::TooLarge);
    }
    let named = |key: &str| pickle.get(attributes, key).map(|dict| pickle.named(dict)).unwrap_or_default();
    let is_none = |id: NodeId| matches!(pickle.node(id), Node::None);
    let skipped =
        pickle.get(attributes, "_non_persistent_buffers_set").map(|set| texts(pickle, set)).unwrap_or_default();
    let buffers = named("_buffers").into_iter().filter(|(name, _)| !skipped.contains(name));
    for (name, value) in named("_parameters").into_iter().chain(buffers).filter(|(_, value)| !is_none(*value)) {
        memory.take(prefix.len() + name.len() + size_of::<(String, NodeId)>())?;
        entries.push((format!("{prefix}{name}"), value));
    }
    for (name, inner) in named("_modules") {
        memory.take(2 * (prefix.len() + name.len()) + size_of::<String>())?;
        collect(pickle, inner, &format!("{prefix}{name}."), entries, memory, depth + 1)?;
    }
    Ok(())
}

/// Returns the texts of a set, which is pickled as one or as the call that makes it of a list.
fn texts(pickle: &Pickle, set: NodeId) -> Vec<&str> {
    let items = match pickle.call(set) {
        Some((_, [list, ..])) => pickle.items(*list),
        _ => pickle.items(set),
    };
    items.unwrap_or_default().iter().filter_map(|&item| pickle.text(item)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let entries: Vec<u8> = entries.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
        [b"}(", &entries[..], b"u"].concat()
    }

    /// Returns a pickled module, less the end of the pickle.
    fn module(parameters: &[(&str, Vec<u8>)], modules: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let parts = [("_parameters", dict(parameters)), ("_buffers", dict(&[])), ("_modules", dict(modules))];
        [b"cnn\nNet\n)\x81", &dict(&parts)[..], b"b"].concat()
    }

    /// Python's dict has one value for a key. The module that was replaced has no parameters of its own left.
    #[test]
    fn last_of_equal_names_replaces_a_module() {
        let int = |value: u8| vec![b'K', value];
        let first = module(&[("w", int(1)), ("b", int(2))], &[]);
        let last = module(&[("w", int(3)), ("w", int(4))], &[]);
        let pickled = [module(&[], &[("0", first), ("0", last)]), b".".to_vec()].concat();
        let pickle = Pickle::parse(&pickled, &mut 0, &mut MemoryBudget::new(1 << 20)).unwrap();
        let entries = state_dict(&pickle, pickle.root(), &mut MemoryBudget::new(1 << 20)).unwrap();
        let found: Vec<_> = entries.iter().map(|(name, id)| (name.as_str(), pickle.int(*id))).collect();
        assert_eq!(found, [("0.w", Some(4))]);
    }
}
