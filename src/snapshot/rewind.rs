//! Marker of a rewind: a run goes back to an older live state, and its younger snapshots are set aside.
//!
//! The marker is written first and says what is moved. The rewind counts from the moment at which the run's live state
//! is the one that the marker names: that is one rename. A listing leaves out what a rewind that counts has not moved
//! yet, so a process that is killed leaves either the old course whole or the new one.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::STATE_FILE;
use super::id::parse;
use super::layout::MAX_HEADER;
use super::session::random_digits;
use super::state_names::is_state;
use crate::error::{Error, Result};
use crate::fs::{AtomicFile, check_regular, find_document};

/// File name of the marker within a run. It begins with a dot and is there only while files are moved.
pub(super) const MARKER_FILE: &str = ".rewind";

/// Name of the folder within a run that holds what is set aside.
pub(super) const ASIDE: &str = "aside";

/// Number of hexadecimal digits in the name of a folder in `aside`.
const DIGITS: usize = 16;

/// Rewind of a run, as its marker stores it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Rewind {
    /// Name of the file of the live state that the run goes back to; of several files, the one that is placed last.
    #[serde(default = "state_file")]
    file: String,
    /// [`header_hash`] of that file.
    state: String,
    /// Name of the folder in `aside` that the files are moved to.
    pub id: String,
    /// Names of files of snapshots that are set aside.
    pub away: Vec<String>,
    /// Folder in `aside` and name of each file of a snapshot that comes back.
    pub back: Vec<(String, String)>,
}

impl Rewind {
    /// Creates a rewind to the state of which this file has this [`header_hash`].
    pub(crate) fn new(file: String, state: String, away: Vec<String>, back: Vec<(String, String)>) -> Rewind {
        Rewind { file, state, id: random_digits(), away, back }
    }

    /// Writes the marker.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let file = AtomicFile::create(&dir.join(MARKER_FILE))?;
        file.write_at(0, serde_json::json!(self).to_string().as_bytes())?;
        file.commit()
    }

    /// Reads the marker of a run, if there is one.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a marker with names that this version does not write, and [`Error::Io`].
    pub(super) fn read(dir: &Path) -> Result<Option<Rewind>> {
        let path = dir.join(MARKER_FILE);
        let Some(text) = find_document(&path)? else { return Ok(None) };
        let rewind: Rewind = serde_json::from_slice(&text).map_err(|error| Error::damaged(&path, error))?;
        // The names become paths: none may lead out of the run.
        let folder =
            rewind.back.iter().map(|(folder, _)| folder).chain([&rewind.id]).find(|name| !is_folder_name(name));
        let is_snapshot = |name: &str| parse(name).is_some();
        let back = rewind.back.iter().map(|(_, name)| name).find(|name| !is_snapshot(name));
        let away = rewind.away.iter().find(|name| !is_snapshot(name) && !is_state(name));
        let name = back.or(away).or(Some(&rewind.file).filter(|name| !is_state(name)));
        if let Some(name) = folder.or(name) {
            return Err(Error::damaged(&path, format!("it names `{name}`, which no rewind moves")));
        }
        Ok(Some(rewind))
    }

    /// Returns true if the run's live state is the one that the rewind goes back to.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn counts(&self, dir: &Path) -> Result<bool> {
        Ok(header_hash(&dir.join(&self.file))?.as_ref() == Some(&self.state))
    }

    /// Returns true if a file of the run is to be set aside and has not been moved yet.
    pub(super) fn hides(&self, dir: &Path, name: &str) -> bool {
        self.away.iter().any(|away| away == name) && !self.folder(dir).join(name).exists()
    }

    /// Returns the path of the folder that the files are moved to.
    pub(crate) fn folder(&self, dir: &Path) -> PathBuf {
        dir.join(ASIDE).join(&self.id)
    }
}

/// Name of the file of a live state, in markers of older versions.
fn state_file() -> String {
    STATE_FILE.to_owned()
}

/// Returns true for the name of a folder in `aside`.
pub(super) fn is_folder_name(name: &str) -> bool {
    name.len() == DIGITS && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Returns a hash of a file's header, which has the checksum of the data in it; `None` if the file does not exist.
///
/// A file without a whole header has a hash of its own.
///
/// # Errors
/// [`Error::Io`], and [`Error::Unexpected`] if it is not a regular file.
pub(crate) fn header_hash(path: &Path) -> Result<Option<String>> {
    match check_regular(path).and_then(|_| hash(path).map_err(Error::io("read", path))) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        hashed => hashed.map(Some),
    }
}

fn hash(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    (&mut file).take(8).read_to_end(&mut bytes)?;
    if let Ok(length) = <[u8; 8]>::try_from(bytes.as_slice()) {
        file.take(u64::from_le_bytes(length).min(MAX_HEADER as u64)).read_to_end(&mut bytes)?;
    }
    Ok(blake3::hash(&bytes).to_hex().to_string())
}
