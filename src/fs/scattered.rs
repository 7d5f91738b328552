//! Reads of a few scattered bytes of a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// File of which a few scattered bytes are read.
///
/// A mapping would take a table of 4 KB for each 2 MB that are touched, which costs more than the read itself.
#[derive(Debug)]
pub(crate) struct ScatteredFile(File);

impl ScatteredFile {
    /// Opens a file of `bytes` bytes; `None` if it cannot be opened or has another length by now.
    pub(crate) fn open(path: &Path, bytes: u64) -> Option<ScatteredFile> {
        let file = File::open(path).ok()?;
        let has_length = file.metadata().ok()?.len() == bytes;
        // Keeps the system from reading what is near. It may ignore that.
        #[cfg(target_os = "linux")]
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
        has_length.then_some(ScatteredFile(file))
    }

    /// Fills `dst` with the bytes from `start` on.
    pub(crate) fn read(&self, dst: &mut [u8], start: u64) -> io::Result<()> {
        self.0.read_exact_at(dst, start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..10_000).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = ScatteredFile::open(&path, 10_000).unwrap();
        for range in [0..1, 4090..4100, 9_999..10_000, 5..5, 0..10_000] {
            let mut read = vec![0; range.len()];
            file.read(&mut read, range.start as u64).unwrap();
            assert_eq!(read, bytes[range]);
        }
        assert!(file.read(&mut [0; 2], 9_999).is_err());
        assert!(ScatteredFile::open(&path, 9_999).is_none());
        assert!(ScatteredFile::open(&dir.path().join("none"), 0).is_none());
    }
}
