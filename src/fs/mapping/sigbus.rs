//! Signal handler that names the mapped file whose read failed (SIGBUS).
//!
//! Reading a mapped file ends the process if another process has shortened the file, or if its disk fails. No check
//! beforehand can prevent that. The handler prints which file it was, and leaves the rest to the handler before it.
//!
//! A library must not change the handlers of its program. The command-line program and the Python module install this
//! one, by [`install_sigbus_handler`]; other programs may do the same.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use memmap2::Mmap;
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::error::escape_controls;

/// Number of bytes of a path that are kept for the message, from its end.
const PATH: usize = 256;

/// Address range and path of a mapped file, for the handler.
///
/// Entries are reused and never freed, because the handler may read them at any time.
#[derive(Debug)]
pub(super) struct MappedFile {
    start: AtomicUsize,
    /// 0 while the entry is unused.
    end: AtomicUsize,
    path: [AtomicU8; PATH],
    length: AtomicUsize,
    next: AtomicPtr<MappedFile>,
}

/// Head of the linked list of all entries.
static FIRST: AtomicPtr<MappedFile> = AtomicPtr::new(std::ptr::null_mut());

/// Unused entries. New ones are added to the list only while this is locked.
static UNUSED: Mutex<Vec<&'static MappedFile>> = Mutex::new(Vec::new());

impl MappedFile {
    /// Returns an entry for a mapping, to be released before the mapping is dropped.
    pub(super) fn register(map: &Mmap, path: &Path) -> &'static MappedFile {
        let entry = MappedFile::unused();
        let path = escape_controls(&path.to_string_lossy(), &[]).into_bytes();
        let path = &path[path.len().saturating_sub(PATH)..];
        entry.path.iter().zip(path).for_each(|(kept, &byte)| kept.store(byte, Ordering::Relaxed));
        entry.length.store(path.len(), Ordering::Relaxed);
        entry.start.store(map.as_ptr().addr(), Ordering::Relaxed);
        entry.end.store(map.as_ptr().addr() + map.len(), Ordering::Release);
        entry
    }

    fn unused() -> &'static MappedFile {
        let mut unused = UNUSED.lock().unwrap_or_else(PoisonError::into_inner);
        unused.pop().unwrap_or_else(|| {
            let entry = Box::into_raw(Box::new(MappedFile {
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                path: [const { AtomicU8::new(0) }; PATH],
                length: AtomicUsize::new(0),
                next: AtomicPtr::new(FIRST.load(Ordering::Relaxed)),
            }));
            FIRST.store(entry, Ordering::Release);
            // SAFETY: the entry was just allocated, is never freed, and is only shared from here on.
            unsafe { &*entry }
        })
    }

    /// Makes the entry available for another mapping.
    pub(super) fn release(&'static self) {
        self.end.store(0, Ordering::Release);
        UNUSED.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// Returns the entry whose mapping contains an address.
    fn at(address: usize) -> Option<&'static MappedFile> {
        let mut next = FIRST.load(Ordering::Acquire);
        // SAFETY: entries are shared, are never freed, and are complete before they are stored.
        while let Some(entry) = unsafe { next.as_ref() } {
            let end = entry.end.load(Ordering::Acquire);
            if (entry.start.load(Ordering::Relaxed)..end).contains(&address) {
                return Some(entry);
            }
            next = entry.next.load(Ordering::Relaxed);
        }
        None
    }
}

/// Handler that was installed before.
static PREVIOUS: OnceLock<SigAction> = OnceLock::new();

/// Installs the handler, once for the process.
///
/// On SIGBUS within a mapped file, it writes the file's name and the remedy to stderr. Then it restores the previous
/// handler, which the repeated access finds.
pub fn install_sigbus_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(install);
}

fn install() {
    let handler = SigHandler::SigAction(handle);
    let action = SigAction::new(handler, SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK, SigSet::empty());
    // SAFETY: the handler does only what a signal handler may do: it loads atomics, writes to a file descriptor, and
    // restores the previous handler.
    if let Ok(previous) = unsafe { sigaction(Signal::SIGBUS, &action) } {
        let _ = PREVIOUS.set(previous);
    }
}

/// Names the file, restores the previous handler and returns to the failed access, which then raises the signal again.
extern "C" fn handle(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid record, which has an address for this signal.
    let address = unsafe { (*info).si_addr() }.addr();
    if let Some(entry) = MappedFile::at(address) {
        print_message(entry);
    }
    let previous = PREVIOUS.get().copied();
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the previous handler was valid when it was installed.
    let _ = unsafe { sigaction(Signal::SIGBUS, &previous.unwrap_or(default)) };
}

/// Writes the message to stderr, without allocating.
fn print_message(entry: &MappedFile) {
    let mut path = [0; PATH];
    path.iter_mut().zip(&entry.path).for_each(|(byte, kept)| *byte = kept.load(Ordering::Relaxed));
    let length = entry.length.load(Ordering::Relaxed).min(PATH);
    let message: [&[u8]; 3] = [
        b"error: ",
        &path[..length],
        b": the file became shorter while it was read, or its disk failed: files of a run must not be changed in \
        place. Check it with `posthoc-ema verify` and start again\n",
    ];
    for part in message {
        // SAFETY: pointer and length are those of a slice. A failed write has no remedy here.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::super::Mapping;
    use super::*;

    /// Path of the file that the child process of the test below maps, shortens and reads.
    const VICTIM: &str = "POSTHOC_EMA_TEST_SHRINKS";

    #[test]
    fn shortened_file_is_named_before_the_process_ends() {
        if let Some(path) = std::env::var_os(VICTIM) {
            install_sigbus_handler();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mapping = Mapping::new(&file, Path::new(&path)).unwrap();
            file.set_len(0).unwrap();
            println!("{}", mapping[mapping.len() / 2]);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.100.safetensors");
        std::fs::write(&path, vec![1; 100_000]).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        let test = "shortened_file_is_named_before_the_process_ends";
        let child = child.args([test, "--nocapture"]).env(VICTIM, &path).output().unwrap();
        assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
        let stderr = String::from_utf8_lossy(&child.stderr).into_owned();
        assert!(stderr.contains(&format!("error: {}: the file became shorter", path.display())), "{stderr}");
    }

    #[test]
    fn entry_names_its_mapping_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let name = |i: usize| dir.path().join(format!("{i}{}", "x".repeat(i * 50)));
        let files = (0..5).map(|i| {
            std::fs::write(name(i), vec![1; 5000]).unwrap();
            Mapping::new(&File::open(name(i)).unwrap(), &name(i)).unwrap()
        });
        let mut files: Vec<Mapping> = files.collect();
        for round in 0..2 {
            for (i, file) in files.iter().enumerate() {
                let entry = MappedFile::at(file.as_ptr().addr() + 4999).unwrap();
                assert!(std::ptr::eq(entry, file.entry));
                let length = entry.length.load(Ordering::Relaxed);
                let path: Vec<u8> = entry.path[..length].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
                assert!(name(i).as_os_str().as_encoded_bytes().ends_with(&path) && length <= PATH, "round {round}");
            }
            let gone = files.pop().unwrap();
            let (address, i) = (gone.as_ptr().addr(), files.len());
            let entry = std::ptr::from_ref(gone.entry);
            drop(gone);
            assert!(MappedFile::at(address).is_none_or(|other| !std::ptr::eq(other, entry)));
            files.push(Mapping::new(&File::open(name(i)).unwrap(), &name(i)).unwrap());
        }
    }
}
