//! Temporary files and folders, and removal of those that killed processes left.
//!
//! The process that writes a temporary file holds a lock on it, which the system releases when the process ends: an
//! unlocked one is a leftover. Locks are not visible to every machine that shares a disk, so the name contains an
//! identifier of the machine since its last boot. A temporary file of another identifier is removed one day after it
//! was last modified.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tempfile::{Builder, TempDir};

use super::file_checks::without_following;

/// Prefix of all temporary names.
const PREFIX: &str = ".posthoc-ema-";

/// Age at which a temporary file of another machine is a leftover.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Number of attempts to create a temporary file. One fails if another process removes the file before it is locked.
const ATTEMPTS: usize = 9;

/// Temporary files and folders that this process is writing.
static LIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Guard that keeps a path in [`LIVE`].
#[derive(Debug)]
struct LiveEntry {
    path: PathBuf,
}

impl LiveEntry {
    fn new(paths: &mut BTreeSet<PathBuf>, path: &Path) -> LiveEntry {
        paths.insert(path.to_owned());
        LiveEntry { path: path.to_owned() }
    }

    /// Removes the path, so that [`remove_unfinished`] leaves it alone.
    fn finish(&self) {
        live().remove(&self.path);
    }
}

impl Drop for LiveEntry {
    fn drop(&mut self) {
        self.finish();
    }
}

fn live() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// File with a temporary name. Unless it is persisted, it is removed on drop, also if its directory was renamed.
#[derive(Debug)]
pub(super) struct TempFile {
    file: File,
    live: LiveEntry,
    is_persisted: bool,
}

impl TempFile {
    /// Creates a file with a temporary name in a directory. Fails if the name exists, and follows no link.
    pub(super) fn create(dir: &Path, permissions: Permissions) -> io::Result<TempFile> {
        let mode = permissions.mode();
        retry(|paths| {
            // The error of the system, with its number: that of `tempfile_in` has none.
            let create = |path: &Path| File::options().read(true).write(true).create_new(true).mode(mode).open(path);
            let file = Builder::new().prefix(&with_machine(PREFIX)).make_in(dir, create)?;
            let (file, path) = file.keep().map_err(|failed| failed.error)?;
            if !try_lock(&file, &path) {
                let _ = fs::remove_file(&path);
                remove_moved(&file, &path);
                return Ok(None);
            }
            Ok(Some(TempFile { file, live: LiveEntry::new(paths, &path), is_persisted: false }))
        })
    }

    pub(super) fn as_file(&self) -> &File {
        &self.file
    }

    /// Renames the file, and replaces a file of that name.
    pub(super) fn persist(mut self, path: &Path) -> io::Result<()> {
        fs::rename(&self.live.path, path)?;
        self.is_persisted = true;
        Ok(())
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.is_persisted {
            let _ = fs::remove_file(&self.live.path);
            remove_moved(&self.file, &self.live.path);
        }
    }
}

/// Removes a temporary file or folder whose directory was renamed since it was created.
///
/// The directory may be renamed again meanwhile.
fn remove_moved(handle: &File, path: &Path) {
    for _ in 0..ATTEMPTS {
        // A removed file has another name, and so has one that was persisted.
        match current_path(handle).filter(|current| current.file_name() == path.file_name()) {
            Some(current) => remove(&current),
            None => return,
        }
    }
}

/// Returns the path of an open file or folder, as the system knows it now.
#[cfg(target_os = "linux")]
fn current_path(handle: &File) -> Option<PathBuf> {
    use std::os::fd::AsRawFd;

    fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd())).ok()
}

#[cfg(target_vendor = "apple")]
fn current_path(handle: &File) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;

    let path = rustix::fs::getpath(handle).ok()?;
    Some(std::ffi::OsString::from_vec(path.into_bytes()).into())
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn current_path(_: &File) -> Option<PathBuf> {
    None
}

/// Creates a folder with a temporary name in a directory. `purpose` becomes part of the name.
pub(super) fn folder(dir: &Path, purpose: &str, permissions: Permissions) -> io::Result<(TempDir, TempLock)> {
    retry(|paths| {
        let prefix = with_machine(&format!("{PREFIX}{purpose}-"));
        let folder = Builder::new().prefix(&prefix).permissions(permissions.clone()).tempdir_in(dir)?;
        let handle = match File::open(folder.path()) {
            Ok(handle) => handle,
            // Another process took it for a leftover before it was locked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // A folder that cannot be opened cannot be locked, and no process takes it for a leftover.
            Err(_) => return Ok(Some((folder, None))),
        };
        if !try_lock(&handle, folder.path()) {
            let path = folder.path().to_owned();
            drop(folder);
            remove_moved(&handle, &path);
            return Ok(None);
        }
        let live = LiveEntry::new(paths, folder.path());
        Ok(Some((folder, Some((live, handle)))))
    })
    .map(|(folder, live)| (folder, TempLock(live)))
}

/// Lock that keeps a folder from being taken for a leftover, with the handle that holds it.
///
/// Dropped after the folder, it removes a folder whose parent was renamed.
#[derive(Debug)]
pub struct TempLock(Option<(LiveEntry, File)>);

impl TempLock {
    /// Marks the folder as finished, so that [`remove_unfinished`] leaves it alone.
    pub(super) fn finish(&self) {
        if let Some((live, _)) = &self.0 {
            live.finish();
        }
    }
}

impl Drop for TempLock {
    fn drop(&mut self) {
        if let Some((live, handle)) = &self.0 {
            remove_moved(handle, &live.path);
        }
    }
}

/// Calls `create` until it succeeds. [`LIVE`] is locked meanwhile, so that [`remove_unfinished`] sees what it created.
fn retry<T>(create: impl Fn(&mut BTreeSet<PathBuf>) -> io::Result<Option<T>>) -> io::Result<T> {
    for _ in 0..ATTEMPTS {
        if let Some(created) = create(&mut live())? {
            return Ok(created);
        }
    }
    Err(io::Error::other("another process removes the temporary files here as soon as they are created"))
}

/// Locks a new file or folder. Returns false if another process has locked it and is removing it, or if its directory
/// was renamed.
///
/// On a file system without locks, no process can lock it, so none removes it.
fn try_lock(handle: &File, path: &Path) -> bool {
    !matches!(handle.try_lock(), Err(fs::TryLockError::WouldBlock)) && path.exists()
}

/// Returns true if a name is a temporary one.
pub fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Appends the identifier of this machine to a prefix.
fn with_machine(prefix: &str) -> String {
    format!("{prefix}{}-", *MACHINE)
}

/// Identifier of this machine: a hash of the boot ID, because all processes of one kernel see the same locks.
///
/// Host names are not unique: copies of a machine and containers share them.
static MACHINE: LazyLock<String> = LazyLock::new(|| {
    let boot_id = fs::read("/proc/sys/kernel/random/boot_id");
    let machine = boot_id.unwrap_or_else(|_| rustix::system::uname().nodename().to_bytes().to_vec());
    blake3::hash(&machine).to_hex()[..8].to_owned()
});

/// Purposes of temporary folders, in their names.
const PURPOSES: [&str; 3] = ["import-", "average-", "link-"];

/// Returns the machine in a temporary name, or `None` if this crate did not create it.
fn machine_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(PREFIX)?;
    let rest = PURPOSES.iter().find_map(|purpose| rest.strip_prefix(purpose)).unwrap_or(rest);
    let (machine, random) = rest.split_once('-')?;
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let is_machine = machine.len() == 8 && machine.bytes().all(is_hex);
    let is_random = random.len() == 6 && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (is_machine && is_random).then_some(machine)
}

/// Removes the temporary files and folders that killed processes left in a directory. Ignores errors.
pub fn remove_leftovers(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // The lock is held until the removal, so that a process which has just created this file creates another.
        if let Some(_lock) = machine_of(name).and_then(|machine| lock_leftover(&path, machine == *MACHINE)) {
            tracing::debug!("{}: removed, because the process that wrote it was killed", path.display());
            remove(&path);
        }
    }
}

/// Locks a leftover, or returns `None` if the file may be in use. Never follows links: this crate creates none.
fn lock_leftover(path: &Path, own: bool) -> Option<File> {
    let metadata = path.symlink_metadata().ok()?;
    if !own && metadata.modified().ok()?.elapsed().ok()? < LEFTOVER_AGE {
        return None;
    }
    // Some file systems lock only files that are open for writing. A folder cannot be.
    let handle = match (metadata.is_file(), metadata.is_dir()) {
        (true, _) => without_following(File::options().read(true).write(true)).open(path).ok()?,
        (_, true) => without_following(File::options().read(true)).open(path).ok()?,
        _ => return None,
    };
    handle.try_lock().ok()?;
    Some(handle)
}

fn remove(path: &Path) {
    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
}

/// Removes all files and folders that this process is writing, before it ends early.
///
/// Threads that begin or finish one afterwards block until the end of the process.
pub fn remove_unfinished() {
    let paths = live();
    for path in paths.iter() {
        // Threads that still write into the folder can make the removal fail.
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
    fn only_leftovers_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = TempFile::create(dir.path(), Permissions::from_mode(0o666)).unwrap();
        let (folder, lock) = folder(dir.path(), "import", Permissions::from_mode(0o777)).unwrap();
        fs::write(folder.path().join("inner"), "").unwrap();
        let foreign = [
            "mine",
            ".posthoc-ema.json",
            ".posthoc-ema-venv",
            ".posthoc-ema-notes-abcdef",
            ".posthoc-ema-12345678-abcde",
        ];
        let long_ago = std::time::SystemTime::now() - 2 * LEFTOVER_AGE;
        for name in foreign {
            File::create(dir.path().join(name)).unwrap().set_modified(long_ago).unwrap();
        }
        std::os::unix::fs::symlink(dir.path().join("mine"), dir.path().join(with_machine(PREFIX) + "linked")).unwrap();
        let before = names(dir.path());
        assert_eq!(before.len(), 8);
        remove_leftovers(dir.path());
        assert_eq!(names(dir.path()), before);
        drop((folder, lock, file));
        assert_eq!(names(dir.path()).len(), 6);
        // As after a kill: the files exist, but no process holds their locks.
        let killed = ["", "link-"].map(|purpose| with_machine(&format!("{PREFIX}{purpose}")) + "abcdef");
        let killed = killed.map(|name| dir.path().join(name));
        fs::write(&killed[0], "").unwrap();
        fs::create_dir(&killed[1]).unwrap();
        remove_leftovers(dir.path());
        assert_eq!(names(dir.path()).len(), 6);
    }

    #[test]
    fn files_in_a_renamed_directory_are_removed() {
        let temp = tempfile::tempdir().unwrap();
        let [dir, away] = ["dir", "away"].map(|name| temp.path().join(name));
        fs::create_dir(&dir).unwrap();
        let file = TempFile::create(&dir, Permissions::from_mode(0o666)).unwrap();
        let (folder, lock) = folder(&dir, "average", Permissions::from_mode(0o777)).unwrap();
        fs::write(folder.path().join("inner"), "").unwrap();
        let persisted = TempFile::create(&dir, Permissions::from_mode(0o666)).unwrap();
        persisted.persist(&dir.join("whole")).unwrap();
        fs::rename(&dir, &away).unwrap();
        drop((file, folder, lock));
        fs::rename(&away, &dir).unwrap();
        assert_eq!(names(&dir), ["whole"]);
    }

    #[test]
    fn files_of_another_machine_are_kept_for_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let [new, old] = ["00000000-abcdef", "00000000-ABC123"].map(|name| dir.path().join(format!("{PREFIX}{name}")));
        fs::write(&new, "").unwrap();
        let file = File::create(&old).unwrap();
        file.set_modified(std::time::SystemTime::now() - LEFTOVER_AGE - Duration::from_secs(60)).unwrap();
        remove_leftovers(dir.path());
        assert!(new.exists() && !old.exists());
    }
}
