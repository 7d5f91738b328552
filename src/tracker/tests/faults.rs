//! A file system that fails at every step in turn, once or from then on.

use super::*;
use crate::fs::fail_point::Fault;
use crate::run::{SavedState, verify};
use crate::snapshot::SnapshotId;

/// "No space left on device", as the system has it.
const NO_SPACE: i32 = 28;
const STEPS: u64 = 30;

/// The parameters after a step: of the step alone, as a training has them that goes on from its own checkpoint.
fn model(step: u64) -> Model {
    let value = |i: usize| ((step as usize * 7 + i * 13) as f32).sin();
    SIZES.map(|(name, n)| (name, (0..n).map(value).collect())).to_vec()
}

fn options(dir: &Path, in_background: bool) -> Options {
    let options = PostHocEma::options(dir).update_every(1).update_after_step(0).checkpoint_every(6);
    let options = options.retention(Retention::Latest).max_checkpoints(3).shard_size(100);
    options.checkpoint_in_background(in_background)
}

/// A directory in memory, where there is such a place: a disk would sync a hundred thousand times here.
fn scratch() -> (TempDir, PathBuf) {
    let memory = Path::new("/dev/shm");
    let temp = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let dir = temp.path().join("run");
    (temp, dir)
}

/// Trains to the end, come what may, and returns the errors on the way.
fn train_to_the_end(options: Options) -> Vec<Error> {
    let mut ema = match options.resume_or_create(&model(0)) {
        Ok(ema) => ema,
        Err(error) => return vec![error],
    };
    let mut errors = Vec::new();
    while ema.step() < STEPS {
        let before = ema.step();
        errors.extend(ema.update(&model(before + 1)).err());
        assert_eq!(ema.step(), before + 1, "a call that could not store has done its part");
    }
    errors.extend(ema.finish().err());
    errors
}

/// Names and contents of all files, but for the run's id and what depends on it.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".lock"))
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

fn assert_whole(dir: &Path) {
    match verify(dir, &mut |_| ()) {
        Err(Error::NoRun { .. }) => {}
        found => {
            let findings = found.unwrap().findings;
            assert!(findings.iter().all(|finding| matches!(finding, Error::NoRun { .. })), "{findings:?}");
        }
    }
}

/// Fails at each step in turn, at that one alone or from then on.
fn strike_everywhere(in_background: bool, lasting: bool) {
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
        // Whoever starts again finds nothing to clear up, and ends where nobody was disturbed.
        let again = train_to_the_end(options(&dir, in_background));
        assert!(again.is_empty(), "step {first}: {again:?}");
        assert_whole(&dir);
        let found = contents(&dir);
        let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "step {first}");
        assert!(found == expected, "step {first}");
        if !struck {
            assert!(first > 100, "there are more steps than {first} in a training");
            println!("failed at each of {first} steps");
            return;
        }
    }
}

#[test]
fn a_disk_that_fails_once_costs_nothing() {
    strike_everywhere(false, false);
}

#[test]
fn a_disk_that_fails_once_in_the_background_costs_nothing() {
    strike_everywhere(true, false);
}

#[test]
fn a_disk_that_fails_for_good_leaves_what_was_there() {
    strike_everywhere(false, true);
}

#[test]
fn a_disk_that_fails_for_good_in_the_background_leaves_what_was_there() {
    strike_everywhere(true, true);
}

#[test]
fn a_training_may_go_on_whatever_the_disk_does() {
    for in_background in [false, true] {
        let (_temp, dir) = scratch();
        let mut ema = options(&dir, in_background).on_error(OnError::Continue).create(&model(0)).unwrap();
        let fault = Fault::within(&dir, 20..usize::MAX, NO_SPACE);
        let train = || {
            for step in 0..STEPS {
                let told = ema.update(&model(step + 1)).unwrap();
                let whole = |stem: &SnapshotId| stem.index == 1 && stem.step == step + 1;
                let there = || crate::snapshot::list(&dir).unwrap().keys().any(whole);
                // In the background, it tells what is going to be stored.
                assert!(told != UpdateOutcome::Stored || in_background || there(), "{step}");
                assert!(step + 1 < STEPS || in_background || told == UpdateOutcome::Updated);
            }
        };
        let log = super::log::logged(train);
        let told = |line: &String| line.contains("the training goes on") && line.contains("No space left on device");
        assert!(log.iter().any(told), "{log:?}");
        assert!(matches!(ema.finish(), Err(Error::Io { .. })));
        drop(fault);
        ema.finish().unwrap();
        assert_eq!(SavedState::of(&dir).unwrap().unwrap().step, STEPS);
        // What is not finite is no failure of the disk.
        ema.update(&vec![("a.weight", vec![f32::NAN; 37]), ("b.weight", vec![0.0; 5]), ("c.bias", vec![0.0])]).unwrap();
        assert!(matches!(ema.finish(), Err(Error::NonFinite { .. })));
    }
}
