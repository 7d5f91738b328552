//! Values and classes that the machine of a pickle knows.

use super::{Node, NodeId};

/// Nodes that every pickle begins with: values without parts, which are held once.
pub(super) fn singletons() -> Vec<Node> {
    vec![Node::None, Node::Bool(false), Node::Bool(true), Node::Number, Node::Tuple(Box::default())]
}
pub(super) const NONE: NodeId = NodeId(0);
pub(super) const FALSE: NodeId = NodeId(1);
pub(super) const TRUE: NodeId = NodeId(2);
pub(super) const NUMBER: NodeId = NodeId(3);
pub(super) const EMPTY: NodeId = NodeId(4);

/// Classes whose objects are dicts, and are pickled as an empty one that is filled.
pub(super) const DICTS: [&str; 4] =
    ["collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"];

/// Functions that make an object of the class that is their first argument.
pub(super) const RECONSTRUCTORS: [&str; 2] = ["copyreg._reconstructor", "copy_reg._reconstructor"];
