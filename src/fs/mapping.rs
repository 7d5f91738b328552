//! Mapped files, and what is said where one cannot be read any more.
//!
//! A file that another process shortens while it is mapped, or whose disk fails, ends the process that reads it (SIGBUS):
//! no check beforehand can keep that from happening. So that nobody has to guess, a handler says which file it was, and
//! leaves the rest to whoever handled the signal before.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A file, mapped for reading.
#[derive(Debug)]
pub(crate) struct Mapping {
    map: Mmap,
    known: &'static Known,
}

impl Mapping {
    /// Maps a file, which must not be empty.
    pub(crate) fn new(file: &File, path: &Path) -> io::Result<Mapping> {
        // SAFETY: the mapping is private and read-only. Files of a run are only ever replaced by renaming, never changed
        // in place, so the bytes do not change under the borrow as long as nobody else writes into the run's files.
        let map = unsafe { Mmap::map(file) }?;
        let known = Known::register(&map, path);
        Ok(Mapping { map, known })
    }

    /// Tells the system how all of it is going to be read: a wish, which may fail.
    pub(crate) fn advise(&self, advice: Advice) {
        let _ = self.map.advise(advice);
    }

    /// Has bytes that it lent read from the disk in the background; others do not matter. A wish, too: what is not fetched
    /// now is when it is read.
    pub(crate) fn will_need(&self, bytes: &[u8]) {
        let (start, end) = (bytes.as_ptr().addr(), bytes.as_ptr().addr() + bytes.len());
        let own = self.map.as_ptr().addr();
        if own <= start && end <= own + self.map.len() {
            let _ = self.map.advise_range(Advice::WillNeed, start - own, bytes.len());
        }
    }

    /// Unmaps all pages; whoever reads on has them mapped anew.
    pub(crate) fn unmap_pages(&self) {
        // SAFETY: nothing is ever written through the mapping, which shows the file before as after.
        let _ = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.known.forget();
    }
}

/// The most bytes of a path that are kept for the message: its end.
const PATH: usize = 256;

/// A mapping that the handler knows; entries are used again, and never freed, because a handler may look at any time.
#[derive(Debug)]
struct Known {
    start: AtomicUsize,
    /// 0 while the entry is not used.
    end: AtomicUsize,
    path: [AtomicU8; PATH],
    length: AtomicUsize,
    next: AtomicPtr<Known>,
}

/// The first of all entries, each of which leads to the next.
static FIRST: AtomicPtr<Known> = AtomicPtr::new(std::ptr::null_mut());

/// Entries that are not used. Only who holds the lock adds entries.
static UNUSED: Mutex<Vec<&'static Known>> = Mutex::new(Vec::new());

impl Known {
    fn register(map: &Mmap, path: &Path) -> &'static Known {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(install);
        let known = Known::unused();
        let path = path.as_os_str().as_encoded_bytes();
        let path = &path[path.len().saturating_sub(PATH)..];
        let shown = |&byte: &u8| if byte.is_ascii_control() { b'?' } else { byte };
        known.path.iter().zip(path).for_each(|(kept, byte)| kept.store(shown(byte), Ordering::Relaxed));
        known.length.store(path.len(), Ordering::Relaxed);
        known.start.store(map.as_ptr().addr(), Ordering::Relaxed);
        known.end.store(map.as_ptr().addr() + map.len(), Ordering::Release);
        known
    }

    fn unused() -> &'static Known {
        let mut unused = UNUSED.lock().unwrap_or_else(PoisonError::into_inner);
        unused.pop().unwrap_or_else(|| {
            let known = Box::into_raw(Box::new(Known {
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                path: [const { AtomicU8::new(0) }; PATH],
                length: AtomicUsize::new(0),
                next: AtomicPtr::new(FIRST.load(Ordering::Relaxed)),
            }));
            FIRST.store(known, Ordering::Release);
            // SAFETY: it was made just now, is never freed, and is only shared from here on.
            unsafe { &*known }
        })
    }

    fn forget(&'static self) {
        self.end.store(0, Ordering::Release);
        UNUSED.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// The entry whose mapping an address lies in.
    fn at(address: usize) -> Option<&'static Known> {
        let mut next = FIRST.load(Ordering::Acquire);
        // SAFETY: entries are shared, live for ever and are complete before they are stored.
        while let Some(known) = unsafe { next.as_ref() } {
            let end = known.end.load(Ordering::Acquire);
            if (known.start.load(Ordering::Relaxed)..end).contains(&address) {
                return Some(known);
            }
            next = known.next.load(Ordering::Relaxed);
        }
        None
    }
}

/// Who handled the signal before.
static BEFORE: OnceLock<SigAction> = OnceLock::new();

fn install() {
    let handler = SigHandler::SigAction(handle);
    let action = SigAction::new(handler, SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK, SigSet::empty());
    // SAFETY: the handler does only what a handler may: it loads atomics, writes to a file descriptor, and puts the
    // handler before it in its place.
    if let Ok(before) = unsafe { sigaction(Signal::SIGBUS, &action) } {
        let _ = BEFORE.set(before);
    }
}

/// Says which file it was, and returns to the access that failed, whose signal then finds the handler before this one.
extern "C" fn handle(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands over a valid record, which for this signal holds an address.
    let address = unsafe { (*info).si_addr() }.addr();
    if let Some(known) = Known::at(address) {
        say(known);
    }
    let before = BEFORE.get().copied();
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: whatever was there before was fit to be there.
    let _ = unsafe { sigaction(Signal::SIGBUS, &before.unwrap_or(default)) };
}

fn say(known: &Known) {
    let mut path = [0; PATH];
    path.iter_mut().zip(&known.path).for_each(|(byte, kept)| *byte = kept.load(Ordering::Relaxed));
    let length = known.length.load(Ordering::Relaxed).min(PATH);
    let message: [&[u8]; 3] = [
        b"error: ",
        &path[..length],
        b": the file became shorter while it was read, or its disk failed: files of a run must not be changed in place. \
        Look at it with `posthoc-ema verify` and start again\n",
    ];
    for part in message {
        // SAFETY: the pointer and the length are those of a slice. Nothing can be done where it fails.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// In the process that the test below starts: the path of a file to map, shorten and read.
    const VICTIM: &str = "POSTHOC_EMA_TEST_SHRINKS";

    #[test]
    fn a_file_that_shrinks_under_its_reader_is_named_before_the_process_ends() {
        if let Some(path) = std::env::var_os(VICTIM) {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mapping = Mapping::new(&file, Path::new(&path)).unwrap();
            file.set_len(0).unwrap();
            println!("{}", mapping[mapping.len() / 2]);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.100.safetensors");
        std::fs::write(&path, vec![1; 100_000]).unwrap();
        let me = "a_file_that_shrinks_under_its_reader_is_named_before_the_process_ends";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child.args([me, "--nocapture"]).env(VICTIM, &path).output().unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
        let said = String::from_utf8_lossy(&child.stderr).into_owned();
        assert!(said.contains(&format!("error: {}: the file became shorter", path.display())), "{said}");
    }

    #[test]
    fn entries_name_their_mapping_as_long_as_it_lives() {
        let dir = tempfile::tempdir().unwrap();
        let name = |i: usize| dir.path().join(format!("{i}{}", "x".repeat(i * 50)));
        let files = (0..5).map(|i| {
            std::fs::write(name(i), vec![1; 5000]).unwrap();
            Mapping::new(&File::open(name(i)).unwrap(), &name(i)).unwrap()
        });
        let mut files: Vec<Mapping> = files.collect();
        for round in 0..2 {
            for (i, file) in files.iter().enumerate() {
                let known = Known::at(file.as_ptr().addr() + 4999).unwrap();
                assert!(std::ptr::eq(known, file.known));
                let length = known.length.load(Ordering::Relaxed);
                let path: Vec<u8> = known.path[..length].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
                assert!(name(i).as_os_str().as_encoded_bytes().ends_with(&path) && length <= PATH, "round {round}");
            }
            let gone = files.pop().unwrap();
            let (address, i) = (gone.as_ptr().addr(), files.len());
            let known = std::ptr::from_ref(gone.known);
            drop(gone);
            assert!(Known::at(address).is_none_or(|other| !std::ptr::eq(other, known)));
            files.push(Mapping::new(&File::open(name(i)).unwrap(), &name(i)).unwrap());
        }
    }
}
