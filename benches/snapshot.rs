//! Measures a checkpoint of 200 MB, each time beside its limit.
//!
//! * The time that the training waits, beside a copy of the averages.
//! * The time until everything is on disk, beside a plain write and sync of as many bytes that replace a file of the
//!   same size in the same folder.

mod limits;

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use posthoc_ema::snapshot::{STATE_FILE, StoredFile};
use posthoc_ema::{PostHocEma, Profile, Retention, Run, UpdateOutcome};

/// Two compensated averages take 12 bytes each in the live state, and 8 in the snapshots.
const PARAMETERS: usize = 10_000_000;
const COPIED: usize = 12 * PARAMETERS;
const WRITTEN: usize = 20 * PARAMETERS;

/// Block size of a plain write, as with `dd bs=4M conv=fsync`.
const PLAIN: usize = 4 << 20;

const TURNS: usize = 15;

type Model = Vec<(String, Vec<f32>)>;

fn model() -> Model {
    let value = |i: usize| (i % 8191) as f32 / 4096.0 - 1.0;
    let tensor = |t: usize| (format!("{t}"), (0..PARAMETERS / 100).map(|i| value(t * 1009 + i)).collect());
    (0..100).map(tensor).collect()
}

/// Creates a tracker with a checkpoint at every second update.
fn tracker(dir: &Path, model: &Model) -> PostHocEma {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(2).max_checkpoints(1);
    options.retention(Retention::Latest).create(model).unwrap()
}

fn timed(act: impl FnOnce()) -> f64 {
    let start = Instant::now();
    act();
    start.elapsed().as_secs_f64()
}

/// Returns the seconds that a checkpoint holds the caller beyond the update, and the seconds until all is on disk.
fn checkpoint(ema: &mut PostHocEma, model: &Model) -> (f64, f64) {
    let update = timed(|| assert_eq!(ema.update(model).unwrap(), UpdateOutcome::Updated));
    let start = Instant::now();
    let called = timed(|| assert_eq!(ema.update(model).unwrap(), UpdateOutcome::Stored));
    ema.flush().unwrap();
    (called - update, start.elapsed().as_secs_f64() - update)
}

/// Writes a file beside the last one and renames it into place, as a checkpoint replaces the one before.
fn plain_write(path: &Path, bytes: &[u8]) {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside).unwrap();
    bytes.chunks(PLAIN).for_each(|chunk| file.write_all(chunk).unwrap());
    file.sync_all().unwrap();
    std::fs::rename(&beside, path).unwrap();
}

/// Checks that the files hold the model: the average of a constant is the constant.
fn check(dir: &Path, model: &Model) {
    let run = Run::open(dir).unwrap();
    assert_eq!(run.snapshots().len(), 2);
    for snapshot in run.snapshots() {
        snapshot.files().iter().for_each(|file| file.verify().unwrap());
        for (name, values) in model {
            assert!(snapshot.tensor(name).unwrap().1 == bytemuck::cast_slice::<f32, u8>(values), "{name}");
        }
    }
    StoredFile::open(&dir.join(STATE_FILE)).unwrap().verify().unwrap();
    let resumed = PostHocEma::options(dir).resume(model).unwrap();
    let average = resumed.synthesize(Profile::sigma_rel(0.1).unwrap()).unwrap();
    assert!(model.iter().all(|(name, values)| average.get(name).unwrap().to_vec::<f32>().as_ref() == Some(values)));
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Measures checkpoints and their limits in turns, because a disk's speed varies over time.
fn beside_limits(ema: &mut PostHocEma, model: &Model, scratch: &Path) {
    let bytes: Vec<u8> = (0..WRITTEN).map(|i| (i % 251) as u8).collect();
    let src = vec![1f32; COPIED / size_of::<f32>()];
    let mut dst = vec![0f32; src.len()];
    let [mut held, mut written, mut copy, mut fresh, mut write] = [const { Vec::new() }; 5];
    plain_write(scratch, &bytes);
    for _ in 0..TURNS {
        let (called, stored) = checkpoint(ema, model);
        held.push(called);
        written.push(stored);
        copy.push(timed(|| posthoc_ema::compute::cpu::limits::copy(&mut dst, &src)));
        fresh.push(timed(|| drop(black_box(src.clone()))));
        write.push(timed(|| plain_write(scratch, &bytes)));
    }
    let milliseconds = |times: Vec<f64>| 1e3 * median(times);
    println!(
        "held up: {:.0} ms; a copy of as many bytes: {:.0} ms with all threads, {:.0} ms into fresh memory with one",
        milliseconds(held),
        milliseconds(copy),
        milliseconds(fresh)
    );
    let limit = WRITTEN as f64 / median(write);
    limits::report(
        "until all is on disk",
        WRITTEN,
        median(written),
        limit,
        "a plain write and sync in place of the last",
    );
}

fn benchmark(criterion: &mut Criterion) {
    let temp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (dir, model) = (temp.path().join("run"), model());
    let mut ema = tracker(&dir, &model);
    checkpoint(&mut ema, &model);
    beside_limits(&mut ema, &model, &temp.path().join("plain"));
    let mut group = criterion.benchmark_group("snapshot");
    group.sample_size(10);
    let mut measure = |name: &str, bytes: usize, part: fn((f64, f64)) -> f64| {
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |bench| {
            bench.iter_custom(|rounds| {
                Duration::from_secs_f64((0..rounds).map(|_| part(checkpoint(&mut ema, &model))).sum::<f64>().max(0.0))
            });
        });
    };
    measure("held up", COPIED, |(held, _)| held);
    measure("until all is on disk", WRITTEN, |(_, written)| written);
    group.finish();
    drop(ema);
    check(&dir, &model);
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
