//! Tests of a file system that fails at every operation in turn, once or from then on.

use super::*;
use crate::fs::fail_point::Fault;
use crate::run::{SavedState, verify};
use crate::snapshot::SnapshotId;

/// `ENOSPC`: "No space left on device".
const NO_SPACE: i32 = 28;
const STEPS: u64 = 30;

/// Returns the parameters after a step. They depend only on the step, like those of a resumed training.
pub(super) fn model(step: u64) -> Model {
    let value = |i: usize| ((step as usize * 7 + i * 13) as f32).sin();
    SIZES.map(|(name, n)| (name, (0..n).map(value).collect())).to_vec()
}

fn options(dir: &Path, in_background: bool) -> Options {
    let options = PostHocEma::options(dir).update_every(1).update_after_step(0).checkpoint_every(6);
    let options =
        options.on_non_finite(OnNonFinite::Ignore).retention(Retention::Latest).max_checkpoints(3).shard_size(100);
    options.checkpoint_in_background(in_background)
}

/// Returns a directory in memory if possible, since these tests sync a hundred thousand times.
fn scratch() -> (TempDir, PathBuf) {
    let memory = Path::new("/dev/shm");
    let temp = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let dir = temp.path().join("run");
    (temp, dir)
}

/// Trains to the end despite errors, and returns them.
fn train_to_the_end(options: Options) -> Vec<Error> {
    let mut ema = match options.resume_or_create(&model(0)) {
        Ok(ema) => ema,
        Err(error) => return vec![error],
    };
    let mut errors = Vec::new();
    while ema.step() < STEPS {
        let before = ema.step();
        errors.extend(ema.update(&model(before + 1)).err());
        assert_eq!(ema.step(), before + 1, "an update whose snapshot fails must still count");
    }
    errors.extend(ema.finish().err());
    errors
}

/// Returns names and contents of all files, without the run's random id and all that depends on it.
pub(super) fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lock") && name != "aside")
        .collect();
    names.sort();
    let data = |name: String| {
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        let text = name.ends_with(".json");
        let header = if text { 0 } else { 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize };
        (name, bytes[header..].to_vec())
    };
    names.into_iter().map(data).collect()
}

pub(super) fn assert_whole(dir: &Path) {
    match verify(dir, &mut |_| ()) {
        Err(Error::NoRun { .. }) => {}
        found => {
            let findings = found.unwrap().findings;
            assert!(findings.iter().all(|finding| matches!(finding, Error::NoRun { .. })), "{findings:?}");
        }
    }
}

/// Fails at each file operation in turn, only at that one or from then on.
fn fail_everywhere(in_background: bool, lasting: bool) {
    let (_a, straight) = scratch();
    assert!(train_to_the_end(options(&straight, in_background)).is_empty());
    let expected = contents(&straight);
    for first in 0.. {
        let (_b, dir) = scratch();
        let end = if lasting { usize::MAX } else { first + 1 };
        let fault = Fault::within(&dir, first..end, NO_SPACE);
        let errors = train_to_the_end(options(&dir, in_background));
        let struck = fault.steps() > first;
        drop(fault);
        assert!(struck || errors.is_empty(), "step {first}: {errors:?}");
        for error in &errors {
            let text = error.to_string();
            assert!(text.contains("No space left on device") && text.contains(dir.to_str().unwrap()), "{text}");
        }
        assert_whole(&dir);
        // A new process needs no cleanup, and ends with the files of an undisturbed run.
        let again = train_to_the_end(options(&dir, in_background));
        assert!(again.is_empty(), "step {first}: {again:?}");
        assert_whole(&dir);
        let found = contents(&dir);
        let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "step {first}");
        assert!(found == expected, "step {first}");
        if !struck {
            assert!(first > 100, "a training has more than {first} file operations");
            println!("failed at each of {first} file operations");
            return;
        }
    }
}

#[test]
fn one_failure_loses_nothing() {
    fail_everywhere(false, false);
}

#[test]
fn one_failure_in_the_background_loses_nothing() {
    fail_everywhere(true, false);
}

#[test]
fn lasting_failure_leaves_files_intact() {
    fail_everywhere(false, true);
}

#[test]
fn lasting_failure_in_the_background_leaves_files_intact() {
    fail_everywhere(true, true);
}

#[test]
fn on_error_continue_warns_and_goes_on() {
    for in_background in [false, true] {
        let (_temp, dir) = scratch();
        let mut ema = options(&dir, in_background).on_error(OnError::Continue).create(&model(0)).unwrap();
        let fault = Fault::within(&dir, 20..usize::MAX, NO_SPACE);
        let train = || {
            for step in 0..STEPS {
                let outcome = ema.update(&model(step + 1)).unwrap();
                let whole = |id: &SnapshotId| id.index == 1 && id.step == step + 1;
                let there = || crate::snapshot::list(&dir).unwrap().keys().any(whole);
                // In the background, `Stored` means that the snapshot is queued.
                assert!(outcome != UpdateOutcome::Stored || in_background || there(), "{step}");
                assert!(step + 1 < STEPS || in_background || outcome == UpdateOutcome::Updated);
            }
        };
        let log = super::log::logged(train);
        let warned = |line: &String| line.contains("the training goes on") && line.contains("No space left on device");
        assert!(log.iter().any(warned), "{log:?}");
        assert!(matches!(ema.finish(), Err(Error::Io { .. })));
        drop(fault);
        ema.finish().unwrap();
        assert_eq!(SavedState::of(&dir).unwrap().unwrap().step, STEPS);
        // A non-finite value is still an error.
        ema.update(&vec![("a.weight", vec![f32::NAN; 37]), ("b.weight", vec![0.0; 5]), ("c.bias", vec![0.0])]).unwrap();
        assert!(matches!(ema.finish(), Err(Error::NonFinite { .. })));
    }
}
