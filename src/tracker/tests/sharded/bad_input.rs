//! Sharded runs that cannot be: one clear error.

use super::model::Changed;
use super::*;

fn refused(opened: Result<PostHocEma>, parts: &[&str]) {
    let text = opened.map(|_| ()).unwrap_err().to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

fn shard(i: usize, n: usize) -> Shard {
    Shard::new(Cut::Rows, i, n, 0)
}

#[test]
fn second_training_in_the_directory_is_refused() {
    let (_a, dir) = scratch();
    let all = Processes::open(&options(&dir), Cut::Rows, 2);
    let others = roles(&options(&dir), Cut::Rows, 4);
    refused(options(&dir).role(others[0].clone()).create(&shard(0, 4)), &["this process is writing"]);
    refused(options(&dir).create(&Shard::new(Cut::Whole, 0, 1, 0)), &["this process is writing"]);
    all.abandon();
    let alone = twin(options(&dir), 1);
    refused(options(&dir).role(others[0].clone()).create(&shard(0, 4)), &["this process is writing"]);
    alone.abandon();
}

#[test]
fn first_process_opens_first() {
    let (_a, dir) = scratch();
    let roles = roles(&options(&dir), Cut::Rows, 2);
    refused(options(&dir).role(roles[1].clone()).create(&shard(1, 2)), &["rank 0", dir.to_str().unwrap()]);
    assert!(!dir.exists());
}

#[test]
fn options_that_a_sharded_run_lacks_are_refused() {
    let (_a, dir) = scratch();
    let of = |rank, ranks, id: &str| options(&dir).shard(rank, ranks, id);
    let model = shard(0, 1);
    refused(of(Some(2), 2, "id").create(&model), &["option shard", "rank 2"]);
    refused(of(None, 0, "id").create(&model), &["option shard", "0 processes"]);
    refused(of(Some(0), 100_000, "id").create(&model), &["option shard", "99999"]);
    refused(of(Some(0), 1, "").create(&model), &["option shard", "id"]);
    refused(of(Some(0), 1, "id").extend(true).resume_or_create(&model), &["option extend"]);
    refused(of(Some(0), 1, "id").on_non_finite(OnNonFinite::Skip).create(&model), &["option on_non_finite"]);
    refused(options(&dir).create(&shard(0, 2)), &["`a.weight`", "option `shard`"]);
    assert!(!dir.exists());
}

#[test]
fn part_that_moves_is_refused() {
    let (_a, dir) = scratch();
    let mut all = Processes::open(&options(&dir), Cut::Rows, 2);
    let mut moved = Shard::new(Cut::Rows, 0, 2, 1);
    moved.0[0].offset[0] = 1;
    let text = all.trackers[0].update(&moved).unwrap_err().to_string();
    assert!(text.contains("`a.weight`") && text.contains("[1, 0] of [7, 5]"), "{text}");
    all.abandon();
}

#[test]
fn process_that_sees_nan_stores_nothing_more() {
    let (_a, alone) = scratch();
    let (_b, dir) = scratch();
    let mut all = Processes::open(&options(&dir), Cut::Rows, 2);
    all.train(4);
    all.trackers[0].update(&Shard::new(Cut::Rows, 0, 2, 5)).unwrap();
    let diverged = Changed { shard: Shard::new(Cut::Rows, 1, 2, 5), tensor: "a.weight", value: f32::NAN };
    let error = all.trackers[1].update(&diverged).unwrap_err();
    assert!(matches!(error, Error::NonFiniteParameter { step: 5, .. }), "{error}");
    let before = names(&dir);
    for step in 6..=9 {
        all.trackers[0].update(&Shard::new(Cut::Rows, 0, 2, step)).unwrap();
        let text = all.trackers[1].update(&Shard::new(Cut::Rows, 1, 2, step)).unwrap_err().to_string();
        assert!(text.contains("`a.weight`") && text.contains("step 5") && text.contains("stores nothing"), "{text}");
    }
    let last = &mut all.trackers[1];
    let errors = [last.save(), last.finish(), last.plan(Profile::sigma_rel(0.1).unwrap()).map(|_| ())];
    assert!(errors.iter().all(|done| matches!(done, Err(Error::Tensor { .. }))), "{errors:?}");
    let second = |names: &[String]| names.iter().filter(|name| name.contains("part-00002")).count();
    assert_eq!(second(&names(&dir)), second(&before));
    all.abandon();
    let mut all = Processes::open(&options(&dir), Cut::Rows, 3);
    assert_eq!(all.trackers[0].step(), 3);
    all.train(9);
    all.finish();
    twin(options(&alone), 9).finish().unwrap();
    assert_same_snapshots(&dir, &alone, "after NaN");
}

#[test]
fn manifests_of_other_runs_disagree() {
    let (_a, dir) = scratch();
    let before = options(&dir).manifest(0, &shard(0, 2)).unwrap();
    twin(options(&dir), 3).abandon();
    let after = options(&dir).manifest(1, &shard(1, 2)).unwrap();
    let text = agree(&[before, after]).unwrap_err().to_string();
    assert!(text.contains("processes 0 and 1") && text.contains("at step 3"), "{text}");
}
