//! Checks of a file before it is opened: reading a pipe may block forever, and a device may never end.

use std::fs::{self, Metadata};
use std::path::Path;

use crate::error::{Error, Result};

/// Largest document beside tensors in bytes. The index of a million tensors in shards takes half of it.
const MAX_DOCUMENT: u64 = 1 << 28;

/// Checks that a path leads to a regular file. Follows links, which the caches of Hugging Face's tools use.
///
/// # Errors
/// [`Error::Io`], and [`Error::Unexpected`] if it is not a regular file.
pub fn check_regular(path: &Path) -> Result<Metadata> {
    let metadata = fs::metadata(path).map_err(Error::io("read", path))?;
    if metadata.is_file() {
        Ok(metadata)
    } else {
        Err(Error::unexpected(path, "this is not a regular file: move it out of the directory"))
    }
}

/// Reads a whole document.
///
/// # Errors
/// As [`check_regular`], and [`Error::Unexpected`] if it has more than 256 MiB.
pub fn read_document(path: &Path) -> Result<Vec<u8>> {
    let length = check_regular(path)?.len();
    if length > MAX_DOCUMENT {
        let why = format!("it has {length} bytes, but such a document has at most {MAX_DOCUMENT}: check the file");
        return Err(Error::unexpected(path, why));
    }
    fs::read(path).map_err(Error::io("read", path))
}

/// Reads a whole document, or returns `None` if the file does not exist.
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
    fn irregular_and_huge_files_are_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        for path in [&pipe, &link, &dir.path().to_owned()] {
            let text = read_document(path).unwrap_err().to_string();
            assert!(text.contains("not a regular file") && text.contains(path.to_str().unwrap()), "{text}");
        }
        let long = dir.path().join("long");
        fs::File::create(&long).unwrap().set_len(MAX_DOCUMENT + 1).unwrap();
        assert!(read_document(&long).unwrap_err().to_string().contains("it has 268435457 bytes"));
        assert_eq!(find_document(&dir.path().join("missing")).unwrap(), None);
        assert!(matches!(read_document(&dir.path().join("missing")), Err(Error::Io { .. })));
        fs::write(&long, "short").unwrap();
        let through = dir.path().join("through");
        std::os::unix::fs::symlink(&long, &through).unwrap();
        assert_eq!(find_document(&through).unwrap().unwrap(), b"short");
    }
}
