//! Reading and checking the header of a safetensors file.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::layout::METADATA;
use super::tensors::{StoredTensor, StoredTensors};
use crate::error::{Error, Result};
use crate::tensor::byte_size;

/// First bytes of a header that begins with its metadata.
const METADATA_FIRST: &[u8] = b"{\"__metadata__\":";

type Metadata = BTreeMap<String, String>;

/// Contents of a header.
#[derive(Debug)]
pub(super) struct Header {
    /// Tensors, shared with a sibling whose header lists the same.
    pub tensors: Arc<StoredTensors>,
    pub metadata: Metadata,
    /// Range of the text after the metadata, without padding, if the header begins with them.
    pub rest: Option<Range<usize>>,
}

/// Header that was read before, and its text after the metadata.
pub(super) struct SiblingHeader<'a> {
    pub tensors: &'a Arc<StoredTensors>,
    pub rest: &'a [u8],
}

impl Header {
    /// Reads the header of a file with `data` bytes of data.
    ///
    /// All snapshots of a run list the same tensors. If the text after the metadata equals that of a sibling, its
    /// tensors are shared instead of parsed again.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the text is not a header, or not the header of `data` bytes.
    pub(super) fn read(path: &Path, json: &[u8], data: usize, sibling: Option<SiblingHeader<'_>>) -> Result<Header> {
        if let Some(known) = sibling
            && let Some((metadata, rest)) = split::<Metadata>(json)
            && json[rest.clone()] == *known.rest
        {
            check_length(path, known.tensors, data)?;
            return Ok(Header { tensors: known.tensors.clone(), metadata, rest: Some(rest) });
        }
        // Checked in ignored values too, as other readers do.
        let text =
            std::str::from_utf8(json).map_err(|e| Error::damaged(path, format!("the header is not UTF-8: {e}")))?;
        let Entries { metadata, tensors } = serde_json::from_str(text).map_err(|e| Error::damaged(path, e))?;
        check_names(path, &tensors)?;
        let tensors = sorted(path, check_places(path, tensors)?)?;
        check_length(path, &tensors, data)?;
        let rest = split::<IgnoredAny>(json).map(|(_, rest)| rest);
        Ok(Header { tensors: Arc::new(tensors), metadata: metadata.unwrap_or_default(), rest })
    }
}

/// Reads the metadata of a header that begins with them, and returns the range of the rest, without padding.
fn split<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Option<(T, Range<usize>)> {
    let text = json.strip_prefix(METADATA_FIRST)?;
    let mut values = serde_json::Deserializer::from_slice(text).into_iter();
    let metadata = values.next()?.ok()?;
    let start = METADATA_FIRST.len() + values.byte_offset();
    let end = json.iter().rposition(|&byte| byte != b' ').map_or(0, |last| last + 1);
    Some((metadata, start..end.max(start)))
}

/// Entries of a header, in its order.
struct Entries {
    metadata: Option<Metadata>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the tensors of a safetensors file")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut metadata = None;
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name != METADATA {
                tensors.push((name, map.next_value()?));
            } else if metadata.replace(map.next_value()?).is_some() {
                return Err(A::Error::duplicate_field(METADATA));
            }
        }
        Ok(Entries { metadata: metadata.flatten(), tensors })
    }
}

/// Checks that no name occurs twice, before offsets are checked.
fn check_names(path: &Path, tensors: &[(String, TensorInfo)]) -> Result<()> {
    let mut names: Vec<&String> = tensors.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(duplicate(path, pair[0])),
        None => Ok(()),
    }
}

fn duplicate(path: &Path, name: &str) -> Error {
    Error::damaged(path, format!("tensor `{name}` is in the header twice"))
}

/// Checks that the tensors have the right sizes and follow each other without gaps from offset 0.
fn check_places(path: &Path, mut tensors: Vec<(String, TensorInfo)>) -> Result<Vec<(String, StoredTensor)>> {
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut placed = Vec::with_capacity(tensors.len());
    let mut end = 0;
    for (name, TensorInfo { dtype, shape, data_offsets: (start, stop) }) in tensors {
        if start != end {
            let why =
                format!("tensor `{name}` begins at byte {start} of the data, but the one before it ends at {end}");
            return Err(Error::damaged(path, why));
        }
        let size = byte_size(&name, dtype, &shape).map_err(|error| Error::damaged(path, error))?;
        if start.checked_add(size) != Some(stop) {
            let why =
                format!("tensor `{name}` takes {size} bytes ({dtype} {shape:?}), but is stored from {start} to {stop}");
            return Err(Error::damaged(path, why));
        }
        end = stop;
        placed.push((name, StoredTensor { dtype, shape, range: start..stop }));
    }
    Ok(placed)
}

/// Sorts tensors by name and checks that no name occurs twice.
fn sorted(path: &Path, tensors: Vec<(String, StoredTensor)>) -> Result<StoredTensors> {
    StoredTensors::new(tensors).map_err(|name| duplicate(path, &name))
}

fn check_length(path: &Path, tensors: &StoredTensors, found: usize) -> Result<()> {
    let expected = tensors.data_len();
    if expected != found {
        return Err(Error::damaged(path, format!("the header lists {expected} bytes of data, but there are {found}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#;
    const B: &str = r#""b\"":{"dtype":"U8","shape":[4,1],"data_offsets":[0,4],"more":[{}]}"#;
    const META: &str = r#""__metadata__":{"k":"v, \"w\""}"#;

    fn json(entries: &[&str]) -> String {
        format!("{{{}}}", entries.join(","))
    }

    fn read(json: &str, data: usize, sibling: Option<(&Header, &str)>) -> Result<Header> {
        let known = sibling.and_then(|(header, json)| {
            Some(SiblingHeader { tensors: &header.tensors, rest: &json.as_bytes()[header.rest.clone()?] })
        });
        Header::read(Path::new("the.file"), json.as_bytes(), data, known)
    }

    /// Returns true if the reference reader accepts a header with `data` bytes of data.
    fn reference_accepts(json: &str, data: usize) -> bool {
        let file = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat();
        SafeTensors::deserialize(&file).is_ok()
    }

    #[test]
    fn entries_are_read_in_any_order() {
        for entries in [[META, A, B], [A, META, B], [B, A, META]] {
            let text = format!("{}   ", json(&entries));
            assert!(reference_accepts(&text, 12));
            let header = read(&text, 12, None).unwrap();
            assert_eq!(header.metadata, BTreeMap::from([("k".into(), "v, \"w\"".into())]));
            assert_eq!(header.tensors.keys().collect::<Vec<_>>(), ["a", "b\""]);
            assert_eq!(header.tensors.get("a").unwrap().range, 4..12);
            assert_eq!(header.tensors.get("b\"").unwrap().shape, [4, 1]);
            assert_eq!(header.rest.is_some(), entries[0] == META);
        }
    }

    #[test]
    fn headers_that_the_reference_refuses_are_refused() {
        let u8s = |name: &str, shape: &str, start: u64, end: u64| {
            format!(r#""{name}":{{"dtype":"U8","shape":{shape},"data_offsets":[{start},{end}]}}"#)
        };
        let good = u8s("w", "[8]", 0, 8);
        let cases = [
            vec![good.clone(), u8s("x", "[8]", 9, 17)],
            vec![good.clone(), u8s("x", "[8]", 7, 15)],
            vec![good.clone(), u8s("x", "[8]", 0, 8)],
            vec![good.clone(), u8s("x", "[9]", 8, 16)],
            vec![good.clone(), u8s("x", "[8]", 8, 4)],
            vec![good.clone(), u8s("x", "[-8]", 8, 16)],
            vec![good.clone(), u8s("x", "[4294967296,4294967296]", 8, 16)],
            vec![good.clone(), u8s("x", "[18446744073709551615]", 8, 7)],
            vec![good.clone(), u8s("x", "[8]", 8, 16).replace("U8", "Q8")],
            vec![good.clone(), u8s("x", "[3]", 8, 10).replace("U8", "F4")],
            vec![good.clone(), r#""x":{"dtype":"U8","shape":[0]}"#.into()],
            vec![good.clone(), r#""x":3"#.into()],
            vec![good.clone(), META.into(), META.into()],
            vec![good.clone(), r#""__metadata__":{"k":1}"#.into()],
            vec![good.clone(), "}".into()],
            vec![],
        ];
        for entries in cases {
            let text = json(&entries.iter().map(String::as_str).collect::<Vec<_>>());
            let data = if entries.is_empty() { 1 } else { 16 };
            assert!(!reference_accepts(&text, data), "{text}");
            assert!(matches!(read(&text, data, None), Err(Error::Damaged { .. })), "{text}");
        }
        let ignored = json(&[&u8s("w", "[1]", 0, 1).replace("}", r#","more":"?"}"#)]);
        assert!(reference_accepts(&ignored, 1) && read(&ignored, 1, None).is_ok());
        let mut bytes = ignored.into_bytes();
        *bytes.iter_mut().find(|byte| **byte == b'?').unwrap() = 0xff;
        let text = Header::read(Path::new("the.file"), &bytes, 1, None).unwrap_err().to_string();
        assert!(text.contains("the header is not UTF-8: invalid utf-8"), "{text}");
        // The reference accepts a duplicate entry if both have the same offsets.
        assert!(reference_accepts(&json(&[&good, &good]), 8) && read(&json(&[&good, &good]), 8, None).is_err());
        let twice = json(&[&good, &u8s("w", "[8]", 8, 16)]);
        assert!(read(&twice, 16, None).unwrap_err().to_string().contains("tensor `w` is in the header twice"));
        assert!(read(&json(&[&good, &good]), 8, None).unwrap_err().to_string().contains("is in the header twice"));
        let empty = u8s("e", "[0]", 8, 8);
        assert!(read(&json(&[&empty, &good, r#""__metadata__":null"#]), 8, None).is_ok());
        assert!(read(&json(&[&good]), 9, None).unwrap_err().to_string().contains("8 bytes of data, but there are 9"));
    }

    #[test]
    fn tensors_are_shared_only_if_both_headers_agree() {
        let text = json(&[META, A, B]);
        let first = read(&text, 12, None).unwrap();
        let like = |json: &str, data| read(json, data, Some((&first, &text)));
        let longer = r#""__metadata__":{"k":"another","l":"}"}"#;
        let same = like(&format!("{}  ", json(&[longer, A, B])), 12).unwrap();
        assert!(Arc::ptr_eq(&same.tensors, &first.tensors));
        assert_eq!(same.metadata["l"], "}");
        assert!(like(&json(&[longer, A, B]), 13).unwrap_err().to_string().contains("there are 13"));
        // Equal tensors in another order or spelling are parsed again and compare equal.
        for other in [json(&[longer, B, A]), json(&[A, META, B]), json(&[META, A, B]).replace(",\"b", ", \"b")] {
            let header = like(&other, 12).unwrap();
            assert!(!Arc::ptr_eq(&header.tensors, &first.tensors));
            assert_eq!(header.tensors, first.tensors);
        }
        let fewer = read(&json(&[META, &A.replace("[4,12]", "[0,8]")]), 8, Some((&first, &text))).unwrap();
        assert_eq!(fewer.tensors.len(), 1);
        for cut in 0..text.len() {
            assert!(like(&text[..cut], 12).is_err(), "{cut}");
        }
        assert!(like(&json(&[r#""__metadata__":{"k":1}"#, A, B]), 12).is_err());
        assert!(like(&json(&["\"__metadata__\":{}}{", A, B]), 12).is_err());
        assert!(like(&format!("{text}}}"), 12).is_err());
    }
}
