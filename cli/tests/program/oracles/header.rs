//! Headers of safetensors files, compared with the reader of the safetensors crate.

use std::fs;
use std::path::Path;

use posthoc_ema::Error;
use posthoc_ema::snapshot::StoredFile;
use safetensors::SafeTensors;

use super::{check_error, scratch};

/// Reads a file of these bytes with both readers.
///
/// The reference accepts every file that ours accepts, with equal contents.
pub fn check(bytes: &[u8]) {
    let dir = scratch();
    let path = dir.path().join("0.1.safetensors");
    fs::write(&path, bytes).unwrap();
    let reference = SafeTensors::read_metadata(bytes).and_then(|(_, metadata)| {
        SafeTensors::deserialize(bytes).map(|tensors| (metadata.metadata().clone(), tensors))
    });
    match (StoredFile::open(&path), reference) {
        (Ok(file), Ok((metadata, tensors))) => assert_same(&file, metadata.unwrap_or_default().into_iter(), &tensors),
        (Ok(_), Err(error)) => panic!("the reference refuses the file: {error}"),
        (Err(error), Ok(_)) => {
            let text = error.to_string();
            let stricter = text.contains("is in the header twice") || text.contains("the file is empty");
            assert!(stricter, "the reference accepts the file: {text}");
            check_error(&error, &path);
        }
        (Err(error), Err(_)) => {
            assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
            check_error(&error, &path);
        }
    }
    check_snapshot(&path);
}

fn assert_same(file: &StoredFile, metadata: impl Iterator<Item = (String, String)>, tensors: &SafeTensors<'_>) {
    assert_eq!(*file.metadata(), metadata.collect());
    assert_eq!(file.tensors().len(), tensors.len());
    for (name, stored) in file.tensors().iter() {
        let theirs = tensors.tensor(name).unwrap();
        assert_eq!((stored.dtype, &stored.shape[..]), (theirs.dtype(), theirs.shape()), "{name}");
        assert_eq!(file.bytes(stored), theirs.data(), "{name}");
    }
}

/// Opens the file as a snapshot. An error names it.
fn check_snapshot(path: &Path) {
    let id = posthoc_ema::snapshot::SnapshotId { index: 0, step: 1 };
    if let Err(error) = posthoc_ema::snapshot::Snapshot::open(id, &[path.to_owned()]) {
        check_error(&error, path);
    }
}
