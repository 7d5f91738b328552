//! Sharded trainings of which one process or all are killed at random moments, and that go on with other processes.
//!
//! `POSTHOC_EMA_KILLS` sets the number of kills, `POSTHOC_EMA_SEED` the moments.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use posthoc_ema::{
    At, Dtype, Options, Parameters, PostHocEma, Profile, Result, Retention, Run, SavedState, ShardRole, TensorView,
    agree, verify,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Variables of a training process: run directory, number of processes, own number, role.
const DIR: &str = "POSTHOC_EMA_TEST_SHARDED";
const COUNT: &str = "POSTHOC_EMA_TEST_COUNT";
const NUMBER: &str = "POSTHOC_EMA_TEST_NUMBER";
const ROLE: &str = "POSTHOC_EMA_TEST_ROLE";
/// Steps of a training.
const STEPS: u64 = 60;
/// Shape of the tensor that is cut by rows.
const WEIGHT: [usize; 2] = [61, 50];

/// Model of one process: some rows of a weight, and a whole bias.
struct Rows {
    start: usize,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Rows {
    /// Returns the model of a process after a step.
    fn new(number: usize, count: usize, step: u64) -> Rows {
        let value = |i: usize| ((step as usize * 7 + i * 13) as f32).sin() * 0.1 + 1.0;
        let each = WEIGHT[0].div_ceil(count);
        let [start, end] = [number, number + 1].map(|i| (i * each).min(WEIGHT[0]));
        let weight = (start * WEIGHT[1]..end * WEIGHT[1]).map(value).collect();
        Rows { start, weight, bias: (0..10).map(value).collect() }
    }
}

impl Parameters for Rows {
    fn with_tensors(&self, read: &mut dyn FnMut(&[TensorView<'_>]) -> Result<()>) -> Result<()> {
        let (shape, offset) = ([self.weight.len() / WEIGHT[1], WEIGHT[1]], [self.start, 0]);
        let weight = TensorView::host("weight", Dtype::F32, &shape, bytemuck::cast_slice(&self.weight))?;
        let bias = TensorView::host("bias", Dtype::F32, &[10], bytemuck::cast_slice(&self.bias))?;
        read(&[weight.as_part_of(&WEIGHT, &offset)?, bias])
    }
}

fn options(dir: &Path) -> Options {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(5).checkpoint_dtype(Dtype::F16);
    options.retention(Retention::Latest).max_checkpoints(6)
}

fn wait_for(path: &Path) {
    while !path.exists() {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Trains until the end in a process that may be killed. The first process opens the run before the others.
fn train(dir: &Path) {
    let number = |name: &str| std::env::var(name).unwrap().parse::<usize>().unwrap();
    let (count, own) = (number(COUNT), number(NUMBER));
    let role = ShardRole::from_json(&std::env::var(ROLE).unwrap()).unwrap();
    // Barriers are files whose names have the id of this start.
    let opened = |i: usize| dir.with_extension(format!("{}-{i}", role.id));
    if role.rank != Some(0) {
        wait_for(&opened(0));
    }
    let mut ema = options(dir).role(role.clone()).resume_or_create(&Rows::new(own, count, 0)).unwrap();
    fs::write(opened(own), "").unwrap();
    (0..count).for_each(|i| wait_for(&opened(i)));
    while ema.step() < STEPS {
        ema.update(&Rows::new(own, count, ema.step() + 1)).unwrap();
    }
    ema.finish().unwrap();
}

/// Processes of one start.
fn start(test: &str, dir: &Path, count: usize) -> Vec<Child> {
    let manifests: Vec<_> = (0..count).map(|i| options(dir).manifest(i, &Rows::new(i, count, 0)).unwrap()).collect();
    let roles = agree(&manifests).unwrap();
    let child = |(i, role): (usize, &ShardRole)| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("kill_sharded::{test}"), "--nocapture"]).env(DIR, dir);
        command.env(COUNT, count.to_string()).env(NUMBER, i.to_string()).env(ROLE, role.to_json());
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    roles.iter().enumerate().map(child).collect()
}

/// Waits, kills one of the processes or all, and the rest after another wait. Returns true if all had succeeded.
fn kill(mut children: Vec<Child>, random: &mut ChaCha8Rng, longest: u64) -> bool {
    let first = random.random_range(0..children.len());
    let kills_one = random.random_bool(0.5);
    let mut wait = |longest| std::thread::sleep(Duration::from_micros(random.random_range(0..longest)));
    wait(longest);
    if kills_one {
        children[first].kill().unwrap();
        wait(longest / 2 + 1);
    }
    children.iter_mut().for_each(|child| child.kill().unwrap());
    let outputs = children.into_iter().map(|child| child.wait_with_output().unwrap());
    let ended = |output: std::process::Output| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || output.status.code().is_none(), "{text}");
        output.status.success()
    };
    // All are looked at before the first that was killed ends the search.
    let ended: Vec<bool> = outputs.map(ended).collect();
    !ended.contains(&false)
}

/// Returns the bytes of all snapshots, put together, and of an average.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let run = Run::open(dir).unwrap();
    let average = run.load(&run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap()).unwrap();
    let mut all: BTreeMap<String, Vec<u8>> =
        average.iter().map(|(name, tensor)| (format!("average {name}"), tensor.bytes.clone())).collect();
    for snapshot in run.snapshots() {
        for (name, _) in snapshot.tensors() {
            let (_, bytes) = snapshot.tensor(name).unwrap();
            all.insert(format!("{} {name}", snapshot.id), bytes.into_owned());
        }
    }
    all
}

/// Checks that a run is sound, and returns the step of its live state.
fn check(dir: &Path) -> u64 {
    let Some(saved) = SavedState::of(dir).unwrap() else { return 0 };
    let found = verify(dir, &mut |_| ()).unwrap().findings;
    let is_fine = |finding: &posthoc_ema::Error| matches!(finding, posthoc_ema::Error::NoRun { .. });
    assert!(found.iter().all(is_fine), "{found:?}");
    if let Ok(run) = Run::open(dir) {
        let newest = run.snapshots().iter().map(|snapshot| snapshot.id.step).max().unwrap();
        assert!(newest <= saved.step, "a snapshot of step {newest}, a state of {}", saved.step);
    }
    saved.step
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let memory = Path::new("/dev/shm");
    let temp = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let dir = temp.path().join("run");
    (temp, dir)
}

#[test]
fn killed_processes_go_on_in_other_numbers_with_the_same_bits() {
    if let Some(dir) = std::env::var_os(DIR) {
        return train(Path::new(&dir));
    }
    let (_a, straight) = scratch();
    let mut ema = options(&straight).create(&Rows::new(0, 1, 0)).unwrap();
    (1..=STEPS).for_each(|step| assert!(ema.update(&Rows::new(0, 1, step)).is_ok()));
    ema.finish().unwrap();
    let expected = contents(&straight);
    let total = std::env::var("POSTHOC_EMA_KILLS").map_or(150, |kills| kills.parse().unwrap());
    let seed = std::env::var("POSTHOC_EMA_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("POSTHOC_EMA_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let (mut killed, mut ended) = (0, 0);
    while killed < total || ended == 0 {
        let (_temp, dir) = scratch();
        let (mut saved, mut fruitless) = (0, 0);
        for round in 0.. {
            // A slow machine gets more time.
            let longest = 60_000u64 << (fruitless / 8).min(9);
            let count = [4, 2, 3][round % 3];
            let children = start("killed_processes_go_on_in_other_numbers_with_the_same_bits", &dir, count);
            let done = kill(children, &mut random, longest);
            let now = check(&dir);
            assert!(now >= saved, "the state went back from step {saved} to {now}");
            fruitless = if now > saved { 0 } else { fruitless + 1 };
            saved = now;
            if done {
                break;
            }
            killed += 1;
        }
        ended += 1;
        assert!(contents(&dir) == expected, "the bits differ");
    }
    println!("{killed} kills, {ended} trainings");
}
