//! Tests of snapshots written in the background.

use std::any::Any;
use std::sync::mpsc::channel;

use super::log::logged;
use super::storage::listing;
use super::*;
use crate::tracker::engine::HostEngine;
use crate::tracker::writer::{CheckpointJob, Writer};

/// Gives a tracker a slow writer, which checks that the run is locked.
fn slowly(ema: PostHocEma) -> PostHocEma {
    let writer = Writer::start_with(&ema.dir, |job: &CheckpointJob| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(matches!(Lock::acquire(&job.meta.dir), Err(Error::LockedHere { .. })));
        job.meta.store(&job.values.as_values())
    });
    over(writer.unwrap(), ema)
}

fn over(writer: Writer, mut ema: PostHocEma) -> PostHocEma {
    host(&mut ema).writer = Some(writer);
    ema
}

fn host(ema: &mut PostHocEma) -> &mut HostEngine {
    let engine: &mut dyn Any = &mut *ema.engine;
    engine.downcast_mut().expect("the parameters are in host memory")
}

fn options(dir: &Path) -> Options {
    PostHocEma::options(dir).checkpoint_every(50).max_checkpoints(3).retention(Retention::Latest)
}

fn ids(dir: &Path) -> Vec<String> {
    Run::open(dir).unwrap().snapshots().iter().map(|s| s.id.to_string()).collect()
}

/// Returns the data of all snapshots, without the run's random id.
fn tensors(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let run = Run::open(dir).unwrap();
    let bytes = run.snapshots().iter().flat_map(|snapshot| {
        let id = snapshot.id;
        snapshot.tensors().map(move |(name, _)| (format!("{id} {name}"), snapshot.tensor(name).unwrap().1.to_vec()))
    });
    bytes.collect()
}

#[test]
fn background_run_equals_a_waiting_one() {
    let (_a, straight) = scratch();
    let (_b, dir) = scratch();
    let mut one = Walk::new(4);
    let mut other = Walk::new(4);
    let mut ema = options(&straight).checkpoint_in_background(false).create(&one.model).unwrap();
    let mut background = options(&dir).create(&other.model).unwrap();
    assert!(train_on(&mut ema, &mut one, 333) == train_on(&mut background, &mut other, 333));
    let profile = Profile::sigma_rel(0.1).unwrap();
    background.save().unwrap();
    assert_eq!(background.synthesize(profile.clone()).unwrap(), ema.synthesize(profile).unwrap());
    ema.finish().unwrap();
    background.finish().unwrap();
    assert_eq!(ids(&dir), ["0.250", "0.300", "0.330", "1.250", "1.300", "1.330"]);
    assert_eq!(tensors(&dir), tensors(&straight));
    drop(background);
    let resumed = options(&dir).resume(&other.model).unwrap();
    assert_eq!(resumed.step(), 333);
    for (a, b) in averages(&resumed).iter().zip(averages(&ema)) {
        assert_eq!((&a.high, &a.low), (&b.high, &b.low));
    }
}

#[test]
fn synthesis_waits_for_queued_snapshots() {
    let (_a, straight) = scratch();
    let (_b, dir) = scratch();
    let mut one = Walk::new(4);
    let mut other = Walk::new(4);
    let mut ema = options(&straight).checkpoint_in_background(false).create(&one.model).unwrap();
    let mut background = slowly(options(&dir).create(&other.model).unwrap());
    train_on(&mut ema, &mut one, 110);
    train_on(&mut background, &mut other, 110);
    let profile = Profile::sigma_rel(0.1).unwrap();
    assert_eq!(background.plan(profile.clone()).unwrap().weights, ema.plan(profile.clone()).unwrap().weights);
    assert_eq!(background.synthesize(profile.clone()).unwrap(), ema.synthesize(profile).unwrap());
}

#[test]
fn queued_checkpoint_does_not_replace_a_later_save() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = slowly(options(&dir).create(&walk.model).unwrap());
    train_on(&mut ema, &mut walk, 53);
    ema.save().unwrap();
    drop(ema);
    assert_eq!(options(&dir).resume(&walk.model).unwrap().step(), 53);
}

#[test]
fn later_update_returns_a_background_error_and_still_counts() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let options = PostHocEma::options(&dir).checkpoint_every(5000).snapshot_growth(None);
    let mut ema = options.create(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 4999);
    let aside = dir.with_extension("aside");
    std::fs::rename(&dir, &aside).unwrap();
    assert_eq!(ema.update(walk.step()).unwrap(), UpdateOutcome::Stored);
    let error = loop {
        std::thread::sleep(std::time::Duration::from_millis(1));
        if let Err(error) = ema.update(walk.step()) {
            break error;
        }
    };
    assert!(error.to_string().contains("state.safetensors") && ema.step() < 10_000, "{error}");
    std::fs::rename(&aside, &dir).unwrap();
    // The failed checkpoint is written before the next one, and no update was lost.
    while ema.step() < 10_000 {
        ema.update(walk.step()).unwrap();
    }
    ema.finish().unwrap();
    assert_eq!(ids(&dir), ["0.5000", "0.10000", "1.5000", "1.10000"]);
    assert_eq!(ema.history().times(), (1..=1000).map(|i| 10 * i).collect::<Vec<_>>());
}

#[test]
fn second_finish_writes_a_failed_last_snapshot() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 99);
    ema.save().unwrap();
    let aside = dir.with_extension("aside");
    std::fs::rename(&dir, &aside).unwrap();
    assert_eq!(ema.update(walk.step()).unwrap(), UpdateOutcome::Stored);
    for _ in 0..2 {
        let text = ema.finish().unwrap_err().to_string();
        assert!(text.contains("check the path"), "{text}");
    }
    std::fs::rename(&aside, &dir).unwrap();
    assert_eq!(ids(&dir), ["0.50", "1.50"]);
    ema.finish().unwrap();
    assert_eq!(ids(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    let before = listing(&dir);
    ema.finish().unwrap();
    assert_eq!(listing(&dir), before);
}

/// Checks that a resume completes the snapshot, because the state names it.
#[test]
fn save_stores_the_state_and_returns_a_snapshots_error() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 49);
    let obstacle = dir.join("1.50.safetensors");
    std::fs::create_dir(&obstacle).unwrap();
    assert_eq!(ema.update(walk.step()).unwrap(), UpdateOutcome::Stored);
    let text = ema.save().unwrap_err().to_string();
    assert!(text.contains("1.50.safetensors"), "{text}");
    drop(ema);
    std::fs::remove_dir(&obstacle).unwrap();
    drop(options(&dir).resume(&walk.model).unwrap());
    assert_eq!(ids(&dir), ["0.50", "1.50"]);
}

#[test]
fn drop_writes_queued_checkpoints_under_the_lock() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let lines = logged(|| {
        let mut ema = slowly(options(&dir).create(&walk.model).unwrap());
        train_on(&mut ema, &mut walk, 100);
        drop(ema);
    });
    assert!(lines.is_empty(), "{lines:?}");
    assert_eq!(ids(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    assert_eq!(options(&dir).resume(&walk.model).unwrap().step(), 100);
}

#[test]
fn non_finite_average_is_an_error_of_the_same_call() {
    let (_temp, dir) = scratch();
    let mut model = vec![("w", vec![1.0f32; 9])];
    let mut ema =
        options(&dir).update_every(1).checkpoint_every(2).on_non_finite(OnNonFinite::Ignore).create(&model).unwrap();
    ema.update(&model).unwrap();
    ema.update(&model).unwrap();
    ema.finish().unwrap();
    let before = listing(&dir);
    model[0].1[4] = f32::NAN;
    ema.update(&model).unwrap();
    assert!(matches!(ema.update(&model), Err(Error::NonFinite { element: 4, step: 4, .. })));
    for _ in 0..2 {
        assert!(matches!(ema.finish(), Err(Error::NonFinite { element: 4, step: 4, .. })));
    }
    assert_eq!(listing(&dir), before);
}

#[test]
fn checkpoint_waits_until_the_previous_one_is_written() {
    let (_a, straight) = scratch();
    let (_b, dir) = scratch();
    let mut one = Walk::new(4);
    let mut other = Walk::new(4);
    let every = |dir: &Path| options(dir).update_every(1).checkpoint_every(1).max_checkpoints(9);
    let mut ema = every(&straight).checkpoint_in_background(false).create(&one.model).unwrap();
    let (started, starts) = channel();
    let (proceed, proceeds) = channel();
    let writer = Writer::start_with(&dir, move |job: &CheckpointJob| {
        started.send(job.meta.step()).unwrap();
        proceeds.recv().unwrap();
        job.meta.store(&job.values.as_values())
    });
    let mut background = over(writer.unwrap(), every(&dir).create(&other.model).unwrap());
    train_on(&mut ema, &mut one, 3);
    // The averages change while the first is being written.
    train_on(&mut background, &mut other, 1);
    assert_eq!(starts.recv().unwrap(), 1);
    std::thread::scope(|scope| {
        let training = scope.spawn(|| train_on(&mut background, &mut other, 2));
        for step in [2, 3] {
            // The averages of this step are not copied while the previous copy is being written.
            assert!(starts.recv_timeout(std::time::Duration::from_millis(50)).is_err());
            proceed.send(()).unwrap();
            assert_eq!(starts.recv().unwrap(), step);
        }
        proceed.send(()).unwrap();
        training.join().unwrap();
    });
    background.flush().unwrap();
    assert_eq!(tensors(&dir), tensors(&straight));
    assert_eq!(ids(&dir), ["0.1", "0.2", "0.3", "1.1", "1.2", "1.3"]);
}

#[test]
fn thread_starts_at_the_first_background_checkpoint() {
    let (temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 49);
    ema.save().unwrap();
    ema.flush().unwrap();
    assert!(host(&mut ema).writer.is_none() && host(&mut ema).copy_buffer.is_ready());
    train_on(&mut ema, &mut walk, 1);
    assert!(host(&mut ema).writer.is_some());
    // The memory of a written copy is reused.
    ema.flush().unwrap();
    assert!(host(&mut ema).copy_buffer.is_ready());
    drop(ema);
    // A resume may choose differently.
    let mut ema = options(&dir).checkpoint_in_background(false).resume(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 50);
    assert!(host(&mut ema).writer.is_none() && !host(&mut ema).copy_buffer.is_ready());
    assert_eq!(ids(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    let mut never = options(&temp.path().join("never")).create(&walk.model).unwrap();
    never.finish().unwrap();
    assert!(host(&mut never).writer.is_none());
}

#[test]
fn training_waits_without_memory_for_a_copy() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    host(&mut ema).copy_buffer.refuse();
    let lines = logged(|| {
        train_on(&mut ema, &mut walk, 100);
        assert_eq!(ids(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    });
    assert_eq!(lines.iter().filter(|line| line.contains("no memory for a copy")).count(), 2, "{lines:?}");
    assert!(host(&mut ema).writer.is_none());
}
