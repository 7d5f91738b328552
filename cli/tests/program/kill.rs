//! Trainings and commands that are killed at random moments.
//!
//! Files are always complete, and a resumed training ends with the bits of an undisturbed one.
//!
//! `POSTHOC_EMA_KILLS` sets the number of kills, `POSTHOC_EMA_SEED` the moments.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use posthoc_ema::snapshot::StoredFile;
use posthoc_ema::{At, Dtype, Error, Options, PostHocEma, Profile, Retention, Run, SavedState, verify};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Variable with the run directory of a training process.
const DIR: &str = "POSTHOC_EMA_TEST_KILLED";
/// Variable with the mode of a training process.
const MODE: &str = "POSTHOC_EMA_TEST_MODE";
/// Steps of a training.
const STEPS: u64 = 150;

/// Returns the number of kills.
pub fn kills(default: usize) -> usize {
    std::env::var("POSTHOC_EMA_KILLS").map_or(default, |kills| kills.parse().unwrap())
}

pub fn random() -> ChaCha8Rng {
    let seed = std::env::var("POSTHOC_EMA_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("POSTHOC_EMA_SEED={seed}");
    ChaCha8Rng::seed_from_u64(seed)
}

/// Returns the parameters after a step. They depend on the step alone, so that a resumed training repeats them.
fn model(step: u64) -> Vec<(&'static str, Vec<f32>)> {
    let value = |i: usize| ((step as usize * 7 + i * 13) as f32).sin() * 0.1 + 1.0;
    vec![("weight", (0..60_000).map(value).collect()), ("bias", (0..10).map(value).collect())]
}

fn options(dir: &Path) -> Options {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(5).checkpoint_dtype(Dtype::F16);
    options.retention(Retention::Latest).max_checkpoints(6).shard_size(80_000)
}

/// Trains until the end, in the process that is killed.
fn train(dir: &Path, mode: &str) {
    if let Some(seed) = mode.strip_prefix("rewinding") {
        return go_back_and_train(dir, seed.parse().unwrap());
    }
    let options = options(dir).checkpoint_in_background(mode != "waiting");
    let mut ema = options.resume_or_create(&model(0)).unwrap();
    while ema.step() < STEPS {
        ema.update(&model(ema.step())).unwrap();
        if mode == "saving" && ema.step().is_multiple_of(3) {
            ema.save().unwrap();
        }
    }
    ema.finish().unwrap();
}

/// Returns the checkpoints of a training that keeps them itself, up to the newest of its course.
fn checkpoints(kept: &Path) -> Vec<u64> {
    let newest = fs::read_to_string(kept.join("newest")).map_or(0, |step| step.parse().unwrap());
    (1..=newest).filter(|step| kept.join(step.to_string()).exists()).collect()
}

/// Sets the newest checkpoint of a course.
fn set_newest(kept: &Path, step: u64) {
    fs::write(kept.join("new"), step.to_string()).unwrap();
    fs::rename(kept.join("new"), kept.join("newest")).unwrap();
}

/// Goes back to a random checkpoint of the training and trains until the end.
fn go_back_and_train(dir: &Path, seed: u64) {
    let kept = dir.with_extension("checkpoints");
    fs::create_dir_all(&kept).unwrap();
    let whole = checkpoints(&kept);
    // Two of three processes go on from the newest one, so that the training gets on.
    let place = ChaCha8Rng::seed_from_u64(seed).random_range(0..whole.len().max(1));
    let place = if seed.is_multiple_of(3) { place } else { whole.len().saturating_sub(1) };
    let from = whole.get(place).copied().unwrap_or(0);
    set_newest(&kept, from);
    if from == 0 && dir.exists() {
        // One rename, so that a kill leaves no part of a run.
        let gone = dir.with_extension(format!("gone{seed}"));
        fs::rename(dir, &gone).unwrap();
        fs::remove_dir_all(gone).unwrap();
    }
    let options = options(dir).checkpoint_in_background(seed.is_multiple_of(2));
    let mut ema = match from {
        0 => options.create(&model(0)).unwrap(),
        from => options.resume_from(kept.join(from.to_string()), &model(0)).unwrap(),
    };
    ema.check_step(from).unwrap();
    while ema.step() < STEPS {
        ema.update(&model(ema.step())).unwrap();
        if ema.step().is_multiple_of(7) {
            ema.save_to(kept.join(ema.step().to_string())).unwrap();
            set_newest(&kept, ema.step());
        }
    }
    ema.finish().unwrap();
}

/// Starts this test binary as a training process.
fn start(test: &str, dir: &Path, mode: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("kill::{test}"), "--nocapture"]).env(DIR, dir).env(MODE, mode);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits, then kills the process. Returns true if it had succeeded before.
pub fn kill(mut child: Child, after: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < after {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{}", stderr(child));
            return true;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    let ended = child.wait().unwrap();
    assert!(ended.success() || ended.code().is_none(), "{}", stderr(child));
    ended.success()
}

fn stderr(child: Child) -> String {
    String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap()
}

/// Returns the bytes of all files of a run and of an average.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
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

/// Checks that a run is sound, and returns the step of its live state.
fn check(dir: &Path) -> u64 {
    let saved = SavedState::of(dir).unwrap().map_or(0, |saved| saved.step);
    let found = match verify(dir, &mut |_| ()) {
        Err(Error::NoRun { .. }) => return 0,
        found => found.unwrap().findings,
    };
    // A run may have no snapshot yet.
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
fn resume_after_kills_keeps_bits() {
    if let (Some(dir), Ok(mode)) = (std::env::var_os(DIR), std::env::var(MODE)) {
        return train(Path::new(&dir), &mode);
    }
    let test = "resume_after_kills_keeps_bits";
    let temp = tempfile::tempdir().unwrap();
    let straight = temp.path().join("straight");
    train(&straight, "background");
    let expected = contents(&straight);
    let mut random = random();
    let total = kills(150);
    let mut killed = 0;
    let mut ended = 0;
    let mut round = 0;
    while killed < total || ended == 0 {
        let dir = temp.path().join(format!("run{round}"));
        let mode = ["background", "waiting", "saving"][round % 3];
        round += 1;
        let mut saved = 0;
        loop {
            // A fifth of the kills is right after the start.
            let most = if random.random_bool(0.2) { 4_000 } else { 60_000 };
            let after = Duration::from_micros(random.random_range(0..most));
            let done = kill(start(test, &dir, mode), after);
            let now = check(&dir);
            assert!(now >= saved, "the state went back from step {saved} to {now}");
            saved = now;
            if done {
                break;
            }
            killed += 1;
        }
        ended += 1;
        assert!(contents(&dir) == expected, "the bits differ in mode {mode}");
        assert!(
            fs::read_dir(&dir).unwrap().all(|entry| !entry.unwrap().file_name().to_str().unwrap().starts_with(".post"))
        );
        fs::remove_dir_all(&dir).unwrap();
    }
    println!("{killed} kills, {ended} trainings");
}

/// Each process goes back to a random checkpoint of those before it, and is killed.
#[test]
fn rewinds_between_kills_keep_bits() {
    if let (Some(dir), Ok(mode)) = (std::env::var_os(DIR), std::env::var(MODE)) {
        return train(Path::new(&dir), &mode);
    }
    let temp = tempfile::tempdir().unwrap();
    let straight = temp.path().join("straight");
    train(&straight, "background");
    let expected = contents(&straight);
    let mut random = random();
    let dir = temp.path().join("run");
    let (mut killed, mut went_back, mut ended) = (0, 0, 0);
    let total = kills(60);
    while killed < total || ended == 0 {
        // A slow machine gets more time.
        let longest = 80_000u64 << (killed / total.max(1)).min(9);
        let mode = format!("rewinding{}", random.random_range(0..1_000_000));
        let before = checkpoints(&dir.with_extension("checkpoints")).last().copied();
        let done = kill(
            start("rewinds_between_kills_keep_bits", &dir, &mode),
            Duration::from_micros(random.random_range(0..longest)),
        );
        let after = checkpoints(&dir.with_extension("checkpoints")).last().copied();
        went_back += usize::from(after < before);
        check(&dir);
        if done {
            assert!(contents(&dir) == expected, "the bits differ after {mode}");
            assert!(!dir.join("aside").exists() && !dir.join(".rewind").exists());
        }
        (killed, ended) = (killed + usize::from(!done), ended + usize::from(done));
    }
    println!("{killed} kills, {went_back} left an older checkpoint, {ended} trainings");
}

/// A command that writes to a path in a directory of its own.
struct Job {
    arguments: Vec<String>,
    target: PathBuf,
}

impl Job {
    fn start(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
        command.args(&self.arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Returns the bytes of the output, without the random id of a run, if there is any.
    fn written(&self) -> Option<BTreeMap<String, Vec<u8>>> {
        match fs::read_dir(&self.target) {
            Ok(_) => Some(contents(&self.target)),
            Err(_) => Some(BTreeMap::from([("file".to_owned(), fs::read(&self.target).ok()?)])),
        }
    }

    /// Returns the names of other files beside the output.
    fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.target.parent().unwrap()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| Some(name.as_str()) != self.target.file_name().unwrap().to_str()).collect()
    }

    fn remove(&self) {
        let _ = fs::remove_file(&self.target).or_else(|_| fs::remove_dir_all(&self.target));
    }
}

/// Returns an import, an average of checkpoints and a synthesis, each into a directory of its own.
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

/// Returns a model of a million parameters.
fn large(step: u64) -> Vec<(&'static str, Vec<f32>)> {
    vec![("weight", (0..1_000_000).map(|i| ((step * 7 + i * 13) as f32).sin()).collect())]
}

#[test]
fn killed_commands_write_all_or_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let mut random = random();
    for job in jobs(temp.path()) {
        let begun = Instant::now();
        assert!(kill(job.start(), Duration::from_secs(600)));
        let long = begun.elapsed();
        let expected = job.written().unwrap();
        let mut killed = 0;
        let mut ended = 0;
        while killed < kills(40) || ended == 0 {
            job.remove();
            let done = kill(job.start(), random.random_range(Duration::ZERO..long.mul_f64(1.1)));
            match job.written() {
                Some(written) => assert!(written == expected, "{:?}", job.arguments),
                None => assert!(!done, "{:?}", job.arguments),
            }
            // The next command removes the temporary file of a killed one.
            let leftovers = job.leftovers();
            assert!(
                leftovers.len() <= usize::from(!done) && leftovers.iter().all(|name| name.starts_with(".posthoc-ema-"))
            );
            (killed, ended) = (killed + usize::from(!done), ended + usize::from(done));
        }
        println!("{}: {killed} kills, {ended} ended", job.arguments[0]);
    }
}

/// A sweep that succeeds after others were killed leaves the best average and the record.
#[test]
fn sweep_after_kills_leaves_nothing_else() {
    let temp = tempfile::tempdir().unwrap();
    let run = temp.path().join("run");
    train(&run, "waiting");
    let mut random = random();
    let (mut killed, mut round) = (0, 0);
    while killed < kills(25) {
        round += 1;
        let out = temp.path().join(format!("sweep{round}"));
        let [run, dir] = [&run, &out].map(|path| path.to_str().unwrap());
        let sigmas = "--sigma-rel=0.05,0.1,0.15,0.2,0.25";
        let arguments = [
            "sweep",
            run,
            "--eval=cksum < {} | awk '{ print $1 }'",
            "--out-dir",
            dir,
            sigmas,
            "--refine=2",
            "--batch=2",
        ];
        let start = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_posthoc-ema"));
            command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let mut longest = 100_000;
        while !kill(start(), Duration::from_micros(random.random_range(0..longest))) {
            (killed, longest) = (killed + 1, longest + 20_000);
            // A child that was being started at the kill has the lock open for a moment.
            let lock = fs::File::options().write(true).open(out.join(".lock"));
            lock.map_or(Ok(()), |lock| lock.lock()).unwrap();
        }
        let names: Vec<String> =
            fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(names.len() == 3 && !names.iter().any(|name| name.starts_with(".posthoc")), "{names:?}");
    }
    println!("{killed} kills, {round} sweeps");
}

#[test]
fn commands_ended_by_a_signal_leave_nothing() {
    let temp = tempfile::tempdir().unwrap();
    for job in jobs(temp.path()) {
        let mut ended_early = 0;
        for (round, signal) in
            [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().cycle().enumerate().take(300)
        {
            job.remove();
            let mut child = job.start();
            // The signal is sent once there is a temporary file.
            while job.leftovers().is_empty() && child.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            send(Pid::from_raw(child.id() as i32), signal).unwrap_or_default();
            let status = child.wait().unwrap();
            assert_eq!(job.leftovers(), Vec::<String>::new(), "{signal}, {:?}", job.arguments);
            let by_signal = std::os::unix::process::ExitStatusExt::signal(&status) == Some(signal as i32);
            assert!(status.success() || by_signal, "{status}");
            ended_early += usize::from(by_signal);
            if ended_early >= 6 && round >= 9 {
                break;
            }
        }
        assert!(ended_early > 0, "{:?} always ended before the signal", job.arguments);
    }
}
