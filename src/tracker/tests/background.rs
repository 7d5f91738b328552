//! Snapshots that are written while the training goes on, and those that it waits for.

use std::sync::mpsc::channel;

use super::log::logged;
use super::storage::listing;
use super::*;
use crate::tracker::engine::HostEngine;
use crate::tracker::writer::{Job, Writer};

/// Gives a tracker a slow disk; everything is written under the run's lock.
fn slowly(ema: PostHocEma) -> PostHocEma {
    let writer = Writer::start_with(&ema.dir, |job: &Job| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(matches!(Lock::acquire(&job.moment.dir), Err(Error::Locked { .. })));
        job.moment.store(&job.values.as_values())
    });
    over(writer.unwrap(), ema)
}

fn over(writer: Writer, mut ema: PostHocEma) -> PostHocEma {
    host(&mut ema).writer = Some(writer);
    ema
}

fn host(ema: &mut PostHocEma) -> &mut HostEngine {
    match &mut ema.engine {
        Engine::Host(host) => host,
        #[cfg(feature = "cuda")]
        _ => panic!("the parameters lie in host memory"),
    }
}

fn options(dir: &Path) -> Options {
    PostHocEma::options(dir).checkpoint_every(50).max_checkpoints(3).retention(Retention::Latest)
}

fn stems(dir: &Path) -> Vec<String> {
    Run::open(dir).unwrap().snapshots().iter().map(|s| s.stem.to_string()).collect()
}

/// Everything but the run's id, which is drawn at random.
fn tensors(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let run = Run::open(dir).unwrap();
    let bytes = run.snapshots().iter().flat_map(|snapshot| {
        let stem = snapshot.stem;
        snapshot.tensors().map(move |(name, _)| (format!("{stem} {name}"), snapshot.tensor(name).unwrap().1.to_vec()))
    });
    bytes.collect()
}

#[test]
fn a_run_is_the_same_as_when_it_is_written_at_once() {
    let ((_a, straight), (_b, dir)) = (scratch(), scratch());
    let (mut one, mut other) = (Walk::new(4), Walk::new(4));
    let mut ema = options(&straight).checkpoint_in_background(false).create(&one.model).unwrap();
    let mut background = options(&dir).create(&other.model).unwrap();
    assert!(train_on(&mut ema, &mut one, 333) == train_on(&mut background, &mut other, 333));
    let profile = Profile::sigma_rel(0.1).unwrap();
    background.save().unwrap();
    assert_eq!(background.synthesize(profile.clone()).unwrap(), ema.synthesize(profile).unwrap());
    ema.finish().unwrap();
    background.finish().unwrap();
    assert_eq!(stems(&dir), ["0.250", "0.300", "0.330", "1.250", "1.300", "1.330"]);
    assert_eq!(tensors(&dir), tensors(&straight));
    drop(background);
    let resumed = options(&dir).resume(&other.model).unwrap();
    assert_eq!(resumed.step(), 333);
    for (a, b) in averages(&resumed).iter().zip(averages(&ema)) {
        assert_eq!((&a.high, &a.low), (&b.high, &b.low));
    }
}

#[test]
fn a_synthesis_uses_the_snapshots_that_are_still_being_written() {
    let ((_a, straight), (_b, dir)) = (scratch(), scratch());
    let (mut one, mut other) = (Walk::new(4), Walk::new(4));
    let mut ema = options(&straight).checkpoint_in_background(false).create(&one.model).unwrap();
    let mut background = slowly(options(&dir).create(&other.model).unwrap());
    train_on(&mut ema, &mut one, 110);
    train_on(&mut background, &mut other, 110);
    let profile = Profile::sigma_rel(0.1).unwrap();
    assert_eq!(background.plan(profile.clone()).unwrap().weights, ema.plan(profile.clone()).unwrap().weights);
    assert_eq!(background.synthesize(profile.clone()).unwrap(), ema.synthesize(profile).unwrap());
}

#[test]
fn a_later_save_is_not_undone_by_an_older_checkpoint() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = slowly(options(&dir).create(&walk.model).unwrap());
    train_on(&mut ema, &mut walk, 53);
    ema.save().unwrap();
    drop(ema);
    assert_eq!(options(&dir).resume(&walk.model).unwrap().step(), 53);
}

#[test]
fn an_error_of_the_background_comes_from_a_later_call_which_has_done_its_part() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let options = PostHocEma::options(&dir).checkpoint_every(5000);
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
    // The next checkpoint is preceded by the one that failed, and no update was lost over it.
    while ema.step() < 10_000 {
        ema.update(walk.step()).unwrap();
    }
    ema.finish().unwrap();
    assert_eq!(stems(&dir), ["0.5000", "0.10000", "1.5000", "1.10000"]);
    assert_eq!(ema.history().times(), (1..=1000).map(|i| 10 * i).collect::<Vec<_>>());
}

#[test]
fn a_last_snapshot_that_failed_is_written_by_a_second_finish() {
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
    assert_eq!(stems(&dir), ["0.50", "1.50"]);
    ema.finish().unwrap();
    assert_eq!(stems(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    let before = listing(&dir);
    ema.finish().unwrap();
    assert_eq!(listing(&dir), before);
}

/// The state is stored, the snapshot's file is not: the state tells a resume what is missing.
#[test]
fn a_save_stores_the_state_and_tells_of_the_snapshot_that_failed() {
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
    assert_eq!(stems(&dir), ["0.50", "1.50"]);
}

#[test]
fn a_tracker_dropped_without_finish_writes_what_is_queued_under_its_lock() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let lines = logged(|| {
        let mut ema = slowly(options(&dir).create(&walk.model).unwrap());
        train_on(&mut ema, &mut walk, 100);
        drop(ema);
    });
    assert!(lines.is_empty(), "{lines:?}");
    assert_eq!(stems(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    assert_eq!(options(&dir).resume(&walk.model).unwrap().step(), 100);
}

/// At the call that would store it, before anything is handed over.
#[test]
fn a_poisoned_average_is_told_at_once_and_not_stored() {
    let (_temp, dir) = scratch();
    let mut model = vec![("w", vec![1.0f32; 9])];
    let mut ema = options(&dir).update_every(1).checkpoint_every(2).create(&model).unwrap();
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
fn a_checkpoint_waits_for_the_one_before_and_both_are_right() {
    let ((_a, straight), (_b, dir)) = (scratch(), scratch());
    let (mut one, mut other) = (Walk::new(4), Walk::new(4));
    let every = |dir: &Path| options(dir).update_every(1).checkpoint_every(1).max_checkpoints(9);
    let mut ema = every(&straight).checkpoint_in_background(false).create(&one.model).unwrap();
    let ((tell, told), (go, gone)) = (channel(), channel());
    let writer = Writer::start_with(&dir, move |job: &Job| {
        tell.send(job.moment.step()).unwrap();
        gone.recv().unwrap();
        job.moment.store(&job.values.as_values())
    });
    let mut background = over(writer.unwrap(), every(&dir).create(&other.model).unwrap());
    train_on(&mut ema, &mut one, 3);
    // The first is being written, and the averages move on.
    train_on(&mut background, &mut other, 1);
    assert_eq!(told.recv().unwrap(), 1);
    std::thread::scope(|scope| {
        let training = scope.spawn(|| train_on(&mut background, &mut other, 2));
        for step in [2, 3] {
            // The averages of this step are not copied while the copy before is being written.
            assert!(told.recv_timeout(std::time::Duration::from_millis(50)).is_err());
            go.send(()).unwrap();
            assert_eq!(told.recv().unwrap(), step);
        }
        go.send(()).unwrap();
        training.join().unwrap();
    });
    background.flush().unwrap();
    assert_eq!(tensors(&dir), tensors(&straight));
    assert_eq!(stems(&dir), ["0.1", "0.2", "0.3", "1.1", "1.2", "1.3"]);
}

#[test]
fn the_thread_begins_with_the_first_checkpoint_and_never_where_the_training_waits() {
    let (temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 49);
    ema.save().unwrap();
    ema.flush().unwrap();
    assert!(host(&mut ema).writer.is_none() && host(&mut ema).spare.is_ready());
    train_on(&mut ema, &mut walk, 1);
    assert!(host(&mut ema).writer.is_some());
    // The memory of a copy that is written comes back.
    ema.flush().unwrap();
    assert!(host(&mut ema).spare.is_ready());
    drop(ema);
    // It may be asked for anew.
    let mut ema = options(&dir).checkpoint_in_background(false).resume(&walk.model).unwrap();
    train_on(&mut ema, &mut walk, 50);
    assert!(host(&mut ema).writer.is_none() && !host(&mut ema).spare.is_ready());
    assert_eq!(stems(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    let mut never = options(&temp.path().join("never")).create(&walk.model).unwrap();
    never.finish().unwrap();
    assert!(host(&mut never).writer.is_none());
}

#[test]
fn without_memory_for_a_copy_the_training_waits() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(4);
    let mut ema = options(&dir).create(&walk.model).unwrap();
    host(&mut ema).spare.refuse();
    let lines = logged(|| {
        train_on(&mut ema, &mut walk, 100);
        assert_eq!(stems(&dir), ["0.50", "0.100", "1.50", "1.100"]);
    });
    assert_eq!(lines.iter().filter(|line| line.contains("no memory for a copy")).count(), 2, "{lines:?}");
    assert!(host(&mut ema).writer.is_none());
}
