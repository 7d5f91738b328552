//! Checksums of a file, both stored in its header: one of the data section, and one of the header itself.

use std::collections::BTreeMap;

/// Key of the checksum of the data section.
const DATA: &str = "checksum";

/// Key of the checksum of all bytes before the data section, computed with zeros in its own place.
const HEADER: &str = "header_checksum";

/// Prefix of a checksum: the name of the algorithm.
const ALGORITHM: &str = "blake3:";

/// Number of hexadecimal digits of a checksum.
const DIGITS: usize = 64;

/// Returns true for the key of a checksum.
pub(super) fn is_key(key: &str) -> bool {
    key == DATA || key == HEADER
}

/// Formats a checksum for the metadata.
fn text(hasher: &blake3::Hasher) -> String {
    format!("{ALGORITHM}{}", hasher.finalize().to_hex())
}

/// Returns a placeholder as long as a checksum.
fn blank() -> String {
    format!("{ALGORITHM}{}", "0".repeat(DIGITS))
}

/// Adds placeholders for both checksums to the metadata.
pub(super) fn reserve(metadata: &mut BTreeMap<String, String>) {
    metadata.insert(DATA.into(), blank());
    metadata.insert(HEADER.into(), blank());
}

/// Adds both checksums to the metadata and returns the header that `header` makes of them.
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

/// Compares the bytes before the data section with their checksum. A file without any checksum passes.
///
/// # Errors
/// Text of the reason.
pub(super) fn check_header(bytes: &[u8], metadata: &BTreeMap<String, String>) -> Result<(), String> {
    let Some(stored) = metadata.get(HEADER) else {
        if metadata.contains_key(DATA) {
            return Err(format!("there is a checksum of the data, but none of the header (`{HEADER}`)"));
        }
        return Ok(());
    };
    let entry = format!("\"{HEADER}\":\"{stored}\"");
    let begin = bytes.windows(entry.len()).position(|window| window == entry.as_bytes());
    let Some(begin) = begin else { return Err(format!("the header's checksum is not written as `{entry}`")) };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..begin]).update(format!("\"{HEADER}\":\"{}\"", blank()).as_bytes());
    hasher.update(&bytes[begin + entry.len()..]);
    compare("header", &hasher, stored)
}

/// Compares the data section with its checksum, and checks that both checksums are stored.
///
/// # Errors
/// Text of the reason.
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

/// Updates the checksum of a changed header, for tests of the other checks.
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
    fn header_without_checksum_opens_but_does_not_verify() {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let header = header(&metadata).unwrap();
        assert_eq!(check_header(&header, &metadata), Ok(()));
        assert!(check_data(b"", &metadata).unwrap_err().contains("no checksum of a known algorithm"));
    }
}
