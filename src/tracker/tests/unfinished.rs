//! Trackers that end without `finish`.

use super::log::logged;
use super::*;

fn options(dir: &Path) -> Options {
    PostHocEma::options(dir).update_every(2).update_after_step(0).checkpoint_every(1000)
}

/// Trains 7 steps, calls `end` with the tracker, and returns the warnings.
fn warnings(dir: &Path, end: impl FnOnce(PostHocEma)) -> Vec<String> {
    let walk = Walk::new(1);
    let mut ema = options(dir).resume_or_create(&walk.model).unwrap();
    let until = ema.step() + 7;
    while ema.step() < until {
        ema.update(&walk.model).unwrap();
    }
    logged(|| end(ema)).into_iter().filter(|line| !line.starts_with("DEBUG")).collect()
}

#[test]
fn dropped_tracker_warns_of_what_is_not_stored() {
    let (_temp, dir) = scratch();
    let lost = warnings(&dir, |ema| {
        assert!(!ema.is_saved());
        drop(ema);
    });
    let text = &lost[0];
    assert!(lost.len() == 1 && text.starts_with("WARN") && text.contains(dir.to_str().unwrap()), "{lost:?}");
    assert!(text.contains("ends at step 7 without `finish` or `save`: it cannot be resumed"), "{text}");
    assert_eq!(warnings(&dir, |mut ema| ema.finish().unwrap()), [""; 0]);
    let lost = warnings(&dir, drop);
    assert!(lost.len() == 1 && lost[0].contains("step 14") && lost[0].contains("goes on from step 7"), "{lost:?}");
}

#[test]
fn tracker_that_loses_nothing_is_dropped_without_a_warning() {
    let (_temp, dir) = scratch();
    // Before the first update.
    let walk = Walk::new(1);
    assert_eq!(logged(|| drop(options(&dir).create(&walk.model).unwrap())), [""; 0]);
    let saved = warnings(&dir, |ema| {
        ema.save().unwrap();
        assert!(ema.is_saved());
    });
    assert_eq!(saved, [""; 0]);
    assert_eq!(warnings(&dir, PostHocEma::abandon), [""; 0]);
    // A run that was removed is not missed, and neither is a snapshot that is being written.
    let removed = warnings(&dir, |mut ema| {
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(ema.checkpoint().is_ok());
    });
    assert_eq!(removed, [""; 0]);
    assert!(!dir.exists());
}

#[test]
fn checkpoint_in_the_background_counts_as_stored() {
    let (_temp, dir) = scratch();
    assert_eq!(warnings(&dir, |mut ema| ema.checkpoint().unwrap()), [""; 0]);
    assert!(PostHocEma::saved_step(&dir).unwrap() == Some(7));
}
