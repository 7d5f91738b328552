//! Checksums of a file: one of the data section, and one of the header, which holds both.

use std::collections::BTreeMap;

/// The key of the checksum of the data section.
const DATA: &str = "checksum";

/// The key of the checksum of all that comes before the data section, taken with zeros in its own place.
const HEADER: &str = "header_checksum";

/// How a checksum begins: the name of the algorithm.
const ALGORITHM: &str = "blake3:";

/// Digits of a checksum.
const DIGITS: usize = 64;

/// A checksum as the metadata have it.
fn text(hasher: &blake3::Hasher) -> String {
    format!("{ALGORITHM}{}", hasher.finalize().to_hex())
}

/// In place of a checksum that is still to be taken, and as long.
fn blank() -> String {
    format!("{ALGORITHM}{}", "0".repeat(DIGITS))
}

/// Adds room for both checksums to the metadata.
pub(super) fn reserve(metadata: &mut BTreeMap<String, String>) {
    metadata.insert(DATA.into(), blank());
    metadata.insert(HEADER.into(), blank());
}

/// Puts both checksums into the metadata; `header` makes a header of them, which is returned.
pub(super) fn seal<E>(
    mut metadata: BTreeMap<String, String>,
    data: &blake3::Hasher,
    header: impl Fn(&BTreeMap<String, String>) -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    reserve(&mut metadata);
    metadata.insert(DATA.into(), text(data));
    let unsealed = header(&metadata)?;
    metadata.insert(HEADER.into(), text(blake3::Hasher::new().update(&unsealed)));
    header(&metadata)
}

/// Compares what comes before the data section with its checksum; fine where there is no checksum at all.
///
/// # Errors
/// What is wrong.
pub(super) fn check_header(bytes: &[u8], metadata: &BTreeMap<String, String>) -> Result<(), String> {
    let Some(stored) = metadata.get(HEADER) else {
        let bare = !metadata.contains_key(DATA);
        return if bare {
            Ok(())
        } else {
            Err(format!("there is a checksum of the data, and none of the header (`{HEADER}`)"))
        };
    };
    let entry = format!("\"{HEADER}\":\"{stored}\"");
    let begin = bytes.windows(entry.len()).position(|window| window == entry.as_bytes());
    let Some(begin) = begin else { return Err(format!("the header's checksum is not written as `{entry}`")) };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..begin]).update(format!("\"{HEADER}\":\"{}\"", blank()).as_bytes());
    hasher.update(&bytes[begin + entry.len()..]);
    compare("header", &hasher, stored)
}

/// Compares the data section with its checksum, and tells where either checksum is missing.
///
/// # Errors
/// What is wrong.
pub(super) fn check_data(bytes: &[u8], metadata: &BTreeMap<String, String>) -> Result<(), String> {
    for key in [DATA, HEADER] {
        let stored = metadata.get(key).map(String::as_str).unwrap_or_default();
        if !stored.starts_with(ALGORITHM) {
            return Err(format!("no checksum of a known algorithm is stored (`{key}`: `{stored}`)"));
        }
    }
    compare("data", blake3::Hasher::new().update_rayon(bytes), &metadata[DATA])
}

fn compare(what: &str, found: &blake3::Hasher, stored: &str) -> Result<(), String> {
    let found = text(found);
    if found == stored { Ok(()) } else { Err(format!("the {what}'s checksum is {found}, not the stored {stored}")) }
}

/// Gives a file whose header was changed the checksum of that: for tests of what is looked at besides.
#[cfg(test)]
pub(super) fn reseal(file: &mut [u8]) {
    let data = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let key = format!("\"{HEADER}\":\"");
    let at = file[..data].windows(key.len()).position(|window| window == key.as_bytes()).unwrap() + key.len();
    file[at..at + blank().len()].copy_from_slice(blank().as_bytes());
    let sum = text(blake3::Hasher::new().update(&file[..data]));
    file[at..at + sum.len()].copy_from_slice(sum.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, ()> {
        Ok(format!("{{\"__metadata__\":{}}}  ", serde_json::json!(metadata)).into_bytes())
    }

    fn metadata_of(header: &[u8]) -> Option<BTreeMap<String, String>> {
        let mut read: BTreeMap<String, BTreeMap<String, String>> = serde_json::from_slice(header).ok()?;
        read.remove("__metadata__")
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_found() {
        let plain = BTreeMap::from([("format".to_owned(), "pt".to_owned()), ("step".to_owned(), "100".to_owned())]);
        let sealed = seal(plain.clone(), blake3::Hasher::new().update(b"data"), header).unwrap();
        let mut reserved = plain;
        reserve(&mut reserved);
        assert_eq!(sealed.len(), header(&reserved).unwrap().len());
        let metadata = metadata_of(&sealed).unwrap();
        assert_eq!(check_header(&sealed, &metadata), Ok(()));
        assert_eq!(check_data(b"data", &metadata), Ok(()));
        assert!(check_data(b"date", &metadata).unwrap_err().contains("the data's checksum is blake3:"));
        for (i, bit) in (0..sealed.len()).flat_map(|i| (0..8).map(move |bit| (i, bit))) {
            let mut flipped = sealed.clone();
            flipped[i] ^= 1 << bit;
            let Some(metadata) = metadata_of(&flipped) else { continue };
            let found = check_header(&flipped, &metadata).and_then(|()| check_data(b"data", &metadata));
            assert!(found.is_err(), "byte {i}, bit {bit}: {}", String::from_utf8_lossy(&flipped));
        }
    }

    #[test]
    fn a_header_without_a_checksum_is_taken_and_not_verified() {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let header = header(&metadata).unwrap();
        assert_eq!(check_header(&header, &metadata), Ok(()));
        assert!(check_data(b"", &metadata).unwrap_err().contains("no checksum of a known algorithm"));
    }
}
