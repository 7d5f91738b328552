//! Files of sharded runs: what is written, completed and removed, also by processes that die or whose disk is full.

use super::model::Changed;
use super::*;
use crate::fs::fail_point::Fault;

/// Sizes of the tensors' data in the files of a directory.
fn data_bytes(dir: &Path, prefix: &str) -> usize {
    let paths = names(dir).into_iter().filter(|name| name.starts_with(prefix)).map(|name| dir.join(name));
    let of_file = |path: PathBuf| {
        let file = crate::snapshot::StoredFile::open(&path).unwrap();
        file.tensors().iter().map(|(_, tensor)| file.bytes(tensor).len()).sum::<usize>()
    };
    paths.map(of_file).sum()
}

#[test]
fn each_element_is_written_once_whatever_the_replication() {
    let (_a, alone) = scratch();
    twin(options(&alone).checkpoint_dtype(None), 3).abandon();
    for cut in CUTS {
        let (_b, dir) = scratch();
        let mut all = Processes::open(&options(&dir).checkpoint_dtype(None), cut, 4);
        all.train(3);
        all.abandon();
        for prefix in ["0.3", "1.3", "state"] {
            assert_eq!(data_bytes(&dir, prefix), data_bytes(&alone, prefix), "{cut:?} {prefix}");
        }
    }
}

#[test]
fn process_without_parts_of_its_own_writes_no_file() {
    let (_a, dir) = scratch();
    let roles = roles(&options(&dir), Cut::Replicas, 4);
    assert_eq!(roles.iter().map(|role| role.rank).collect::<Vec<_>>(), [Some(0), Some(1), None, None]);
    let mut all = Processes::open(&options(&dir), Cut::Replicas, 4);
    all.train(3);
    all.finish();
    let expected = ["0.3", "1.3", "state-3"]
        .map(|stem| [1, 2].map(|i| format!("{stem}-part-0000{i}-of-00002.safetensors")))
        .concat();
    assert_eq!(names(&dir), expected);
}

/// Trains two of three processes past a checkpoint; the third does not store it.
#[test]
fn incomplete_sets_are_removed_and_the_set_before_is_used() {
    let (_a, alone) = scratch();
    let (_b, dir) = scratch();
    let mut all = Processes::open(&options(&dir), Cut::Rows, 3);
    all.train(10);
    for step in 11..=13 {
        for i in [0, 2] {
            all.trackers[i].update(&Shard::new(Cut::Rows, i, 3, step)).unwrap();
        }
    }
    all.abandon();
    assert!(names(&dir).contains(&"0.12-part-00001-of-00003.safetensors".to_owned()));
    assert_eq!(PostHocEma::saved_step(&dir).unwrap(), Some(9));
    let mut all = Processes::open(&options(&dir), Cut::Columns, 2);
    assert_eq!(all.trackers[0].step(), 9);
    assert!(!names(&dir).iter().any(|name| name.contains(".12-") || name.contains("-12-")), "{:?}", names(&dir));
    all.train(13);
    all.finish();
    twin(options(&alone), 13).finish().unwrap();
    assert_same_snapshots(&dir, &alone, "after a process that died");
}

/// All states of a step are written, and not all snapshots.
#[test]
fn missing_snapshots_are_written_again_by_all() {
    let (_a, alone) = scratch();
    twin(options(&alone), 9).abandon();
    for missing in ["0.9-part-00002-of-00003.safetensors", "1.9-part-00001-of-00003.safetensors"] {
        for (cut, n) in [(Cut::Rows, 3), (Cut::Flat, 4), (Cut::Replicas, 4)] {
            let (_b, dir) = scratch();
            let mut all = Processes::open(&options(&dir), Cut::Rows, 3);
            all.train(9);
            all.abandon();
            std::fs::remove_file(dir.join(missing)).unwrap();
            let all = Processes::open(&options(&dir), cut, n);
            assert_eq!(all.trackers[0].step(), 9);
            all.abandon();
            assert_same_snapshots(&dir, &alone, &format!("{missing} {cut:?} on {n}"));
        }
    }
}

#[test]
fn first_checkpoint_that_is_incomplete_is_no_run() {
    let (_a, dir) = scratch();
    let mut all = Processes::open(&options(&dir), Cut::Rows, 2);
    for step in 1..=3 {
        all.trackers[1].update(&Shard::new(Cut::Rows, 1, 2, step)).unwrap();
    }
    all.abandon();
    assert_eq!(names(&dir).len(), 3);
    assert!(matches!(options(&dir).resume(&Shard::new(Cut::Whole, 0, 1, 0)), Err(Error::NoRun { .. })));
    let all = Processes::open(&options(&dir), Cut::Rows, 2);
    assert_eq!((all.trackers[0].step(), names(&dir).len()), (0, 0));
    all.abandon();
}

/// Each file operation of one process fails in turn, as on a full disk, while the other writes.
#[test]
fn full_disk_of_one_process_costs_only_its_step() {
    let (_a, alone) = scratch();
    let (_b, newest) = scratch();
    twin(options(&alone), 12).finish().unwrap();
    twin(options(&newest), 6).abandon();
    for first in 0.. {
        let (_c, dir) = scratch();
        let mut all = Processes::open(&options(&dir), Cut::Rows, 2);
        all.train(5);
        all.trackers[0].update(&Shard::new(Cut::Rows, 0, 2, 6)).unwrap();
        let fault = Fault::within(&dir, first..usize::MAX, 28);
        let stored = all.trackers[1].update(&Shard::new(Cut::Rows, 1, 2, 6));
        let has_struck = fault.steps() > first;
        drop(fault);
        if let Err(error) = &stored {
            let text = error.to_string();
            assert!(text.contains("No space left on device") && text.contains(dir.to_str().unwrap()), "{text}");
        }
        all.abandon();
        let mut all = Processes::open(&options(&dir), Cut::Columns, 3);
        assert!([3, 6].contains(&all.trackers[0].step()), "{first}");
        all.train(12);
        all.finish();
        assert_same_snapshots(&dir, &alone, &format!("failed from operation {first} on"));
        if !has_struck {
            assert!(stored.is_ok() && first > 10, "{first}");
            return;
        }
    }
}

#[test]
fn snapshot_that_one_process_gave_up_is_left_out_by_all() {
    let (_a, dir) = scratch();
    let mut all = Processes::open(&options(&dir).on_error(OnError::Continue), Cut::Rows, 2);
    all.train(5);
    all.trackers[0].update(&Shard::new(Cut::Rows, 0, 2, 6)).unwrap();
    let fault = Fault::within(&dir, 0..usize::MAX, 28);
    for step in 6..=7 {
        all.trackers[1].update(&Shard::new(Cut::Rows, 1, 2, step)).unwrap();
    }
    drop(fault);
    all.trackers[0].update(&Shard::new(Cut::Rows, 0, 2, 7)).unwrap();
    // Until the next checkpoint, the other process cannot know that this file will not come.
    let text = all.trackers[0].plan(Profile::sigma_rel(0.15).unwrap()).unwrap_err().to_string();
    assert!(text.contains("0.6-part-00002-of-00002.safetensors"), "{text}");
    all.train(10);
    let plans = all.trackers.iter().map(|ema| ema.plan(Profile::sigma_rel(0.15).unwrap()).unwrap());
    let steps: Vec<Vec<u64>> = plans.map(|plan| plan.weights.iter().map(|weight| weight.step).collect()).collect();
    assert!(steps[0] == steps[1] && steps[0].contains(&9) && !steps[0].contains(&6), "{steps:?}");
    all.abandon();
}

/// A value beyond the range of f16 keeps its own part in f32. The parts of other processes stay in f16.
#[test]
fn wide_values_of_one_part_are_kept() {
    let (_a, dir) = scratch();
    let mut all = Processes::open(&options(&dir), Cut::Rows, 3);
    let model = |i, value| Changed { shard: Shard::new(Cut::Rows, i, 3, 1), tensor: "d.weight", value };
    for _ in 1..=3 {
        all.trackers.iter_mut().enumerate().for_each(|(i, ema)| {
            ema.update(&model(i, if i == 1 { 1e6 } else { 0.1 })).unwrap();
        });
    }
    all.abandon();
    let run = Run::open(&dir).unwrap();
    let (tensor, bytes) = run.snapshots()[0].tensor("d.weight").unwrap();
    let values: Vec<f32> = bytemuck::allocation::pod_collect_to_vec(&bytes);
    assert_eq!((tensor.dtype, values.len()), (Dtype::F32, 12));
    assert_eq!([values[0], values[4], values[8]], [f16::from_f32(0.1).to_f32(), 1e6, f16::from_f32(0.1).to_f32()]);
}
