//! Bound on the memory that a pickle takes once it is parsed, found without parsing it.
//!
//! The parser keeps every value at full size and copies whatever it memorizes, so a byte of a pickle can cost hundreds.
//! The walk follows the opcodes and counts, from above, the bytes that the parser holds. It ends where the parser does.

use std::collections::HashMap;
use std::io::{self, BufRead};

/// Bytes of a value on the parser's stack: a slot, its growth, and a copy while a container takes it.
const STACK_SLOT: u64 = 352;

/// Bytes of an open mark.
const MARK: u64 = 24;

/// Bytes of a value in a tuple.
const TUPLE_SLOT: u64 = 88;

/// Bytes of a value in a list, which grows by doubling from four.
const LIST_SLOT: u64 = 150;

/// Bytes of a slot of a dict, with its converted form.
const DICT_SLOT: u64 = 178;

/// Bytes of a slot of the parser's memo, while it grows.
const MEMO_SLOT: u64 = 146;

/// Bytes of an allocation beside its contents.
const ALLOCATION: u64 = 32;

/// Bytes of a tensor beside its shape and strides. The parser makes it twice.
const TENSOR: u64 = 640;

/// Bytes of a reference to a storage.
const STORAGE: u64 = 300;

/// Number of copies of a tensor's full name.
const NAMES: u64 = 3;

/// Bytes that the parser holds.
#[derive(Clone, Copy, Default)]
pub(super) struct Held {
    /// Bytes of values.
    pub values: u64,
    /// Bytes of the copies that it memorizes.
    pub copies: u64,
}

/// Container of values.
#[derive(Clone, Copy, PartialEq)]
enum Container {
    Tuple,
    List,
    Dict,
}

impl Container {
    /// Bytes of a container with this number of values. Those of a dict are its keys and values in turn.
    fn bytes(self, items: u32) -> u64 {
        let items = u64::from(items);
        ALLOCATION
            + match self {
                Container::Tuple => items * TUPLE_SLOT,
                Container::List => items.next_power_of_two().max(4) * LIST_SLOT,
                Container::Dict => slots(items.div_ceil(2)) * DICT_SLOT,
            }
    }
}

/// Role of a value in the call that makes a tensor.
#[derive(Clone, Copy, PartialEq)]
enum ValueRole {
    Plain,
    Storage,
    Tensor,
    /// Tuple that begins with a storage: the arguments that make a tensor.
    OfStorage,
    /// Tuple that begins with a tensor: the arguments that make a parameter.
    OfTensor,
}

#[derive(Clone, Copy)]
struct CountedValue {
    /// Bytes outside its slot.
    heap: u64,
    items: u32,
    /// Number of tensors in it, at any depth.
    tensors: u32,
    memo: Option<u32>,
    kind: ValueRole,
}

impl CountedValue {
    fn plain(heap: u64) -> CountedValue {
        CountedValue { heap, items: 0, tensors: 0, memo: None, kind: ValueRole::Plain }
    }
}

/// Reason why the walk ends.
enum WalkEnd {
    /// The pickle is complete.
    Complete,
    /// The parser refuses the pickle here.
    Refused,
    Io(io::Error),
}

impl From<io::Error> for WalkEnd {
    fn from(error: io::Error) -> WalkEnd {
        if error.kind() == io::ErrorKind::UnexpectedEof { WalkEnd::Refused } else { WalkEnd::Io(error) }
    }
}

type Step<T = ()> = Result<T, WalkEnd>;

struct PickleWalk<'a, R> {
    reader: &'a mut R,
    held: &'a mut Held,
    stack: Vec<CountedValue>,
    /// Heights of the stack at each open mark. What is counted for a value keeps them within 32 bits.
    marks: Vec<u32>,
    memo: HashMap<u32, CountedValue>,
    deepest: usize,
    most_marks: usize,
}

/// Walks a pickle while what is held stays within `limit`. Returns true if the pickle is complete.
///
/// # Errors
/// Those of the reader, but for the end of its data.
pub(super) fn walk<R: BufRead>(reader: &mut R, held: &mut Held, limit: Held) -> io::Result<bool> {
    let (stack, marks, memo) = (Vec::new(), Vec::new(), HashMap::new());
    let mut walk = PickleWalk { reader, held, stack, marks, memo, deepest: 0, most_marks: 0 };
    loop {
        match walk.step() {
            Ok(()) if walk.held.values > limit.values || walk.held.copies > limit.copies => return Ok(false),
            Ok(()) => {}
            Err(WalkEnd::Complete) => return Ok(true),
            Err(WalkEnd::Refused) => return Ok(false),
            Err(WalkEnd::Io(error)) => return Err(error),
        }
    }
}

impl<R: BufRead> PickleWalk<'_, R> {
    /// Follows one opcode.
    fn step(&mut self) -> Step {
        let code = self.number(1)? as u8;
        match code {
            b'.' => return Err(WalkEnd::Complete),
            0x80 => self.skip(1)?,
            0x95 => self.skip(8)?,
            b'(' => self.mark(),
            b'0' => self.discard()?,
            b'1' => drop(self.take()?),
            b'2' => self.top().map(|top| self.push(top))?,
            b'g' | b'h' | b'j' | b'p' | b'q' | b'r' | 0x94 => self.memorize(code)?,
            _ => match self.scalar(code)? {
                Some(value) => self.push(value),
                None => self.contain(code)?,
            },
        }
        Ok(())
    }

    /// Reads a value without parts. Returns `None` for any other opcode.
    fn scalar(&mut self, code: u8) -> Step<Option<CountedValue>> {
        let fixed = match code {
            b'N' | 0x88 | 0x89 | b')' | b']' | b'}' | 0x8f => 0,
            b'K' => 1,
            b'M' => 2,
            b'J' => 4,
            b'G' => 8,
            b'I' | b'L' | b'F' | b'V' => return Ok(Some(CountedValue::plain(self.line()?.0))),
            b'c' => return Ok(Some(CountedValue::plain(self.line()?.0 + self.line()?.0))),
            0x8a | b'U' | b'C' | 0x8c => return self.text(1).map(Some),
            0x8b | b'T' | b'X' | b'B' => return self.text(4).map(Some),
            0x8d | 0x8e | 0x96 => return self.text(8).map(Some),
            _ => return Ok(None),
        };
        self.skip(fixed)?;
        Ok(Some(CountedValue::plain(0)))
    }

    /// Follows an opcode that makes a value of others.
    fn contain(&mut self, code: u8) -> Step {
        match code {
            b't' => self.take().map(|values| self.push_tuple(&values))?,
            0x85..=0x87 => {
                let mut values = [CountedValue::plain(0); 3];
                let values = &mut values[..usize::from(code - 0x84)];
                for value in values.iter_mut().rev() {
                    *value = self.pop()?;
                }
                self.push_tuple(values);
            }
            b'l' | 0x91 => self.take().map(|values| self.extend(CountedValue::plain(0), &values, Container::List))?,
            b'd' => self.take().map(|values| self.extend(CountedValue::plain(0), &values, Container::Dict))?,
            b'a' => self.pop().and_then(|value| self.grow(&[value], Container::List))?,
            b'e' | 0x90 => self.take().and_then(|values| self.grow(&values, Container::List))?,
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.grow(&[key, value], Container::Dict)?;
            }
            b'u' => self.take().and_then(|values| self.grow(&values, Container::Dict))?,
            0x93 => {
                let heap = self.pop()?.heap + self.pop()?.heap;
                self.push(CountedValue::plain(heap));
            }
            b'Q' => {
                let heap = self.pop()?.heap;
                self.held.values += STORAGE;
                self.push(CountedValue { kind: ValueRole::Storage, tensors: 1, ..CountedValue::plain(heap) });
            }
            b'R' => self.call()?,
            0x81 => self.pop().and_then(|_| self.object())?,
            0x92 => self.pop().and_then(|_| self.pop()).and_then(|_| self.object())?,
            b'b' => self.build()?,
            _ => return Err(WalkEnd::Refused),
        }
        Ok(())
    }

    fn call(&mut self) -> Step {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let (heap, kind) = match arguments.kind {
            ValueRole::OfStorage => (TENSOR + arguments.heap / 3, ValueRole::Tensor),
            ValueRole::OfTensor => (arguments.heap, ValueRole::Tensor),
            _ => (2 * arguments.heap + function.heap, ValueRole::Plain),
        };
        self.push(CountedValue { kind, tensors: arguments.tensors, ..CountedValue::plain(heap) });
        Ok(())
    }

    /// Replaces a class by an object that the parser does not know.
    fn object(&mut self) -> Step {
        let class = self.pop()?;
        self.push(CountedValue::plain(class.heap));
        Ok(())
    }

    fn build(&mut self) -> Step {
        let state = self.pop()?;
        let object = self.pop()?;
        let items = object.items.saturating_add(state.items);
        let heap = object.heap + state.heap + Container::Dict.bytes(items);
        let tensors = object.tensors.saturating_add(state.tensors);
        let built = CountedValue { items, tensors, ..CountedValue::plain(heap) };
        if let Some(index) = object.memo {
            self.store(index, CountedValue { memo: object.memo, ..built });
        }
        self.push(built);
        Ok(())
    }

    fn push_tuple(&mut self, values: &[CountedValue]) {
        let kind = match values.first().map(|first| first.kind) {
            Some(ValueRole::Storage) => ValueRole::OfStorage,
            Some(ValueRole::Tensor) => ValueRole::OfTensor,
            _ => ValueRole::Plain,
        };
        self.extend(CountedValue { kind, ..CountedValue::plain(0) }, values, Container::Tuple);
    }

    /// Adds values to the container on top.
    fn grow(&mut self, values: &[CountedValue], shape: Container) -> Step {
        let container = self.pop()?;
        self.extend(container, values, shape);
        Ok(())
    }

    /// Pushes a container with values added to it.
    fn extend(&mut self, mut container: CountedValue, values: &[CountedValue], shape: Container) {
        let before = if container.items > 0 { shape.bytes(container.items) } else { 0 };
        container.items = container.items.saturating_add(values.len() as u32);
        container.heap += shape.bytes(container.items) - before;
        for (i, value) in values.iter().enumerate() {
            container.heap += value.heap;
            container.tensors = container.tensors.saturating_add(value.tensors);
            let key = if shape == Container::Dict && i % 2 == 1 { values[i - 1].heap } else { ALLOCATION };
            self.held.values += NAMES * u64::from(value.tensors) * key;
        }
        self.push(container);
    }

    fn mark(&mut self) {
        self.marks.push(self.stack.len() as u32);
        if self.marks.len() > self.most_marks {
            self.most_marks += 1;
            self.held.values += MARK;
        }
    }

    fn push(&mut self, value: CountedValue) {
        self.held.values += value.heap;
        self.stack.push(value);
        if self.stack.len() > self.deepest {
            self.deepest += 1;
            self.held.values += STACK_SLOT;
        }
    }

    fn is_mark_on_top(&self) -> bool {
        self.marks.last() == Some(&(self.stack.len() as u32))
    }

    fn top(&self) -> Step<CountedValue> {
        self.stack.last().filter(|_| !self.is_mark_on_top()).copied().ok_or(WalkEnd::Refused)
    }

    fn pop(&mut self) -> Step<CountedValue> {
        let value = self.top()?;
        self.stack.pop();
        self.held.values -= value.heap;
        Ok(value)
    }

    /// Removes a value or a mark.
    fn discard(&mut self) -> Step {
        if !self.is_mark_on_top() {
            return self.pop().map(drop);
        }
        self.marks.pop();
        Ok(())
    }

    /// Removes the values above the last mark, and the mark.
    fn take(&mut self) -> Step<Vec<CountedValue>> {
        let values = self.stack.split_off(self.marks.pop().ok_or(WalkEnd::Refused)? as usize);
        self.held.values -= values.iter().map(|value| value.heap).sum::<u64>();
        Ok(values)
    }

    /// Follows an opcode of the memo, all of which copy.
    fn memorize(&mut self, code: u8) -> Step {
        let index = match code {
            b'g' | b'p' => self.line()?.1,
            b'h' | b'q' => self.number(1)?,
            0x94 => self.memo.len() as u64,
            _ => self.number(4)?,
        };
        let index = u32::try_from(index).map_err(|_| WalkEnd::Refused)?;
        if matches!(code, b'g' | b'h' | b'j') {
            let value = *self.memo.get(&index).ok_or(WalkEnd::Refused)?;
            self.push(value);
        } else {
            let value = CountedValue { memo: Some(index), ..self.pop()? };
            self.push(value);
            self.store(index, value);
        }
        Ok(())
    }

    fn store(&mut self, index: u32, value: CountedValue) {
        let before = slots(self.memo.len() as u64);
        let replaced = self.memo.insert(index, value);
        self.held.copies += value.heap + MEMO_SLOT * (slots(self.memo.len() as u64) - before);
        self.held.copies -= replaced.map_or(0, |value| value.heap);
    }

    /// Reads a text or bytes after its length, a number of `width` bytes.
    fn text(&mut self, width: usize) -> Step<CountedValue> {
        let length = self.number(width)?;
        self.skip(length)?;
        Ok(CountedValue::plain(ALLOCATION + 2 * length))
    }

    /// Reads a line. Returns the bytes that its text takes, and the number that its digits make.
    fn line(&mut self) -> Step<(u64, u64)> {
        let (mut length, mut number) = (0u64, 0u64);
        loop {
            match self.number(1)? as u8 {
                b'\n' => return Ok((2 * ALLOCATION + 2 * length, number)),
                digit @ b'0'..=b'9' => number = number.saturating_mul(10).saturating_add(u64::from(digit - b'0')),
                _ => {}
            }
            length += 1;
        }
    }

    /// Reads a little-endian number of up to eight bytes.
    fn number(&mut self, width: usize) -> Step<u64> {
        let mut bytes = [0; 8];
        self.reader.read_exact(&mut bytes[..width])?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn skip(&mut self, mut length: u64) -> Step {
        while length > 0 {
            let available = self.reader.fill_buf()?.len();
            if available == 0 {
                return Err(WalkEnd::Refused);
            }
            let skipped = length.min(available as u64);
            self.reader.consume(skipped as usize);
            length -= skipped;
        }
        Ok(())
    }
}

/// Number of slots of a hash table.
fn slots(items: u64) -> u64 {
    if items == 0 { 0 } else { (items * 8 / 7 + 1).next_power_of_two().max(4) }
}
