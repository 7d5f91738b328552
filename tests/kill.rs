//! Trainings and imports that are killed at random moments, over and over: what is on disk is whole at all times, the
//! training goes on from it, and ends where one that nobody disturbed ends, bit for bit.
//!
//! `POSTHOC_EMA_KILLS` sets how many, `POSTHOC_EMA_SEED` which moments.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use posthoc_ema::snapshot::StoredFile;
use posthoc_ema::{At, Dtype, Error, PostHocEma, Profile, Retention, Run, SavedState, verify};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Where the process that is killed trains.
const DIR: &str = "POSTHOC_EMA_TEST_KILLED";
/// How it trains.
const MODE: &str = "POSTHOC_EMA_TEST_MODE";
/// The steps of a training.
const STEPS: u64 = 150;

/// Every kill in CI takes some milliseconds.
fn kills(default: usize) -> usize {
    std::env::var("POSTHOC_EMA_KILLS").map_or(default, |kills| kills.parse().unwrap())
}

fn random() -> ChaCha8Rng {
    let seed = std::env::var("POSTHOC_EMA_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("POSTHOC_EMA_SEED={seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// The parameters after a step: a function of the step alone, as a training that goes on from its own checkpoint has them.
fn model(step: u64) -> Vec<(&'static str, Vec<f32>)> {
    let value = |i: usize| ((step as usize * 7 + i * 13) as f32).sin() * 0.1 + 1.0;
    vec![("weight", (0..60_000).map(value).collect()), ("bias", (0..10).map(value).collect())]
}

/// What the process that is killed does.
fn train(dir: &Path, mode: &str) {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(5).checkpoint_dtype(Dtype::F16);
    let options = options.retention(Retention::Latest).max_checkpoints(6).shard_size(80_000);
    let options = options.checkpoint_in_background(mode != "waiting");
    let mut ema = options.resume_or_create(&model(0)).unwrap();
    while ema.step() < STEPS {
        ema.update(&model(ema.step())).unwrap();
        if mode == "saving" && ema.step().is_multiple_of(3) {
            ema.save().unwrap();
        }
    }
    ema.finish().unwrap();
}

/// Starts this test's own program once more.
fn start(test: &str, dir: &Path, mode: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(DIR, dir).env(MODE, mode);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for a while and kills; whether it had ended by itself, well.
fn kill(mut child: Child, after: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < after {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{}", said(child));
            return true;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    let ended = child.wait().unwrap();
    assert!(ended.success() || ended.code().is_none(), "{}", said(child));
    ended.success()
}

fn said(child: Child) -> String {
    String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap()
}

/// What a run holds at the end: all of the live state and of the newest snapshots, and an average.
fn result(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let run = Run::open(dir).unwrap();
    let average = run.load(&run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap()).unwrap();
    let mut all: BTreeMap<String, Vec<u8>> =
        average.iter().map(|(name, tensor)| (format!("average {name}"), tensor.bytes.clone())).collect();
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    for path in files {
        let file = StoredFile::open(&path).unwrap();
        let file_name = path.file_name().unwrap().to_str().unwrap().to_owned();
        all.extend(file.tensors().iter().map(|(n, tensor)| (format!("{file_name} {n}"), file.bytes(tensor).to_vec())));
    }
    all
}

/// What must hold at any time. Returns the step of the live state.
fn check(dir: &Path) -> u64 {
    let saved = SavedState::of(dir).unwrap().map_or(0, |saved| saved.step);
    let found = match verify(dir, &mut |_| ()) {
        Err(Error::NoRun { .. }) => return 0,
        found => found.unwrap().findings,
    };
    // A run without a snapshot yet.
    let fine = found.is_empty() || found.iter().all(|finding| matches!(finding, Error::NoRun { .. }));
    assert!(fine, "{found:?}");
    if let Ok(run) = Run::open(dir) {
        let newest = run.snapshots().iter().map(|snapshot| snapshot.stem.step).max().unwrap();
        assert!(newest <= saved, "a snapshot of step {newest}, a state of {saved}");
        run.load(&run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap()).unwrap();
    }
    saved
}

#[test]
fn a_training_that_is_killed_ends_where_an_undisturbed_one_ends() {
    if let (Some(dir), Ok(mode)) = (std::env::var_os(DIR), std::env::var(MODE)) {
        return train(Path::new(&dir), &mode);
    }
    let test = "a_training_that_is_killed_ends_where_an_undisturbed_one_ends";
    let temp = tempfile::tempdir().unwrap();
    let straight = temp.path().join("straight");
    train(&straight, "background");
    let expected = result(&straight);
    let (mut random, total) = (random(), kills(150));
    let (mut killed, mut ended, mut round) = (0, 0, 0);
    while killed < total || ended == 0 {
        let dir = temp.path().join(format!("run{round}"));
        let mode = ["background", "waiting", "saving"][round % 3];
        round += 1;
        let mut saved = 0;
        loop {
            // Some are killed as they begin.
            let most = if random.random_bool(0.2) { 4_000 } else { 60_000 };
            let after = Duration::from_micros(random.random_range(0..most));
            let done = kill(start(test, &dir, mode), after);
            let now = check(&dir);
            assert!(now >= saved, "the state went back from {saved} to {now}");
            saved = now;
            if done {
                break;
            }
            killed += 1;
        }
        ended += 1;
        assert!(result(&dir) == expected, "another result, mode {mode}");
        assert!(
            fs::read_dir(&dir).unwrap().all(|entry| !entry.unwrap().file_name().to_str().unwrap().starts_with(".post"))
        );
        fs::remove_dir_all(&dir).unwrap();
    }
    println!("{killed} kills, {ended} trainings");
}
