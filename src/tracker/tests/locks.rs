//! Tests of lost locks, of runs that two processes wrote, and of directories that are moved during a write.

use std::sync::atomic::{AtomicBool, Ordering};

use super::storage::listing;
use super::*;
use crate::run::verify;

fn options(dir: &Path) -> Options {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(10).snapshot_growth(None);
    options.retention(Retention::Latest).max_checkpoints(50).checkpoint_in_background(false)
}

fn findings(dir: &Path) -> Vec<String> {
    verify(dir, &mut |_| ()).unwrap().findings.iter().map(ToString::to_string).collect()
}

#[test]
fn holder_stops_storing_when_a_second_writer_was_let_in() {
    for on_error in [OnError::Stop, OnError::Continue] {
        for in_background in [false, true] {
            let (_temp, dir) = scratch();
            let mut walk = Walk::new(1);
            let options = || options(&dir).on_error(on_error).checkpoint_in_background(in_background);
            let mut first = options().create(&walk.model).unwrap();
            train(&mut first, &mut walk, 25);
            first.flush().unwrap();
            std::fs::remove_file(dir.join(".lock")).unwrap();
            let mut second = options().resume(&walk.model).unwrap();
            assert_eq!(second.step(), 20);
            let before = listing(&dir);
            let mut errors: Vec<Error> = (0..15).filter_map(|_| first.update(walk.step()).err()).collect();
            errors.extend(first.flush().err());
            errors.extend(first.save().err());
            errors.extend(first.finish().err());
            assert!(errors.len() >= 3, "{errors:?}");
            for error in errors {
                let text = error.to_string();
                assert!(matches!(error, Error::LockLost { .. }) && text.contains("was replaced"), "{text}");
                assert!(text.contains(dir.to_str().unwrap()) && text.contains("start one of them again"), "{text}");
            }
            assert_eq!(listing(&dir), before);
            drop(first);
            train(&mut second, &mut walk, 30);
            second.finish().unwrap();
            assert_eq!(findings(&dir), [""; 0]);
        }
    }
}

#[test]
fn directory_that_was_moved_and_put_back_is_still_locked() {
    let (temp, dir) = scratch();
    let away = temp.path().join("away");
    let mut walk = Walk::new(1);
    let mut first = options(&dir).create(&walk.model).unwrap();
    train(&mut first, &mut walk, 15);
    std::fs::rename(&dir, &away).unwrap();
    let mut second = options(&dir).create(&walk.model).unwrap();
    train(&mut second, &mut walk, 15);
    let text = (0..10).find_map(|_| first.update(walk.step()).err()).unwrap().to_string();
    assert!(text.contains("the directory was replaced"), "{text}");
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::rename(&away, &dir).unwrap();
    let text = (0..10).find_map(|_| second.update(walk.step()).err()).unwrap().to_string();
    assert!(text.contains("the directory was replaced"), "{text}");
    train(&mut first, &mut walk, 20);
    first.finish().unwrap();
    assert_eq!(findings(&dir), [""; 0]);
}

/// As on a disk without locks, or after a copy: two trackers continue one run, and their files are mixed.
#[test]
fn run_that_two_processes_wrote_is_named() {
    let (temp, dir) = scratch();
    let copy = temp.path().join("copy");
    let mut walk = Walk::new(1);
    let mut first = options(&dir).create(&walk.model).unwrap();
    train(&mut first, &mut walk, 20);
    std::fs::create_dir(&copy).unwrap();
    for (path, _) in listing(&dir) {
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let mut second = options(&copy).resume(&walk.model).unwrap();
    train(&mut first, &mut walk, 40);
    train(&mut second, &mut walk, 40);
    // Only the tracker reads the state.
    for (name, refuses) in [("0.40.safetensors", true), ("state.safetensors", false)] {
        let own = std::fs::read(dir.join(name)).unwrap();
        std::fs::copy(copy.join(name), dir.join(name)).unwrap();
        let found = findings(&dir);
        assert!(found.len() == 1 && found[0].contains("two processes wrote this run"), "{found:?}");
        assert!(found[0].contains(name), "{found:?}");
        let error = Run::open(&dir).err().map(|error| error.to_string());
        assert_eq!(error, refuses.then(|| found[0].clone()));
        std::fs::write(dir.join(name), own).unwrap();
        assert_eq!(findings(&dir), [""; 0]);
    }
    drop(first);
    std::fs::copy(copy.join("1.60.safetensors"), dir.join("1.60.safetensors")).unwrap();
    let text = options(&dir).resume(&walk.model).unwrap_err().to_string();
    assert!(text.contains("two processes wrote this run") && text.contains("1.60.safetensors"), "{text}");
}

#[test]
fn sessions_of_many_resumes_follow_one_another() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    drop(options(&dir).create(&walk.model).unwrap());
    for (steps, saves) in [(15, true), (0, true), (5, false), (7, true), (3, true), (20, false), (10, true)] {
        let mut ema = options(&dir).resume_or_create(&walk.model).unwrap();
        train(&mut ema, &mut walk, steps);
        if saves {
            ema.finish().unwrap();
        }
        drop(ema);
        assert_eq!(findings(&dir), [""; 0]);
        // As after a kill between two files of a checkpoint.
        let newest = steps_of(&dir).last().copied().unwrap_or(0);
        let _ = std::fs::remove_file(dir.join(format!("1.{newest}.safetensors")));
    }
    let mut sessions: Vec<u64> = Vec::new();
    for snapshot in Run::open(&dir).unwrap().snapshots() {
        sessions.push(snapshot.meta.session.as_ref().unwrap().number);
    }
    assert!(sessions.iter().max() > sessions.iter().min(), "{sessions:?}");
}

fn steps_of(dir: &Path) -> std::collections::BTreeSet<u64> {
    crate::snapshot::list(dir).unwrap().keys().map(|id| id.step).collect()
}

#[test]
fn directory_that_is_renamed_during_writes_keeps_no_hidden_file() {
    let (temp, dir) = scratch();
    let away = temp.path().join("away");
    let model = vec![("w", vec![1.0f32; 100_000])];
    let mut ema = options(&dir).checkpoint_every(1).checkpoint_in_background(true).create(&model).unwrap();
    let done = AtomicBool::new(false);
    let mut errors = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::fs::rename(&dir, &away).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(3));
                std::fs::rename(&away, &dir).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(7));
            }
        });
        for _ in 0..60 {
            errors += usize::from(ema.update(&model).is_err());
        }
        errors += usize::from(ema.flush().is_err());
        done.store(true, Ordering::Relaxed);
    });
    ema.finish().unwrap();
    assert!(errors > 0);
    let hidden = listing(&dir).into_iter().filter(|(path, _)| path.to_str().unwrap().contains(".posthoc-ema-"));
    assert_eq!(hidden.count(), 0);
    assert_eq!(findings(&dir), [""; 0]);
}
