//! Tests of sets: snapshots whose tensors are in parts, one file for each process.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::Dtype;

use super::*;
use crate::error::Result;
use crate::tensor::TensorSpec;

/// Part of a process: name, dtype, shape of the whole, offset, and shape of the part.
type PartOf<'a> = (&'a str, Dtype, &'a [usize], &'a [usize], &'a [usize]);

const ID: SnapshotId = SnapshotId { index: 0, step: 10 };

/// Parts of three processes: rows, columns, a list, a tensor of one process, and a process without elements of `rows`.
const SET: &[&[PartOf<'_>]] = &[
    &[
        ("columns", Dtype::F32, &[3, 5], &[0, 0], &[3, 2]),
        ("list", Dtype::F32, &[3, 3, 3], &[0], &[10]),
        ("rows", Dtype::F32, &[5, 7], &[0, 0], &[3, 7]),
    ],
    &[
        ("columns", Dtype::F32, &[3, 5], &[0, 2], &[3, 3]),
        ("list", Dtype::F32, &[3, 3, 3], &[10], &[17]),
        ("one", Dtype::I64, &[], &[], &[]),
        ("rows", Dtype::F32, &[5, 7], &[3, 0], &[2, 7]),
    ],
    &[("list", Dtype::F32, &[3, 3, 3], &[27], &[0]), ("rows", Dtype::F32, &[5, 7], &[5, 0], &[0, 7])],
];

fn meta() -> Meta {
    Meta {
        profile: "{}".into(),
        step: 10,
        history: Some("[[1,10,1]]".into()),
        run: Some("r".into()),
        session: Some(Session { number: 1, id: "s".into(), from: 0 }),
        ..Meta::default()
    }
}

/// Returns the indices in a tensor of the elements of a part.
fn indices(&(_, _, global, offset, shape): &PartOf<'_>) -> Vec<usize> {
    let grid = if offset.len() == global.len() { global.to_vec() } else { vec![global.iter().product()] };
    let mut indices = vec![0];
    for d in 0..grid.len() {
        let (extent, first) = (grid[d], offset[d]);
        indices = indices.iter().flat_map(|i| (0..shape[d]).map(move |j| i * extent + first + j)).collect();
    }
    indices
}

/// Writes the file of one process. Element `i` of a tensor is the number `i`.
fn write_file(path: &Path, parts: &[PartOf<'_>], meta: &Meta) {
    let spec = |&(name, dtype, _, _, shape): &PartOf<'_>| TensorSpec { name: name.into(), dtype, shape: shape.into() };
    let place = |&(_, _, global, offset, _): &PartOf<'_>| PartPlace { global: global.into(), offset: offset.into() };
    let bytes = |part: &PartOf<'_>| -> Vec<u8> {
        let element = |i: usize| match part.1 {
            Dtype::F32 => (i as f32).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(i as f32).to_le_bytes().to_vec(),
            _ => (i as u64).to_le_bytes().to_vec(),
        };
        indices(part).into_iter().flat_map(element).collect()
    };
    let contents: Vec<Vec<u8>> = parts.iter().map(bytes).collect();
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| dst.copy_from_slice(&contents[i][range]);
    let places: Vec<PartPlace> = parts.iter().map(place).collect();
    write_part(path, parts.iter().map(spec).collect(), &places, meta.to_strings(), &fill).unwrap();
}

fn write_set(dir: &Path, id: SnapshotId, set: &[&[PartOf<'_>]], meta: &Meta) -> Vec<PathBuf> {
    let paths: Vec<PathBuf> = (1..=set.len()).map(|i| dir.join(id.part_name(i, set.len()))).collect();
    set.iter().zip(&paths).for_each(|(parts, path)| write_file(path, parts, meta));
    paths
}

fn floats(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn check_contents(snapshot: &Snapshot) {
    let tensors: Vec<(&str, &[usize])> =
        snapshot.tensors().map(|(name, tensor)| (name, tensor.shape.as_slice())).collect();
    assert_eq!(tensors, [("columns", &[3, 5][..]), ("list", &[3, 3, 3]), ("one", &[]), ("rows", &[5, 7])]);
    for (name, count) in [("columns", 15), ("list", 27), ("rows", 35)] {
        let (tensor, bytes) = snapshot.tensor(name).unwrap();
        assert_eq!((tensor.dtype, &*bytes), (Dtype::F32, &floats(count)[..]), "{name}");
    }
    assert_eq!(&*snapshot.tensor("one").unwrap().1, [0; 8]);
}

#[test]
fn set_of_parts_is_one_model() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path(), ID, SET, &meta());
    let later = SnapshotId { step: 20, ..ID };
    write_set(dir.path(), later, SET, &Meta { step: 20, history: Some("[[1,20,1]]".into()), ..meta() });
    for is_mapped in [true, false] {
        let listed = list(dir.path()).unwrap();
        assert_eq!(listed.keys().copied().collect::<Vec<_>>(), [ID, later]);
        let first = Snapshot::open_like(ID, &listed[&ID], None, is_mapped).unwrap();
        let second = Snapshot::open_like(later, &listed[&later], Some(&first), is_mapped).unwrap();
        assert!(second.shares_tensors(&first) && second.meta.step == 20);
        for snapshot in [&first, &second] {
            check_contents(snapshot);
            snapshot.files().iter().for_each(|file| file.verify().unwrap());
            snapshot.verify_index().unwrap();
        }
    }
}

#[test]
fn unsharded_and_differently_cut_snapshots_are_of_one_run() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path(), ID, SET, &meta());
    let whole: Vec<PartOf<'_>> = vec![
        ("columns", Dtype::F32, &[3, 5], &[0, 0], &[3, 5]),
        ("list", Dtype::F32, &[3, 3, 3], &[0, 0, 0], &[3, 3, 3]),
        ("one", Dtype::I64, &[], &[], &[]),
        ("rows", Dtype::F32, &[5, 7], &[0, 0], &[5, 7]),
    ];
    let meta_at = |step| Meta { step, history: Some(format!("[[1,{step},1]]")), ..meta() };
    write_set(dir.path(), SnapshotId { step: 20, ..ID }, &[&whole], &meta_at(20));
    let specs = whole.iter().map(|part| TensorSpec { name: part.0.into(), dtype: part.1, shape: part.4.into() });
    let fill = |i: usize, range: Range<usize>, dst: &mut [u8]| {
        let bytes = if i == 2 { vec![0; 8] } else { floats(whole[i].4.iter().product()) };
        dst.copy_from_slice(&bytes[range]);
    };
    let id = SnapshotId { step: 30, ..ID };
    write_snapshot(dir.path(), id, specs.collect(), &meta_at(30), u64::MAX, &fill).unwrap();
    let snapshots = open_all(dir.path()).unwrap();
    assert_eq!(snapshots.iter().map(|snapshot| snapshot.files().len()).collect::<Vec<_>>(), [3, 1, 1]);
    snapshots.iter().for_each(check_contents);
}

#[test]
fn regions_are_cut_from_any_tiling() {
    let dir = tempfile::tempdir().unwrap();
    let set = TensorSet::open(&write_set(dir.path(), ID, SET, &meta()), None, true).unwrap();
    let cases: &[PartOf<'_>] = &[
        ("rows", Dtype::F32, &[5, 7], &[2, 1], &[3, 5]),
        ("rows", Dtype::F32, &[5, 7], &[9], &[20]),
        ("rows", Dtype::F32, &[5, 7], &[5, 0], &[0, 7]),
        ("columns", Dtype::F32, &[3, 5], &[1, 1], &[2, 3]),
        ("columns", Dtype::F32, &[3, 5], &[3], &[9]),
        ("list", Dtype::F32, &[3, 3, 3], &[0, 1, 1], &[3, 2, 1]),
        ("list", Dtype::F32, &[3, 3, 3], &[4], &[20]),
        ("one", Dtype::I64, &[], &[], &[]),
    ];
    for part @ (name, dtype, global, offset, shape) in cases {
        let place = PartPlace { global: global.to_vec(), offset: offset.to_vec() };
        let region = set.region(name, &place, shape).unwrap().unwrap();
        assert_eq!(region.dtype, *dtype);
        let mut bytes = vec![0xee; region.elements.len()];
        region.elements.copy(&mut bytes, 0);
        let expected: Vec<u8> = indices(part).iter().flat_map(|&i| (i as f32).to_le_bytes()).collect();
        assert_eq!(bytes, if *dtype == Dtype::F32 { expected } else { vec![0; 8] }, "{part:?}");
    }
    let place = |global: &[usize], offset: &[usize]| PartPlace { global: global.into(), offset: offset.into() };
    assert!(set.region("none", &place(&[5, 7], &[0, 0]), &[5, 7]).unwrap().is_none());
    for (place, shape) in [(place(&[5, 8], &[0, 0]), &[5, 7]), (place(&[5, 7], &[1, 0]), &[5, 7])] {
        let text = set.region("rows", &place, shape).unwrap_err().to_string();
        assert!(text.contains("`rows`") && text.contains("not in its shape [5, 7]"), "{text}");
    }
}

#[test]
fn parts_in_different_precisions_are_one_tensor_of_f32() {
    let dir = tempfile::tempdir().unwrap();
    let set: &[&[PartOf<'_>]] =
        &[&[("w", Dtype::F16, &[2, 3], &[0, 0], &[1, 3])], &[("w", Dtype::F32, &[2, 3], &[1, 0], &[1, 3])]];
    let paths: Vec<PathBuf> = (1..=2).map(|i| dir.path().join(ID.part_name(i, 2))).collect();
    write_file(&paths[0], set[0], &meta());
    let model = [("w".into(), Dtype::F16)].into_iter().collect();
    write_file(&paths[1], set[1], &Meta { dtypes: model, ..meta() });
    let snapshot = Snapshot::open(ID, &paths).unwrap();
    let (tensor, bytes) = snapshot.tensor("w").unwrap();
    assert_eq!((tensor.dtype, &*bytes), (Dtype::F32, &floats(6)[..]));
    assert_eq!(snapshot.model_dtype("w", Dtype::F32), Dtype::F16);
    write_file(&paths[1], set[1], &meta());
    let text = Snapshot::open(ID, &paths).unwrap_err().to_string();
    assert!(
        text.contains("the dtype of tensor `w` in the model is F32, but F16") && text.contains("part-00001-of-00002"),
        "{text}"
    );
}

/// Opens a set after changing the parts and the metadata of its second file.
fn open_changed(change: impl FnOnce(&mut Vec<PartOf<'static>>, &mut Meta)) -> Result<Snapshot> {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_set(dir.path(), ID, SET, &meta());
    let (mut parts, mut meta) = (SET[1].to_vec(), meta());
    change(&mut parts, &mut meta);
    write_file(&paths[1], &parts, &meta);
    Snapshot::open(ID, &paths)
}

#[test]
fn parts_that_do_not_tile_are_named() {
    type Change = fn(&mut Vec<PartOf<'static>>);
    let cases: [(&str, Change); 6] = [
        ("tensor `rows`, [3, 7] at [2, 0], overlaps", |parts| {
            parts[3] = ("rows", Dtype::F32, &[5, 7], &[2, 0], &[3, 7])
        }),
        ("tensor `rows` in this file and the others of its set hold 28 of its 35", |parts| {
            parts[3] = ("rows", Dtype::F32, &[5, 7], &[3, 0], &[1, 7]);
        }),
        ("tensor `rows`, [2, 7] at [4, 0], leads out of the shape [5, 7]", |parts| {
            parts[3] = ("rows", Dtype::F32, &[5, 7], &[4, 0], &[2, 7]);
        }),
        ("whole shape of tensor `rows` is [6, 7], but [5, 7]", |parts| {
            parts[3] = ("rows", Dtype::F32, &[6, 7], &[3, 0], &[2, 7]);
        }),
        ("kind of cut of tensor `list`", |parts| parts[1] = ("list", Dtype::F32, &[3, 3, 3], &[1, 0, 0], &[2, 3, 3])),
        ("dtype of tensor `columns` is I64, but F32", |parts| parts[0].1 = Dtype::I64),
    ];
    for (expected, change) in cases {
        let text = open_changed(|parts, _| change(parts)).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("0.10-part-0000"), "{expected}: {text}");
    }
}

#[test]
fn files_of_different_snapshots_are_named() {
    type Change = fn(&mut Meta);
    let cases: [(&str, Change); 6] = [
        ("the run's id is other, but r", |meta| meta.run = Some("other".into())),
        ("the history is [[1,9,1]], but [[1,10,1]]", |meta| meta.history = Some("[[1,9,1]]".into())),
        ("the writing session is 2", |meta| meta.session = Some(Session { number: 2, id: "t".into(), from: 0 })),
        ("the profile is []", |meta| meta.profile = "[]".into()),
        ("the name says step 10, but the file holds step 11", |meta| meta.step = 11),
        ("the treatment of tensor `rows` is averaged, but copied", |_| {}),
    ];
    for (expected, change) in cases {
        let dir = tempfile::tempdir().unwrap();
        let is_last = expected.contains("treatment");
        let base = Meta { copied: is_last.then(|| "rows".into()).into_iter().collect(), ..meta() };
        let paths = write_set(dir.path(), ID, SET, &base);
        let mut changed = meta();
        change(&mut changed);
        write_file(&paths[1], SET[1], &changed);
        let text = Snapshot::open(ID, &paths).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("0.10-part-00002-of-00003"), "{expected}: {text}");
        // A sibling with the same tensors does not hide it.
        let other = tempfile::tempdir().unwrap();
        let sibling = Snapshot::open(ID, &write_set(other.path(), ID, SET, &base)).unwrap();
        let text = Snapshot::open_like(ID, &paths, Some(&sibling), false).unwrap_err().to_string();
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn tensors_without_a_place_are_refused() {
    for (key, expected) in [("DCP_SHARDING_INFO", "lack `DCP_SHARDING_INFO`"), ("saved_offsets", "cannot be parsed")] {
        let dir = tempfile::tempdir().unwrap();
        let paths = write_set(dir.path(), ID, SET, &meta());
        let mut bytes = fs::read(&paths[1]).unwrap();
        let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
        bytes[at] = b'X';
        checksum::reseal(&mut bytes);
        fs::write(&paths[1], bytes).unwrap();
        let text = Snapshot::open(ID, &paths).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("part-00002"), "{text}");
    }
}

#[test]
fn only_complete_sets_are_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path(), ID, SET, &meta());
    let later = SnapshotId { step: 20, ..ID };
    let paths = write_set(dir.path(), later, SET, &Meta { step: 20, ..meta() });
    fs::remove_file(&paths[1]).unwrap();
    // Another number of processes was interrupted at the first step.
    fs::copy(&paths[0], dir.path().join(ID.part_name(2, 4))).unwrap();
    let states = [state_part_name(20, 1, 2), state_part_name(10, 1, 1)];
    states.iter().for_each(|name| assert!(fs::copy(&paths[0], dir.path().join(name)).unwrap() > 0));
    assert_eq!(list(dir.path()).unwrap().into_keys().collect::<Vec<_>>(), [ID]);
    check_contents(&open_all(dir.path()).unwrap()[0]);
    remove_leftovers(dir.path()).unwrap();
    let left: BTreeMap<SnapshotId, usize> =
        list(dir.path()).unwrap().into_iter().map(|(id, files)| (id, files.len())).collect();
    assert_eq!((left.len(), left[&ID], fs::read_dir(dir.path()).unwrap().count()), (1, 3, 4));
    let exists = check_empty(dir.path()).unwrap_err().to_string();
    assert!(exists.contains("0.10-part-00001-of-00003"), "{exists}");
    write_set(dir.path(), ID, &SET[..2], &meta());
    let text = open_all(dir.path()).unwrap_err().to_string();
    assert!(text.contains("exists twice") && text.contains("0.10-part"), "{text}");
}

#[test]
fn file_that_changed_after_its_header_was_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = write_set(dir.path(), ID, SET, &meta());
    let snapshot = Snapshot::open_like(ID, &paths, None, false).unwrap();
    let length = fs::metadata(&paths[1]).unwrap().len();
    fs::File::options().write(true).open(&paths[1]).unwrap().set_len(length - 1).unwrap();
    let text = snapshot.set().map_files().unwrap_err().to_string();
    assert!(text.contains("part-00002-of-00003") && text.contains("when it was opened"), "{text}");
    assert!(snapshot.tensor("rows").is_none());
    fs::remove_file(&paths[1]).unwrap();
    assert!(snapshot.set().map_files().unwrap_err().to_string().contains("part-00002-of-00003"));
}
