//! Tests of the writing thread: order, bounds, failures, panics, and the same files as without it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::checkpoint_meta::{checkpoint_for, contents, model, trained};
use super::log::logged;
use super::*;
use crate::tracker::checkpoint_meta::Failure;
use crate::tracker::writer::{CheckpointJob, Pending, Writer};

/// Long enough for a thread that is not blocked to go on.
const PATIENCE: Duration = Duration::from_millis(100);

/// Returns checkpoints of steps 20, 40, 60 and 80 for `dir`, and the directory that the tracker itself wrote.
fn jobs(temp: &TempDir, dir: &Path) -> (Vec<CheckpointJob>, PathBuf) {
    let straight = temp.path().join("straight");
    let mut ema = trained(&straight);
    let mut jobs = Vec::new();
    for step in 20..=80 {
        if step > 20 {
            ema.update(&model(step)).unwrap();
        }
        if step % 20 == 0 {
            let (mut meta, values) = checkpoint_for(&ema, dir);
            meta.settings.max_checkpoints = 3;
            jobs.push(CheckpointJob { meta, values, recycle: None });
        }
    }
    (jobs, straight)
}

fn stored_steps(dir: &Path) -> Vec<u64> {
    let run = Run::open(dir).unwrap();
    run.snapshots().iter().filter(|s| s.id.index == 1).map(|s| s.id.step).collect()
}

/// Starts a writer that sends the step of each write and receives its result from the test.
fn controlled(dir: &Path) -> (Writer, Receiver<u64>, Sender<Result<(), Failure>>) {
    let (started, starts) = channel();
    let (answer, answers) = channel();
    let writer = Writer::start_with(dir, move |job: &CheckpointJob| {
        started.send(job.meta.step()).unwrap();
        answers.recv().unwrap()
    });
    (writer.unwrap(), starts, answer)
}

fn error(text: &str) -> Error {
    Error::Internal(text.into())
}

fn failure(text: &str) -> Result<(), Failure> {
    Err(Failure::Files(error(text)))
}

#[test]
fn thread_writes_the_same_files_in_order() {
    let (temp, dir) = scratch();
    let (jobs, straight) = jobs(&temp, &dir);
    let writer = Writer::start(&dir).unwrap();
    for mut job in jobs {
        job.meta.settings.max_checkpoints = 20;
        writer.submit(job).unwrap();
    }
    writer.flush().unwrap();
    assert_eq!(stored_steps(&dir), [20, 40, 60, 80]);
    let named = |dir: &Path| contents(dir).into_iter().filter(|(name, _)| name != "state.safetensors");
    assert!(named(&dir).eq(named(&straight)));
    // A resume continues from the newest state.
    let options = |dir: &Path| PostHocEma::options(dir).resume(&model(80)).unwrap();
    let one = options(&dir);
    let other = options(&straight);
    assert_eq!((one.step(), averages(&one)[1].high.clone()), (80, averages(&other)[1].high.clone()));
    assert_eq!((writer.last_failed_step(), writer.take_error().is_none()), (None, true));
}

#[test]
fn third_submission_blocks() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let mut next = || jobs.remove(0);
    let (writer, starts, answer) = controlled(&dir);
    writer.submit(next()).unwrap();
    assert_eq!(starts.recv().unwrap(), 20);
    writer.submit(next()).unwrap();
    let third = next();
    let fourth = next();
    let (done, is_done) = channel();
    std::thread::scope(|scope| {
        // If an assertion fails, dropping `answer` lets the threads go on, and the test fails instead of hanging.
        let writer = &writer;
        let answer = answer;
        scope.spawn(move || {
            writer.submit(third).unwrap();
            done.send(60).unwrap();
            writer.submit(fourth).unwrap();
            done.send(80).unwrap();
        });
        assert!(is_done.recv_timeout(PATIENCE).is_err());
        // The first fails; its second try still counts as the one being written.
        answer.send(failure("full")).unwrap();
        assert_eq!(starts.recv().unwrap(), 20);
        assert!(is_done.recv_timeout(PATIENCE).is_err());
        answer.send(Ok(())).unwrap();
        assert_eq!(starts.recv().unwrap(), 40);
        assert_eq!(is_done.recv().unwrap(), 60);
        assert!(is_done.recv_timeout(PATIENCE).is_err());
        (0..3).for_each(|_| answer.send(Ok(())).unwrap());
        assert_eq!(is_done.recv().unwrap(), 80);
    });
    writer.flush().unwrap();
    assert_eq!(starts.try_iter().collect::<Vec<_>>(), [60, 80]);
}

#[test]
fn failed_checkpoint_is_written_before_the_next() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let writer = Writer::start(&dir).unwrap();
    let aside = dir.with_extension("aside");
    std::fs::rename(&dir, &aside).unwrap();
    writer.submit(jobs.remove(0)).unwrap();
    let error = std::iter::repeat_with(std::thread::yield_now).find_map(|()| writer.take_error()).unwrap();
    assert!(error.to_string().contains("check the path"), "{error}");
    std::fs::rename(&aside, &dir).unwrap();
    writer.submit(jobs.remove(0)).unwrap();
    writer.flush().unwrap();
    assert_eq!(stored_steps(&dir), [20, 40]);
    jobs.drain(..).for_each(|job| writer.submit(job).unwrap());
    writer.flush().unwrap();
    // Retention keeps three.
    assert_eq!(stored_steps(&dir), [40, 60, 80]);
    assert_eq!((writer.last_failed_step(), writer.take_error().is_none()), (None, true));
}

#[test]
fn checkpoint_is_given_up_after_two_tries() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let meta = jobs[2].meta.clone();
    let values = jobs[2].values.clone();
    let lines = logged(|| {
        let (writer, starts, answer) = controlled(&dir);
        for result in [failure("one"), failure("two"), Ok(())] {
            answer.send(result).unwrap();
        }
        jobs.drain(..2).for_each(|job| writer.submit(job).unwrap());
        assert_eq!(writer.flush().unwrap_err().to_string(), error("one").to_string());
        assert_eq!((starts.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![20, 20, 40], Some(20)));
        // A flush returns the second error if the first was taken before.
        answer.send(failure("three")).unwrap();
        writer.submit(jobs.remove(0)).unwrap();
        let taken = std::iter::repeat_with(std::thread::yield_now).find_map(|()| writer.take_error()).unwrap();
        assert_eq!(taken.to_string(), error("three").to_string());
        answer.send(failure("four")).unwrap();
        assert_eq!(writer.flush().unwrap_err().to_string(), error("four").to_string());
        assert_eq!(writer.last_failed_step(), Some(60));
        // The same step may be submitted again.
        answer.send(Ok(())).unwrap();
        writer.submit(CheckpointJob { meta, values, recycle: None }).unwrap();
        writer.flush().unwrap();
        assert_eq!((starts.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![60, 60, 60], None));
    });
    let warned = |why| format!("after two tries: {}", error(why));
    let warnings = ["two", "four"].map(|why| lines.iter().filter(|line| line.ends_with(&warned(why))).count());
    assert_eq!(warnings, [1, 1], "{lines:?}");
}

#[test]
fn successful_second_try_turns_the_error_into_a_warning() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let lines = logged(|| {
        let (writer, starts, answer) = controlled(&dir);
        answer.send(failure("one")).unwrap();
        answer.send(Ok(())).unwrap();
        writer.submit(jobs.remove(0)).unwrap();
        writer.flush().unwrap();
        assert_eq!((starts.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![20, 20], None));
    });
    assert!(lines.len() == 1 && lines[0].starts_with("WARN"), "{lines:?}");
    let expected = format!("step 20 was stored at the second try; the first failed: {}", error("one"));
    assert!(lines[0].ends_with(&expected), "{lines:?}");
}

#[test]
fn non_finite_values_are_not_tried_again() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let (started, starts) = channel();
    let writer = Writer::start_with(&dir, move |job: &CheckpointJob| {
        started.send(job.meta.step()).unwrap();
        job.meta.store(&job.values.as_values())
    });
    let writer = writer.unwrap();
    jobs[0].values.averages[0].high[1] = f32::NAN;
    writer.submit(jobs.remove(0)).unwrap();
    assert!(matches!(writer.flush(), Err(Error::NonFinite { element: 1, step: 20, .. })));
    writer.submit(jobs.remove(0)).unwrap();
    writer.flush().unwrap();
    assert_eq!((starts.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![20, 40], Some(20)));
    assert_eq!(stored_steps(&dir), [40]);
}

#[test]
fn panic_is_an_error_and_the_thread_goes_on() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let writer = Writer::start(&dir).unwrap();
    // Shortens the averages below the registry's layout.
    jobs[0].values.averages[1].high.truncate(2);
    writer.submit(jobs.remove(0)).unwrap();
    let text = writer.flush().unwrap_err().to_string();
    assert!(text.contains("step 20") && text.contains("panicked (range end index"), "{text}");
    assert_eq!(writer.last_failed_step(), Some(20));
    writer.submit(jobs.remove(0)).unwrap();
    writer.flush().unwrap();
    assert_eq!(stored_steps(&dir), [40]);
}

#[test]
fn drop_writes_queued_checkpoints() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let lines = logged(|| {
        let writer = Writer::start(&dir).unwrap();
        jobs.drain(..2).for_each(|job| writer.submit(job).unwrap());
        drop(writer);
    });
    assert_eq!(stored_steps(&dir), [20, 40]);
    assert!(lines.iter().all(|line| !line.starts_with("ERROR")), "{lines:?}");
    // An error that no call returned is logged after the second try.
    let lines = logged(|| {
        let writer = Writer::start(&dir).unwrap();
        let mut job = jobs.remove(0);
        job.meta.dir = dir.join("gone");
        writer.submit(job).unwrap();
        drop(writer);
    });
    let errors: Vec<&String> = lines.iter().filter(|line| line.starts_with("ERROR")).collect();
    assert!(errors.len() == 1 && errors[0].contains("gone/state.safetensors"), "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line.contains("giving up")).count(), 1, "{lines:?}");
}
