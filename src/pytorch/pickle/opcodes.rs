//! The machine that a pickle is a program of: every opcode of the protocols 0 to 5.
//!
//! The opcodes are those of Python's `pickletools`. A call makes an object that holds the function and its arguments.

use std::collections::HashMap;

use super::known::{DICTS, EMPTY, FALSE, NONE, NUMBER, RECONSTRUCTORS, TRUE, singletons};
use super::{MemoryBudget, Node, NodeId, Object, PickleError};

/// Bytes of an allocation beside its contents.
const ALLOCATION: usize = 16;

/// Sizes for each element of an array that grows by doubling: one old, and two new while it moves.
const GROWTH: usize = 3;

/// Bytes of a slot of the stack or of a list, of an open mark, and of a slot of a hash table.
const SLOT: usize = GROWTH * size_of::<NodeId>();
const MARK: usize = GROWTH * size_of::<usize>();
const MEMO_SLOT: usize = 40;

/// Most floats that keep their values. Lists of very many are beside the model.
const MOST_FLOATS: usize = 1 << 16;

type Step<T = ()> = Result<T, PickleError>;

/// Runs the pickle at `at`. Returns its nodes and the value that it ends with.
pub(super) fn parse(file: &[u8], at: &mut usize, memory: &mut MemoryBudget) -> Step<(Vec<Node>, NodeId)> {
    let mut machine = Machine {
        file,
        at: *at,
        memory,
        nodes: singletons(),
        ints: HashMap::new(),
        floats: HashMap::new(),
        classes: HashMap::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    while machine.step()? {}
    let root = machine.pop()?;
    *at = machine.at;
    Ok((machine.nodes, root))
}

struct Machine<'a> {
    file: &'a [u8],
    at: usize,
    memory: &'a mut MemoryBudget,
    nodes: Vec<Node>,
    /// Integers of 16 bits that have a node, which every use of them shares.
    ints: HashMap<u16, NodeId>,
    /// Floats that have a node, by their bits.
    floats: HashMap<u64, NodeId>,
    /// Classes that have a node, by module and name.
    classes: HashMap<Box<str>, NodeId>,
    stack: Vec<NodeId>,
    /// Heights of the stack at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, NodeId>,
}

impl<'a> Machine<'a> {
    /// Runs one opcode. Returns false after the last.
    fn step(&mut self) -> Step<bool> {
        let code = self.number(1)? as u8;
        match code {
            b'.' => return Ok(false),
            // Protocol, frame, and a mark of buffers that may not be changed.
            0x80 => drop(self.bytes(1)?),
            0x95 => drop(self.bytes(8)?),
            0x98 => {}
            b'(' => {
                self.memory.take(MARK)?;
                self.marks.push(self.stack.len());
            }
            b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.push(top)?;
            }
            b'g' | b'h' | b'j' | b'p' | b'q' | b'r' | 0x94 => self.memo(code)?,
            b'a' | b'e' | 0x90 => self.append(code)?,
            b's' | b'u' => self.set_items(code)?,
            b'b' => self.build()?,
            _ => {
                let id = match self.scalar(code)? {
                    Some(id) => id,
                    None => self.composite(code)?,
                };
                self.push(id)?;
            }
        }
        Ok(true)
    }

    /// Makes a value without parts. Returns `None` for any other opcode.
    fn scalar(&mut self, code: u8) -> Step<Option<NodeId>> {
        Ok(Some(match code {
            b'N' => NONE,
            0x88 => TRUE,
            0x89 => FALSE,
            b'F' => {
                let line = self.line()?;
                self.float(std::str::from_utf8(line).ok().and_then(|line| line.parse().ok()))?
            }
            b'G' => self.number(8).and_then(|bits| self.float(Some(f64::from_bits(bits.swap_bytes()))))?,
            b'I' | b'L' => {
                let line = self.line()?;
                match (code, line) {
                    (b'I', b"00") => FALSE,
                    (b'I', b"01") => TRUE,
                    _ => self.decimal(line)?,
                }
            }
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.int(value.into())?
            }
            b'K' | b'M' => {
                let value = self.number(if code == b'K' { 1 } else { 2 })?;
                self.int(value as i64)?
            }
            0x8a | 0x8b => self.long(if code == 0x8a { 1 } else { 4 })?,
            b'S' => {
                let line = self.line()?;
                let quoted = line.len() >= 2 && line[0] == line[line.len() - 1];
                self.text(if quoted { &line[1..line.len() - 1] } else { line })?
            }
            b'V' => {
                let line = self.line()?;
                self.text(unescape(line).as_bytes())?
            }
            b'U' | 0x8c => self.sized(1).and_then(|text| self.text(text))?,
            b'T' | b'X' => self.sized(4).and_then(|text| self.text(text))?,
            0x8d => self.sized(8).and_then(|text| self.text(text))?,
            b'C' => self.place(1)?,
            b'B' => self.place(4)?,
            0x8e | 0x96 => self.place(8)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.class(&String::from_utf8_lossy(module), &String::from_utf8_lossy(name))?
            }
            _ => return Ok(None),
        }))
    }

    /// Makes a value of others.
    fn composite(&mut self, code: u8) -> Step<NodeId> {
        match code {
            b')' => Ok(EMPTY),
            b't' => self.pop_to_mark().and_then(|items| self.tuple(items)),
            0x85..=0x87 => {
                let mut items = Vec::with_capacity(3);
                for _ in 0x84..code {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.tuple(items)
            }
            b']' | 0x8f => self.list(Vec::new()),
            b'l' | 0x91 => self.pop_to_mark().and_then(|items| self.list(items)),
            b'}' => self.dict(Vec::new()),
            b'd' => {
                let items = self.pop_to_mark()?;
                let entries = self.pairs(&items)?;
                self.dict(entries)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.nodes[module.0 as usize], &self.nodes[name.0 as usize]) {
                    (Node::Text(module), Node::Text(name)) => {
                        let (module, name) = (module.clone(), name.clone());
                        self.class(&module, &name)
                    }
                    _ => Err(self.invalid("a class is not named by texts")),
                }
            }
            b'P' => {
                let line = self.line()?;
                let id = self.text(line)?;
                self.add(Node::Persistent(id), 0)
            }
            b'Q' => self.pop().and_then(|id| self.add(Node::Persistent(id), 0)),
            b'R' | 0x81 => {
                let (arguments, class) = (self.pop()?, self.pop()?);
                self.call(class, arguments)
            }
            0x92 => {
                let (_named, arguments, class) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(class, arguments)
            }
            b'i' | b'o' => self.instance(code),
            // Extension codes name classes by numbers of a registry that no file holds.
            0x82..=0x84 => {
                self.bytes(1 << (code - 0x82))?;
                self.class("copyreg", "extension")
            }
            _ => Err(self.invalid("an unknown opcode")),
        }
    }

    /// Makes an object of a class that comes before its arguments, as protocols 0 and 1 pickle it.
    fn instance(&mut self, code: u8) -> Step<NodeId> {
        let named = match code {
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                Some(self.class(&String::from_utf8_lossy(module), &String::from_utf8_lossy(name))?)
            }
            _ => None,
        };
        let mut items = self.pop_to_mark()?;
        let class = match named {
            Some(class) => class,
            None if items.is_empty() => return Err(self.invalid("an object has no class")),
            None => items.remove(0),
        };
        let arguments = self.tuple(items)?;
        self.call(class, arguments)
    }

    /// Makes an object, or the dict that it is.
    fn call(&mut self, class: NodeId, arguments: NodeId) -> Step<NodeId> {
        let name = match &self.nodes[class.0 as usize] {
            Node::Class(name) => &**name,
            _ => "",
        };
        if DICTS.contains(&name) {
            let entries = self.entries_of_argument(arguments)?;
            return self.dict(entries);
        }
        let made = match &self.nodes[arguments.0 as usize] {
            Node::Tuple(items) if RECONSTRUCTORS.contains(&name) => items.first().copied(),
            _ => None,
        };
        let object = Object { class: made.unwrap_or(class), arguments, state: None, entries: Vec::new() };
        self.add(Node::Object(Box::new(object)), size_of::<Object>() + ALLOCATION)
    }

    /// Returns the entries of a dict that is made of a list of pairs, as Python 2 pickles an ordered one.
    fn entries_of_argument(&mut self, arguments: NodeId) -> Step<Vec<(NodeId, NodeId)>> {
        let items = |id: NodeId| match &self.nodes[id.0 as usize] {
            Node::Tuple(items) => &items[..],
            Node::List(items) => &items[..],
            _ => &[],
        };
        let Some(&pairs) = items(arguments).first() else { return Ok(Vec::new()) };
        let entries: Vec<_> =
            items(pairs).iter().filter_map(|&pair| items(pair).first_chunk::<2>().map(|&[k, v]| (k, v))).collect();
        self.memory.take(2 * SLOT * entries.len())?;
        Ok(entries)
    }

    /// Appends to a list. What is appended to an object is not kept.
    fn append(&mut self, code: u8) -> Step {
        let items = if code == b'a' { vec![self.pop()?] } else { self.pop_to_mark()? };
        let list = self.top()?;
        self.memory.take(SLOT * items.len())?;
        if let Node::List(list) = &mut self.nodes[list.0 as usize] {
            list.extend(items);
        }
        Ok(())
    }

    fn set_items(&mut self, code: u8) -> Step {
        let mut items = Vec::new();
        if code == b's' {
            items = vec![self.pop()?, self.pop()?];
            items.reverse();
        } else {
            items.extend(self.pop_to_mark()?);
        }
        let new = self.pairs(&items)?;
        let dict = self.top()?;
        match &mut self.nodes[dict.0 as usize] {
            Node::Dict(entries) => entries.extend(new),
            Node::Object(object) => object.entries.extend(new),
            _ => return Err(self.invalid("entries of a value that has none")),
        }
        Ok(())
    }

    /// Sets the state of an object. Attributes of a dict are not kept.
    fn build(&mut self) -> Step {
        let state = self.pop()?;
        let object = self.top()?;
        if let Node::Object(object) = &mut self.nodes[object.0 as usize] {
            object.state = Some(state);
        }
        Ok(())
    }

    /// Puts the top of the stack into the memo, or a value of it on the stack.
    fn memo(&mut self, code: u8) -> Step {
        let index = match code {
            b'g' | b'p' => {
                let line = self.line()?;
                std::str::from_utf8(line).ok().and_then(|line| line.parse().ok()).unwrap_or(u64::MAX)
            }
            b'h' | b'q' => self.number(1)?,
            b'j' | b'r' => self.number(4)?,
            _ => self.memo.len() as u64,
        };
        let index = u32::try_from(index).map_err(|_| self.invalid("a memo of no number"))?;
        if matches!(code, b'g' | b'h' | b'j') {
            let id = *self.memo.get(&index).ok_or_else(|| self.invalid("an empty memo"))?;
            return self.push(id);
        }
        let top = self.top()?;
        self.memory.take(MEMO_SLOT)?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn add(&mut self, node: Node, bytes: usize) -> Step<NodeId> {
        self.memory.take(GROWTH * size_of::<Node>() + bytes)?;
        let id = u32::try_from(self.nodes.len()).map_err(|_| PickleError::TooLarge)?;
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    /// Makes a float. Equal ones share a node; after very many, others have no value.
    fn float(&mut self, value: Option<f64>) -> Step<NodeId> {
        let Some(value) = value else { return Ok(NUMBER) };
        if let Some(id) = self.floats.get(&value.to_bits()) {
            return Ok(*id);
        }
        if self.floats.len() >= MOST_FLOATS {
            return Ok(NUMBER);
        }
        let id = self.add(Node::Float(value), MEMO_SLOT)?;
        self.floats.insert(value.to_bits(), id);
        Ok(id)
    }

    fn int(&mut self, value: i64) -> Step<NodeId> {
        let small = u16::try_from(value).ok();
        if let Some(id) = small.and_then(|value| self.ints.get(&value)) {
            return Ok(*id);
        }
        let id = self.add(Node::Int(value), if small.is_some() { MEMO_SLOT } else { 0 })?;
        if let Some(value) = small {
            self.ints.insert(value, id);
        }
        Ok(id)
    }

    /// Makes an integer of decimal digits, which may end in `L`.
    fn decimal(&mut self, line: &[u8]) -> Step<NodeId> {
        let digits = line.strip_suffix(b"L").unwrap_or(line);
        match std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()) {
            Some(value) => self.int(value),
            None => Ok(NUMBER),
        }
    }

    /// Makes an integer of as many bytes as the number of `width` bytes before it says, in two's complement.
    fn long(&mut self, width: usize) -> Step<NodeId> {
        let bytes = self.sized(width)?;
        if bytes.len() > 8 {
            return Ok(NUMBER);
        }
        let is_negative = bytes.last().is_some_and(|&last| last >= 0x80);
        let mut whole = [if is_negative { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        self.int(i64::from_le_bytes(whole))
    }

    fn text(&mut self, text: &[u8]) -> Step<NodeId> {
        // A text that is not UTF-8 grows as its replacement is made.
        self.memory.take(3 * text.len() + ALLOCATION)?;
        let text = String::from_utf8_lossy(text).into_owned().into_boxed_str();
        self.add(Node::Text(text), 0)
    }

    fn class(&mut self, module: &str, name: &str) -> Step<NodeId> {
        let full = [module, ".", name].concat().into_boxed_str();
        if let Some(id) = self.classes.get(&full) {
            return Ok(*id);
        }
        let id = self.add(Node::Class(full.clone()), 2 * (full.len() + ALLOCATION) + MEMO_SLOT)?;
        self.classes.insert(full, id);
        Ok(id)
    }

    fn place(&mut self, width: usize) -> Step<NodeId> {
        let length = self.sized(width)?.len();
        self.add(Node::Bytes(self.at - length..self.at), 0)
    }

    fn tuple(&mut self, items: Vec<NodeId>) -> Step<NodeId> {
        let bytes = if items.is_empty() { 0 } else { ALLOCATION + items.len() * size_of::<NodeId>() };
        self.add(Node::Tuple(items.into_boxed_slice()), bytes)
    }

    fn list(&mut self, items: Vec<NodeId>) -> Step<NodeId> {
        let bytes = ALLOCATION + items.len() * SLOT;
        self.add(Node::List(items), bytes)
    }

    fn dict(&mut self, entries: Vec<(NodeId, NodeId)>) -> Step<NodeId> {
        self.add(Node::Dict(entries), ALLOCATION)
    }

    /// Pairs keys with values.
    fn pairs(&mut self, items: &[NodeId]) -> Step<Vec<(NodeId, NodeId)>> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(self.invalid("a key without a value"));
        }
        self.memory.take(SLOT * items.len())?;
        Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
    }

    fn push(&mut self, id: NodeId) -> Step {
        if self.stack.len() == self.stack.capacity() {
            self.memory.take(SLOT * self.stack.len().max(4))?;
        }
        self.stack.push(id);
        Ok(())
    }

    fn top(&self) -> Step<NodeId> {
        let above_mark = self.stack.len() > self.marks.last().copied().unwrap_or(0);
        self.stack.last().filter(|_| above_mark).copied().ok_or_else(|| self.invalid("a value is missing"))
    }

    fn pop(&mut self) -> Step<NodeId> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Step<Vec<NodeId>> {
        let mark = self.marks.pop().ok_or_else(|| self.invalid("a mark is missing"))?;
        Ok(self.stack.split_off(mark))
    }

    fn invalid(&self, why: &'static str) -> PickleError {
        PickleError::Invalid { at: self.at, why }
    }

    fn bytes(&mut self, length: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(length);
        let bytes = end.and_then(|end| self.file.get(self.at..end)).ok_or_else(|| self.invalid("it ends early"))?;
        self.at += length;
        Ok(bytes)
    }

    /// Reads a little-endian number of up to eight bytes.
    fn number(&mut self, width: usize) -> Step<u64> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(self.bytes(width)?);
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads bytes after their length, a number of `width` bytes.
    fn sized(&mut self, width: usize) -> Step<&'a [u8]> {
        let length = self.number(width)?;
        let length = usize::try_from(length).map_err(|_| self.invalid("it ends early"))?;
        self.bytes(length)
    }

    /// Reads up to the end of the line, which is left out.
    fn line(&mut self) -> Step<&'a [u8]> {
        let rest = &self.file[self.at.min(self.file.len())..];
        let length = rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| self.invalid("it ends early"))?;
        self.at += length + 1;
        Ok(&rest[..length])
    }
}

/// Decodes a text of Python's raw-unicode-escape: Latin-1, with `\uXXXX` and `\UXXXXXXXX` for other letters.
fn unescape(line: &[u8]) -> String {
    let mut text = String::with_capacity(line.len());
    let mut rest = line;
    while let [byte, after @ ..] = rest {
        let digits = match (byte, after.first()) {
            (b'\\', Some(b'u')) => after.get(1..5),
            (b'\\', Some(b'U')) => after.get(1..9),
            _ => None,
        };
        let code = digits.and_then(|digits| u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match (code.and_then(char::from_u32), digits) {
            (Some(letter), Some(digits)) => {
                text.push(letter);
                rest = &after[1 + digits.len()..];
            }
            _ => {
                text.push(char::from(*byte));
                rest = after;
            }
        }
    }
    text
}
