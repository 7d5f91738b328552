//! Several processes and threads on one run: two writers, readers beside a writer, locks of killed processes.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use posthoc_ema::{At, Error, Options, PostHocEma, Profile, Retention, Run, verify};

/// Environment variable with the directory in which the child process trains.
const DIR: &str = "POSTHOC_EMA_TEST_TRAINED";

fn model(step: u64) -> Vec<(&'static str, Vec<f32>)> {
    vec![("weight", (0..5000).map(|i| ((step * 7 + i * 13) as f32).sin()).collect())]
}

fn options(dir: &Path) -> Options {
    let options = PostHocEma::options(dir).update_every(1).update_after_step(0).checkpoint_every(4);
    options.retention(Retention::Latest).max_checkpoints(5)
}

fn target() -> Profile {
    Profile::sigma_rel(0.15).unwrap()
}

/// Starts a child process that trains until it is killed, and waits for its first state.
fn start(test: &str, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &format!("concurrency::{test}"), "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let begun = Instant::now();
    while !dir.join("state.safetensors").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the child process does not train");
        thread::sleep(Duration::from_millis(1));
    }
    child
}

/// Trains forever in the child process. Returns false in the test itself.
fn is_child() -> bool {
    let Some(dir) = std::env::var_os(DIR) else { return false };
    // The test also tries to write, and may hold the lock first.
    let mut ema = loop {
        match options(Path::new(&dir)).resume_or_create(&model(0)) {
            Err(Error::Locked { .. }) => thread::sleep(Duration::from_millis(2)),
            ema => break ema.unwrap(),
        }
    };
    loop {
        ema.update(&model(ema.step() + 1)).unwrap();
    }
}

#[test]
fn second_writer_is_refused_until_the_first_is_killed() {
    if is_child() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    for _ in 0..10 {
        let mut child = start("second_writer_is_refused_until_the_first_is_killed", &dir);
        let begun = Instant::now();
        // The files of the previous round exist before the child has the lock.
        loop {
            match options(&dir).resume(&model(0)) {
                Err(error @ Error::Locked { .. }) => break assert!(error.to_string().contains("another tracker")),
                Err(error) => panic!("{error}"),
                Ok(_) => assert!(begun.elapsed() < Duration::from_secs(60), "the run is never locked"),
            }
            thread::sleep(Duration::from_millis(5));
        }
        assert!(matches!(options(&dir).resume_or_create(&model(0)), Err(Error::Locked { .. })));
        child.kill().unwrap();
        child.wait().unwrap();
        // The lock file remains, but no process holds it.
        assert!(dir.join(".lock").exists());
        let step = options(&dir).resume(&model(0)).unwrap().step();
        assert!(step > 0 && verify(&dir, &mut |_| ()).unwrap().findings.is_empty());
    }
}

#[test]
fn readers_beside_a_writer_find_a_whole_run() {
    if is_child() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut child = start("readers_beside_a_writer_find_a_whole_run", &dir);
    let (mut opened, mut newest) = (0, 0);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) || opened < 20 {
        match Run::open(&dir) {
            Ok(run) => {
                let plan = run.plan(target(), At::Latest).unwrap();
                assert!(plan.at >= newest, "{} after {newest}", plan.at);
                newest = plan.at;
                run.load(&plan).unwrap();
                opened += 1;
            }
            // The first snapshot may not exist yet.
            Err(error) => assert!(matches!(error, Error::NoRun { .. }) && opened == 0, "{error}"),
        }
        let found = verify(&dir, &mut |_| ()).map(|verified| verified.findings);
        let fine = |finding: &Error| opened == 0 && matches!(finding, Error::NoRun { .. });
        assert!(found.as_ref().is_ok_and(|findings| findings.iter().all(fine)), "{found:?}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(newest > 20, "{newest} steps, {opened} times");
}

#[test]
fn plan_outlives_dropped_snapshots() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut ema = options(&dir).create(&model(0)).unwrap();
    let mut train = |until: u64| {
        while ema.step() < until {
            ema.update(&model(ema.step() + 1)).unwrap();
        }
        ema.flush().unwrap();
    };
    train(20);
    let run = Run::open(&dir).unwrap();
    let plan = run.plan(target(), At::Latest).unwrap();
    let before = run.load(&plan).unwrap();
    train(200);
    let gone = |snapshot: &posthoc_ema::snapshot::Snapshot| !snapshot.path().exists();
    assert!(run.snapshots().iter().all(gone), "retention has dropped nothing");
    assert_eq!(run.load(&plan).unwrap(), before);
    let output = temp.path().join("average.safetensors");
    run.write(&plan, &output).unwrap();
    let bytes = std::fs::read(&output).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("weight").unwrap().data(), before.get("weight").unwrap().bytes);
}

#[test]
fn concurrent_writers_of_one_output_leave_a_whole_file() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut ema = options(&dir).create(&model(0)).unwrap();
    (1..=20).for_each(|step| assert!(ema.update(&model(step)).is_ok()));
    ema.finish().unwrap();
    let run = Run::open(&dir).unwrap();
    let plans = [0.1, 0.2].map(|sigma_rel| run.plan(Profile::sigma_rel(sigma_rel).unwrap(), At::Latest).unwrap());
    let outputs = temp.path().join("outputs");
    std::fs::create_dir(&outputs).unwrap();
    let alone = plans.each_ref().map(|plan| {
        let path = outputs.join("alone.safetensors");
        run.write(plan, &path).unwrap();
        std::fs::read(path).unwrap()
    });
    let path = outputs.join("both.safetensors");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers =
            plans.each_ref().map(|plan| scope.spawn(|| (0..50).for_each(|_| run.write(plan, &path).unwrap())));
        let reader = scope.spawn(|| {
            let mut read = 0;
            while !done.load(Ordering::SeqCst) {
                if let Ok(bytes) = std::fs::read(&path) {
                    assert!(alone.contains(&bytes), "{} bytes", bytes.len());
                    read += 1;
                }
            }
            read
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        done.store(true, Ordering::SeqCst);
        assert!(reader.join().unwrap() > 0);
    });
    let mut names: Vec<_> = std::fs::read_dir(&outputs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["alone.safetensors", "both.safetensors"]);
}
