//! Disks that are full or read-only: file systems in memory, each mounted for a child process.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use posthoc_ema::{Error, PostHocEma, Retention, SavedState, verify};

/// Environment variable with the mount point, in the child process.
const MOUNTED: &str = "POSTHOC_EMA_TEST_MOUNTED";

type Model = Vec<(&'static str, Vec<f32>)>;

fn model(step: u64) -> Model {
    vec![("weight", (0..60_000).map(|i| ((step * 7 + i * 13) as f32).sin()).collect())]
}

/// Runs a test again in a child process with a mounted file system of `kib` KiB. Returns its mount point in the child.
///
/// Skips the test if the system does not allow the mount.
fn mounted(test: &str, kib: usize) -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os(MOUNTED) {
        return Some(dir.into());
    }
    let dir = tempfile::tempdir().unwrap();
    let script = format!("mount -t tmpfs -o size={kib}k tmpfs \"$1\" && exec \"$2\" --exact disk::{test} --nocapture");
    let run = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--mount", "sh", "-c", command, "sh"]);
        unshare.arg(dir.path()).arg(std::env::current_exe().unwrap()).env(MOUNTED, dir.path());
        unshare.output()
    };
    let possible = run("mount -t tmpfs tmpfs \"$1\"");
    if !possible.is_ok_and(|output| output.status.success()) {
        eprintln!("{test}: skipped, because no file system can be mounted here");
        return None;
    }
    let output = run(&script).unwrap();
    let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}");
    None
}

fn remount(dir: &Path, options: &str) {
    let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(dir).status().unwrap();
    assert!(status.success());
}

fn train(ema: &mut PostHocEma, until: u64) -> Result<(), Error> {
    while ema.step() < until {
        ema.update(&model(ema.step() + 1))?;
    }
    ema.flush()
}

fn options(dir: &Path) -> posthoc_ema::Options {
    let options = PostHocEma::options(dir).update_every(1).checkpoint_every(5).snapshot_growth(None);
    options.retention(Retention::Latest).max_checkpoints(100)
}

fn assert_whole(dir: &Path) {
    assert_eq!(verify(dir, &mut |_| ()).unwrap().findings.iter().map(ToString::to_string).collect::<Vec<_>>(), [""; 0]);
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with(".posthoc")).collect::<Vec<_>>(), [""; 0]);
}

#[test]
fn full_disk_is_an_error_that_loses_nothing() {
    // The live state takes 0.7 MB, and each step's pair of snapshots 0.5 MB.
    let Some(disk) = mounted("full_disk_is_an_error_that_loses_nothing", 3000) else { return };
    let dir = disk.join("run");
    let mut ema = options(&dir).create(&model(0)).unwrap();
    let error = train(&mut ema, 100).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Io { .. }) && text.contains("No space left") && text.contains("run/"), "{text}");
    let (step, saved) = (ema.step(), SavedState::of(&dir).unwrap().unwrap().step);
    assert!(step > 5 && saved > 0 && saved <= step, "{step} {saved}");
    // The run can be resumed and finished once there is room.
    assert!(ema.finish().is_err());
    assert_whole(&dir);
    drop(ema);
    remount(&disk, "size=60m");
    let mut ema = options(&dir).resume(&model(0)).unwrap();
    assert!(ema.step() >= saved);
    train(&mut ema, 40).unwrap();
    ema.finish().unwrap();
    assert_whole(&dir);
    // The result equals that of a disk that was never full.
    let straight = disk.join("straight");
    let mut ema = options(&straight).create(&model(0)).unwrap();
    train(&mut ema, 40).unwrap();
    ema.finish().unwrap();
    let data = |dir: &Path| {
        let bytes = std::fs::read(dir.join("1.40.safetensors")).unwrap();
        bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..].to_vec()
    };
    assert!(data(&dir) == data(&straight));
}

#[test]
fn read_only_disk_is_an_error_that_loses_nothing() {
    let Some(disk) = mounted("read_only_disk_is_an_error_that_loses_nothing", 60_000) else { return };
    let dir = disk.join("run");
    let mut ema = options(&dir).create(&model(0)).unwrap();
    train(&mut ema, 10).unwrap();
    // The mount cannot become read-only while the lock file is open for writing.
    drop(ema);
    remount(&disk, "ro");
    let text = options(&dir).resume(&model(0)).err().map(|error| error.to_string()).unwrap();
    assert!(text.contains("Read-only file system") && text.contains("run"), "{text}");
    let text = PostHocEma::options(disk.join("other")).create(&model(0)).err().map(|error| error.to_string()).unwrap();
    assert!(text.contains("Read-only file system") && text.contains("other"), "{text}");
    assert_whole(&dir);
    remount(&disk, "rw");
    let mut ema = options(&dir).resume(&model(0)).unwrap();
    train(&mut ema, 20).unwrap();
    ema.finish().unwrap();
    assert_whole(&dir);
}

/// Environment variable with the directory of the run, in the child process with a limit on the length of files.
const LIMITED: &str = "POSTHOC_EMA_TEST_LIMITED";

#[test]
fn file_length_limit_is_an_error_and_no_signal() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let Some(dir) = std::env::var_os(LIMITED).map(PathBuf::from) else {
        let temp = tempfile::tempdir().unwrap();
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args(["--exact", "disk::file_length_limit_is_an_error_and_no_signal", "--nocapture"]);
        let output = test.env(LIMITED, temp.path().join("run")).output().unwrap();
        return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let mut ema = options(&dir).create(&model(0)).unwrap();
    train(&mut ema, 10).unwrap();
    let before = getrlimit(Resource::Fsize);
    // A snapshot takes 240 kB, the live state 720 kB.
    setrlimit(Resource::Fsize, Rlimit { current: Some(300_000), ..before }).unwrap();
    let error = train(&mut ema, 15).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, Error::Io { .. }) && text.contains("File too large") && text.contains("ulimit -f"),
        "{text}"
    );
    assert_whole(&dir);
    setrlimit(Resource::Fsize, before).unwrap();
    train(&mut ema, 20).unwrap();
    ema.finish().unwrap();
    assert_eq!(SavedState::of(&dir).unwrap().unwrap().step, 20);
    assert_whole(&dir);
}

#[test]
fn missing_directory_is_an_error_that_loses_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    let mut ema = options(&dir).create(&model(0)).unwrap();
    train(&mut ema, 10).unwrap();
    let elsewhere = temp.path().join("elsewhere");
    std::fs::rename(&dir, &elsewhere).unwrap();
    let text = train(&mut ema, 15).unwrap_err().to_string();
    assert!(text.contains("check the path") && text.contains(dir.to_str().unwrap()), "{text}");
    std::fs::rename(&elsewhere, &dir).unwrap();
    train(&mut ema, 20).unwrap();
    ema.finish().unwrap();
    assert_eq!(SavedState::of(&dir).unwrap().unwrap().step, 20);
    assert_whole(&dir);
}
