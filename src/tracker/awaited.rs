//! Wait of an evaluation until all processes of a sharded run have written their parts of earlier snapshots.

use std::thread;
use std::time::{Duration, Instant};

use super::PostHocEma;
use crate::error::{Error, Result};
use crate::snapshot::{FileOf, ListedFile, PartNumber, SnapshotId, is_complete, list_files};

/// Longest wait for the files of other processes.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 300 });

/// Time between two looks at the directory.
const PAUSE: Duration = Duration::from_millis(20);

impl PostHocEma {
    /// Waits until the snapshots before `step` that retention keeps are complete, so that all processes plan with the
    /// same ones.
    ///
    /// A snapshot of which another process has given up its file, after a failed write, is left out by all.
    ///
    /// # Errors
    /// [`Error::Unexpected`] for a file that is not there after five minutes.
    pub(super) fn await_snapshots(&self, step: u64) -> Result<()> {
        let Some(shard) = self.shard else { return Ok(()) };
        let begun = Instant::now();
        // Snapshots of earlier starts are as complete as they will ever be.
        let since = self.session.as_ref().map_or(0, |session| session.from).min(step);
        loop {
            let files = list_files(&self.dir)?;
            let ids = self.kept.range(since..step).flat_map(|&step| self.ids_of(step));
            let Some(missing) = ids.filter_map(|id| missing_part(&files, id, shard.ranks)).next() else {
                return Ok(());
            };
            if begun.elapsed() > PATIENCE {
                let why = format!(
                    "this file of another process is not there after {} seconds: look at the errors of that process. \
                     All processes must take part in the training until its end",
                    PATIENCE.as_secs()
                );
                return Err(Error::unexpected(&self.dir.join(missing), why));
            }
            thread::sleep(PAUSE);
        }
    }

    fn ids_of(&self, step: u64) -> impl Iterator<Item = SnapshotId> {
        (0..self.settings.profiles.len()).map(move |index| SnapshotId { index, step })
    }
}

/// Returns the name of a file that an incomplete snapshot of this start still waits for.
fn missing_part(files: &[ListedFile], id: SnapshotId, ranks: usize) -> Option<String> {
    if is_complete(files, FileOf::Snapshot(id)) {
        return None;
    }
    let part = |i: usize| Some(PartNumber { i, n: ranks });
    let missing: Vec<usize> = (1..=ranks)
        .filter(|&i| !files.iter().any(|file| file.of == FileOf::Snapshot(id) && file.part == part(i)))
        .collect();
    // A process writes its files in order: if it has written a later one, it has given up this one.
    let is_later = |of: FileOf| match of {
        FileOf::Snapshot(other) => other.step > id.step,
        FileOf::State(_) => false,
    };
    let has_given_up = |i: &usize| files.iter().any(|file| file.part == part(*i) && is_later(file.of));
    if missing.iter().any(has_given_up) {
        return None;
    }
    missing.first().map(|&i| id.part_name(i, ranks))
}
