//! Checks of files before they are opened or replaced.
//!
//! Reading a pipe may block forever, a device may never end, and a device that is replaced is lost to the system.

use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

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

/// Opens a regular file for reading. Returns it and its length.
///
/// # Errors
/// As [`check_regular`].
pub fn open_regular(path: &Path) -> Result<(File, u64)> {
    // A pipe does not wait for a writer, so that it can be refused.
    let opened = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path);
    let opened = opened.and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    let (file, metadata) = opened.map_err(Error::io("read", path))?;
    if metadata.is_file() {
        Ok((file, metadata.len()))
    } else {
        Err(Error::unexpected(path, "this is not a regular file: move it out of the directory"))
    }
}

/// Reads the first bytes of a file, after those that are in `bytes` already.
pub fn read_start(file: &File, bytes: &mut Vec<u8>, length: u64) -> io::Result<()> {
    let known = bytes.len();
    bytes.resize(length as usize, 0);
    file.read_exact_at(&mut bytes[known..], known as u64)
}

/// Checks that a file may be written at a path: that nothing is there, a regular file, or a link to one.
///
/// A link is replaced itself, and its target stays as it is. A link to a pipe or a device is refused as they are,
/// because its name stands for what it leads to.
///
/// # Errors
/// [`Error::Unexpected`] for a directory, a pipe, a socket or a device.
pub fn check_replaceable(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
    if metadata.is_file() {
        return Ok(());
    }
    if metadata.is_dir() {
        return Err(Error::unexpected(path, "this is a directory: name a file in it"));
    }
    let kind = kind(metadata.file_type());
    let why = format!("this is a {kind}, which a file would replace: name another file, or /dev/stdout for a stream");
    Err(Error::unexpected(path, why))
}

fn kind(file_type: FileType) -> &'static str {
    match (file_type.is_fifo(), file_type.is_socket()) {
        (true, _) => "pipe",
        (_, true) => "socket",
        _ => "device",
    }
}

/// Makes opening fail on a link instead of following it, and return at once on a pipe.
pub(super) fn without_following(options: &mut OpenOptions) -> &mut OpenOptions {
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
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
