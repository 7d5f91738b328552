//! The errors of the whole crate: one variant per cause, each with what, where, which value and the remedy.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. The text names the file, tensor, step and value, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A profile's parameter lies outside its domain.
    #[error("{name} = {value}: {allowed}")]
    Parameter {
        /// The parameter, such as `sigma_rel`.
        name: &'static str,
        /// The value that was given.
        value: f64,
        /// What is allowed, and what to do.
        allowed: String,
    },
    /// A tabulated profile is no cumulative distribution.
    #[error("table of a profile, point {point}: {reason}")]
    Table {
        /// The offending point, counted from 1.
        point: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A profile that one running average cannot track was given to a tracker.
    #[error(
        "the profile {profile} cannot be tracked by a running average: track power-function or exponential profiles, and ask for this one as a target afterwards"
    )]
    NotTrackable {
        /// The profile.
        profile: String,
    },
    /// A history of updates is not a growing list of times.
    #[error("history of updates: {0}")]
    History(String),
    /// Two sources are the same average.
    #[error("{first} and {second} are the same average (same profile, same step): remove one of them")]
    DuplicateSource {
        /// The first of the pair.
        first: String,
        /// The second of the pair.
        second: String,
    },
    /// The sources cannot be told apart by the solve.
    #[error(
        "the weights cannot be solved: {first} and {second} weigh the updates almost alike (cosine {cosine}): leave one of them out, or track profiles that lie further apart"
    )]
    DependentSources {
        /// One of the most alike pair.
        first: String,
        /// The other.
        second: String,
        /// The cosine of the angle between their densities.
        cosine: f64,
    },
    /// No source lies at or before the target time.
    #[error("the target time {at} is before the first snapshot (step {first}): ask for step {first} or later")]
    TargetBefore {
        /// The time that was asked for.
        at: u64,
        /// The first time that can be had.
        first: u64,
    },
    /// The target time lies after the last update.
    #[error("the target time {at} is after the last snapshot (step {last}): ask for step {last} or earlier")]
    TargetAfter {
        /// The time that was asked for.
        at: u64,
        /// The last time that can be had.
        last: u64,
    },
    /// No target was given.
    #[error("no target was given: name at least one, such as sigma_rel 0.15")]
    NoTarget,
    /// Nothing is there to blend, average or import.
    #[error("there is no {wanted}: {remedy}")]
    NoSource {
        /// What is missing, such as "snapshot to blend".
        wanted: String,
        /// What to do.
        remedy: &'static str,
    },
    /// An average was asked for before the first update.
    #[error("there was no update yet: train until the first one is due")]
    NoUpdate,
    /// A model holds nothing that can be averaged.
    #[error("the model has no floating-point tensor to average: pass its parameters, or leave out fewer of them")]
    NothingToAverage,
    /// A plan was made for other snapshots or checkpoints.
    #[error("{missing} of the plan is not among those that are open: plan again")]
    OtherPlan {
        /// What the plan names, such as "snapshot 0.1000".
        missing: String,
    },
    /// Two lists that belong together differ in length.
    #[error("{found} {items} were given for {expected} {owners}: give one for each")]
    Count {
        /// What was given, such as "weights".
        items: &'static str,
        /// How many.
        found: usize,
        /// What they belong to, such as "snapshots".
        owners: &'static str,
        /// How many of those there are.
        expected: usize,
    },
    /// A state that the library rules out.
    #[error("{0}: this is a fault of posthoc-ema; please report it with this message")]
    Internal(String),

    /// The operating system refused something.
    #[error("cannot {action} {}: {source}{}", named(path), remedy(source))]
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A directory holds no run.
    #[error(
        "{}: no run here ({}): name the directory that a tracker writes its snapshots to",
        named(path),
        shown(reason)
    )]
    NoRun {
        /// The directory.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// A new run was to be made where one exists.
    #[error(
        "{}: the directory already holds a run ({}): train on with `resume`, or choose another directory",
        named(path),
        named(found)
    )]
    RunExists {
        /// The directory.
        path: PathBuf,
        /// A file that shows it.
        found: String,
    },
    /// Another process (or tracker) writes this run.
    #[error("{}: another tracker is writing this run: stop it first, or choose another directory", named(path))]
    Locked {
        /// The run's directory.
        path: PathBuf,
    },
    /// A safetensors file is damaged.
    #[error(
        "{}: {}: the file is damaged or incomplete; move it out of the directory to go on without it",
        named(path),
        shown(reason)
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is sound but is not what was expected.
    #[error("{}: {}", named(path), shown(reason))]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Two files of one run, or of one list of checkpoints, differ.
    #[error(
        "{}: {}, in {} it is {}: the two do not belong to one run; move one of them out of the directory",
        named(path),
        difference.found(),
        named(other),
        shown(&difference.expected)
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The file that it was compared with.
        other: PathBuf,
        /// The first difference: found in `path`, expected from `other`.
        difference: Difference,
    },

    /// The parameters given are not those the run began with.
    #[error(
        "tensor `{}`: {}, it was {}: pass the model that the run began with, or start a new run for a changed one",
        named(tensor),
        difference.found(),
        shown(&difference.expected)
    )]
    Changed {
        /// The tensor's name.
        tensor: String,
        /// The first difference: found now, expected from the run.
        difference: Difference,
    },
    /// A tensor cannot be averaged.
    #[error("tensor `{}`: {}", named(tensor), shown(reason))]
    Tensor {
        /// The tensor's name.
        tensor: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A NaN or an infinity in an average.
    #[error(
        "tensor `{}`: the average {profile} holds {value} at element {element} at step {step}: the snapshot was not written. Training diverged at or before this step: go back to the newest snapshot and resume from there. Where the value is meant, as in a mask, name the tensor among those to copy",
        named(tensor)
    )]
    NonFinite {
        /// The tensor's name.
        tensor: String,
        /// The profile whose average holds it.
        profile: String,
        /// The flat index of the first such element.
        element: usize,
        /// The value.
        value: f32,
        /// The step of the newest update.
        step: u64,
    },
    /// A CUDA device, or its driver, cannot do what was asked for.
    #[error("cuda:{device}: cannot {action}: {reason}")]
    Cuda {
        /// The device's number.
        device: usize,
        /// What was attempted, as a verb.
        action: String,
        /// The driver's answer and the remedy.
        reason: String,
    },
    /// Time did not move forward.
    #[error("update at time {time}, but the last one was at {last}: times must grow")]
    Time {
        /// The time that was given.
        time: u64,
        /// The time of the call before.
        last: u64,
    },
    /// An option of a tracker is out of range or contradicts the run on disk.
    #[error("option {option}: {reason}")]
    Setting {
        /// The option's name.
        option: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
    /// What was to be timed gave a wrong answer.
    #[error(
        "{what}: {reason}: nothing is timed that computes wrongly; report this with the machine's model, and test its memory"
    )]
    Wrong {
        /// The work, and the device that did it.
        what: String,
        /// What came out, and what should have.
        reason: String,
    },
}

/// One property in which two things differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The property, such as "the shape of tensor `w`".
    pub what: String,
    /// Its value in the run, or in the file that another is compared with.
    pub expected: String,
    /// Its value here.
    pub found: String,
}

impl Difference {
    pub(crate) fn new(what: impl Into<String>, expected: impl fmt::Display, found: impl fmt::Display) -> Difference {
        Difference { what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// The property and the value that was found.
    fn found(&self) -> String {
        format!("{} is {}", shown(&self.what), shown(&self.found))
    }
}

impl Error {
    /// Wraps an error of the operating system; for `map_err`.
    #[doc(hidden)]
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    pub(crate) fn damaged(path: &Path, reason: impl fmt::Display) -> Error {
        Error::Damaged { path: path.to_owned(), reason: reason.to_string() }
    }

    #[doc(hidden)]
    #[allow(missing_docs)]
    pub fn unexpected(path: &Path, reason: impl Into<String>) -> Error {
        Error::Unexpected { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(tensor: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { tensor: tensor.to_owned(), reason: reason.into() }
    }

    /// A tensor whose memory this build cannot reach.
    pub(crate) fn on_device(tensor: &str) -> Error {
        let remedy = if cfg!(feature = "cuda") { "pass" } else { "build with the feature `cuda`, or pass" };
        Error::tensor(tensor, format!("it lies on a CUDA device: {remedy} tensors in host memory here"))
    }

    pub(crate) fn changed(tensor: &str, difference: Difference) -> Error {
        Error::Changed { tensor: tensor.to_owned(), difference }
    }

    pub(crate) fn mismatch(path: &Path, other: &Path, difference: Difference) -> Error {
        Error::Mismatch { path: path.to_owned(), other: other.to_owned(), difference }
    }
}

/// As [`shown`], on one line: of a name, no line of a message can be forged.
fn named(text: &(impl AsRef<OsStr> + ?Sized)) -> String {
    shown(text).replace('\n', "\\n")
}

/// The most bytes that a name or a reason takes in a message.
const LONGEST: usize = 4000;

/// What a file says, fit for a terminal: control characters, which could hide or forge what is printed there, are spelled
/// out, and the middle of what is longer than any honest name or reason is left out.
fn shown(text: &(impl AsRef<OsStr> + ?Sized)) -> String {
    let text = text.as_ref().to_string_lossy();
    let spelled = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.to_string() };
    if text.len() <= LONGEST {
        return text.chars().map(spelled).collect();
    }
    let (head, tail) = (text.floor_char_boundary(LONGEST / 2), text.ceil_char_boundary(text.len() - LONGEST / 2));
    let left_out = tail - head;
    let spell = |part: &str| part.chars().map(spelled).collect::<String>();
    format!("{} [{left_out} bytes] {}", spell(&text[..head]), spell(&text[tail..]))
}

/// What a user can do about the commonest errors of the operating system.
fn remedy(source: &io::Error) -> &'static str {
    if source.raw_os_error() == Some(rustix::io::Errno::NOLCK.raw_os_error()) {
        return ": this file system does not lock files, so that two trainings could write one run: put the run on another one, \
                or mount this one with locks";
    }
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ": free some space or choose another disk; what was there before is untouched"
        }
        io::ErrorKind::FileTooLarge => {
            ": the limit on the length of files is reached: raise it (`ulimit -f`), or store in shards"
        }
        io::ErrorKind::PermissionDenied => ": check the permissions of the file and its directory",
        io::ErrorKind::ReadOnlyFilesystem => ": the disk is mounted read-only",
        io::ErrorKind::NotFound => ": check the path",
        io::ErrorKind::Unsupported => ": this file system cannot do that: put the run on another one",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_cannot_reach_the_terminals_controls() {
        let name = "layer\u{1b}[2J\r\u{9b}\t.weight";
        let text = Error::tensor(name, "a reason\u{7}").to_string();
        assert_eq!(text, "tensor `layer\\u{1b}[2J\\r\\u{9b}\\t.weight`: a reason\\u{7}");
        assert!(Error::tensor("w\nerror: a lie", "").to_string().starts_with("tensor `w\\nerror: a lie`"));
        let text = Error::damaged(Path::new("a\u{1b}b"), "names of every kind: \u{e4}\u{4e2d} \u{1f600}").to_string();
        assert!(text.starts_with("a\\u{1b}b: names of every kind: \u{e4}\u{4e2d} \u{1f600}: the file is damaged"));
    }

    #[test]
    fn what_is_longer_than_any_reason_is_cut_in_the_middle() {
        for letter in ["a", "\u{4e2d}"] {
            let text =
                Error::unexpected(Path::new("the.file"), format!("it begins, {} and ends", letter.repeat(1 << 20)));
            let text = text.to_string();
            assert!(text.starts_with("the.file: it begins, ") && text.ends_with(" and ends"), "{}", &text[..100]);
            assert!(text.len() < LONGEST + 100 && text.contains(" bytes] "), "{}", text.len());
        }
        assert_eq!(shown(&"a".repeat(LONGEST)).len(), LONGEST);
    }
}
