//! Tests of storing, resuming and retention.

use super::*;

#[test]
fn resume_after_save_keeps_bits() {
    let targets = [0.03, 0.1, 0.2].map(|s| Profile::sigma_rel(s).unwrap());
    let straight = {
        let (_temp, dir) = scratch();
        let mut walk = Walk::new(5);
        let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
        train(&mut ema, &mut walk, 1000);
        (averages(&ema), targets.clone().map(|p| ema.synthesize(p).unwrap()), snapshot_bytes(&dir))
    };
    // In the middle of an interval, at an update, at a snapshot.
    for stop in [503, 510, 500] {
        let (_temp, dir) = scratch();
        let mut walk = Walk::new(5);
        let mut ema = PostHocEma::options(&dir).checkpoint_every(100).create(&walk.model).unwrap();
        train(&mut ema, &mut walk, stop);
        ema.save().unwrap();
        drop(ema);
        let mut ema = PostHocEma::options(&dir).resume(&walk.model).unwrap();
        assert_eq!(ema.step(), stop);
        train(&mut ema, &mut walk, 1000 - stop);
        for (a, b) in averages(&ema).iter().zip(&straight.0) {
            assert_eq!((&a.high, &a.low), (&b.high, &b.low));
        }
        assert_eq!(targets.clone().map(|p| ema.synthesize(p).unwrap()), straight.1);
        assert_eq!(snapshot_bytes(&dir), straight.2);
    }
}

/// Returns the data of every snapshot of a run.
fn snapshot_bytes(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let run = Run::open(dir).unwrap();
    let tensors = run.snapshots().iter().flat_map(|snapshot| {
        snapshot
            .tensors()
            .map(|(name, _)| (format!("{} {name}", snapshot.id), snapshot.tensor(name).unwrap().1.to_vec()))
    });
    tensors.collect()
}

/// Returns options with which NaN is found at a snapshot only.
fn ignoring(dir: &Path) -> Options {
    PostHocEma::options(dir).update_every(1).checkpoint_every(2).on_non_finite(OnNonFinite::Ignore)
}

#[test]
fn non_finite_values_are_named_and_nothing_is_written() {
    for bad in [f32::NAN, f32::INFINITY] {
        let (_temp, dir) = scratch();
        let mut model = vec![("w", vec![1.0f32; 9])];
        let mut ema = ignoring(&dir).create(&model).unwrap();
        ema.update(&model).unwrap();
        ema.update(&model).unwrap();
        ema.flush().unwrap();
        let before = listing(&dir);
        model[0].1[4] = bad;
        ema.update(&model).unwrap();
        let text = ema.update(&model).unwrap_err().to_string();
        for part in ["`w`", "element 4", "step 4", "sigma_rel 0.05"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(listing(&dir), before);
        drop(ema);
        assert_eq!(PostHocEma::options(&dir).resume(&model).unwrap().step(), 2);
    }
}

/// Returns every file of a run with its contents.
pub(super) fn listing(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn steps(dir: &Path) -> Vec<u64> {
    let steps: std::collections::BTreeSet<u64> = crate::snapshot::list(dir).unwrap().keys().map(|id| id.step).collect();
    steps.into_iter().collect()
}

#[test]
fn retention_keeps_useful_snapshots_and_may_change_on_resume() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(10).max_checkpoints(5).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 300);
    let kept = steps(&dir);
    assert_eq!((kept.len(), kept[4]), (5, 300));
    // Keeping the newest five, 260 to 300, would lose the long averages.
    assert!(kept[0] < 100 && kept[2] < 240, "{kept:?}");
    let plans = Run::open(&dir).unwrap().plans(&[Profile::sigma_rel(0.2).unwrap()], At::Latest).unwrap();
    assert!(plans[0].relative_error < 0.1, "{}", plans[0].relative_error);
    ema.save().unwrap();
    drop(ema);
    let options = PostHocEma::options(&dir).retention(Retention::Steps(vec![kept[1], 315]));
    let mut ema = options.resume(&walk.model).unwrap();
    train(&mut ema, &mut walk, 40);
    assert_eq!(steps(&dir), [kept[1], 320, 340]);
    drop(ema);
    // The state stores the retention.
    let mut ema = PostHocEma::options(&dir).resume(&walk.model).unwrap();
    train(&mut ema, &mut walk, 10);
    assert_eq!(steps(&dir), [kept[1], 320, 350]);
}

/// Checks a snapshot of another run at a step of this run, one at a later step, and a damaged one of this run.
#[test]
fn retention_skips_foreign_and_damaged_snapshots() {
    let (temp, dir) = scratch();
    let other = temp.path().join("other");
    let mut walk = Walk::new(1);
    let options = |dir: &Path| PostHocEma::options(dir).checkpoint_every(10).retention(Retention::Latest);
    let mut ema = options(&dir).max_checkpoints(3).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 30);
    let mut second = options(&other).max_checkpoints(50).create(&walk.model).unwrap();
    train(&mut second, &mut walk, 500);
    std::fs::copy(other.join("0.10.safetensors"), dir.join("0.10.safetensors")).unwrap();
    std::fs::copy(other.join("0.500.safetensors"), dir.join("0.500.safetensors")).unwrap();
    std::fs::write(dir.join("1.20.safetensors"), b"damaged").unwrap();
    let foreign = std::fs::read(dir.join("0.10.safetensors")).unwrap();
    train(&mut ema, &mut walk, 50);
    assert_eq!(steps(&dir), [10, 20, 60, 70, 80, 500]);
    assert_eq!(std::fs::read(dir.join("0.10.safetensors")).unwrap(), foreign);
    assert!(dir.join("1.10.safetensors").is_file() && dir.join("0.20.safetensors").is_file());
}

#[test]
fn retention_first_removes_steps_that_lack_a_profile() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(10).max_checkpoints(5).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 50);
    std::fs::remove_file(dir.join("1.30.safetensors")).unwrap();
    train(&mut ema, &mut walk, 10);
    assert_eq!(steps(&dir), [10, 20, 40, 50, 60]);
}

#[test]
fn retention_latest_keeps_the_newest_snapshots() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let options = PostHocEma::options(&dir).checkpoint_every(20).max_checkpoints(3).shard_size(100);
    let options = options.retention(Retention::Latest);
    let mut ema = options.create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 130);
    let run = Run::open(&dir).unwrap();
    let ids: Vec<String> = run.snapshots().iter().map(|snapshot| snapshot.id.to_string()).collect();
    assert_eq!(ids, ["0.80", "0.100", "0.120", "1.80", "1.100", "1.120"]);
    assert_eq!(run.snapshots()[0].files().len(), 2);
    // finish() stores a snapshot of the newest update.
    ema.finish().unwrap();
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.snapshots().last().unwrap().id.to_string(), "1.130");
    assert_eq!(run.snapshots().len(), 6);
}

#[test]
fn resume_completes_an_interrupted_checkpoint() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 100);
    drop(ema);
    let whole = listing(&dir);
    std::fs::remove_file(dir.join("1.100.safetensors")).unwrap();
    std::fs::write(dir.join(".posthoc-ema-left-behind"), "x").unwrap();
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
    assert_eq!(listing(&dir), whole);
}

#[test]
fn failed_checkpoint_is_written_by_the_next_update() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let options = PostHocEma::options(&dir).checkpoint_every(50).checkpoint_in_background(false);
    let mut ema = options.create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 99);
    let aside = dir.with_extension("aside");
    let ids = || Run::open(&dir).unwrap().snapshots().iter().map(|s| s.id.to_string()).collect::<Vec<_>>();
    std::fs::rename(&dir, &aside).unwrap();
    let text = ema.update(walk.step()).unwrap_err().to_string();
    assert!(text.contains("state.safetensors") && text.contains("check the path"), "{text}");
    // finish() can be called again.
    assert!(ema.finish().is_err());
    std::fs::rename(&aside, &dir).unwrap();
    train(&mut ema, &mut walk, 10);
    assert_eq!(ids(), ["0.50", "0.100", "1.50", "1.100"]);
    ema.finish().unwrap();
    assert_eq!(ids(), ["0.50", "0.100", "0.110", "1.50", "1.100", "1.110"]);
    // The snapshots equal those of an undisturbed run.
    let (_temp, straight) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&straight).checkpoint_every(50).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 110);
    ema.finish().unwrap();
    assert_eq!(snapshot_bytes(&dir), snapshot_bytes(&straight));
}

/// Checks the case that a checkpoint fails after the state, and the training saves before it dies.
#[test]
fn resume_completes_a_failed_checkpoint_after_a_save() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let options = PostHocEma::options(&dir).checkpoint_every(50).checkpoint_in_background(false);
    let mut ema = options.create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 49);
    // Blocks only the second profile's file.
    let obstacle = dir.join("1.50.safetensors");
    std::fs::create_dir(&obstacle).unwrap();
    let text = ema.update(walk.step()).unwrap_err().to_string();
    assert!(text.contains("1.50.safetensors"), "{text}");
    ema.save().unwrap();
    drop(ema);
    std::fs::remove_dir(&obstacle).unwrap();
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.snapshots().iter().map(|s| s.id.to_string()).collect::<Vec<_>>(), ["0.50", "1.50"]);
}

#[test]
fn resume_writes_a_missing_shard_index() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(3);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).shard_size(100).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 50);
    drop(ema);
    let whole = listing(&dir);
    std::fs::remove_file(dir.join("1.50.safetensors.index.json")).unwrap();
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
    assert_eq!(listing(&dir), whole);
    // With larger shards the snapshot is one file, and the old shards are removed.
    std::fs::remove_file(dir.join("1.50.safetensors.index.json")).unwrap();
    drop(PostHocEma::options(&dir).shard_size(1 << 20).resume(&walk.model).unwrap());
    let names = listing(&dir).into_iter().map(|(path, _)| path.file_name().unwrap().to_owned());
    assert_eq!(names.filter(|name| name.to_str().unwrap().starts_with("1.")).collect::<Vec<_>>(), ["1.50.safetensors"]);
    assert_eq!(Run::open(&dir).unwrap().snapshots().len(), 2);
    drop(PostHocEma::options(&dir).resume(&walk.model).unwrap());
}

#[test]
fn non_finite_average_does_not_replace_a_sound_state() {
    let (_temp, dir) = scratch();
    let mut model = vec![("w", vec![1.0f32; 9])];
    let mut ema = ignoring(&dir).create(&model).unwrap();
    ema.update(&model).unwrap();
    ema.update(&model).unwrap();
    ema.flush().unwrap();
    let before = listing(&dir);
    model[0].1[4] = f32::NAN;
    ema.update(&model).unwrap();
    assert!(matches!(ema.save(), Err(Error::NonFinite { element: 4, .. })));
    assert!(matches!(ema.finish(), Err(Error::NonFinite { .. })));
    assert_eq!(listing(&dir), before);
}

#[test]
fn resume_with_another_schedule_is_exact() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(12);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(50).create(&walk.model).unwrap();
    let mut trajectory = train(&mut ema, &mut walk, 205);
    ema.save().unwrap();
    drop(ema);
    let options = PostHocEma::options(&dir).update_every(3).checkpoint_every(70).max_checkpoints(2);
    let options = options.retention(Retention::Latest).snapshot_growth(None);
    let mut ema = options.checkpoint_dtype(Dtype::F16).shard_size(50).resume_or_create(&walk.model).unwrap();
    trajectory.extend(train(&mut ema, &mut walk, 150));
    let run = Run::open(&dir).unwrap();
    let ids: Vec<String> = run.snapshots().iter().map(|s| s.id.to_string()).collect();
    assert_eq!(ids, ["0.280", "0.350", "1.280", "1.350"]);
    assert_eq!(run.snapshots()[0].files().len(), 2);
    assert_eq!(ema.history().times(), trajectory.iter().map(|(t, _)| *t).collect::<Vec<_>>());
    let profile = Profile::sigma_rel(0.28).unwrap();
    let got = floats(&ema.synthesize(profile.clone()).unwrap());
    assert!(largest_difference(&got, &direct(&trajectory, &profile, 354)) < 2.4e-7);
}

#[test]
fn create_and_resume_refuse_other_runs() {
    let (temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let text = |result: Result<PostHocEma>| result.unwrap_err().to_string();
    assert!(text(PostHocEma::options(&dir).resume(&walk.model)).contains("no run here (no state.safetensors"));
    let part = temp.path().join("part");
    std::fs::create_dir(&part).unwrap();
    std::fs::write(part.join("0.20-00001-of-00002.safetensors"), "still being copied in").unwrap();
    assert!(text(PostHocEma::options(&part).create(&walk.model)).contains("already holds a run (0.20-00001"));
    assert!(text(PostHocEma::options(&part).resume_or_create(&walk.model)).contains("already holds a run"));
    assert!(text(PostHocEma::options(&part).resume(&walk.model)).contains("snapshots but no state.safetensors"));
    assert_eq!(std::fs::read_dir(&part).unwrap().count(), 1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    assert!(text(PostHocEma::options(&dir).create(&walk.model)).contains("this process is writing this run already"));
    train(&mut ema, &mut walk, 40);
    assert!(text(PostHocEma::options(&dir).resume(&walk.model)).contains("this process is writing this run already"));
    drop(ema);
    let whole = listing(&dir);
    assert!(text(PostHocEma::options(&dir).create(&walk.model)).contains("already holds a run"));
    let other = PostHocEma::options(&dir).sigma_rels([0.1]);
    assert!(text(other.resume(&walk.model)).contains("the run has sigma_rel 0.05, sigma_rel 0.28"));
    let plain = PostHocEma::options(&dir).precision(Precision::Plain);
    assert!(text(plain.resume(&walk.model)).contains("precision"));
    assert!(text(PostHocEma::options(&dir).resume(&walk.model[..2].to_vec())).contains("c.bias"));
    assert_eq!(listing(&dir), whole);

    // A snapshot of another run with the same options is refused too.
    let second = temp.path().join("second");
    let mut ema = PostHocEma::options(&second).checkpoint_every(20).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 60);
    std::fs::copy(second.join("0.60.safetensors"), dir.join("0.60.safetensors")).unwrap();
    assert!(Run::open(&dir).unwrap_err().to_string().contains("0.60.safetensors: the run's id is "));
    assert!(text(PostHocEma::options(&dir).resume(&walk.model)).contains("0.60.safetensors: the run's id is "));
}

#[test]
fn resume_refuses_a_state_older_than_the_snapshots() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 20);
    let old = std::fs::read(dir.join("state.safetensors")).unwrap();
    train(&mut ema, &mut walk, 20);
    drop(ema);
    std::fs::write(dir.join("state.safetensors"), old).unwrap();
    let text = PostHocEma::options(&dir).resume(&walk.model).unwrap_err().to_string();
    assert!(text.contains("step 40") && text.contains("at step 20"), "{text}");
}

#[test]
fn saved_step_reads_and_checks_only_the_header() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    assert_eq!(PostHocEma::saved_step(&dir).unwrap(), None);
    train(&mut ema, &mut walk, 20);
    drop(ema);
    let path = dir.join("state.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(PostHocEma::saved_step(&dir).unwrap(), Some(20));
    let clock = br#"\"clock\":20"#;
    let place = bytes.windows(clock.len()).position(|window| window == clock).unwrap();
    bytes[place + clock.len() - 1] = b'1';
    std::fs::write(&path, &bytes).unwrap();
    let text = PostHocEma::saved_step(&dir).unwrap_err().to_string();
    assert!(text.contains("checksum") && text.contains("state.safetensors"), "{text}");
}

#[test]
fn resume_refuses_a_damaged_state() {
    let (_temp, dir) = scratch();
    let mut walk = Walk::new(1);
    let mut ema = PostHocEma::options(&dir).checkpoint_every(20).create(&walk.model).unwrap();
    train(&mut ema, &mut walk, 20);
    drop(ema);
    let path = dir.join("state.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    let text = PostHocEma::options(&dir).resume(&walk.model).unwrap_err().to_string();
    assert!(text.contains("checksum") && text.contains("state.safetensors"), "{text}");
}
