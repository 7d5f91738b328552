//! The checkpoints in a directory, by their names.

use std::fs;
use std::path::{Path, PathBuf};

use super::Tool;
use crate::error::{Error, Result};

/// A checkpoint, told by its name `INDEX.CALL.pt`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct File {
    /// The step in the name: the calls that the tool had counted.
    pub call: u64,
    /// Which of the profiles.
    pub index: usize,
    pub path: PathBuf,
}

impl File {
    /// The name of the file, for messages that tell of several.
    pub(super) fn name(&self) -> String {
        format!("{}.{}.pt", self.index, self.call)
    }
}

/// The checkpoints of a directory, the oldest first, and the names of other `.pt` files.
///
/// # Errors
/// [`Error::Io`], and [`Error::Unexpected`] where there is no checkpoint, or where they are not those of so many profiles.
pub(super) fn list(tool: Tool, dir: &Path, profiles: usize) -> Result<(Vec<File>, Vec<String>)> {
    let (mut files, mut others) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        // The tools' names are ASCII.
        let Some(name) = name.to_str() else { continue };
        match parse(name) {
            Some((index, call)) => files.push(File { call, index, path: dir.join(name) }),
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

/// Only the very names that the tools write count.
fn parse(name: &str) -> Option<(usize, u64)> {
    let (index, call) = name.strip_suffix(".pt")?.split_once('.')?;
    let (index, call) = (index.parse().ok()?, call.parse().ok()?);
    (format!("{index}.{call}.pt") == name).then_some((index, call))
}

fn check_indices(dir: &Path, files: &[File], profiles: usize) -> Result<()> {
    if let Some(file) = files.iter().find(|file| file.index >= profiles) {
        let why = format!(
            "this is an average of profile {}, counted from 0, and {profiles} are given: give all that were tracked, in order",
            file.index
        );
        return Err(Error::unexpected(&file.path, why));
    }
    if let Some(missing) = (0..profiles).find(|&index| files.iter().all(|file| file.index != index)) {
        let why = format!(
            "no checkpoint of profile {missing}, counted from 0, is in it ({missing}.STEP.pt), and {profiles} are given: bring \
             its files back, or give those profiles only that were tracked"
        );
        return Err(Error::unexpected(dir, why));
    }
    Ok(())
}
