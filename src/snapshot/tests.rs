//! Tests of runs on disk: shards, siblings, damaged and foreign files.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::listing::names;
use super::*;
use crate::error::Result;
use crate::tensor::TensorSpec;

fn specs() -> Vec<TensorSpec> {
    let spec = |name: &str, dtype, n: usize| TensorSpec { name: name.into(), dtype, shape: vec![n] };
    vec![spec("a", Dtype::F32, 100), spec("b", Dtype::F32, 50), spec("n", Dtype::I64, 3), spec("z", Dtype::F16, 700)]
}

fn meta(step: u64) -> Meta {
    Meta {
        profile: "{}".into(),
        step,
        run: Some("r".into()),
        tied: BTreeMap::from([("head".into(), "a".into())]),
        ..Meta::default()
    }
}

fn fill(index: usize, range: Range<usize>, dst: &mut [u8]) {
    dst.iter_mut().zip(range).for_each(|(d, i)| *d = (i * 7 + index) as u8);
}

fn write(dir: &Path, index: usize, step: u64, meta: &Meta, shard_size: u64) -> Vec<PathBuf> {
    write_snapshot(dir, SnapshotId { index, step }, specs(), meta, shard_size, &fill).unwrap()
}

fn check_contents(snapshot: &Snapshot) {
    for (index, spec) in specs().iter().enumerate() {
        let (tensor, bytes) = snapshot.tensor(&spec.name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape), (spec.dtype, &spec.shape));
        let mut expected = vec![0; bytes.len()];
        fill(index, 0..bytes.len(), &mut expected);
        assert_eq!(bytes, expected);
    }
    assert_eq!(snapshot.meta.tied["head"], "a");
    snapshot.files().iter().for_each(|file| file.verify().unwrap());
}

#[test]
fn shards_hold_the_same_as_one_file() {
    for shard_size in [u64::MAX, 1000, 300, 1] {
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), 0, 10, &meta(10), shard_size);
        let snapshots = open_all(dir.path()).unwrap();
        assert_eq!(snapshots.len(), 1);
        assert_eq!(snapshots[0].files().len(), files.len());
        check_contents(&snapshots[0]);
        if shard_size == u64::MAX {
            assert_eq!(files.len(), 1);
            continue;
        }
        let index = fs::read_to_string(dir.path().join("0.10.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 400 + 200 + 24 + 1400);
        for file in snapshots[0].files() {
            let name = file.path().file_name().unwrap().to_str().unwrap();
            assert!(file.tensors().keys().all(|tensor| index["weight_map"][tensor] == name));
        }
        remove(dir.path(), SnapshotId { index: 0, step: 10 }, &files).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn scattered_reads_equal_the_mapping() {
    for shard_size in [u64::MAX, 300] {
        let dir = tempfile::tempdir().unwrap();
        let files = write(dir.path(), 0, 10, &meta(10), shard_size);
        let snapshots = open_all(dir.path()).unwrap();
        // A file that cannot be opened again is read from its mapping.
        for removed in [None, files.last()] {
            removed.into_iter().for_each(|file| fs::remove_file(file).unwrap());
            let mut reader = snapshots[0].scattered();
            for spec in specs() {
                let (stored, bytes) = snapshots[0].tensor(&spec.name).unwrap();
                let size = stored.dtype.bitsize() / 8;
                let mut read = Vec::new();
                let ranges = [0..1, 1..3, 2..spec.shape[0], 1..1];
                let append = |dtype, bytes: &[u8]| {
                    assert_eq!(dtype, spec.dtype);
                    read.push(bytes.to_vec());
                    Some(())
                };
                reader.read(&spec.name, ranges.iter().cloned(), append).unwrap();
                let expected = ranges.map(|range| bytes[range.start * size..range.end * size].to_vec());
                assert_eq!(read, expected);
                assert!(reader.read(&spec.name, std::iter::once(0..spec.shape[0] + 1), |_, _| Some(())).is_none());
            }
            assert!(reader.read("none", std::iter::once(0..1), |_, _| Some(())).is_none());
        }
    }
}

#[test]
fn unfinished_shards_are_left_out_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0, 10, &meta(10), u64::MAX);
    let files = write(dir.path(), 0, 20, &meta(20), 300);
    fs::remove_file(files.last().unwrap()).unwrap();
    let text = open_all(dir.path()).unwrap_err().to_string();
    assert!(text.contains("missing"), "{text}");
    fs::remove_file(dir.path().join("0.20.safetensors.index.json")).unwrap();
    assert_eq!(open_all(dir.path()).unwrap().len(), 1);
    fs::write(dir.path().join(".posthoc-ema-abc"), "half a file").unwrap();
    fs::create_dir(dir.path().join(".posthoc-ema-folder")).unwrap();
    fs::write(dir.path().join(".tmp-of-another-tool"), "not ours").unwrap();
    remove_leftovers(dir.path()).unwrap();
    let left: Vec<String> = names(dir.path()).unwrap();
    assert_eq!(left, [".posthoc-ema-folder", ".tmp-of-another-tool", "0.10.safetensors"]);
}

#[test]
fn mismatched_snapshots_are_named() {
    type Change = fn(&mut Meta, &mut Vec<TensorSpec>);
    let cases: [(&str, Change); 7] = [
        ("the run's id is other, but r in", |meta, _| meta.run = Some("other".into())),
        ("the profile is [], but {} in", |meta, _| meta.profile = "[]".into()),
        ("the shape of tensor `a` is [99], but [100] in", |_, specs| specs[0].shape = vec![99]),
        ("the dtype of tensor `a` is BF16, but F32 in", |_, specs| specs[0].dtype = Dtype::BF16),
        ("tensor `new` is present, but missing in", |_, specs| {
            specs.push(TensorSpec { name: "new".into(), ..specs[1].clone() })
        }),
        ("tensor `b` is missing, but present in", |_, specs| drop(specs.remove(1))),
        ("step 5", |meta, _| meta.step = 5),
    ];
    for (expected, change) in cases {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, 10, &meta(10), u64::MAX);
        let (mut meta, mut specs) = (meta(20), specs());
        change(&mut meta, &mut specs);
        write_snapshot(dir.path(), SnapshotId { index: 0, step: 20 }, specs, &meta, u64::MAX, &fill).unwrap();
        let text = open_all(dir.path()).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("0.20.safetensors"), "{expected}: {text}");
    }
}

#[test]
fn tensor_stored_in_a_wider_dtype_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 0, 10, &meta(10), u64::MAX);
    let (mut meta, mut specs) = (meta(20), specs());
    specs[3].dtype = Dtype::F32;
    meta.dtypes.insert("z".into(), Dtype::F16);
    write_snapshot(dir.path(), SnapshotId { index: 0, step: 20 }, specs, &meta, u64::MAX, &fill).unwrap();
    assert_eq!(open_all(dir.path()).unwrap().len(), 2);
}

#[test]
fn impossible_model_dtypes_are_refused() {
    for (name, dtype) in [("n", Dtype::F32), ("a", Dtype::I64), ("none", Dtype::F32), ("b", Dtype::F16)] {
        let dir = tempfile::tempdir().unwrap();
        let mut meta = meta(10);
        meta.copied.insert("b".into());
        meta.dtypes.insert(name.into(), dtype);
        write(dir.path(), 0, 10, &meta, u64::MAX);
        let text = open_all(dir.path()).unwrap_err().to_string();
        assert!(text.contains(&format!("tensor `{name}` the dtype {dtype}")), "{text}");
    }
}

#[test]
fn ties_to_missing_or_of_stored_tensors_are_refused() {
    for (dropped, kept) in [("head", "none"), ("b", "a")] {
        let dir = tempfile::tempdir().unwrap();
        let meta = Meta { tied: BTreeMap::from([(dropped.into(), kept.into())]), ..meta(10) };
        write(dir.path(), 0, 10, &meta, u64::MAX);
        let text = open_all(dir.path()).unwrap_err().to_string();
        assert!(text.contains(&format!("tie `{dropped}` to `{kept}`")), "{text}");
    }
}

#[test]
fn directories_without_a_run_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(open_all(dir.path()).unwrap_err().to_string().contains("no snapshot in it"));
    assert!(open_all(&dir.path().join("none")).unwrap_err().to_string().contains("does not exist"));
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(open_all(&file).unwrap_err().to_string().contains("not a directory"));
}

/// Opens four snapshots, after changing some bytes in the last file of one of them.
fn open_changed(shard_size: u64, change: Option<(u64, &[u8], &[u8])>) -> Result<Vec<Snapshot>> {
    let dir = tempfile::tempdir().unwrap();
    for step in [10, 20, 30, 40] {
        let mut meta = meta(step);
        meta.dtypes.insert("z".into(), Dtype::F32);
        let files = write(dir.path(), 0, step, &meta, shard_size);
        if let Some((_, from, to)) = change.filter(|(changed, ..)| *changed == step) {
            let path = files.last().unwrap();
            let mut bytes = fs::read(path).unwrap();
            let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
            bytes[at..at + from.len()].copy_from_slice(to);
            checksum::reseal(&mut bytes);
            fs::write(path, bytes).unwrap();
        }
    }
    open_all(dir.path())
}

#[test]
fn siblings_share_tensors_but_not_bytes() {
    for shard_size in [u64::MAX, 300] {
        let snapshots = open_changed(shard_size, None).unwrap();
        for snapshot in &snapshots {
            assert!(snapshot.shares_tensors(&snapshots[0]));
            check_contents(snapshot);
            assert_eq!(snapshot.model_dtype("z", Dtype::F16), Dtype::F32);
        }
        assert_eq!(snapshots.iter().map(|snapshot| snapshot.meta.step).collect::<Vec<_>>(), [10, 20, 30, 40]);
    }
}

#[test]
fn header_that_differs_from_a_siblings_is_checked_fully() {
    let cases: [(&[u8], &[u8], &str); 6] = [
        (b"\"shape\":[100]", b"\"shape\":[101]", "tensor `a` takes 404 bytes"),
        (b"\"data_offsets\":[0,24]", b"\"data_offsets\":[1,24]", "tensor `n` begins at byte 1"),
        (b"\"b\":{", b"\"a\":{", "tensor `a` is in the header twice"),
        (b"\"b\":{", b"\"c\":{", "tensor `c` is present, but missing in"),
        (b"\\\"z\\\":\\\"F32", b"\\\"z\\\":\\\"F64", "the dtype of tensor `z` is F64, but F32 in"),
        (b"\\\"z\\\":\\\"F32", b"\\\"n\\\":\\\"F32", "tensor `n` the dtype F32"),
    ];
    for (from, to, expected) in cases {
        let text = open_changed(u64::MAX, Some((30, from, to))).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("0.30.safetensors"), "{expected}: {text}");
    }
}

#[test]
fn first_of_several_errors_is_returned() {
    let dir = tempfile::tempdir().unwrap();
    for step in 1..=40 {
        let path = write(dir.path(), 0, step, &meta(step), u64::MAX).remove(0);
        if step >= 17 {
            fs::write(path, [0; 16]).unwrap();
        }
    }
    for _ in 0..20 {
        let text = open_all(dir.path()).unwrap_err().to_string();
        assert!(text.contains("0.17.safetensors"), "{text}");
    }
}

#[test]
fn snapshot_without_files_is_refused() {
    let text = Snapshot::open(SnapshotId { index: 0, step: 10 }, &[]).unwrap_err().to_string();
    assert!(text.contains("no file of snapshot 0.10"), "{text}");
}

#[test]
fn tensor_in_two_shards_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = write(dir.path(), 0, 10, &meta(10), 300);
    assert!(files.len() > 2);
    fs::copy(&files[0], &files[1]).unwrap();
    let text = open_all(dir.path()).unwrap_err().to_string();
    assert!(text.contains("is in another shard too") && text.contains("-00002-of-"), "{text}");
}

#[test]
fn lookup_does_not_depend_on_the_hint() {
    for shard_size in [u64::MAX, 300] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, 10, &meta(10), shard_size);
        let snapshot = open_all(dir.path()).unwrap().remove(0);
        let names: Vec<String> = snapshot.tensors().map(|(name, _)| name.to_owned()).collect();
        assert_eq!(names, ["a", "b", "n", "z"]);
        for hint in 0..6 {
            for (i, name) in names.iter().enumerate() {
                let mut place = hint;
                let (tensor, bytes) = snapshot.tensor_near(name, &mut place).unwrap();
                let StoredElements::Whole(bytes) = bytes else { panic!("{name}") };
                assert_eq!((place, tensor.dtype, bytes.len()), (i, specs()[i].dtype, [400, 200, 24, 1400][i]));
            }
            assert!(snapshot.tensor_near("head", &mut { hint }).is_none());
        }
    }
}
