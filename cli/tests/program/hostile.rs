//! Malicious files: they cost bounded memory, are named in errors, and reach no files beside those named.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{failure, names, posthoc_ema, train};
use posthoc_ema::snapshot::StoredFile;
use posthoc_ema::{Error, Profile, Run, SweepOptions, verify};
use serde_json::json;

/// Writes a file with a header and `data` bytes of zeros.
fn write_file(path: &Path, header: &str, data: u64) {
    let file = fs::File::create(path).unwrap();
    let head = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::os::unix::fs::FileExt::write_all_at(&file, &head, 0).unwrap();
    file.set_len(head.len() as u64 + data).unwrap();
}

/// Runs the program with a limit of memory, and returns its exit status and standard error.
pub fn run_within(mebibytes: usize, arguments: &[&str]) -> (Option<i32>, String) {
    let script = format!("ulimit -v {}; exec \"$@\"", mebibytes << 10);
    let mut command = Command::new("sh");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_posthoc-ema")]).args(arguments);
    let output = command.env("RAYON_NUM_THREADS", "2").output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Headers of the greatest length with the contents that need most memory for their bytes. Each is refused at the cost
/// of a few times its length.
#[test]
fn longest_headers_need_bounded_memory() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("0.10.safetensors");
    let full = |text: &str, each: &str| text.replace('*', &each.repeat((99_000_000 - text.len()) / each.len()));
    for (header, part) in [
        (full("*", "["), "expected"),
        (full(r#"{"a":{"dtype":"U8","shape":[*1],"data_offsets":[0,1]}}"#, "1,"), "not a snapshot of a run"),
        (full(r#"{"__metadata__":{"a":"*"}}"#, "x"), "not a snapshot of a run"),
        (full(r#"{"__metadata__":{*"a":"b"}}"#, r#""x":"","#), "not a snapshot of a run"),
        (full(r#"{"a":{*"dtype":"U8"}}"#, r#""x":[],"#), "missing field"),
        (full(r#"{*}"#, " "), "not a snapshot of a run"),
    ] {
        let data = u64::from(header.contains("[0,1]"));
        write_file(&path, &header, data);
        let (status, text) = run_within(3000, &["inspect", temp.path().to_str().unwrap()]);
        assert!(status == Some(1) && text.contains(part) && text.contains("0.10.safetensors"), "{status:?} {text}");
        assert!(text.len() < 10_000, "{} bytes", text.len());
    }
    // Lengths beyond the limit of the format.
    for length in [100_000_001u64, u64::MAX, 1 << 40] {
        fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        let (_, text) = run_within(3000, &["inspect", temp.path().to_str().unwrap()]);
        assert!(text.contains("the header is longer than the format allows"), "{text}");
    }
}

#[test]
fn pipes_devices_and_folders_are_not_opened() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    let place = dir.join("0.550.safetensors");
    let pipe = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    type Make = dyn Fn(&Path);
    let makes: [(&Make, &str); 4] = [
        (&pipe, "not a regular file"),
        (&|path| symlink("/dev/zero", path).unwrap(), "not a regular file"),
        (&|path| fs::create_dir(path).unwrap(), "not a regular file"),
        (&|path| symlink("/nonexistent", path).unwrap(), "0.550.safetensors"),
    ];
    for (make, part) in makes {
        make(&place);
        for command in ["inspect", "verify"] {
            let output = posthoc_ema(&[command, dir.to_str().unwrap()]);
            let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert!(!output.status.success() && text.contains(part), "{command}: {text}");
        }
        fs::remove_file(&place).or_else(|_| fs::remove_dir(&place)).unwrap();
    }
    assert!(Run::open(&dir).is_ok());
    // Links to files are followed: caches of Hugging Face's tools have them.
    let moved = temp.path().join("blob");
    fs::rename(dir.join("0.500.safetensors"), &moved).unwrap();
    symlink(&moved, dir.join("0.500.safetensors")).unwrap();
    assert_eq!(verify(&dir, &mut |_| ()).unwrap().findings.len(), 0);
}

/// Indices and modules with paths that lead out of the folder.
#[test]
fn paths_in_files_cannot_escape_their_folder() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("inputs/model");
    fs::create_dir_all(&model).unwrap();
    let entry = r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let tricks = [
        "../escaped.safetensors",
        "/tmp/escaped.safetensors",
        "a/../../escaped.safetensors",
        "sub/a.safetensors",
        "",
        ".",
        "..",
    ];
    for trick in tricks {
        let index = json!({"weight_map": {"w": trick}});
        fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();
        write_file(&temp.path().join("inputs/escaped.safetensors"), &format!("{{{entry}}}"), 4);
        let out = temp.path().join("out");
        let arguments = ["average", model.to_str().unwrap(), "--steps=1", "--uniform=1", "-o", out.to_str().unwrap()];
        let (status, text) = failure(&arguments);
        assert!(status == 1 && text.contains("which is not beside the index"), "{trick}: {text}");
        assert_eq!(names(temp.path()), ["inputs"]);
    }
    // Modules and other auxiliary files.
    fs::remove_file(model.join("model.safetensors.index.json")).unwrap();
    write_file(&model.join("model.safetensors"), &format!("{{{entry}}}"), 4);
    fs::create_dir(temp.path().join("inputs/secret")).unwrap();
    fs::write(temp.path().join("inputs/secret/config.json"), "{}").unwrap();
    let modules = ["../secret", "/etc", "../../..", "."].map(|path| json!({"path": path, "type": "x"}));
    fs::write(model.join("modules.json"), json!(modules).to_string()).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    let out = temp.path().join("out");
    let other = temp.path().join("inputs/other");
    fs::create_dir(&other).unwrap();
    fs::copy(model.join("model.safetensors"), other.join("model.safetensors")).unwrap();
    let [model, other, to] = [&model, &other, &out].map(|path| path.to_str().unwrap());
    let output = posthoc_ema(&["average", other, model, "--steps=1,2", "--uniform=2", "-o", to]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(names(temp.path()), ["inputs", "out"]);
    assert_eq!(names(&out), ["config.json", "model.safetensors", "modules.json"]);
}

#[test]
fn targets_are_written_into_the_out_dir_only() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("run");
    train(&dir);
    let out = temp.path().join("averages");
    let targets = ["--sigma-rel=0.1", "--uniform=20%,100", "--beta=0.99", "--lr-decay=1-sqrt:30%"];
    let run = [&["synthesize", dir.to_str().unwrap(), "--out-dir", out.to_str().unwrap()], &targets[..]].concat();
    assert!(posthoc_ema(&run).status.success());
    assert_eq!(names(temp.path()), ["averages", "run"]);
    assert_eq!(names(&out).len(), 5);
}

#[test]
fn control_characters_in_names_are_escaped() {
    let temp = tempfile::tempdir().unwrap();
    let name = "w\u{1b}]0;owned\u{7}\u{1b}[2J\r";
    let tensor = json!({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]});
    let metadata = json!({"posthoc_ema": "1", "step": "10", "profile": name});
    let strange = [json!({name: tensor}), json!({name: tensor, "__metadata__": metadata})];
    for header in strange.map(|header| header.to_string()) {
        write_file(&temp.path().join("0.10.safetensors"), &header, 4);
        for command in [&["inspect"][..], &["inspect", "--json"], &["verify"], &["plan", "--sigma-rel=0.1"]] {
            let output = posthoc_ema(&[command, &[temp.path().to_str().unwrap()]].concat());
            let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert!(!text.is_empty() && !text.chars().any(|c| c.is_control() && c != '\n'), "{}", text.escape_debug());
        }
    }
}

#[test]
fn folder_of_thousands_of_other_files_is_not_a_run() {
    let temp = tempfile::tempdir().unwrap();
    for i in 0..20_000 {
        fs::write(temp.path().join(format!("{i}.txt")), "").unwrap();
    }
    assert!(matches!(Run::open(temp.path()), Err(Error::NoRun { .. })));
    let missing: PathBuf = temp.path().join("0.1-00001-of-99999.safetensors");
    fs::write(&missing, "").unwrap();
    assert!(Run::open(temp.path()).is_err() && StoredFile::open(&missing).is_err());
}

/// A few bytes can claim billions of updates, which happen on a clock of images or tokens.
#[test]
fn histories_of_billions_of_updates_are_planned_in_bounded_memory_and_time() {
    let temp = tempfile::tempdir().unwrap();
    for i in 1..=8u64 {
        let step = 1_000_000_000 * i;
        let header = json!({
            "__metadata__": {
                "format": "pt",
                "posthoc_ema": "1",
                "profile": r#"{"kind":"power","gamma":6.94}"#,
                "step": step.to_string(),
                "history": format!("[[1,{step},1]]"),
            },
            "w": { "dtype": "F32", "shape": [4], "data_offsets": [0, 16] },
        });
        write_file(&temp.path().join(format!("0.{step}.safetensors")), &header.to_string(), 16);
    }
    let begun = std::time::Instant::now();
    for command in ["plan", "error"] {
        let dir = temp.path().to_str().unwrap();
        let targets: &[&str] = if command == "plan" { &["--sigma-rel", "0.15"] } else { &[] };
        let (status, text) = run_within(400, &[&[command, dir], targets].concat());
        assert_eq!(status, Some(0), "{command}: {text}");
    }
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
}

#[test]
fn thousands_of_empty_snapshots_are_verified_in_linear_time() {
    let temp = tempfile::tempdir().unwrap();
    for step in 1..=8000 {
        fs::write(temp.path().join(format!("0.{step}.safetensors")), "").unwrap();
    }
    let begun = std::time::Instant::now();
    let report = verify(temp.path(), &mut |_| ()).unwrap();
    assert_eq!((report.files, report.findings.len()), (8000, 8000));
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
}

/// A sweep into a directory of others: its lock and its candidates are links or pipes, and a link has the name of a
/// temporary file.
#[test]
fn sweep_follows_no_planted_link() {
    let temp = tempfile::tempdir().unwrap();
    let [dir, out, target] = ["run", "out", "target"].map(|name| temp.path().join(name));
    train(&dir);
    let run = Run::open(&dir).unwrap();
    fs::create_dir(&out).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(target.join("file"), "kept").unwrap();
    let targets = [0.1, 0.15].map(|sigma_rel| Profile::sigma_rel(sigma_rel).unwrap());
    let sweep = |plant: &dyn Fn()| {
        let options = SweepOptions { keep_all: true, refine: 0, ..SweepOptions::new(&out, &targets) };
        run.sweep(&options, |candidate| {
            plant();
            Ok::<f64, Error>(f64::from(candidate.path.exists()))
        })
    };
    let pipe = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    let link = |path: &Path| symlink(&target, path).unwrap();
    let dangling = |path: &Path| symlink(target.join("made"), path).unwrap();
    let refused = |name: &str, make: &dyn Fn(&Path), part: &str| {
        make(&out.join(name));
        let text = sweep(&|| ()).map(|_| ()).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains(name), "{text}");
        fs::remove_file(out.join(name)).unwrap();
    };
    refused(".lock", &pipe, "not a regular file");
    refused(".lock", &link, "not a regular file");
    refused(".lock", &dangling, "not a regular file");
    // Names that a process could guess.
    let planted = [".posthoc-ema-best", ".posthoc-ema-link"].map(|name| out.join(name));
    let plant = || {
        planted.iter().filter(|path| !path.is_symlink()).for_each(|path| symlink(target.join("file"), path).unwrap())
    };
    assert!(sweep(&plant).unwrap().best[0].exists());
    assert!(planted.iter().all(|path| path.is_symlink()));
    fs::remove_dir_all(out.join("candidates")).unwrap();
    refused("candidates", &link, "a link is here");
    assert_eq!(names(&target), ["file"]);
    assert_eq!(fs::read(target.join("file")).unwrap(), b"kept");
    let hidden = names(&out).into_iter().filter(|name| name.starts_with(".posthoc-ema-"));
    assert_eq!(hidden.count(), planted.len());
}
