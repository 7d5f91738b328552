//! The checkpoints in a directory, by their names.

use std::fs;
use std::path::{Path, PathBuf};

use super::Tool;
use crate::error::{Error, Result};

/// Checkpoint in a file that is named `INDEX.CALL.pt`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CheckpointFile {
    /// Step in the name: the calls that the tool had counted.
    pub call: u64,
    /// Index of the profile.
    pub index: usize,
    pub path: PathBuf,
}

impl CheckpointFile {
    /// Returns the file's name, without its directory.
    pub(super) fn name(&self) -> String {
        file_name(self.index, self.call)
    }
}

fn file_name(index: usize, call: u64) -> String {
    format!("{index}.{call}.pt")
}

/// Lists the checkpoints of a directory in order of their steps, and the names of other `.pt` files.
///
/// # Errors
/// [`Error::Io`]; [`Error::Unexpected`] if the files are not those of exactly the given number of profiles.
pub(super) fn list(tool: Tool, dir: &Path, profiles: usize) -> Result<(Vec<CheckpointFile>, Vec<String>)> {
    let mut files = Vec::new();
    let mut others = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        // The tools' names are ASCII.
        let Some(name) = name.to_str() else { continue };
        match parse(name) {
            Some((index, call)) => files.push(CheckpointFile { call, index, path: dir.join(name) }),
            None if name.ends_with(".pt") => others.push(name.to_owned()),
            None => {}
        }
    }
    files.sort();
    others.sort();
    if files.is_empty() {
        let why =
            format!("no checkpoint is in it (INDEX.STEP.pt, such as 0.1000.pt): name the directory {tool} wrote to");
        return Err(Error::unexpected(dir, why));
    }
    check_indices(dir, &files, profiles)?;
    Ok((files, others))
}

/// Parses a file name; `None` unless it is exactly as the tools write it.
fn parse(name: &str) -> Option<(usize, u64)> {
    let (index, call) = name.strip_suffix(".pt")?.split_once('.')?;
    let index = index.parse().ok()?;
    let call = call.parse().ok()?;
    (file_name(index, call) == name).then_some((index, call))
}

/// Checks that the files are those of all the profiles given, and of no others.
fn check_indices(dir: &Path, files: &[CheckpointFile], profiles: usize) -> Result<()> {
    if let Some(file) = files.iter().find(|file| file.index >= profiles) {
        let why = format!(
            "this is an average of profile {}, counted from 0, and {profiles} are given: give all that were tracked, \
             in order",
            file.index
        );
        return Err(Error::unexpected(&file.path, why));
    }
    if let Some(missing) = (0..profiles).find(|&index| files.iter().all(|file| file.index != index)) {
        let why = format!(
            "no checkpoint of profile {missing}, counted from 0, is in it ({missing}.STEP.pt), and {profiles} are \
             given: bring its files back, or give only the profiles that were tracked"
        );
        return Err(Error::unexpected(dir, why));
    }
    Ok(())
}
