//! Files of PyTorch with sparse storages, as `torch.save`, `torch.distributed.checkpoint` and DeepSpeed write them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Value of a pickle.
#[derive(Clone)]
pub enum Value {
    Int(usize),
    Text(String),
    List(Vec<Value>),
    Tuple(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    /// Object of a class, with its attributes.
    Object(&'static str, Vec<(Value, Value)>),
    Tensor(Tensor),
}

/// Tensor of f32 over a storage of its own.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
    /// Value of all elements that are not zero: one in each `SPACING` of the storage.
    pub value: f32,
}

/// Distance of elements of a storage that are not zero.
pub const SPACING: usize = 1 << 20;

impl Tensor {
    pub fn plain(shape: &[usize], value: f32) -> Tensor {
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        Tensor { shape: shape.to_vec(), strides, value }
    }

    fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

pub fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

pub fn sizes(sizes: &[usize]) -> Value {
    Value::Tuple(sizes.iter().copied().map(Value::Int).collect())
}

/// Returns a dict with texts as keys.
pub fn dict<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Dict(entries.map(|(key, value)| (text(key), value)).to_vec())
}

/// Returns an object with these attributes.
pub fn object<const N: usize>(class: &'static str, attributes: [(&str, Value); N]) -> Value {
    Value::Object(class, attributes.map(|(key, value)| (text(key), value)).to_vec())
}

/// Returns a pickle of protocol 2, and the tensors whose storages it refers to.
pub fn pickle(value: &Value) -> (Vec<u8>, Vec<Tensor>) {
    let (mut out, mut tensors) = (b"\x80\x02".to_vec(), Vec::new());
    put(&mut out, &mut tensors, value);
    out.push(b'.');
    (out, tensors)
}

fn put(out: &mut Vec<u8>, tensors: &mut Vec<Tensor>, value: &Value) {
    let pairs = |out: &mut Vec<u8>, tensors: &mut Vec<Tensor>, pairs: &[(Value, Value)]| {
        out.extend(b"}(");
        for (key, value) in pairs {
            put(out, tensors, key);
            put(out, tensors, value);
        }
        out.push(b'u');
    };
    match value {
        Value::Int(value) => out.extend([b"\x8a\x08", &(*value as u64).to_le_bytes()[..]].concat()),
        Value::Text(text) => out.extend([b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()),
        Value::List(items) => {
            out.extend(b"](");
            items.iter().for_each(|item| put(out, tensors, item));
            out.push(b'e');
        }
        Value::Tuple(items) => {
            out.push(b'(');
            items.iter().for_each(|item| put(out, tensors, item));
            out.push(b't');
        }
        Value::Dict(entries) => pairs(out, tensors, entries),
        Value::Object(class, attributes) => {
            let (module, name) = class.rsplit_once('.').unwrap();
            out.extend(format!("c{module}\n{name}\n").into_bytes());
            out.extend(b")\x81");
            pairs(out, tensors, attributes);
            out.push(b'b');
        }
        Value::Tensor(tensor) => {
            let key = tensors.len().to_string();
            tensors.push(tensor.clone());
            out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
            put(out, tensors, &text("storage"));
            out.extend(b"ctorch\nFloatStorage\n");
            [text(&key), text("cpu"), Value::Int(tensor.count())].iter().for_each(|part| put(out, tensors, part));
            out.extend(b"tQ");
            [Value::Int(0), sizes(&tensor.shape), sizes(&tensor.strides)]
                .iter()
                .for_each(|part| put(out, tensors, part));
            out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        }
    }
}

/// Writes a file of `torch.save` at an offset of a file, and returns its end.
pub fn save_at(file: &File, start: u64, value: &Value) -> u64 {
    let (pickle, tensors) = pickle(value);
    let mut directory = Vec::new();
    let mut at = start;
    let mut entry = |name: String, length: usize, at: &mut u64| {
        let sizes = (length as u32).to_le_bytes();
        let name_length = (name.len() as u16).to_le_bytes();
        let common =
            [&[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0][..], &sizes, &sizes, &name_length, &[0, 0]].concat();
        let place = ((*at - start) as u32).to_le_bytes();
        directory.extend([b"PK\x01\x02\x14\0", &common[..], &[0; 10], &place, name.as_bytes()].concat());
        let header = [b"PK\x03\x04", &common[..], name.as_bytes()].concat();
        file.write_all_at(&header, *at).unwrap();
        *at += header.len() as u64;
        *at
    };
    let place = entry("archive/data.pkl".into(), pickle.len(), &mut at);
    file.write_all_at(&pickle, place).unwrap();
    at += pickle.len() as u64;
    for (i, tensor) in tensors.iter().enumerate() {
        let place = entry(format!("archive/data/{i}"), 4 * tensor.count(), &mut at);
        for element in (0..tensor.count()).step_by(SPACING) {
            file.write_all_at(&tensor.value.to_le_bytes(), place + 4 * element as u64).unwrap();
        }
        at += 4 * tensor.count() as u64;
    }
    let count = (tensors.len() as u16 + 1).to_le_bytes();
    let [length, place] = [directory.len() as u32, (at - start) as u32].map(u32::to_le_bytes);
    let end = [&directory[..], b"PK\x05\x06\0\0\0\0", &count, &count, &length, &place, &[0, 0]].concat();
    file.write_all_at(&end, at).unwrap();
    at + end.len() as u64
}

/// Writes a file of `torch.save`.
pub fn save(path: &Path, value: &Value) {
    save_at(&File::create(path).unwrap(), 0, value);
}
