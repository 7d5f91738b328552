//! Pickles, parsed as data. Nothing that a pickle names is ever looked up, imported or called.
//!
//! A value is a node of an arena, and its parts are numbers of nodes. So a value that a pickle repeats by its memo is
//! held once, a value that contains itself does no harm, and nothing is nested when it is dropped.

mod known;
mod memory_budget;
mod opcodes;

pub(super) use memory_budget::MemoryBudget;

use std::collections::HashMap;
use std::ops::Range;

/// Number of a node in its pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NodeId(u32);

/// Value of a pickle.
#[derive(Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    /// Any other number: an integer of more than 64 bits, or a float after very many others.
    Number,
    Text(Box<str>),
    /// Place of some bytes in the file.
    Bytes(Range<usize>),
    /// Class or function, by its module and name: `torch._utils._rebuild_tensor_v2`.
    Class(Box<str>),
    Tuple(Box<[NodeId]>),
    /// List or set.
    List(Vec<NodeId>),
    /// Dict of any kind whose entries are pickled as those of one.
    Dict(Vec<(NodeId, NodeId)>),
    /// Reference to something outside the pickle. PyTorch stores the elements of tensors there.
    Persistent(NodeId),
    Object(Box<Object>),
}

/// Python object: a class that was made, or a function that was called.
#[derive(Debug)]
pub(super) struct Object {
    /// Class or function.
    pub class: NodeId,
    /// Arguments, mostly a tuple.
    pub arguments: NodeId,
    /// State that was set afterwards, mostly a dict of its attributes.
    pub state: Option<NodeId>,
    /// Entries, if the class is derived from dict.
    pub entries: Vec<(NodeId, NodeId)>,
}

/// Reason why a pickle cannot be parsed.
#[derive(Debug, PartialEq)]
pub(super) enum PickleError {
    /// It ends early, or is not a pickle.
    Invalid { at: usize, why: &'static str },
    /// Its values would take more memory than they may.
    TooLarge,
}

/// Parsed pickle.
#[derive(Debug)]
pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: NodeId,
}

impl Pickle {
    /// Parses the pickle at `at` in a file, and moves `at` behind it.
    ///
    /// # Errors
    /// [`PickleError`] for anything that is not a pickle, and as soon as the values take more than is left of `memory`.
    pub(super) fn parse(file: &[u8], at: &mut usize, memory: &mut MemoryBudget) -> Result<Pickle, PickleError> {
        opcodes::parse(file, at, memory).map(|(nodes, root)| Pickle { nodes, root })
    }

    pub(super) fn root(&self) -> NodeId {
        self.root
    }

    /// Iterates over all values, also those that lead to no other.
    pub(super) fn ids(&self) -> impl Iterator<Item = NodeId> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(super) fn text(&self, id: NodeId) -> Option<&str> {
        match self.node(id) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn int(&self, id: NodeId) -> Option<i64> {
        match self.node(id) {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns a number with a fraction, or a whole one.
    pub(super) fn float(&self, id: NodeId) -> Option<f64> {
        match self.node(id) {
            Node::Float(value) => Some(*value),
            Node::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// Returns the attributes of an object that was pickled with a dict of them, or the entries of a dict.
    pub(super) fn fields(&self, id: NodeId) -> Option<&[(NodeId, NodeId)]> {
        match self.node(id) {
            Node::Object(object) => object.state.map_or_else(|| self.entries(id), |state| self.entries(state)),
            _ => self.entries(id),
        }
    }

    /// Returns the items of a tuple or a list.
    pub(super) fn items(&self, id: NodeId) -> Option<&[NodeId]> {
        match self.node(id) {
            Node::Tuple(items) => Some(items),
            Node::List(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn is_none(&self, id: NodeId) -> bool {
        matches!(self.node(id), Node::None)
    }

    /// Returns a `torch.Size`, which is pickled as the call that makes it of a tuple, or any list of sizes.
    pub(super) fn sizes(&self, id: NodeId) -> Option<Vec<usize>> {
        let items = match self.call(id) {
            Some((_, [tuple])) => self.items(*tuple)?,
            _ => self.items(id)?,
        };
        items.iter().map(|&item| usize::try_from(self.int(item)?).ok()).collect()
    }

    /// Returns the entries of a dict, or of an object of a class that is derived from dict.
    pub(super) fn entries(&self, id: NodeId) -> Option<&[(NodeId, NodeId)]> {
        match self.node(id) {
            Node::Dict(entries) => Some(entries),
            Node::Object(object) if !object.entries.is_empty() => Some(&object.entries),
            _ => None,
        }
    }

    /// Lists the entries of a dict whose keys are texts. Of equal keys, the last counts, at the place of the first.
    pub(super) fn named(&self, dict: NodeId) -> Vec<(&str, NodeId)> {
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut named = Vec::new();
        for (key, value) in self.entries(dict).unwrap_or_default() {
            let Some(name) = self.text(*key) else { continue };
            let place = *places.entry(name).or_insert(named.len());
            if place == named.len() {
                named.push((name, *value));
            }
            named[place].1 = *value;
        }
        named
    }

    /// Returns the value of a text key in a dict. Of equal keys, the last counts.
    pub(super) fn get(&self, dict: NodeId, key: &str) -> Option<NodeId> {
        let mut entries = self.entries(dict)?.iter().rev();
        entries.find(|(name, _)| self.text(*name) == Some(key)).map(|(_, value)| *value)
    }

    /// Returns the name of the class or function that an object was made by, with its arguments.
    pub(super) fn call(&self, id: NodeId) -> Option<(&str, &[NodeId])> {
        let Node::Object(object) = self.node(id) else { return None };
        Some((self.class(object.class)?, self.items(object.arguments).unwrap_or_default()))
    }

    /// Returns an attribute of an object that was pickled with a dict of them.
    pub(super) fn attribute(&self, id: NodeId, name: &str) -> Option<NodeId> {
        self.get(self.state(id)?, name)
    }

    /// Returns the state that was set after an object was made.
    pub(super) fn state(&self, id: NodeId) -> Option<NodeId> {
        let Node::Object(object) = self.node(id) else { return None };
        object.state
    }

    pub(super) fn class(&self, id: NodeId) -> Option<&str> {
        match self.node(id) {
            Node::Class(name) => Some(name),
            _ => None,
        }
    }

    /// Iterates over the references to what is outside the pickle.
    pub(super) fn references(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.iter().filter_map(|node| match node {
            Node::Persistent(id) => Some(*id),
            _ => None,
        })
    }
}
