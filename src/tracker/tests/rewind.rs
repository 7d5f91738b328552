//! Tests of states that the training keeps with its own checkpoints, and of going back to them.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use super::faults::{assert_whole, contents, model};
use super::*;
use crate::fs::fail_point::Fault;
use crate::run::{SavedState, verify};
use crate::snapshot::{SnapshotId, set_aside};

/// `EIO`: "Input/output error".
const FAILED: i32 = 5;
const END: u64 = 120;

/// Run with the checkpoints of its training beside it.
struct Training {
    temp: TempDir,
    dir: PathBuf,
}

impl Training {
    fn new() -> Training {
        let memory = Path::new("/dev/shm");
        let temp = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let dir = temp.path().join("run");
        Training { temp, dir }
    }

    fn options(&self) -> Options {
        let options = PostHocEma::options(&self.dir).update_every(3).checkpoint_every(10).shard_size(100);
        options.max_checkpoints(40).snapshot_growth(None).checkpoint_in_background(false)
    }

    /// Returns the folder of the training's checkpoint at a step.
    fn checkpoint(&self, step: u64) -> PathBuf {
        self.temp.path().join(format!("checkpoint-{step}"))
    }

    /// Trains until a step, and saves a checkpoint every 12 steps.
    fn train(&self, ema: &mut PostHocEma, until: u64) {
        while ema.step() < until {
            ema.update(&model(ema.step() + 1)).unwrap();
            if ema.step().is_multiple_of(12) {
                let folder = self.checkpoint(ema.step());
                std::fs::create_dir_all(&folder).unwrap();
                ema.save_to(&folder).unwrap();
            }
        }
    }

    /// Begins the run and trains until a step.
    fn begun(until: u64) -> Training {
        let training = Training::new();
        training.train(&mut training.options().create(&model(0)).unwrap(), until);
        training
    }

    /// Trains to the end, and returns all that is on disk, and an average.
    fn end(&self, mut ema: PostHocEma) -> Ended {
        self.train(&mut ema, END);
        ema.finish().unwrap();
        let average = floats(&ema.synthesize(Profile::sigma_rel(0.12).unwrap()).unwrap());
        let live: Vec<Vec<f32>> = averages(&ema).into_iter().map(|averages| averages.high).collect();
        drop(ema);
        assert_whole(&self.dir);
        let plan = Run::open(&self.dir).unwrap().plan(Profile::sigma_rel(0.2).unwrap(), At::Latest).unwrap();
        (contents(&self.dir), average, live, plan.weights.iter().map(|weight| (weight.step, weight.weight)).collect())
    }

    /// Returns the end of a training that nothing disturbs.
    fn undisturbed() -> Ended {
        let training = Training::new();
        training.end(training.options().create(&model(0)).unwrap())
    }

    fn resume_from(&self, step: u64) -> Result<PostHocEma> {
        self.options().resume_from(self.checkpoint(step), &model(step))
    }

    fn steps(&self) -> BTreeSet<u64> {
        steps(&self.dir)
    }
}

type Ended = (Vec<(String, Vec<u8>)>, Vec<f64>, Vec<Vec<f32>>, Vec<(u64, f64)>);

fn steps(dir: &Path) -> BTreeSet<u64> {
    crate::snapshot::list(dir).unwrap().keys().map(|id| id.step).collect()
}

fn aside_steps(dir: &Path) -> BTreeSet<u64> {
    let folders = set_aside(dir).unwrap();
    folders.iter().flat_map(|folder| &folder.snapshots).map(|id| id.step).collect()
}

#[test]
fn each_of_ten_checkpoints_leads_to_the_bits_of_an_undisturbed_training() {
    let expected = Training::undisturbed();
    for step in (12..=END).step_by(12) {
        let training = Training::begun(END);
        let ema = training.resume_from(step).unwrap();
        ema.check_step(step).unwrap();
        assert_eq!(ema.step(), step);
        assert_eq!(training.steps(), (10..=step).step_by(10).collect());
        assert_eq!(aside_steps(&training.dir), (step / 10 * 10 + 10..=END).step_by(10).collect());
        assert!(training.end(ema) == expected, "from step {step}");
        assert!(!training.dir.join("aside").exists() || step == END);
    }
}

/// Goes back and forth at random; a state of a course that was left is used until the new course has a snapshot.
#[test]
fn random_rewinds_lead_to_the_bits_of_an_undisturbed_training() {
    let expected = Training::undisturbed();
    for seed in 0..25 {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let training = Training::begun(END);
        let mut valid: BTreeSet<u64> = (12..=END).step_by(12).collect();
        for _ in 0..random.random_range(2..9) {
            let from = *valid.iter().nth(random.random_range(0..valid.len())).unwrap();
            let mut ema = match random.random_bool(0.8) {
                true => training.resume_from(from).unwrap(),
                false => training.options().resume(&model(0)).unwrap(),
            };
            let begun = ema.step();
            let until = (begun + random.random_range(0..40)).min(END);
            training.train(&mut ema, until);
            if until / 10 > begun / 10 {
                valid.retain(|&step| step <= until);
            }
            valid.extend((begun / 12 * 12 + 12..=until).step_by(12));
            if random.random_bool(0.3) {
                ema.save().unwrap();
            }
            drop(ema);
            assert_whole(&training.dir);
        }
        let from = *valid.iter().nth(random.random_range(0..valid.len())).unwrap();
        assert!(training.end(training.resume_from(from).unwrap()) == expected, "seed {seed}");
    }
}

/// Fails each file operation of a rewind from some point on, as if the process were killed there.
#[test]
fn rewind_that_is_killed_leaves_the_old_course_or_the_new_one() {
    let expected = Training::undisturbed();
    let old: BTreeSet<u64> = (10..=100).step_by(10).collect();
    let new: BTreeSet<u64> = (10..=40).step_by(10).collect();
    for first in 0.. {
        let mut struck = true;
        // The next process resumes the run, or goes back to the same state, an earlier or a later one.
        for next in [None, [Some(48), Some(24), Some(84)][first % 3]] {
            let training = Training::begun(105);
            let fault = Fault::within(training.temp.path(), first..usize::MAX, FAILED);
            let rewound = training.resume_from(48);
            struck = fault.steps() > first;
            drop(fault);
            let completed = rewound.is_ok();
            drop(rewound);
            assert!(struck || completed);
            assert_whole(&training.dir);
            let saved = SavedState::of(&training.dir).unwrap().unwrap().step;
            let found = training.steps();
            assert!((saved, &found) == (48, &new) || (saved, &found) == (100, &old), "{first}: {saved} {found:?}");
            assert!(!completed || saved == 48);
            let ema = match next {
                None => training.options().resume(&model(0)).unwrap(),
                Some(step) => training.resume_from(step).unwrap(),
            };
            assert_eq!(ema.step(), next.unwrap_or(saved), "{first}");
            assert!(!training.dir.join(".rewind").exists());
            assert!(training.end(ema) == expected, "killed at {first}, then {next:?}");
            assert!(!training.dir.join("aside").exists());
        }
        if !struck {
            assert!(first > 20, "a rewind has more than {first} file operations");
            return;
        }
    }
}

/// Fails each file operation of a rewind and of the training after it, until what was set aside is removed.
#[test]
fn training_that_is_killed_after_a_rewind_keeps_its_course() {
    let expected = Training::undisturbed();
    for first in 0.. {
        let mut struck = true;
        for next in [[None, Some(48), Some(24)][first % 3]] {
            let training = Training::begun(105);
            let fault = Fault::within(training.temp.path(), first..usize::MAX, FAILED);
            if let Ok(mut ema) = training.resume_from(48) {
                while ema.step() < 63 {
                    let _ = ema.update(&model(ema.step() + 1));
                }
            }
            struck = fault.steps() > first;
            drop(fault);
            assert_whole(&training.dir);
            let ema = match next {
                None => training.options().resume(&model(0)).unwrap(),
                Some(step) => training.resume_from(step).unwrap(),
            };
            assert!(training.end(ema) == expected, "killed at {first}, then {next:?}");
            assert!(!training.dir.join("aside").exists());
        }
        if !struck {
            return;
        }
    }
}

/// A step that fails once is an error, and the same call then works.
#[test]
fn rewind_that_fails_once_can_be_tried_again() {
    let expected = Training::undisturbed();
    for first in 0.. {
        let training = Training::begun(105);
        let fault = Fault::within(training.temp.path(), first..first + 1, FAILED);
        let rewound = training.resume_from(48);
        let struck = fault.steps() > first;
        drop(fault);
        if let Err(error) = rewound.map(drop) {
            assert!(error.to_string().contains("Input/output error"), "{error}");
        }
        assert!(training.end(training.resume_from(48).unwrap()) == expected, "failed at {first}");
        if !struck {
            return;
        }
    }
}

/// Returns parameters that no other training has.
fn other_model(step: u64, seed: u64) -> Model {
    let mut model = model(step);
    model.iter_mut().flat_map(|(_, values)| values).for_each(|value| *value += (seed * step) as f32);
    model
}

/// Two courses that store snapshots at the same steps: each state brings back its own only.
#[test]
fn snapshots_of_another_course_are_never_used() {
    let training = Training::new();
    let save = |ema: &PostHocEma, name: &str| ema.save_to(training.temp.path().join(name)).unwrap();
    let open = |name: &str| training.options().resume_from(training.temp.path().join(name), &model(0)).unwrap();
    let go = |ema: &mut PostHocEma, until: u64, seed: u64| {
        while ema.step() < until {
            ema.update(&other_model(ema.step() + 1, seed)).unwrap();
        }
    };
    let mut first = training.options().create(&model(0)).unwrap();
    go(&mut first, 31, 0);
    save(&first, "first31");
    go(&mut first, 65, 0);
    save(&first, "first65");
    drop(first);
    let mut second = open("first31");
    go(&mut second, 55, 1);
    save(&second, "second55");
    drop(second);
    // The snapshots of the first course are gone, and those of the second must not stand for them.
    let mut third = open("first65");
    assert_eq!((training.steps(), aside_steps(&training.dir)), ([10, 20, 30].into(), [40, 50].into()));
    go(&mut third, 85, 0);
    save(&third, "third85");
    assert_eq!(training.steps(), [10, 20, 30, 70, 80].into());
    drop(third);
    // The second course lost its own, and those of the third at steps 70 and 80 do not belong to it either.
    let mut second = open("second55");
    assert_eq!((training.steps(), aside_steps(&training.dir)), ([10, 20, 30].into(), [70, 80].into()));
    go(&mut second, 64, 1);
    // The session of the second course has a smaller number than that of the third, whose state must not take it.
    drop(second);
    let third = open("third85");
    assert_eq!((training.steps(), aside_steps(&training.dir)), ([10, 20, 30].into(), [60].into()));
    drop(third);
    assert!(verify(&training.dir, &mut |_| ()).unwrap().findings.is_empty());
}

#[test]
fn left_course_comes_back_until_the_new_one_has_a_snapshot() {
    let training = Training::begun(105);
    let before = contents(&training.dir);
    let ema = training.resume_from(36).unwrap();
    let [folder] = set_aside(&training.dir).unwrap().try_into().unwrap();
    assert!(folder.has_state && folder.snapshots.contains(&SnapshotId { index: 1, step: 70 }));
    // Its folder opens like a run, and a further rewind leads back to its state.
    assert_eq!(steps(&folder.path), (40..=100).step_by(10).collect());
    drop(ema);
    let ema = training.options().resume_from(&folder.path, &model(0)).unwrap();
    assert_eq!(ema.step(), 100);
    drop(ema);
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    std::fs::remove_dir_all(training.dir.join("aside")).unwrap_or_default();
    let after = contents(&training.dir);
    assert_eq!(names(&after), names(&before));
    assert!(after == before);
}

#[test]
fn state_is_a_link_right_after_a_snapshot_and_a_file_of_its_own_otherwise() {
    let training = Training::new();
    let mut ema = training.options().create(&model(0)).unwrap();
    let [linked, own] = ["linked", "own"].map(|name| training.temp.path().join(name));
    training.train(&mut ema, 20);
    ema.save_to(&linked).unwrap();
    let number = |path: &Path| std::fs::metadata(path).unwrap().ino();
    let state = training.dir.join("state.safetensors");
    assert_eq!(number(&linked), number(&state));
    let bytes = std::fs::read(&linked).unwrap();
    training.train(&mut ema, 23);
    ema.save_to(&own).unwrap();
    assert!(number(&own) != number(&state) && number(&linked) == number(&state));
    // A second save to the same path replaces the name, not what other names lead to.
    ema.save().unwrap();
    ema.save_to(&own).unwrap();
    assert_eq!(number(&own), number(&state));
    training.train(&mut ema, 40);
    assert!(std::fs::read(&linked).unwrap() == bytes && number(&linked) != number(&state));
    assert_eq!(SavedState::at(&linked).unwrap().step, 20);
    assert_eq!(SavedState::at(&own).unwrap().step, 23);
    let locked = training.options().resume_from(&own, &model(0)).map(drop).unwrap_err();
    assert!(matches!(locked, Error::LockedHere { .. }), "{locked}");
    for dir in [training.temp.path(), &training.dir] {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(names.filter(|name| name.starts_with(".posthoc-ema-")).count(), 0);
    }
}

#[test]
fn state_before_the_first_update_can_be_saved_and_resumed_from() {
    let expected = Training::undisturbed();
    for steps in [0, 2] {
        let training = Training::new();
        let mut ema = training.options().create(&model(0)).unwrap();
        training.train(&mut ema, steps);
        let path = training.temp.path().join("early");
        ema.save_to(&path).unwrap();
        training.train(&mut ema, 25);
        drop(ema);
        let ema = training.options().resume_from(&path, &model(0)).unwrap();
        assert_eq!((ema.step(), ema.history().last()), (steps, None));
        assert!(matches!(ema.synthesize(Profile::sigma_rel(0.1).unwrap()), Err(Error::NoUpdate)));
        assert!(training.steps().is_empty());
        drop(ema);
        // A process that dies here goes on from that state.
        assert_eq!(training.options().resume_or_create(&model(0)).unwrap().step(), steps);
        let ema = training.options().resume_from(&path, &model(0)).unwrap();
        assert!(training.end(ema) == expected);
    }
}

#[test]
fn state_begins_the_run_in_a_new_directory() {
    let expected = Training::undisturbed();
    let training = Training::begun(60);
    let moved = training.temp.path().join("elsewhere.safetensors");
    std::fs::copy(training.checkpoint(48).join("posthoc-ema.safetensors"), &moved).unwrap();
    std::fs::remove_dir_all(&training.dir).unwrap();
    let ema = training.options().resume_from(&moved, &model(0)).unwrap();
    assert_eq!(ema.step(), 48);
    let (files, _, live, _) = training.end(ema);
    // The state is the same, and so is each snapshot from then on. Earlier ones are not there.
    assert!(live == expected.2);
    let later = expected.0.into_iter().filter(|(name, _)| files.iter().any(|(other, _)| other == name));
    assert_eq!(training.steps(), (50..=END).step_by(10).collect());
    assert!(files == later.collect::<Vec<_>>());
    // The whole state of a checkpoint at a snapshot's step writes that snapshot again.
    let training = Training::begun(60);
    std::fs::remove_dir_all(&training.dir).unwrap();
    drop(training.resume_from(60).unwrap());
    assert_eq!(training.steps(), [60].into());
}

#[test]
fn resume_goes_on_from_the_state_that_was_gone_back_to() {
    let training = Training::begun(105);
    drop(training.resume_from(48).unwrap());
    let ema = training.options().resume(&model(0)).unwrap();
    assert_eq!((ema.step(), training.steps()), (48, (10..=40).step_by(10).collect()));
    assert_eq!(ema.check_step(47).unwrap_err().to_string().matches("step 4").count(), 2);
    drop(ema);
    // A state that is newer than the run's moves nothing aside.
    let training = Training::begun(59);
    let ema = training.resume_from(48).unwrap();
    assert!(!set_aside(&training.dir).unwrap().is_empty());
    drop(ema);
    let training = Training::begun(60);
    std::fs::remove_dir_all(training.checkpoint(60)).unwrap();
    let mut ema = training.options().resume(&model(0)).unwrap();
    training.train(&mut ema, 72);
    drop(ema);
    let ema = training.resume_from(72).unwrap();
    assert_eq!((ema.step(), set_aside(&training.dir).unwrap()), (72, vec![]));
}

#[test]
fn background_rewind_keeps_bits() {
    let expected = Training::undisturbed();
    let training = Training::begun(END);
    for step in [96, 36, 72, 24] {
        let options = training.options().checkpoint_in_background(true);
        let mut ema = options.resume_from(training.checkpoint(step), &model(0)).unwrap();
        training.train(&mut ema, 75);
        if step == 24 {
            assert!(training.end(ema) == expected);
        }
    }
}

#[test]
fn unfit_states_and_paths_are_refused_and_change_nothing() {
    let training = Training::begun(50);
    let other = Training::begun(50);
    let whole = contents(&training.dir);
    let text = |result: Result<PostHocEma>| result.map(drop).unwrap_err().to_string();
    let from = |path: &Path| text(training.options().resume_from(path, &model(0)));
    let stranger = from(&other.checkpoint(36));
    assert!(stranger.contains("state.safetensors: this live state belongs to another run"), "{stranger}");
    assert!(stranger.contains("checkpoint-36/posthoc-ema.safetensors"), "{stranger}");
    std::fs::rename(training.dir.join("state.safetensors"), training.temp.path().join("kept")).unwrap();
    let stranger = from(&other.checkpoint(36));
    assert!(stranger.contains("this snapshot belongs to another run"), "{stranger}");
    std::fs::rename(training.temp.path().join("kept"), training.dir.join("state.safetensors")).unwrap();
    let empty = training.temp.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let none = from(&empty);
    assert!(none.contains("neither posthoc-ema.safetensors nor state.safetensors"), "{none}");
    assert!(from(&training.temp.path().join("missing")).contains("missing: it does not exist: name a file"));
    assert!(from(&training.dir.join("0.20-00001-of-00002.safetensors")).contains("state"));
    let damaged = training.temp.path().join("damaged");
    let mut bytes = std::fs::read(training.checkpoint(36).join("posthoc-ema.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    assert!(from(&damaged).contains("checksum"));
    let at36 = |options: Options| text(options.resume_from(training.checkpoint(36), &model(0)));
    assert!(at36(training.options().sigma_rels([0.1])).contains("profiles"));
    let fewer = training.options().resume_from(training.checkpoint(36), &model(0)[..2].to_vec());
    assert!(text(fewer).contains("c.bias"));
    assert!(whole == contents(&training.dir));

    let ema = training.options().resume(&model(0)).unwrap();
    let refused = |path: &Path| ema.save_to(path).unwrap_err().to_string();
    for path in [training.dir.clone(), training.dir.join("state.safetensors"), training.dir.join("x")] {
        assert!(refused(&path).contains("holds nothing but the run"), "{}", path.display());
    }
    assert!(refused(Path::new("/dev/null")).contains("this is a device"));
    assert!(refused(&training.temp.path().join("no/file")).contains("check the path"));
    assert!(refused(&training.temp.path().join("no/")).contains("this folder does not exist"));
}

/// Goes back to before and after a change of the model's tensors.
#[test]
fn rewind_across_an_extension_keeps_bits() {
    let few = |step: u64| model(step)[..2].to_vec();
    let grow = |ema: &mut PostHocEma, until: u64, is_whole: bool| {
        while ema.step() < until {
            let next = ema.step() + 1;
            ema.update(&if is_whole { model(next) } else { few(next) }).unwrap();
        }
    };
    let straight = Training::new();
    let path = |training: &Training, name: &str| training.temp.path().join(name);
    let begun = |training: &Training| {
        let mut ema = training.options().create(&few(0)).unwrap();
        grow(&mut ema, 25, false);
        ema.save_to(path(training, "few")).unwrap();
        drop(ema);
        let options = training.options().extend(true);
        let mut ema = options.resume_from(path(training, "few"), &model(25)).unwrap();
        grow(&mut ema, 45, true);
        ema.save_to(path(training, "whole")).unwrap();
        ema
    };
    let expected = straight.end(begun(&straight));
    let training = Training::new();
    let mut ema = begun(&training);
    grow(&mut ema, 85, true);
    drop(ema);
    let ema = training.options().resume_from(path(&training, "few"), &few(25)).unwrap();
    assert_eq!((ema.tensors().len(), training.steps()), (2, [10, 20].into()));
    drop(ema);
    let mut ema = training.options().resume_from(path(&training, "whole"), &model(45)).unwrap();
    assert_eq!((ema.tensors().len(), training.steps()), (3, (10..=40).step_by(10).collect()));
    grow(&mut ema, 58, true);
    drop(ema);
    let options = training.options().extend(true);
    let mut ema = options.resume_from(path(&training, "few"), &model(25)).unwrap();
    grow(&mut ema, 45, true);
    assert!(training.end(ema) == expected);
}

/// A run whose own state is damaged goes on from the training's checkpoint.
#[test]
fn damaged_state_of_the_run_is_replaced() {
    let expected = Training::undisturbed();
    let training = Training::begun(105);
    std::fs::write(training.dir.join("state.safetensors"), "damaged").unwrap();
    std::fs::write(training.dir.join("0.90-00001-of-00002.safetensors"), "damaged").unwrap();
    assert!(training.end(training.resume_from(48).unwrap()) == expected);
}

/// A marker comes from a directory that may be anyone's: its names must not lead out of the run.
#[test]
fn marker_cannot_name_other_files() {
    let training = Training::begun(30);
    let outside = training.temp.path().join("outside.safetensors");
    std::fs::write(&outside, "kept").unwrap();
    for marker in [
        r#"{"state":"","id":"0000000000000000","away":["../outside.safetensors"],"back":[]}"#,
        r#"{"state":"","id":"../../00000000000","away":[],"back":[]}"#,
        r#"{"state":"","id":"0000000000000000","away":[],"back":[["..","0.10.safetensors"]]}"#,
        r#"{"state":"","id":"0000000000000000","away":[],"back":[["0000000000000000","state.safetensors"]]}"#,
    ] {
        std::fs::write(training.dir.join(".rewind"), marker).unwrap();
        let text = training.options().resume(&model(0)).unwrap_err().to_string();
        assert!(text.contains(".rewind: it names `") && text.contains("move it out"), "{text}");
        assert!(Run::open(&training.dir).is_err());
    }
    std::fs::remove_file(training.dir.join(".rewind")).unwrap();
    drop(training.options().resume(&model(0)).unwrap());
    assert_eq!(std::fs::read(&outside).unwrap(), b"kept");
}
