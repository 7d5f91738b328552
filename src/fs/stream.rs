//! Outputs that are written to and not replaced: what a process has open, and the null device.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::atomic::{file_limit, write_within};
use super::fail_point::attempt;
use super::file_checks::check_replaceable;
use crate::error::{Error, Result};

/// Output that a path such as `/dev/stdout` names.
///
/// Blocks are written in any order, so they are collected in an unnamed file among the system's temporary files, and
/// copied to the stream in the end. Nothing is left of that file after a kill.
#[derive(Debug)]
pub struct Stream {
    path: PathBuf,
    to: File,
    /// `None` for the null device, which takes blocks in any order.
    collected: Option<File>,
    /// Largest length of a file that this process may write.
    limit: Option<u64>,
}

/// Outputs that are written to, by the system's names for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamName {
    Null,
    /// Number of an open file of this process.
    Descriptor(u32),
}

const STDOUT: u32 = 1;
const STDERR: u32 = 2;

impl StreamName {
    fn of(path: &Path) -> Option<StreamName> {
        let is = |name: &str| path == Path::new(name);
        if is("/dev/null") {
            return Some(StreamName::Null);
        }
        if is("/dev/stdout") || is("/dev/stderr") {
            return Some(StreamName::Descriptor(if is("/dev/stdout") { STDOUT } else { STDERR }));
        }
        let dir = path.parent()?;
        let number = path.file_name()?.to_str()?;
        let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
        let is_open_file = dir == Path::new("/dev/fd") || dir == Path::new("/proc/self/fd");
        (is_open_file && is_number).then(|| number.parse().ok().map(StreamName::Descriptor))?
    }

    /// Opens the output for writing.
    fn open(self) -> io::Result<File> {
        match self {
            StreamName::Null => File::options().write(true).open("/dev/null"),
            // A copy shares the position in a file that stdout is sent to.
            StreamName::Descriptor(STDOUT) => Ok(io::stdout().as_fd().try_clone_to_owned()?.into()),
            StreamName::Descriptor(STDERR) => Ok(io::stderr().as_fd().try_clone_to_owned()?.into()),
            StreamName::Descriptor(number) => {
                let path = format!("/dev/fd/{number}");
                // The reading end of a pipe could be opened for writing, and would then wait for this process.
                let link = fs::symlink_metadata(&path)?;
                if link.is_symlink() && link.permissions().mode() & 0o200 == 0 {
                    return Err(Errno::BADF.into());
                }
                open_without_waiting(&path)
            }
        }
    }
}

/// Opens a file for appending. A named pipe whose readers have gone away is an error, and is not waited for.
fn open_without_waiting(path: &str) -> io::Result<File> {
    let nonblock = OFlags::NONBLOCK;
    let file = File::options().append(true).custom_flags(nonblock.bits() as i32).open(path).map_err(|error| {
        if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) { Errno::PIPE.into() } else { error }
    })?;
    rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - nonblock)?;
    Ok(file)
}

impl Stream {
    /// Returns true if a path names a stream.
    pub fn is_named(path: &Path) -> bool {
        StreamName::of(path).is_some()
    }

    /// Returns true if a path names standard output.
    pub fn is_stdout(path: &Path) -> bool {
        StreamName::of(path) == Some(StreamName::Descriptor(STDOUT))
    }

    /// Opens the stream that a path names, or returns `None` for any other path.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Unexpected`] for a terminal.
    pub fn open(path: &Path) -> Result<Option<Stream>> {
        let Some(name) = StreamName::of(path) else { return Ok(None) };
        let to = name.open().map_err(Error::io("open", path))?;
        if to.is_terminal() {
            return Err(Error::unexpected(path, "this is a terminal: send the weights into a pipe or a file"));
        }
        Ok(Some(Stream { path: path.to_owned(), to, collected: collected(name)?, limit: file_limit() }))
    }

    /// Collects bytes at an offset, in any order and from any thread.
    ///
    /// # Errors
    /// [`Error::Io`], as for a full disk.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match &self.collected {
            Some(file) => attempt("write", &std::env::temp_dir(), || write_within(self.limit, file, offset, bytes)),
            None => attempt("write", &self.path, || write_within(self.limit, &self.to, offset, bytes)),
        }
    }

    /// Copies everything to the stream, in order.
    ///
    /// # Errors
    /// [`Error::Io`], also if the reader has gone away.
    pub fn commit(mut self) -> Result<()> {
        let Some(mut file) = self.collected else { return Ok(()) };
        file.rewind().map_err(Error::io("read", &std::env::temp_dir()))?;
        attempt("write", &self.path, || io::copy(&mut file, &mut self.to).map(drop))
    }
}

/// Creates the file in which a stream is collected.
fn collected(name: StreamName) -> Result<Option<File>> {
    if name == StreamName::Null {
        return Ok(None);
    }
    let dir = std::env::temp_dir();
    attempt("write", &dir, || tempfile::tempfile_in(&dir)).map(Some)
}

/// Checks, before any work, that an average can be written to a path.
///
/// # Errors
/// As [`Stream::open`] and [`check_replaceable`].
pub fn check_output(path: &Path) -> Result<()> {
    match Stream::open(path)? {
        Some(_) => Ok(()),
        None => check_replaceable(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: &str) -> Option<StreamName> {
        StreamName::of(Path::new(path))
    }

    #[test]
    fn only_names_of_the_system_are_streams() {
        assert_eq!(name("/dev/null"), Some(StreamName::Null));
        for path in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev//fd/./1"] {
            assert!(Stream::is_stdout(Path::new(path)), "{path}");
        }
        assert_eq!(name("/dev/stderr"), Some(StreamName::Descriptor(STDERR)));
        assert_eq!(name("/dev/fd/63"), Some(StreamName::Descriptor(63)));
        for path in ["", "-", "/", "dev/null", "/dev", "/dev/zero", "/dev/fd", "/dev/fd/", "/dev/fd/+1", "/dev/fd/1x"] {
            assert_eq!(name(path), None, "{path}");
        }
        assert_eq!(name("/tmp/dev/fd/1"), None);
        assert_eq!(name("/dev/fd/99999999999"), None);
    }

    #[test]
    fn descriptors_that_are_closed_or_only_read_are_refused() {
        use std::os::fd::AsRawFd;
        let read = File::open(std::env::current_exe().unwrap()).unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        for number in [read.as_raw_fd(), reader.as_raw_fd(), 987_654] {
            let text = check_output(Path::new(&format!("/dev/fd/{number}"))).unwrap_err().to_string();
            assert!(text.starts_with(&format!("cannot open /dev/fd/{number}: ")), "{text}");
        }
    }

    #[test]
    fn named_pipe_without_readers_is_refused_and_not_waited_for() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&pipe).unwrap();
        let writer = File::options().write(true).open(&pipe).unwrap();
        let path = format!("/dev/fd/{}", writer.as_raw_fd());
        let stream = Stream::open(Path::new(&path)).unwrap().unwrap();
        assert!(!rustix::fs::fcntl_getfl(&stream.to).unwrap().contains(OFlags::NONBLOCK));
        drop((reader, stream));
        let opened = std::thread::spawn(move || Stream::open(Path::new(&path)).map(drop));
        let begun = std::time::Instant::now();
        while !opened.is_finished() {
            assert!(begun.elapsed().as_secs() < 60, "opening the pipe waits for a reader");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let text = opened.join().unwrap().unwrap_err().to_string();
        assert!(text.contains("cannot open /dev/fd/") && text.contains("Broken pipe"), "{text}");
        drop(writer);
    }

    #[test]
    fn blocks_of_any_order_arrive_in_order() {
        use std::io::Read;
        use std::os::fd::AsRawFd;
        let (mut reader, writer) = io::pipe().unwrap();
        let path = format!("/dev/fd/{}", writer.as_raw_fd());
        let stream = Stream::open(Path::new(&path)).unwrap().unwrap();
        stream.write_at(3, b"def").unwrap();
        stream.write_at(0, b"abc").unwrap();
        stream.commit().unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abcdef");
    }

    #[test]
    fn stream_follows_what_a_file_holds() {
        use std::io::Write;
        use std::os::fd::AsRawFd;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"before ").unwrap();
        let path = format!("/dev/fd/{}", file.as_file().as_raw_fd());
        let stream = Stream::open(Path::new(&path)).unwrap().unwrap();
        stream.write_at(0, b"after").unwrap();
        stream.commit().unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), b"before after");
    }
}
