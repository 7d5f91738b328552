//! Damaged files of a run: every change is found, and the sound snapshots stay usable.

use std::fs;
use std::path::{Path, PathBuf};

use posthoc_ema::{At, Dtype, Error, Plan, PostHocEma, Profile, Run, verify};

/// Trains a run of two profiles with a snapshot every ten steps and a live state.
fn small_run(dir: &Path, shard_size: u64, steps: u8) {
    let mut model = model();
    let options = PostHocEma::options(dir).sigma_rels([0.05, 0.28]).update_every(1).checkpoint_every(10);
    let options = options.snapshot_growth(None);
    let mut ema = options.checkpoint_dtype(Dtype::F16).shard_size(shard_size).create(&model).unwrap();
    for step in 0..steps {
        model.iter_mut().flat_map(|(_, values)| values).for_each(|value| *value += 0.01 * f32::from(step));
        ema.update(&model).unwrap();
    }
    ema.finish().unwrap();
}

fn model() -> Vec<(&'static str, Vec<f32>)> {
    vec![("a", vec![0.5f32; 5]), ("b", vec![0.25f32; 3])]
}

fn run() -> (tempfile::TempDir, PathBuf) {
    run_of(1 << 20, 30)
}

fn run_until(steps: u8) -> (tempfile::TempDir, PathBuf) {
    run_of(1 << 20, steps)
}

fn run_of(shard_size: u64, steps: u8) -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    small_run(&dir, shard_size, steps);
    (temp, dir)
}

/// Returns the files of a run in order.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

/// Returns the findings of a verification.
fn findings(dir: &Path) -> Vec<String> {
    verify(dir, &mut |_| ()).unwrap().findings.iter().map(ToString::to_string).collect()
}

fn plan(run: &Run) -> Plan {
    run.plan(Profile::sigma_rel(0.15).unwrap(), At::Latest).unwrap()
}

/// Returns the offset of the data section of a file.
fn data_offset(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

#[test]
fn verify_finds_every_flipped_byte() {
    let (_temp, dir) = run();
    assert_eq!(findings(&dir), Vec::<String>::new());
    let files = files(&dir);
    assert_eq!(files.len(), 7);
    let mut flips = 0;
    for path in &files {
        let whole = fs::read(path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 1 << (i % 8);
            fs::write(path, &flipped).unwrap();
            let found = findings(&dir);
            assert!(!found.is_empty() && found[0].contains(name), "{name}, byte {i}: {found:?}");
            flips += 1;
            // Opening the run refuses a snapshot with a changed header.
            if i < data_offset(&whole) && name != "state.safetensors" {
                assert!(Run::open(&dir).is_err(), "{name}, byte {i}");
            }
        }
        fs::write(path, &whole).unwrap();
    }
    assert_eq!(findings(&dir), Vec::<String>::new());
    println!("{flips} bytes flipped");
}

#[test]
fn verify_finds_every_flipped_byte_of_shards_and_index() {
    let (_temp, dir) = run_of(12, 30);
    assert_eq!((files(&dir).len(), findings(&dir)), (13, Vec::new()));
    for name in ["1.20-00001-of-00002.safetensors", "1.20-00002-of-00002.safetensors", "1.20.safetensors.index.json"] {
        let path = dir.join(name);
        let whole = fs::read(&path).unwrap();
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 1 << (i % 8);
            fs::write(&path, &flipped).unwrap();
            let found = findings(&dir);
            assert!(!found.is_empty() && found[0].contains("1.20"), "{name}, byte {i}: {found:?}");
        }
        fs::write(&path, &whole).unwrap();
    }
    // Shards without an index are complete: the index is written last.
    fs::remove_file(dir.join("1.20.safetensors.index.json")).unwrap();
    assert_eq!(findings(&dir), Vec::<String>::new());
    fs::remove_file(dir.join("1.30-00001-of-00002.safetensors")).unwrap();
    assert!(findings(&dir)[0].contains("1.30-00001-of-00002.safetensors"));
}

#[test]
fn verify_finds_every_truncation() {
    let (_temp, dir) = run();
    for name in ["0.20.safetensors", "state.safetensors"] {
        let path = dir.join(name);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(findings(&dir)[0].contains(name), "{length}");
        }
        fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        assert!(findings(&dir)[0].contains(name));
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn open_sound_leaves_out_and_names_damaged_snapshots() {
    let (_temp, dir) = run();
    let whole = plan(&Run::open(&dir).unwrap());
    let path = dir.join("0.20.safetensors");
    let bytes = fs::read(&path).unwrap();
    for i in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
        let mut flipped = bytes.clone();
        flipped[i] ^= 0x10;
        fs::write(&path, &flipped).unwrap();
        let mut read = 0;
        let (run, damaged) = Run::open_sound(&dir, &mut |bytes| read += bytes).unwrap();
        assert_eq!((run.snapshots().len(), damaged.len()), (5, 1), "byte {i}");
        assert!(damaged[0].to_string().contains("0.20.safetensors"), "{}", damaged[0]);
        assert_eq!(read, 5 * bytes.len() as u64);
        let plan = plan(&run);
        assert!(plan.weights.iter().all(|weight| (weight.index, weight.step) != (0, 20)));
        assert!(plan.relative_error > whole.relative_error, "{} {}", plan.relative_error, whole.relative_error);
        run.load(&plan).unwrap();
    }
    // Opening does not read data: only a verification of the plan does.
    let run = Run::open(&dir).unwrap();
    let text = run.verify_used(&[plan(&run)], &mut |_| ()).unwrap_err().to_string();
    assert!(text.contains("0.20.safetensors") && text.contains("checksum"), "{text}");
    for path in files(&dir) {
        fs::write(&path, b"gone").unwrap();
    }
    assert!(matches!(Run::open_sound(&dir, &mut |_| ()), Err(Error::Damaged { .. })));
}

#[test]
fn swapped_and_copied_files_are_found() {
    let (_temp, dir) = run();
    let name = |name: &str| dir.join(format!("{name}.safetensors"));
    let swap = |a: &str, b: &str| {
        fs::rename(name(a), name("x")).unwrap();
        fs::rename(name(b), name(a)).unwrap();
        fs::rename(name("x"), name(b)).unwrap();
    };
    for (a, b) in [("0.10", "0.20"), ("0.10", "1.10"), ("1.20", "0.30")] {
        swap(a, b);
        assert!(!findings(&dir).is_empty() && Run::open(&dir).is_err(), "{a} and {b}");
        swap(a, b);
        assert_eq!(findings(&dir), Vec::<String>::new());
    }
    fs::copy(name("0.10"), name("0.15")).unwrap();
    let text = Run::open(&dir).unwrap_err().to_string();
    assert!(text.contains("0.15.safetensors") && text.contains("step 10"), "{text}");
    assert_eq!(Run::open_sound(&dir, &mut |_| ()).unwrap().1.len(), 1);
    fs::remove_file(name("0.15")).unwrap();

    // The same snapshot as one file and as a single shard.
    let shard = dir.join("0.20-00001-of-00001.safetensors");
    fs::copy(name("0.20"), &shard).unwrap();
    let text = Run::open(&dir).unwrap_err().to_string();
    assert!(text.contains("0.20.safetensors: this snapshot exists twice"), "{text}");
    assert_eq!(findings(&dir).len(), 1);
    assert_eq!(Run::open_sound(&dir, &mut |_| ()).unwrap().1.len(), 1);
    fs::remove_file(&shard).unwrap();
    assert_eq!(findings(&dir), Vec::<String>::new());

    // A snapshot of another run with the same options.
    let (_other, other) = run();
    fs::copy(other.join("0.10.safetensors"), name("0.10")).unwrap();
    assert!(matches!(Run::open(&dir), Err(Error::Mismatch { .. })));
    let (run, damaged) = Run::open_sound(&dir, &mut |_| ()).unwrap();
    assert!(run.snapshots().len() == 5 && damaged[0].to_string().contains("0.10.safetensors"), "{damaged:?}");
}

#[test]
fn snapshots_with_a_diverged_history_are_left_out() {
    let (_temp, dir) = run_until(15);
    let other = dir.with_file_name("other");
    fs::create_dir(&other).unwrap();
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, other.join(path.file_name().unwrap())).unwrap();
    }
    for (dir, every) in [(&dir, 1), (&other, 2)] {
        let mut ema = PostHocEma::options(dir).update_every(every).resume(&model()).unwrap();
        (15..30).for_each(|_| assert!(ema.update(&model()).is_ok()));
        ema.finish().unwrap();
    }
    fs::copy(dir.join("0.20.safetensors"), other.join("0.20.safetensors")).unwrap();
    let text = Run::open(&other).unwrap_err().to_string();
    assert!(text.contains("0.20.safetensors: the history of updates is of one training"), "{text}");
    let (run, left_out) = Run::open_sound(&other, &mut |_| ()).unwrap();
    // Steps 10, 15, 20 and 30 of two profiles without one snapshot.
    assert_eq!((run.snapshots().len(), left_out.len()), (7, 1));
    assert!(left_out[0].to_string().contains("0.20.safetensors"), "{}", left_out[0]);
    // A snapshot that is newer than all others.
    fs::remove_file(other.join("0.20.safetensors")).unwrap();
    let mut ema = PostHocEma::options(&dir).resume(&model()).unwrap();
    (30..40).for_each(|_| assert!(ema.update(&model()).is_ok()));
    ema.finish().unwrap();
    fs::copy(dir.join("0.40.safetensors"), other.join("0.40.safetensors")).unwrap();
    let (run, left_out) = Run::open_sound(&other, &mut |_| ()).unwrap();
    assert_eq!((run.snapshots().len(), left_out.len()), (7, 1));
    assert!(
        left_out[0].to_string().contains("0.40.safetensors: the history of updates is of one training"),
        "{}",
        left_out[0]
    );
}

#[test]
fn verify_finds_a_state_of_other_snapshots() {
    let (_temp, dir) = run();
    let state = dir.join("state.safetensors");
    let newest = fs::read(&state).unwrap();
    // The state of another run with the same options.
    let (_other, other) = run();
    fs::copy(other.join("state.safetensors"), &state).unwrap();
    let found = findings(&dir);
    assert!(found.len() == 1 && found[0].contains("belongs to another run than state.safetensors"), "{found:?}");
    // An earlier state of the same run.
    let (_early, early) = run_until(15);
    let old = fs::read(early.join("state.safetensors")).unwrap();
    fs::write(early.join("state.safetensors"), &old).unwrap();
    let mut ema = PostHocEma::options(&early).resume(&model()).unwrap();
    for _ in 15..30 {
        ema.update(&model()).unwrap();
    }
    ema.finish().unwrap();
    assert_eq!(findings(&early), Vec::<String>::new());
    fs::write(early.join("state.safetensors"), &old).unwrap();
    let found = findings(&early);
    assert!(
        found.len() == 1 && found[0].contains("which is not in the history of state.safetensors (at step 15)"),
        "{found:?}"
    );
    fs::write(&state, newest).unwrap();
    assert_eq!(findings(&dir), Vec::<String>::new());
}

#[test]
fn commands_refuse_damage_or_skip_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    crate::common::train(&dir);
    let run = dir.to_str().unwrap();
    let out = temp.path().join("out.safetensors");
    let whole = plan(&Run::open(&dir).unwrap());
    let used = whole.weights.iter().find(|weight| weight.weight.abs() > 1e-3).unwrap();
    let name = format!("{}.{}.safetensors", used.index, used.step);
    let path = dir.join(&name);
    let bytes = fs::read(&path).unwrap();
    let synthesize = ["synthesize", run, "--sigma-rel", "0.15", "-o", out.to_str().unwrap(), "--json"];

    let mut flipped = bytes.clone();
    flipped[bytes.len() - 1] ^= 1;
    fs::write(&path, &flipped).unwrap();
    let (status, text) = crate::common::failure(&[&synthesize[..], &["--verify"]].concat());
    assert!(status == 1 && text.contains(&name) && text.contains("checksum"), "{text}");
    assert!(!out.exists());

    flipped[bytes.len() - 1] ^= 1;
    flipped[100] ^= 1;
    fs::write(&path, &flipped).unwrap();
    let (status, text) = crate::common::failure(&synthesize);
    assert!(status == 1 && text.contains(&name), "{text}");
    assert!(!out.exists());

    let output = crate::common::posthoc_ema(&[&synthesize[..], &["--skip-damaged"]].concat());
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.starts_with("warning: left out: ") && stderr.contains(&name), "{stderr}");
    let document: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert!(document["left_out"][0].as_str().unwrap().contains(&name));
    assert!(document["targets"][0]["relative_error"].as_f64().unwrap() > whole.relative_error);
    assert!(out.exists());
    for command in ["plan", "error"] {
        let (status, text) = crate::common::failure(&[command, run, "--sigma-rel", "0.15"]);
        assert!(status == 1 && text.contains(&name), "{text}");
        let output = crate::common::posthoc_ema(&[command, run, "--sigma-rel", "0.15", "--skip-damaged"]);
        assert!(output.status.success() && !output.stdout.is_empty());
    }
}
