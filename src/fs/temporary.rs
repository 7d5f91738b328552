//! Temporary names: what is being written carries one, and what a killed process left is known by it and removed.
//!
//! Whoever writes holds a lock on what is written, which the system releases with the process: what can be locked is
//! nobody's. A lock is not seen from every machine that shares a disk, so the name tells the machine, as long as it runs; what
//! another one left, or this one before it was started anew, is removed when nobody has touched it for a day.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
#[cfg(any(feature = "pytorch", test))]
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
pub(super) fn folder(dir: &Path, what: &str, permissions: Permissions) -> io::Result<(TempDir, TempLock)> {
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
    .map(|(folder, live)| (folder, TempLock(live)))
}

/// Makes a folder for what only this process needs, for a while. What others left beside it is removed.
#[cfg(feature = "pytorch")]
pub fn scratch_folder(dir: &Path, what: &str) -> io::Result<(TempDir, TempLock)> {
    remove_left(dir);
    folder(dir, what, Permissions::from_mode(0o700))
}

/// Keeps a folder from being taken for left behind.
#[derive(Debug)]
pub struct TempLock(Option<Live>);

impl TempLock {
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

/// The machine, as temporary names tell it: the kernel that runs, within which locks are seen by all. Names of machines may be
/// alike, as those of copied ones and of containers are.
static MACHINE: LazyLock<String> = LazyLock::new(|| {
    let running = fs::read("/proc/sys/kernel/random/boot_id");
    let machine = running.unwrap_or_else(|_| rustix::system::uname().nodename().to_bytes().to_vec());
    blake3::hash(&machine).to_hex()[..8].to_owned()
});

/// What temporary folders are for.
const FOLDERS: [&str; 2] = ["import-", "average-"];

/// The machine that a temporary name tells of; none for a name that was not made here, whatever it begins with.
fn machine_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(PREFIX)?;
    let rest = FOLDERS.iter().find_map(|what| rest.strip_prefix(what)).unwrap_or(rest);
    let (machine, drawn) = rest.split_once('-')?;
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let own = machine.len() == 8 && machine.bytes().all(hex);
    (own && drawn.len() == 6 && drawn.bytes().all(|byte| byte.is_ascii_alphanumeric())).then_some(machine)
}

/// Removes what processes that were killed left in a directory. Whatever fails is left for the next time.
pub fn remove_left(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // Held until it is removed: who has just made it and comes too late for the lock makes another.
        if let Some(_lock) = machine_of(name).and_then(|machine| left(&path, machine == *MACHINE)) {
            tracing::debug!("{} is removed: the process that wrote it was killed", path.display());
            remove(&path);
        }
    }
}

/// The lock of what has a temporary name and is nobody's. Links are never followed: they are none of ours.
fn left(path: &Path, own: bool) -> Option<File> {
    let metadata = path.symlink_metadata().ok()?;
    if !own && metadata.modified().ok()?.elapsed().ok()? < LEFT {
        return None;
    }
    // Some file systems lock only what is open for writing, which a folder cannot be.
    let handle = match (metadata.is_file(), metadata.is_dir()) {
        (true, _) => File::options().read(true).write(true).open(path).ok()?,
        (_, true) => File::open(path).ok()?,
        _ => return None,
    };
    handle.try_lock().ok()?;
    Some(handle)
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
        let mine = [
            "mine",
            ".posthoc-ema.json",
            ".posthoc-ema-venv",
            ".posthoc-ema-notes-abcdef",
            ".posthoc-ema-12345678-abcde",
        ];
        let long_ago = std::time::SystemTime::now() - 2 * LEFT;
        for name in mine {
            File::create(dir.path().join(name)).unwrap().set_modified(long_ago).unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("mine"), dir.path().join(named(PREFIX) + "linked")).unwrap();
        let before = names(dir.path());
        assert_eq!(before.len(), 8);
        remove_left(dir.path());
        assert_eq!(names(dir.path()), before);
        // As after a kill: what is there has a name, and no process.
        let path = folder.keep();
        drop(held);
        let (_, killed) = file.keep().unwrap();
        remove_left(dir.path());
        assert!(!path.exists() && !killed.exists());
        assert_eq!(names(dir.path()).len(), 6);
    }

    #[test]
    fn what_another_machine_writes_is_left_to_it_for_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let [new, old] = ["00000000-abcdef", "00000000-ABC123"].map(|name| dir.path().join(format!("{PREFIX}{name}")));
        fs::write(&new, "").unwrap();
        let file = File::create(&old).unwrap();
        file.set_modified(std::time::SystemTime::now() - LEFT - Duration::from_secs(60)).unwrap();
        remove_left(dir.path());
        assert!(new.exists() && !old.exists());
    }
}
