//! Looking at a file before it is opened: what is no regular file may wait for ever (a pipe) or never end (a device).

use std::fs::{self, Metadata};
use std::path::Path;

use crate::error::{Error, Result};

/// The most bytes of a document beside tensors, such as an index of shards. That of a million tensors takes half of it.
const LARGEST: u64 = 1 << 28;

/// Checks that a path leads to a regular file. Links are followed: so the caches of Hugging Face's tools hold their files.
///
/// # Errors
/// [`Error::Io`], and [`Error::Unexpected`] for anything else.
pub fn check_regular(path: &Path) -> Result<Metadata> {
    let metadata = fs::metadata(path).map_err(Error::io("read", path))?;
    if metadata.is_file() {
        Ok(metadata)
    } else {
        Err(Error::unexpected(path, "this is no regular file: move it out of the directory"))
    }
}

/// Reads a document whole.
///
/// # Errors
/// As [`check_regular`], and [`Error::Unexpected`] for one that is longer than any of its kind.
pub fn read_document(path: &Path) -> Result<Vec<u8>> {
    let length = check_regular(path)?.len();
    if length > LARGEST {
        let why = format!("it has {length} bytes, and no document of its kind has more than {LARGEST}: check the file");
        return Err(Error::unexpected(path, why));
    }
    fs::read(path).map_err(Error::io("read", path))
}

/// The same; none where there is no such file.
///
/// # Errors
/// As [`read_document`].
pub fn find_document(path: &Path) -> Result<Option<Vec<u8>>> {
    match read_document(path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_wait_or_never_end_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        for path in [&pipe, &link, &dir.path().to_owned()] {
            let text = read_document(path).unwrap_err().to_string();
            assert!(text.contains("no regular file") && text.contains(path.to_str().unwrap()), "{text}");
        }
        let long = dir.path().join("long");
        fs::File::create(&long).unwrap().set_len(LARGEST + 1).unwrap();
        assert!(read_document(&long).unwrap_err().to_string().contains("it has 268435457 bytes"));
        assert_eq!(find_document(&dir.path().join("missing")).unwrap(), None);
        assert!(matches!(read_document(&dir.path().join("missing")), Err(Error::Io { .. })));
        fs::write(&long, "short").unwrap();
        let through = dir.path().join("through");
        std::os::unix::fs::symlink(&long, &through).unwrap();
        assert_eq!(find_document(&through).unwrap().unwrap(), b"short");
    }
}
