//! The header of a safetensors file, read straight into what is needed and checked whole.

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

/// How a header begins whose metadata come first.
const FIRST: &[u8] = b"{\"__metadata__\":";

type Metadata = BTreeMap<String, String>;

/// What a header says.
#[derive(Debug)]
pub(super) struct Header {
    /// Those of a sibling, where both headers say the same of them.
    pub tensors: Arc<StoredTensors>,
    pub metadata: Metadata,
    /// What follows the metadata within the header; none where they do not come first.
    pub rest: Option<Range<usize>>,
}

/// A header that was read before, with its own text after the metadata.
pub(super) struct Known<'a> {
    pub tensors: &'a Arc<StoredTensors>,
    pub rest: &'a [u8],
}

impl Header {
    /// Reads the header of a file with so many bytes of data.
    ///
    /// The snapshots of a run say all the same of their tensors: where the text after the metadata is a sibling's, byte for
    /// byte, what was found in that is not read again.
    ///
    /// # Errors
    /// [`Error::Damaged`] for what is no header, or not that of so many bytes.
    pub(super) fn read(path: &Path, json: &[u8], data: usize, sibling: Option<Known<'_>>) -> Result<Header> {
        if let Some(known) = sibling
            && let Some((metadata, rest)) = split::<Metadata>(json)
            && json[rest.clone()] == *known.rest
        {
            check_length(path, known.tensors, data)?;
            return Ok(Header { tensors: known.tensors.clone(), metadata, rest: Some(rest) });
        }
        // Of what is ignored, too: other readers look at all of it.
        let text =
            std::str::from_utf8(json).map_err(|e| Error::damaged(path, format!("the header is no text: {e}")))?;
        let Entries { metadata, tensors } = serde_json::from_str(text).map_err(|e| Error::damaged(path, e))?;
        check_names(path, &tensors)?;
        let tensors = sorted(path, check_places(path, tensors)?)?;
        check_length(path, &tensors, data)?;
        let rest = split::<IgnoredAny>(json).map(|(_, rest)| rest);
        Ok(Header { tensors: Arc::new(tensors), metadata: metadata.unwrap_or_default(), rest })
    }
}

/// Reads the metadata where they come first, as most writers have it, and tells what follows them but for the padding.
fn split<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Option<(T, Range<usize>)> {
    let text = json.strip_prefix(FIRST)?;
    let mut values = serde_json::Deserializer::from_slice(text).into_iter();
    let metadata = values.next()?.ok()?;
    let start = FIRST.len() + values.byte_offset();
    let end = json.iter().rposition(|&byte| byte != b' ').map_or(0, |last| last + 1);
    Some((metadata, start..end.max(start)))
}

/// The entries of a header, in its order.
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
        let (mut metadata, mut tensors) = (None, Vec::new());
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

/// Checks that no name is there twice: where the two lie is then of no interest.
fn check_names(path: &Path, tensors: &[(String, TensorInfo)]) -> Result<()> {
    let mut names: Vec<&String> = tensors.iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(twice(path, pair[0])),
        None => Ok(()),
    }
}

fn twice(path: &Path, name: &str) -> Error {
    Error::damaged(path, format!("tensor `{name}` is in the header twice"))
}

/// Checks that each tensor has the bytes that it takes, and that they lie side by side from the first byte of the data on.
fn check_places(path: &Path, mut tensors: Vec<(String, TensorInfo)>) -> Result<Vec<(String, StoredTensor)>> {
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    let place = |(name, info): (String, TensorInfo)| {
        let TensorInfo { dtype, shape, data_offsets: (start, stop) } = info;
        let damaged = |reason: String| Err(Error::damaged(path, format!("tensor `{name}` {reason}")));
        if start != end {
            return damaged(format!("begins at byte {start} of the data, where the one before it ends at {end}"));
        }
        let size = byte_size(&name, dtype, &shape).map_err(|error| Error::damaged(path, error))?;
        if start.checked_add(size) != Some(stop) {
            return damaged(format!("takes {size} bytes ({dtype} {shape:?}), and lies from {start} to {stop}"));
        }
        end = stop;
        Ok((name, StoredTensor { dtype, shape, range: start..stop }))
    };
    tensors.into_iter().map(place).collect()
}

/// Brings tensors into the order of their names, each of which there may be once.
fn sorted(path: &Path, tensors: Vec<(String, StoredTensor)>) -> Result<StoredTensors> {
    StoredTensors::new(tensors).map_err(|name| twice(path, &name))
}

fn check_length(path: &Path, tensors: &StoredTensors, found: usize) -> Result<()> {
    let told = tensors.data_len();
    if told != found {
        return Err(Error::damaged(path, format!("the header tells of {told} bytes of data, and there are {found}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#;
    const B: &str = r#""b\"":{"dtype":"U8","shape":[4,1],"data_offsets":[0,4],"more":[{}]}"#;
    const META: &str = r#""__metadata__":{"k":"v, \"w\""}"#;

    fn json(entries: &[&str]) -> String {
        format!("{{{}}}", entries.join(","))
    }

    fn read(json: &str, data: usize, sibling: Option<(&Header, &str)>) -> Result<Header> {
        let known = sibling.and_then(|(header, json)| {
            Some(Known { tensors: &header.tensors, rest: &json.as_bytes()[header.rest.clone()?] })
        });
        Header::read(Path::new("the.file"), json.as_bytes(), data, known)
    }

    /// Whether the format's own reader takes a header with that many bytes of data.
    fn reference_takes(json: &str, data: usize) -> bool {
        let file = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat();
        SafeTensors::deserialize(&file).is_ok()
    }

    #[test]
    fn tensors_and_metadata_are_read_in_any_order() {
        for entries in [[META, A, B], [A, META, B], [B, A, META]] {
            let text = format!("{}   ", json(&entries));
            assert!(reference_takes(&text, 12));
            let header = read(&text, 12, None).unwrap();
            assert_eq!(header.metadata, BTreeMap::from([("k".into(), "v, \"w\"".into())]));
            assert_eq!(header.tensors.keys().collect::<Vec<_>>(), ["a", "b\""]);
            assert_eq!(header.tensors.get("a").unwrap().range, 4..12);
            assert_eq!(header.tensors.get("b\"").unwrap().shape, [4, 1]);
            assert_eq!(header.rest.is_some(), entries[0] == META);
        }
    }

    #[test]
    fn what_the_reference_refuses_is_refused() {
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
            assert!(!reference_takes(&text, data), "{text}");
            assert!(matches!(read(&text, data, None), Err(Error::Damaged { .. })), "{text}");
        }
        let ignored = json(&[&u8s("w", "[1]", 0, 1).replace("}", r#","more":"?"}"#)]);
        assert!(reference_takes(&ignored, 1) && read(&ignored, 1, None).is_ok());
        let mut bytes = ignored.into_bytes();
        *bytes.iter_mut().find(|byte| **byte == b'?').unwrap() = 0xff;
        let text = Header::read(Path::new("the.file"), &bytes, 1, None).unwrap_err().to_string();
        assert!(text.contains("the header is no text: invalid utf-8"), "{text}");
        // The reference lets a tensor be told of twice, as long as it lies at one place.
        assert!(reference_takes(&json(&[&good, &good]), 8) && read(&json(&[&good, &good]), 8, None).is_err());
        let twice = json(&[&good, &u8s("w", "[8]", 8, 16)]);
        assert!(read(&twice, 16, None).unwrap_err().to_string().contains("tensor `w` is in the header twice"));
        assert!(read(&json(&[&good, &good]), 8, None).unwrap_err().to_string().contains("is in the header twice"));
        let empty = u8s("e", "[0]", 8, 8);
        assert!(read(&json(&[&empty, &good, r#""__metadata__":null"#]), 8, None).is_ok());
        assert!(read(&json(&[&good]), 9, None).unwrap_err().to_string().contains("8 bytes of data, and there are 9"));
    }

    #[test]
    fn a_sibling_shares_its_tensors_only_where_both_headers_agree() {
        let text = json(&[META, A, B]);
        let first = read(&text, 12, None).unwrap();
        let like = |json: &str, data| read(json, data, Some((&first, &text)));
        let longer = r#""__metadata__":{"k":"another","l":"}"}"#;
        let same = like(&format!("{}  ", json(&[longer, A, B])), 12).unwrap();
        assert!(Arc::ptr_eq(&same.tensors, &first.tensors));
        assert_eq!(same.metadata["l"], "}");
        assert!(like(&json(&[longer, A, B]), 13).unwrap_err().to_string().contains("there are 13"));
        // Equal tensors in another order or spelling are read anew, and found equal.
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
