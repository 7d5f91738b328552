//! Lock of a run, held while it is being written.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fail_point::fail_point;
use super::file_checks::without_following;
use crate::error::{Error, Result};

/// File name of the lock within a run. The file is never removed: that would race with the next writer.
const LOCK_FILE: &str = ".lock";

/// Number of locks on each file that this process has locked, with the process: a forked child holds none of its
/// parent's locks.
static HELD: Mutex<BTreeMap<(u32, FileId), usize>> = Mutex::new(BTreeMap::new());

fn held() -> MutexGuard<'static, BTreeMap<(u32, FileId), usize>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes one lock of a file from the list.
fn release(process: u32, file: FileId) {
    let mut held = held();
    if let Some(count) = held.get_mut(&(process, file)) {
        *count -= 1;
        if *count == 0 {
            held.remove(&(process, file));
        }
    }
}

/// Number of attempts to lock the file that is at the path.
const ATTEMPTS: usize = 3;

/// Guard of a locked run. The system releases the lock even if the process is killed.
#[derive(Debug)]
pub struct Lock {
    file: File,
    id: LockId,
    /// Process that took the lock. A forked child shares the open file and must not release it.
    process: u32,
    /// Lock of the number of a process of a sharded run.
    number: Option<Box<Lock>>,
}

/// Unlocks explicitly: closing the file is not enough while a forked child, such as a data loader, has it open.
impl Drop for Lock {
    fn drop(&mut self) {
        if self.is_own() {
            // Before the release, after which another thread may lock the file.
            if let Some(file) = self.id.file {
                release(self.process, file);
            }
            // If this fails, closing the file releases the lock.
            let _ = self.file.unlock();
        }
    }
}

impl Lock {
    /// Locks a run for writing.
    ///
    /// The lock file is neither followed if it is a link, nor waited for if it is a pipe.
    ///
    /// # Errors
    /// [`Error::Locked`] or [`Error::LockedHere`] if another writer holds it, [`Error::Io`] if the lock cannot be
    /// taken, [`Error::Unexpected`] if the lock file is not a regular file.
    pub fn acquire(dir: &Path) -> Result<Lock> {
        Lock::acquire_file(dir, LOCK_FILE, LockKind::Exclusive)
    }

    /// Locks a run for one of the processes that write it together: the run against others, and the number of this
    /// process, if it has one, against a second process of that number.
    ///
    /// # Errors
    /// Those of [`Lock::acquire`].
    pub fn acquire_shared(dir: &Path, number: Option<usize>) -> Result<Lock> {
        let mut lock = Lock::acquire_file(dir, LOCK_FILE, LockKind::Shared)?;
        if let Some(number) = number {
            let name = format!("{LOCK_FILE}-{number:05}");
            let own = Lock::acquire_file(dir, &name, LockKind::Exclusive)?;
            lock.id.number = Some(Box::new(own.id.clone()));
            lock.number = Some(Box::new(own));
        }
        Ok(lock)
    }

    /// Returns true if a tracker has opened the directory at any time.
    pub fn has_been_taken(dir: &Path) -> bool {
        dir.join(LOCK_FILE).symlink_metadata().is_ok()
    }

    fn acquire_file(dir: &Path, name: &str, kind: LockKind) -> Result<Lock> {
        let path = dir.join(name);
        let mut lock = Lock::open(dir, name, kind)?;
        for _ in 0..ATTEMPTS {
            let found = path.symlink_metadata().ok().map(|metadata| file_id(&metadata));
            if found == lock.id.file {
                return Ok(lock);
            }
            // The file was removed between its opening and its lock.
            drop(lock);
            lock = Lock::open(dir, name, kind)?;
        }
        // The numbers of files change from call to call here.
        if let Some(file) = lock.id.file.take() {
            release(lock.process, file);
        }
        Ok(lock)
    }

    fn open(dir: &Path, name: &str, kind: LockKind) -> Result<Lock> {
        let path = &dir.join(name);
        if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_file()) {
            return Err(not_regular(path));
        }
        let mut options = OpenOptions::new();
        // NFS locks a file shared only if it is open for reading, and exclusively only if it is open for writing.
        let open = without_following(options.create(true).truncate(false).read(true).write(true)).open(path);
        let file = open.map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("read", path))?;
        if !metadata.is_file() {
            return Err(not_regular(path));
        }
        let parent = fs::metadata(dir).map_err(Error::io("read", dir))?;
        let id = LockId {
            dir: dir.to_owned(),
            name: name.to_owned(),
            parent: file_id(&parent),
            file: Some(file_id(&metadata)),
            number: None,
        };
        match fail_point(path).map_err(TryLockError::Error).and_then(|()| try_lock(&file, kind)) {
            Ok(()) => {
                let process = std::process::id();
                *held().entry((process, file_id(&metadata))).or_default() += 1;
                Ok(Lock { file, id, process, number: None })
            }
            Err(TryLockError::WouldBlock) => {
                let path = dir.to_owned();
                let is_here = held().contains_key(&(std::process::id(), file_id(&metadata)));
                Err(if is_here { Error::LockedHere { path } } else { Error::Locked { path } })
            }
            Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
        }
    }

    /// Returns true in the process that took the lock, and false in a forked child.
    pub fn is_own(&self) -> bool {
        self.process == std::process::id()
    }

    /// Returns the identity of the lock, for checks before each store.
    pub fn id(&self) -> &LockId {
        &self.id
    }
}

/// Way in which a lock is held.
#[derive(Clone, Copy, Debug)]
enum LockKind {
    Exclusive,
    Shared,
}

/// Locks a file. Network file systems let a signal interrupt that.
fn try_lock(file: &File, kind: LockKind) -> std::result::Result<(), TryLockError> {
    loop {
        let locked = match kind {
            LockKind::Exclusive => file.try_lock(),
            LockKind::Shared => file.try_lock_shared(),
        };
        match locked {
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Identity of a locked file and of its directory.
///
/// The number of a file is not used again while the file is open.
#[derive(Clone, Debug)]
pub struct LockId {
    dir: PathBuf,
    /// Name of the lock file.
    name: String,
    parent: FileId,
    /// Identity of the lock file, if it is the same from call to call.
    file: Option<FileId>,
    /// Lock of the number of a process of a sharded run.
    number: Option<Box<LockId>>,
}

/// Device and number of a file.
type FileId = (u64, u64);

fn file_id(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

impl LockId {
    /// Checks that the locked file is still the lock file of the directory. If it is not, another process can lock the
    /// directory, too.
    ///
    /// A directory that does not exist passes: the operation that needs it returns the error.
    ///
    /// # Errors
    /// [`Error::LockLost`], and [`Error::Io`] if the directory cannot be read.
    pub fn check(&self) -> Result<()> {
        let path = self.dir.join(&self.name);
        let found = match path.symlink_metadata() {
            Ok(metadata) if self.file.is_none_or(|file| file == file_id(&metadata)) => {
                return self.number.as_ref().map_or(Ok(()), |number| number.check());
            }
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        let reason = match fs::metadata(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::io("read", &self.dir)(error)),
            Ok(parent) if file_id(&parent) != self.parent => "the directory was replaced by another one",
            Ok(_) if self.name != LOCK_FILE => "the lock file of this process, `.lock-` and its number, was removed",
            Ok(_) if found => "its lock file `.lock` was replaced by another one",
            Ok(_) => "its lock file `.lock` was removed",
        };
        Err(Error::LockLost { path: self.dir.clone(), reason })
    }
}

fn not_regular(path: &Path) -> Error {
    let why = "the lock file is a link, a pipe or otherwise not a regular file: remove it if no other process writes \
               here";
    Error::unexpected(path, why)
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::fs::fail_point::Fault;

    #[test]
    fn second_writer_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::acquire(dir.path()).unwrap();
        let text = Lock::acquire(dir.path()).unwrap_err().to_string();
        assert!(text.contains("this process is writing") && text.contains(dir.path().to_str().unwrap()), "{text}");
        drop(first);
        // The lock of another process, of which this one knows nothing.
        let other = Lock::acquire(dir.path()).unwrap();
        release(other.process, other.id.file.unwrap());
        let text = Lock::acquire(dir.path()).unwrap_err().to_string();
        assert!(text.contains("another tracker") && text.contains(dir.path().to_str().unwrap()), "{text}");
        drop(other);
        Lock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn processes_of_a_sharded_run_share_it_and_exclude_others() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Lock::has_been_taken(dir.path()));
        let first = Lock::acquire_shared(dir.path(), Some(1)).unwrap();
        assert!(Lock::has_been_taken(dir.path()));
        let second = Lock::acquire_shared(dir.path(), Some(2)).unwrap();
        let third = Lock::acquire_shared(dir.path(), None).unwrap();
        let refused = |locked: Result<Lock>| assert!(matches!(locked, Err(Error::LockedHere { .. })), "{locked:?}");
        refused(Lock::acquire_shared(dir.path(), Some(2)));
        refused(Lock::acquire(dir.path()));
        drop((first, second));
        refused(Lock::acquire(dir.path()));
        drop(third);
        let alone = Lock::acquire(dir.path()).unwrap();
        refused(Lock::acquire_shared(dir.path(), Some(1)));
        drop(alone);
        let again = Lock::acquire_shared(dir.path(), Some(2)).unwrap();
        again.id().check().unwrap();
        fs::remove_file(dir.path().join(".lock-00002")).unwrap();
        let text = again.id().check().unwrap_err().to_string();
        assert!(text.contains("the lock file of this process"), "{text}");
        assert!(held().keys().all(|(process, _)| *process == std::process::id()));
    }

    #[test]
    fn file_system_without_locks_is_an_error_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        for code in [Errno::NOLCK, Errno::OPNOTSUPP, Errno::NOSYS, Errno::PERM, Errno::IO] {
            let _fault = Fault::within(dir.path(), 0..1, code.raw_os_error());
            let text = Lock::acquire(dir.path()).unwrap_err().to_string();
            assert!(text.contains("cannot lock") && text.contains("put the run on another one"), "{text}");
            assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        }
        Lock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn links_pipes_and_devices_are_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let [path, target] = [".lock", "target"].map(|name| dir.path().join(name));
        let command = |program: &str, arguments: &[&str]| {
            std::process::Command::new(program).arg(&path).args(arguments).status().unwrap().success()
        };
        let refused = |what: &str| {
            let text = Lock::acquire(dir.path()).unwrap_err().to_string();
            assert!(text.contains("not a regular file") && text.contains(path.to_str().unwrap()), "{what}: {text}");
            fs::remove_file(&path).unwrap();
        };
        std::os::unix::fs::symlink(&target, &path).unwrap();
        refused("dangling link");
        assert!(!target.exists());
        fs::write(&target, "kept").unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        refused("link");
        assert_eq!(fs::read(&target).unwrap(), b"kept");
        assert!(command("mkfifo", &[]));
        refused("pipe");
        if command("mknod", &["c", "1", "3"]) {
            refused("device");
        } else {
            eprintln!("links_pipes_and_devices_are_not_opened: no device, because mknod is not permitted");
        }
        Lock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn lock_that_is_no_longer_at_its_path_is_lost() {
        let temp = tempfile::tempdir().unwrap();
        let [dir, away] = ["dir", "away"].map(|name| temp.path().join(name));
        fs::create_dir(&dir).unwrap();
        let lock = Lock::acquire(&dir).unwrap();
        lock.id().check().unwrap();
        // The directory is moved away and put back.
        fs::rename(&dir, &away).unwrap();
        lock.id().check().unwrap();
        let lost = |part: &str| {
            let text = lock.id().check().unwrap_err().to_string();
            assert!(text.contains(part) && text.contains(dir.to_str().unwrap()), "{text}");
            assert!(text.contains("another process may write here, too"), "{text}");
        };
        fs::create_dir(&dir).unwrap();
        lost("the directory was replaced");
        let other = Lock::acquire(&dir).unwrap();
        lost("the directory was replaced");
        fs::remove_dir_all(&dir).unwrap();
        fs::rename(&away, &dir).unwrap();
        lock.id().check().unwrap();
        assert!(matches!(other.id().check(), Err(Error::LockLost { .. })));
        fs::remove_file(dir.join(LOCK_FILE)).unwrap();
        lost("`.lock` was removed");
        let other = Lock::acquire(&dir).unwrap();
        lost("`.lock` was replaced");
        other.id().check().unwrap();
    }
}
