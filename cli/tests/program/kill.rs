//! Trainings and imports that are killed at random moments, over and over: what is on disk is whole at all times, the
//! training goes on from it, and ends where one that nobody disturbed ends, bit for bit.
//!
//! `POSTHOC_EMA_KILLS` sets how many, `POSTHOC_EMA_SEED` which moments.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
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
    command.args(["--exact", &format!("kill::{test}"), "--nocapture"]).env(DIR, dir).env(MODE, mode);
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
        let newest = run.snapshots().iter().map(|snapshot| snapshot.id.step).max().unwrap();
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

/// A command that writes to a path in a directory, from a source that it leaves alone.
struct Job {
    arguments: Vec<String>,
    target: PathBuf,
}

impl Job {
    fn start(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
        command.args(&self.arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The bytes of what it writes, but for the id of a run, which is drawn; none where there is nothing.
    fn written(&self) -> Option<BTreeMap<String, Vec<u8>>> {
        match fs::read_dir(&self.target) {
            Ok(_) => Some(result(&self.target)),
            Err(_) => Some(BTreeMap::from([("file".to_owned(), fs::read(&self.target).ok()?)])),
        }
    }

    /// The names beside what it writes.
    fn beside(&self) -> Vec<String> {
        let names = fs::read_dir(self.target.parent().unwrap()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| Some(name.as_str()) != self.target.file_name().unwrap().to_str()).collect()
    }

    fn remove(&self) {
        let _ = fs::remove_file(&self.target).or_else(|_| fs::remove_dir_all(&self.target));
    }
}

/// An import, an average of checkpoints and a synthesis, each into a directory of its own.
fn jobs(temp: &Path) -> Vec<Job> {
    let foreign = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/foreign/ramp");
    let run = temp.join("source");
    let options = PostHocEma::options(&run).update_every(1).update_after_step(0).checkpoint_every(5);
    let mut ema = options.create(&large(0)).unwrap();
    for step in 1..=20 {
        ema.update(&large(step)).unwrap();
    }
    ema.finish().unwrap();
    let checkpoints = temp.join("checkpoints");
    fs::create_dir(&checkpoints).unwrap();
    for step in [5, 10, 15, 20] {
        let bytes: Vec<u8> = large(step)[0].1.iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = safetensors::tensor::TensorView::new(Dtype::F32, vec![1_000_000], &bytes).unwrap();
        let path = checkpoints.join(format!("step{step}.safetensors"));
        safetensors::serialize_to_file([("weight", tensor)], None, &path).unwrap();
    }
    let target = |name: &str| {
        let dir = temp.join(format!("{name}-output"));
        fs::create_dir(&dir).unwrap();
        dir.join(name)
    };
    let job = |arguments: &[&str], target: PathBuf| {
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        Job { arguments: arguments.chain([target.to_str().unwrap().to_owned()]).collect(), target }
    };
    let [foreign, run, checkpoints] = [&foreign, &run, &checkpoints].map(|path| path.to_str().unwrap());
    let sigmas = "--sigma-rels=0.05,0.28";
    vec![
        job(&["import", foreign, "--from=pytorch-posthoc-ema", sigmas, "--update-every=10"], target("run")),
        job(&["synthesize", run, "--sigma-rel=0.15", "-o"], target("synthesis.safetensors")),
        job(&["average", checkpoints, "--uniform=15", "-o"], target("average.safetensors")),
    ]
}

/// A million parameters.
fn large(step: u64) -> Vec<(&'static str, Vec<f32>)> {
    vec![("weight", (0..1_000_000).map(|i| ((step * 7 + i * 13) as f32).sin()).collect())]
}

#[test]
fn what_a_killed_command_writes_is_whole_or_not_there() {
    let temp = tempfile::tempdir().unwrap();
    let mut random = random();
    for job in jobs(temp.path()) {
        let begun = Instant::now();
        assert!(kill(job.start(), Duration::from_secs(600)));
        let long = begun.elapsed();
        let expected = job.written().unwrap();
        let (mut killed, mut ended) = (0, 0);
        while killed < kills(40) || ended == 0 {
            job.remove();
            let done = kill(job.start(), random.random_range(Duration::ZERO..long.mul_f64(1.1)));
            match job.written() {
                Some(written) => assert!(written == expected, "{:?}", job.arguments),
                None => assert!(!done, "{:?}", job.arguments),
            }
            // What it left is gone when the next one begins.
            let beside = job.beside();
            assert!(beside.len() <= usize::from(!done) && beside.iter().all(|name| name.starts_with(".posthoc-ema-")));
            (killed, ended) = (killed + usize::from(!done), ended + usize::from(done));
        }
        println!("{}: {killed} kills, {ended} ended", job.arguments[0]);
    }
}

#[test]
fn a_command_that_is_told_to_end_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    for job in jobs(temp.path()) {
        let mut ended_early = 0;
        for (round, signal) in
            [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().cycle().enumerate().take(300)
        {
            job.remove();
            let mut child = job.start();
            // As soon as there is something to clear up.
            while job.beside().is_empty() && child.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            send(Pid::from_raw(child.id() as i32), signal).unwrap_or_default();
            let status = child.wait().unwrap();
            assert_eq!(job.beside(), Vec::<String>::new(), "{signal}, {:?}", job.arguments);
            let by_signal = std::os::unix::process::ExitStatusExt::signal(&status) == Some(signal as i32);
            assert!(status.success() || by_signal, "{status}");
            ended_early += usize::from(by_signal);
            if ended_early >= 6 && round >= 9 {
                break;
            }
        }
        assert!(ended_early > 0, "{:?} was always faster", job.arguments);
    }
}
