//! The thread that writes: order, bounds, failures, panics, and the same files as without it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::log::logged;
use super::moments::{contents, model, moment_for, trained};
use super::*;
use crate::tracker::moment::Failure;
use crate::tracker::writer::{Job, Writer};

/// Long enough for a thread that could go on to do so.
const MOMENT: Duration = Duration::from_millis(100);

/// Checkpoints of steps 20, 40, 60, 80 to be written into `dir`, and the directory into which the tracker wrote them.
fn jobs(temp: &TempDir, dir: &Path) -> (Vec<Job>, PathBuf) {
    let straight = temp.path().join("straight");
    let mut ema = trained(&straight);
    let mut jobs = Vec::new();
    for step in 20..=80 {
        if step > 20 {
            ema.update(&model(step)).unwrap();
        }
        if step % 20 == 0 {
            let (mut moment, values) = moment_for(&ema, dir);
            moment.settings.max_checkpoints = 3;
            jobs.push(Job { moment, values, home: None });
        }
    }
    (jobs, straight)
}

fn stored_steps(dir: &Path) -> Vec<u64> {
    let run = Run::open(dir).unwrap();
    run.snapshots().iter().filter(|s| s.stem.index == 1).map(|s| s.stem.step).collect()
}

/// A writer whose every write is told by its step and answered by the test.
fn controlled(dir: &Path) -> (Writer, Receiver<u64>, Sender<Result<(), Failure>>) {
    let ((tell, told), (answer, answers)) = (channel(), channel());
    let writer = Writer::start_with(dir, move |job: &Job| {
        tell.send(job.moment.step()).unwrap();
        answers.recv().unwrap()
    });
    (writer.unwrap(), told, answer)
}

fn failure(text: &str) -> Result<(), Failure> {
    Err(Failure::Files(Error::Internal(text.into())))
}

#[test]
fn checkpoints_are_written_in_order_and_as_without_the_thread() {
    let (temp, dir) = scratch();
    let (jobs, straight) = jobs(&temp, &dir);
    let writer = Writer::start(&dir).unwrap();
    for mut job in jobs {
        job.moment.settings.max_checkpoints = 20;
        writer.submit(job).unwrap();
    }
    writer.flush().unwrap();
    assert_eq!(stored_steps(&dir), [20, 40, 60, 80]);
    let named = |dir: &Path| contents(dir).into_iter().filter(|(name, _)| name != "state.safetensors");
    assert!(named(&dir).eq(named(&straight)));
    // The newest state is there, and a resume takes it.
    let options = |dir: &Path| PostHocEma::options(dir).resume(&model(80)).unwrap();
    let (one, other) = (options(&dir), options(&straight));
    assert_eq!((one.step(), averages(&one)[1].high.clone()), (80, averages(&other)[1].high.clone()));
    assert_eq!((writer.last_failed_step(), writer.take_error().is_none()), (None, true));
}

#[test]
fn one_waits_while_one_is_written_and_the_next_blocks() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let mut next = || jobs.remove(0);
    let (writer, told, answer) = controlled(&dir);
    writer.submit(next()).unwrap();
    assert_eq!(told.recv().unwrap(), 20);
    writer.submit(next()).unwrap();
    let (third, fourth) = (next(), next());
    let (done, is_done) = channel();
    std::thread::scope(|scope| {
        // Should an assertion fail, its end lets the threads go on, and the test fails instead of waiting for them.
        let (writer, answer) = (&writer, answer);
        scope.spawn(move || {
            writer.submit(third).unwrap();
            done.send(60).unwrap();
            writer.submit(fourth).unwrap();
            done.send(80).unwrap();
        });
        assert!(is_done.recv_timeout(MOMENT).is_err());
        // The first fails; the one that is tried again takes the place of the one that is written.
        answer.send(failure("full")).unwrap();
        assert_eq!(told.recv().unwrap(), 20);
        assert!(is_done.recv_timeout(MOMENT).is_err());
        answer.send(Ok(())).unwrap();
        assert_eq!(told.recv().unwrap(), 40);
        assert_eq!(is_done.recv().unwrap(), 60);
        assert!(is_done.recv_timeout(MOMENT).is_err());
        (0..3).for_each(|_| answer.send(Ok(())).unwrap());
        assert_eq!(is_done.recv().unwrap(), 80);
    });
    writer.flush().unwrap();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [60, 80]);
}

#[test]
fn what_failed_is_tried_again_before_the_next_and_told_once() {
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
    // Three are kept.
    assert_eq!(stored_steps(&dir), [40, 60, 80]);
    assert_eq!((writer.last_failed_step(), writer.take_error().is_none()), (None, true));
}

#[test]
fn what_failed_twice_is_given_up_and_the_next_is_written() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let (moment, values) = (jobs[2].moment.clone(), jobs[2].values.clone());
    let lines = logged(|| {
        let (writer, told, answer) = controlled(&dir);
        for result in [failure("one"), failure("two"), Ok(())] {
            answer.send(result).unwrap();
        }
        jobs.drain(..2).for_each(|job| writer.submit(job).unwrap());
        assert_eq!(writer.flush().unwrap_err().to_string(), "nothing to do: one");
        assert_eq!((told.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![20, 20, 40], Some(20)));
        // At a flush the second error is told, where the first was told before.
        answer.send(failure("three")).unwrap();
        writer.submit(jobs.remove(0)).unwrap();
        let error = std::iter::repeat_with(std::thread::yield_now).find_map(|()| writer.take_error()).unwrap();
        assert_eq!(error.to_string(), "nothing to do: three");
        answer.send(failure("four")).unwrap();
        assert_eq!(writer.flush().unwrap_err().to_string(), "nothing to do: four");
        assert_eq!(writer.last_failed_step(), Some(60));
        // The same step may come again.
        answer.send(Ok(())).unwrap();
        writer.submit(Job { moment, values, home: None }).unwrap();
        writer.flush().unwrap();
        assert_eq!((told.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![60, 60, 60], None));
    });
    let last_failed_step =
        ["two", "four"].map(|why| lines.iter().filter(|l| l.contains("given up") && l.ends_with(why)).count());
    assert_eq!(last_failed_step, [1, 1], "{lines:?}");
}

#[test]
fn an_error_is_not_told_where_the_second_try_wrote_it() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let lines = logged(|| {
        let (writer, told, answer) = controlled(&dir);
        answer.send(failure("one")).unwrap();
        answer.send(Ok(())).unwrap();
        writer.submit(jobs.remove(0)).unwrap();
        writer.flush().unwrap();
        assert_eq!((told.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![20, 20], None));
    });
    assert!(lines.len() == 1 && lines[0].starts_with("WARN") && lines[0].ends_with("before: nothing to do: one"));
}

#[test]
fn values_that_are_never_stored_are_not_tried_again() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let (tell, told) = channel();
    let writer = Writer::start_with(&dir, move |job: &Job| {
        tell.send(job.moment.step()).unwrap();
        job.moment.store(&job.values.as_values())
    });
    let writer = writer.unwrap();
    jobs[0].values.averages[0].high[1] = f32::NAN;
    writer.submit(jobs.remove(0)).unwrap();
    assert!(matches!(writer.flush(), Err(Error::NonFinite { element: 1, step: 20, .. })));
    writer.submit(jobs.remove(0)).unwrap();
    writer.flush().unwrap();
    assert_eq!((told.try_iter().collect::<Vec<_>>(), writer.last_failed_step()), (vec![20, 40], Some(20)));
    assert_eq!(stored_steps(&dir), [40]);
}

#[test]
fn a_panic_is_an_error_and_the_thread_goes_on() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let writer = Writer::start(&dir).unwrap();
    // Averages that are shorter than the table says.
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
fn dropping_it_writes_what_waits() {
    let (temp, dir) = scratch();
    let (mut jobs, _) = jobs(&temp, &dir);
    let lines = logged(|| {
        let writer = Writer::start(&dir).unwrap();
        jobs.drain(..2).for_each(|job| writer.submit(job).unwrap());
        drop(writer);
    });
    assert_eq!(stored_steps(&dir), [20, 40]);
    assert!(lines.iter().all(|line| !line.starts_with("ERROR")), "{lines:?}");
    // What nobody has seen is logged, after a second try.
    let lines = logged(|| {
        let writer = Writer::start(&dir).unwrap();
        let mut job = jobs.remove(0);
        job.moment.dir = dir.join("gone");
        writer.submit(job).unwrap();
        drop(writer);
    });
    let errors: Vec<&String> = lines.iter().filter(|line| line.starts_with("ERROR")).collect();
    assert!(errors.len() == 1 && errors[0].contains("gone/state.safetensors"), "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line.contains("given up")).count(), 1, "{lines:?}");
}
