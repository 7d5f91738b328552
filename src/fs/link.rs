//! Second name of a file: a hard link, or a copy if the file system has none.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::atomic::parent_dir;
use super::fail_point::attempt;
use super::temporary;
use crate::error::{Error, Result};

/// Makes `to` a hard link to `from`, or a copy of it, and replaces a file of that name atomically.
///
/// It is made in a private folder first, where no other user can place a file or a link under its name.
///
/// # Errors
/// [`Error::Io`].
pub fn replace_by_link(from: &Path, to: &Path) -> Result<()> {
    let private = Permissions::from_mode(0o700);
    let (folder, _lock) = temporary::folder(parent_dir(to), "link", private).map_err(Error::io("write", to))?;
    let link = folder.path().join("file");
    let linked = || fs::hard_link(from, &link).or_else(|_| copy(from, &link));
    attempt("write", to, || linked().and_then(|()| File::open(&link)?.sync_all()))?;
    // A rename between two links of one file leaves both. The other one is removed with the folder.
    attempt("rename into place", to, || fs::rename(&link, to))
}

/// Copies a file and its mode to a name that does not exist.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    let mut copied = File::create_new(to)?;
    io::copy(&mut source, &mut copied)?;
    copied.set_permissions(source.metadata()?.permissions())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_replaces_a_file_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to, copied] = ["from", "to", "copied"].map(|name| dir.path().join(name));
        fs::write(&from, "new").unwrap();
        fs::write(&to, "old").unwrap();
        for _ in 0..2 {
            replace_by_link(&from, &to).unwrap();
            assert_eq!(fs::read(&to).unwrap(), b"new");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
        copy(&from, &copied).unwrap();
        assert_eq!(fs::read(&copied).unwrap(), b"new");
        std::os::unix::fs::symlink(dir.path().join("target"), dir.path().join("link")).unwrap();
        assert_eq!(copy(&from, &dir.path().join("link")).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert!(!dir.path().join("target").exists());
    }
}
