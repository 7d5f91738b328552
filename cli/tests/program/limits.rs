//! Limits of the system on processes, threads and open files: each is one clear error with its remedy.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::{names, run, train};
use posthoc_ema::{Dtype, Run};

/// A user that has no process. The limit counts the processes and threads of a user, and does not hold for root.
const USER: u32 = 54_321;

/// The program and a run, in a folder that any user can write to.
struct Case {
    temp: tempfile::TempDir,
    program: PathBuf,
}

impl Case {
    fn new() -> Case {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o777)).unwrap();
        train(&temp.path().join("run"));
        let program = temp.path().join("program");
        // The folder of the build may be private.
        fs::copy(env!("CARGO_BIN_EXE_posthoc-ema"), &program).unwrap();
        Case { temp, program }
    }

    fn path(&self, name: &str) -> String {
        self.temp.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs a command as the user who may have `most` processes and threads.
    fn run(&self, most: usize, arguments: &[String]) -> Output {
        let mut command = Command::new("prlimit");
        command.uid(USER).gid(USER).current_dir(self.temp.path());
        command.arg(format!("--nproc={most}")).arg(&self.program).args(arguments);
        command.env("RAYON_NUM_THREADS", "2").env("HOME", self.temp.path()).output().unwrap()
    }
}

/// Returns true if the tests run as root, who alone can become another user.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

#[test]
fn too_few_processes_are_an_error_with_the_remedy() {
    if !is_root() {
        return println!("skipped: only root can become a user without other processes");
    }
    let case = Case::new();
    let run = case.path("run");
    let checkpoints = case.path("checkpoints");
    fs::create_dir(&checkpoints).unwrap();
    for step in [5, 10] {
        let bytes = [0; 4];
        let tensor = safetensors::tensor::TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
        let path = Path::new(&checkpoints).join(format!("step{step}.safetensors"));
        safetensors::serialize_to_file([("weight", tensor)], None, &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let commands: [&[&str]; 9] = [
        &["inspect", &run],
        &["verify", &run],
        &["plan", &run, "--sigma-rel=0.1"],
        &["plan", "--steps=1000", "--sigma-rel=0.1"],
        &["plan", "--advise", "--steps=20000", "--parameters=1M", "--disk=110MB"],
        &["synthesize", &run, "--sigma-rel=0.1", "-o", "average.safetensors"],
        &["average", &checkpoints, "--uniform=2", "-o", "mean.safetensors"],
        &["sweep", &run, "--eval=echo 1 # {}", "--out-dir=sweep", "--sigma-rel=0.1,0.2", "--refine=0"],
        &["bench", "--parameters=100000", "--tensors=2", "--snapshots=2", "--repeats=1", "--device=cpu"],
    ];
    for command in commands {
        let arguments: Vec<String> = command.iter().map(|&word| word.to_owned()).collect();
        let mut errors = 0;
        for most in 1..=6 {
            let output = case.run(most, &arguments);
            let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            let has_ended = output.status.code().is_some_and(|status| status < 2);
            assert!(has_ended && !text.contains("panicked"), "{command:?} with {most}: {text}");
            // A shell that cannot start its own processes says so in its own words.
            let is_evaluation = text.contains("no evaluation succeeded");
            assert!(output.status.success() || text.contains("ulimit -u") || is_evaluation, "{command:?}: {text}");
            errors += usize::from(text.contains("cannot start threads"));
        }
        assert!(errors > 0, "{command:?} was never refused");
    }
    assert!(names(case.temp.path()).iter().all(|name| !name.starts_with('.')));
}

#[test]
fn too_few_open_files_are_an_error_with_the_remedy() {
    let (temp, run) = run();
    let out = temp.path().join("averages");
    let targets: Vec<String> = (0..231).map(|i| (0.05 + 0.001 * f64::from(i)).to_string()).collect();
    let sigmas = format!("--sigma-rel={}", targets.join(","));
    let arguments = ["synthesize", &run, "--out-dir", out.to_str().unwrap(), &sigmas];
    let mut command = Command::new("prlimit");
    command.arg("--nofile=64").arg(env!("CARGO_BIN_EXE_posthoc-ema")).args(arguments);
    let output = command.env("RAYON_NUM_THREADS", "2").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("ulimit -n"), "{text}");
    assert!(text.lines().count() == 1 && text.contains("averages/"), "{text}");
    assert!(!out.exists() || names(&out).is_empty(), "nothing is left");
    // Fewer targets at a time fit.
    let few = format!("--sigma-rel={}", targets[..30].join(","));
    let arguments = ["synthesize", &run, "--out-dir", out.to_str().unwrap(), &few];
    let mut command = Command::new("prlimit");
    command.arg("--nofile=64").arg(env!("CARGO_BIN_EXE_posthoc-ema")).args(arguments);
    assert!(command.env("RAYON_NUM_THREADS", "2").output().unwrap().status.success());
    assert_eq!(names(&out).len(), 30);
    Run::open(&run).unwrap();
}
