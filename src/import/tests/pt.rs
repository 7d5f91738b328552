//! Writer of PyTorch files, byte by byte: as `torch.save` writes them, and hostile ones.

use std::fs;
use std::path::Path;

/// Builder of a checkpoint: the pickled entries of its dict, and the elements of its tensors.
#[derive(Clone, Default)]
pub struct Pt {
    entries: Vec<u8>,
    storages: Vec<Vec<u8>>,
}

impl Pt {
    /// Begins a file of pytorch-posthoc-ema.
    pub fn with_step(step: i64) -> Pt {
        Pt::default().tensor("initted", "BoolStorage", &[], &[1]).tensor(
            "step",
            "LongStorage",
            &[],
            &step.to_le_bytes(),
        )
    }

    /// Adds a tensor in C order.
    pub fn tensor(self, name: &str, storage: &str, shape: &[usize], bytes: &[u8]) -> Pt {
        let count = shape.iter().product();
        let strides: Vec<usize> = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        self.strided(name, storage, count, shape, &strides, bytes)
    }

    /// Adds a tensor of any strides over a storage of `count` elements.
    pub fn strided(
        mut self,
        name: &str,
        storage: &str,
        count: usize,
        shape: &[usize],
        strides: &[usize],
        bytes: &[u8],
    ) -> Pt {
        let key = self.storages.len().to_string();
        self.storages.push(bytes.to_vec());
        let mut value = b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        value.extend([text("storage"), format!("ctorch\n{storage}\n").into(), text(&key), text("cpu")].concat());
        value.extend([int(count), b"tQ".to_vec(), int(0), tuple(shape), tuple(strides)].concat());
        value.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        self.entry(name, &value)
    }

    /// Adds f32 values.
    pub fn floats(self, name: &str, values: &[f32]) -> Pt {
        self.tensor(name, "FloatStorage", &[values.len()], bytemuck::cast_slice(values))
    }

    /// Adds a dict with f32 values in it.
    pub fn nested(self, outer: &str, name: &str, values: &[f32]) -> Pt {
        let before = self.entries.len();
        let mut pt = self.floats(name, values);
        let inner = pt.entries.split_off(before);
        pt.entry(outer, &[b"}(", &inner[..], b"u"].concat())
    }

    /// Moves all entries into a dict of that name.
    pub fn within(mut self, outer: &str) -> Pt {
        let inner = std::mem::take(&mut self.entries);
        self.entry(outer, &[b"}(", &inner[..], b"u"].concat())
    }

    /// Adds any pickled value.
    pub fn entry(mut self, name: &str, value: &[u8]) -> Pt {
        self.entries.extend([text(name), value.to_vec()].concat());
        self
    }

    /// Returns the pickle of the dict.
    pub fn pickle(&self) -> Vec<u8> {
        [b"\x80\x02}(", &self.entries[..], b"u."].concat()
    }

    /// Returns the archive.
    pub fn archive(&self) -> Vec<u8> {
        let names = (0..self.storages.len()).map(|i| format!("archive/data/{i}"));
        let storages = names.zip(self.storages.clone());
        zip(&[("archive/data.pkl".to_owned(), self.pickle())].into_iter().chain(storages).collect::<Vec<_>>())
    }

    pub fn save(&self, path: impl AsRef<Path>) {
        fs::write(path, self.archive()).unwrap();
    }
}

/// Returns the pickle of the call `name(argument)`.
pub fn call(module: &str, name: &str, argument: &str) -> Vec<u8> {
    [format!("c{module}\n{name}\n(").into_bytes(), text(argument), b"tR".to_vec()].concat()
}

/// Returns a file of PyTorch before 1.6 with this pickle and no tensors.
pub fn legacy(pickle: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
    let system = [b"\x80\x02}(", &text("little_endian")[..], b"\x88u."].concat();
    [&magic[..], b"\x80\x02M\xe9\x03.", &system, pickle, b"\x80\x02]."].concat()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(value: usize) -> Vec<u8> {
    [b"J", &(value as u32).to_le_bytes()[..]].concat()
}

fn tuple(values: &[usize]) -> Vec<u8> {
    let items: Vec<u8> = values.iter().flat_map(|&value| int(value)).collect();
    [b"(", &items[..], b"t"].concat()
}

/// Returns an archive of stored entries without checksums, as `compute_crc32=False` writes it.
fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    let common = |name: &str, length: usize| {
        let length = (length as u32).to_le_bytes();
        // Version, flags, method, time, date, checksum; then both lengths and those of the name and of extra fields.
        [
            &[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0][..],
            &length,
            &length,
            &(name.len() as u16).to_le_bytes(),
            &[0, 0],
        ]
        .concat()
    };
    for (name, bytes) in files {
        let place = (out.len() as u32).to_le_bytes();
        let entry = common(name, bytes.len());
        directory.extend([b"PK\x01\x02\x14\x00", &entry[..], &[0; 10], &place, name.as_bytes()].concat());
        out.extend([b"PK\x03\x04", &entry[..], name.as_bytes(), bytes].concat());
    }
    let count = (files.len() as u16).to_le_bytes();
    let start = (out.len() as u32).to_le_bytes();
    let length = (directory.len() as u32).to_le_bytes();
    [&out[..], &directory, b"PK\x05\x06\0\0\0\0", &count, &count, &length, &start, &[0, 0]].concat()
}
