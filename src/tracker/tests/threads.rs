//! Tests of the two threads that store averages kept on a device.

use std::sync::mpsc::channel;

use super::checkpoint_meta::{checkpoint_for, contents, trained};
use super::log::logged;
use super::*;
use crate::tracker::checkpoint_meta::Failure;
use crate::tracker::engine::background::Background;
use crate::tracker::writer::Pending;

fn error(text: &str) -> Error {
    Error::Internal(text.into())
}

#[test]
fn first_error_or_panic_is_returned_once() {
    let (_temp, dir) = scratch();
    let background = Background::start(&dir).unwrap();
    background.work(|| Err(error("first")));
    background.work(|| Err(error("second")));
    background.wait();
    assert_eq!(background.take_error().unwrap().to_string(), error("first").to_string());
    assert!(background.take_error().is_none());
    background.work(|| panic!("on purpose"));
    let text = background.flush().unwrap_err().to_string();
    assert!(text.contains("the thread that works on the averages panicked (on purpose): resume the run"), "{text}");
    background.flush().unwrap();
}

#[test]
fn values_are_read_and_written_in_order() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, values) = checkpoint_for(&ema, &temp.path().join("other"));
    let other = meta.dir.clone();
    let mut background = Background::start(&dir).unwrap();
    let (proceed, proceeds) = channel();
    background.store(meta, None, move |_| Ok(Some(values)));
    background.work(move || proceeds.recv().map_err(|_| error("gone")));
    // A later job does not delay an update.
    background.wait_for_reads();
    proceed.send(()).unwrap();
    background.wait_idle().unwrap();
    assert_eq!(contents(&other), contents(&dir));
    assert_eq!((background.last_failed_step(), background.take_error().is_none()), (None, true));
}

#[test]
fn values_that_cannot_be_read_are_an_error_of_their_step() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, _) = checkpoint_for(&ema, &temp.path().join("other"));
    let mut background = Background::start(&dir).unwrap();
    background.store(meta.clone(), None, |_| Ok(None));
    background.flush().unwrap();
    assert_eq!(background.last_failed_step(), None);
    background.store(meta.clone(), None, |_| Err(Failure::Files(error("unreadable"))));
    assert_eq!(background.flush().unwrap_err().to_string(), error("unreadable").to_string());
    assert_eq!(background.last_failed_step(), Some(20));
    assert!(contents(&meta.dir).is_empty());
    let mut background = Background::start(&dir).unwrap();
    background.store(meta, None, |_| panic!("on purpose"));
    background.wait_for_reads();
    assert!(background.flush().unwrap_err().to_string().contains("on purpose"));
    assert_eq!(background.last_failed_step(), Some(20));
}

#[test]
fn drop_writes_queued_checkpoints_and_logs_an_error() {
    let (temp, dir) = scratch();
    let ema = trained(&dir);
    let (meta, values) = checkpoint_for(&ema, &temp.path().join("other"));
    let other = meta.dir.clone();
    let lines = logged(|| {
        let mut background = Background::start(&dir).unwrap();
        background.store(meta, None, move |_| Ok(Some(values)));
        background.work(|| Err(error("late")));
    });
    assert_eq!(contents(&other), contents(&dir));
    let errors: Vec<&String> = lines.iter().filter(|line| line.starts_with("ERROR")).collect();
    assert_eq!(errors, [&format!("ERROR a background job failed: {}", error("late"))]);
}
