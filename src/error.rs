//! Errors of the whole crate: one variant per cause, with the place, the value and the remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

mod remedy;
mod text;

pub(crate) use remedy::remedy;
pub(crate) use text::listed;
use text::named_processes;
#[doc(hidden)]
pub use text::{escape_controls, is_control, shown};

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of this crate. Its text names the file, tensor, step and value, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A profile's parameter is outside its domain.
    #[error("{name} = {value}: {allowed}")]
    Parameter {
        /// Name of the parameter, such as `sigma_rel`.
        name: &'static str,
        /// Value that was given.
        value: f64,
        /// Allowed values, and the remedy.
        allowed: String,
    },
    /// A tabulated profile is not a cumulative distribution.
    #[error("table of a profile, point {point}: {reason}")]
    Table {
        /// Index of the offending point, counted from 1.
        point: usize,
        /// Fault of the point.
        reason: String,
    },
    /// A profile that one running average cannot track was given to a tracker.
    #[error(
        "the profile {profile} cannot be tracked by a running average: track power-function or exponential profiles, \
         and ask for this one as a target afterwards"
    )]
    NotTrackable {
        /// Profile that was given.
        profile: String,
    },
    /// A history of updates is not a list of increasing times.
    #[error("history of updates: {0}")]
    History(String),
    /// Two sources have the same profile and step.
    #[error(
        "{} and {} are the same average (same profile, same step): remove one of them",
        shown(first),
        shown(second)
    )]
    DuplicateSource {
        /// First of the pair.
        first: String,
        /// Second of the pair.
        second: String,
    },
    /// Two sources are too much alike for the solve.
    #[error(
        "cannot solve for the weights: {} and {} are almost the same average (cosine {cosine}): \
         leave one of them out, or track profiles that are further apart",
        shown(first),
        shown(second)
    )]
    DependentSources {
        /// First of the most similar pair.
        first: String,
        /// Second of the most similar pair.
        second: String,
        /// Cosine of the angle between their densities.
        cosine: f64,
    },
    /// The target time is before the first snapshot.
    #[error("the target time {at} is before the first snapshot (step {first}): ask for step {first} or later")]
    TargetBefore {
        /// Time that was asked for.
        at: u64,
        /// Earliest time that can be had.
        first: u64,
    },
    /// The target time is after the last snapshot.
    #[error("the target time {at} is after the last snapshot (step {last}): ask for step {last} or earlier")]
    TargetAfter {
        /// Time that was asked for.
        at: u64,
        /// Latest time that can be had.
        last: u64,
    },
    /// No target was given.
    #[error("no target was given: name at least one, such as sigma_rel 0.15")]
    NoTarget,
    /// There is nothing to blend, average or import.
    #[error("no {wanted}: {remedy}")]
    NoSource {
        /// Missing thing, such as "snapshot to blend".
        wanted: String,
        /// Remedy.
        remedy: &'static str,
    },
    /// An average was requested before the first update.
    #[error("there was no update yet: train until the first one is due")]
    NoUpdate,
    /// A model has no tensor that can be averaged.
    #[error("the model has no floating-point tensor to average: pass its parameters, or leave out fewer of them")]
    NothingToAverage,
    /// A plan was made for other snapshots or checkpoints.
    #[error("the plan needs {}, which is not open: make a new plan", shown(missing))]
    OtherPlan {
        /// Source that the plan names, such as "snapshot 0.1000".
        missing: String,
    },
    /// Two lists that must have the same length differ in it.
    #[error("{found} {items} were given for {expected} {owners}: give one for each")]
    Count {
        /// Kind of the items given, such as "weights".
        items: &'static str,
        /// Number of items.
        found: usize,
        /// Kind of their owners, such as "snapshots".
        owners: &'static str,
        /// Number of owners.
        expected: usize,
    },
    /// A bug of this library.
    #[error("{0}: this is a bug in posthoc-ema; please report it with this message")]
    Internal(String),

    /// A call to the operating system failed.
    #[error("cannot {action} {}: {source}{}", shown(path), remedy(action, source))]
    Io {
        /// Attempted action, as a verb.
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Error of the system.
        #[source]
        source: io::Error,
    },
    /// The system cannot start another thread.
    #[error("cannot start threads: {source}{}", remedy("start threads", source))]
    Threads {
        /// Error of the system.
        #[source]
        source: io::Error,
    },
    /// A directory does not contain a run.
    #[error(
        "{}: no run here ({}): name the directory that a tracker writes its snapshots to",
        shown(path),
        shown(reason)
    )]
    NoRun {
        /// Directory that was given.
        path: PathBuf,
        /// Reason, such as "it does not exist".
        reason: String,
    },
    /// Nothing is there to resume from.
    #[error(
        "{}: {reason}: name a file that `save` wrote for a path of yours, or the folder that it was saved into",
        shown(path)
    )]
    NoState {
        /// Path that was given.
        path: PathBuf,
        /// Reason, such as "it does not exist".
        reason: String,
    },
    /// The directory of a new run already contains one.
    #[error(
        "{}: the directory already holds a run ({}): continue it with `resume`, or choose another directory",
        shown(path),
        shown(found)
    )]
    RunExists {
        /// Directory that was given.
        path: PathBuf,
        /// Name of a file of the run.
        found: String,
    },
    /// A tracker of another process is writing the run.
    #[error("{}: another tracker is writing this run: stop it first, or choose another directory", shown(path))]
    Locked {
        /// Directory of the run.
        path: PathBuf,
    },
    /// This process itself is writing the run.
    #[error(
        "{}: this process is writing this run already: close the tracker that writes it (`close()` in Python) before \
         the run is opened again, or choose another directory",
        shown(path)
    )]
    LockedHere {
        /// Directory of the run.
        path: PathBuf,
    },
    /// The lock that this process took is not the directory's lock any more.
    #[error(
        "{}: {reason}, so that another process may write here, too: this process stores nothing more. Stop both, and \
         start one of them again: it goes on from what is stored",
        shown(path)
    )]
    LockLost {
        /// Directory that was locked.
        path: PathBuf,
        /// Event that lost the lock, such as "its lock file `.lock` was removed".
        reason: &'static str,
    },
    /// A safetensors file is damaged.
    #[error(
        "{}: {}: the file is damaged or incomplete; move it out of the directory to go on without it",
        shown(path),
        shown(reason)
    )]
    Damaged {
        /// Damaged file.
        path: PathBuf,
        /// Damage that was found.
        reason: String,
    },
    /// A file is intact, but not the expected one.
    #[error("{}: {}", shown(path), shown(reason))]
    Unexpected {
        /// Unexpected file.
        path: PathBuf,
        /// Fault and remedy.
        reason: String,
    },
    /// Two files of one run, or of one list of checkpoints, do not belong together.
    #[error(
        "{}: {}, but {} in {}: the two files are not of one run; move one of them out of the directory",
        shown(path),
        difference.found(),
        shown(&difference.expected),
        shown(other)
    )]
    Mismatch {
        /// File that was checked.
        path: PathBuf,
        /// File that it was compared with.
        other: PathBuf,
        /// First difference: found in `path`, expected from `other`.
        difference: Difference,
    },

    /// The model is not the one that the run began with.
    #[error(
        "tensor `{}`: {}, but was {}: pass the model that the run began with, or resume with `extend` to go on with \
         this one",
        shown(tensor),
        difference.found(),
        shown(&difference.expected)
    )]
    Changed {
        /// Name of the tensor.
        tensor: String,
        /// First difference: found now, expected from the run.
        difference: Difference,
    },
    /// A tensor cannot be averaged.
    #[error("tensor `{}`: {}", shown(tensor), shown(reason))]
    Tensor {
        /// Name of the tensor.
        tensor: String,
        /// Fault and remedy.
        reason: String,
    },
    /// An average to be stored contains a NaN or an infinity.
    #[error(
        "tensor `{}`: the average {profile} holds {value} at element {element} at step {step}: the snapshot was not \
         written. Training diverged at or before this step: go back to the newest snapshot and resume from there. If \
         the value is intended, as in a mask, name the tensor among those to copy",
        shown(tensor)
    )]
    NonFinite {
        /// Name of the tensor.
        tensor: String,
        /// Profile of the average.
        profile: String,
        /// Flat index of the first such element.
        element: usize,
        /// Value of that element.
        value: f32,
        /// Step of the newest update.
        step: u64,
    },
    /// A parameter contains a NaN or an infinity.
    #[error(
        "tensor `{}`: the parameter is {value} at element {element} at step {step}: the update of that step was left \
         out, as if it was not due. Repair the model, or go back to a checkpoint before it diverged, and go on. If the \
         value is intended, as in a mask, name the tensor among those to copy",
        shown(tensor)
    )]
    NonFiniteParameter {
        /// Name of the tensor.
        tensor: String,
        /// Flat index of the first such element.
        element: usize,
        /// Value of that element.
        value: f64,
        /// Step of the update.
        step: u64,
    },
    /// A call to a CUDA device or its driver failed.
    #[error("cuda:{device}: cannot {action}: {reason}")]
    Cuda {
        /// Number of the device.
        device: usize,
        /// Attempted action, as a verb.
        action: String,
        /// Answer of the driver, and remedy.
        reason: String,
    },
    /// A CUDA device has too little free memory.
    #[error("cuda:{device}: cannot {action}: {reason}")]
    DeviceMemory {
        /// Number of the device.
        device: usize,
        /// Attempted action, as a verb, with the bytes that it takes.
        action: String,
        /// Answer of the driver, and remedy.
        reason: String,
    },
    /// The time of an update is not after that of the one before.
    #[error("update at time {time}, but the last one was at {last}: times must increase")]
    Time {
        /// Time that was given.
        time: u64,
        /// Time of the previous call.
        last: u64,
    },
    /// The training and its averages are not at the same step.
    #[error(
        "the averages are at step {averages}, but the training is at step {training}: resume both from one checkpoint, \
         the averages from the state that was saved with it"
    )]
    Step {
        /// Step that the averages have counted.
        averages: u64,
        /// Step of the training.
        training: u64,
    },
    /// An option is out of range or contradicts the run on disk.
    #[error("option {option}: {}", shown(reason))]
    Setting {
        /// Name of the option.
        option: &'static str,
        /// Fault and remedy.
        reason: String,
    },
    /// Processes of a sharded run do not fit together.
    #[error("{}: {reason}", named_processes(processes))]
    Disagreement {
        /// Numbers of the processes.
        processes: Vec<usize>,
        /// Tensor or option in which they differ, and the remedy.
        reason: String,
    },
    /// A benchmarked computation returned a wrong result.
    #[error(
        "{what}: {reason}: the result is wrong, so it was not timed; report this with the machine's model, and test \
         its memory"
    )]
    Wrong {
        /// Computation and the device that ran it.
        what: String,
        /// Result and expected result.
        reason: String,
    },
}

/// Property in which two files or two models differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Name of the property, such as "the shape of tensor `w`".
    pub what: String,
    /// Value in the run, or in the file compared with.
    pub expected: String,
    /// Value in the file or model that was checked.
    pub found: String,
}

impl Difference {
    pub(crate) fn new(what: impl Into<String>, expected: impl fmt::Display, found: impl fmt::Display) -> Difference {
        Difference { what: what.into(), expected: expected.to_string(), found: found.to_string() }
    }

    /// Returns the property with its found value, as a clause.
    fn found(&self) -> String {
        format!("{} is {}", shown(&self.what), shown(&self.found))
    }
}

impl Error {
    /// Wraps an error of the operating system, for `map_err`. Public for the program only.
    #[doc(hidden)]
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    pub(crate) fn damaged(path: &Path, reason: impl fmt::Display) -> Error {
        Error::Damaged { path: path.to_owned(), reason: reason.to_string() }
    }

    /// Creates an error for a file that is not the expected one. Public for the program only.
    #[doc(hidden)]
    pub fn unexpected(path: &Path, reason: impl Into<String>) -> Error {
        Error::Unexpected { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(tensor: &str, reason: impl Into<String>) -> Error {
        Error::Tensor { tensor: tensor.to_owned(), reason: reason.into() }
    }

    /// Error for a tensor on a CUDA device, where host memory is needed.
    pub(crate) fn on_device(tensor: &str) -> Error {
        let remedy = if cfg!(feature = "cuda") { "pass" } else { "build with the feature `cuda`, or pass" };
        Error::tensor(tensor, format!("it is on a CUDA device: {remedy} tensors in host memory here"))
    }

    pub(crate) fn changed(tensor: &str, difference: Difference) -> Error {
        Error::Changed { tensor: tensor.to_owned(), difference }
    }

    pub(crate) fn mismatch(path: &Path, other: &Path, difference: Difference) -> Error {
        Error::Mismatch { path: path.to_owned(), other: other.to_owned(), difference }
    }
}

#[cfg(test)]
mod tests {
    use super::text::MAX_SHOWN;
    use super::*;

    #[test]
    fn control_characters_are_escaped() {
        let name = "layer\u{1b}[2J\r\u{9b}\t.weight";
        let text = Error::tensor(name, "a reason\u{7}").to_string();
        assert_eq!(text, "tensor `layer\\u{1b}[2J\\r\\u{9b}\\t.weight`: a reason\\u{7}");
        let text = Error::tensor("w\nerror: a lie", "not\nerror: another").to_string();
        assert_eq!(text, "tensor `w\\nerror: a lie`: not\\nerror: another");
        let text = Error::damaged(Path::new("a\u{1b}b"), "names of every kind: \u{e4}\u{4e2d} \u{1f600}").to_string();
        assert!(text.starts_with("a\\u{1b}b: names of every kind: \u{e4}\u{4e2d} \u{1f600}: the file is damaged"));
    }

    /// U+202E shows `gnp.exe` as `exe.png`; U+2028 begins a new line in some terminals.
    #[test]
    fn characters_that_change_direction_or_line_are_escaped() {
        for code in (0x202a..=0x202e).chain(0x2066..=0x2069).chain([0x61c, 0x200e, 0x200f, 0x2028, 0x2029, 0x85]) {
            let c = char::from_u32(code).unwrap();
            let text = Error::unexpected(Path::new(&format!("a{c}b")), format!("c{c}d")).to_string();
            assert_eq!(text, format!("a\\u{{{code:x}}}b: c\\u{{{code:x}}}d"));
        }
        // Joiners, combining marks and right-to-left letters are text.
        let text = "\u{1f469}\u{200d}\u{1f4bb} e\u{301} \u{5d0}\u{627}";
        assert_eq!(escape_controls(text, &[]), text);
    }

    #[test]
    fn limits_of_the_system_have_remedies() {
        for (action, number, part) in [
            ("write", 23, "`fs.file-max`"),
            ("write", 24, "`ulimit -n`"),
            ("open", 24, "`ulimit -n`"),
            ("map", 12, "`ulimit -v`"),
            ("start a background thread for", 11, "`ulimit -u`"),
        ] {
            let text = Error::io(action, Path::new("a/b"))(io::Error::from_raw_os_error(number)).to_string();
            assert!(text.starts_with(&format!("cannot {action} a/b: ")) && text.contains(part), "{text}");
        }
        let text = Error::Threads { source: io::Error::from_raw_os_error(11) }.to_string();
        assert!(text.starts_with("cannot start threads: ") && text.contains("RAYON_NUM_THREADS"), "{text}");
    }

    #[test]
    fn long_reasons_are_cut_in_the_middle() {
        for letter in ["a", "\u{4e2d}"] {
            let text =
                Error::unexpected(Path::new("the.file"), format!("it begins, {} and ends", letter.repeat(1 << 20)));
            let text = text.to_string();
            assert!(text.starts_with("the.file: it begins, ") && text.ends_with(" and ends"), "{}", &text[..100]);
            assert!(text.len() < MAX_SHOWN + 100 && text.contains(" bytes] "), "{}", text.len());
        }
        assert_eq!(shown(&"a".repeat(MAX_SHOWN)).len(), MAX_SHOWN);
    }
}
