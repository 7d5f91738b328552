//! Mapped files, and advice to the system about memory.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Advice, Mmap, UncheckedAdvice};

mod pages;
mod sigbus;

#[cfg(feature = "cuda")]
pub(crate) use pages::keep_from_children;
pub(crate) use pages::{release_pages, use_large_pages};
pub use sigbus::install_sigbus_handler;

/// File that is mapped for reading.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Mmap,
    entry: &'static sigbus::MappedFile,
}

impl Mapping {
    /// Maps a file, which must not be empty.
    pub(crate) fn new(file: &File, path: &Path) -> io::Result<Mapping> {
        // SAFETY: the mapping is private and read-only. Files of a run are only ever replaced by renaming, never
        // changed in place, so the bytes do not change under the borrow as long as nobody else writes into the run's
        // files.
        let map = unsafe { Mmap::map(file) }?;
        let entry = sigbus::MappedFile::register(&map, path);
        Ok(Mapping { map, entry })
    }

    /// Starts to read bytes of the mapping from the disk in the background. Bytes outside of it are ignored, and so may
    /// be the advice: the bytes are then read on access.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        let start = bytes.as_ptr().addr();
        let end = start + bytes.len();
        let own = self.map.as_ptr().addr();
        if own <= start && end <= own + self.map.len() {
            let _ = self.map.advise_range(Advice::WillNeed, start - own, bytes.len());
        }
    }

    /// Unmaps all pages. Later reads map them again.
    pub(crate) fn unmap_pages(&self) {
        // SAFETY: nothing is ever written through the mapping, so it shows the bytes of the file before and after.
        let _ = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.entry.release();
    }
}
