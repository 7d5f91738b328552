//! Tests of runs whose snapshots are sets of parts, beside the same runs in one file for each snapshot.

use std::fs;

use super::*;
use crate::planning::Plan;
use crate::run::verify;
use crate::snapshot::{Meta, PartPlace, Snapshot, SnapshotId, write_part};
use crate::tensor::TensorSpec;

/// Tensors with odd dimensions, one that is copied, and a scalar.
const SHAPES: &[(&str, &[usize])] = &[("cube", &[3, 5, 7]), ("matrix", &[11, 13]), ("scalar", &[]), ("vector", &[17])];

fn model(step: usize) -> Tensors {
    let values = |shape: &[usize], seed: usize| -> Vec<f32> {
        let count: usize = shape.iter().product();
        (0..count).map(|i| ((step * 7 + i * 13 + seed) as f32).sin() + i as f32 * 1e-3).collect()
    };
    let floats = SHAPES.iter().enumerate();
    let floats = floats.map(|(i, (name, shape))| ((*name).to_owned(), Tensor::new(shape, &values(shape, i)).unwrap()));
    let count = Tensor::new(&[3, 3], &(0..9).map(|i| (step + i) as i64).collect::<Vec<_>>()).unwrap();
    floats.chain([("count".to_owned(), count)]).collect()
}

/// Trains a run with a snapshot every 10 steps.
fn train(dir: &Path, change: impl FnOnce(Options) -> Options) {
    let options = PostHocEma::options(dir).sigma_rels([0.05, 0.28]).checkpoint_every(10).snapshot_growth(None);
    let mut ema = change(options).create(&model(0)).unwrap();
    for step in 0..60 {
        ema.update(&model(step)).unwrap();
    }
    ema.finish().unwrap();
}

/// Division of the tensors among processes.
#[derive(Clone, Copy, Debug)]
enum Division {
    Rows,
    Columns,
    /// Ranges of the flattened tensors.
    Lists,
    /// Rectangles of two processes along the first dimension and all others along the last.
    Grid,
}

/// Returns where the part of process `rank` of `ranks` begins, and its extent.
fn share(extent: usize, rank: usize, ranks: usize) -> (usize, usize) {
    let each = extent.div_ceil(ranks);
    let start = extent.min(rank * each);
    (start, extent.min(start + each) - start)
}

/// Returns offset and shape of the part of a process; `None` if it stores none.
fn part(shape: &[usize], cut: Division, rank: usize, ranks: usize) -> Option<(Vec<usize>, Vec<usize>)> {
    let (mut offset, mut extents) = (vec![0; shape.len()], shape.to_vec());
    let Some(last) = shape.len().checked_sub(1) else { return (rank == 0).then_some((offset, extents)) };
    match cut {
        Division::Lists if shape.len() != 1 => {
            let (start, extent) = share(shape.iter().product(), rank, ranks);
            return Some((vec![start], vec![extent]));
        }
        Division::Rows => (offset[0], extents[0]) = share(shape[0], rank, ranks),
        Division::Columns | Division::Lists => (offset[last], extents[last]) = share(shape[last], rank, ranks),
        Division::Grid if last == 0 => (offset[0], extents[0]) = share(shape[0], rank, ranks),
        Division::Grid => {
            (offset[0], extents[0]) = share(shape[0], rank % 2, 2);
            (offset[last], extents[last]) = share(shape[last], rank / 2, ranks / 2);
        }
    }
    Some((offset, extents))
}

/// Returns the elements of a part, by a walk over all of them.
fn elements_of(bytes: &[u8], size: usize, shape: &[usize], offset: &[usize], extents: &[usize]) -> Vec<u8> {
    let grid = if offset.len() == shape.len() { shape.to_vec() } else { vec![shape.iter().product()] };
    let mut indices = vec![0];
    for d in 0..grid.len() {
        let (extent, first) = (grid[d], offset[d]);
        indices = indices.iter().flat_map(|i| (0..extents[d]).map(move |j| i * extent + first + j)).collect();
    }
    indices.into_iter().flat_map(|i: usize| bytes[i * size..(i + 1) * size].to_vec()).collect()
}

/// Writes a snapshot again as the set of files of some processes, and returns their paths.
fn write_set(dir: &Path, snapshot: &Snapshot, cut: Division, ranks: usize) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for rank in 0..ranks {
        let (mut specs, mut places, mut contents) = (Vec::new(), Vec::new(), Vec::new());
        for (name, stored) in snapshot.tensors() {
            let Some((offset, extents)) = part(&stored.shape, cut, rank, ranks) else { continue };
            let (_, bytes) = snapshot.tensor(name).unwrap();
            contents.push(elements_of(&bytes, stored.dtype.bitsize() / 8, &stored.shape, &offset, &extents));
            specs.push(TensorSpec { name: name.to_owned(), dtype: stored.dtype, shape: extents });
            places.push(PartPlace { global: stored.shape.clone(), offset });
        }
        let mut meta: Meta = snapshot.meta.clone();
        meta.dtypes.retain(|name, _| specs.iter().any(|spec| spec.name == *name));
        let path = dir.join(snapshot.id.part_name(rank + 1, ranks));
        let fill = |i: usize, range: std::ops::Range<usize>, dst: &mut [u8]| dst.copy_from_slice(&contents[i][range]);
        write_part(&path, specs, &places, meta.to_strings(), &fill).unwrap();
        paths.push(path);
    }
    paths
}

/// Writes a run again in parts, snapshot `i` as `cuts[i % n]` says; `None` leaves it in one file.
fn write_again(from: &Path, to: &Path, cuts: &[Option<(Division, usize)>]) {
    fs::create_dir(to).unwrap();
    for (i, snapshot) in Run::open(from).unwrap().snapshots().iter().enumerate() {
        match cuts[i % cuts.len()] {
            Some((cut, ranks)) => drop(write_set(to, snapshot, cut, ranks)),
            None => assert!(fs::copy(snapshot.path(), to.join(snapshot.id.file_name())).unwrap() > 0),
        }
    }
    fs::copy(from.join("state.safetensors"), to.join("state.safetensors")).unwrap();
}

fn targets() -> Vec<Profile> {
    [0.05, 0.15, 0.25].map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap()).to_vec()
}

/// Returns the bytes of the files that a synthesis of all targets writes.
fn written(run: &Run, plans: &[Plan]) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..plans.len()).map(|i| dir.path().join(format!("{i}.safetensors"))).collect();
    let outputs: Vec<Output<'_>> = plans.iter().zip(&paths).map(|(plan, path)| Output { plan, path }).collect();
    run.write_all(&outputs, &WriteOptions::default()).unwrap();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn sharded_run_gives_the_bits_of_an_unsharded_one() {
    let cuts: &[&[Option<(Division, usize)>]] = &[
        &[Some((Division::Rows, 3))],
        &[Some((Division::Columns, 2))],
        &[Some((Division::Lists, 4))],
        &[Some((Division::Grid, 6))],
        &[
            Some((Division::Rows, 2)),
            None,
            Some((Division::Columns, 5)),
            Some((Division::Lists, 3)),
            Some((Division::Rows, 1)),
        ],
    ];
    for dtype in [Dtype::F16, Dtype::F32] {
        let temp = tempfile::tempdir().unwrap();
        let whole = temp.path().join("whole");
        train(&whole, |options| options.checkpoint_dtype(dtype));
        let expected = Run::open(&whole).unwrap();
        let plans = expected.plans(&targets(), At::Latest).unwrap();
        let files = written(&expected, &plans);
        for (i, cuts) in cuts.iter().enumerate() {
            let dir = temp.path().join(i.to_string());
            write_again(&whole, &dir, cuts);
            let run = Run::open(&dir).unwrap();
            assert_eq!(run.tensors(), expected.tensors());
            let own = run.plans(&targets(), At::Latest).unwrap();
            // Weights and predicted errors: the sampled elements are equal.
            assert_eq!(serde_json::json!(own), serde_json::json!(plans), "{cuts:?}");
            assert!(written(&run, &own) == files, "{cuts:?}");
            assert_eq!(run.load(&own[1]).unwrap(), expected.load(&plans[1]).unwrap(), "{cuts:?}");
            assert_eq!(run.bytes_to_read(&own), expected.bytes_to_read(&plans));
            let report = verify(&dir, &mut |_| ()).unwrap();
            assert!(report.findings.is_empty(), "{:?}", report.findings);
        }
    }
}

/// Makes a run of parts: five files for each of six snapshots of each of two profiles.
fn sharded() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&temp.path().join("whole"), |options| options);
    write_again(&temp.path().join("whole"), &dir, &[Some((Division::Rows, 5))]);
    (temp, dir)
}

#[test]
fn damaged_file_of_a_set_leaves_out_its_snapshot() {
    let (_temp, dir) = sharded();
    let name = "0.40-part-00003-of-00005.safetensors";
    let path = dir.join(name);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    let text = Run::open(&dir).unwrap().verify(&mut |_| ()).unwrap_err().to_string();
    assert!(text.contains(name) && text.contains("checksum"), "{text}");
    let report = verify(&dir, &mut |_| ()).unwrap();
    assert!(report.files == 61 && report.findings.len() == 1, "{report:?}");
    let mut read = 0;
    let (run, damaged) = Run::open_sound(&dir, &mut |bytes| read += bytes).unwrap();
    assert!(damaged.len() == 1 && damaged[0].to_string().contains(name), "{damaged:?}");
    assert!(run.snapshots().len() == 11 && read > 0);
    run.plan(Profile::sigma_rel(0.1).unwrap(), At::Latest).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(Run::open(&dir).unwrap_err().to_string().contains(name));
}

#[test]
fn incomplete_newest_set_is_left_out() {
    let (_temp, dir) = sharded();
    for index in 0..2 {
        fs::remove_file(dir.join(format!("{index}.60-part-00002-of-00005.safetensors"))).unwrap();
    }
    let run = Run::open(&dir).unwrap();
    assert_eq!(run.snapshots().iter().map(|snapshot| snapshot.id.step).max(), Some(50));
    assert_eq!(run.plan(Profile::sigma_rel(0.1).unwrap(), At::Latest).unwrap().at, 50);
}

#[test]
fn file_of_another_snapshot_in_a_set_is_named() {
    let (_temp, dir) = sharded();
    let path = |step: u64, i: usize, n: usize| dir.join(SnapshotId { index: 0, step }.part_name(i, n));
    let whole = fs::read(path(30, 2, 5)).unwrap();
    let other = tempfile::tempdir().unwrap();
    let strange = other.path().join("run");
    train(&other.path().join("whole"), |options| options);
    write_again(&other.path().join("whole"), &strange, &[Some((Division::Rows, 5))]);
    let wide = write_set(other.path(), &Run::open(&strange).unwrap().snapshots()[2], Division::Rows, 4);
    for (source, expected) in [
        (path(20, 2, 5), "the name says step 30, but the file holds step 20"),
        (dir.join("1.30-part-00002-of-00005.safetensors"), "the profile is"),
        (strange.join("0.30-part-00002-of-00005.safetensors"), "the run's id is"),
        (path(30, 3, 5), "overlaps that of"),
        (wide[1].clone(), "of tensor `"),
    ] {
        fs::write(path(30, 2, 5), fs::read(&source).unwrap()).unwrap();
        let text = Run::open(&dir).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("0.30-part-0000"), "{source:?}: {text}");
    }
    fs::write(path(30, 2, 5), whole).unwrap();
    Run::open(&dir).unwrap();
}

/// Prints the times of opening and planning a run of 1,024 processes.
#[test]
#[ignore = "measures time: run it alone, in a release build"]
fn time_of_opening() {
    let temp = tempfile::tempdir().unwrap();
    let whole = temp.path().join("whole");
    train(&whole, |options| options.checkpoint_every(3));
    let many = temp.path().join("many");
    write_again(&whole, &many, &[Some((Division::Rows, 1024))]);
    for _ in 0..7 {
        let start = std::time::Instant::now();
        let run = Run::open(&many).unwrap();
        let opened = start.elapsed();
        run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap();
        let planned = start.elapsed();
        drop(run);
        println!("opened in {opened:?}, planned after {planned:?}, closed after {:?}", start.elapsed());
    }
}

/// Prints the times of a synthesis of parts beside that of the unsharded run.
#[test]
#[ignore = "measures time: run it alone, in a release build"]
fn time_of_synthesis() {
    let temp = tempfile::tempdir().unwrap();
    let dir = |name: &str| temp.path().join(name);
    let options = PostHocEma::options(dir("whole")).sigma_rels([0.05, 0.28]).checkpoint_every(1);
    let large = |step: usize| -> Tensors {
        let values: Vec<f32> = (0..1 << 22).map(|i| (i * 7 + step) as f32 * 1e-6).collect();
        ["a", "b"].map(|name| (name.to_owned(), Tensor::new(&[2048, 2048], &values).unwrap())).into_iter().collect()
    };
    let mut ema = options.snapshot_growth(None).update_every(1).create(&large(0)).unwrap();
    for step in 0..4 {
        ema.update(&large(step)).unwrap();
    }
    ema.finish().unwrap();
    write_again(&dir("whole"), &dir("rows"), &[Some((Division::Rows, 8))]);
    write_again(&dir("whole"), &dir("columns"), &[Some((Division::Columns, 8))]);
    write_again(&dir("whole"), &dir("many"), &[Some((Division::Columns, 64))]);
    let mut best = [f64::INFINITY; 4];
    for _ in 0..15 {
        for (name, best) in ["whole", "rows", "columns", "many"].iter().zip(&mut best) {
            let run = Run::open(dir(name)).unwrap();
            let plan = run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap();
            let start = std::time::Instant::now();
            let tensors = run.load(&plan).unwrap();
            *best = best.min(start.elapsed().as_secs_f64());
            assert_eq!(tensors.iter().len(), 2);
        }
    }
    let [whole, rows, columns, many] = best;
    println!(
        "whole {whole:.4} s, rows {:.0}%, columns of 8 {:.0}%, of 64 {:.0}%",
        100.0 * whole / rows,
        100.0 * whole / columns,
        100.0 * whole / many
    );
}
