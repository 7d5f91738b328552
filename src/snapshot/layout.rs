//! Layout of tensors in a safetensors file, and the header that describes it.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::json;

use crate::error::{Error, Result};
use crate::tensor::{TensorSpec, byte_size};

/// Alignment of the data section: the header and the 8 bytes of its length are padded to a multiple of it.
const PAGE: usize = 4096;

/// Largest header in bytes that readers accept.
pub const MAX_HEADER: usize = 100_000_000;

/// Name of the header entry of the metadata.
pub(super) const METADATA: &str = "__metadata__";

/// Location of a tensor in a file.
#[derive(Clone, Debug)]
pub struct PlacedTensor {
    /// Index in the list of specs.
    pub index: usize,
    /// Byte range within the data section.
    pub range: Range<usize>,
}

/// Layout of a file: tensors are sorted by alignment, then by name, without gaps.
#[derive(Clone, Debug)]
pub struct FileLayout {
    specs: Vec<TensorSpec>,
    places: Vec<PlacedTensor>,
}

impl FileLayout {
    /// Lays out tensors.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a duplicate name, a name that the format reserves, or a size beyond the address space.
    pub fn new(specs: Vec<TensorSpec>) -> Result<FileLayout> {
        let mut order: Vec<usize> = (0..specs.len()).collect();
        order.sort_by_key(|&i| (Reverse(specs[i].dtype), &specs[i].name));
        let mut places = Vec::with_capacity(specs.len());
        let mut end = 0usize;
        for index in order {
            let spec = &specs[index];
            let size = byte_size(&spec.name, spec.dtype, &spec.shape)?;
            let too_large = || Error::tensor(&spec.name, "all tensors together take more than 2^63 bytes");
            let next = end.checked_add(size).filter(|&n| n <= isize::MAX as usize).ok_or_else(too_large)?;
            places.push(PlacedTensor { index, range: end..next });
            end = next;
        }
        check_names(&specs)?;
        Ok(FileLayout { specs, places })
    }

    /// Returns the specs in the order given.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// Returns the locations of all tensors, in the order of the file.
    pub fn places(&self) -> &[PlacedTensor] {
        &self.places
    }

    /// Returns the length of the data section in bytes.
    pub fn data_len(&self) -> usize {
        self.places.last().map_or(0, |place| place.range.end)
    }

    /// Returns the bytes before the data section: the header's length and the header, padded to a multiple of 4,096.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the header exceeds the format's limit of 100 MB.
    pub fn header(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        // The metadata come first, for readers that need nothing else.
        let mut json = format!("{{{}:{}", json!(METADATA), json!(metadata));
        for PlacedTensor { index, range: Range { start, end } } in &self.places {
            let TensorSpec { name, dtype, shape } = &self.specs[*index];
            json += &format!(
                ",{}:{{\"dtype\":{},\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}",
                json!(name),
                json!(dtype)
            );
        }
        json.push('}');
        let total = (8 + json.len()).next_multiple_of(PAGE);
        if total - 8 > MAX_HEADER {
            let first = self.specs.first().map_or("", |spec| &spec.name);
            let count = self.specs.len();
            let megabytes = total / 1_000_000;
            let why = format!(
                "with {count} tensors in one file the header takes {megabytes} MB, and the safetensors format allows \
                 100: join small tensors into larger ones"
            );
            return Err(Error::tensor(first, why));
        }
        let mut bytes = ((total - 8) as u64).to_le_bytes().to_vec();
        bytes.extend(json.bytes());
        bytes.resize(total, b' ');
        Ok(bytes)
    }
}

fn check_names(specs: &[TensorSpec]) -> Result<()> {
    let mut names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::tensor(pair[0], "the name occurs twice: names must be unique"));
    }
    if names.binary_search(&METADATA).is_ok() {
        return Err(Error::tensor(METADATA, "the safetensors format reserves this name: rename the tensor"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use safetensors::{Dtype, SafeTensors};

    use super::*;

    fn spec(name: &str, dtype: Dtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn reference_reader_accepts_the_header() {
        let specs = vec![
            spec("b", Dtype::F16, &[3]),
            spec("é\"\n", Dtype::F32, &[2, 2]),
            spec("a", Dtype::F16, &[]),
            spec("empty", Dtype::I64, &[0, 7]),
        ];
        let layout = FileLayout::new(specs).unwrap();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut file = layout.header(&metadata).unwrap();
        assert_eq!(file.len(), PAGE);
        file.extend((0..layout.data_len()).map(|i| i as u8));
        let read = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.len(), 4);
        assert_eq!(read.tensor("é\"\n").unwrap().data(), (0..16).collect::<Vec<u8>>());
        assert_eq!(read.tensor("a").unwrap().data(), [16, 17]);
        assert_eq!(read.tensor("empty").unwrap().shape(), [0, 7]);
        let (_, header) = SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    }

    #[test]
    fn bad_names_and_sizes_are_refused() {
        for (specs, expected) in [
            (vec![spec("a", Dtype::F32, &[1]), spec("a", Dtype::I64, &[1])], "occurs twice"),
            (vec![spec("__metadata__", Dtype::F32, &[1])], "reserves"),
            (vec![spec("a", Dtype::F32, &[1 << 40, 1 << 40])], "2^64"),
            (vec![spec("a", Dtype::F4, &[3])], "whole number of bytes"),
        ] {
            let text = FileLayout::new(specs).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }
}
