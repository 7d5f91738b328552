//! Temporary names: what is being written carries one, and what a killed process left is known by it and removed.
//!
//! Whoever writes holds a lock on what is written, which the system releases with the process: what can be locked is
//! nobody's. A lock is not seen from every machine that shares a disk, so the name tells the machine; what another one
//! left is removed when nobody has touched it for a day.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
#[cfg(any(feature = "import", test))]
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::{Builder, NamedTempFile, TempDir};

/// How all temporary names begin.
const PREFIX: &str = ".posthoc-ema-";

/// After so long, what another machine has not touched is what it left.
const LEFT: Duration = Duration::from_secs(24 * 60 * 60);

/// How often a name is drawn again that another process has taken for one left behind, just as it was made.
const TRIES: usize = 9;

/// What this process is writing.
static LIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Something that is being written, until this is dropped.
#[derive(Debug)]
pub(super) struct Live {
    path: PathBuf,
    /// Holds the lock of a folder; that of a file is its own handle's.
    _lock: Option<File>,
}

impl Live {
    fn new(paths: &mut BTreeSet<PathBuf>, path: &Path, lock: Option<File>) -> Live {
        paths.insert(path.to_owned());
        Live { path: path.to_owned(), _lock: lock }
    }

    /// No longer to be removed when the process is told to end.
    fn finish(&self) {
        live().remove(&self.path);
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.finish();
    }
}

fn live() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a file with a temporary name in a directory.
pub(super) fn file(dir: &Path, permissions: Permissions) -> io::Result<(NamedTempFile, Live)> {
    again(|paths| {
        let file = Builder::new().prefix(&named(PREFIX)).permissions(permissions.clone()).tempfile_in(dir)?;
        if !is_held(file.as_file(), file.path()) {
            return Ok(None);
        }
        let live = Live::new(paths, file.path(), None);
        Ok(Some((file, live)))
    })
}

/// Makes a folder with a temporary name in a directory; `what` tells what for.
pub(super) fn folder(dir: &Path, what: &str, permissions: Permissions) -> io::Result<(TempDir, Held)> {
    again(|paths| {
        let prefix = named(&format!("{PREFIX}{what}-"));
        let folder = Builder::new().prefix(&prefix).permissions(permissions.clone()).tempdir_in(dir)?;
        // Where a folder cannot be opened, it cannot be locked, and nobody takes it for left behind.
        let Ok(handle) = File::open(folder.path()) else { return Ok(Some((folder, None))) };
        if !is_held(&handle, folder.path()) {
            return Ok(None);
        }
        let live = Live::new(paths, folder.path(), Some(handle));
        Ok(Some((folder, Some(live))))
    })
    .map(|(folder, live)| (folder, Held(live)))
}

/// Makes a folder for what only this process needs, for a while. What others left beside it is removed.
#[cfg(feature = "import")]
pub fn scratch_folder(dir: &Path, what: &str) -> io::Result<(TempDir, Held)> {
    remove_left(dir);
    folder(dir, what, Permissions::from_mode(0o700))
}

/// Keeps a folder from being taken for left behind.
#[derive(Debug)]
pub struct Held(Option<Live>);

impl Held {
    /// The folder is whole, and about to get its name: it is not removed any more, not even by a signal half way.
    pub(super) fn finish(&self) {
        if let Some(live) = &self.0 {
            live.finish();
        }
    }
}

/// Whoever ends the process waits until what was made is known.
fn again<T>(make: impl Fn(&mut BTreeSet<PathBuf>) -> io::Result<Option<T>>) -> io::Result<T> {
    for _ in 0..TRIES {
        if let Some(made) = make(&mut live())? {
            return Ok(made);
        }
    }
    Err(io::Error::other("another process removes the temporary files here as soon as they are made"))
}

/// Locks what was made; false where another process was faster and is removing it. A file system without locks is fine:
/// nobody can lock what is there then, and nobody removes it.
fn is_held(handle: &File, path: &Path) -> bool {
    !matches!(handle.try_lock(), Err(fs::TryLockError::WouldBlock)) && path.exists()
}

/// Whether a name is a temporary one.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// A prefix with the machine in it.
fn named(prefix: &str) -> String {
    format!("{prefix}{}-", *MACHINE)
}

/// The machine, as temporary names tell it.
static MACHINE: LazyLock<String> = LazyLock::new(|| {
    let name = rustix::system::uname();
    blake3::hash(name.nodename().to_bytes()).to_hex()[..8].to_owned()
});

/// Removes what processes that were killed left in a directory. Whatever fails is left for the next time.
pub fn remove_left(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if is_temporary(name) && is_left(&path, name) {
            tracing::debug!("{} is removed: the process that wrote it was killed", path.display());
            remove(&path);
        }
    }
}

/// Whether what has a temporary name is nobody's. Links are never followed: they are none of ours.
fn is_left(path: &Path, name: &str) -> bool {
    let Ok(metadata) = path.symlink_metadata() else { return false };
    if !(metadata.is_file() || metadata.is_dir()) {
        return false;
    }
    let own = name.split('-').any(|part| part == *MACHINE);
    let age = || metadata.modified().ok().and_then(|time| time.elapsed().ok());
    if !own && age().is_none_or(|age| age < LEFT) {
        return false;
    }
    // Released with the handle: who writes there would have held it.
    File::open(path).is_ok_and(|handle| handle.try_lock().is_ok())
}

fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// Removes the files and folders that this process is writing: for one that is about to end in the midst of that. From here on
/// whoever begins or finishes one waits for the end.
pub fn remove_unfinished() {
    let paths = live();
    for path in paths.iter() {
        // Threads that write into a folder may be faster, once each.
        for _ in 0..100 {
            remove(path);
            if path.symlink_metadata().is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    std::mem::forget(paths);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_being_written_stays_and_what_nobody_writes_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (file, _file) = file(dir.path(), Permissions::from_mode(0o666)).unwrap();
        let (folder, held) = folder(dir.path(), "import", Permissions::from_mode(0o777)).unwrap();
        fs::write(folder.path().join("inner"), "").unwrap();
        for name in [".posthoc", "mine", ".posthoc-ema.json"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("mine"), dir.path().join(named(PREFIX) + "link")).unwrap();
        let before = names(dir.path());
        assert_eq!(before.len(), 6);
        remove_left(dir.path());
        assert_eq!(names(dir.path()), before);
        // As after a kill: what is there has a name, and no process.
        let path = folder.keep();
        drop(held);
        let (_, killed) = file.keep().unwrap();
        remove_left(dir.path());
        assert!(!path.exists() && !killed.exists());
        assert_eq!(names(dir.path()).len(), 4);
    }

    #[test]
    fn what_another_machine_writes_is_left_to_it_for_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let [new, old] = ["00000000-a", "00000000-b"].map(|name| dir.path().join(format!("{PREFIX}{name}")));
        fs::write(&new, "").unwrap();
        let file = File::create(&old).unwrap();
        file.set_modified(std::time::SystemTime::now() - LEFT - Duration::from_secs(60)).unwrap();
        remove_left(dir.path());
        assert!(new.exists() && !old.exists());
    }
}
